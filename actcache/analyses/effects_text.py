"""Effects as a person reads them in a terminal: one group as a 2x2 in words, several as one table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from actcache.schema import EFFECT_KEY, IT, NATIVE, OUTVOTED, PLAIN, ROLES, common_readout, names
from actcache.study.section import Lines, Section, in_words
from actcache.study.statistics import FEWEST_PROMPTS
from actcache.study.subsets import ALL, LEAST_STEPS

if TYPE_CHECKING:
    from actcache.store import Store

Group = Mapping[str, Any]
_SETTINGS = names(EFFECT_KEY)
_EFFECTS = ("late_from_pt", "late_from_it", "interaction")
# Reasons for which a prompt has no event although the checkpoints were compared and agreed.
_AGREED = frozenset({"both_ended", "no_divergence", "position_limit"})


def answer(effects: Mapping[str, Any], store: Store) -> list[str]:
    """What a run ends with: of its plain cells those read by the head of IT, natively where those were not scored."""
    if not effects["groups"]:
        return [_no_event(store)]
    groups = [group for group in effects["groups"] if group["variant"] == PLAIN and group["subset"] == ALL]
    has_common = {_place(group) for group in groups if group["readout"] == common_readout(group[IT])}
    shown = [g for g in groups if g["readout"] == (common_readout(g[IT]) if _place(g) in has_common else NATIVE)]
    return described({**effects, "groups": shown}, store)


def described(effects: Mapping[str, Any], store: Store | None = None) -> list[str]:
    """All groups of some effects; ``store`` tells how many prompts have no event, and of how many blocks."""
    groups = effects["groups"]
    if not groups:
        return ["No event in these cells." if store is None else _no_event(store)]
    return [*said_of_events(effects), *(_in_words if len(groups) == 1 else _as_table)(groups, store)]


def said_of_events(effects: Mapping[str, Any]) -> list[str]:
    """Lines about the events that the effects leave out, or keep though their own checkpoints contradict them."""
    return [line for line in (_left_out(effects), _kept(effects)) if line is not None]


def _left_out(effects: Mapping[str, Any]) -> str | None:
    """One line about the events that the effects leave out, or None where they are over all."""
    if "n_left_out" not in effects:
        return None
    reasons = []
    if not effects.get("keep_ties") and (effects.get("n_ties") or effects.get("n_wrong_sign")):
        reasons.append(f"{effects['n_ties']} with a tie and {effects['n_wrong_sign']} with the wrong sign")
    if effects.get("stable_only"):
        reasons.append(f"{effects['n_unstable']} not stable")
    if "min_gap" in effects:
        reasons.append(f"{effects['n_below_min_gap']} with a gap below {effects['min_gap']:g}")
    return f"events left out: {effects['n_left_out']} ({', '.join(reasons)})"


def _kept(effects: Mapping[str, Any]) -> str | None:
    """One line about events that contradict their own checkpoints and are kept, or None without any."""
    n_ties, n_wrong = (effects.get(name, 0) for name in ("n_ties", "n_wrong_sign"))
    if not (effects.get("keep_ties") and (n_ties or n_wrong)):
        return None
    return f"kept though their own checkpoints contradict them: {n_ties} with a tie, {n_wrong} with the wrong sign"


def reasons_of(store: Store) -> str:
    """How many prompts have no event, for which reason."""
    counts: dict[str, int] = {}
    for reason in store.excluded["reason"].to_pylist():
        counts[reason] = counts.get(reason, 0) + 1
    return ", ".join(f"{count} {reason}" for reason, count in sorted(counts.items()))


def vocabulary_of(store: Store) -> str:
    """Which ids were chosen, and at how many events another one would have won; empty where all ids might be."""
    rule, events = store.fingerprint.vocabulary or "", store.events
    if not store.fingerprint.shares_tokens:
        return rule
    won = [events[name].to_pylist() for name in names(OUTVOTED) if name in events.column_names]
    n = sum(max(ids) >= 0 for ids in zip(*won, strict=True))
    return f"{rule}; at {n} of {len(store)} events a token that not every checkpoint has would have won"


def _no_event(store: Store) -> str:
    n = store.n_without_event
    if set(store.excluded["reason"].to_pylist()) <= _AGREED:
        return f"No event: the two checkpoints chose the same tokens on all {n} prompts ({reasons_of(store)})."
    return f"No event on {n} prompts: {reasons_of(store)}."


def _place(group: Group) -> tuple[Any, ...]:
    return tuple(group[name] for name in ("kind", "pair", "boundary", "scope"))


def _in_words(groups: Sequence[Group], store: Store | None) -> list[str]:
    (group,) = groups
    margins = group.get("margins") or _by_label(group)
    labels = [label for label in (store.checkpoints if store else margins) if label in margins]
    heads = [f"late {_named(label)}".rjust(8) for label in labels]
    lines = [_heading(groups, store), "", f"{'mean margin logit(y_it) - logit(y_pt)':44}{'     '.join(heads)}"]
    for upstream in labels:
        means = (margins[upstream][late]["mean"] for late in labels)
        cells = [f"{mean:+{len(head) + 1}.3f}" for mean, head in zip(means, heads, strict=True)]
        lines.append(f"  upstream {_named(upstream):32} {'    '.join(cells)}")
    lines.append("")
    for name, words in zip(_EFFECTS, _in_full(group), strict=True):
        value = group[name]
        interval = "" if value["low"] is None else f"   95% [{value['low']:+.3f}, {value['high']:+.3f}]"
        lines.append(f"  {words}  {value['mean']:+9.3f}{interval}")
    return [*lines, *_notes(groups)]


def _by_label(group: Group) -> dict[str, dict[str, Any]]:
    """The four cells by the labels that were contrasted."""
    return {group[up]: {group[late]: group["cells"][f"{up}_{late}"] for late in ROLES} for up in ROLES}


def _named(label: str) -> str:
    """A label as it stands in a table: those that are roles stand out."""
    return label.upper() if label in ROLES else label


def _in_full(group: Group) -> list[str]:
    """What each effect is called, of one width."""
    whole = [*(f"late effect from {_named(group[role])} upstream" for role in ROLES), "interaction"]
    width = max(31, *(len(text) + 2 for text in whole))
    return [f"{text:{width}}{sign}" for text, sign in zip(whole, ("A    ", "B    ", "B - A"), strict=True)]


def _in_short(groups: Sequence[Group]) -> list[str]:
    """The same as heads of columns."""
    of_role = [{_named(group[role]) for group in groups} for role in ROLES]
    is_one = all(len(labels) == 1 for labels in of_role)
    called = [labels.pop() if is_one else role.upper() for role, labels in zip(ROLES, of_role, strict=True)]
    return [f"A: late, from {called[0]}", f"B: late, from {called[1]}", "B - A: interaction"]


def _as_table(groups: Sequence[Group], store: Store | None) -> list[str]:
    """A row for each group; what is the same for all stands above."""
    varying = [name for name in (*_SETTINGS, "subset", "n_events") if len({group.get(name) for group in groups}) > 1]
    head = [*("events" if name == "n_events" else name for name in varying), *_in_short(groups)]
    rows = [[*(str(group[name]) for name in varying), *(_number(group[name]) for name in _EFFECTS)] for group in groups]
    if sum("label_swap" in group for group in groups) > 1:
        head.append("p")
        for group, row in zip(groups, rows, strict=True):
            row.append(f"{group['label_swap']['p']:.2g}" if "label_swap" in group else "")
    widths = [max(len(row[column]) for row in [head, *rows]) for column in range(len(head))]
    lines = ["  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)) for row in [head, *rows]]
    title = "mean effects on the margin logit(y_it) - logit(y_pt), with 95% intervals"
    return [_heading(groups, store), "", title, "", *(line.rstrip() for line in lines), *_notes(groups)]


def _number(value: Mapping[str, float | None]) -> str:
    interval = "" if value["low"] is None else f" [{value['low']:+.3f}, {value['high']:+.3f}]"
    return f"{value['mean']:+.3f}{interval}"


def _heading(groups: Sequence[Group], store: Store | None) -> str:
    """How many events, and the settings that all groups share."""
    shared = {name: groups[0][name] for name in _SETTINGS if len({group[name] for group in groups}) == 1}
    said = []
    if "boundary" in shared:
        said.append(f"boundary {shared['boundary']}" + (f" of {store.fingerprint.n_blocks} blocks" if store else ""))
    elif store is not None:
        said.append(f"{store.fingerprint.n_blocks} blocks")
    said += [f"{name} {shared[name]}" for name in ("scope", "readout") if name in shared]
    said += [f"variant {shared['variant']}"] if shared.get("variant", PLAIN) != PLAIN else []
    said += ["every prompt weighs the same"] if {group.get("weights") for group in groups} == {"prompt"} else []
    of_kind: dict[tuple[str, str], int] = {}  # one event has several groups, each of other settings
    for group in groups:
        kind = group["kind"], group["pair"]
        of_kind[kind] = max(of_kind.get(kind, 0), group["n_events"])
    n_events, n_prompts = sum(of_kind.values()), max(group["n_prompts"] for group in groups)
    n_without = store.n_without_event if store else 0
    without = f" ({n_without} prompt{'s' * (n_without != 1)} without one)" if store else ""
    return f"{n_events} events of {n_prompts} prompts{without}; {', '.join(said)}"


def _notes(groups: Sequence[Group]) -> list[str]:
    """What a reader should know of these numbers."""
    notes = []
    if any(group["n_prompts"] < FEWEST_PROMPTS for group in groups):
        notes.append(f"no interval where an effect is of fewer than {FEWEST_PROMPTS} prompts")
    if any("portable_share" in group.get("flags", ()) for group in groups):
        notes.append("A and B differ in sign in places: A / B is no share there")
    if swapped := [group["label_swap"] for group in groups if "label_swap" in group]:
        p = f" = {swapped[0]['p']:.2g}" if len(swapped) == 1 else ""
        notes.append(f"label swaps: p{p} of {swapped[0]['draws']:,} draws")
    return ["", *notes] if notes else []


def section(groups: Sequence[Group]) -> Section:
    """Label swaps, flags and subsets of the plain groups by the head of IT, natively where that did not score."""
    plain = [group for group in groups if group["variant"] == PLAIN] or list(groups)
    has_common = {_place(group) for group in plain if group["readout"] == common_readout(group[IT])}
    shown = [
        g for g in plain if g["readout"] == (common_readout(g[IT]) if _place(g) in has_common else NATIVE)
    ] or plain
    named = [name for name in ("kind", "boundary", "scope") if len({group[name] for group in shown}) > 1]
    return Section(
        title="Label swaps and subsets",
        figures=_position_curves(shown),
        columns=["events", "n", "prompts", "share of events", "A", "B", "B - A", "A / B", "label-swap p"],
        rows=[
            [
                ", ".join([*(f"{name} {group[name]}" for name in named), group["subset"]]),
                group["n_events"],
                group["n_prompts"],
                {"mean": group["share_of_events"], "low": None, "high": None},
                *(group[name] for name in _EFFECTS),
                _share(group, "portable_share"),
                group["label_swap"]["p"] if "label_swap" in group else "-",
            ]
            for group in shown
        ],
        shows=(
            "The label-swap p is the share of sign patterns, one sign per prompt, whose mean interaction reaches the "
            "one observed. Swapping the two late labels of a prompt turns the sign of its interaction. "
            + _weighed(shown)
        ),
        shares=("share of events", "A / B"),
        does_not_show=(
            "A subset is other events, and partly other prompts: what differs between subsets need not come from the "
            "step or the value that names them. All numbers are conditional on these prompts and checkpoints."
        ),
    )


def _position_curves(groups: Sequence[Group]) -> list[Lines]:
    """The interaction of events from a step on, a line per kind, boundary and scope."""
    steps = {ALL: 0} | {f"step>={least}": least for least in LEAST_STEPS}
    of: dict[str, list[tuple[float, Any]]] = {}
    for group in groups:
        if group["subset"] in steps:
            name = f"{group['kind']}, boundary {group['boundary']}, {group['scope']}"
            of.setdefault(name, []).append((steps[group["subset"]], group["interaction"]))
    of = {name: points for name, points in of.items() if len(points) > 1}
    if not of:
        return []
    said = "; ".join(
        f"{name}: " + ", ".join(f"from step {step:g} {in_words(value)}" for step, value in points)
        for name, points in of.items()
    )
    return [Lines("events from this step on", "interaction B - A, logits", of, None, said)]


def _share(group: Group, name: str) -> str | Mapping[str, float | None]:
    """A share, with a word where its two means differ in sign."""
    value: Mapping[str, float | None] = group[name]
    return f"{in_words(value, share=True)}, signs differ" if name in group["flags"] else value


def _weighed(groups: Sequence[Group]) -> str:
    found = sorted({group["weights"] for group in groups})
    return f"Means weigh every {found[0]} the same." if len(found) == 1 else "Weights differ between kinds."

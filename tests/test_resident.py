"""One checkpoint in memory at a time, drafts, and continuations from elsewhere: the same events as the plain way."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from stores import bits, read_tree
from transformers import LlamaConfig
from twins.search import in_lockstep

from actcache.capture.continuations import check_beginnings, read_continuations
from actcache.capture.decide import Decider
from actcache.capture.forward import Pack, PackRows, Places, Resident
from actcache.capture.residency import AllResident, OneResident
from actcache.capture.rollouts import Rollouts
from actcache.capture.search import Outcome, SearchLimits, propose
from actcache.capture.settings import CaptureSettings
from actcache.cli import main
from actcache.errors import InputError
from actcache.models.backbone import Backbone
from actcache.models.lineup import Lineup
from actcache.models.regimes import ONE_REGIME
from actcache.progress import nobody_told
from actcache.prompts import Prompt, read_prompts
from actcache.spill import Spill
from actcache.store import SegmentData, open_store
from actcache.study import capture as study_capture
from actcache.study.capture import LocalCapture, capture
from actcache.study.held import Held
from actcache.study.holding import Holding


@pytest.fixture(scope="module", autouse=True)
def no_collections() -> Iterator[None]:
    """What is tiny may be let go later, and there are thousands of loads."""
    with mock.patch("gc.collect"):
        yield


# ---- planted checkpoints: what each writes is known, and no model runs ----

END, WIDTH = 0, 1


class Head:
    """The one value of a final state is the token that is chosen."""

    def top2(self, final: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        ids = torch.cat([final, final + 1], dim=1).long()
        return ids, torch.tensor([[2.0, 1.0]]).repeat(len(final), 1)

    def best(self, final: torch.Tensor) -> torch.Tensor:
        return self.top2(final)[0][:, 0]

    def scores(self, final: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        return (tokens == final.long()).float()


class Planted:
    """A checkpoint that chooses what a function says."""

    readout, regimes, backbone, guesses = Head(), ONE_REGIME, None, False

    def __init__(self, chosen: Callable[[Sequence[int]], int]) -> None:
        self.chosen = chosen

    def why_not_packable(self) -> str | None:
        return None

    def run(self, packs: Sequence[Pack], places: Places) -> Iterator[PackRows]:
        for pack in packs:
            final = []
            for at in pack.compared.tolist():
                start = max(bound for bound in pack.bounds if bound <= at)
                final.append([float(self.chosen(pack.ids[0, start : at + 1].tolist()))])
            rows = pack.ids[0][pack.kept][:, None].float()
            yield PackRows(dict.fromkeys(places, rows), torch.tensor(final).view(-1, WIDTH))

    def write(
        self, sequences: Sequence[Sequence[int]], n_new: Sequence[int], end_ids: frozenset[int]
    ) -> list[list[int]]:
        found = []
        for ids, n in zip(sequences, n_new, strict=True):
            written: list[int] = []
            while len(written) < n and not (written and written[-1] in end_ids):
                written.append(self.chosen([*ids, *written]))
            found.append(written)
        return found


class Guessing(Planted):
    """One whose drafts are none of its own choices."""

    guesses = True

    def write(
        self, sequences: Sequence[Sequence[int]], n_new: Sequence[int], end_ids: frozenset[int]
    ) -> list[list[int]]:
        return [[7] * min(n, 3) for n in n_new]


def lineup_of(labels: Sequence[str], pairs: Sequence[tuple[str, str]]) -> Any:
    config = LlamaConfig(max_position_embeddings=64)
    return SimpleNamespace(
        pair=pairs[0], pairs=tuple(pairs), paired=list(labels), labels=list(labels), decode=str,
        special_ids=frozenset(), has_tails=False, width=WIDTH, end_ids=frozenset({END}), max_positions=64,
        checkpoints={label: SimpleNamespace(config=config) for label in labels},
    )  # fmt: skip


N_NEW = 9
PLANTED = CaptureSettings((1,), max_new=N_NEW, max_tokens=16)


def planted(steps: Sequence[int | None], ends: Sequence[int | None], n_labels: int) -> dict[str, Planted]:
    """Checkpoints that share what follows prompt i, but that all others part from the first one at ``steps[i]``, each
    choosing its own, and that end at ``ends[i]``, if they come so far."""

    def of(number: int) -> Callable[[Sequence[int]], int]:
        def chosen(sequence: Sequence[int]) -> int:
            prompt, step = sequence[0] - 100, len(sequence) - 2
            shared = [10 + (prompt + at) % 5 for at in range(step)]
            if list(sequence[2:]) != shared:  # something else came before
                return 50 + number
            if number and step == steps[prompt]:
                return 60 + number
            return END if step == ends[prompt] else 10 + (prompt + step) % 5

        return chosen

    return {f"c{number}": Planted(of(number)) for number in range(n_labels)}


def steps_of(decider: Decider, n_prompts: int, told: Any = nobody_told) -> Any:
    prompts = [Prompt(f"p{i}", "x") for i in range(n_prompts)]
    ids = [[100 + i, 1] for i in range(n_prompts)]
    if len(decider.pairs) > 1:
        return Rollouts(decider).run(prompts, ids, told)
    return decider.searched(prompts, ids, told)


def seen(data: SegmentData) -> tuple[Any, ...]:
    """All that a segment holds but for what was proposed."""
    rows = {key: bits(values) for key, values in (data.states | data.final).items()}
    events = data.events.drop_columns(["proposed_step"]).to_pylist()
    return events, data.excluded.to_pylist(), data.token_ids.tolist(), rows


wrongs = st.lists(st.integers(1, 70), min_size=1, max_size=N_NEW + 3)


@st.composite
def cases(draw: st.DrawFn) -> tuple[list[int | None], list[int | None], int, dict[str, dict[str, list[int]]]]:
    n, n_labels = draw(st.integers(1, 4)), draw(st.integers(2, 3))
    at = st.none() | st.integers(0, N_NEW)
    steps, ends = (draw(st.lists(at, min_size=n, max_size=n)) for _ in range(2))
    models = planted(steps, ends, n_labels)
    known: dict[str, dict[str, list[int]]] = {}
    for i in range(n):
        for label, model in models.items():
            how = draw(st.sampled_from(["none", "true", "short", "wrong", "corrupt", "corrupt at the start"]))
            (own,) = model.write([[100 + i, 1]], [N_NEW], frozenset({END}))
            if how == "short":
                own = own[: draw(st.integers(1, len(own)))]
            elif how == "wrong":
                own = draw(wrongs)
            elif how.startswith("corrupt"):
                own[0 if how.endswith("start") else draw(st.integers(0, len(own) - 1))] = draw(st.integers(0, 70))
            if how != "none":
                known.setdefault(f"p{i}", {})[label] = own
    return steps, ends, n_labels, known


@settings(max_examples=60, deadline=None)
@given(cases())
def test_whatever_is_proposed_the_events_are_those_that_were_planted(case):
    steps, ends, n_labels, known = case
    models, n = planted(steps, ends, n_labels), len(steps)
    pairs = [("c0", label) for label in list(models)[1:]]
    lineup = lineup_of(list(models), pairs)

    def of(checkpoints: Any, known: Any = None) -> SegmentData:
        decider = Decider(lineup, checkpoints, PLANTED, known=known)
        ((_, data),) = decider.complete([steps_of(decider, n)])
        return data

    def one() -> OneResident:
        return OneResident(list(models), models.__getitem__, lambda label: models[label].readout)

    plain = of(AllResident(models))
    expected = {}
    for i, (step, end) in enumerate(zip(steps, ends, strict=True)):
        within = step is not None and step < N_NEW and (end is None or step <= end)
        expected[f"p{i}"] = step if within else None
    found = {row["prompt_id"]: row["step"] for row in plain.events.to_pylist()}
    assert found == {name: step for name, step in expected.items() if step is not None}
    for row in plain.excluded.to_pylist():
        end = ends[int(row["prompt_id"][1:])]
        assert row["reason"] == (Outcome.NO_DIVERGENCE if end is None or end >= N_NEW else Outcome.ENDED)
    assert seen(of(one())) == seen(plain)
    assert of(one()).events.equals(plain.events)
    assert seen(of(one(), known)) == seen(of(AllResident(models), known)) == seen(plain)
    guessing = {label: Guessing(model.chosen) for label, model in models.items()}
    assert seen(of(OneResident(list(models), guessing.__getitem__, lambda label: models[label].readout))) == seen(plain)


def test_segments_together_load_each_checkpoint_once_for_all(monkeypatch):
    models, loads = planted([3, None, 0, 5], [None] * 4, 2), []

    def load(label: str) -> Planted:
        loads.append(label)
        return models[label]

    def head(label: str) -> Head:
        loads.append(f"head of {label}")
        return Head()

    lineup = lineup_of(list(models), [("c0", "c1")])
    decider = Decider(lineup, OneResident(list(models), load, head), replace(PLANTED, strict=True))
    found = dict(decider.complete([steps_of(decider, 4) for _ in range(5)]))
    assert len(found) == 5
    assert len({str(seen(data)) for data in found.values()}) == 1
    # One drafts, the other reads and goes on with the capture, which the first one ends; then heads alone.
    assert loads == ["c0", "c1", "c0", "head of c0", "head of c1"]
    assert decider.searches[:2] == (20, 5 * (4 + 9 + 1 + 6))


def test_what_the_forward_corrects_is_counted():
    models = planted([3, 4, 2], [None] * 3, 2)
    lineup = lineup_of(list(models), [("c0", "c1")])
    prompts = [[100 + i, 1] for i in range(3)]
    written = {label: model.write(prompts, [N_NEW] * 3, frozenset()) for label, model in models.items()}
    known = {f"p{i}": {label: list(of[i]) for label, of in written.items()} for i in range(2)}
    known["p1"]["c1"][1] = 33  # another token than it writes
    decider = Decider(lineup, AllResident(models), PLANTED, known=known)
    ((_, data),) = decider.complete([steps_of(decider, 3)])
    assert data.events["step"].to_pylist() == [3, 4, 2]
    assert data.events["proposed_step"].to_pylist() == [3, 1, 2]
    assert decider.searches[2:] == (2, 1)


# ---- real checkpoints ----

STRICT = CaptureSettings((3,), strict=True, max_new=12)


@pytest.fixture(scope="module", params=tiny.ARCHS)
def lineup(request, tmp_path_factory) -> Lineup:
    paths = tiny.make_pair(tmp_path_factory.mktemp("pair"), request.param)
    return Lineup.open(dict(zip(("pt", "it"), paths, strict=True)))


PROMPTS = [Prompt(f"p{i}", text) for i, text in enumerate(tiny.PROMPTS[:8])]


def captured(
    lineup: Lineup, wanted: CaptureSettings, resident: str = "all", loads: Any = None, **how: Any
) -> SegmentData:
    """By checkpoints loaded from their folders, or by what ``loads`` gives in the place of each load."""
    engine = LocalCapture(lineup, wanted, held=Held(lineup, Holding(resident=resident)), **how)
    with mock.patch.object(study_capture, "load_backbone", loads or study_capture.load_backbone):
        decider = engine.decider
        ((_, data),) = decider.complete([decider.searched(PROMPTS, lineup.encode(PROMPTS), nobody_told)])
    return data


@pytest.mark.slow
def test_every_way_gives_the_same_events_and_bytes(lineup):
    backbones = {label: study_capture.load_backbone(lineup, label, STRICT) for label in lineup.labels}
    limits, ids = SearchLimits(12, lineup.end_ids, lineup.max_positions), lineup.encode(PROMPTS)
    slow = in_lockstep(list(backbones.values()), ids, limits)
    residents = {label: Resident(one) for label, one in backbones.items()}
    for checkpoints in (AllResident(residents), OneResident(lineup.labels, residents.__getitem__, lambda _: None)):
        assert propose(checkpoints, lineup.pair, ids, [0] * len(ids), limits) == slow

    def again(_: Lineup, label: str, *more: Any) -> Backbone:
        """Loads, and the probes after each, are looked at once: where no continuation is told, one at a time."""
        return backbones[label]

    plain = captured(lineup, STRICT, loads=again)
    assert len(plain.events) > 4
    one = captured(lineup, STRICT, resident="one")
    assert one.events.equals(plain.events)
    assert seen(one) == seen(plain)
    known = {}
    for label, resident in residents.items():
        for i, tokens in enumerate(resident.write(ids, [12] * len(ids), lineup.end_ids)):
            known.setdefault(f"p{i}", {})[label] = tokens
    del known["p0"]["pt"], known["p1"]["it"], known["p2"]
    for resident in ("all", "one"):
        told = captured(lineup, STRICT, resident=resident, loads=again, known=known)
        assert told.events.equals(plain.events)
        assert seen(told) == seen(plain)
    known["p3"]["it"][0], known["p4"]["pt"] = 77, [5, 5]
    assert seen(captured(lineup, STRICT, resident="one", loads=again, known=known)) == seen(plain)


@pytest.fixture(scope="module")
def several(tmp_path_factory) -> tuple[list[str], Any]:
    """Arguments of three checkpoints and prompts, and the folder of the prompts."""
    folder = tmp_path_factory.mktemp("several")
    base, dpo = tiny.make_pair(folder, "llama")
    paths = {"base": base, "sft": tiny.make_checkpoint(folder / "sft", "llama", seed=3), "dpo": dpo}
    prompts = tiny.write_prompts(folder / "p.jsonl", 6)
    words = [f"--checkpoint={label}={path}" for label, path in paths.items()]
    return [*words, "--boundary", "3", "--max-new", "8", "--shard-prompts", "2", "--strict"], prompts


@pytest.mark.slow
@pytest.mark.parametrize("how", ["a pair", "pairs", "rollouts", "fixed"])
def test_stores_have_the_same_bytes(several, tmp_path, how):
    words, prompts = several
    more: list[Any] = ["--prompts", prompts]
    if how == "pairs":
        more += ["--pair", "base,sft", "--pair", "base,dpo"]
    elif how == "rollouts":
        more += ["--support", "rollouts", "--rollout-tokens", 7]
        words = [word for word in words if word not in ("--max-new", "8")]
    elif how == "fixed":
        lines = [{"prompt_id": f"p0{i}", "y_pt": 40 + i, "y_it": 50} for i in range(4)]
        (tmp_path / "events.jsonl").write_text("\n".join(map(json.dumps, lines)))
        more += ["--support", "fixed", "--events", tmp_path / "events.jsonl"]
    for resident in ("all", "one"):
        given = ["capture", *words, *more, "--out", tmp_path / resident, "--resident", resident]
        assert main([str(word) for word in given]) == 0
    if how == "a pair":  # rows of a further boundary for what is stored, by either way
        for resident, other in (("all", "one"), ("one", "all")):
            given = ["capture", *words, *more, "--out", tmp_path / resident, "--resident", other, "--boundary", "3,2"]
            assert main([str(word) for word in given]) == 0
    trees = [read_tree(tmp_path / resident / "store") for resident in ("all", "one")]
    assert len(open_store(tmp_path / "one/store")) > 1
    assert trees[0] == trees[1]


@pytest.mark.slow
def test_a_killed_capture_goes_on_by_either_way(several, tmp_path):
    words, prompts = several
    paths = dict(word.removeprefix("--checkpoint=").split("=", 1) for word in words if "=" in word)
    lineup, lines = Lineup.open(paths), read_prompts(prompts)
    wanted = CaptureSettings((3,), max_new=8, shard_prompts=2)
    capture(lineup, lines, tmp_path / "whole", wanted)
    held = {resident: Held(lineup, Holding(resident=resident)) for resident in ("one", "all")}
    for first, then in (("one", "all"), ("all", "one")):
        n_left = [9]

        def killed(progress: Any, n_left: list[int] = n_left) -> None:
            n_left[0] -= progress.done > 0
            if n_left[0] == 8:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            capture(lineup, lines, tmp_path / first, wanted, held=held[first], on_progress=killed)
        capture(lineup, lines, tmp_path / first, wanted, held=held[then])
        assert read_tree(tmp_path / first) == read_tree(tmp_path / "whole")


# ---- memory ----

PEAK = """
import re, sys
from pathlib import Path
from actcache.models.lineup import Lineup
from actcache.prompts import Prompt
from actcache.capture.settings import CaptureSettings
from actcache.study.capture import capture
from actcache.study.held import Held
from actcache.study.holding import Holding
folder, labels = Path(sys.argv[1]), ("a", "b", "c", "d")
def peak():
    return 1024 * int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])
def run(resident, n, out, folder=folder):
    lineup = Lineup.open({label: folder / label for label in labels[:n]})
    prompts = [Prompt(f"p{i}", text) for i, text in enumerate(("Yes", "The sea", "Hi!", "Why?"))]
    held = Held(lineup, Holding(resident=resident))
    capture(lineup, prompts, folder / out, CaptureSettings((3,), max_new=4), held=held)
    return peak()
run("one", 2, "warm", folder / "tiny")
before = peak()
print(*(run(*how) - before for how in (("one", 2, "two"), ("one", 4, "four"), ("all", 2, "all"))))
"""


@pytest.mark.slow
def test_memory_holds_one_checkpoint_whatever_their_number(tmp_path):
    shape = {"hidden_size": 512, "intermediate_size": 1536, "num_attention_heads": 8}
    for number, (label, other) in enumerate((("a", "c"), ("b", "d"))):
        tiny.make_checkpoint(tmp_path / label, "llama", seed=number, **shape)
        shutil.copytree(tmp_path / label, tmp_path / other)
        tiny.make_checkpoint(tmp_path / "tiny" / label, "llama", seed=number)
    weights = (tmp_path / "a/model.safetensors").stat().st_size
    words = [sys.executable, "-c", PEAK, str(tmp_path)]
    peaks = subprocess.run(words, check=True, capture_output=True, text=True).stdout
    two, four, both = (int(peak) / weights for peak in peaks.split())
    assert both > 1.8, "the measure sees weights"
    assert two <= four < 1.5


# ---- files of continuations, spilled rows ----

TOKENS = SimpleNamespace(tokens=[SimpleNamespace(n_rows=120)])
KNOWN_LABELS: Any = SimpleNamespace(labels=["pt", "it"], vocab_size=120, has_tails=False, ids=TOKENS)


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (['{"prompt_id": "p9", "label": "it", "token_ids": [5]}'], r"c.jsonl, line 1: no prompt 'p9' in the prompts"),
        (['{"id": "p0", "label": "sft", "token_ids": [5]}'], r"line 1: label \"sft\" is no checkpoint .* pt, it"),
        (['{"id": "p0", "label": "it", "token_ids": [5, 120]}'], "line 1: token id 120 is beyond the 120 rows"),
        (['{"id": "p0", "label": "it", "token_ids": [5, -1]}'], "line 1: token id -1 is beyond"),
        (['{"id": "p0", "label": "it", "token_ids": []}'], r"line 1: token_ids is \[\], expected a list of whole"),
        (['{"id": "p0", "label": "it", "token_ids": [true]}'], r"line 1: token_ids is \[true\]"),
        (['{"label": "it", "token_ids": [5]}'], "line 1: a continuation names its prompt by 'prompt_id'"),
        (['{"id": "p0", "label": "it", "token_ids": [5]}'] * 2, "line 2: a second continuation of prompt 'p0'"),
        (["5"], "line 1: a JSON int"),
        (["", ""], "no continuation of any of these prompts"),
    ],
)  # fmt: skip
def test_lines_that_are_no_continuations(tmp_path, lines, said):
    (tmp_path / "c.jsonl").write_text("\n".join(lines))
    lineup = KNOWN_LABELS
    with pytest.raises(InputError, match=said):
        read_continuations(tmp_path / "c.jsonl", lineup, PROMPTS[:2])


def test_a_file_that_is_none(tmp_path):
    lineup = KNOWN_LABELS
    with pytest.raises(InputError, match=r"no such file.*JSON Lines"):
        read_continuations(tmp_path / "c.jsonl", lineup, PROMPTS)
    (tmp_path / "c.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match="not UTF-8 text"):
        read_continuations(tmp_path / "c.jsonl", lineup, PROMPTS)


def test_with_a_limit_lines_of_other_prompts_are_left_out(tmp_path):
    line = '{"id": "p%d", "label": "it", "token_ids": [5]}\n'
    (tmp_path / "c.jsonl").write_text(line % 0 + line % 7)
    lineup = KNOWN_LABELS
    known = read_continuations(tmp_path / "c.jsonl", lineup, PROMPTS[:2], limit=2)
    assert {name: {label: list(of) for label, of in own.items()} for name, own in known.items()} == {"p0": {"it": [5]}}


def test_whole_sequences_are_no_continuations():
    known = {f"p{i}": {"it": [i, 5, 9, 9, 4]} for i in range(3)}
    prompt_ids = [[0, 5, 9, 9], [1, 5, 9, 9], [8, 8, 8, 8]]
    with pytest.raises(InputError, match=r"'p0' by it begins with the prompt's own ids, as do 2 of 3: give the tokens"):
        check_beginnings(known, PROMPTS[:3], prompt_ids)
    check_beginnings(known, PROMPTS[:3], [[0, 5, 9, 9], [1, 6, 9, 9], [8, 8, 8, 8]])
    check_beginnings(known, PROMPTS[:3], [[0, 5], [1, 5], [2, 5]])  # which a checkpoint may well repeat


@pytest.mark.slow
def test_the_command_line_takes_continuations(several, tmp_path, capsys):
    words, prompts = several
    lines = [{"prompt_id": "p00", "label": "base", "token_ids": [9, 9, 9]}]
    (tmp_path / "c.jsonl").write_text(json.dumps(lines[0]) + "\n")
    given = ["capture", *words, "--prompts", prompts, "--continuations", tmp_path / "c.jsonl", "--resident", "one"]
    assert main([str(word) for word in [*given, "--out", tmp_path / "run"]]) == 0
    assert re.search(r"corrected 1 of 1 prompts? with continuations", capsys.readouterr().err)
    (tmp_path / "c.jsonl").write_text('{"prompt_id": "p00", "label": "nobody", "token_ids": [9]}')
    assert main([str(word) for word in [*given, "--out", tmp_path / "other"]]) == 2
    assert "c.jsonl, line 1: label" in capsys.readouterr().err


@given(
    st.lists(st.tuples(st.integers(0, 5), st.sampled_from([torch.float32, torch.bfloat16])), max_size=6),
    st.integers(0, 5),
    st.integers(0, 5),
    st.integers(0, 100),
)
def test_rows_come_back_from_disk_bit_for_bit(shapes, start, n, in_memory):
    rows, others = ([torch.randn(n_rows, 3).to(dtype) for n_rows, dtype in shapes] for _ in range(2))
    spill = Spill(in_memory=in_memory)
    spilled = [spill.put(one) for one in rows]
    assert sum(one.nbytes for one in spilled if isinstance(one, torch.Tensor)) <= in_memory
    for number in range(0, len(rows), 2):  # in the place of what was there
        spilled[number] = spill.put(others[number], over=spilled[number])
        rows[number] = others[number]
    for one, there in zip(rows, spilled, strict=True):
        assert torch.equal(there[:], one)
        assert there[:].dtype == one.dtype
        assert torch.equal(there[start : start + n], one[start : start + n])


def test_nobody_sees_the_file_of_a_spill(tmp_path):
    spill = Spill(tmp_path, in_memory=0)
    assert spill.put(torch.arange(12).view(3, 4))[1:2].tolist() == [[4, 5, 6, 7]]
    assert list(tmp_path.iterdir()) == []

"""Controls: statistics on planted courses, strata and displacements; cells against plain hooks on a tiny model."""

from __future__ import annotations

import hashlib
import itertools
import json
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import tiny
import torch
from twins import reference

import actcache
from actcache.analyses.controls import STRATA, WEIGHTS, _groups, anomaly_of, of_interpolation, strata_of
from actcache.analyses.controls import ControlsOptions as Options
from actcache.cli import main
from actcache.errors import CheckError
from actcache.replay.sizes import SIZES
from actcache.study.contrasts import contrasts
from actcache.study.results import result_files

BOUNDARY = 3
FEW = ("--limit", "8", "--stability", "0")


# ---- numbers ----


def slow_course(values):
    """Of one event, written out: five late advantages."""
    slope = np.polyfit(WEIGHTS, values, 1)[0]
    ranks = [np.mean([i for i, other in enumerate(sorted(values), 1) if other == one]) for one in values]
    spearman = np.corrcoef(ranks, range(5))[0, 1] if len(set(values)) > 1 else 0.0
    falls = any(b < a for a, b in itertools.pairwise(values))
    return {"slope": slope, "spearman": spearman, "monotone_share": float(not falls), "rising_share": float(slope > 0)}


def test_the_course_of_each_event_is_what_a_loop_finds():
    rng = np.random.default_rng(0)
    advantages = rng.normal(size=(5, 40))
    advantages[:, 0] = np.linspace(-1, 2, 5)
    advantages[:, 1] = 3.0  # the same everywhere: no slope, no rank correlation, and it never falls
    advantages[:, 2] = [0, 1, 1, 2, 2]
    advantages[:, 3] = [4, 3, 2, 1, 0]
    found = of_interpolation(advantages)
    for event, values in enumerate(advantages.T.tolist()):
        for name, expected in slow_course(values).items():
            assert found[name][event] == pytest.approx(expected, abs=1e-12), (name, event)
        assert found["endpoint"][event] == values[-1] - values[0]
    assert [found[name][0] for name in ("slope", "spearman", "monotone_share")] == pytest.approx([3.0, 1.0, 1.0])
    assert [found[name][1] for name in ("slope", "spearman", "rising_share")] == [0.0, 0.0, 0.0]


def test_the_anomaly_of_a_cell_is_its_largest_distance_from_native_ones():
    native = np.array([[1.0, 10.0, 2.0, 0.5], [3.0, 10.0, 4.0, 0.5], [2.0, 10.0, 3.0, 0.5]])
    hybrid = np.array([[2.0, 10.0, 3.0, 0.5], [7.0, 10.0, 3.0, 0.5], [2.0, 10.0, 2.0, 0.6]])
    spread = np.std([1, 2, 3])
    assert anomaly_of(hybrid, native).tolist() == pytest.approx([0.0, 5 / spread, np.inf])


def test_strata_are_cut_at_percentiles():
    anomaly = np.random.default_rng(1).permutation(np.arange(40.0))
    strata = strata_of(anomaly)
    assert tuple(strata) == STRATA
    assert [int(kept.sum()) for kept in strata.values()] == [40, 20, 14, 36, 10, 10, 10, 10]
    assert set(anomaly[strata["quartile 2"]]) == set(range(10, 20))
    assert set(anomaly[strata["without top 10%"]]) == set(range(36))
    assert [int(kept.sum()) for kept in strata_of(np.zeros(3)).values()] == [3, 3, 3, 3, 3, 0, 0, 0]


def planted(n=24, prompts=12, seed=0, **changed):
    """Effects, and the late advantages of variants whose displacements are known: seed 0 adds 1, seed 1 takes 3 off."""
    rng = np.random.default_rng(seed)
    start, interaction = rng.normal(1.0, 0.3, n), rng.normal(2.0, 0.5, n)
    effects = pa.table(
        {
            "event_id": [f"e{i}" for i in range(n)],
            "prompt_id": [f"p{i % prompts}" for i in range(n)],
            "late_from_pt": start,
            "late_from_it": start + interaction,
            "interaction": interaction,
        }
    )
    moved = {
        f"{kind}[seed={i}]": start + by
        for kind in ("signed_permutation", "matched_norm")
        for i, by in ((0, 1.0), (1, -3.0))
    }
    course = {f"interpolate[weight={weight}]": start + weight * interaction for weight in WEIGHTS[1:-1]}
    return effects, {"none": start + 1e-5, "placebo": start + 1e-5, **course, **moved, **changed}


def test_planted_courses_and_displacements_are_found():
    effects, advantages = planted()
    anomaly = np.arange(24.0)
    groups = list(_groups(effects, advantages, anomaly, Options(seeds=2)))
    of = {group.get("stratum", group["control"]): group for group in groups}
    mean = effects["interaction"].to_numpy().mean()
    course = of["interpolation"]
    assert [course[name]["mean"] for name in ("slope", "endpoint")] == pytest.approx([mean, mean])
    assert [course[name]["mean"] for name in ("rising_share", "monotone_share", "spearman")] == pytest.approx([1, 1, 1])
    for weight in WEIGHTS:
        expected = effects["late_from_pt"].to_numpy().mean() + weight * mean
        assert of[f"interpolate[weight={weight}]"]["late_advantage"]["mean"] == pytest.approx(expected)
    for kind in ("signed_permutation", "matched_norm"):
        found = {name: of[kind][name]["mean"] for name in of[kind] if isinstance(of[kind][name], dict)}
        assert (found["displacement"], found["absolute_displacement"]) == pytest.approx((-1.0, 2.0))
        assert (found["displacement_ratio"], found["absolute_ratio"]) == pytest.approx((-1 / mean, 2 / mean))
        assert of[kind]["absolute_ratio"]["low"] < 2 / mean < of[kind]["absolute_ratio"]["high"]
    assert of["placebo"]["displacement"] == {"mean": 0.0, "low": 0.0, "high": 0.0}
    assert [of[name]["n_events"] for name in STRATA] == [24, 12, 8, 21, 6, 6, 6, 6]
    lower = effects["interaction"].to_numpy()[:12]
    assert of["lower half"]["interaction"]["mean"] == pytest.approx(lower.mean())
    assert of["lower half"]["anomaly"]["mean"] == pytest.approx(5.5)


def test_ratios_are_over_the_size_of_the_interaction_and_have_no_interval_where_it_may_be_nothing():
    effects, advantages = planted()
    turned = effects.set_column(4, "interaction", pc.negate(effects["interaction"]))
    turned = turned.set_column(3, "late_from_it", pc.add(turned["late_from_pt"], turned["interaction"]))
    (found,) = (
        g for g in _groups(turned, advantages, np.zeros(24), Options(seeds=2)) if g["control"] == "matched_norm"
    )
    assert found["absolute_ratio"]["low"] > 0
    near_zero = np.where(np.arange(24) % 2, 1.0, -0.98)
    unclear = turned.set_column(4, "interaction", pa.array(near_zero))
    (found,) = (
        g for g in _groups(unclear, advantages, np.zeros(24), Options(seeds=2)) if g["control"] == "matched_norm"
    )
    assert found["absolute_ratio"]["mean"] == pytest.approx(200.0)
    assert found["absolute_ratio"]["low"] is None


def test_prompts_weigh_the_same_unless_events_shall():
    """One prompt with 20 events that move by 1, nineteen with one each that do not."""
    effects, advantages = planted(39)
    prompts = pa.array(["many"] * 20 + [f"p{i:02}" for i in range(19)])
    effects = effects.set_column(1, "prompt_id", prompts)
    moved = effects["late_from_pt"].to_numpy() + (np.arange(39) < 20)
    advantages |= {name: moved for name in advantages if name.startswith("matched_norm")}
    for weights, expected in (("prompt", 1 / 20), ("event", 20 / 39)):
        groups = _groups(effects, advantages, np.zeros(39), Options(seeds=2, weights=weights))
        (found,) = (group for group in groups if group["control"] == "matched_norm")
        assert found["displacement"]["mean"] == pytest.approx(expected)


@pytest.mark.parametrize("n", [1, 2])
def test_one_native_cell_tells_no_anomaly(n):
    effects, advantages = planted(n, n)
    native, hybrid = np.arange(4.0 * n).reshape(n, 4), np.ones((n, 4))
    groups = list(_groups(effects, advantages, anomaly_of(hybrid, native), Options(seeds=2)))
    strata = {group["stratum"]: group for group in groups if group["control"] == "anomaly"}
    assert ("quartile 1" in strata, "anomaly" in strata["all"]) == ((n == 2), (n == 2))
    assert strata["all"]["interaction"]["mean"] == pytest.approx(effects["interaction"].to_numpy().mean())


def test_a_placebo_that_moves_is_an_error():
    effects, advantages = planted()
    within = advantages | {"placebo": advantages["none"] + 1e-9}
    (found,) = (group for group in _groups(effects, within, np.zeros(24), Options(seeds=2), 2e-9)
                if group["control"] == "placebo")  # fmt: skip
    assert found["displacement"]["mean"] == 0.0
    advantages["placebo"] = advantages["none"] + np.where(np.arange(24) == 7, 1e-7, 0)
    with pytest.raises(CheckError, match="a placebo that adds zeros moved the late advantage by 1e-07"):
        list(_groups(effects, advantages, np.zeros(24), Options(seeds=2)))


# ---- a run ----


@pytest.fixture(scope="module")
def run(tiny_run):
    return tiny_run("llama", torch.float32, "--boundary", "2,3", "--stability", "0", "--strict", eps=0.3)


@pytest.fixture(scope="module")
def answered(run, tmp_path_factory):
    """A copy of the run, its answer, and the table of cells."""
    out = shutil.copytree(run.out, tmp_path_factory.mktemp("controls") / "run")
    found = actcache.Run(out).analyse("controls", boundary="3", seeds=2)
    return out, found, pq.read_table(out / "controls.parquet")


def drawn(*names):
    return torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(json.dumps(names).encode()).digest()[:7], "big"))


def slow_state(variant, pt, it, event):
    """What a variant makes of PT's states ``[T, D]``, row by row."""
    rows = pt.clone()
    generator, width = drawn(1, event["prompt_id"]), pt.shape[1]
    order = torch.randperm(width, generator=generator)
    signs = torch.randint(2, (width,), generator=generator) * 2 - 1
    for position in range(len(rows)):
        difference = it[position] - pt[position]
        direction = torch.randn(width, generator=drawn(0, event["event_id"], position, None))
        rows[position] += {
            "none": lambda: torch.zeros(width),
            "placebo": lambda: torch.zeros(width),
            "interpolate[weight=0.5]": lambda: 0.5 * difference,  # noqa: B023
            "signed_permutation[seed=1]": lambda: difference[order] * signs,  # noqa: B023
            "matched_norm[seed=0]": lambda: difference.norm() * direction / direction.norm(),  # noqa: B023
        }[variant]()
    return rows


@pytest.mark.slow
def test_cells_are_what_hooks_make(run, answered):
    _, _, cells = answered
    models = {"pt": reference.load(run.pt, torch.float32), "it": reference.load(run.it, torch.float32)}
    store = run.store
    margins = {(c["event_id"], c["variant"], c["upstream"], c["late"]): c for c in cells.to_pylist()}
    for number, event in enumerate(store.events.to_pylist()[:4]):
        ids = store.token_ids([number])[0].tolist()
        states = {label: reference.states(model, ids, BOUNDARY) for label, model in models.items()}
        moved = set()
        for variant in (
            "none",
            "placebo",
            "interpolate[weight=0.5]",
            "signed_permutation[seed=1]",
            "matched_norm[seed=0]",
        ):
            state = slow_state(variant, states["pt"], states["it"], event)
            for late, model in models.items():
                outputs = reference.overwritten(model, ids, BOUNDARY, state)
                logits = reference.readout(models["it"], outputs[-1])
                expected = float(logits[event["y_it"]] - logits[event["y_pt"]])
                cell = margins[event["event_id"], variant, "pt", late]
                assert cell["margin"] == pytest.approx(expected, abs=2e-4), (variant, late)
                moved.add((variant, round(expected, 5)))
        assert len({value for _, value in moved}) == 8, "two variants are one: their equality says little"
        for upstream, late in itertools.product(models, models):
            outputs = reference.overwritten(models[late], ids, BOUNDARY, states[upstream]).double().numpy()
            of = {"rms": outputs, "rms_p": outputs[-1], "std": outputs, "std_p": outputs[-1]}
            for name, values in of.items():
                expected = np.sqrt(np.mean(values**2)) if "rms" in name else np.std(values)
                assert margins[event["event_id"], "none", upstream, late][name] == pytest.approx(expected, rel=1e-5)


@pytest.mark.slow
def test_the_ends_are_the_cells_of_the_grid_and_the_numbers_those_of_the_table(run, answered):
    out, found, cells = answered
    mine = cells.filter(pc.equal(cells["variant"], "none")).drop_columns([*SIZES])
    grid = run.cells
    of = {"boundary": BOUNDARY, "readout": "common_it", "variant": "none"}
    for name, value in of.items():
        grid = grid.filter(pc.equal(grid[name], value))
    assert mine.equals(grid)
    effects = contrasts(mine)
    groups = {group.get("stratum", group["control"]): group for group in found["groups"]}
    for name, column in (("interpolate[weight=0.0]", "late_from_pt"), ("interpolate[weight=1.0]", "late_from_it")):
        assert groups[name]["late_advantage"]["mean"] == pytest.approx(effects[column].to_numpy().mean(), rel=1e-12)
    assert groups["placebo"]["displacement"]["mean"] == 0
    # Every variant has a whole 2x2, so that effects are made of it as of any grid.
    of_variant = contrasts(cells)
    assert set(of_variant["variant"].to_pylist()) == set(cells["variant"].to_pylist())
    assert len(of_variant) == len(run.store) * (1 + 3 + 2 * 2 + 1)
    half = of_variant.filter(pc.equal(of_variant["variant"], "interpolate[weight=0.5]"))
    advantage = groups["interpolate[weight=0.5]"]["late_advantage"]["mean"]
    assert half["late_from_pt"].to_numpy().mean() == pytest.approx(advantage)
    assert half["late_from_it"].equals(effects["late_from_it"])
    ids = effects["event_id"].to_pylist()
    anomaly = slow_anomaly(cells.to_pylist(), ids)
    lower = [
        value
        for value, of_event in zip(effects["interaction"].to_pylist(), anomaly, strict=True)
        if of_event <= np.median(anomaly)
    ]
    assert groups["lower half"]["interaction"]["mean"] == pytest.approx(np.mean(lower))
    assert groups["all"]["anomaly"]["mean"] == pytest.approx(np.mean(anomaly))
    assert set(actcache.Run(out).cells["variant"].to_pylist()) == {"none"}, "its variants are no cells of the run"


def slow_anomaly(cells, ids):
    """Of each event: the largest |z| of eight."""
    of = {(c["event_id"], c["upstream"], c["late"]): c for c in cells if c["variant"] == "none"}
    found = []
    for event in ids:
        z = []
        for host, other in (("pt", "it"), ("it", "pt")):
            for name in SIZES:
                native = [of[one, host, host][name] for one in ids]
                z.append(abs(of[event, other, host][name] - np.mean(native)) / np.std(native))
        found.append(max(z))
    return found


@pytest.mark.slow
def test_more_seeds_replay_what_is_new_alone(answered, tmp_path):
    out = shutil.copytree(answered[0], tmp_path / "run")
    places = out / "controls/cells-pt,it", out / "controls/sizes-pt,it"
    before = [set(result_files(place)) for place in places]
    assert [len(files) for files in before] == [2, 2], "a job per late stack"
    assert actcache.Run(out).analyse("controls", boundary="3", seeds=2) == answered[1]
    assert [set(result_files(place)) for place in places] == before
    actcache.Run(out).analyse("controls", boundary="3", seeds=3)
    added = set(result_files(places[0])) - before[0]
    variants = {name for path in added for name in set(pq.read_table(path)["variant"].to_pylist())}
    assert variants == {"signed_permutation[seed=2]", "matched_norm[seed=2]"}
    assert set(result_files(places[1])) == before[1]
    upstreams = {name for path in result_files(places[0]) for name in pq.read_table(path)["upstream"].to_pylist()}
    assert upstreams == {"pt"}, "no variant moves IT's own states"
    (out / "controls/cells-pt,it" / next(iter(added)).name).write_bytes(b"damaged")
    assert main(["verify", str(out)]) == 1
    assert main(["controls", str(out), "--boundary", "3"]) == 2


@pytest.mark.slow
def test_a_change_of_late_blocks_alone_is_all_portable(tiny_run, tmp_path):
    """Both checkpoints have one state: every weight has the same late advantage, and there is nothing to displace."""
    run = tiny_run("llama", torch.float32, *FEW, change="late")
    out = shutil.copytree(run.out, tmp_path / "run")
    groups = actcache.Run(out).analyse("controls")["groups"]
    of = {group.get("stratum", group["control"]): group for group in groups}
    advantages = [of[f"interpolate[weight={weight}]"]["late_advantage"]["mean"] for weight in WEIGHTS]
    assert advantages == pytest.approx([advantages[0]] * 5, abs=1e-5)
    assert abs(advantages[0]) > 0.01
    assert of["interpolation"]["slope"]["mean"] == pytest.approx(0, abs=1e-5)
    for kind in ("signed_permutation", "matched_norm"):
        assert of[kind]["absolute_displacement"]["mean"] == pytest.approx(0, abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arch", "dtype", "more"),
    [
        ("llama", torch.bfloat16, ()),
        ("gpt2", torch.float32, ("--scope", "prefix,position")),  # plain cells come of branches there
    ],
)
def test_a_placebo_moves_nothing_whatever_rounding_there_is(tiny_run, tmp_path, arch, dtype, more):
    out = shutil.copytree(tiny_run(arch, dtype, "--limit", "14", "--stability", "0", *more).out, tmp_path / "run")
    groups = actcache.Run(out).analyse("controls", seeds=1)["groups"]
    (placebo,) = (group["displacement"] for group in groups if group["control"] == "placebo")
    assert set(placebo.values()) == {0.0}


@pytest.mark.slow
def test_of_three_checkpoints_the_pair_alone_is_replayed(tmp_path):
    folders = tiny.make_lineup(tmp_path, "llama", ["a", "b", "c"])
    prompts, out = tiny.write_prompts(tmp_path / "prompts.jsonl", 6), tmp_path / "run"
    words = [word for label, folder in folders.items() for word in ("--checkpoint", f"{label}={folder}")]
    words = ["run", *words, "--pair", "a,c", "--prompts", prompts, "--out", out, "--max-new", 12, "--stability", 0]
    assert main([str(word) for word in words]) == 0
    found = actcache.Run(out).analyse("controls", seeds=1)
    assert {group["pair"] for group in found["groups"]} == {"a,c"}
    cells = pq.read_table(out / "controls.parquet")
    assert {*cells["upstream"].to_pylist()} == {*cells["late"].to_pylist()} == {"a", "c"}
    for place, upstreams in (("cells-a,c", {"a"}), ("sizes-a,c", {"a", "c"})):
        tables = [pq.read_table(path) for path in result_files(out / "controls" / place)]
        assert {name for table in tables for name in table["upstream"].to_pylist()} == upstreams
        assert {name for table in tables for name in table["late"].to_pylist()} == {"a", "c"}
    common = actcache.Run(out).analyse("controls", seeds=1, readout="common_pt")
    assert {group["readout"] for group in common["groups"]} == {"common_a"}


@pytest.mark.slow
def test_every_pair_of_a_run_has_controls_of_its_own(tmp_path):
    folders = tiny.make_lineup(tmp_path, "llama", ["a", "b", "c"])
    prompts, out = tiny.write_prompts(tmp_path / "prompts.jsonl", 6), tmp_path / "run"
    words = [word for label, folder in folders.items() for word in ("--checkpoint", f"{label}={folder}")]
    words = ["run", *words, "--prompts", prompts, "--out", out, "--max-new", 12, "--stability", 0]
    assert main([str(word) for word in [*words, "--pair", "a,b", "--pair", "a,c", "--readout", "native"]]) == 0
    found = actcache.Run(out).analyse("controls", seeds=1)
    cells = pq.read_table(out / "controls.parquet")
    for pair in ("a,b", "a,c"):
        mine = cells.filter(pc.equal(cells["pair"], pair))
        assert {*mine["readout"].to_pylist()} == {f"common_{pair[-1]}"}
        assert {*mine["late"].to_pylist()} == {"a", pair[-1]}
        effects = contrasts(mine.filter(pc.equal(mine["variant"], "none")))
        (group,) = (one for one in found["groups"] if one["pair"] == pair and one["control"] == "interpolation")
        assert group["n_events"] == len(effects)
        assert group["endpoint"]["mean"] == pytest.approx(effects["interaction"].to_numpy().mean())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--boundary", "4"], "boundary 4 is not in the store; it has 2, 3"),
        (["--boundary", "2,3"], "boundary '2,3' is not one boundary"),
        (["--boundary", "last"], "boundary 'last' is not a block index"),
        (["--readout", "common_xx"], "readout 'common_xx' is unknown"),
        (["--seeds", "0"], "seeds is 0; expected 1 to 999"),
        (["--weights", "token"], "weights 'token' are unknown; choose event or prompt"),
        (["--draws", "1"], "draws=1: an interval of 0.95 needs at least 40 draws"),
    ],
)
def test_what_the_store_cannot_serve_is_refused(run, capfd, words, said):
    assert main(["controls", str(run.out), *words]) == 2
    err = capfd.readouterr().err
    assert said in err
    assert len(err.strip().splitlines()) == 1

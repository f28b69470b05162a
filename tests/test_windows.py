"""Windows: hosts with a source's modules equal models assembled from both; planted differences are where they are."""

from __future__ import annotations

import copy
import shutil
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from twins import reference

import actcache
from actcache.analyses.windows import Window, WindowsOptions, _groups, study_windows, windows_of
from actcache.cli import main
from actcache.errors import InputError
from actcache.models.blocks import find_site
from actcache.study.plan import shapes_of

L = tiny.N_BLOCKS
STUDY = {"early": (0, 2), "mid": (1, 3), "late": (3, 5), "final_three": (2, 5), "final_one": (4, 5)}


def assembled(models, host, source, module, window):
    """The host with the source's weights of a module in these blocks."""
    models = [copy.deepcopy(models[host]), models[source]]
    for index in range(*window):
        one, other = (reference.parts(model).blocks[index] for model in models)
        if module != "block":
            one, other = (find_site(block, module) for block in (one, other))
        one.load_state_dict(other.state_dict())
    return models[0]


def supports_by_hooks(model, ids, layers, y_pt, y_it):
    """Of each llama block: the margin after its MLP, less the one before it, by the model's own readout."""
    blocks, seen = reference.parts(model).blocks, {}

    def keep(layer):
        return lambda _, args: seen.__setitem__(layer, args[0][0, -1].clone())

    handles = [blocks[at].post_attention_layernorm.register_forward_pre_hook(keep(at)) for at in layers]
    final = reference.final_hidden(model, ids)[-1]
    for handle in handles:
        handle.remove()
    found = []
    for layer in layers:
        after = reference.states(model, ids, layer + 1)[-1] if layer + 1 < L else final
        both = (reference.readout(model, state) for state in (after, seen[layer]))
        found.append([float(logits[y_it] - logits[y_pt]) for logits in both])
    return np.array(found) @ [1, -1]


def by_place(out):
    rows = pq.read_table(out / "windows.parquet").to_pylist()
    return {(row["event_id"], row["host"], row["window"]): row for row in rows}


def captured(folder, pt, it, *more):
    """A run of a pair with the states at boundaries 3 and 0, not scored."""
    words = ["capture", "--pt", pt, "--it", it, "--prompts", tiny.write_prompts(folder / "prompts.jsonl", 10)]
    words += ["--out", folder / "run", "--max-new", 12, "--boundary", "3,0", *more]
    assert main([str(word) for word in words]) == 0
    return SimpleNamespace(pt=pt, it=it, out=folder / "run", store=actcache.open_store(folder / "run"))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Captured strict, and scored so."""
    folder = tmp_path_factory.mktemp("run")
    run = captured(folder, *tiny.make_pair(folder, "llama"), "--strict")
    assert main(["grid", str(run.out), "--strict"]) == 0
    return run


@pytest.fixture(scope="module")
def models(run):
    return {"pt": reference.load(run.pt, torch.float32), "it": reference.load(run.it, torch.float32)}


@pytest.fixture(scope="module")
def answered(run, tmp_path_factory):
    """The run with its windows, and what was said."""
    out = shutil.copytree(run.out, tmp_path_factory.mktemp("answered") / "run")
    said = []
    found = actcache.Run(out).analyse("windows", say=said.append)
    return out, found, said


# ---- the numbers ----


def host_table(role, top1, own, support, own_support, kind="first_divergence"):
    """Events with y_pt 1 and y_it 2, one per prompt."""
    n = len(top1)
    return pa.table(
        {
            **{"event_id": [f"e{i}" for i in range(n)], "prompt_id": [f"p{i}" for i in range(n)]},
            **{"kind": [kind] * n, "pair": ["pt,it"] * n, "first": [3] * n, "stop": [5] * n, "boundary": [2] * n},
            **{"y_pt": [1] * n, "y_it": [2] * n, "top1_id": top1, "own_top1_id": own},
            **{
                "margin": [1.0] * n,
                "own_margin": [-1.0] * n,
                "margin_support": support,
                "own_margin_support": own_support,
            },
        }
    )


def test_what_is_made_of_two_hosts():
    pt = host_table("pt", [2, 1, 7, 2], [1, 1, 1, 1], [2.0, 2, 2, 2], [1.5, 1.5, 1.5, 1.5])
    it = host_table("it", [2, 1, 1, 1], [2, 2, 2, 2], [1.0, 1, 1, 1], [4.0, 4, 4, 4])
    (group,) = _groups([pt, it], Window("w", 3, 5), WindowsOptions())
    assert {name: group[name] for name in ("window", "first", "stop", "boundary", "n_events", "n_prompts")} == {
        **{"window": "w", "first": 3, "stop": 5, "boundary": 2, "n_events": 4, "n_prompts": 4}
    }
    means = {name: of["mean"] for name, of in group.items() if isinstance(of, dict)}
    assert (means["transfer_pt"], means["kept_pt"], means["other_pt"]) == (0.5, 0.25, 0.25)
    assert (means["transfer_it"], means["kept_it"], means["other_it"]) == (0.75, 0.25, 0.0)
    assert (means["gain"], means["loss"], means["source_interaction"]) == (0.5, 3.0, 2.5)
    assert means["margin_change_pt"] == 2.0


@pytest.mark.parametrize("n", [0, 1, 2])
def test_few_events_have_no_interval(n):
    hosts = [host_table(role, [2] * n, [1] * n, [2.0] * n, [1.0] * n) for role in ("pt", "it")]
    groups = list(_groups(hosts, Window("w", 3, 5), WindowsOptions()))
    assert len(groups) == (n > 0)
    for group in groups:
        assert group["transfer_pt"] == {"mean": 1.0, "low": None, "high": None}


def test_a_token_that_the_host_chose_already_is_no_transfer():
    """At an earlier position both choose the same, which may be the source's token of later on."""
    hosts = [host_table(role, [2, 2], [2, 1], [0.0] * 2, [0.0] * 2, "pre_divergence") for role in ("pt", "it")]
    (group,) = _groups(hosts, Window("w", 3, 5), WindowsOptions())
    assert group["transfer_pt"]["mean"] == 0.5


@pytest.mark.parametrize(
    ("n_blocks", "main", "early", "mid"),
    [(32, 19, (0, 13), (9, 22)), (36, 22, (0, 14), (11, 25)), (64, 38, (0, 26), (19, 45)), (1, 0, (0, 1), (0, 1))],
)
def test_windows_of_the_study(n_blocks, main, early, mid):
    of = {one.name: (one.first, one.stop) for one in study_windows(n_blocks, main)}
    assert of == {
        **{"early": early, "mid": mid, "late": (main, n_blocks)},
        **{"final_three": (max(0, n_blocks - 3), n_blocks), "final_one": (n_blocks - 1, n_blocks)},
    }


# ---- runs ----


@pytest.mark.slow
def test_equals_models_assembled_from_both(run, models, answered):
    out, found, said = answered
    rows = by_place(out)
    events = run.store.events.to_pylist()
    assert len(rows) == len(events) * 2 * len(STUDY)
    assert {group["window"]: (group["first"], group["stop"]) for group in found["groups"]} == STUDY
    assert {group["window"]: group["boundary"] for group in found["groups"]} == {
        **{"early": 0, "mid": 0, "late": 3, "final_three": 0, "final_one": 3}
    }
    for host, source in (("pt", "it"), ("it", "pt")):
        for name, window in STUDY.items():
            model = assembled(models, host, source, "mlp", window)
            for number in (0, 5):
                event, ids = events[number], run.store.token_ids([number])[0].tolist()
                row, tokens = rows[event["event_id"], host, name], (event["y_pt"], event["y_it"])
                last = reference.final_hidden(model, ids)[-1]
                assert row["margin"] == reference.exact_margin(model, last, *tokens)
                assert row["top1_id"] == int(reference.readout(model, last).argmax())
                assert (row["source"], row["own_margin"]) == (source, event[f"margin_{host}"])
                assert row["own_top1_id"] == event[f"y_{host}"]
                for column, of in (("margin_support", model), ("own_margin_support", models[host])):
                    expected = supports_by_hooks(of, ids, range(*window), *tokens).mean()
                    assert row[column] == pytest.approx(expected, abs=1e-4)
    assert said == [
        "of a forward's blocks a replay takes: early 100%, mid 100%, late 40%, final_three 100%, final_one 40%"
    ]


@pytest.mark.slow
@pytest.mark.parametrize("module", ["attention", "block"])
def test_other_modules(run, models, answered, module):
    out, _, _ = answered
    actcache.Run(out).analyse("windows", module=module, window="a=1:3,b=-2:")
    rows = by_place(out)
    events = run.store.events.to_pylist()
    for name, window in (("a", (1, 3)), ("b", (3, 5))):
        model = assembled(models, "pt", "it", module, window)
        ids = run.store.token_ids([0])[0].tolist()
        last = reference.final_hidden(model, ids)[-1]
        row = rows[events[0]["event_id"], "pt", name]
        assert (row["module"], row["first"], row["stop"]) == (module, *window)
        assert row["margin"] == reference.exact_margin(model, last, events[0]["y_pt"], events[0]["y_it"])
    actcache.Run(out).analyse("windows")


@pytest.mark.slow
def test_packed_equals_strict(run, answered, tmp_path):
    strict, _, _ = answered
    out = shutil.copytree(run.out, tmp_path / "run")
    assert main(["grid", str(out)]) == 0
    actcache.Run(out).analyse("windows")
    expected, found = by_place(strict), by_place(out)
    assert found.keys() == expected.keys()
    for place, row in found.items():
        for column in ("margin", "margin_support", "own_margin_support"):
            assert row[column] == pytest.approx(expected[place][column], abs=1e-4), (place, column)
        assert row["own_margin"] == expected[place]["own_margin"]
        assert row["top1_id"] == expected[place]["top1_id"]


@pytest.mark.slow
def test_identity_is_transferred_where_the_difference_lies(tmp_path):
    pt, it = tiny.make_pair(tmp_path, "llama", change="none")
    path, generator = it / "model.safetensors", torch.Generator().manual_seed(3)
    weights = load_file(path)
    for name in [name for name in weights if any(f"layers.{block}.mlp" in name for block in (1, 2))]:
        noise = torch.randn(weights[name].shape, generator=generator)
        weights[name] = weights[name] + 0.2 * weights[name].std() * noise
    save_file(weights, path, {"format": "pt"})
    run = captured(tmp_path, pt, it)
    assert len(run.store)
    found = actcache.Run(run.out).analyse("windows", window="before=0:1,there=1:3,after=3:5,half=2:3")
    assert [group["window"] for group in found["groups"]] == ["before", "there", "after", "half"]
    none = pytest.approx(0.0, abs=1e-4)
    for group in found["groups"]:
        for role, sign in (("pt", 1), ("it", -1)):
            transfer, change = group[f"transfer_{role}"]["mean"], group[f"margin_change_{role}"]["mean"]
            if group["window"] in ("before", "after"):
                assert (transfer, change, group[f"kept_{role}"]["mean"]) == (0.0, none, 1.0)
                assert (group["gain"]["mean"], group["loss"]["mean"]) == (none, none)
            elif group["window"] == "there":
                assert transfer == 1.0
                assert change * sign > 0


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (
            "a=1:3",
            "window a begins at block 1, before every boundary of the store: give the command that captured it again "
            "with --boundary 2,3,1, which adds those states",
        ),
        ("a=3", "window 'a=3': expected NAME=FIRST:STOP, such as mid=9:22, each name once"),
        ("a=3:4, a=2:3", "window 'a=2:3': expected NAME=FIRST:STOP"),
        ("a=4:4", "window a is 4:4; expected 0 <= FIRST < STOP <= 5"),
        ("a=x:4", "window 'a=x:4': expected"),
    ],
)
def test_windows_that_there_are_not(given, said):
    store = SimpleNamespace(fingerprint=SimpleNamespace(n_blocks=5), boundaries=[2, 3], main_boundary=2)
    with pytest.raises(InputError) as error:
        windows_of(store, given)
    assert str(error.value).startswith(said)
    assert [one.name for one in windows_of(store, "")] == ["late", "final_three", "final_one"]
    assert windows_of(store, "a=-3:-1,b=0.6:") == [("a", 2, 4), ("b", 3, 5)]


@pytest.mark.slow
def test_on_the_command_line(run, tmp_path, capfd):
    out = shutil.copytree(run.out, tmp_path / "run")
    capfd.readouterr()
    for words, said in (
        (["--module", "norm"], "module 'norm' is unknown; choose mlp, attention, block"),
        (["--resident", "one"], "so that both are in memory: give --resident all"),
        (["--window", "a=9:"], "window a is 9:5; expected 0 <= FIRST"),
    ):
        assert main(["windows", str(out), *words]) == 2
        err = capfd.readouterr().err
        assert said in err
        assert len(err.strip().splitlines()) == 1
    assert not (out / "windows.json").exists()
    assert main(["windows", str(out), "--window", "a=3:4", "--window", "b=-2:-1,c=4:"]) == 0
    assert [line.split()[0] for line in capfd.readouterr().out.splitlines()[1:4]] == ["a", "b", "c"]


@pytest.mark.slow
def test_early_windows_cost_nearly_whole_forwards(run):
    opened = actcache.Run(run.out)
    store, shapes = opened.store, shapes_of(opened.lineup)
    analysis = actcache.analyses.find_analysis("windows")
    how = {"strict": True, "max_tokens": None}
    (jobs,) = analysis.own_jobs(opened.folder, store, WindowsOptions(), how).values()
    assert sum(job.n_units for job in jobs) == len(store) * 2 * (1 + len(STUDY))
    lengths = np.array([position + 1 for position in store.events["position"].to_pylist()], np.float64)
    head = len(store) * shapes["pt"].head_products
    for job in jobs:
        parts = job.cost(shapes).parts
        assert parts["windows"] == shapes["pt"].products(lengths, first=job.boundary) + head
        assert parts["hooks"] == shapes["pt"].products(lengths) + head
    boundaries = [job.boundary for job in jobs]
    assert boundaries == sorted(boundaries), "jobs that read the same states follow one another"
    with pytest.raises(InputError, match="windows has no option 'windows'"):
        opened.analyse("windows", windows="a=1:2")

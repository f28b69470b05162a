"""One published family, from the margins of its released cells: the row of the headline table, and what goes with it.

The file has every cell of the 599 holdout events of Qwen2.5-32B of arXiv 2605.07284. Its margins are of bf16 logits, so
that some diagonals are ties.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from actcache.cli import main
from actcache.study.contrasts import contrasts

CELLS = Path(__file__).parents[2] / "shared" / "data" / "qwen25_32b_holdout.cells.parquet"
pytestmark = pytest.mark.skipif(not CELLS.is_file(), reason=f"the released cells are not at {CELLS}")

# Of the published row: means are exact, intervals are of other draws.
PUBLISHED = {
    "late_from_pt": (1.035893, 0.894, 1.170),
    "late_from_it": (2.337646, 2.143, 2.550),
    "interaction": (1.301753, 1.137, 1.489),
}


def answer(capsys, *words):
    assert main(["effects", str(CELLS), "--json", *words]) == 0
    return json.loads(capsys.readouterr().out)


def group_of(found, readout="common_it", subset="all"):
    (group,) = (one for one in found["groups"] if (one["readout"], one["subset"]) == (readout, subset))
    return group


def test_the_published_row(capsys):
    group = group_of(answer(capsys, "--keep-ties", "--weights", "prompt"))
    assert (group["n_events"], group["n_prompts"]) == (599, 599)
    for name, (mean, low, high) in PUBLISHED.items():
        half = (high - low) / 2
        assert group[name]["mean"] == pytest.approx(mean, abs=1e-6), name
        assert group[name]["low"] == pytest.approx(low, abs=0.15 * half), name
        assert group[name]["high"] == pytest.approx(high, abs=0.15 * half), name
    assert group["portable_share"]["mean"] == pytest.approx(0.443, abs=5e-4)
    assert group["interaction_share"]["mean"] == pytest.approx(0.326, abs=5e-4)
    assert group["native_shift"]["mean"] == pytest.approx(3.995, abs=5e-4)
    assert group["flags"] == []


def test_where_the_events_lie(capsys):
    found = answer(capsys, "--keep-ties", "--weights", "prompt", "--by", "step", "--null", "0")
    shares = {name: group_of(found, subset=name)["share_of_events"] for name in ("step=0", "step>=3", "step>=5")}
    assert shares == pytest.approx({"step=0": 0.464, "step>=3": 0.394, "step>=5": 0.289}, abs=5e-4)
    interactions = [group_of(found, subset=f"step>={least}")["interaction"]["mean"] for least in (1, 3)]
    assert group_of(found, subset="step=0")["interaction"]["mean"] > 1.5 * max(interactions), "as in every family"


def test_ties_are_counted_and_their_loss_moves_the_interaction(capsys):
    kept, strict = answer(capsys, "--keep-ties", "--null", "0"), answer(capsys, "--null", "0")
    for found in (kept, strict):
        assert (found["n_ties"], found["n_wrong_sign"]) == (44, 8)
        assert found["n_ties"] / 599 == pytest.approx(0.08, abs=0.01)
        assert found["n_wrong_sign"] / 599 == pytest.approx(0.01, abs=0.005)
    assert strict["n_left_out"] == 52
    assert group_of(strict)["n_events"] == 547
    assert group_of(kept)["interaction"]["mean"] == pytest.approx(1.30, abs=0.005)
    assert group_of(strict)["interaction"]["mean"] == pytest.approx(1.39, abs=0.005)


def test_the_label_swap_null(capsys):
    """No sign pattern of 20,000 reaches the interaction. The spread is what independent signs must give: the root of
    the sum of squares over the number of prompts; near a normal distribution the 99.9th percentile is 3.09 of it."""
    null = group_of(answer(capsys, "--keep-ties", "--weights", "prompt"))["label_swap"]
    table = contrasts(pq.read_table(CELLS))
    interaction = table.filter(pc.equal(table["readout"], "common_it"))["interaction"].to_numpy()
    sd = math.sqrt((interaction**2).sum()) / len(interaction)
    assert null["p"] == pytest.approx(5.0e-5, abs=1e-8)
    assert (null["draws"], null["seed"]) == (20_000, 23)
    assert null["observed"] == pytest.approx(np.mean(interaction), abs=1e-12)
    assert null["null_sd"] == pytest.approx(sd, rel=0.02)
    assert null["null_q99.9"] == pytest.approx(3.09 * sd, rel=0.05)
    assert abs(null["null_mean"]) < 4 * sd / math.sqrt(20_000)
    assert null["null_q99.9"] < null["null_max"] < null["observed"]

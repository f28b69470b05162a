"""The crosscoder against its formulas; its files against damage."""

from __future__ import annotations

import pytest
import torch

from actcache.analyses.features.batch_topk import batch_topk, cutoff
from actcache.analyses.features.crosscoder import DESCRIPTION, WEIGHTS, Crosscoder, describe
from actcache.errors import CorruptFileError, InputError

K, D, F = 2, 5, 7


@pytest.fixture
def crosscoder():
    torch.manual_seed(0)
    tensors = {"encoder": (K, D, F), "b_enc": (F,), "decoder": (F, K, D), "b_dec": (K, D), "mean": (K, D)}
    return Crosscoder(("base", "chat"), 29, **{n: torch.randn(s) for n, s in tensors.items()}, threshold=12.0, k=3)


def test_it_is_what_its_formulas_say(crosscoder):
    rows = torch.randn(40, K, D)
    features = torch.zeros(40, F)
    for row in range(40):
        for feature in range(F):
            inner = sum((rows[row, m] - crosscoder.mean[m]) @ crosscoder.encoder[m, :, feature] for m in range(K))
            value = max(0.0, float(inner + crosscoder.b_enc[feature]))
            norms = sum(float(crosscoder.decoder[feature, m].norm()) for m in range(K))
            features[row, feature] = value if value * norms > crosscoder.threshold else 0.0
    assert 0 < (features > 0).float().mean() < 0.5
    torch.testing.assert_close(crosscoder.encode(rows), features)
    assert torch.equal(crosscoder.encode(rows.bfloat16()), crosscoder.encode(rows.bfloat16().float()))
    for m, label in enumerate(crosscoder.labels):
        decoded = features @ crosscoder.decoder[:, m] + crosscoder.b_dec[m]
        torch.testing.assert_close(crosscoder.decode(features)[:, m], decoded)
        assert torch.equal(crosscoder.decoder_of(label), crosscoder.decoder[:, m])


def test_one_branch_is_the_joint_encoding_where_the_other_adds_nothing(crosscoder):
    """At its mean, a row of the other branch adds nothing."""
    rows = torch.randn(9, D)
    for m, label in enumerate(crosscoder.labels):
        both = crosscoder.mean.expand(9, K, D).clone()
        both[:, m] = rows
        torch.testing.assert_close(crosscoder.encode_branch(label, rows), crosscoder.encode(both))
    with pytest.raises(InputError, match="branches base, chat, not it"):
        crosscoder.encode_branch("it", rows)


def test_files(crosscoder, tmp_path):
    crosscoder.save(tmp_path / "b029", {"corpus": "x"})
    loaded = Crosscoder.load(tmp_path / "b029")
    assert loaded.digest == crosscoder.digest == describe(tmp_path / "b029").content["digest"]
    assert (loaded.labels, loaded.block, loaded.k, loaded.threshold) == (("base", "chat"), 29, 3, 12.0)
    assert torch.equal(loaded.encoder, crosscoder.encoder)
    assert describe(tmp_path / "b029").made_from == {"corpus": "x"}


@pytest.mark.parametrize("name", [WEIGHTS, DESCRIPTION])
@pytest.mark.parametrize("how", ["flipped", "cut", "gone", "another's"])
def test_damage_is_named(crosscoder, tmp_path, name, how):
    crosscoder.save(tmp_path)
    path, whole = tmp_path / name, (tmp_path / name).read_bytes()
    if how == "flipped":
        at = len(whole) - 20 if name == WEIGHTS else whole.index(b"29")
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
    elif how == "cut":
        path.write_bytes(whole[: len(whole) // 2])
    elif how == "gone":
        path.unlink()
    else:
        other = torch.randn(K, D)
        changed = {field: getattr(crosscoder, field) for field in Crosscoder.__dataclass_fields__}
        Crosscoder(**changed | {"b_dec": other}).save(tmp_path / "other")
        path.write_bytes((tmp_path / "other" / name).read_bytes())
    with pytest.raises(InputError if how == "gone" else (CorruptFileError, InputError), match="train"):
        Crosscoder.load(tmp_path)


@pytest.mark.parametrize(("n", "k"), [(1, 1), (6, 2), (6, 7), (5, 100)])
def test_batch_topk_keeps_the_largest(n, k):
    torch.manual_seed(n + k)
    scores = torch.relu(torch.randn(n, F))
    kept = batch_topk(scores, k)
    order = sorted(scores.flatten().tolist(), reverse=True)[: n * k]
    positive = [value for value in order if value > 0]
    assert sorted(scores[kept].tolist(), reverse=True) == positive
    assert cutoff(scores, kept) == min(positive, default=0.0)
    assert not batch_topk(torch.zeros(n, F), k).any()
    assert cutoff(torch.zeros(n, F), batch_topk(torch.zeros(n, F), k)) == 0

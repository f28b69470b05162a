"""What readouts say of the whole vocabulary, against plain sorting of the model's own float32 logits."""

from __future__ import annotations

import math
from unittest import mock

import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM
from twins import reference

import actcache
from actcache.errors import InputError, NotFiniteError
from actcache.models import readout as module
from actcache.models.readout import Readout


def made(path, dtype):
    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype).eval()
    final = reference.final_hidden(model, [5, 6, 7, 8, 9, 10, 11])
    return model, Readout(model), final


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A plain model, and one that soft-caps its logits."""
    paths = {arch: tiny.make_pair(tmp_path_factory.mktemp(arch), arch)[0] for arch in ("llama", "gemma2")}
    return {
        ("llama", torch.float32): made(paths["llama"], torch.float32),
        ("gemma2", torch.bfloat16): made(paths["gemma2"], torch.bfloat16),
    }


@pytest.fixture(params=[("llama", torch.float32), ("gemma2", torch.bfloat16)], ids=["llama", "gemma2"])
def of_model(models, request):
    return models[request.param]


def in_order(logits: list[float]) -> list[int]:
    """Tokens, best first; of equal logits the lower id first."""
    return sorted(range(len(logits)), key=lambda token: (-logits[token], token))


def test_logits_are_the_models_own(of_model):
    model, readout, final = of_model
    logits = readout.logits(final)
    assert (logits.dtype, logits.shape) == (torch.float32, (7, model.config.vocab_size))
    torch.testing.assert_close(logits, reference.readout(model, final), rtol=0, atol=1e-5)


@pytest.mark.parametrize("at_once", [1, 7 * 32, 1 << 20])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("n", [1, 5])
def test_a_piece_of_the_head_is_float32_at_a_time(monkeypatch, at_once, bias, n):
    generator = torch.Generator().manual_seed(0)
    head = torch.nn.Linear(32, 120, bias=bias, dtype=torch.bfloat16)
    for parameter in head.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator).bfloat16()
    normed = torch.randn(1, n, 32, generator=generator).bfloat16()
    expected = torch.nn.functional.linear(normed.float(), head.weight.float(), head.bias.float() if bias else None)
    made, own = [], torch.Tensor.float
    monkeypatch.setattr(module, "HEAD_AT_ONCE_ON_CPU", at_once)
    monkeypatch.setattr(torch.Tensor, "float", lambda tensor: made.append(tensor.numel()) or own(tensor))
    with torch.no_grad():
        found = module._Float32Head(head, module._Given())(normed)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-5)
    assert max(made) <= max(at_once, 32, normed.numel(), 120)


@pytest.mark.parametrize("at_once", [1, 3, 1000])
def test_top_rank_and_entropy_are_those_of_the_logits(of_model, at_once):
    _, readout, final = of_model
    logits = readout.logits(final)
    tokens = torch.tensor([[3, 0, 119]] * 6 + [[7, 7, 50]])
    sizes = []

    def watched(normed, token_ids, own=readout._logits):
        sizes.append(normed.shape[1])
        return own(normed, token_ids)

    with (
        mock.patch.object(module, "MAX_LOGITS_AT_ONCE", at_once * readout.vocab_size),
        mock.patch.object(readout, "_logits", watched),
    ):
        assert readout.logits(final).sub(logits).abs().max() <= 1e-5
        ids, found = readout.top(final, 9)
        ranks, entropy = readout.rank(final, tokens), readout.entropy(final)
        read = readout.read(final, tokens, 9)
    assert max(sizes) <= at_once, "more logits at once than said"
    for row, of_row in enumerate(logits.tolist()):
        order = in_order(of_row)
        assert ids[row].tolist() == order[:9]
        assert found[row].tolist() == pytest.approx([of_row[token] for token in order[:9]], abs=1e-5)
        assert ranks[row].tolist() == [order.index(token) for token in tokens[row].tolist()]
        p = [math.exp(value) for value in of_row]
        shares = [one / math.fsum(p) for one in p]
        assert entropy[row] == pytest.approx(-math.fsum(one * math.log(one) for one in shares), abs=1e-5)
    assert torch.equal(read.top_ids, ids)
    assert torch.equal(read.ranks, ranks)
    assert (found.dtype, entropy.dtype, ids.dtype, ranks.dtype) == (torch.float32,) * 2 + (torch.int64,) * 2
    two_ids, two = readout.top2(final)
    assert torch.equal(two_ids, ids[:, :2])
    assert torch.equal(readout.best(final), ids[:, 0])
    torch.testing.assert_close(two, found[:, :2])


def test_no_states(of_model):
    _, readout, final = of_model
    none = final[:0]
    assert readout.logits(none).shape == (0, readout.vocab_size)
    assert [part.shape for part in readout.top(none, 3)] == [(0, 3)] * 2
    assert readout.rank(none, torch.empty(0, 2, dtype=torch.int64)).shape == (0, 2)
    assert readout.entropy(none).shape == (0,)


def test_equal_and_masked_logits_come_in_the_order_of_ids():
    """Few values, so that many are equal; some tokens are masked."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randint(0, 4, (40, 17), generator=generator).float()
    logits[logits == 0] = -torch.inf
    logits[:, 3] = 1.0
    tokens = torch.randint(0, 17, (40,), generator=generator)
    ranks = module._ranks(logits, tokens)
    for k in (1, 5, 17):
        ids, found = module._best(logits, k)
        for row, of_row in enumerate(logits.tolist()):
            order = in_order(of_row)
            assert ids[row].tolist() == order[:k]
            assert found[row].tolist() == [of_row[token] for token in order[:k]]
            assert ranks[row] == order.index(int(tokens[row]))


def test_masked_tokens_have_no_share_of_the_entropy(models):
    _, readout, final = models["llama", torch.float32]
    whole = readout.logits(final)

    def masked(normed, token_ids):
        return whole.masked_fill(torch.arange(whole.shape[1]) >= 2, -torch.inf)

    with mock.patch.object(readout, "_logits", masked):
        entropy = readout.entropy(final)
    p = (whole[:, 0] - whole[:, 1]).sigmoid().double()
    want = -(p * p.log() + (1 - p) * (1 - p).log())
    torch.testing.assert_close(entropy, want.float())


@pytest.mark.parametrize(
    ("read", "said"),
    [
        (lambda r, final: r.top(final, 0), "k is 0, expected 1 to 120"),
        (lambda r, final: r.top(final, 121), "k is 121, expected 1 to 120"),
        (
            lambda r, final: r.rank(final, torch.tensor([[0]] * 6 + [[120]])),
            "token 120 is not in the vocabulary of 120",
        ),
        (lambda r, final: r.rank(final, torch.tensor([[-1]] * 7)), "token -1 is not in the vocabulary"),
        (lambda r, final: r.rank(final, torch.tensor([[1]])), r"are torch.int64 \[1, 1\], expected int64 \[7, m\]"),
        (lambda r, final: r.scores(final, torch.tensor([[-1]] * 7)), "token -1 is not in the vocabulary"),
        (lambda r, final: r.scores(final, torch.tensor([[1]])), r"are torch.int64 \[1, 1\], expected int64 \[7, m\]"),
        (lambda r, final: r.scores(final[:, 1:], torch.ones(7, 1, dtype=torch.int64)), r"final states are \[7, 31\]"),
        (lambda r, final: r.rank(final, torch.ones(7, 1)), "token ids are torch.float32"),
        (lambda r, final: r.logits(final[0]), r"final states are \[32\], expected \[n, 32\]"),
        (lambda r, final: r.entropy(final[:, 1:]), r"final states are \[7, 31\], expected \[n, 32\]"),
    ],
)
def test_what_cannot_be_asked(models, read, said):
    _, readout, final = models["llama", torch.float32]
    with pytest.raises(InputError, match=said):
        read(readout, final)


@pytest.mark.parametrize("read", ["logits", "entropy", "top"])
def test_what_is_not_finite_is_named(models, read):
    _, readout, final = models["llama", torch.float32]
    more = (2,) if read == "top" else ()
    damaged = final.clone()
    damaged[4, 0] = torch.nan
    with pytest.raises(NotFiniteError, match="the final state 4 is not finite") as caught:
        getattr(readout, read)(damaged, *more)
    assert caught.value.row == 4

    def no_logits(normed, token_ids, own=readout._logits):
        logits = own(normed, token_ids)
        logits[-1, 5] = torch.nan
        return logits

    with (
        mock.patch.object(readout, "_logits", no_logits),
        mock.patch.object(module, "MAX_LOGITS_AT_ONCE", 3 * readout.vocab_size * (1 if read == "logits" else 4)),
        pytest.raises(NotFiniteError, match="the logits of row 2 are not finite"),
    ):
        getattr(readout, read)(final, *more)


def test_it_is_what_a_late_stack_has(tmp_path):
    pt, _ = tiny.make_pair(tmp_path, "llama")
    late = actcache.LateStack.load(pt, 3)
    ids, _ = late.readout.top(late.run(torch.ones(4, late.width), [0, 4]), 3)
    assert ids.shape == (1, 3)

"""Late stacks beyond plain packs: padded and single sequences, rotary angles by length, what is refused.

Against forward hooks on the whole model, like everything that is replayed.
"""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn
from transformers import (
    LlamaModel,
)
from transformers.models.llama.modeling_llama import LlamaDecoderLayer
from twins import reference
from twins.replay import (
    BOUNDARY,
    LENGTHS,
    LIMIT,
    N_BLOCKS,
    SHIFT,
    VOCAB_SIZE,
    WIDTH,
    Sequences,
    build,
)

from actcache.errors import InputError, UnsupportedModelError
from actcache.models.linear import without_queries
from actcache.models.readout import Readout
from actcache.replay.copies import copies_of
from actcache.replay.edits import Add, Call, Edit, Interpolate, Replace, Variant
from actcache.replay.forwards import Forwards
from actcache.replay.late_stack import LateStack
from actcache.replay.modes import plan


def at_last(change):
    def edit(state):
        return torch.cat([state[:-1], change(state[-1:])])

    return edit


EDITS = {  # a variant, and what it does to the states
    Variant("plain"): lambda state: state,
    Variant("last", [Edit(Add(SHIFT))]): at_last(lambda row: row + SHIFT),
    Variant("last once more", [Edit(Add(SHIFT, -2.0))]): at_last(lambda row: row - 2 * SHIFT),
    Variant("all", [Edit(Add(SHIFT), "all")]): lambda state: state + SHIFT,
    Variant("first", [Edit(Replace(vector=SHIFT), (0,))]): lambda state: torch.cat([SHIFT[None], state[1:]]),
}


def check_every_mode(late, sequences, tolerance=1e-4):
    """Strict is exact and everything else equal to rounding, for plain replays and variants, in small packs too."""
    variants = list(EDITS)
    expected = torch.stack([sequences.hooked(EDITS[variant]) for variant in variants], dim=1)
    strict = late.run_variants(sequences.rows, sequences.offsets, variants, strict=True)
    assert torch.equal(strict, expected)
    assert torch.equal(late.run(sequences.rows, sequences.offsets, strict=True), expected[:, 0])
    for max_tokens in (None, 25, 1):
        found = late.run_variants(sequences.rows, sequences.offsets, variants, max_tokens=max_tokens)
        torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)
        plain = late.run(sequences.rows, sequences.offsets, max_tokens=max_tokens)
        torch.testing.assert_close(plain, expected[:, 0], rtol=0, atol=tolerance)


@pytest.mark.slow
@pytest.mark.usefixtures("workers")
@pytest.mark.parametrize(
    ("name", "mode", "reason"),
    [
        ("llama", "packed", None),
        ("gptj", "packed", None),
        ("bloom", "padded", "BloomModel"),
        ("mamba", "padded", "MambaModel"),
    ],
)
def test_sequences_share_a_forward_only_where_that_changes_nothing(name, mode, reason):
    model = build(name)
    late = LateStack.load(model, BOUNDARY)
    assert late.mode == mode
    assert (late.not_packable or "").startswith(reason or "")
    assert bool(late.not_packable) == bool(reason)
    check_every_mode(late, Sequences(model))
    check_every_mode(late, Sequences(model, (1,), seed=1))
    check_every_mode(late, Sequences(model, (1, 1, 2), seed=2))


@pytest.fixture
def batches(monkeypatch):
    """Shapes ``(B, T)`` of every forward over late blocks from here on."""
    seen = []
    forward = Forwards.plain

    def watch(self, state, *args, **more):
        seen.append(tuple(state.shape[:2]))
        return forward(self, state, *args, **more)

    monkeypatch.setattr(Forwards, "plain", watch)
    return seen


def test_padded_batches_stay_within_their_budget(batches):
    model = build("bloom")
    late, sequences = LateStack.load(model, BOUNDARY), Sequences(model)
    batches.clear()
    late.run(sequences.rows, sequences.offsets, max_tokens=24)
    assert batches == [(2, 7), (2, 12), (1, 9)]
    batches.clear()
    late.run(sequences.rows, sequences.offsets, max_tokens=1)
    assert batches == [(1, length) for length in LENGTHS]
    batches.clear()
    late.run(sequences.rows, sequences.offsets)
    assert batches == [(len(LENGTHS), max(LENGTHS))]


class Mixes(torch.nn.Module):
    """An MLP that adds the mean of the tokens before it in the batch row, wherever sequences begin."""

    def __init__(self, mlp, ahead):
        super().__init__()
        self.mlp, self.ahead = mlp, ahead

    def forward(self, hidden):
        if self.ahead:
            return self.mlp(hidden) + hidden.mean(dim=1, keepdim=True)
        counts = torch.arange(1, hidden.shape[1] + 1)[:, None]
        return self.mlp(hidden) + hidden.cumsum(dim=1) / counts


@pytest.mark.parametrize("block", [BOUNDARY, N_BLOCKS - 1])
@pytest.mark.parametrize(("ahead", "mode"), [(False, "padded"), (True, "single")])
def test_a_block_that_mixes_tokens_is_not_packed(block, ahead, mode):
    model = build("llama")
    layer = reference.parts(model).blocks[block]
    layer.mlp = Mixes(layer.mlp, ahead)
    late = LateStack.load(model, BOUNDARY)
    assert late.mode == mode
    assert "differs from the same one alone" in late.not_packable
    assert late.at(3).mode == mode
    check_every_mode(late, Sequences(model))


def test_a_pass_through_of_the_mixing_block_alone_is_packed():
    """What the upstream blocks do is no matter of the late stack."""
    model = build("llama")
    layer = reference.parts(model).blocks[BOUNDARY - 1]
    layer.mlp = Mixes(layer.mlp, ahead=False)
    late = LateStack.load(model, BOUNDARY)
    assert late.mode == "packed"
    check_every_mode(late, Sequences(model))


def test_sequences_beyond_the_original_positions_do_not_change_their_neighbours():
    """Rotary angles depend on whether the longest sequence of a forward is beyond the limit."""
    model = build("phi3 longrope")
    late = LateStack.load(model, BOUNDARY)
    assert late.mode == "packed"
    lengths = (3, LIMIT, 20, 5, LIMIT + 1, LIMIT - 1, 30, 2)
    sequences = Sequences(model, lengths)
    check_every_mode(late, sequences)
    # Otherwise the equality says little: with the long factors, a short sequence ends elsewhere.
    rope = late._forwards.backbone.decoder.rotary_emb
    before = late.run(sequences.rows[:3], [0, 3])
    kept = rope.original_inv_freq
    rope.original_inv_freq = rope.long_inv_freq
    try:
        assert (late.run(sequences.rows[:3], [0, 3]) - before).abs().max() > 1e-2
    finally:
        rope.original_inv_freq = kept


@pytest.mark.parametrize("mode", ["packed", "padded"])
def test_packs_hold_no_sequence_beyond_the_limit_beside_another(mode):
    late = LateStack.load(build("phi3 longrope"), BOUNDARY)
    lengths = [3, LIMIT, 20, 5, LIMIT + 1, 2, 1]
    packs = plan(lengths, mode, late._forwards.backbone.regimes, 100)
    assert [list(pack) for pack in packs] == [[0, 1], [2], [3], [4], [5, 6]]


class ReadsEmbeddings(LlamaModel):
    """A decoder whose last block also reads the token embeddings."""

    def forward(self, input_ids=None, inputs_embeds=None, **more):
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        self.layers[-1].__dict__["embeddings"] = inputs_embeds
        return super().forward(inputs_embeds=inputs_embeds, **more)


class ReadingLayer(LlamaDecoderLayer):
    def forward(self, *args, **more):
        return super().forward(*args, **more) + self.embeddings


def test_late_blocks_that_read_the_embeddings_are_refused():
    model = build("llama")
    model.model.__class__, model.model.layers[-1].__class__ = ReadsEmbeddings, ReadingLayer
    with pytest.raises(UnsupportedModelError, match="late blocks read more than the state at the boundary"):
        LateStack.load(model, BOUNDARY)


def test_boundaries_that_a_late_stack_does_not_have_are_refused():
    model = build("llama")
    late = LateStack.load(model, BOUNDARY)
    with pytest.raises(InputError, match=f"boundary 1 is before {BOUNDARY}, where this late stack begins"):
        late.at(1)
    with pytest.raises(InputError, match="boundary 1 is before 2"):
        late.at(3).at(1)
    for boundary in (N_BLOCKS, -1):
        with pytest.raises(InputError, match=rf"boundary {boundary} is outside 0\.\.3 \(the model has 4 blocks\)"):
            late.at(boundary)
        with pytest.raises(InputError, match=f"boundary {boundary} is outside"):
            LateStack.load(model, boundary)
    assert late.at(BOUNDARY) is late
    assert late.at(3).at(BOUNDARY) is late
    first = LateStack.load(model, 1)
    with pytest.raises(InputError, match="boundary 0 is before 1"):
        first.at(0)
    sequences = Sequences(model)
    between = first.at(3).at(BOUNDARY)  # cut from the first stack, not from the shorter one
    assert torch.equal(between.run(sequences.rows, sequences.offsets, strict=True), sequences.hooked())
    model.train()
    with pytest.raises(InputError, match="training mode"):
        LateStack.load(model, BOUNDARY)


@pytest.mark.parametrize(
    ("rows", "offsets", "words"),
    [
        (
            torch.zeros(4, WIDTH, dtype=torch.bfloat16),
            [0, 4],
            "rows are torch.bfloat16, this late stack is torch.float32",
        ),
        (torch.zeros(4, 5), [0, 4], r"rows have shape \(4, 5\), expected \[N, 32\]"),
        (torch.zeros(1, 4, WIDTH), [0, 4], r"rows have shape \(1, 4, 32\)"),
        (torch.zeros(4, WIDTH), [0, 3], "offsets must run from 0 to the number of rows, 4"),
        (torch.zeros(4, WIDTH), [1, 4], "offsets must run from 0"),
        (torch.zeros(4, WIDTH), [], "offsets must run from 0"),
        (torch.zeros(4, WIDTH), [0, 2, 2, 4], "sequence 1 has 0 rows; each needs at least one"),
        (torch.zeros(4, WIDTH), [0, 3, 2, 4], "sequence 1 has -1 rows"),
        (torch.zeros(70, WIDTH), [0, 4, 70], "sequence 1 has 66 rows; the model has 64 positions"),
    ],
)
def test_rows_and_offsets_that_do_not_fit_are_refused(rows, offsets, words):
    late = LateStack.load(build("llama"), BOUNDARY)
    with pytest.raises(InputError, match=words):
        late.run(rows, offsets)


@pytest.mark.usefixtures("workers")
def test_a_stack_is_as_before_after_an_error():
    model = build("llama")
    late, sequences = LateStack.load(model, BOUNDARY), Sequences(model)
    expected = sequences.hooked()

    def fail(rows, at):
        raise KeyError

    for site in ({}, {"site": "mlp", "layers": (3,)}, {"site": "attention", "layers": (2,)}):
        for positions in ("last", "all"):
            variants = [Variant("a"), Variant("b", [Edit(Call(fail, "fail"), positions, **site)])]
            for strict in (True, False):
                with pytest.raises(KeyError):
                    late.run_variants(sequences.rows, sequences.offsets, variants, strict=strict)
                assert torch.equal(late.run(sequences.rows, sequences.offsets, strict=True), expected)
                torch.testing.assert_close(late.run(sequences.rows, sequences.offsets), expected, rtol=0, atol=1e-4)
    assert late._forwards.backbone.config._attn_implementation == "sdpa"
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.usefixtures("workers")
def test_others_may_replay_while_variants_are_being_iterated():
    model = build("llama")
    late, sequences = LateStack.load(model, BOUNDARY), Sequences(model)
    variants = [Variant(f"{layer}", [Edit(Add(SHIFT), site="mlp", layers=(layer,))]) for layer in (2, 3, 2, 3)]
    expected = late.run_variants(sequences.rows, sequences.offsets, variants, max_tokens=5)
    plain = late.run(sequences.rows, sequences.offsets, strict=True)
    batch = late.prepare(sequences.rows, sequences.offsets, variants, max_tokens=5)
    first, second = late.replay(batch), late.replay(batch)
    for one, other in zip(first, second, strict=True):
        assert torch.equal(late.run(sequences.rows, sequences.offsets, strict=True), plain)
        for numbers, indices, hidden in (one, other):
            assert torch.equal(hidden, expected[numbers, indices])
    half = late.replay(batch)
    next(half)
    assert torch.equal(late.run(sequences.rows, sequences.offsets, strict=True), plain)
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.usefixtures("workers")
def test_donors_in_padded_batches_are_those_of_the_same_rows():
    model = build("bloom")
    late, sequences, other = LateStack.load(model, BOUNDARY), Sequences(model), Sequences(model, seed=9)
    variants = [Variant("half", [Edit(Interpolate("other", 0.5), "all")]), Variant("last", [Edit(Replace("other"))])]
    found = late.run_variants(sequences.rows, sequences.offsets, variants, donors={"other": other.rows})
    halves = Sequences(model)
    halves.states = [torch.lerp(a, b, 0.5) for a, b in zip(sequences.states, other.states, strict=True)]
    lasts = Sequences(model)
    lasts.states = [torch.cat([a[:-1], b[-1:]]) for a, b in zip(sequences.states, other.states, strict=True)]
    expected = torch.stack([halves.hooked(), lasts.hooked()], dim=1)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


# ---- what the last block computes ----


class Recorder:
    """A hook with a memory of its own."""

    def __init__(self):
        self.n_tokens = 0

    def hook(self, module, args, output):
        self.n_tokens += (output if isinstance(output, torch.Tensor) else output[0]).shape[:-1].numel()


@pytest.mark.parametrize(
    ("name", "queries", "keys", "made_apart"),
    [
        ("llama", "self_attn.q_proj", "self_attn.k_proj", True),
        ("gptj", "attn.q_proj", "attn.k_proj", True),
        ("deepseek_v3", "self_attn.q_b_proj", "self_attn.kv_b_proj", True),
        ("gpt2", "attn.c_attn", "attn.c_attn", False),
    ],
)
def test_the_last_block_makes_queries_at_the_ends_only(name, queries, keys, made_apart):
    model = build(name)
    late, sequences = LateStack.load(model, BOUNDARY), Sequences(model)
    assert late.mode == "packed"
    last = late.blocks[-1]
    layer, counts = last.get_submodule(queries), {queries: Recorder(), keys: Recorder()}
    for path, recorder in counts.items():
        last.get_submodule(path).register_forward_hook(recorder.hook)
    late.run(sequences.rows, sequences.offsets)
    ends, every = len(LENGTHS), sum(LENGTHS)
    assert counts[keys].n_tokens == every + ends
    assert counts[queries].n_tokens == (ends if made_apart else every + ends)
    assert last.get_submodule(queries) is layer  # as before, for whoever else holds the model

    last.get_submodule(keys).register_forward_pre_hook(lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        late.run(sequences.rows, sequences.offsets)
    assert last.get_submodule(queries) is layer


def test_queries_are_made_everywhere_where_two_layers_could_be_the_ones():
    block = build("llama").model.layers[-1]
    block.other = nn.Module()
    block.other.q_proj = nn.Linear(WIDTH, WIDTH)
    layers = block.self_attn.q_proj, block.other.q_proj
    with without_queries(block):
        assert (block.self_attn.q_proj, block.other.q_proj) == layers
    del block.other
    states = torch.randn(1, 3, WIDTH)
    with without_queries(block):
        queries = block.self_attn.q_proj(states)
        assert queries.shape == (1, 3, WIDTH)
        assert queries.count_nonzero() == 0
    assert block.self_attn.q_proj is layers[0]


# ---- several packs at once ----


@pytest.mark.usefixtures("three_workers")
def test_workers_share_weights_and_nothing_that_a_forward_changes():
    model = build("llama")
    late = LateStack.load(model, BOUNDARY)
    late.blocks[0].mlp.of_torch = nn.BatchNorm1d(3).requires_grad_(False)
    variants = [Variant("inside", [Edit(Add(SHIFT), site="mlp", layers=(3,))])]
    own = late._forwards
    one, other = copies_of(own, 2, [own.site(layer, edit.site) for layer, edit in variants[0].inside()])
    buffers = [{id(buffer) for buffer in stack.model.buffers()} for stack in (own, one, other)]
    assert all(buffers)
    assert len(set.union(*buffers)) == sum(map(len, buffers))
    for stack in (one, other):
        ours = dict(own.model.named_parameters())
        assert all(weight is ours[name] for name, weight in stack.model.named_parameters())
        assert stack.model.config is not own.model.config
        assert stack.backbone.config is stack.model.config
        assert all(block is not theirs for block, theirs in zip(stack.blocks, own.blocks, strict=True))
        for block in stack.blocks:
            assert block.self_attn.config is stack.backbone.config
            assert block.mlp is not own.backbone.blocks[3].mlp
    assert {id(module) for module in one.blocks} & {id(module) for module in other.blocks} == set()


def test_a_thread_hands_on_its_own_state_and_no_others():
    late = LateStack.load(build("llama"), BOUNDARY)
    stand_in, (one, two) = late._forwards.backbone.blocks[0], torch.randn(2, 1, 3, WIDTH)

    def elsewhere():
        found = [stand_in()]
        with late._forwards.handing_on(two):
            found.append(stand_in())
        return [*found, stand_in()]

    with ThreadPoolExecutor(1) as other, late._forwards.handing_on(one):
        before, during, after = other.submit(elsewhere).result()
        assert torch.equal(stand_in(), one)
    assert torch.equal(during, two)
    assert before is after is stand_in() is None


class Remembers(nn.Module):
    """Has no parts and no config, and state of its own between two of its lines, as RecurrentGemma's recurrence."""

    def forward(self, hidden):
        self.state = hidden.mean(dim=-1, keepdim=True)
        time.sleep(0.002)  # the other workers write theirs
        return self.state * torch.ones_like(hidden)


@pytest.mark.usefixtures("three_workers")
def test_no_worker_reads_the_state_that_a_module_keeps_for_another():
    model = build("llama")
    late, sequences = LateStack.load(model, BOUNDARY), Sequences(model)
    late.blocks[0].mlp = Remembers()
    offsets = list(range(0, 193, 12))
    rows = sequences.rows.repeat(6, 1)
    assert len(late.packs([12] * 16, max_tokens=12)) == 16
    found = late.run(rows, offsets, max_tokens=12)
    torch.testing.assert_close(found, late.run(rows, offsets, strict=True), rtol=0, atol=1e-4)


@pytest.mark.usefixtures("three_workers")
@pytest.mark.parametrize("name", ["llama", "bloom"])
def test_workers_run_what_is_hooked_to_the_blocks_or_done_to_them_between_calls(name):
    model = build(name)
    late, sequences, recorder = LateStack.load(model, BOUNDARY), Sequences(model), Recorder()
    before = late.run(sequences.rows, sequences.offsets)
    handle = late.blocks[0].register_forward_hook(recorder.hook)
    late.run(sequences.rows, sequences.offsets, max_tokens=12)
    assert recorder.n_tokens >= sum(LENGTHS)
    handle.remove()
    block = late.blocks[0]
    forward = block.forward  # of this very module, whichever copy of it is called
    block.forward = lambda *args, **more: forward(*args, **more)
    torch.testing.assert_close(late.run(sequences.rows, sequences.offsets, max_tokens=12), before, rtol=0, atol=1e-4)
    del block.forward
    norm = type(block.input_layernorm)(WIDTH)
    block.input_layernorm = norm.requires_grad_(False)
    norm.weight.fill_(-3.0)
    changed = late.run(sequences.rows, sequences.offsets, max_tokens=12)
    torch.testing.assert_close(changed, late.run(sequences.rows, sequences.offsets, strict=True), rtol=0, atol=1e-4)
    assert (changed - before).abs().amax(dim=1)[[0, 2, 3, 4]].min() > 1e-2


def test_every_worker_has_as_much_to_do(three_workers):
    late = LateStack.load(build("llama"), BOUNDARY)
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 30, (200,), generator=generator).tolist()
    for max_tokens in (None, 100, 300):
        packs = late.packs(lengths, max_tokens=max_tokens)
        n_tokens = [sum(lengths[i] for i in pack) for pack in packs]
        assert [i for pack in packs for i in pack] == list(range(len(lengths)))
        assert max(n_tokens) <= (max_tokens or 1024)
        assert len(packs) % 3 == 0
        assert max(n_tokens) <= sum(n_tokens) / len(n_tokens) + 30
    torch.set_num_threads(1)
    assert len(late.packs(lengths)) == -(-sum(lengths) // 1024)


# ---- readouts ----


@pytest.mark.parametrize("n_at_once", [1, 2, 100])
@pytest.mark.parametrize("name", ["llama", "gptj"])  # without a bias of the head, and with one
def test_distributions_are_compared_with_their_references_however_many_at_once(name, n_at_once, monkeypatch):
    model = build(name)
    generator = torch.Generator().manual_seed(1)
    hidden, references = torch.randn(9, WIDTH, generator=generator), torch.randn(3, WIDTH, generator=generator)
    which = torch.tensor([2, 0, 0, 2, 2, 0, 2, 2, 2])
    hidden[3] = references[2]
    monkeypatch.setattr("actcache.models.readout.MAX_LOGITS_AT_ONCE", 4 * VOCAB_SIZE * n_at_once)
    ids, kl = Readout(model).compare(hidden, references, which)
    for row, own in enumerate(references[which]):
        p, q = (reference.readout(model, one).double().softmax(-1) for one in (own, hidden[row]))
        assert ids[row] == q.argmax()
        assert kl[row].item() == pytest.approx(float((p * (p / q).log()).sum()), rel=1e-5, abs=1e-12)
    assert kl[3] < 1e-12 < kl[4]


def test_tokens_that_no_distribution_has_add_nothing(monkeypatch):
    readout, logits = Readout(build("llama")), Readout._logits

    def masked(self, normed, token_ids):
        return logits(self, normed, token_ids).index_fill(1, torch.tensor([4, 7]), -torch.inf)

    monkeypatch.setattr(Readout, "_logits", masked)
    hidden = torch.randn(2, WIDTH, generator=torch.Generator().manual_seed(0))
    _, kl = readout.compare(hidden, hidden.flip(0), torch.tensor([0, 1]))
    assert torch.isfinite(kl).all()
    assert (kl > 0).all()


@pytest.mark.parametrize("max_tokens", [0, 1])
def test_a_budget_of_no_tokens_runs_each_sequence_alone(max_tokens):
    late = LateStack.load(build("llama"), BOUNDARY)
    assert late.packs([3, 4, 5], max_tokens=max_tokens) == [range(0, 1), range(1, 2), range(2, 3)]

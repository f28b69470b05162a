"""Edits against slow twins: operations row by row, variants against hooks on a full forward of the late model."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import json
import tempfile
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from conftest import first_quick
from hypothesis import given, settings
from hypothesis import strategies as st
from twins import reference
from twins.edits import Change, Changes, Study, draw, hooked

from actcache.errors import InputError, UnsupportedModelError
from actcache.replay.edits import (
    PLAIN,
    Add,
    Call,
    Edit,
    Interpolate,
    MatchedNorm,
    Project,
    Replace,
    Rows,
    SignedPermutation,
    Variant,
)
from actcache.replay.late_stack import LateStack
from actcache.replay.moves import Moves

DTYPES = FLOAT32, BFLOAT16 = torch.float32, torch.bfloat16
ARCHS = pytest.mark.parametrize("arch", first_quick(tiny.ALL_ARCHS))
WIDTH = 24


# ---- operations ----


def rows_of(lengths, donors=None, keys=None, layer=None):
    """All positions of sequences of these lengths."""
    n_rows = sum(lengths)
    sequence = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    position = torch.tensor([position for length in lengths for position in range(length)])
    keys = keys or [f"event {number}" for number in range(len(lengths))]
    return Rows(sequence, position, torch.arange(n_rows), torch.tensor(lengths), keys, donors or {}, layer)


@pytest.fixture(params=[FLOAT32, BFLOAT16], ids=["float32", "bfloat16"])
def given_rows(request):
    """Rows, a donor's rows, and where they stand."""
    generator = torch.Generator().manual_seed(3)
    x, donor = (torch.randn(9, WIDTH, generator=generator).to(request.param) for _ in range(2))
    return x, donor, rows_of([4, 5], {"it": donor})


def orthonormal(k, seed=11):
    """``[k, WIDTH]``: the leading directions of random states, as a PCA gives them."""
    states = draw(50, WIDTH, seed=seed)
    return torch.linalg.svd(states - states.mean(0), full_matrices=False).Vh[:k].contiguous()


def exact(tensor):
    """As float64, which holds every float32 and bfloat16."""
    return tensor.double().numpy()


def close(found, expected, x):
    """Equal to what float64 gives, up to float32 sums and one rounding to the rows' dtype."""
    assert found.dtype == x.dtype
    assert found.shape == x.shape
    eps = {FLOAT32: 2e-6, BFLOAT16: 2.0**-8}[x.dtype]
    allowed = eps * np.abs(expected) + 4e-6
    assert (np.abs(exact(found) - expected) <= allowed).all()


def test_replace_is_the_donor_or_the_vector_bit_for_bit(given_rows):
    x, donor, at = given_rows
    assert torch.equal(Replace("it")(x, at), donor)
    some = at.chosen(torch.tensor([7, 0, 3]))
    assert torch.equal(Replace("it")(x[[7, 0, 3]], some), donor[[7, 0, 3]])
    vector = draw(WIDTH)
    for row in Replace(vector=vector)(x, at):
        assert torch.equal(row, vector.to(x.dtype))
    assert Replace(vector=torch.zeros(WIDTH))(x, at).count_nonzero() == 0


def test_add_is_a_float32_sum_rounded_once(given_rows):
    x, _, at = given_rows
    vector = draw(WIDTH)
    for scale in (1.0, -2.5, 0.0):
        found = Add(vector, scale)(x, at)
        sums = x.float().numpy() + np.float32(scale) * vector.numpy()
        assert torch.equal(found, torch.from_numpy(sums).to(x.dtype))
    assert torch.equal(Add(vector.to(BFLOAT16))(x, at), (x.float() + vector.to(BFLOAT16).float()).to(x.dtype))


def test_interpolate_lies_between_and_is_exact_at_its_ends(given_rows):
    x, donor, at = given_rows
    for weight in (0.25, 0.5, 0.9, -1.0, 1.75):
        found = Interpolate("it", weight)(x, at)
        close(found, (1 - weight) * exact(x) + weight * exact(donor), x)
    bits = {FLOAT32: torch.int32, BFLOAT16: torch.int16}[x.dtype]
    x[0, :4] = torch.tensor([0.0, -0.0, 3e38, -3e38])
    donor[0, :4] = torch.tensor([-1.0, 1.0, -3e38, 3e38])
    x[1, :2], donor[1, :2] = torch.tensor([2.0, -2.0]), torch.tensor([-0.0, 0.0])
    assert torch.equal(Interpolate("it", 0.0)(x, at).view(bits), x.view(bits))
    assert torch.equal(Interpolate("it", 1.0)(x, at).view(bits), donor.view(bits))


@pytest.mark.parametrize("k", [0, 1, 5, WIDTH])
@pytest.mark.parametrize("centred", [False, True], ids=["no mean", "mean"])
def test_project_keeps_removes_and_swaps_a_subspace(given_rows, k, centred):
    x, donor, at = given_rows
    basis, mean = orthonormal(k), draw(WIDTH, seed=5) if centred else None
    projector, centre = exact(basis).T @ exact(basis), exact(mean) if centred else 0.0
    inside = (exact(x) - centre) @ projector
    close(Project(basis, "keep", mean)(x, at), centre + inside, x)
    close(Project(basis, "remove", mean)(x, at), exact(x) - inside, x)
    swapped = exact(x) + (exact(donor) - exact(x)) @ projector
    close(Project(basis, "swap", mean, donor="it")(x, at), swapped, x)
    if k == WIDTH:
        close(Project(basis, "swap", donor="it")(x, at), exact(donor), x)


def test_signed_permutation_keeps_lengths_and_angles_and_is_one_for_all_rows(given_rows):
    x, donor, at = given_rows
    wide, other = x.float(), donor.float()
    at = dataclasses.replace(at, donors={"it": other})
    for seed in (0, 1):
        alone = SignedPermutation(seed)
        matrix = alone(torch.eye(WIDTH), rows_of([WIDTH]))  # row i is where basis vector i goes
        assert torch.equal(matrix.abs().sum(0), torch.ones(WIDTH))
        assert torch.equal(matrix.abs().sum(1), torch.ones(WIDTH))
        assert torch.equal(matrix.abs(), matrix.square())
        assert torch.equal(alone(x, rows_of([9])), x @ matrix.to(x.dtype))
        moved = SignedPermutation(seed, "it")(wide, at) - wide
        difference = other - wide
        torch.testing.assert_close(moved, difference @ matrix, atol=2e-6, rtol=0)
        torch.testing.assert_close(moved @ moved.T, difference @ difference.T, atol=1e-4, rtol=1e-5)
    assert not torch.equal(SignedPermutation(0)(x, at), SignedPermutation(1)(x, at))
    permuted = SignedPermutation(1, "it")(x, rows_of([4, 5], {"it": donor}))
    assert permuted.dtype == x.dtype


def test_a_signed_permutation_per_prompt_is_one_for_all_rows_of_a_prompt(given_rows):
    """By the matrices that it makes: of each prompt another, in every seed another, in any batch the same."""
    x, donor, _ = given_rows
    eyes = rows_of([WIDTH, WIDTH, WIDTH])
    at = dataclasses.replace(eyes, prompts=["a", "b", "a"])
    matrix_of = {}
    for seed in (0, 1):
        alone = SignedPermutation(seed, per="prompt")
        first, second, third = alone(torch.eye(WIDTH).repeat(3, 1), at).split(WIDTH)
        assert torch.equal(first.abs().sum(0), torch.ones(WIDTH))
        assert torch.equal(first.abs(), first.square())
        assert torch.equal(first, third)
        assert torch.equal(alone(torch.eye(WIDTH), dataclasses.replace(rows_of([WIDTH]), prompts=["b"])), second)
        matrix_of |= {(seed, "a"): first, (seed, "b"): second, (seed, None): SignedPermutation(seed)(first, eyes)}
    for one, other in itertools.combinations(matrix_of.values(), 2):
        assert not torch.equal(one, other)
    at = dataclasses.replace(rows_of([4, 5], {"it": donor.float()}), prompts=["b", "a"])
    moved = SignedPermutation(1, "it", "prompt")(x.float(), at) - x.float()
    difference = (donor.float() - x.float()).split([4, 5])
    expected = torch.cat([difference[0] @ matrix_of[1, "b"], difference[1] @ matrix_of[1, "a"]])
    torch.testing.assert_close(moved, expected, atol=2e-6, rtol=0)
    assert SignedPermutation(1, "it", "prompt")(x, dataclasses.replace(at, donors={"it": donor})).dtype == x.dtype


def test_matched_norm_is_as_long_as_what_it_stands_for(given_rows):
    x, donor, at = given_rows
    moved = MatchedNorm(4, "it")(x, at)
    assert moved.dtype == x.dtype
    rounding = {FLOAT32: 1e-5, BFLOAT16: 2e-2}[x.dtype]
    lengths = np.linalg.norm(exact(moved) - exact(x), axis=1)
    np.testing.assert_allclose(lengths, np.linalg.norm(exact(donor) - exact(x), axis=1), rtol=rounding)
    alone = MatchedNorm(4)(x, at)
    np.testing.assert_allclose(np.linalg.norm(exact(alone), axis=1), np.linalg.norm(exact(x), axis=1), rtol=rounding)


def test_matched_norm_points_everywhere_alike():
    at = rows_of([400])
    directions = MatchedNorm(0)(torch.ones(400, WIDTH), at) / WIDTH**0.5
    assert directions.mean(0).abs().max() < 4 / (400 * WIDTH) ** 0.5
    assert (directions @ directions.T - torch.eye(400)).abs().max() < 0.9


def test_matched_norm_depends_on_seed_event_position_and_layer_and_on_nothing_else():
    x = torch.ones(1, WIDTH)

    def one(seed=0, key="a", position=2, layer=None, source=0, length=9):
        where = (torch.tensor([0]), torch.tensor([position]), torch.tensor([source]), torch.tensor([length]))
        return MatchedNorm(seed)(x, Rows(*where, [key], {}, layer))

    same = one()
    assert torch.equal(one(source=5), same)
    assert torch.equal(one(length=3), same)
    changed = [one(seed=1), one(key="b"), one(position=3), one(layer=2), one(layer=3), one(key="a2", position=0)]
    for a, b in itertools.combinations([same, *changed], 2):
        assert (a - b).abs().max() > 0.01


@given(st.lists(st.integers(0, 11), min_size=1, max_size=20), st.sampled_from([16, 17, 5]))
@settings(max_examples=40, deadline=None)
def test_random_rows_do_not_depend_on_batch_or_order(chosen, width):
    lengths, donor = [4, 1, 7], draw(12, width, seed=1)
    x, at = draw(12, width, seed=2), rows_of(lengths, {"it": donor}, ["a", "b", "c"])
    index = torch.tensor(chosen)
    permutations = SignedPermutation(5, "it"), SignedPermutation(5, "it", "prompt")
    for operation in (MatchedNorm(5, "it"), MatchedNorm(5), *permutations):
        assert torch.equal(operation(x[index], at.chosen(index)), operation(x, at)[index])
    # The same events in another order, among others.
    at = rows_of([7, 4], {"it": torch.cat([donor[5:], donor[:4]])}, ["c", "a"])
    moved = MatchedNorm(5, "it")(torch.cat([x[5:], x[:4]]), at)
    whole = MatchedNorm(5, "it")(x, rows_of(lengths, {"it": donor}, ["a", "b", "c"]))
    torch.testing.assert_close(moved, torch.cat([whole[5:], whole[:4]]), rtol=1e-6, atol=1e-6)


def test_a_call_gets_rows_and_their_places(given_rows):
    x, _, at = given_rows
    seen = []

    def function(rows, where):
        seen.append(where)
        return rows.double() * 2

    doubled = Edit(Call(function, "double"), positions="all").apply(x, at)
    assert torch.equal(doubled, x * 2)
    assert doubled.dtype == x.dtype
    assert seen[0].position.tolist() == at.position.tolist()
    assert [seen[0].keys[i] for i in seen[0].sequence] == ["event 0"] * 4 + ["event 1"] * 5


@pytest.mark.parametrize(
    ("positions", "chosen"),
    [
        ("last", [3, 8]),
        ("all", list(range(9))),
        ((-1,), [3, 8]),
        ((0, 2), [0, 2, 4, 6]),
        ((-4, 1), [0, 1, 5]),
        ((3,), [3, 7]),
        ([0, -1], [0, 3, 4, 8]),
        ((0, 0, -4), [0, 4, 5]),
    ],
)
def test_positions_of_sequences_of_four_and_five(positions, chosen):
    at = rows_of([4, 5])
    edit = Edit(Add(torch.ones(3)), positions=positions)
    assert edit.where(at).nonzero().flatten().tolist() == chosen
    x = torch.zeros(9, 3)
    edited = edit.apply(x, at)
    assert edited.any(dim=1).nonzero().flatten().tolist() == chosen
    assert not x.any(), "the rows given were changed"


def test_edits_compose_in_their_order():
    x, at = draw(9, WIDTH), rows_of([4, 5])
    ones, half = Add(torch.ones(WIDTH)), Call(lambda rows, _: rows / 2, "half")
    inside = Edit(ones, "all", "mlp", (3,))
    first = Variant("v", (Edit(ones, "all"), inside, Edit(half, "all"))).edit_states(x, at)
    second = Variant("v", (Edit(half, "all"), Edit(ones, "all"), inside)).edit_states(x, at)
    assert torch.equal(first, (x + 1) / 2)
    assert torch.equal(second, x / 2 + 1)
    both = Variant("v", (inside, Edit(ones, "all", "attention", (1, 2))))
    assert [(layer, edit.site) for layer, edit in both.inside()] == [(3, "mlp"), (1, "attention"), (2, "attention")]
    assert torch.equal(PLAIN.edit_states(x, at), x)


# ---- what is refused ----


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Edit(Replace("it"), site="head"), "site 'head' is unknown; choose state, attention, mlp"),
        (lambda: Edit(Replace("it"), positions="first"), "positions 'first': expected 'last', 'all' or numbers"),
        (lambda: Edit(Replace("it"), positions=3), "positions 3: expected 'last', 'all' or numbers"),
        (lambda: Edit(Replace("it"), positions=(0.5,)), r"positions \(0.5,\): expected 'last', 'all' or numbers"),
        (lambda: Edit(Replace("it"), layers=(3,)), "an edit at site 'state' takes no layers"),
        (lambda: Edit(Add(torch.ones(2)), site="mlp"), "an edit at site 'mlp' needs layers"),
        (lambda: Replace(), "replace takes either a donor or a vector"),
        (lambda: Replace("it", torch.ones(2)), "replace takes either a donor or a vector"),
        (lambda: Project(torch.eye(3), "drop"), "how is 'drop'; choose keep, remove or swap"),
        (lambda: Project(torch.eye(3), "swap"), "a donor goes with how='swap'"),
        (lambda: Project(torch.eye(3), "keep", donor="it"), "a donor goes with how='swap', and only with it"),
        (lambda: Project(torch.ones(3)), r"the basis has shape \(3,\), expected \[k, D\]"),
        (lambda: Project(2 * torch.eye(3)), "not orthonormal"),
        (lambda: Project(torch.tensor([[1.0, 0.0], [0.6, 0.8]])), "not orthonormal"),
        (lambda: Project(torch.full((2, 2), torch.nan)), "the basis holds values that are not finite"),
        (lambda: SignedPermutation(1, per="event"), "per is 'event'; leave it out, or choose 'prompt'"),
        (lambda: Edit(Interpolate("it", 0.5), site="mlp", layers=(3,)), "inside the late stack names the donor 'it'"),
    ],
)
def test_an_edit_that_cannot_be_is_refused_where_it_is_written(make, words):
    with pytest.raises(InputError, match=words):
        make()


def test_what_does_not_fit_the_rows_is_refused(given_rows):
    x, _, at = given_rows
    for operation in (Add(torch.ones(3)), Replace(vector=torch.ones(3)), Project(torch.eye(3))):
        with pytest.raises(InputError, match=f"does not fit rows of width {WIDTH}"):
            operation(x, at)
    with pytest.raises(InputError, match="names the donor 'sft'; there are it"):
        Replace("sft")(x, at)
    with pytest.raises(InputError, match="names the donor 'sft'; there are none"):
        Interpolate("sft", 0.5)(x, rows_of([4, 5]))
    with pytest.raises(InputError, match="inside the late stack names the donor 'it'"):
        MatchedNorm(0, "it")(x, rows_of([4, 5], at.donors, layer=3))
    with pytest.raises(InputError, match=r"edit 'cut' made \(9, 2\) of rows \(9, 24\)"):
        Call(lambda rows, _: rows[:, :2], "cut")(x, at)
    for function, made in (
        (lambda rows, _: rows * 1j, "complex64"),
        (lambda rows, _: None, "NoneType"),
        (lambda rows, _: rows.numpy(), "ndarray"),
    ):
        words = rf"edit 'f' made {made} of rows \(9, 24\), expected a tensor of real numbers of their shape"
        with pytest.raises(InputError, match=words):
            Call(function, "f")(x.float(), at)


def test_a_digest_tells_everything_that_results_depend_on_and_nothing_else():
    vector, basis, mean = draw(6), torch.eye(6)[:2], torch.ones(6)
    edits = [
        Edit(Replace("it")),
        Edit(Replace("pt")),
        Edit(Replace(vector=vector)),
        Edit(Replace(vector=vector + 1)),
        Edit(Replace(vector=torch.cat([vector, vector]))),
        Edit(Replace(vector=vector), "all"),
        Edit(Replace(vector=vector), (0,)),
        Edit(Replace(vector=vector), (0, 1)),
        Edit(Replace(vector=vector), "last", "mlp", (3,)),
        Edit(Replace(vector=vector), "last", "attention", (3,)),
        Edit(Replace(vector=vector), "last", "mlp", (4,)),
        Edit(Replace(vector=vector), "last", "mlp", (3, 4)),
        *(Edit(Add(vector, scale)) for scale in (1.0, -1.0)),
        *(Edit(Interpolate("it", weight)) for weight in (0.5, 0.25)),
        Edit(Interpolate("pt", 0.5)),
        *(Edit(Project(basis, how)) for how in ("keep", "remove")),
        Edit(Project(basis, "keep", mean)),
        Edit(Project(basis, "swap", donor="it")),
        Edit(Project(torch.eye(6)[2:4], "keep")),
        *(Edit(SignedPermutation(seed, donor)) for seed in (0, 1) for donor in (None, "it")),
        *(Edit(SignedPermutation(seed, per="prompt")) for seed in (0, 1)),
        *(Edit(MatchedNorm(seed, donor)) for seed in (0, 1) for donor in (None, "it")),
        *(Edit(Call(lambda rows, _: rows, key)) for key in ("a", "b")),
    ]
    several = [(), *((edit,) for edit in edits), tuple(edits[:2]), tuple(edits[1::-1]), (edits[0], edits[0])]
    digests = [Variant("v", some).digest for some in several]
    assert len(set(digests)) == len(several)

    twins = [
        (Edit(Replace(vector=vector)), Edit(Replace(vector=torch.stack([vector, vector])[:, :].T[:, 1]))),
        (Edit(Add(vector)), Edit(Add(torch.nn.Parameter(vector.clone()), 1.0))),
        (Edit(Interpolate("it", 1)), Edit(Interpolate("it", 1.0))),
        (Edit(Add(vector, 2)), Edit(Add(vector, 2.0))),
        (Edit(Add(vector)), Edit(Add(vector), (-1,))),
        (Edit(Add(vector), (0, 1)), Edit(Add(vector), [0, 1])),
        (Edit(Call(lambda rows, _: rows, "a")), Edit(Call(lambda rows, _: rows, "a"))),
    ]
    for one, other in twins:
        assert Variant("v", (one,)).digest == Variant("of another name", [other]).digest
    assert Variant("none").digest == PLAIN.digest
    before = [["SignedPermutation", ["seed", 1], ["donor", "it"]], "last", "state", []]  # as earlier versions wrote it
    digest = hashlib.sha256(json.dumps([before]).encode()).hexdigest()
    assert Variant("v", (Edit(SignedPermutation(1, "it")),)).digest == digest


# ---- variants, against a full forward of the late model under hooks ----

BOUNDARY = 2  # blocks 2, 3 and 4 are late
LENGTHS = (7, 1, 12, 3, 15, 2)  # windows are 6 and 9 wide
SOME = (7, 1, 12, 2)
MIXED = (7, 4, 12, 15)


@functools.cache
def pair_of(arch, dtype):
    with tempfile.TemporaryDirectory() as folder:
        pt, it = tiny.make_pair(Path(folder), arch, dtype=dtype, eps=0.3)
        return reference.load(pt, dtype), reference.load(it, dtype)


@functools.cache
def study_of(arch, dtype, lengths=LENGTHS):
    pt, it = pair_of(arch, dtype)
    generator = torch.Generator().manual_seed(len(lengths))
    sequences = [torch.randint(2, tiny.VOCAB_SIZE, (length,), generator=generator).tolist() for length in lengths]
    states = [reference.states(pt, ids, BOUNDARY) for ids in sequences]
    donor = [reference.states(it, ids, BOUNDARY) for ids in sequences]
    return Study(it, sequences, states, donor)


@functools.cache
def late_of(arch, dtype):
    return LateStack.load(pair_of(arch, dtype)[1], BOUNDARY)


def some_changes(width):
    """Lists of changes: at p alone, at all positions, at the first and last; at every site; one and several."""
    c = Changes(width)
    return [
        [],
        [c.replace()],
        [c.add(1, 2.0)],
        [c.towards(0.5), c.add(2, -1.0)],
        [c.permuted(3)],
        [c.zero(site="mlp", layers=(2,))],
        [c.zero(site="attention", layers=(4,))],
        [c.add(4, site="mlp", layers=(3, 4)), c.negated(site="attention", layers=(3,))],
        [c.add(5), c.doubled(site="mlp", layers=(4,)), c.add(6, site="mlp", layers=(4,))],
        [c.replace("all")],
        [c.towards(0.25, "all"), c.add(7, positions=(0,))],
        [c.zero("all", site="attention", layers=(2, 4))],
        [c.zero("all", site="mlp", layers=(2, 3, 4))],
        [
            c.add(8, positions=(0, -1)),
            c.negated((0,), site="attention", layers=(3,)),
            c.doubled(site="mlp", layers=(2,)),
        ],
    ]


def more_changes(width):
    """As above, for sequences of at least four positions."""
    c = Changes(width)
    return [
        [c.add(1, positions=(1, -3))],
        [c.replace((2,)), c.zero((-2,), site="mlp", layers=(4,))],
        [c.replace(), c.zero((3, -4), site="attention", layers=(2, 3)), c.negated("all", site="mlp", layers=(3,))],
        [c.permuted(2, (0, 1, 2)), c.permuted(3), c.doubled((-2,), site="attention", layers=(4,))],
    ]


def variants_of(changes):
    return [Variant(f"v{number}", [one.edit for one in some]) for number, some in enumerate(changes)]


@functools.cache
def expected_of(arch, dtype, lengths, make):
    """``[n, n_variants, D]`` of the slow twin."""
    study = study_of(arch, dtype, lengths)
    changes = make(study.rows.shape[1])
    return torch.stack(
        [torch.stack([hooked(study, number, some) for some in changes]) for number in range(len(study.sequences))]
    )


# Each architecture has both dtypes and both lists of changes; of two architectures, one has a list in either dtype.
CASES = pytest.mark.parametrize(
    ("arch", "dtype", "lengths", "make"),
    [
        pytest.param(arch, dtype, lengths, make, marks=[pytest.mark.slow] if number else [], id=f"{arch}-{dtype}-{at}")
        for number, arch in enumerate(tiny.ALL_ARCHS)
        for at, (lengths, make) in enumerate([(SOME, some_changes), (MIXED, more_changes)])
        for dtype in [DTYPES[(number + at) % 2]]
    ],
)


@CASES
def test_strict_variants_are_bit_identical_to_a_hooked_forward(arch, dtype, lengths, make):
    study, late = study_of(arch, dtype, lengths), late_of(arch, dtype)
    variants = variants_of(make(late.width))
    found = late.run_variants(study.rows, study.offsets, variants, strict=True, **study.given)
    expected = expected_of(arch, dtype, lengths, make)
    assert torch.equal(found, expected)
    for a, b in itertools.combinations(range(len(variants)), 2):
        assert not torch.equal(expected[:, a], expected[:, b]), "two variants are one: their equality says little"


@pytest.mark.usefixtures("workers")
@CASES
def test_packed_variants_differ_by_rounding_only(arch, dtype, lengths, make):
    study, late = study_of(arch, dtype, lengths), late_of(arch, dtype)
    assert late.mode == "packed"
    expected = expected_of(arch, dtype, lengths, make)
    # One bfloat16 has 8 bits, and a rounding of an early block goes through every later one.
    allowed = 1e-4 if dtype == FLOAT32 else 0.1 * expected.float().abs().max().item()
    for max_tokens in (None, 9):
        found = late.run_variants(
            study.rows, study.offsets, variants_of(make(late.width)), max_tokens=max_tokens, **study.given
        )
        assert (found.float() - expected.float()).abs().max() <= allowed


@pytest.mark.slow
@ARCHS
def test_the_order_of_variants_changes_nothing_but_rounding(arch):
    study, late = study_of(arch, FLOAT32, SOME), late_of(arch, FLOAT32)
    variants = variants_of(some_changes(late.width))
    order = torch.randperm(len(variants), generator=torch.Generator().manual_seed(1))
    shuffled = [variants[index] for index in order]
    for strict in (True, False) if arch == "llama" else (False,):  # strict replays are one by one, whatever they are of
        straight = late.run_variants(study.rows, study.offsets, variants, strict=strict, max_tokens=20, **study.given)
        mixed = late.run_variants(study.rows, study.offsets, shuffled, strict=strict, max_tokens=20, **study.given)
        if strict:
            assert torch.equal(mixed, straight[:, order])
        else:
            torch.testing.assert_close(mixed, straight[:, order], rtol=0, atol=1e-4)


@pytest.mark.slow
@pytest.mark.usefixtures("workers")
@pytest.mark.parametrize("arch", ["llama", "gemma3", "gpt2"])
def test_hundreds_of_variants_in_small_packs(arch):
    study, late = study_of(arch, FLOAT32), late_of(arch, FLOAT32)
    c = Changes(late.width)
    changes = [
        [
            [c.add(seed)],
            [c.towards(seed / 200)],
            [c.add(seed, site="attention", layers=(2 + seed % 3,)), c.permuted(seed)],
        ][seed % 3]
        for seed in range(200)
    ]
    variants = variants_of(changes)
    found = late.run_variants(study.rows, study.offsets, variants, max_tokens=64, **study.given)
    for index in range(0, 200, 37):
        for number in range(len(study.sequences)):
            expected = hooked(study, number, changes[index])
            torch.testing.assert_close(found[number, index], expected, rtol=0, atol=1e-4)


@pytest.mark.usefixtures("workers")
def test_random_edits_are_the_same_in_every_mode_and_pack():
    """A draw is a function of the event and the place: strict and packed, together and one by one, any neighbours."""
    study, late = study_of("llama", FLOAT32), late_of("llama", FLOAT32)
    variants = [
        Variant("matched", [Edit(MatchedNorm(1, "it"))]),
        Variant("matched everywhere", [Edit(MatchedNorm(2, "it"), "all")]),
        Variant(
            "inside", [Edit(MatchedNorm(1), "all", "mlp", (2, 3)), Edit(MatchedNorm(1), site="attention", layers=(4,))]
        ),
        Variant("projected", [Edit(Project(torch.eye(late.width)[:5], "swap", donor="it"))]),
    ]
    strict = late.run_variants(study.rows, study.offsets, variants, strict=True, **study.given)
    packed = late.run_variants(study.rows, study.offsets, variants, **study.given)
    torch.testing.assert_close(packed, strict, rtol=0, atol=1e-4)
    for number, (state, donor) in enumerate(zip(study.states, study.donor, strict=True)):
        alone = late.run_variants(
            state, [0, len(state)], variants, donors={"it": donor}, keys=[f"event {number}"], strict=True
        )
        torch.testing.assert_close(alone[0], strict[number], rtol=0, atol=1e-5)
    other = late.run_variants(study.rows, study.offsets, variants, donors=study.given["donors"])
    assert (other[:, :3] - packed[:, :3]).abs().amax(dim=(0, 2)).min() > 1e-3, "keys name the draws"


@pytest.mark.usefixtures("workers")
@pytest.mark.parametrize("positions", ["all", "last", (0, -1)])
def test_one_permutation_per_prompt_in_any_pack_order_and_subset(positions):
    study, late = study_of("llama", FLOAT32), late_of("llama", FLOAT32)
    prompts = ["p", "q", "p", "r", "s", "q"]
    edit = Edit(SignedPermutation(3, "it", "prompt"), positions)
    of = [[Changes(late.width).permuted(3, positions, prompt)] for prompt in prompts]
    expected = torch.stack([hooked(study, number, changes) for number, changes in enumerate(of)])
    for chosen in (range(6), [4, 0, 2], [5, 4, 3, 2, 1, 0], [1]):
        rows, donor = (torch.cat([of_study[i] for i in chosen]) for of_study in (study.states, study.donor))
        given = rows, [0, *itertools.accumulate(LENGTHS[i] for i in chosen)], [Variant("v", [edit]), PLAIN]
        more = {"donors": {"it": donor}, "prompts": [prompts[i] for i in chosen]}
        assert torch.equal(late.run_variants(*given, strict=True, **more)[:, 0], expected[list(chosen)])
        for max_tokens in (None, 9):
            found = late.run_variants(*given, max_tokens=max_tokens, **more)[:, 0]
            torch.testing.assert_close(found, expected[list(chosen)], rtol=0, atol=1e-4)
    unnamed = late.run_variants(study.rows, study.offsets, [Variant("v", [edit])], donors=study.given["donors"])
    numbered = [hooked(study, i, [Changes(late.width).permuted(3, positions, str(i))]) for i in range(6)]
    torch.testing.assert_close(unnamed[:, 0], torch.stack(numbered), rtol=0, atol=1e-4)


def test_prompts_that_do_not_fit_the_events_are_refused():
    study, late = study_of("llama", FLOAT32), late_of("llama", FLOAT32)
    with pytest.raises(InputError, match="2 prompts are given for 6 sequences"):
        late.run_variants(study.rows, study.offsets, [PLAIN], prompts=["a", "b"])
    positions = [(2, 3), (0, 1), (2, 4)]
    with pytest.raises(InputError, match="sequence 2 has events of the prompts 'a' and 'b'; a sequence is of one"):
        late.run_variants(study.rows, study.offsets, [PLAIN], positions=positions, prompts=["a", "a", "b"])


@pytest.mark.usefixtures("workers")
@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("positions", ["last", "all"])
def test_an_edit_is_told_where_its_rows_stand(positions, strict):
    study, late = study_of("llama", FLOAT32), late_of("llama", FLOAT32)
    seen = {site: set() for site in ("state", "attention", "mlp")}

    def note(site, rows, at):
        places = zip(at.sequence.tolist(), at.position.tolist(), at.source.tolist(), strict=True)
        seen[site] |= {(at.layer, at.keys[sequence], position, source) for sequence, position, source in places}
        return rows

    variants = [
        Variant(site, [Edit(Call(functools.partial(note, site), site), positions, site, layers)], placebo=True)
        for site, layers in (("state", ()), ("attention", (2, 4)), ("mlp", (3, 4)))
    ]
    plain = late.run(study.rows, study.offsets, strict=strict)
    found = late.run_variants(study.rows, study.offsets, variants, strict=strict, max_tokens=20, **study.given)
    for number in range(len(variants)):
        torch.testing.assert_close(found[:, number], plain, rtol=0, atol=0 if strict else 1e-4)
    for site, layers in (("state", (None,)), ("attention", (2, 4)), ("mlp", (3, 4))):
        everywhere = {
            (layer, f"event {number}", position, study.offsets[number] + position)
            for layer in layers
            for number, length in enumerate(LENGTHS)
            for position in range(length)
            if positions == "all" or position == length - 1
        }
        # The last block runs on for position p alone, unless one sequence fills the forward.
        needed = {place for place in everywhere if place[0] != 4 or place[2] == LENGTHS[int(place[1][-1])] - 1}
        assert needed <= seen[site] <= everywhere


# ---- how it is replayed ----


@pytest.mark.slow
@given(
    st.lists(st.integers(1, 9), min_size=1, max_size=7),
    st.lists(st.sampled_from(["last", "all", "site", "none"]), max_size=12),
    st.integers(1, 40),
    st.booleans(),
)
@settings(max_examples=30, deadline=None)
def test_chunks_are_bounded_and_every_pair_comes_once(lengths, kinds, max_tokens, strict):
    late = late_of("llama", FLOAT32)
    rows, offsets = draw(sum(lengths), late.width), [0, *itertools.accumulate(lengths)]
    vector = torch.ones(late.width)
    edits = {
        "last": [Edit(Add(vector))],
        "all": [Edit(Add(vector), "all")],
        "site": [Edit(Add(vector), site="mlp", layers=(3,))],
        "none": [],
    }
    variants = [Variant(f"{number}", edits[kind]) for number, kind in enumerate(kinds)]
    pairs = []
    batch = late.prepare(rows, offsets, variants, max_tokens=max_tokens, strict=strict)
    for sequences, numbers, hidden in late.replay(batch):
        assert len(sequences) == len(numbers) == len(hidden)
        assert len(hidden) <= max(max_tokens, len(set(sequences.tolist())))
        pairs += zip(sequences.tolist(), numbers.tolist(), strict=True)
    assert sorted(pairs) == list(itertools.product(range(len(lengths)), range(len(variants))))
    assert late.run_variants(rows, offsets, variants, max_tokens=max_tokens).shape == (
        *(len(lengths), len(variants)),
        late.width,
    )


@pytest.fixture
def counted():
    """``counted(late_model)``: a list of calls so far, (block or part, tokens), and the model's own late stack."""
    handles = []

    def watch(model):
        late, calls = LateStack.load(model, BOUNDARY), []  # its probes run before the count
        for index, block in enumerate(reference.parts(model).blocks):
            for name, module in ((index, block), ((index, "mlp"), block.mlp)):

                def keep(_, args, kwargs, name=name):
                    state = args[0] if args else kwargs["hidden_states"]
                    calls.append((name, state.shape[:-1].numel()))

                handles.append(module.register_forward_pre_hook(keep, with_kwargs=True))
        return late, calls

    yield watch
    for handle in handles:
        handle.remove()


def tokens_of(calls, name):
    return sum(n_tokens for called, n_tokens in calls if called == name)


@pytest.mark.parametrize("arch", ["llama", "gpt2", "gemma2"])
def test_variants_of_the_last_position_cost_one_token_each(counted, arch):
    study = study_of(arch, FLOAT32)
    late, calls = counted(study.late)
    n, n_tokens, k = len(study.sequences), len(study.rows), 50
    variants = [Variant(f"{seed}", [Changes(late.width).add(seed).edit]) for seed in range(k)]
    late.run_variants(study.rows, study.offsets, variants, max_tokens=128)
    for block in range(BOUNDARY, tiny.N_BLOCKS):
        assert tokens_of(calls, block) == n_tokens + k * n
    assert tokens_of(calls, (tiny.N_BLOCKS - 1, "mlp")) == k * n
    assert {name for name, _ in calls if isinstance(name, int)} == set(range(BOUNDARY, tiny.N_BLOCKS))


@pytest.mark.parametrize("arch", ["llama", "gpt2", "gemma2"])
def test_a_plain_replay_runs_the_last_blocks_mlp_at_p_alone(counted, arch):
    study = study_of(arch, FLOAT32)
    late, calls = counted(study.late)
    n, n_tokens, last = len(study.sequences), len(study.rows), tiny.N_BLOCKS - 1
    late.run(study.rows, study.offsets)
    assert tokens_of(calls, (last, "mlp")) == n
    assert tokens_of(calls, (last - 1, "mlp")) == n_tokens
    assert tokens_of(calls, last) == n_tokens + n
    assert all(tokens_of(calls, block) == 0 for block in range(BOUNDARY))
    calls.clear()
    everywhere = Variant("everywhere", [Changes(late.width).replace("all").edit])
    late.run_variants(study.rows, study.offsets, [everywhere] * 3, **study.given)
    assert tokens_of(calls, (last, "mlp")) == 3 * n
    assert tokens_of(calls, BOUNDARY) == 3 * n_tokens


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (Edit(Call(lambda rows, _: rows, "x"), site="mlp", layers=(1,)), "variant 'v' edits layer 1; .* blocks 2..4"),
        (Edit(Call(lambda rows, _: rows, "x"), site="mlp", layers=(4, 5)), "variant 'v' edits layer 5; .* blocks 2..4"),
        (Edit(Call(lambda rows, _: rows, "x"), (0, 1)), "variant 'v' edits position 1; the shortest sequence has 1"),
        (Edit(Call(lambda rows, _: rows, "x"), (-2,)), "variant 'v' edits position -2; the shortest sequence has 1"),
        (Edit(Replace("sft")), "names the donor 'sft'; there are it"),
        (Edit(Call(lambda rows, _: rows[:, 1:], "cut"), "all", "mlp", (4,)), r"edit 'cut' made \(\d+, 31\)"),
        (Edit(Add(torch.ones(5))), "does not fit rows of width 32"),
    ],
)
@pytest.mark.parametrize("strict", [True, False])
def test_a_variant_that_does_not_fit_is_refused(edit, words, strict):
    study, late = study_of("llama", FLOAT32), late_of("llama", FLOAT32)
    before = late.run(study.rows, study.offsets, strict=strict)
    with pytest.raises(InputError, match=words):
        late.run_variants(study.rows, study.offsets, [PLAIN, Variant("v", [edit])], strict=strict, **study.given)
    assert torch.equal(late.run(study.rows, study.offsets, strict=strict), before), "a hook was left behind"


def test_donors_and_keys_that_do_not_fit_the_rows_are_refused():
    study, late = study_of("llama", FLOAT32), late_of("llama", FLOAT32)
    rows, offsets = study.rows, study.offsets
    for donor, words in (
        (rows[1:], r"donor 'it' has shape \(39, 32\)"),
        (rows.to(BFLOAT16), "donor 'it' is torch.bfl"),
    ):
        with pytest.raises(InputError, match=words):
            late.run_variants(rows, offsets, [PLAIN], donors={"it": donor})
    with pytest.raises(InputError, match="2 keys are given for 6 sequences"):
        late.run_variants(rows, offsets, [PLAIN], keys=["a", "b"])


def test_a_site_that_the_architecture_does_not_have_is_refused():
    _, it = pair_of("llama", FLOAT32)
    study, late = study_of("llama", FLOAT32), LateStack.load(it, 3)
    block = reference.parts(it).blocks[4]
    mlp = block._modules.pop("mlp")
    try:
        edit = Edit(Add(torch.ones(late.width)), site="mlp", layers=(4,))
        with pytest.raises(UnsupportedModelError, match="LlamaDecoderLayer has no submodule that is its mlp"):
            late.run_variants(study.rows, study.offsets, [Variant("v", [edit])])
    finally:
        block._modules["mlp"] = mlp


@pytest.mark.usefixtures("workers")
def test_no_variants_and_no_sequences_give_nothing():
    late = late_of("llama", FLOAT32)
    assert late.run_variants(torch.zeros(0, late.width), [0], [PLAIN]).shape == (0, 1, late.width)
    assert late.run_variants(torch.zeros(3, late.width), [0, 3], []).shape == (1, 0, late.width)


# ---- a vector for each event ----

IDS = [f"event {number}" for number in range(len(LENGTHS))]


def of_events(width, ids=IDS, seed=30):
    """Event id -> vector."""
    return {event: draw(width, seed=seed + int(event.split()[1])) for event in ids}


def per_event_variants(width):
    """At p, everywhere and within, alone and beside others: what is added must be each event's own."""
    vectors = of_events(width)
    table, ids = torch.stack(list(vectors.values())[::-1]).numpy(), IDS[::-1]
    return [
        Variant("at p", [Edit(Add(vectors, per="event"))]),
        Variant("of a table", [Edit(Add(table, 1.0, per="event", events=ids))]),
        Variant("everywhere", [Edit(Add(vectors, per="event"), "all")]),
        Variant("within", [Edit(Add(vectors, per="event"), "last", "mlp", (3,)), Edit(Add(torch.ones(width)))]),
        Variant("within everywhere", [Edit(Replace(vector=vectors, per="event"), "all", "attention", (2, 3))]),
        Variant("twice as much", [Edit(Add(vectors, 2.0, per="event"), (0, -1))]),
    ]


def changes_of(width, number):
    """The same for one event, by vectors of its own that are the same everywhere."""
    c, vector = Changes(width), of_events(width)[IDS[number]]
    put = Change(Edit(Replace(vector=vector), "all", "attention", (2, 3)), lambda x, _: vector.to(x.dtype), "all")
    return [
        [c.add_vector(vector)],
        [c.add_vector(vector)],
        [c.add_vector(vector, positions="all")],
        [c.add_vector(vector, site="mlp", layers=(3,)), c.add_vector(torch.ones(width))],
        [put],
        [c.add_vector(vector, 2.0, (0, -1))],
    ]


@functools.cache
def expected_of_events(arch):
    """``[n, n_variants, D]`` of the slow twin."""
    study = study_of(arch, FLOAT32)
    changes = [changes_of(study.rows.shape[1], number) for number in range(len(IDS))]
    return torch.stack([torch.stack([hooked(study, number, some) for some in of]) for number, of in enumerate(changes)])


@pytest.mark.slow
@pytest.mark.usefixtures("workers")
@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_each_event_has_its_own_vector_in_any_pack_order_and_subset(arch):
    study, late = study_of(arch, FLOAT32), late_of(arch, FLOAT32)
    variants = per_event_variants(late.width)
    expected = expected_of_events(arch)
    assert (expected[:, 0] - expected[:, 2]).abs().max() > 1e-2
    for chosen in (range(len(IDS)), [4, 0, 2], [5, 4, 3, 2, 1, 0], [1]):
        states = [study.states[number] for number in chosen]
        given = torch.cat(states), [0, *itertools.accumulate(len(state) for state in states)], variants
        keys = [IDS[number] for number in chosen]
        assert torch.equal(late.run_variants(*given, keys=keys, strict=True), expected[list(chosen)])
        for max_tokens in (None, 9):
            found = late.run_variants(*given, keys=keys, max_tokens=max_tokens)
            torch.testing.assert_close(found, expected[list(chosen)], rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("vectors", "keys", "words"),
    [
        (of_events(32, IDS[:-1]), IDS, "variant 'v' has no vector for event 'event 5'; it has 5"),
        (of_events(32), None, "variant 'v' has no vector for event '0'"),
        (of_events(31), IDS, r"variant 'v': a tensor of shape \(6, 31\) does not fit rows of width 32"),
        (
            {event: np.full(32, 1e39) for event in IDS},
            IDS,
            "variant 'v': a vector has values that torch.float32 does not hold",
        ),
    ],
)
@pytest.mark.parametrize("strict", [True, False])
def test_an_event_without_its_vector_is_named_before_anything_runs(vectors, keys, words, strict):
    study, late = study_of("llama", FLOAT32), late_of("llama", FLOAT32)
    seen = []
    first = Variant("seen", [Edit(Call(lambda rows, _: seen.append(1) or rows + 1, "seen"))])
    variants = [first, Variant("v", [Edit(Add(vectors, per="event"), site="mlp", layers=(4,))])]
    with pytest.raises(InputError, match=words):
        late.run_variants(study.rows, study.offsets, variants, keys=keys, strict=strict)
    assert not seen


# ---- edits that move nothing ----


def moved_nothing(width, donor="it"):
    """Edits that leave some sequence as it is: mistakes with what is said of them, others with which sequences."""
    same = Edit(Call(lambda rows, _: rows.clone(), "same"), "all")
    zeros, ones = torch.zeros(width), torch.ones(width)
    own_zero = {event: zeros if event == IDS[2] else ones for event in IDS}
    mistakes = [
        ([Edit(Add(zeros))], "Add of the state moves nothing at 'event"),
        ([Edit(Add(zeros), "all", "mlp", (3,))], "Add of the mlp of block 3 moves nothing"),
        ([Edit(Add(zeros), site="attention", layers=(4,))], "Add of the attention of block 4 moves nothing"),
        ([Edit(Add(ones, 1e-30))], "Add of the state moves nothing"),
        ([Edit(Add(ones)), Edit(Add(zeros), (0,))], "Add of the state moves nothing"),
        ([Edit(Add(own_zero, per="event"))], "Add of the state moves nothing at 'event 2'"),
        ([same], "Call of the state moves nothing at 'event"),
        ([Edit(Project(torch.eye(width)))], "Project of the state moves nothing"),
        ([Edit(Project(torch.eye(width)[:0], "remove"))], "Project of the state moves nothing"),
    ]
    counted = [
        ([Edit(Add(ones, 0.0))], range(6)),
        ([Edit(Interpolate(donor, 0.0), "all")], range(6)),
        ([Edit(Replace(donor), "all")], [1]),
        ([Edit(Interpolate(donor, 0.5), "all")], [1]),
        ([Edit(Project(torch.eye(width)[:3], "swap", donor=donor), "all")], [1]),
        ([Edit(MatchedNorm(1, donor))], [1]),
        ([Edit(SignedPermutation(1, donor))], [1]),
        ([Edit(Replace(donor)), Edit(Add(ones))], []),
        ([Edit(Add(ones, 0.0)), Edit(Replace(donor))], [1]),
        ([Edit(Replace(vector=ones), site="mlp", layers=(3,))], []),
    ]
    return mistakes, counted


@pytest.mark.usefixtures("workers")
@pytest.mark.parametrize("strict", [True, False])
def test_an_edit_that_moves_nothing_is_named_or_counted(strict):
    study, late = study_of("llama", FLOAT32), late_of("llama", FLOAT32)
    donor = [
        state.clone() if number == 1 else other
        for number, (state, other) in enumerate(zip(study.states, study.donor, strict=True))
    ]
    given = {"donors": {"it": torch.cat(donor)}, "keys": IDS, "strict": strict, "max_tokens": 20}
    mistakes, counted = moved_nothing(late.width)
    for edits, words in mistakes:
        for others in ([], [PLAIN, Variant("w", [Edit(Add(torch.ones(late.width)))])]):  # alone, and sharing keys
            with pytest.raises(InputError, match=f"variant 'v': its edit {words}"):
                late.run_variants(study.rows, study.offsets, [*others, Variant("v", edits)], **given)
    placebos = [Variant(f"p{number}", edits, placebo=True) for number, (edits, _) in enumerate(mistakes)]
    variants = [*(Variant(f"v{number}", edits) for number, (edits, _) in enumerate(counted)), *placebos]
    moves = Moves()
    late.run_variants(study.rows, study.offsets, variants, moves=moves, **given)
    for number, (_, still) in enumerate(counted):
        assert moves.still(number).nonzero().flatten().tolist() == list(still)
    expected = [range(6)] * 4 + [[]] + [[2]] + [range(6)] * 3
    for number, still in enumerate(expected, len(counted)):
        assert moves.still(number).nonzero().flatten().tolist() == list(still)
    assert moves.still(8, after=1).nonzero().flatten().tolist() == [1]
    assert moves.still(7, after=1).nonzero().flatten().tolist() == []


# ---- blocks counted as boundaries are ----


@pytest.mark.parametrize(
    ("layers", "blocks"),
    [
        ((-1,), (4,)),
        ((-3, 3), (2, 3)),
        ((0.6,), (3,)),
        ((0.8, 4), (4,)),
        (("2..-1",), (2, 3, 4)),
        (("0.6..0.8",), (3, 4)),
        (("-2..-1", 2), (3, 4, 2)),
        (range(2, 4), (2, 3)),
        ([3, 3], (3,)),
    ],
)
def test_layers_are_counted_from_either_end_and_by_depth(layers, blocks):
    study, late = study_of("llama", FLOAT32), late_of("llama", FLOAT32)
    one, other = (Variant("v", [Edit(Add(torch.ones(late.width)), "all", "mlp", given)]) for given in (layers, blocks))
    assert one.of_depth(tiny.N_BLOCKS).digest == other.digest
    assert other.of_depth(tiny.N_BLOCKS) is other
    found = late.run_variants(study.rows, study.offsets, [one, other], strict=True)
    assert torch.equal(found[:, 0], found[:, 1])


@pytest.mark.parametrize(
    ("layers", "words"),
    [
        ((5,), "variant 'v' edits layer 5; the late stack has blocks 2..4"),
        ((-4,), "edits layer -4, which is 1; the late stack has blocks 2..4"),
        ((-6,), "edits layer -6, which is -1; the late"),
        ((0.2,), "edits layer 0.2, which is 1; the late"),
        ((1.0,), "edits layer 1.0, which is 5; the late"),
        (("1..-1",), r"edits layer 1..-1, which is 1..4; the late"),
        (("-1..2",), r"edits layer -1..2, which is 4..2; the late"),
        (("2..999999999",), "edits layer 2..999999999; the late|which is 2..999999999; the late"),
    ],
)
def test_layers_that_the_late_stack_does_not_have_are_named(layers, words):
    study, late = study_of("llama", FLOAT32), late_of("llama", FLOAT32)
    variant = Variant("v", [Edit(Add(torch.ones(late.width)), site="mlp", layers=layers)])
    with pytest.raises(InputError, match=words):
        late.run_variants(study.rows, study.offsets, [variant])


@pytest.mark.parametrize(
    "layers", [3, "3", None, (True,), (None,), ("three",), ("2..",), (1.5,), (-0.5,), (2 + 0j,), ([3],)]
)
def test_layers_that_are_no_blocks_are_refused_where_they_are_written(layers):
    with pytest.raises(InputError, match=r"layer.*: expected a"):
        Edit(Add(torch.ones(2)), site="mlp", layers=layers)


# ---- how far back ----


def test_which_positions_a_variant_leaves_alone():
    """Of sequences of 1, 3 and 6 positions: the first that it may change; and how many of the last, of any sequence."""
    lengths, add = torch.tensor([1, 3, 6]), Add(torch.ones(4))
    for edits, first, tail in [
        ([], [0, 2, 5], 1),
        ([Edit(add)], [0, 2, 5], 1),
        ([Edit(add, (-1,)), Edit(add, (-1, -3))], [0, 0, 3], 3),
        ([Edit(add, (-2,), "mlp", (3,)), Edit(add)], [0, 1, 4], 2),
        ([Edit(add, (2,))], [0, 2, 2], None),
        ([Edit(add, (2, -1)), Edit(add, (-5,))], [0, 2, 1], None),
        ([Edit(add, "all")], [0, 0, 0], None),
    ]:
        variant = Variant("x", tuple(edits))
        assert (variant.first(lengths).tolist(), variant.tail) == (first, tail), edits

"""Features that are moved while late blocks run, and gradients at MLPs: against loops, hooks and differences."""

from __future__ import annotations

import pickle

import pytest
import torch
from conftest import first_quick
from tiny import ALL_ARCHS, make_pair
from twins import reference

from actcache.analyses.features.crosscoder import Crosscoder
from actcache.errors import InputError
from actcache.models.blocks import find_site
from actcache.models.checkpoint import Checkpoint
from actcache.replay.edits import Edit, Rows, Variant
from actcache.replay.features import MoveFeatures
from actcache.replay.late_stack import LateStack
from actcache.replay.streamed_late import StreamedLate
from actcache.replay.vectors import EventVectors

D, F = 12, 5


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def crosscoder():
    parts = {"encoder": drawn(2, D, F), "b_enc": 0.1 * drawn(F, seed=1), "decoder": drawn(F, 2, D, seed=2)}
    return Crosscoder(("pt", "it"), 3, **parts, b_dec=drawn(2, D, seed=3), mean=drawn(2, D, seed=4), threshold=4.0, k=2)


def operation(crosscoder, features=range(F), branch=1, **how):
    at = torch.tensor(list(features))
    return MoveFeatures(
        encoder=crosscoder.encoder[branch][:, at].T,
        decoder=crosscoder.decoder[at, branch],
        mean=crosscoder.mean[branch],
        bias=tuple(crosscoder.b_enc[at].tolist()),
        scale=tuple(crosscoder.scale[at].tolist()),
        threshold=crosscoder.threshold,
        **how,
    )


def places(n):
    at = torch.arange(n)
    return Rows(at, torch.full((n,), 4), at, torch.full((n,), 5), [f"e{i}" for i in range(n)], layer=3)


def of_events(rows):
    return EventVectors(rows, tuple(f"e{i}" for i in range(len(rows))))


def test_removed_features_are_those_of_the_branch_by_the_joint_threshold(crosscoder):
    rows = drawn(40, D, seed=5)
    active = crosscoder.encode_branch("it", rows)
    assert 0 < (active > 0).float().mean() < 1
    some = [1, 3]
    expected = rows - active[:, some] @ crosscoder.decoder[some, 1]
    torch.testing.assert_close(operation(crosscoder, some)(rows, places(40)), expected)
    twice = operation(crosscoder, some, amount=2.0)(rows, places(40))
    torch.testing.assert_close(twice, rows - 2 * active[:, some] @ crosscoder.decoder[some, 1])
    idle = (active[:, some] == 0).all(dim=1)
    assert idle.any()
    assert torch.equal(operation(crosscoder, some)(rows, places(40))[idle], rows[idle])
    assert operation(crosscoder, some)(rows.bfloat16(), places(40)).dtype == torch.bfloat16


def test_features_are_moved_onto_those_of_a_target(crosscoder):
    rows, target = drawn(40, D, seed=5), drawn(40, D, seed=6)
    step = (crosscoder.encode_branch("it", target) - crosscoder.encode_branch("it", rows)) @ crosscoder.decoder[:, 1]
    for amount in (0.0, 0.5, 1.0):
        found = operation(crosscoder, amount=amount, target=of_events(target))(rows, places(40))
        torch.testing.assert_close(found, rows + amount * step)
    same = operation(crosscoder, target=of_events(rows))(rows, places(40))
    assert torch.equal(same, rows)


def test_a_joint_encoding_reads_the_other_branch_per_event(crosscoder):
    rows, other = drawn(40, D, seed=5), drawn(40, D, seed=7)
    more = {"other_encoder": crosscoder.encoder[0].T, "other_mean": crosscoder.mean[0], "other": of_events(other)}
    active = crosscoder.encode(torch.stack([other, rows], dim=1))
    assert (active > 0).any()
    expected = rows - active @ crosscoder.decoder[:, 1]
    torch.testing.assert_close(operation(crosscoder, **more)(rows, places(40)), expected)
    targets = drawn(40, D, seed=8), drawn(40, D, seed=9)
    then = crosscoder.encode(torch.stack([targets[1], targets[0]], dim=1))
    moved = operation(crosscoder, **more, target=of_events(targets[0]), target_other=of_events(targets[1]))
    torch.testing.assert_close(moved(rows, places(40)), rows + (then - active) @ crosscoder.decoder[:, 1])
    assert operation(crosscoder, **more).depends_on_event


@pytest.mark.parametrize("instead", ["random", "orthogonal"])
def test_random_directions_go_as_far(crosscoder, instead):
    rows = drawn(40, D, seed=5)
    step = operation(crosscoder)(rows, places(40)) - rows
    found = operation(crosscoder, instead=instead, seed=1)(rows, places(40)) - rows
    torch.testing.assert_close(found.norm(dim=1), step.norm(dim=1), rtol=1e-4, atol=1e-5)
    one = operation(crosscoder, instead=instead, seed=1)(rows[7:8], places(40).chosen(torch.tensor([7]))) - rows[7:8]
    torch.testing.assert_close(one, found[7:8])  # whatever else is in the batch
    inside = (found @ torch.linalg.pinv(crosscoder.decoder[:, 1]) @ crosscoder.decoder[:, 1]).norm(dim=1)
    if instead == "orthogonal":
        assert inside.max() < 1e-4 * step.norm(dim=1).max()
    else:
        assert inside.max() > 0.1 * step.norm(dim=1).max()
    assert not torch.equal(found, operation(crosscoder, instead=instead, seed=2)(rows, places(40)) - rows)


def test_no_direction_is_orthogonal_to_a_whole_space(crosscoder):
    rows = drawn(3, D, seed=5)
    parts = {"encoder": drawn(D, D), "decoder": drawn(D, D, seed=2), "mean": torch.zeros(D), "threshold": 0.0}
    numbers = {"bias": (0.0,) * D, "scale": (1.0,) * D}
    assert torch.equal(MoveFeatures(**parts, **numbers, instead="orthogonal")(rows, places(3)), rows)


def test_what_it_does_is_in_its_digest_and_it_can_be_sent(crosscoder):
    def digest(one):
        return Variant("v", (Edit(one, site="mlp", layers=(3,)),)).digest

    target = of_events(drawn(4, D))
    every = [
        operation(crosscoder),
        operation(crosscoder, [0]),
        operation(crosscoder, amount=0.5),
        operation(crosscoder, target=target),
        operation(crosscoder, instead="random"),
        operation(crosscoder, instead="random", seed=1),
        operation(crosscoder, branch=0),
    ]
    assert len({digest(one) for one in every}) == len(every)
    for one in every:
        assert digest(pickle.loads(pickle.dumps(one))) == digest(one)


def test_what_does_not_fit_is_refused(crosscoder):
    with pytest.raises(InputError, match=r"of \[4, 5\] features"):
        MoveFeatures(drawn(5, D), drawn(4, D), drawn(D), (0.0,) * 5, (1.0,) * 5, 0.0)
    with pytest.raises(InputError, match="another branch needs"):
        operation(crosscoder, other=of_events(drawn(4, D)))
    with pytest.raises(InputError, match="choose random or orthogonal"):
        operation(crosscoder, instead="sideways")


IDS = [torch.randint(3, 60, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in (9, 14)]
TOKENS = torch.tensor([[5, 40], [7, 11], [40, 5]])
LAYERS, BOUNDARY = (3, 4), 2


@pytest.mark.parametrize("arch", first_quick(ALL_ARCHS))
def test_gradients_equal_finite_differences(arch, tmp_path):
    _, it = make_pair(tmp_path, arch)
    late = LateStack.load(it, BOUNDARY)
    small, model = reference.load(it, torch.float32), reference.load(it, torch.float64)
    rows = torch.cat([reference.states(small, ids, BOUNDARY) for ids in IDS])
    positions = [(0, 8), (1, 13), (1, 6)]
    weights = [late.blocks[0].state_dict()[name].clone() for name in list(late.blocks[0].state_dict())[:1]]
    found = late.gradients(rows, [0, 9, 23], TOKENS, LAYERS, positions=positions)
    assert found.outputs.shape == found.gradients.shape == (3, 2, late.width)
    for event, (sequence, position) in enumerate(positions):
        ids, (y_pt, y_it) = IDS[sequence][: position + 1], TOKENS[event].tolist()
        for number, layer in enumerate(LAYERS):
            direction = drawn(late.width, seed=event + 10 * layer).double()
            direction /= direction.norm()
            seen, margins = [], []
            for step in (0.0, 1e-2, -1e-2):  # norms are float32 in every dtype

                def hook(module, args, output, step=step, seen=seen, direction=direction):
                    seen.append(output[0, -1].clone())
                    return torch.cat([output[:, :-1], output[:, -1:] + step * direction], dim=1)

                handle = find_site(reference.parts(model).blocks[layer], "mlp").register_forward_hook(hook)
                logits = reference.forward(model, ids)[-1]
                handle.remove()
                margins.append(float(logits[y_it] - logits[y_pt]))
            assert found.margins[event] == pytest.approx(margins[0], abs=1e-3)
            torch.testing.assert_close(found.outputs[event, number].double(), seen[0], rtol=1e-3, atol=1e-4)
            slope = (margins[1] - margins[2]) / 2e-2
            size = float(found.gradients[event, number].norm())
            assert float(found.gradients[event, number].double() @ direction) == pytest.approx(slope, abs=2e-3 * size)
    torch.testing.assert_close(late.blocks[0].state_dict()[next(iter(late.blocks[0].state_dict()))], weights[0])
    assert not any(hooks for block in late.blocks for hooks in [find_site(block, "mlp")._forward_hooks])


def test_gradients_of_what_is_not_there_are_refused(tmp_path):
    _, it = make_pair(tmp_path, "llama")
    late = LateStack.load(it, 3)
    rows = drawn(5, late.width)
    with pytest.raises(InputError, match=r"block 2: the late stack has blocks 3\.\.4"):
        late.gradients(rows, [0, 5], TOKENS[:1], [2])
    streamed = StreamedLate.open(Checkpoint.open("it", it), 3)
    with pytest.raises(InputError, match="leave out --stream"):
        streamed.gradients(rows, [0, 5], TOKENS[:1], [3])

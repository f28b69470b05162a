"""Several threads on one model, late stack, backbone or readout: each gets what it gets alone, and the model stays
as it is, also in the middle of a replay."""

from __future__ import annotations

import functools
import itertools
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import pytest
import torch
from twins.replay import BOUNDARY, N_BLOCKS, SHIFT, VOCAB_SIZE, WIDTH, Sequences, build

from actcache.models.backbone import Backbone
from actcache.models.blocks import find_anatomy
from actcache.models.readout import Readout
from actcache.replay.edits import Add, Call, Edit, Variant
from actcache.replay.late_stack import LateStack

pytestmark = pytest.mark.slow

IDS = torch.tensor([[5, 6, 7, 8]])
AT_LAST = [Variant(f"{number}", [Edit(Add(SHIFT))]) for number in range(3)]
WITHIN = [Variant(f"{layer}", [Edit(Add(SHIFT), "all", "mlp", (layer,))]) for layer in range(BOUNDARY, N_BLOCKS)]


class Calls:
    """What threads may do with one model at once, by name: a function, and what it gives alone."""

    def __init__(self, name):
        self.model = build(name)
        self.sequences = given = Sequences(self.model)
        late, later = (LateStack.load(self.model, boundary) for boundary in (BOUNDARY, BOUNDARY + 1))
        self.late, self.blocks = late, list(self.model.get_submodule(find_anatomy(self.model).blocks))
        within = WITHIN if name == "llama" else AT_LAST  # what BLOOM's parts return includes the residual stream
        self.functions = {
            "strict": lambda: late.run(given.rows, given.offsets, strict=True),
            "together": lambda: late.run(given.rows, given.offsets),
            "edited within": lambda: late.run_variants(given.rows, given.offsets, within),
            "at one position": lambda: late.run_variants(given.rows, given.offsets, AT_LAST),
            "another boundary": lambda: later.run(given.rows, given.offsets),
            "the model itself": lambda: self.model(IDS).logits,
            "a stack that is made": lambda: LateStack.load(self.model, BOUNDARY).run(given.rows, given.offsets),
        }
        self.alone = {what: function() for what, function in self.functions.items()}
        self.before = self.state()

    def state(self):
        """Everything about the model that a forward could change."""
        modules = [
            (path, id(module), sorted(vars(module)), len(module._forward_hooks), len(module._forward_pre_hooks))
            for path, module in self.model.named_modules()
        ]
        return modules, self.model.config.to_dict(), self.model.config._attn_implementation

    def check(self, what, found):
        exact = what in ("strict", "the model itself")
        torch.testing.assert_close(found, self.alone[what], rtol=0, atol=0 if exact else 1e-4)

    def check_as_before(self):
        assert self.state() == self.before
        for what, function in self.functions.items():
            self.check(what, function())


@pytest.fixture
def switching():
    """Threads give way to one another after every few lines."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


NAMES = (
    *("strict", "together", "edited within", "at one position", "another boundary", "the model itself"),
    "a stack that is made",
)


@pytest.mark.parametrize("name", ["llama", "bloom"])  # packed, padded
@pytest.mark.parametrize("pair", list(itertools.combinations_with_replacement(NAMES, 2)), ids=" and ".join)
def test_two_threads_that_meet_within_a_forward(name, pair):
    calls = Calls(name)
    meeting, met = threading.Barrier(2, timeout=60), threading.local()

    def meet(*_):
        if not hasattr(met, "once"):
            met.once = True
            meeting.wait()

    handle = calls.blocks[-1].mlp.register_forward_pre_hook(meet)
    met.once = True  # not this thread
    calls.before = calls.state()
    with ThreadPoolExecutor(2) as pool:
        running = [pool.submit(torch.no_grad()(calls.functions[what])) for what in pair]
        for what, future in zip(pair, running, strict=True):
            calls.check(what, future.result(timeout=60))
    assert meeting.n_waiting == 0
    calls.check_as_before()
    handle.remove()


@pytest.mark.usefixtures("switching", "workers")
@pytest.mark.parametrize("name", ["llama", "bloom"])
@torch.no_grad()
def test_many_threads_at_once(name):
    calls = Calls(name)
    start = threading.Barrier(len(NAMES), timeout=60)

    def work(number):
        start.wait()
        for turn in range(6):
            what = NAMES[(number + turn) % len(NAMES)]
            calls.check(what, torch.no_grad()(calls.functions[what])())

    with ThreadPoolExecutor(len(NAMES)) as pool:
        for future in [pool.submit(work, number) for number in range(len(NAMES))]:
            future.result(timeout=120)
    calls.check_as_before()


@pytest.mark.parametrize("place", [{}, {"site": "mlp", "layers": (3,)}, {"site": "attention", "layers": (2,)}])
@pytest.mark.parametrize("strict", [True, False])
def test_one_that_fails_in_the_middle_disturbs_nobody(place, strict):
    calls = Calls("llama")
    inside, may_fail = threading.Event(), threading.Event()

    def fail(rows, at):
        inside.set()
        assert may_fail.wait(60)
        raise KeyError("in the middle")

    failing = [Variant("f", [Edit(Call(fail, "fail"), "all", **place)])]
    with ThreadPoolExecutor(1) as pool:
        sequences = calls.sequences
        running = pool.submit(calls.late.run_variants, sequences.rows, sequences.offsets, failing, strict=strict)
        assert inside.wait(60)
        calls.check_as_before()
        may_fail.set()
        with pytest.raises(KeyError, match="in the middle"):
            running.result(timeout=60)
    calls.check_as_before()


@pytest.mark.usefixtures("switching")
@pytest.mark.parametrize("name", ["llama", "bloom"])  # packed, padded
@pytest.mark.parametrize("place", [{}, {"site": "mlp", "layers": (BOUNDARY,)}])
@torch.no_grad()
def test_a_users_function_and_hook_called_from_threads_give_what_strict_gives(place, name, three_workers):
    if place and name == "bloom":
        pytest.skip("what BLOOM's parts return includes the residual stream")
    calls = Calls(name)
    begun = threading.Barrier(3)
    threads, functions_of = set(), set()

    def hook(module, args, output):
        threads.add(threading.get_ident())
        return output * 1.5

    def double(rows, at):
        own = threading.get_ident()
        if own not in functions_of and len(functions_of) < 3:
            functions_of.add(own)
            with suppress(threading.BrokenBarrierError):
                begun.wait(5)  # three at once
        return rows * (2 + at.position[:, None].to(rows) / 10)

    handle = calls.blocks[-1].mlp.register_forward_hook(hook)
    try:
        given = calls.sequences.rows, calls.sequences.offsets, [Variant("d", [Edit(Call(double, "d"), "all", **place)])]
        found = calls.late.run_variants(*given, max_tokens=8)
        assert len(threads) == len(functions_of) == 3
        assert not begun.broken
        expected = calls.late.run_variants(*given, strict=True)
    finally:
        handle.remove()
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    assert (found - calls.late.run(*given[:2])[:, None]).abs().max() > 0.1, "neither was passed by"


@torch.no_grad()
def test_a_model_whose_forward_is_wrapped_is_run_itself_and_only_hooked_to():
    """Its copies would be passed by: so nothing of it is switched, and hooks answer to their own thread."""
    calls = Calls("llama")
    block = calls.blocks[BOUNDARY]
    forward = block.forward
    inside, may_go = threading.Event(), threading.Event()

    def wait(rows, at):
        inside.set()
        assert may_go.wait(60)
        return rows + SHIFT

    waiting = [Variant("w", [Edit(Call(wait, "wait"), "all", "mlp", (BOUNDARY,))])]
    block.forward = functools.wraps(forward)(lambda *args, **more: forward(*args, **more))
    try:
        late, sequences = LateStack.load(calls.model, BOUNDARY), calls.sequences
        assert late.mode == "single"
        assert "LlamaModel: the forward of one of its modules is wrapped" in late.not_packable
        with ThreadPoolExecutor(1) as pool:
            for stack in (late, calls.late):  # wrapped before it was made, and after
                inside.clear()
                may_go.clear()
                running = pool.submit(stack.run_variants, sequences.rows, sequences.offsets, waiting)
                assert inside.wait(60)
                calls.check("the model itself", calls.model(IDS).logits)
                may_go.set()
                found = running.result(timeout=60)
                torch.testing.assert_close(found[:, 0], calls.alone["edited within"][:, 0], rtol=0, atol=1e-4)
    finally:
        del block.forward
    calls.check_as_before()


@pytest.mark.usefixtures("switching")
@torch.no_grad()
def test_threads_take_turns_on_one_backbone():
    backbone = Backbone(build("llama"))
    ids, bounds = torch.arange(2, 14)[None], [0, 3, 4, 12]
    whole, packed = backbone.forward([0, 12], input_ids=ids), backbone.forward(bounds, input_ids=ids)
    start = threading.Barrier(3, timeout=60)

    def work(own_bounds, expected):
        start.wait()
        for _ in range(20):
            with torch.no_grad():
                torch.testing.assert_close(backbone.forward(own_bounds, input_ids=ids), expected, rtol=0, atol=0)

    with ThreadPoolExecutor(3) as pool:
        given = (bounds, packed), ([0, 12], whole), (bounds, packed)
        for future in [pool.submit(work, *one) for one in given]:
            future.result(timeout=60)
    assert backbone.config._attn_implementation == "sdpa"


@pytest.mark.usefixtures("switching")
def test_threads_read_out_their_own_states():
    readout = Readout(build("llama"))
    hidden = torch.randn(4, 30, WIDTH, generator=torch.Generator().manual_seed(1))
    token_ids = torch.randint(VOCAB_SIZE, (4, 30, 2), generator=torch.Generator().manual_seed(2))

    def read(number):
        best, logits = readout.top2(hidden[number])
        ids, kl = readout.compare(hidden[number], hidden[0], torch.arange(30))
        return readout.scores(hidden[number], token_ids[number]), best, logits, ids, kl

    alone, start = [read(number) for number in range(4)], threading.Barrier(4, timeout=60)

    def work(number):
        start.wait()
        for _ in range(20):
            for found, expected in zip(read(number), alone[number], strict=True):
                assert torch.equal(found, expected)

    with ThreadPoolExecutor(4) as pool:
        for future in [pool.submit(work, number) for number in range(4)]:
            future.result(timeout=60)


@pytest.mark.usefixtures("switching")
def test_threads_cut_one_stack_at_every_boundary():
    for _ in range(20):
        late, start = LateStack.load(build("llama"), 1), threading.Barrier(4, timeout=60)

        def cut(number, late=late, start=start):
            start.wait()
            return [late.at(boundary) for boundary in (1, 2, 3, 2)][number % 4]

        with ThreadPoolExecutor(4) as pool:
            one, two, three, again = pool.map(cut, range(4))
        assert [stack.boundary for stack in (one, two, three)] == [1, 2, 3]
        assert two is again

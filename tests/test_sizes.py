"""Sizes of final states against hooks: a full forward, read at every position up to the event's."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import first_quick
from twins import reference
from twins.replay import BOUNDARY, Sequences, build

from actcache.errors import InputError
from actcache.replay.late_stack import LateStack
from actcache.replay.sizes import SIZES

# Of sequences of 7, 1, 12, 3 and 9: two of one position, several of a sequence, and a sequence that has none.
EVENTS = [(2, 11), (0, 3), (2, 4), (4, 8), (2, 4), (1, 0), (0, 6)]
MODES = {"llama": "packed", "phi3 longrope": "packed", "bloom": "padded"}


def slow_sizes(outputs):
    """Written out: of all values, and of those at the last position."""
    every = outputs.double().numpy()
    found = {"rms": every, "rms_p": every[-1], "std": every, "std_p": every[-1]}
    rms = {name: np.sqrt(np.mean(values**2)) for name, values in found.items() if name.startswith("rms")}
    std = {name: np.sqrt(np.mean((values - values.mean()) ** 2)) for name, values in found.items() if "std" in name}
    return [(rms | std)[name] for name in SIZES]


@pytest.mark.usefixtures("workers")
@pytest.mark.parametrize("name", first_quick(MODES))
def test_sizes_are_those_of_a_hooked_forward_up_to_the_event(name):
    sequences = Sequences(build(name))
    late = LateStack.load(sequences.model, BOUNDARY)
    assert late.mode == MODES[name]
    expected = torch.tensor(
        [
            slow_sizes(reference.overwritten(sequences.model, sequences.ids[s][: p + 1], BOUNDARY, state[: p + 1]))
            for s, p in EVENTS
            for state in [sequences.states[s]]
        ],
        dtype=torch.float64,
    )
    given = sequences.rows, sequences.offsets
    strict = late.sizes(*given, positions=EVENTS, strict=True)
    torch.testing.assert_close(strict, expected, rtol=1e-12, atol=0)
    for max_tokens in (None, 9):
        found = late.sizes(*given, positions=EVENTS, max_tokens=max_tokens)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=0)
    last = [(number, length - 1) for number, length in enumerate(sequences.lengths)]
    assert torch.equal(late.sizes(*given, strict=True), late.sizes(*given, positions=last, strict=True))
    assert late.sizes(torch.empty(0, late.width), [0]).shape == (0, 4)


def test_what_cannot_be_replayed_has_no_sizes():
    late = LateStack.load(build("llama"), BOUNDARY)
    with pytest.raises(InputError, match="offsets must run from 0"):
        late.sizes(torch.zeros(3, late.width), [0, 2])

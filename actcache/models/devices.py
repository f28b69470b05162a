"""Devices: where checkpoints compute, and whether tensors get from one to another unharmed.

Knows torch's devices; knows no models.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from actcache.errors import CheckError, InputError

AUTO, CPU, CUDA = "auto", "cpu", "cuda"

Copy = Callable[[torch.Tensor, str], torch.Tensor]

# Bytes of what is copied for a check: more than one page, and more than one packet of any link.
_CHECKED = 4 << 20


@dataclass(frozen=True)
class Placement:
    """Where each checkpoint computes.

    Attributes:
        kind: ``cpu`` or ``cuda``, of all of them: numbers differ between kinds, and not between devices of one kind.
        of: the device of each, by label.
    """

    kind: str
    of: Mapping[str, str]

    @property
    def devices(self) -> list[str]:
        """All of them, each once."""
        return list(dict.fromkeys(self.of.values()))


def place(given: str, labels: Sequence[str], n_cuda: Callable[[], int] = torch.cuda.device_count) -> Placement:
    """Deal checkpoints to devices, in their order.

    Args:
        given: ``cpu``, ``cuda``, ``cuda:1``, a list such as ``cuda:0,cuda:1``, or ``auto``: CUDA devices where there
            are any, a checkpoint each as far as they go round, and otherwise the CPU.
        labels: of the checkpoints.
        n_cuda: how many CUDA devices there are.

    Raises:
        InputError: it is none of that, a device is not there or named twice, or there are more than checkpoints.
    """
    if given == AUTO:
        n = min(n_cuda(), len(labels))
        given = ",".join(f"{CUDA}:{index}" for index in range(n)) or CPU
    devices = [one.strip() for one in given.split(",")]
    for one in devices:
        if not re.fullmatch(r"cpu|cuda(:\d{1,3})?", one):
            raise InputError(f"--device {given}: {one!r} is no device; give cpu, cuda, cuda:1, a list, or auto")
    kinds = {one.partition(":")[0] for one in devices}
    if len(kinds) > 1:
        raise InputError(f"--device {given}: checkpoints that are compared compute on devices of one kind")
    if twice := [one for one in devices if devices.count(one) > 1]:
        raise InputError(f"--device {given}: {twice[0]} is named twice; name each device once")
    if len(devices) > len(labels):
        raise InputError(
            f"--device {given}: {len(devices)} devices for {len(labels)} checkpoints; name no more devices than that"
        )
    (kind,) = kinds
    if kind == CUDA:
        n = n_cuda()
        if not n:
            raise InputError(f"--device {given}: this torch sees no CUDA device; use --device cpu")
        numbers = [int(one.partition(":")[2] or 0) for one in devices]
        if max(numbers) >= n:
            raise InputError(f"--device {given}: this torch sees {n} CUDA devices, numbered from 0")
    return Placement(kind, dict(zip(labels, itertools.cycle(devices), strict=False)))


def placed(given: str, labels: Sequence[str]) -> Placement:
    """As :func:`place`, after copies between the devices were tried (errors as :func:`check_copies`, too)."""
    placement = place(given, labels)
    check_copies(placement.devices)
    return placement


def kind_of(given: str) -> str:
    """The kind of the devices that a text as :func:`place` takes it names, whether they are there or not."""
    if given == AUTO:
        return CUDA if torch.cuda.device_count() else CPU
    return given.strip().partition(":")[0]


def check_copies(devices: Sequence[str], copy: Copy = torch.Tensor.to) -> None:
    """Copy a tensor from each device to each other one and back, and compare: a link between two GPUs that is set up
    wrongly changes values and says nothing.

    Raises:
        CheckError: it came back another one.
    """
    pairs = list(itertools.permutations(devices, 2))
    if not pairs:
        return
    sent = torch.randint(-128, 128, (_CHECKED,), dtype=torch.int8, generator=torch.Generator().manual_seed(0))
    for one, other in pairs:
        back = copy(copy(copy(copy(sent, one), other), one), CPU)
        if not torch.equal(back, sent):
            n = int((back != sent).sum())
            raise CheckError(
                f"a tensor that went from {one} to {other} and back came back with {n} of {len(sent)} bytes changed: "
                "the link between them is broken (NCCL_P2P_DISABLE or the IOMMU may be the reason); name one device"
            )

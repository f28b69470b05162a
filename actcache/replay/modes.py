"""Modes: how sequences share a forward, as probes find when a late stack is made, and how they are cut into packs.

Knows forwards and lengths; knows no variants and no files.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from actcache.models.backbone import FAILURES, rounding_of, why_failed
from actcache.models.blocks import is_wrapped
from actcache.models.packing import offsets_of, plan_evenly, plan_packs
from actcache.models.regimes import Regimes
from actcache.replay.copies import copies_of
from actcache.replay.forwards import Forwards, Mode
from actcache.replay.workers import share_threads

# Tokens of one pack. On the CPU few enough that a block's activations stay in the caches, enough for matrix products at
# the machine's rate; a GPU wants more.
MAX_TOKENS = {"cpu": 1024, "cuda": 8192}

# Fewer tokens than this are not worth a worker: every one reads all the weights.
TOKENS_OF_A_WORKER = 256


def tokens_of_pack(device: torch.device, max_tokens: int | None) -> int:
    """The most tokens per forward: those asked for, or what suits the device."""
    return MAX_TOKENS.get(device.type, MAX_TOKENS["cuda"]) if max_tokens is None else max_tokens


def share_work(mode: Mode, device: torch.device, n_tokens: int) -> tuple[int, int]:
    """How many packs run at once, on how many threads each. One that shall be what a plain forward is takes all."""
    if mode == "single" or device.type != "cpu":
        return 1, torch.get_num_threads()
    return share_threads(n_tokens // TOKENS_OF_A_WORKER)


def plan(lengths: Sequence[int], mode: Mode, regimes: Regimes, budget: int, n_workers: int = 1) -> list[range]:
    """Sequences of these lengths, in order, cut into forwards of at most ``budget`` tokens, as even as ``n_workers``
    that run at once need them."""
    if mode == "single":
        return plan_packs(lengths, 0)

    def cut(tokens: int) -> list[range]:
        return regimes.packs(lengths, tokens, padded=mode == "padded")

    return cut(budget) if n_workers == 1 else plan_evenly(cut, budget, n_workers)


@torch.no_grad()
def find_mode(forwards: Forwards) -> tuple[Mode, str | None]:
    """The first mode that is exact to rounding, and why it is not ``packed``, if it is not."""
    name = type(forwards.backbone.decoder).__name__
    if is_wrapped(forwards.model):
        return "single", f"{name}: the forward of one of its modules is wrapped"
    (own,) = copies_of(forwards, 1)
    generator = torch.Generator().manual_seed(0)
    backbone = own.backbone
    first, changed, second = (  # the second is padded, where there is padding
        torch.randn(n, backbone.width, generator=generator).to(backbone.device, backbone.dtype) for n in (5, 5, 4)
    )
    not_packable = backbone.not_packable or _why_not(own, "packed", first, changed, second)
    if not_packable is None:
        return "packed", None
    return "single" if _why_not(own, "padded", first, changed, second) else "padded", not_packable


def _why_not(
    forwards: Forwards, mode: Mode, first: torch.Tensor, changed: torch.Tensor, second: torch.Tensor
) -> str | None:
    """The reason why sequences that share a forward in this mode are not what each is alone, or None.

    The second sequence must give what it gives alone, to rounding: behind the first, behind a changed one, before it,
    and where rows of another go on in it. In mode ``packed`` the same holds of it as a branch of another sequence that
    differs at its last position, or at its last two.
    """
    decoder, n = forwards.backbone.decoder, len(second)
    alone = forwards.plain(second[None])[0, -1].float()
    longer = torch.cat([second, first[:2]])
    behind, before = (torch.tensor([one - 1, len(first) + n - 1]) for one in (len(first), n))
    found = []
    for parts, scored, index in (
        ((first, second), behind, 1),
        ((changed, second), behind, 1),
        ((second, first), before, 0),
        ((longer,), torch.tensor([n - 1, len(longer) - 1]), 0),
    ):
        bounds = offsets_of([len(part) for part in parts]).tolist()
        try:
            found.append(forwards.final(torch.cat(parts), bounds, scored, mode)[index])
        except FAILURES as error:
            return why_failed(decoder, mode, error)
    if mode == "packed":
        bounds = offsets_of([n, n, n]).tolist()
        mixed = [first[: n - 1], second[-1:], second[:-1], first[-1:], second[:-2], first[:2]]
        _, prefix = forwards.to_last_keys(torch.cat(mixed), bounds, every_block=True)
        at = torch.tensor([n - 1, n - 1, n - 1, n - 2, n - 1, n - 2, n - 1])
        rows = torch.cat([changed[:1], second[-1:], changed[1:4], second[-2:]])
        try:
            branched = forwards.branches(prefix, [0, 1, 1, 2, 2, 2, 2], at, rows, [0, 1, 2, 3, 5, 7])
            found += branched[[1, 6]]
        except FAILURES as error:
            return why_failed(decoder, mode, error)
    off = max((one.float() - alone).abs().max().item() for one in found)
    if not off <= rounding_of(forwards.backbone.dtype) * alone.abs().max().item():
        return f"{type(decoder).__name__}: a {mode} sequence differs from the same one alone by {off:.2g}"
    return None

"""What a capture computes, and how the command line says which blocks and sites."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from actcache.errors import InputError
from actcache.models.blocks import block_of, check_boundary
from actcache.schema import FIRST_DIVERGENCE
from actcache.store.layout import SITES, STATE, Sites


@dataclass(frozen=True)
class CaptureSettings:
    """What a capture computes. Everything here is part of the store's fingerprint.

    Attributes:
        boundaries: b of every state to keep, each in 0..L-1.
        dtype: ``float32`` or ``bfloat16``, of weights and states.
        device: ``cpu`` or ``cuda``.
        max_new: compare at most this many choices per prompt; of a rollout, whose tokens are one fewer at most.
        row_selection: ``prefix`` keeps every position's rows (the grid needs them), ``divergence`` the event's alone.
        strict: one sequence per forward, with the model's own attention.
        max_tokens: tokens per pack.
        shard_prompts: prompts of one segment, the unit that a killed run loses at most.
        codec: of the stored states: ``blosc``, which any Zarr reader has, or ``actcache.bf16_planes`` for bfloat16.
        support: how events are chosen: ``first_divergence``, or ``rollouts`` (see supports.py); ``corpus`` has none.
        sites: further rows to keep, each a site (``attention`` or ``mlp``) and a block: what that part of it gives.
        context: tokens of each text of a corpus, at most; None elsewhere.
    """

    boundaries: tuple[int, ...]
    dtype: str = "float32"
    device: str = "cpu"
    max_new: int = 128
    row_selection: str = "prefix"
    strict: bool = False
    max_tokens: int = 4096
    shard_prompts: int = 64
    codec: str = "blosc"
    support: str = FIRST_DIVERGENCE
    sites: tuple[tuple[str, int], ...] = ()
    context: int | None = None

    @property
    def wanted(self) -> Sites:
        """The blocks whose rows are kept, by site."""
        found: Sites = {STATE: list(self.boundaries)}
        for site, block in self.sites:
            found.setdefault(site, []).append(block)
        return found

    @property
    def places(self) -> list[tuple[str, int]]:
        """The same, each a site and a block."""
        return [(site, block) for site, blocks in self.wanted.items() for block in blocks]

    def with_sites(self, wanted: Sites) -> CaptureSettings:
        """The same with these rows instead."""
        others = ((site, block) for site, blocks in wanted.items() if site != STATE for block in blocks)
        return replace(self, boundaries=tuple(wanted[STATE]), sites=tuple(others))


def parse_boundaries(text: str, n_blocks: int) -> tuple[int, ...]:
    """``18``, ``-3`` (of L), a fraction of the depth such as ``0.6``, a list ``5,10,20`` of these, or ``all``.

    Raises:
        InputError: not of that form, or outside 0..L-1.
    """
    if text.strip() == "all":
        return tuple(range(1, n_blocks))
    boundaries: dict[int, None] = {}  # in their order: the first is the main one
    for part in text.split(","):
        try:
            boundary = block_of(float(part) if "." in part else int(part), n_blocks)
        except ValueError as error:
            raise InputError(f"boundary {part!r} is not a block index, a fraction such as 0.6, or 'all'") from error
        check_boundary(boundary, n_blocks)
        boundaries[boundary] = None
    return tuple(boundaries)


def parse_sites(given: Iterable[str], n_blocks: int) -> tuple[tuple[str, int], ...]:
    """``mlp:29,30``, ``attention:all`` or ``state:18``, each a site and its blocks (0..L-1), each block once.

    Raises:
        InputError: not of that form, a site that is none, or a block that the model has not.
    """
    found: dict[tuple[str, int], None] = {}
    for text in given:
        site, _, blocks = text.partition(":")
        if site not in SITES:
            raise InputError(
                f"site {text!r}: give state, attention or mlp and its blocks, such as mlp:29,30 or attention:all"
            )
        for part in range(n_blocks) if blocks.strip() == "all" else blocks.split(","):
            try:
                block = int(part)
            except ValueError as error:
                raise InputError(f"site {text!r}: {part!r} is not a block index") from error
            if not 0 <= block < n_blocks:
                raise InputError(f"site {text!r}: block {block} is not one of 0..{n_blocks - 1}")
            found[site, block] = None
    return tuple(found)

"""Growth: which segments a store shall have, and which rows its segments lack, so that one command creates, resumes
and extends it.

Segments are the prompts in their order, cut into equal parts. A store that has grown may hold shorter ones, where an
earlier prompts file ended. Knows prompts and stores; knows no models.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from actcache import prompts as prompts_module
from actcache.canonical import digest_of
from actcache.errors import InputError
from actcache.prompts import Prompt
from actcache.store import Place, Segment, Store, open_store
from actcache.store.commit_record import record_digest
from actcache.store.layout import MAX_NAME, STATE, Sites

_NAME = re.compile(r"shard-([0-9]{6,})")


def segments_of(
    prompts: Sequence[Prompt], shard_prompts: int, captured: Mapping[str, str] | None = None
) -> dict[str, range]:
    """The prompts of each segment, as a range of all, by the segment's name.

    Args:
        prompts: all of them.
        shard_prompts: of a segment.
        captured: of the segments that a store has, the digest of their prompts: what is captured stays as it is, and
            prompts that were added since follow. Where a digest is that of no prompts here, its segment gets others.
    """
    numbered = sorted((int(match[1]), digest) for name, digest in (captured or {}).items() if (match := _match(name)))
    lengths: list[int] = []
    n_found = 0  # their sum
    for number, digest in numbered:
        n_missing = number - len(lengths)
        before, n = _find(prompts, n_found, digest, shard_prompts, n_missing)
        n_found += before + n
        for left in reversed(range(n_missing)):  # each of these has a prompt at least
            lengths.append(min(shard_prompts, before - left))
            before -= lengths[-1]
        lengths.append(n)
    n_left = len(prompts) - n_found
    lengths += [shard_prompts] * (n_left // shard_prompts) + [n_left % shard_prompts] * (n_left % shard_prompts > 0)
    segments, start = {}, 0
    for number, n in enumerate(lengths):
        segments[f"shard-{number:06d}"] = range(start, start + n)
        start += n
    return segments


def digests_of_segments(
    prompts: Sequence[Prompt], shard_prompts: int, captured: Mapping[str, str] | None = None
) -> dict[str, str]:
    """A digest of the prompts of each segment, by its name; arguments as :func:`segments_of`."""
    segments = segments_of(prompts, shard_prompts, captured)
    return {name: prompts_module.digest(prompts, shard.start, shard.stop) for name, shard in segments.items()}


def existing(place: Place) -> Store | None:
    """The store at a place, if there is one (errors as ``open_store``)."""
    try:
        return open_store(place)
    except InputError:  # none, or what a writer of it says better
        return None


def sites_of_store(store: Store) -> Sites:
    """Every block that some segment has rows of, by site: what all segments shall have when the store has grown."""
    found: Sites = store.sites
    for segment in store.segments:
        for site, blocks in segment.sites.items():
            found[site] = list(dict.fromkeys([*found.get(site, []), *blocks]))
    return found


def joined(sites: Sites, more: Sites) -> Sites:
    """Both, those first that the first one has."""
    names = dict.fromkeys([*sites, *more])
    return {name: list(dict.fromkeys([*sites.get(name, []), *more.get(name, [])])) for name in names}


def missing_of(segment: Segment, wanted: Sites) -> Sites:
    """The blocks, by site, whose rows are wanted and not there."""
    left = {site: [b for b in blocks if b not in segment.sites.get(site, ())] for site, blocks in wanted.items()}
    return {site: blocks for site, blocks in left.items() if blocks}


def name_of_addition(segment: Segment, sites: Sites) -> str:
    """The same for the same rows of the same segment, so that of two writers one adds them."""
    digest = digest_of([record_digest(segment.record), sites])[:12]
    return f"{segment.name[: MAX_NAME - 24]}-more-{digest}"


def said_of_sites(sites: Sites) -> str:
    """In words: ``boundaries 3, 18; mlp of blocks 29``."""
    words = {site: ", ".join(map(str, blocks)) for site, blocks in sites.items() if blocks}
    return "; ".join(
        f"boundaries {numbers}" if site == STATE else f"{site} of blocks {numbers}" for site, numbers in words.items()
    )


def _match(name: str) -> re.Match[str] | None:
    return _NAME.fullmatch(name)


def _find(prompts: Sequence[Prompt], start: int, digest: str, most: int, n_missing: int) -> tuple[int, int]:
    """Where a captured segment lies: how many prompts from ``start`` on come before it, and how many it has.

    The segments before it that are not captured have ``most`` prompts each, unless they were cut by the end of a file.
    """
    for before in range(n_missing * most, n_missing - 1, -1):
        first = min(start + before, len(prompts))
        stop = min(first + most, len(prompts))
        if prompts_module.digest(prompts, first, stop) == digest:  # as a rule, and known without reading
            return before, stop - first
        for n, found in enumerate(prompts_module.digests(prompts[first:stop]), 1):
            if found == digest:
                return before, n
    return n_missing * most, min(most, max(0, len(prompts) - start - n_missing * most))

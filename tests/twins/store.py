"""What a store must answer, by loops over what was appended, and random ones of them."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from stores import bits, make_fingerprint, make_segment

from actcache.store import SegmentData, Store, layout
from actcache.store.chunks import CODECS


@dataclass
class Twin:
    """What a store must answer, by loops over what was appended."""

    fingerprint: dict[str, Any]
    segments: dict[str, SegmentData]

    def events(self) -> list[tuple[str, dict[str, Any]]]:
        return [(name, row) for name in sorted(self.segments) for row in self.segments[name].events.to_pylist()]

    def rows(self, of: Callable[[SegmentData], Any], selection: str, events: Sequence[int]) -> list[torch.Tensor]:
        """For each event, the rows of ``of(segment)`` that are its own."""
        found = []
        for number in events:
            name, event = self.events()[number]
            segment = self.segments[name]
            if selection == "prefix":
                first = int(segment.sequence_offsets[event["sequence"]])
                found.append(of(segment)[first : first + event["position"] + 1])
            else:
                within = [row["event_id"] for row in segment.events.to_pylist()].index(event["event_id"])
                found.append(of(segment)[within : within + 1])
        return found

    def check(self, store: Store, events: Sequence[int]) -> None:
        """Every answer of ``store`` about these events, bit for bit."""
        width, dtype = self.fingerprint["width"], layout.STATE_DTYPES[self.fingerprint["dtype"]]
        nothing = torch.empty((0, width), dtype=dtype)
        for label in self.fingerprint["checkpoints"]:
            for boundary in self.fingerprint["boundaries"]:
                key = (label, boundary)
                want = self.rows(lambda s, key=key: s.states[key], self.fingerprint["row_selection"], events)
                rows, offsets = store.states(label, boundary, events)
                assert offsets.dtype == torch.int64
                assert offsets.tolist() == np.cumsum([0, *map(len, want)]).tolist()
                assert bits(rows) == bits(torch.cat([nothing, *want]))
                if self.fingerprint["row_selection"] == "prefix":
                    self.check_sequences(store.sequence_states(label, boundary, events), events, want)
            for site, blocks in store.sites.items():
                for block in blocks:
                    key = (site, label, block)
                    want = self.rows(lambda s, key=key: s.rows[key], self.fingerprint["row_selection"], events)
                    found = store.states(label, block, events, site=site)[0]
                    assert bits(found) == bits(torch.cat([nothing, *want]))
            want = self.rows(lambda s, label=label: s.final[label], "divergence", events)
            assert bits(store.final(label, events)) == bits(torch.cat([nothing, *want]))
        ids = self.rows(lambda s: torch.from_numpy(s.token_ids), "prefix", events)
        found, offsets = store.token_ids(events)
        assert found.dtype == torch.int64
        assert found.tolist() == [token for one in ids for token in one.tolist()]
        assert offsets.tolist() == np.cumsum([0, *map(len, ids)]).tolist()

    def check_sequences(
        self, found: tuple[torch.Tensor, ...], events: Sequence[int], want: Sequence[torch.Tensor]
    ) -> None:
        """What events share is there once, in the order of their first, up to the last of their positions."""
        rows, offsets, positions = found
        assert offsets.dtype == positions.dtype == torch.int64
        assert positions.shape == (len(events), 2)
        assert len(rows) == offsets[-1]
        asked = [(name, event["sequence"]) for name, event in (self.events()[number] for number in events)]
        distinct = list(dict.fromkeys(asked))
        assert positions.tolist() == [
            [distinct.index(sequence), len(own) - 1] for sequence, own in zip(asked, want, strict=True)
        ]
        longest = [
            max(len(own) for own, other in zip(want, asked, strict=True) if other == sequence) for sequence in distinct
        ]
        assert offsets.diff().tolist() == longest
        for (sequence, position), own in zip(positions.tolist(), want, strict=True):
            assert bits(rows[offsets[sequence] :][: position + 1]) == bits(own)

    def check_tables(self, store: Store) -> None:
        rows = [row | {"segment": name} for name, row in self.events()]
        carried = [json.loads(row.pop("carried")) for row in rows]
        keys = {key for one in carried for key in one}
        assert (
            store.events.to_pylist()
            == [row | {key: one.get(key) for key in keys} for row, one in zip(rows, carried, strict=True)]
            or not rows
        )
        assert store.events.num_rows == len(store) == len(rows)
        assert store.events["pair"].to_pylist() == [row["pair"] for row in rows]
        sequences = [(name, row) for name in sorted(self.segments) for row in self.segments[name].sequences.to_pylist()]
        assert [(row["segment"], row["prompt_id"]) for row in store.sequences.to_pylist()] == [
            (name, row["prompt_id"]) for name, row in sequences
        ]
        excluded = [(name, row) for name in sorted(self.segments) for row in self.segments[name].excluded.to_pylist()]
        assert [(row["segment"], row["prompt_id"], row["reason"]) for row in store.excluded.to_pylist()] == [
            (name, row["prompt_id"], row["reason"]) for name, row in excluded
        ]


@st.composite
def twins(draw: st.DrawFn) -> Twin:
    fingerprint = make_fingerprint(
        dtype=draw(st.sampled_from(sorted(layout.STATE_DTYPES))),
        width=draw(st.sampled_from([1, 2, 3, 7, 32, 65])),
        boundaries=draw(st.lists(st.integers(1, 1200), max_size=3, unique=True)),
        row_selection=draw(st.sampled_from(layout.ROW_SELECTIONS)),
        checkpoints={label: {} for label in ["pt", "it", "DPO-2", "s_ft"][: draw(st.integers(2, 4))]},
    )
    if fingerprint["dtype"] == "bfloat16":
        fingerprint["codec"] = draw(st.sampled_from(sorted(CODECS)))
    sites = draw(st.sampled_from([[], [("mlp", 4)], [("attention", 0), ("mlp", 0), ("state", 1300)]]))
    segments = {}
    for name in draw(st.lists(st.sampled_from(["a", "a-1", "B", "10", "9"]), max_size=3, unique=True)):
        lengths = draw(st.lists(st.integers(0, 12), max_size=4))
        places = [(sequence, position) for sequence, length in enumerate(lengths) for position in range(length)]
        segments[name] = make_segment(
            fingerprint,
            lengths,
            draw(st.lists(st.sampled_from(places), max_size=6)) if places else [],
            name=name,
            kinds=draw(st.lists(st.sampled_from(["any bits", "0", "-0"]), min_size=1, max_size=3)),
            n_excluded=draw(st.integers(0, 2)),
            sites=sites,
            seed=draw(st.integers(0, 2**32)),
        )
    return Twin(fingerprint, segments)

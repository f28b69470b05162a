"""Commit records that replace each other, or that vouch for what is not theirs."""

from __future__ import annotations

import hashlib
import json
import shutil
from typing import Any

from attacks.forger import Forger, dumps


def replaces_itself(forger: Forger) -> None:
    """A segment that no longer counts because it counts."""
    forger.record(lambda r: r.update(replaces=["a"]))


def replace_each_other(forger: Forger) -> None:
    """Two segments, each in place of the other: which one is read?"""
    forger.record(lambda r: r.update(replaces=["b"]))
    forger.record(lambda r: r.update(replaces=["a"]), "b")


def replace_in_a_circle(forger: Forger) -> None:
    """Three segments, each in place of the next."""
    forger.copy_segment("c", lambda r: r.update(replaces=["a"]))
    forger.record(lambda r: r.update(replaces=["b"]))
    forger.record(lambda r: r.update(replaces=["c"]), "b")


def two_replace_the_same(forger: Forger) -> None:
    """Two segments in place of one: its events would count twice."""
    for segment in ("c", "d"):
        forger.copy_segment(segment, lambda r: r.update(replaces=["b"]))


def replaces_is_no_list(forger: Forger) -> None:
    """A text, each letter of which is a segment's name."""
    forger.record(lambda r: r.update(replaces="b"))


def replaces_lists(forger: Forger) -> None:
    """Names that are lists, which no set can hold."""
    forger.record(lambda r: r.update(replaces=[["b"]]))


def two_segments_in_one_folder(forger: Forger) -> None:
    """The same bytes, counted as two segments."""
    forger.copy_segment("c", lambda r: r.update(folder="a"))


def record_under_another_name(forger: Forger) -> None:
    """A commit record copied to another segment's file."""
    shutil.copy(forger.record_file(), forger.record_file("c"))


def record_of_a_dictionary_of_nothing(forger: Forger) -> None:
    """A record without any key."""
    forger.write_record(b'{"format_version":1}')


def record_that_is_a_list(forger: Forger) -> None:
    """A list of records."""
    forger.record_file().write_bytes(b"[" + forger.record_file().read_bytes().strip() + b"]\n")


def files_is_a_list(forger: Forger) -> None:
    """Files that are counted, not named."""
    forger.record(lambda r: r.update(files=[1, 2, 3]))


def file_entry_is_a_text(forger: Forger) -> None:
    """A size and a checksum in a text of two letters."""
    forger.record(lambda r: r["files"].update({"zarr.json": "12"}))


def schema_is_a_list(forger: Forger) -> None:
    """Columns without types."""
    forger.record(lambda r: r["schema"].update(events=["event_id"]))


def column_of_a_type_that_is_a_list(forger: Forger) -> None:
    """A type that no dictionary can look up."""
    forger.record(lambda r: r["schema"]["events"].update(extra=["int64"]))


def pair_of_lists(forger: Forger) -> None:
    """The pair's labels are lists, which no set can hold."""
    forger.fingerprint(lambda f: f.update(pair=[["pt"], ["it"]]))


def pair_that_is_a_number(forger: Forger) -> None:
    """A pair of nothing."""
    forger.fingerprint(lambda f: f.update(pair=5))


def boundaries_that_are_lists(forger: Forger) -> None:
    """Boundaries that are not numbers."""
    forger.fingerprint(lambda f: f.update(boundaries=[[1], [2]]))


def dtype_that_is_a_list(forger: Forger) -> None:
    """A dtype that no dictionary can look up."""
    forger.fingerprint(lambda f: f.update(dtype=["float32"]))


def row_selection_that_is_another(forger: Forger) -> None:
    """Rows by event where there is one a token."""
    forger.fingerprint(lambda f: f.update(row_selection="divergence"))


def _addition(forger: Forger, **changes: Any) -> None:
    """An addition to segment a, with the states of both checkpoints at block 1 under the name of block 9."""
    base = json.loads(forger.record_file().read_bytes())
    del base["crc32c"]

    def change(record: dict[str, Any]) -> None:
        files = {name.replace("b001", "b009"): entry for name, entry in record["files"].items() if "b001" in name}
        extends = {"segment": "a", "record": hashlib.sha256(dumps(base)).hexdigest()}
        record.update(extends=extends, sites={"state": [9]}, schema={}, files=files)
        record.update({name: value(record) if callable(value) else value for name, value in changes.items()})

    forger.copy_segment("c", change)
    for label in ("pt", "it"):
        folder = forger.path / "segments/c/states" / label
        (folder / "b001").rename(folder / "b009")


def addition_that_counts_other_rows(forger: Forger) -> None:
    """Rows are added to a segment that has fewer: reads of them would go past the end."""
    _addition(forger, n_tokens=lambda r: r["n_tokens"] + 1)


def addition_that_is_a_segment_too(forger: Forger) -> None:
    """An addition whose events would count."""
    schema = json.loads(forger.record_file().read_bytes())["schema"]
    _addition(forger, schema=schema)


def addition_that_replaces_a_segment(forger: Forger) -> None:
    """An addition in place of a segment, whose events would be gone."""
    _addition(forger, replaces=["b"])


def addition_to_a_list(forger: Forger) -> None:
    """What is extended is no segment's name."""
    _addition(forger, extends=["a"])


def addition_to_a_path(forger: Forger) -> None:
    """What is extended is a path."""
    _addition(forger, extends=lambda r: r["extends"] | {"segment": "../a"})


def addition_of_rows_that_are_not_there(forger: Forger) -> None:
    """The record says rows of a site whose files it does not name."""
    _addition(forger, sites={"state": [9], "mlp": [9]})


def addition_at_a_site_that_is_none(forger: Forger) -> None:
    """A site that leads out of the segment."""
    _addition(forger, sites={"../b/states": [1]})


def addition_at_blocks_that_are_none(forger: Forger) -> None:
    """Blocks that are texts."""
    _addition(forger, sites={"state": ["9"]})


def segment_without_the_boundaries_of_its_store(forger: Forger) -> None:
    """A segment that says it has fewer states than the store was created with."""
    forger.record(lambda r: (r.update(sites={"state": [1]}), _drop(r, "b002")))


def _drop(record: dict[str, Any], array: str) -> None:
    for name in [name for name in record["files"] if array in name]:
        del record["files"][name]


def sites_that_are_a_list(forger: Forger) -> None:
    """A list in place of the sites."""
    forger.record(lambda r: r.update(sites=[1]))


def no_sites(forger: Forger) -> None:
    """A segment of this version without sites."""
    forger.record(lambda r: r.pop("sites"))


def segment_that_says_it_is_of_version_1(forger: Forger) -> None:
    """A record of this version under the number of an earlier one, whose layout is another."""
    forger.record(lambda r: r.update(format_version=1))


def version_that_is_true(forger: Forger) -> None:
    """True is 1 in Python only."""
    forger.record(lambda r: r.update(format_version=True))

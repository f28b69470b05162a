"""Commit records that replace each other, or that vouch for what is not theirs."""

from __future__ import annotations

import shutil

from attacks.forger import Forger


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

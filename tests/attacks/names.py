"""Names that lead out of the store, or that no file system can have."""

from __future__ import annotations

import os
import shutil
from typing import Any

from attacks.forger import Forger


def folder_climbs_out(forger: Forger) -> None:
    """The record's folder is a path to another store's segment, outside."""
    forger.record(lambda r: r.update(folder="../../outside/segment"))


def folder_is_absolute(forger: Forger) -> None:
    """The record's folder is an absolute path."""
    forger.record(lambda r: r.update(folder=str(forger.outside / "segment")))


def folder_is_the_parent(forger: Forger) -> None:
    """The record's folder is '..': the store itself."""
    forger.record(lambda r: r.update(folder=".."))


def folder_is_empty(forger: Forger) -> None:
    """The record's folder is '': segments/ itself."""
    forger.record(lambda r: r.update(folder=""))


def folder_ends_in_a_newline(forger: Forger) -> None:
    """A name that a check with '$' instead of the whole text lets through."""
    forger.record(lambda r: r.update(folder="a\n"))


def folder_is_no_text(forger: Forger) -> None:
    """The record's folder is a list of texts."""
    forger.record(lambda r: r.update(folder=["a"]))


def folder_has_a_nul(forger: Forger) -> None:
    """A NUL, at which C would end the name."""
    forger.record(lambda r: r.update(folder="a\0/../../outside"))


def folder_is_too_long(forger: Forger) -> None:
    """A name of 5,000 letters, which every check of letters lets through and no file system takes."""
    forger.record(lambda r: r.update(folder="a" * 5000))


def segment_with_a_slash(forger: Forger) -> None:
    """The record says that its segment is '../outside'."""
    forger.record(lambda r: r.update(segment="../../outside/segment"))


def replaces_with_a_slash(forger: Forger) -> None:
    """A replaced segment's name is a path: whoever deletes what is replaced would delete outside."""
    forger.record(lambda r: r.update(replaces=["../../outside/segment"]))


def file_climbs_out(forger: Forger) -> None:
    """The record vouches for a file outside, and verify reads what a record vouches for."""
    forger.record(lambda r: r["files"].update({"../../../outside/secret": [6, None]}))


def file_is_absolute(forger: Forger) -> None:
    """The record vouches for an absolute path."""
    forger.record(lambda r: r["files"].update({str(forger.outside / "secret"): [6, None]}))


def column_climbs_out(forger: Forger) -> None:
    """A column of the events is called '../../../outside/column'."""
    forger.record(lambda r: r["schema"]["events"].update({"../../../outside/column": "int64"}))


def column_is_the_readers_own(forger: Forger) -> None:
    """A column is called as the one that the reader adds: the table would have two of that name."""
    shutil.copytree(forger.array("events/step"), forger.array("events/segment"))

    def change(record: dict[str, Any]) -> None:
        record["schema"]["events"]["segment"] = "int32"
        for file in ("zarr.json", "c/0"):
            record["files"][f"events/segment/{file}"] = record["files"][f"events/step/{file}"]

    forger.record(change)


def label_climbs_out(forger: Forger) -> None:
    """A checkpoint is called '../../../outside/segment'."""
    forger.fingerprint(lambda f: f["checkpoints"].update({"../../../outside/segment": {}}))


def label_is_too_long(forger: Forger) -> None:
    """A checkpoint's label has 5,000 letters, and the record vouches for its arrays."""
    forger.fingerprint(lambda f: f["checkpoints"].update({"l" * 5000: {}}))
    forger.record(
        lambda r: r["files"].update(
            {
                file.replace("/pt/", f"/{'l' * 5000}/"): entry
                for file, entry in r["files"].items()
                if file.startswith("states/pt/")
            }
        )
    )


def record_of_a_name_that_is_no_text(forger: Forger) -> None:
    """A commit record's file name is not UTF-8: whoever prints it must not fail."""
    os.link(forger.record_file(), os.fsencode(forger.path / "commits") + b"/\xff\xfe.json")


def record_of_a_name_that_steers_the_terminal(forger: Forger) -> None:
    """A commit record's file name holds escape codes and a second line: printed as it is, it says what it likes."""
    os.link(forger.record_file(), forger.path / "commits/\x1b[2J\x1b]0;owned\x07\na: fine.json")

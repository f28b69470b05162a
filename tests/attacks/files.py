"""Other things in the place of files: pipes, folders, devices, links."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from attacks.forger import STATES, Forger


def _root(forger: Forger) -> Path:
    return forger.path / "zarr.json"


def _pipe(file: Path) -> None:
    file.unlink()
    os.mkfifo(file)


def _folder(file: Path) -> None:
    file.unlink()
    file.mkdir()


def _endless(file: Path) -> None:
    file.unlink()
    file.symlink_to("/dev/zero")


def root_is_a_pipe(forger: Forger) -> None:
    """A pipe that no one writes to: opening it would wait for ever."""
    _pipe(_root(forger))


def record_is_a_pipe(forger: Forger) -> None:
    """The same for a commit record."""
    _pipe(forger.record_file())


def metadata_is_a_pipe(forger: Forger) -> None:
    """The same for an array's metadata."""
    _pipe(forger.array(STATES) / "zarr.json")


def shard_is_a_pipe(forger: Forger) -> None:
    """The same for a shard."""
    _pipe(forger.shard_file(STATES))


def group_is_a_pipe(forger: Forger) -> None:
    """The same for a group's metadata, which only verify reads."""
    _pipe(forger.array("states") / "zarr.json")


def root_is_a_folder(forger: Forger) -> None:
    """A folder in place of the root."""
    _folder(_root(forger))


def record_is_a_folder(forger: Forger) -> None:
    """A folder in place of a commit record."""
    _folder(forger.record_file())


def metadata_is_a_folder(forger: Forger) -> None:
    """A folder in place of an array's metadata."""
    _folder(forger.array(STATES) / "zarr.json")


def shard_is_a_folder(forger: Forger) -> None:
    """A folder in place of a shard."""
    _folder(forger.shard_file(STATES))


def segment_is_a_file(forger: Forger) -> None:
    """A file in place of a segment's folder."""
    shutil.rmtree(forger.path / "segments/a")
    (forger.path / "segments/a").write_bytes(b"")


def commits_is_a_file(forger: Forger) -> None:
    """A file in place of the folder of the commit records."""
    shutil.rmtree(forger.path / "commits")
    (forger.path / "commits").write_bytes(b"")


def root_is_a_device(forger: Forger) -> None:
    """A link to a device that never ends."""
    _endless(_root(forger))


def record_is_a_device(forger: Forger) -> None:
    """The same for a commit record."""
    _endless(forger.record_file())


def metadata_is_a_device(forger: Forger) -> None:
    """The same for an array's metadata."""
    _endless(forger.array(STATES) / "zarr.json")


def shard_is_a_device(forger: Forger) -> None:
    """The same for a shard."""
    _endless(forger.shard_file(STATES))


def record_is_a_link_to_itself(forger: Forger) -> None:
    """A link that leads nowhere else."""
    forger.record_file().unlink()
    forger.record_file().symlink_to("a.json")


def shard_is_a_link_to_itself(forger: Forger) -> None:
    """The same for a shard."""
    file = forger.shard_file(STATES)
    file.unlink()
    file.symlink_to(file.name)


def record_is_a_link_to_another_file(forger: Forger) -> None:
    """A link to a file outside: an error must not show what is in it."""
    forger.record_file().unlink()
    forger.record_file().symlink_to(forger.outside / "secret")


def root_is_a_link_to_another_file(forger: Forger) -> None:
    """The same for the root."""
    _root(forger).unlink()
    _root(forger).symlink_to(forger.outside / "secret")


def shard_is_a_link_to_another_file(forger: Forger) -> None:
    """The same for a shard."""
    file = forger.shard_file(STATES)
    file.unlink()
    file.symlink_to(forger.outside / "secret")


def folder_is_a_link_in_a_circle(forger: Forger) -> None:
    """A link within a segment to the segment: a walk through all folders does not end."""
    (forger.path / "segments/a/states/again").symlink_to("../..")
    file = forger.shard_file(STATES)
    file.unlink()

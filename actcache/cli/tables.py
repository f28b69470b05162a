"""Tables of cells, in and out of files."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from actcache.cli.terminal import one_line
from actcache.errors import IncompatibleError, InputError
from actcache.files import no_file, write_atomically
from actcache.sealed import NoSealError, Sealed, parquet_bytes, read_parquet
from actcache.study.run_folder import RunFolder

if TYPE_CHECKING:
    from actcache.store import Store


def read_cells(path: Path) -> Sealed:
    """The table of cells in a file, whoever made it; one that has a seal is checked.

    Raises:
        InputError: there is no such file, or it is not a Parquet table.
        CorruptFileError: it is damaged.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    if not path.is_file():
        raise InputError(f"{no_file(path, 'table of cells')}; 'actcache grid RUN' makes one")
    try:
        return read_parquet(path, "a table of cells", "make it again, with 'actcache grid RUN' say")
    except NoSealError:
        data = path.read_bytes()
    try:
        return Sealed(pq.read_table(pa.BufferReader(data)), {}, hashlib.sha256(data).hexdigest())
    except pa.ArrowException as error:
        raise InputError(f"{path} is not a Parquet table: {one_line(error)}") from error


def read_run_cells(folder: RunFolder, store: Store) -> Sealed:
    """The cells of a run, whose store this is.

    Raises:
        InputError: there are none, or an earlier version's, which have no seal.
        IncompatibleError: they are of another store, or of other events than it holds.
        CorruptFileError: the table is damaged.
    """
    from actcache.study.cells import identity

    again = f"'actcache grid {folder.path}' makes it again"
    try:
        found = read_parquet(folder.cells, "a table of cells", again)
    except FileNotFoundError as error:
        raise InputError(f"{folder.cells}: no such table of cells; 'actcache grid RUN' makes one") from error
    for field, value in identity(store).items():
        if found.made_from.get(field) != value:
            raise IncompatibleError(
                f"{folder.cells} was made from another store, or other events, than {store.path} holds; {again}",
                field=field,
            )
    return found


def write_parquet(path: Path, table: Any, made_from: dict[str, Any]) -> None:
    """Write a sealed table as the old whole or the new whole."""
    write_atomically(path, parquet_bytes(table, made_from))

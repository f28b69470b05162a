"""Tables of cells, in and out of files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from actcache.cli.terminal import one_line
from actcache.errors import InputError
from actcache.files import write_atomically


def read_cells(path: Path) -> Any:
    """The table of cells in a file.

    Raises:
        InputError: there is no such file, or it is not a Parquet table.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    if not path.is_file():
        raise InputError(f"{path}: no such table of cells; 'actcache grid RUN' makes one")
    try:
        return pq.read_table(path)
    except pa.ArrowInvalid as error:
        raise InputError(f"{path} is not a Parquet table: {one_line(error)}") from error


def write_parquet(path: Path, table: Any) -> None:
    """Write a table as the old whole or the new whole."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    write_atomically(path, sink.getvalue())

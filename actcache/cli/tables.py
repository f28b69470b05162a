"""Tables of cells, in and out of files."""

from __future__ import annotations

import hashlib
from pathlib import Path

from actcache.cli.terminal import one_line
from actcache.errors import InputError
from actcache.files import no_file
from actcache.sealed import NoSealError, Sealed, read_parquet


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
        table = pq.ParquetFile(pa.BufferReader(data)).read(use_threads=False)  # as sealed tables are
        return Sealed(table, {}, hashlib.sha256(data).hexdigest())
    except pa.ArrowException as error:
        raise InputError(f"{path} is not a Parquet table: {one_line(error)}") from error

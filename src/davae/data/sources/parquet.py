"""Parquet and Arrow files from outside: what one unpacks to is counted before it is read."""

import os
import struct
from pathlib import Path
from typing import Any, BinaryIO

from davae.errors import DavaeError
from davae.runtime.text_files import open_regular

_MOST_UNPACKED, _MOST_TIMES = 2**30, 200
"""A file that unpacks to more bytes, and to so many times its own, is no table of pictures or captions."""
_AT_ONCE = 2**26
_sound: set[tuple[str, int, int]] = set()  # path, size and time of files that were counted


def open_parquet(file: Path) -> Any:
    """A ``pyarrow.parquet.ParquetFile`` that does not unpack to absurdly more than its size.

    What pages unpack to stands in the file's metadata. What dictionaries and shared beginnings of values become does
    not: columns that could exceed the limit by them are read once, a few rows at a time, and counted.

    Raises:
        DavaeError: it is no regular file, or perhaps a decompression bomb.
        OSError, pyarrow.ArrowException: it cannot be read, or is damaged.
    """
    import pyarrow.parquet

    with open_regular(file) as opened:  # no pipe, which would be waited for
        size = opened.seek(0, 2)
        seen = (os.path.abspath(file), size, os.fstat(opened.fileno()).st_mtime_ns)
        table = pyarrow.parquet.ParquetFile(file)
        if seen in _sound:
            return table
        about = table.metadata
        most = max(_MOST_UNPACKED, _MOST_TIMES * size)
        unpacked = 0
        columns = []
        for column in range(about.num_columns):
            chunks = [about.row_group(group).column(column) for group in range(about.num_row_groups)]
            unpacked += sum(chunk.total_uncompressed_size + 8 * chunk.num_values for chunk in chunks)
            largest = [_largest(chunk, opened) for chunk in chunks]
            bound = sum(chunk.num_values * value for chunk, value in zip(chunks, largest, strict=True))
            columns.append((bound, max(largest, default=0), about.schema.column(column).path))
    counted = 0
    for bound, value, path in sorted(columns):
        counted += bound
        if unpacked > most:
            break
        if counted <= most // 2:
            continue
        rows = max(1, min(65_536, _AT_ONCE // max(value, 1)))
        for batch in table.iter_batches(batch_size=rows, columns=[path]):
            unpacked += batch.nbytes
            if unpacked > most:
                break
    if unpacked > most:
        raise DavaeError(f"{file} unpacks from {size:,} to {unpacked:,} bytes or more, perhaps a decompression bomb")
    _sound.add(seen)
    return table


def check_arrow(file: Path) -> None:
    """Check an Arrow file (stream format): pyarrow itself trusts its offsets, which may lead anywhere in memory.

    Compressed buffers and dictionaries, which unpack to any size, are refused; ``datasets`` writes neither.

    Raises:
        DavaeError: it has some, or is no regular file.
        OSError, pyarrow.ArrowException, struct.error: it cannot be read, or is damaged.
    """
    import pyarrow

    schema = None
    with open_regular(file), pyarrow.memory_map(str(file)) as stream:
        for message in pyarrow.ipc.MessageReader.open_stream(stream):
            if message.type == "schema":
                schema = pyarrow.ipc.read_schema(message)
                continue
            data = memoryview(message.metadata)
            header = _follow(data, _field(data, _follow(data, 0), 2))
            if message.type == "dictionary" or _field(data, header, 3):  # the field of a batch's compression
                raise DavaeError(f"{file} has compressed buffers or dictionaries, perhaps a bomb: save it as parquet")
            for column in pyarrow.ipc.read_record_batch(message, schema).columns:
                (column.view("binary") if column.type == "string" else column).validate(full=True)


def _field(data: memoryview, table: int, number: int) -> int:
    """Where a field of a table lies in a FlatBuffer; 0 if it is absent."""
    fields = table - struct.unpack_from("<i", data, table)[0]
    (size,) = struct.unpack_from("<H", data, fields)
    offset = struct.unpack_from("<H", data, fields + 4 + 2 * number)[0] if 4 + 2 * number < size else 0
    return table + offset if offset else 0


def _follow(data: memoryview, at: int) -> int:
    return at + int(struct.unpack_from("<I", data, at)[0])


def rows_of(table: Any) -> list[dict[str, Any]]:
    """The rows of a table or batch of pyarrow; a column with text that is not UTF-8 as bytes."""
    import pyarrow

    columns = {}
    for name in table.schema.names:
        try:
            columns[name] = table[name].to_pylist()
        except UnicodeDecodeError:
            columns[name] = table[name].cast(pyarrow.large_binary()).to_pylist()
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def _largest(chunk: Any, file: BinaryIO) -> int:
    """The most bytes that a value can have without having them in its page."""
    if chunk.physical_type not in ("BYTE_ARRAY", "FIXED_LEN_BYTE_ARRAY"):
        return 0
    if "DELTA_BYTE_ARRAY" in chunk.encodings:
        return int(chunk.total_uncompressed_size)
    if not chunk.has_dictionary_page:
        return 0
    file.seek(chunk.dictionary_page_offset)
    size = _page_size(file.read(16))
    return int(chunk.total_uncompressed_size if size is None else min(size, chunk.total_uncompressed_size))


def _page_size(header: bytes) -> int | None:
    """Unpacked size of a page by its header (Thrift's compact protocol); ``None`` where that begins otherwise.

    Its first two fields are the page's type and that size: each a byte 0x15, then a zigzag number in groups of 7 bits.
    """
    value = at = 0
    for _ in range(2):
        if header[at : at + 1] != b"\x15":
            return None
        value = shift = 0
        more = True
        while more:
            at += 1
            if at >= len(header):
                return None
            value |= (header[at] & 0x7F) << shift
            shift, more = shift + 7, header[at] >= 0x80
        at += 1
    return value >> 1

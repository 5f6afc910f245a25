"""Rows of Parquet and Arrow files as plain data, a few at a time. It knows columns, not conversations.

Of Parquet a few rows of one row group are in memory, of Arrow one record batch, as large as its writer made it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from typing import Any, BinaryIO, Literal

from monitor.errors import ConfigurationError

__all__ = ["TableKind", "rows", "table_kind"]

TableKind = Literal["Parquet", "Arrow file", "Arrow stream"]
_ROWS = 16  # at a time: large enough to be quick, small enough for rows of megabytes
_READ = 1 << 16  # bytes of one column at a time; without it, and with pre-buffering, whole column chunks are loaded
_MAGIC: dict[bytes, TableKind] = {b"PAR1": "Parquet", b"ARROW1": "Arrow file", b"\xff\xff\xff\xff": "Arrow stream"}


def table_kind(head: bytes) -> TableKind | None:
    """Which table format a file that begins with these bytes is in."""
    return next((kind for magic, kind in _MAGIC.items() if head.startswith(magic)), None)


def rows(
    kind: TableKind, file: BinaryIO, fields: Collection[str], needed: Collection[str], limit: int
) -> Iterator[dict[str, Any] | str]:
    """Each row with those of its columns that are in `fields`, or why it can't be read; in the order of the file.

    `file` must be seekable, an Arrow stream aside. A row of more than `limit` bytes is not unfolded.

    Raises:
        ConfigurationError: pyarrow is not installed.
        ValueError, OSError: the file is damaged here, and the rows before it have come; or none of `needed` is there.
    """
    try:
        import pyarrow as arrow
    except ImportError as error:
        raise ConfigurationError(
            "reading Parquet and Arrow files needs pyarrow", cure="pip install 'anchorwatch[audit]'"
        ) from error
    try:
        for batch in _batches(kind, file, fields, needed):
            _check(batch)
            for number in range(batch.num_rows):
                yield _row(batch.slice(number, 1), limit)
    except arrow.ArrowException as error:  # most are ValueErrors or OSErrors already
        raise ValueError(f"damaged {kind} data ({type(error).__name__})") from None


def _batches(kind: TableKind, file: BinaryIO, fields: Collection[str], needed: Collection[str]) -> Iterator[Any]:
    from pyarrow import RecordBatch, ipc, parquet

    if kind == "Parquet":
        table = parquet.ParquetFile(file, buffer_size=_READ, pre_buffer=False)
        wanted = _wanted(table.schema_arrow.names, fields, needed)
        yield from map(_microseconds, table.iter_batches(_ROWS, columns=wanted, use_threads=False))
        return
    batches: Iterable[Any]
    if kind == "Arrow file":
        reader = ipc.open_file(file)
        batches = map(reader.get_batch, range(reader.num_record_batches))
    else:
        reader = batches = ipc.open_stream(file)
    wanted = _wanted(reader.schema.names, fields, needed)
    for batch in batches:
        columns = [batch.column(reader.schema.names.index(name)) for name in wanted]
        yield _microseconds(RecordBatch.from_arrays(columns, names=wanted))


def _wanted(names: list[str], fields: Collection[str], needed: Collection[str]) -> list[str]:
    if not set(names) & set(needed):
        raise ValueError(f"none of its columns holds conversations: it would be named {', '.join(needed)}")
    return [name for name in dict.fromkeys(names) if name in fields]


def _microseconds(batch: Any) -> Any:
    """The batch with times that fit Python's: pandas writes nanoseconds."""
    from pyarrow import RecordBatch, timestamp, types

    columns = [
        column.cast(timestamp("us", column.type.tz), safe=False) if types.is_timestamp(column.type) else column
        for column in batch.columns
    ]
    return RecordBatch.from_arrays(columns, names=batch.schema.names)


def _check(batch: Any) -> None:
    """Raises where unfolding the batch would read outside of its memory: offsets in a file may point anywhere.

    Text that is not UTF-8 is left to the row that it stands in.
    """
    from pyarrow import ArrowInvalid

    for column in batch.columns:
        try:
            column.validate(full=True)
        except ArrowInvalid:
            column.view(_bytes_for_text(column.type)).validate(full=True)


def _bytes_for_text(kind: Any) -> Any:
    """The type with bytes wherever it has text, in lists and structs, too."""
    import pyarrow as arrow

    if arrow.types.is_string(kind):
        return arrow.binary()
    if arrow.types.is_large_string(kind):
        return arrow.large_binary()
    if arrow.types.is_struct(kind):
        return arrow.struct([field.with_type(_bytes_for_text(field.type)) for field in kind])
    if arrow.types.is_list(kind) or arrow.types.is_large_list(kind):
        lists = arrow.list_ if arrow.types.is_list(kind) else arrow.large_list
        return lists(kind.value_field.with_type(_bytes_for_text(kind.value_type)))
    return kind


def _row(row: Any, limit: int) -> dict[str, Any] | str:
    if row.nbytes > limit:
        return f"longer than {limit} bytes"
    try:
        (plain,) = row.to_pylist()
    except UnicodeDecodeError:
        return "not UTF-8"
    except (ValueError, OverflowError) as error:
        return f"a value that has no plain form: {type(error).__name__}"
    return dict(plain)

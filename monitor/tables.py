"""The tables of an audit: their columns, how they are written, and how responses are read back from them.

It knows names, types and meanings of columns, Parquet and JSON lines. It does not know how a verdict comes about.

Rows go out in row groups, so memory does not grow with the log; every file has a temporary name until all are whole.
A row of `turns` holds every field of its `Projection` under the contract's own name, so a `turns` file is also a dump
of projections: it can be audited again, and JSON lines of it can be read as projections by anything that ignores fields
it does not know.
"""

from __future__ import annotations

import errno
import gzip
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, Literal, NamedTuple, TypeAlias

import msgspec

from monitor.errors import ConfigurationError, EventError
from monitor.events import Projection, decode_projection

__all__ = [
    "COLUMNS",
    "LARGEST_INTEGER",
    "Column",
    "Format",
    "Row",
    "Tables",
    "is_parquet",
    "needs",
    "parquet",
    "projection_of",
    "read_lines",
    "read_rows",
    "read_turns",
    "writable",
]

Format: TypeAlias = Literal["parquet", "jsonl"]
Row: TypeAlias = dict[str, Any]

ROW_GROUP = 5_000
LARGEST_LINE = 4 << 20  # bytes; a projection with every field at its limit takes a tenth of that
LARGEST_INTEGER = 2**63 - 1
_PARQUET = b"PAR1"
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class Column(NamedTuple):
    """One column: Parquet and JSON lines have the same. `optional` ones may be null."""

    name: str
    type: str
    meaning: str
    optional: bool = False


_MAP = "map<string, double>"
_FINDING = (
    "list<struct<id: string, kind: string, severity: string, statistic: string, value: double, boundary: double, "
    "risk: double, episode_id: string, nearest_roles: list<string>>>"
)
_EPISODE = (
    "list<struct<id: string, first_turn: int64, last_turn: int64, kind: string, severity: string, recovered: bool>>"
)

COLUMNS: Mapping[str, tuple[Column, ...]] = {
    "turns": (
        Column(
            "conversation_id", "string", "the log's own id; `#2`, `#3` … are added where it has one id several times"
        ),
        Column("turn", "int64", "index of the assistant turn in its conversation, from 0"),
        Column("id", "string", "the response's idempotency key"),
        Column("time", "string", "event time, RFC 3339 in UTC; made up from 1970 on where the log has none"),
        Column("source", "string", "the collector: `anchorwatch/witness`, or whoever wrote the event"),
        Column("model", "string", "the model that the log or the collector names"),
        Column("deployment", "string", "the population it is judged against"),
        Column("axis_id", "string", "id of the axis bundle it was measured with"),
        Column("layer", "int64", "decoder layer it was measured at, from 0"),
        Column("tokens", "int64", "response tokens averaged"),
        Column("held", "double", "share of them that capping moved"),
        Column("projection", "double", "mean over response tokens of the projection on the unit Assistant Axis; raw"),
        Column("coordinates", _MAP, "the response's mean on every measured direction; raw residual units"),
        Column("prompt", _MAP, "the same at the last prompt token"),
        Column("windows", f"struct<lowest: {_MAP}, last: {_MAP}>", "the same over the lowest and last 16-token window"),
        Column("attributes", "map<string, string>", "a few short strings of the collector"),
        Column("version", "string", "version of the events' schema"),
        Column(
            "outcome", "string", "`folded`, or why not: `duplicate`, `branch`, `late`, `unjudged` (axis), `learning`"
        ),
        Column("z", "double", "readout in standard deviations above the population's mean; low is drift", True),
        Column("risk", "double", "largest statistic over its warning boundary: 1 and above warns", True),
        Column("level", "double", "statistic: how low the conversation stands, smoothed; positive is drift", True),
        Column("drop", "double", "statistic: how far it lies below its own start", True),
        Column("cusum", "double", "statistic: what has added up below the mean", True),
        Column("dip", "double", "statistic: how low the lowest window lies", True),
        Column("kind", "string", "what was found at this turn, the last thing of `findings`", True),
        Column("severity", "string", "its severity: `warning`, `critical`, or `info` where it recovered", True),
        Column("findings", _FINDING, "everything that the detector said at this turn, often nothing"),
    ),
    "conversations": (
        Column("conversation_id", "string", "as in `turns`"),
        Column("deployment", "string", "the population it was judged against"),
        Column("model", "string", "the model that the log names"),
        Column("source", "string", "the file or topic it was read from"),
        Column("record", "int64", "line or record of it there, from 1; null for events", True),
        Column("user", "string", "who held it, where the log says so", True),
        Column("time", "string", "event time of the first response", True),
        Column("turns", "int64", "assistant turns, scored or not"),
        Column("scored_turns", "int64", "of those, how many the detector judged"),
        Column(
            "verdict", "string", "`healthy`, `warning` or `critical`: the worst finding; `unscored` if none was judged"
        ),
        Column("kinds", "list<string>", "what was found, each kind once: `low_start`, `sudden_drop` …"),
        Column("risk", "double", "largest risk of its turns, to rank by", True),
        Column("worst_turn", "int64", "the turn that had it", True),
        Column("lowest_z", "double", "least z of its turns", True),
        Column("mean_z", "double", "mean z of its turns", True),
        Column("max_level", "double", "largest level", True),
        Column("max_drop", "double", "largest drop", True),
        Column("max_cusum", "double", "largest CUSUM", True),
        Column("max_dip", "double", "largest dip", True),
        Column("episodes", _EPISODE, "excursions; `last_turn` is where it recovered, else the last one it was open at"),
        Column("nearest_roles", "list<string>", "roles nearest to the worst turn in persona space, nearest first"),
        Column("coordinates", _MAP, "coordinates of the worst turn"),
        Column(
            "baseline",
            "string",
            "whose normal it was judged by: `calibrated`, `parent`, `self`; `learning` if by nobody's",
        ),
        Column("certification", "string", "`certified` or `uncertified`: whether the verdict's budget is, here"),
        Column("budget", "double", "share of healthy conversations that may get this verdict", True),
        Column("config_id", "string", "id of the frozen calibration that judged", True),
        Column("duplicates", "int64", "records seen before, not judged again"),
        Column("branches", "int64", "other responses to a turn that was judged already"),
        Column("late", "int64", "responses that came too late to be judged"),
        Column("skipped", "list<struct<turn: int64, reason: string>>", "turns that were not scored, and why"),
        Column("notes", "list<string>", "what was done to the record to read and score it"),
    ),
    "skipped": (
        Column("source", "string", "the file or topic"),
        Column("record", "int64", "line or record there, from 1; 0 is the whole file"),
        Column("reason", "string", "why it was not audited"),
        Column("conversation_id", "string", "where it is known", True),
        Column("turn", "int64", "the turn, where only that was skipped", True),
    ),
}


def needs(package: str) -> ConfigurationError:
    """The error of a command that lacks a package of the extra."""
    return ConfigurationError(f"this needs {package}, which is not installed", cure="pip install 'anchorwatch[audit]'")


def parquet() -> Any:
    """pyarrow, with its parquet module loaded.

    Raises:
        ConfigurationError: it is not installed.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise needs("pyarrow") from error
    return pyarrow


@contextmanager
def writable(folder: Path, kept: Callable[[], str] = str) -> Iterator[None]:
    """Tell what can't be written, with the cure. `kept` says what is not lost.

    Raises:
        ConfigurationError: in place of any OSError.
    """
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise ConfigurationError(
                f"the disk of {folder} is full: {error.strerror}", cure=f"free space and run it again. {kept()}".strip()
            ) from error
        raise ConfigurationError(
            f"{folder} can't be written: {error.strerror or error}",
            cure=f"give a folder that this user may write to, and that is no file. {kept()}".strip(),
        ) from error


class Tables:
    """The files of one audit in one folder. Nothing has its final name before `commit`.

    Raises:
        ConfigurationError: pyarrow is missing.
        OSError: the folder can't be written; see `writable`.
    """

    def __init__(self, folder: Path, form: Format) -> None:
        self.folder = folder
        self.form = form
        self._partial: dict[str, Path] = {}
        self._rows: dict[str, list[Row]] = {name: [] for name in COLUMNS}
        self._writers: dict[str, _Writer] = {}
        folder.mkdir(parents=True, exist_ok=True)
        try:
            for name in COLUMNS:
                path = self._new(f"{name}.{form}")
                self._writers[name] = _ParquetWriter(path, name) if form == "parquet" else _LinesWriter(path)
        except BaseException:
            self.abandon()
            raise

    def add(self, table: str, row: Row) -> None:
        """One row, with every column of the table."""
        rows = self._rows[table]
        rows.append({column.name: _in_order(row[column.name]) for column in COLUMNS[table]})
        if len(rows) >= ROW_GROUP:
            self._flush(table)

    def turns(self, conversations: Sequence[str]) -> dict[str, list[Row]]:
        """The turns of these conversations, in the order written. Ends the tables: no row may follow."""
        self._end()
        found: dict[str, list[Row]] = {name: [] for name in conversations}
        for row in read_rows(self._partial[f"turns.{self.form}"], found.__contains__):
            found[row["conversation_id"]].append(row)
        return found

    def add_file(self, name: str, content: bytes) -> None:
        """Another file beside the tables."""
        self._new(name).write_bytes(content)

    def commit(self) -> list[Path]:
        """Sync everything and give it its final name; returns the names."""
        self._end()
        for path in self._partial.values():
            with path.open("rb") as file:
                os.fsync(file.fileno())
        for name, path in self._partial.items():
            path.replace(self.folder / name)
        descriptor = os.open(self.folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        return [self.folder / name for name in self._partial]

    def abandon(self) -> None:
        """Remove what is not whole."""
        for writer in self._writers.values():
            writer.abandon()
        self._writers = {}
        for path in self._partial.values():
            path.unlink(missing_ok=True)

    def _new(self, name: str) -> Path:
        path = self.folder / f".{name}.partial"  # one fixed name: killed audits leave no heap behind
        self._partial[name] = path
        return path

    def _flush(self, table: str) -> None:
        if self._rows[table]:
            self._writers[table].write(self._rows[table])
            self._rows[table] = []

    def _end(self) -> None:
        for name, writer in self._writers.items():
            self._flush(name)
            writer.close()
        self._writers = {}


def read_turns(path: Path) -> Iterator[Projection]:
    """The responses of a `turns` file in either format, or of a dump of projections; gzipped or not.

    Raises:
        EventError: a line is no projection; it says which.
        ConfigurationError: the file can't be read, or pyarrow is missing.
    """
    if is_parquet(path):
        for row in read_rows(path):
            yield projection_of(row)
        return
    for number, line in read_lines(path):
        if line is None:
            raise EventError(f"{path}:{number}: the line is too long", cure="give a dump of projections")
        try:
            yield decode_projection(line)
        except EventError as error:
            raise EventError(f"{path}:{number}: {error.problem}", cure=error.cure) from error


def is_parquet(path: Path) -> bool:
    """Whether the file begins as Parquet does.

    Raises:
        ConfigurationError: it can't be read.
    """
    with _readable(path), path.open("rb") as file:
        return file.read(len(_PARQUET)) == _PARQUET


def projection_of(row: Mapping[str, Any]) -> Projection:
    """The response that a row of `turns` was made from; equal to it in every field.

    Raises:
        EventError: the row has no such columns, or their values are no projection's.
    """
    try:
        return msgspec.convert({name: row[name] for name in Projection.__struct_fields__}, Projection)
    except (KeyError, msgspec.ValidationError) as error:
        raise EventError(f"not a row of turns: {error}", cure="give the turns file of an audit") from error


def read_rows(path: Path, wanted: Callable[[str], bool] | None = None) -> Iterator[Row]:
    """Rows of one of our files, in the order written; only those whose `conversation_id` is wanted.

    Raises:
        ConfigurationError: the file can't be read, or pyarrow is missing.
    """
    if not is_parquet(path):
        decoder = msgspec.json.Decoder(dict[str, Any])
        with _readable(path), path.open("rb") as file:
            for line in file:
                row = decoder.decode(line)
                if wanted is None or wanted(row["conversation_id"]):
                    yield row
        return
    arrow = parquet()
    with _readable(path):
        try:
            with arrow.parquet.ParquetFile(path) as file:
                for batch in file.iter_batches(batch_size=ROW_GROUP):
                    if wanted is not None:
                        batch = batch.filter(arrow.array([wanted(name.as_py()) for name in batch["conversation_id"]]))
                    for row in batch.to_pylist(maps_as_pydicts="strict"):
                        yield row
        except (arrow.ArrowException, KeyError) as error:
            raise ConfigurationError(f"{path} can't be read: {error}", cure="give a whole turns file") from error


def read_lines(path: Path, progress: Callable[[int, int], None] | None = None) -> Iterator[tuple[int, bytes | None]]:
    """Line number, from 1, and line of a text file, gzipped or not; None for one over the limit. Blank ones left out.

    Args:
        progress: told of how many bytes of how many have been read from the disk.

    Raises:
        ConfigurationError: the file can't be read.
        EOFError: it is gzipped and cut off; what came before has been given.
    """
    with _readable(path), path.open("rb") as raw:
        zipped = raw.read(2) == b"\x1f\x8b"
        raw.seek(0)
        file: IO[bytes] = gzip.GzipFile(fileobj=raw) if zipped else raw  # type: ignore[assignment]
        number, taken, size = 0, 0, path.stat().st_size
        # What is appended while it is read is left for the next time; else a busy file would have no end.
        while (zipped or taken < size) and (line := file.readline(LARGEST_LINE)):
            number += 1
            taken += len(line)
            if progress is not None and number % 1000 == 0:
                progress(raw.tell(), size)
            if len(line) == LARGEST_LINE and not line.endswith(b"\n"):
                while (rest := file.readline(LARGEST_LINE)) and not rest.endswith(b"\n"):
                    taken += len(rest)
                taken += len(rest)
                yield number, None
            elif line.strip():
                yield number, line
        if progress is not None:
            progress(size, size)


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ConfigurationError(
            f"{path} can't be read: {error.strerror or error}", cure="check the path, its permissions and its disk"
        ) from error


class _LinesWriter:
    """JSON lines, one object a row."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("wb")
        self._encoder = msgspec.json.Encoder()

    def write(self, rows: Sequence[Row]) -> None:
        self._file.write(self._encoder.encode_lines(rows))

    def close(self) -> None:
        self._file.close()

    def abandon(self) -> None:
        _close_quietly(self._file)


class _ParquetWriter:
    """One row group a call."""

    def __init__(self, path: Path, table: str) -> None:
        self._arrow = parquet()
        self._schema = self._arrow.schema(
            [
                self._arrow.field(
                    column.name,
                    arrow_type(self._arrow, column.type),
                    column.optional,
                    {"meaning": column.meaning},
                )
                for column in COLUMNS[table]
            ]
        )
        self._maps = [column.name for column in COLUMNS[table] if column.type.startswith("map<")]
        self._file = path.open("wb")  # a file of Python's, so that its errors are the system's own
        self._writer = self._arrow.parquet.ParquetWriter(self._file, self._schema, compression="zstd")

    def write(self, rows: Sequence[Row]) -> None:
        columns = []
        for field in self._schema:
            values = [row[field.name] for row in rows]
            if field.name in self._maps:
                values = [list(value.items()) for value in values]
            elif field.name == "windows":
                values = [{name: list(window.items()) for name, window in value.items()} for value in values]
            columns.append(self._arrow.array(values, type=field.type))
        self._writer.write_table(self._arrow.Table.from_arrays(columns, schema=self._schema))

    def close(self) -> None:
        self._writer.close()
        self._file.close()

    def abandon(self) -> None:
        with suppress(OSError, self._arrow.ArrowException):
            self._writer.close()
        _close_quietly(self._file)


_Writer: TypeAlias = _LinesWriter | _ParquetWriter


def _in_order(value: Any) -> Any:
    """Maps by their keys, so that equal rows are equal bytes, whoever wrote the event."""
    if not isinstance(value, dict):
        return value
    return {key: _in_order(value[key]) for key in sorted(value)}


def _close_quietly(file: IO[bytes]) -> None:
    with suppress(OSError):
        file.close()  # flushes, which fails again on a full disk


def arrow_type(arrow: Any, text: str) -> Any:
    """The Arrow type that a column's type names: string, int64, double, bool, list<>, map<,>, struct<name: …>."""
    head, _, rest = text.partition("<")
    if not rest:
        return {
            "string": arrow.string(),
            "int64": arrow.int64(),
            "double": arrow.float64(),
            "bool": arrow.bool_(),
        }[head]
    parts = _split_type(rest.removesuffix(">"))
    match head:
        case "list":
            return arrow.list_(arrow_type(arrow, parts[0]))
        case "map":
            return arrow.map_(arrow_type(arrow, parts[0]), arrow_type(arrow, parts[1]))
        case _:
            named = (part.partition(": ") for part in parts)
            return arrow.struct([(name, arrow_type(arrow, kind)) for name, _, kind in named])


def _split_type(text: str) -> list[str]:
    """Cut at the commas that stand in no angle brackets."""
    parts, depth = [""], 0
    for letter in text:
        depth += (letter == "<") - (letter == ">")
        if letter == "," and not depth:
            parts.append("")
        else:
            parts[-1] += letter
    return [part.strip() for part in parts]

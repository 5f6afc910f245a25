"""Recorded responses in log order: a topic from its first record to its end, or a dump of one.

It knows logs, dumps and places in them; nothing of what a response means. A dump is JSON lines of projections, gzipped
or not, or the `turns` file of an audit. A record that is none is handed on with its place, and the next one is read.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from monitor.batch import Poison, decode
from monitor.database import sqlite_path
from monitor.detect.baseline import DetectorConfig
from monitor.errors import ConfigurationError, EventError
from monitor.events import Projection, decode_projection
from monitor.stream import open_log
from monitor.stream.log import PROJECTIONS
from monitor.tables import is_parquet, projection_of, read_lines, read_rows

__all__ = ["Recorded", "bytes_of", "read_events"]

BATCH = 500
TURNS = ("turns.parquet", "turns.jsonl")


class Recorded(NamedTuple):
    """One record: where it lies, and the response in it or why there is none. `record` counts from 1."""

    source: str
    record: int
    event: Projection | Poison


Progress = Callable[[int, int], None]


def read_events(place: str, progress: Progress | None = None) -> Iterator[Recorded]:
    """Everything that one place holds now, in order; what is appended meanwhile is left for the next audit.

    Args:
        place: URL of a log, a dump's path, or the folder of an earlier audit.
        progress: told of how much of how much has been read: records of a topic, bytes of a file.

    Raises:
        ConfigurationError: there is no such log or file, or it can't be read.
        LogError: the log is damaged, or was cut while it was read.
    """
    if "://" in place:
        return _read_topic(place, progress or _nobody)
    return _read_dump(_dump(place), progress or _nobody)


def bytes_of(places: Sequence[str]) -> int | None:
    """How many bytes all dumps have; None where a place is no file."""
    sizes = [None if "://" in place else _dump(place).stat().st_size for place in places]
    return None if None in sizes else sum(size for size in sizes if size is not None)


def _nobody(done: int, total: int) -> None:
    """Told, and tells nobody."""


def _dump(place: str) -> Path:
    path = Path(place).expanduser()
    if path.is_dir():
        for name in TURNS:
            if (path / name).is_file():
                return path / name
        raise ConfigurationError(
            f"{path} is a folder without {' or '.join(TURNS)}",
            cure="give the folder of an earlier audit, a dump of projections, or the URL of a log",
        )
    if not path.is_file():
        raise ConfigurationError(
            f"no file {path}", cure="give a dump of projections, a turns file, or the URL of a log: sqlite:///…"
        )
    return path


def _read_topic(url: str, progress: Progress) -> Iterator[Recorded]:
    if url.startswith("sqlite:") and not sqlite_path(url).is_file():  # opening it would make an empty one
        raise ConfigurationError(f"there is no log at {url}", cure="give the ANCHORWATCH_LOG_URL of the collector")
    log = open_log(url)
    try:
        spans = [log.span(PROJECTIONS, partition) for partition in range(log.partitions(PROJECTIONS))]
        done, total = 0, sum(span.end - span.begin for span in spans)
        for partition, span in enumerate(spans):
            offset = span.begin
            while offset < span.end:
                records = log.read(PROJECTIONS, partition, offset, min(BATCH, span.end - offset))
                if not records:
                    break
                for record in records:
                    event = decode(record)
                    if not isinstance(event, DetectorConfig):  # whoever reads a recording says what judges it
                        # As a person counts: a dead letter's key has the offset itself.
                        yield Recorded(f"{url} {PROJECTIONS}/{partition}", record.offset + 1, event)
                done += len(records)
                offset = records[-1].offset + 1
                progress(done, total)
    finally:
        log.close()


def _read_dump(path: Path, progress: Progress) -> Iterator[Recorded]:
    size = path.stat().st_size
    if is_parquet(path):
        for number, row in enumerate(read_rows(path), 1):
            try:
                yield Recorded(str(path), number, projection_of(row))
            except EventError as error:
                yield Recorded(str(path), number, Poison("undecodable", error.problem))
        progress(size, size)
        return
    number = 0
    try:
        for number, line in read_lines(path, progress):
            yield Recorded(str(path), number, _decode(line))
    except (EOFError, zlib.error):
        yield Recorded(str(path), number + 1, Poison("damaged", "the compressed file is cut off or damaged here"))


def _decode(line: bytes | None) -> Projection | Poison:
    if line is None:
        return Poison("too_long", "the line is too long for a projection")
    try:
        return decode_projection(line)
    except EventError as error:
        return Poison("undecodable", error.problem)

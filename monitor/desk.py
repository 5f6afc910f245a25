"""What commands for people share: the log while it is open, the store told of what was written, and plain lines.

It knows no action by name.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from monitor import connect
from monitor.actions import ActionsFold
from monitor.deadletters import plain
from monitor.errors import AnchorwatchError, ConfigurationError
from monitor.settings import Settings, load_settings
from monitor.stream.log import Log

__all__ = [
    "AsJson",
    "By",
    "Note",
    "Rules",
    "duration",
    "lines",
    "moment",
    "open_log",
    "quietly",
    "rules_file",
    "say",
    "stderr",
    "stdout",
    "taken_in",
]

By = Annotated[str, typer.Option(help="Who you are; it is kept with what you do.")]
Note = Annotated[str, typer.Option(help="Why, up to 1000 characters. No conversation text: it is kept for ever.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output.")]

Rules = Annotated[
    Path | None, typer.Option("--config", help="File of rules and routes. [default: ANCHORWATCH_ALERTS_FILE]")
]

stdout = Console(highlight=False)
stderr = Console(stderr=True, highlight=False)


def say(text: str, to: Console = stdout) -> None:
    """One line, without markup and without control characters, however wide the terminal is."""
    to.print(plain(text), markup=False, soft_wrap=True)


def lines(text: str, indent: int = 8) -> str:
    """Several lines as one text, each without control characters."""
    return ("\n" + " " * indent).join(plain(line) for line in text.split("\n"))


@contextmanager
def open_log() -> Iterator[tuple[Settings, Log]]:
    """The settings, and the log that they name."""
    settings = load_settings()
    log = connect.log(settings)
    try:
        yield settings, log
    finally:
        log.close()


@contextmanager
def quietly() -> Iterator[None]:
    """What was written to the log is safe, whatever the store says."""
    try:
        yield
    except AnchorwatchError as error:
        say(f"note: it is written, and takes effect when a worker and the store run: {error.problem}", stderr)


def taken_in(settings: Settings, log: Log) -> None:
    """Take what was written into the store at once, where it answers. Else a worker does, as soon as it runs."""
    with quietly():
        store = connect.store(settings)
        try:
            while ActionsFold(log, store).run_once():
                pass
        finally:
            store.close()


def duration(text: str) -> timedelta:
    """How long.

    Raises:
        ConfigurationError: it is none.
    """
    found = re.fullmatch(r"(\d{1,5})([mhd])", text)
    if found is None or not int(found[1]):
        raise ConfigurationError(f"{text!r} is no length of time", cure="write it as 30m, 12h or 7d")
    return int(found[1]) * {"m": timedelta(minutes=1), "h": timedelta(hours=1), "d": timedelta(days=1)}[found[2]]


def moment(time: datetime) -> str:
    """As actions have it."""
    return time.isoformat(timespec="seconds").replace("+00:00", "Z")


def rules_file(given: Path | None) -> Path:
    """The file of rules that is meant.

    Raises:
        ConfigurationError: none is.
    """
    path = given or load_settings().alerts_file
    if path is None:
        raise ConfigurationError("no file of rules is named", cure="name one, or set ANCHORWATCH_ALERTS_FILE")
    return path

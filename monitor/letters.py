"""The commands of the dead letters: list, show and requeue.

Thin: each reads the settings, does one thing and says what happened. A letter's content is shown on demand only, and
nothing is printed with its control characters.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import msgspec
import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from monitor import connect
from monitor.deadletters import DeadLetter, find_letter, newest_letters, plain, requeue
from monitor.errors import ConfigurationError
from monitor.settings import load_settings
from monitor.stream.log import Log

__all__ = ["letters_app"]

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output.")]

letters_app = typer.Typer(help="What could not be folded: list, show, requeue.", no_args_is_help=True)
_stdout = Console(highlight=False)
_stderr = Console(stderr=True, highlight=False)


@letters_app.command("list")
def letters_list(
    reason: Annotated[str | None, typer.Option(help="Only those of this reason.")] = None,
    limit: Annotated[int, typer.Option(min=1, help="At most so many, the newest.")] = 50,
    as_json: AsJson = False,
) -> None:
    """List the newest dead letters: where each lay, why it could not be folded, and whether it was sent again."""
    with _log() as log:
        letters = newest_letters(log, limit, wanted=lambda one: reason in (None, one.reason))
    reasons = Counter(letter.reason for letter in letters)
    if as_json:
        print(json.dumps({"letters": [_facts(letter) for letter in letters], "reasons": dict(reasons)}))
        return
    table = Table(box=None, pad_edge=False)
    table.add_column("letter", no_wrap=True, overflow="ignore")  # whole, however narrow: it is there to be copied
    for column in ("reason", "bytes", "key", "sent again"):
        table.add_column(column, overflow="fold", justify="right" if column == "bytes" else "left")
    for letter in letters:
        mark = letter.requeued
        again = "" if mark is None else plain(f"{mark.time} by {mark.by}")
        row = [plain(letter.id), plain(letter.reason), f"{len(letter.value):,}", plain(letter.key), again]
        table.add_row(*(escape(cell) for cell in row))
    if letters:
        _stdout.print(table)
    told = ", ".join(f"{count} {plain(name)}" for name, count in reasons.most_common())
    _stderr.print(f"The newest {len(letters)}: {told}" if letters else "There are none.", markup=False)


@letters_app.command("show")
def letters_show(
    letter: Annotated[str, typer.Argument(help="topic/partition/offset, as `dead-letters list` has it.")],
    raw: Annotated[
        bool,
        typer.Option("--raw", help="Also the detail and the bytes, escaped: they may hold content."),
    ] = False,
    out: Annotated[Path | None, typer.Option(help="Write the bytes, as they are, into this new file.")] = None,
    as_json: AsJson = False,
) -> None:
    """Show one dead letter: its place, reason, size and digest. Its content only with --raw or --out."""
    with _log() as log:
        found = find_letter(log, letter)
    if found is None:
        raise ConfigurationError(
            f"there is no dead letter {plain(letter)}",
            cure="see `anchorwatch dead-letters list`; retention may have taken it",
        )
    facts = {**_facts(found), "sha256": hashlib.sha256(found.value).hexdigest()}
    if raw:
        facts |= {"detail": found.detail, "value": found.value.decode("utf-8", "backslashreplace")}
    if out is not None:
        try:
            with os.fdopen(os.open(out, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
                file.write(found.value)
        except OSError as error:
            raise ConfigurationError(f"{out} can't be made: {error.strerror}", cure="name a new file") from error
    if as_json:
        print(json.dumps(facts))
    else:
        for name, value in facts.items():
            _stdout.print(f"{name}: {plain(str(value))}", markup=False, soft_wrap=True)


@letters_app.command("requeue")
def letters_requeue(
    by: Annotated[str, typer.Option(help="Who you are; it is kept with the letters.")],
    letters: Annotated[
        list[str] | None, typer.Argument(help="topic/partition/offset, as `dead-letters list` has them.")
    ] = None,
    reason: Annotated[str | None, typer.Option(help="All of this reason, the newest --limit of them.")] = None,
    limit: Annotated[int, typer.Option(min=1, help="With --reason, at most so many.")] = 1000,
    again: Annotated[bool, typer.Option("--again", help="Also those that somebody has sent again already.")] = False,
    as_json: AsJson = False,
) -> None:
    """Append the original bytes under their original key to their topic again, once the cause is gone.

    They are judged as if they had come now: later responses of their conversation have been folded by then. Exits 1 if
    one is refused.
    """
    if bool(letters) == (reason is not None):
        raise ConfigurationError("it is not clear what to send again", cure="name letters, or give --reason")
    with _log() as log:
        if reason is not None:
            chosen = newest_letters(
                log, limit, wanted=lambda one: one.reason == reason and (again or one.requeued is None)
            )
        else:
            found = {id: find_letter(log, id) for id in letters or []}
            if missing := [id for id, letter in found.items() if letter is None]:
                raise ConfigurationError(
                    f"there is no dead letter {', '.join(map(plain, missing))}; nothing was sent",
                    cure="see `anchorwatch dead-letters list`",
                )
            chosen = [letter for letter in found.values() if letter is not None]
        gone, refused = requeue(log, chosen, by=by, again=again)
    if as_json:
        print(json.dumps({"requeued": gone, "refused": {one.id: one.why for one in refused}}))
    else:
        for one in refused:
            _stderr.print(f"refused {plain(one.id)}: {plain(one.why)}", markup=False, soft_wrap=True)
        if not chosen:
            _stderr.print("None is like that: see `anchorwatch dead-letters list`.", markup=False)
        _stdout.print(f"Sent again: {len(gone)}. Refused: {len(refused)}.")
    if refused:
        raise typer.Exit(1)


def _facts(letter: DeadLetter) -> dict[str, object]:
    """What may be shown of a letter: nothing of its content."""
    return {
        "letter": letter.id,
        "topic": letter.topic,
        "partition": letter.partition,
        "offset": letter.offset,
        "key": letter.key,
        "reason": letter.reason,
        "bytes": len(letter.value),
        "requeued": None if letter.requeued is None else msgspec.to_builtins(letter.requeued),
    }


@contextmanager
def _log() -> Iterator[Log]:
    log = connect.log(load_settings())
    try:
        yield log
    finally:
        log.close()

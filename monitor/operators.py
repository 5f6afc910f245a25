"""The commands of whoever is on call: doctor, forget, acknowledge, verdict, silence and calibration.

Thin: each reads the settings, does one thing and says what happened. What comes from outside is printed without its
control characters.
"""

from __future__ import annotations

import csv
import json
import re
import secrets
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any, Literal, get_args

import msgspec
import typer
from rich.console import Console

from monitor import connect
from monitor.actions import (
    Acknowledgement,
    ActionsFold,
    Silence,
    Verdict,
    activate_calibration,
    append_action,
    body_of,
    due,
    read_actions,
    recorded_calibrations,
    withdraw,
)
from monitor.actions import forget as ask_to_forget
from monitor.deadletters import plain
from monitor.detect.baseline import DetectorConfig
from monitor.doctor import Check, examine
from monitor.errors import AnchorwatchError, ConfigurationError
from monitor.events import Kind
from monitor.letters import letters_app
from monitor.settings import Settings, load_settings
from monitor.stream.log import PROJECTIONS, Log

__all__ = ["mount"]

By = Annotated[str, typer.Option(help="Who you are; it is kept with what you do.")]
Note = Annotated[str, typer.Option(help="Why, up to 1000 characters. No conversation text: it is kept for ever.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output.")]
Withdraw = Annotated[bool, typer.Option("--withdraw", help="Take it back.")]

FINDINGS_LOOKED_AT = 5000

_stdout = Console(highlight=False)
_stderr = Console(stderr=True, highlight=False)
_silences = typer.Typer(help="Tell nobody of some findings for a while.", no_args_is_help=True)
_calibration = typer.Typer(help="The calibration in force: show, activate.", no_args_is_help=True)


def mount(app: typer.Typer) -> None:
    """Give the operators' commands to the command line."""
    app.command()(doctor)
    app.command()(forget)
    app.command()(acknowledge)
    app.command()(verdict)
    app.command()(verdicts)
    app.add_typer(_silences, name="silence")
    app.add_typer(letters_app, name="dead-letters")
    app.add_typer(_calibration, name="calibration")


# The doctor.


def doctor(
    bundle: Annotated[
        str, typer.Option("--bundle", help="What the workers are given: a bundle's name or folder, or a calibration.")
    ] = "smollm2",
    patience: Annotated[
        float, typer.Option(min=0.0, help="Seconds to watch whether a partition that lags moves.")
    ] = 3.0,
    as_json: AsJson = False,
) -> None:
    """Check every connection, topic, bundle and setting, and say the cure. Exits 1 if something is broken.

    It only looks: run it at any time, on any machine that has the settings.
    """
    checks: list[Check] = []
    colours = {"ok": "green", "advice": "yellow", "broken": "red"}

    def found(check: Check) -> None:
        checks.append(check)
        if not as_json:
            _stdout.print(f"[{colours[check.status]}]{check.status:6}[/]", end="  ")
            _stdout.print(_lines(f"{check.name}: {check.says}"), markup=False, soft_wrap=True)
            if check.cure:
                _stdout.print(_lines(f"        cure: {check.cure}"), markup=False, soft_wrap=True)

    try:
        settings = load_settings()
    except ConfigurationError as error:
        found(Check("settings", "broken", error.problem, error.cure))
    else:
        found(Check("settings", "ok", "every ANCHORWATCH_ variable is a setting, and every value will do"))
        for check in examine(settings, bundle, patience=patience):
            found(check)
    worst = next((status for status in ("broken", "advice") if any(check.status == status for check in checks)), "ok")
    if as_json:
        print(json.dumps({"status": worst, "checks": msgspec.to_builtins(checks)}))
    if worst == "broken":
        raise typer.Exit(1)


# Conversations and findings.


def forget(
    conversation: Annotated[str, typer.Argument(help="The conversation's id.")],
    by: By,
    as_json: AsJson = False,
) -> None:
    """Delete all that the store keeps of a conversation, for good: a store that is rebuilt forgets it again.

    It holds for what has been logged up to now; what comes later begins anew. The log itself keeps its records until
    its retention ends.
    """
    with _log() as (settings, log):
        known = _is_kept(settings, conversation)
        place = ask_to_forget(log, conversation, by=by)
        _taken_in(settings, log)
        left = _still_due(settings, conversation)
    if as_json:
        print(json.dumps({"conversation": conversation, "done": left is False, **msgspec.to_builtins(place)}))
    elif left is False and known is False:
        _stdout.print(
            f"Nothing was kept of {conversation!r}: check the id. What the log may hold of it up to here is forgotten.",
            markup=False,
            soft_wrap=True,
        )
    elif left is False:
        _stdout.print("Forgotten. The log keeps its records until its retention ends.", markup=False)
    else:
        _stdout.print(
            f"Written. It is deleted once partition {place.partition} has been folded up to {place.offset}; "
            "a running worker sees to that.",
            markup=False,
        )


def acknowledge(
    finding: Annotated[str, typer.Argument(help="The finding's id, as the alert has it.")],
    by: By,
    note: Note = "",
    take_back: Withdraw = False,
) -> None:
    """Say that you have seen a finding: nobody is told of it again. What its episode brings next is told."""
    with _log() as (settings, log):
        if take_back:
            withdraw(log, "acknowledge", [finding])
        else:
            append_action(log, "acknowledge", finding, Acknowledgement(note), by=by)
        _taken_in(settings, log)
        with _quietly():
            store = connect.store(settings)
            try:
                if all(one.id != finding for one in store.findings(FINDINGS_LOOKED_AT)):
                    _stderr.print(f"note: none of the newest {FINDINGS_LOOKED_AT} findings has this id", markup=False)
            finally:
                store.close()
    _stdout.print("Withdrawn." if take_back else "Acknowledged.")


def verdict(
    conversation: Annotated[str, typer.Argument(help="The conversation's id.")],
    label: Annotated[Literal["drifting", "healthy", "unsure"], typer.Argument(help="What you found it to be.")],
    by: By,
    turn: Annotated[int | None, typer.Option(min=0, help="Where drift began: the reply's index, from 0.")] = None,
    note: Note = "",
    take_back: Withdraw = False,
) -> None:
    """Keep what you found a conversation to be. `anchorwatch verdicts` prints them all, for `anchorwatch backtest`."""
    if turn is not None and label != "drifting":
        raise ConfigurationError(f"a conversation that is {label} began to drift nowhere", cure="leave --turn out")
    with _log() as (settings, log):
        if take_back:
            withdraw(log, "verdict", [conversation])
        else:
            append_action(log, "verdict", conversation, Verdict(label, turn, note), by=by)
        _taken_in(settings, log)
    _stdout.print("Withdrawn." if take_back else "Kept.")


def verdicts() -> None:
    """Print all verdicts as CSV: what `anchorwatch backtest --verdicts` reads."""
    with _log() as (_, log):
        actions = read_actions(log)
    out = csv.writer(sys.stdout, lineterminator="\n")
    out.writerow(["conversation_id", "label", "turn"])
    for key, value in sorted(actions.items()):
        if key.startswith("verdict/"):
            body = body_of(key, value)
            assert isinstance(body, Verdict)
            out.writerow([key.removeprefix("verdict/"), body.label, "" if body.turn is None else body.turn])


# Silences.


@_silences.command("add")
def silence_add(
    by: By,
    lasts: Annotated[str, typer.Option("--for", help="How long: 30m, 12h, 7d.")],
    deployment: Annotated[str | None, typer.Option(help="Findings of this deployment.")] = None,
    conversation: Annotated[str | None, typer.Option(help="Findings of this conversation.")] = None,
    kind: Annotated[str | None, typer.Option(help="Findings of this kind, such as dip.")] = None,
    everything: Annotated[bool, typer.Option("--everything", help="All findings.")] = False,
    note: Note = "",
) -> None:
    """Tell nobody of findings that match all that is given. They are kept; what is open afterwards is told then."""
    if everything == any(given is not None for given in (deployment, conversation, kind)):
        raise ConfigurationError(
            "it is not clear what to silence",
            cure="give --deployment, --conversation or --kind, or --everything and none of them",
        )
    if kind is not None and kind not in get_args(Kind):
        raise ConfigurationError(f"no finding is of kind {kind!r}", cure=f"give one of {', '.join(get_args(Kind))}")
    until = _moment(datetime.now(UTC) + _duration(lasts))
    name = secrets.token_hex(4)
    with _log() as (settings, log):
        append_action(log, "silence", name, Silence(until, deployment, conversation, kind, note), by=by)
        _taken_in(settings, log)
    _stderr.print(f"Silent until {until}. To end it: anchorwatch silence end {name}", markup=False)
    print(name)


@_silences.command("list")
def silence_list(as_json: AsJson = False) -> None:
    """List the silences that are in force."""
    now = _moment(datetime.now(UTC))
    with _log() as (_, log):
        actions = read_actions(log)
    found = {}
    for key, value in sorted(actions.items()):
        if key.startswith("silence/"):
            body = body_of(key, value)
            assert isinstance(body, Silence)
            if body.until > now:
                found[key.removeprefix("silence/")] = {
                    **msgspec.json.decode(value)["body"],
                    "by": msgspec.json.decode(value)["by"],
                }
    if as_json:
        print(json.dumps(found))
        return
    for name, one in found.items():
        what = ", ".join(f"{field} {one[field]}" for field in ("deployment", "conversation_id", "kind") if field in one)
        says = f"{name}  until {one['until']}  {what or 'everything'}  by {one['by']}  {one.get('note', '')}"
        _stdout.print(plain(says), markup=False, soft_wrap=True)
    if not found:
        _stderr.print("No silence is in force.")


@_silences.command("end")
def silence_end(name: Annotated[str, typer.Argument(help="As `silence list` has it.")]) -> None:
    """End a silence now."""
    with _log() as (settings, log):
        if f"silence/{name}" not in read_actions(log):
            raise ConfigurationError(f"there is no silence {name!r}", cure="see `anchorwatch silence list`")
        withdraw(log, "silence", [name])
        _taken_in(settings, log)
    _stdout.print("Ended.")


# Calibrations.


@_calibration.command("activate")
def calibration_activate(
    calibration: Annotated[
        str, typer.Argument(help="What `anchorwatch calibrate` wrote, or a bundle's name or folder.")
    ],
    by: By,
    new_axis: Annotated[
        bool,
        typer.Option("--new-axis", help="The collectors measure another axis from now on; this is its calibration."),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Judge by another calibration from here on: a control record goes into every partition of the log.

    What was logged before is judged by the old one, also in a replay. After an error, do it again: twice does no harm.
    """
    with _log() as (settings, log):
        config = connect.calibration(calibration, settings)
        recorded = recorded_calibrations(log)
        last = recorded(0, log.span(PROJECTIONS, 0).end)
        if last is not None and last.axis_id != config.axis_id and not new_axis:
            raise ConfigurationError(
                f"this calibration is for another axis, {config.axis_id[:12]}, than the one in force, "
                f"{last.axis_id[:12]}: what is measured on that one would be stored unjudged, and nobody told of it",
                cure="give a calibration of the axis that the collectors measure; or --new-axis, where they change now",
            )
        offsets = activate_calibration(log, config, by=by)
        _taken_in(settings, log)
    if as_json:
        print(json.dumps({"config_id": config.config_id, "offsets": offsets}))
    else:
        places = ", ".join(f"{partition} from {offset}" for partition, offset in offsets.items())
        _stdout.print(f"{config.config_id} is in force in partition {places}.", markup=False, soft_wrap=True)


@_calibration.command("show")
def calibration_show(as_json: AsJson = False) -> None:
    """Show which calibration judges each partition, and which activations are still ahead of its workers."""
    with _log() as (settings, log):
        actions = read_actions(log)
        store = connect.store(settings)
        try:
            rows: list[dict[str, Any]] = []
            for partition in range(log.partitions(PROJECTIONS)):
                position = store.position(PROJECTIONS, partition)
                stored = store.config(PROJECTIONS, partition)
                prefix = f"calibration/{PROJECTIONS}/{partition}/"
                ahead = {
                    int(key.removeprefix(prefix)): msgspec.json.decode(value)["body"]["config_id"]
                    for key, value in actions.items()
                    if key.startswith(prefix) and int(key.removeprefix(prefix)) >= (position.offset if position else 0)
                }
                rows.append(
                    {
                        "partition": partition,
                        "in_force": DetectorConfig.from_json(stored).config_id if stored is not None else None,
                        "offset": position.offset if position else None,
                        "ahead": dict(sorted(ahead.items())),
                    }
                )
        finally:
            store.close()
    if as_json:
        print(json.dumps(rows))
        return
    for row in rows:
        later = "".join(f"; then {id} from {offset}" for offset, id in row["ahead"].items())
        _stdout.print(
            f"partition {row['partition']}: {row['in_force'] or 'none yet'}{later}", markup=False, soft_wrap=True
        )


# What the commands share.


def _lines(text: str) -> str:
    return "\n        ".join(plain(line) for line in text.split("\n"))


@contextmanager
def _log() -> Iterator[tuple[Settings, Log]]:
    settings = load_settings()
    log = connect.log(settings)
    try:
        yield settings, log
    finally:
        log.close()


def _taken_in(settings: Settings, log: Log) -> None:
    """Take what was written into the store at once, where it answers. Else a worker does, as soon as it runs."""
    with _quietly():
        store = connect.store(settings)
        try:
            while ActionsFold(log, store).run_once():
                pass
        finally:
            store.close()


def _is_kept(settings: Settings, conversation: str) -> bool | None:
    """Whether the store has such a conversation; None where nobody knows."""
    with _quietly():
        store = connect.store(settings)
        try:
            return store.session(conversation) is not None
        finally:
            store.close()
    return None


def _still_due(settings: Settings, conversation: str) -> bool | None:
    """Whether a conversation is still to be forgotten; None where nobody knows."""
    with _quietly():
        store = connect.store(settings)
        try:
            return conversation in due(store)
        finally:
            store.close()
    return None


@contextmanager
def _quietly() -> Iterator[None]:
    """What was written to the log is safe, whatever the store says."""
    try:
        yield
    except AnchorwatchError as error:
        _stderr.print(
            f"note: it is written, and takes effect when a worker and the store run: {plain(error.problem)}",
            markup=False,
            soft_wrap=True,
        )


def _duration(text: str) -> timedelta:
    found = re.fullmatch(r"(\d{1,5})([mhd])", text)
    if found is None or not int(found[1]):
        raise ConfigurationError(f"{text!r} is no length of time", cure="write it as 30m, 12h or 7d")
    return int(found[1]) * {"m": timedelta(minutes=1), "h": timedelta(hours=1), "d": timedelta(days=1)}[found[2]]


def _moment(time: datetime) -> str:
    return time.isoformat(timespec="seconds").replace("+00:00", "Z")

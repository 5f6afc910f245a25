"""The commands of whoever is on call: doctor, forget, acknowledge, resolve, verdict and calibration.

Thin: each reads the settings, does one thing and says what happened. What comes from outside is printed without its
control characters.
"""

from __future__ import annotations

import csv
import json
import sys
from typing import Annotated, Any, Literal

import msgspec
import typer

from monitor import connect
from monitor.actions import (
    Acknowledgement,
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
from monitor.desk import AsJson, By, Note, lines, open_log, quietly, stderr, stdout, taken_in
from monitor.detect.baseline import DetectorConfig
from monitor.doctor import Check, examine
from monitor.errors import ConfigurationError
from monitor.letters import letters_app
from monitor.settings import Settings, load_settings
from monitor.silences import silences_app
from monitor.stream.log import PROJECTIONS

__all__ = ["mount"]

Withdraw = Annotated[bool, typer.Option("--withdraw", help="Take it back.")]

FINDINGS_LOOKED_AT = 5000

_calibration = typer.Typer(help="The calibration in force: show, activate.", no_args_is_help=True)


def mount(app: typer.Typer) -> None:
    """Give the operators' commands to the command line."""
    app.command()(doctor)
    app.command()(forget)
    app.command()(acknowledge)
    app.command()(resolve)
    app.command()(verdict)
    app.command()(verdicts)
    app.add_typer(silences_app, name="silence")
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
            stdout.print(f"[{colours[check.status]}]{check.status:6}[/]", end="  ")
            stdout.print(lines(f"{check.name}: {check.says}"), markup=False, soft_wrap=True)
            if check.cure:
                stdout.print(lines(f"        cure: {check.cure}"), markup=False, soft_wrap=True)

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
    with open_log() as (settings, log):
        known = _is_kept(settings, conversation)
        place = ask_to_forget(log, conversation, by=by)
        taken_in(settings, log)
        left = _still_due(settings, conversation)
    if as_json:
        print(json.dumps({"conversation": conversation, "done": left is False, **msgspec.to_builtins(place)}))
    elif left is False and known is False:
        stdout.print(
            f"Nothing was kept of {conversation!r}: check the id. What the log may hold of it up to here is forgotten.",
            markup=False,
            soft_wrap=True,
        )
    elif left is False:
        stdout.print("Forgotten. The log keeps its records until its retention ends.", markup=False)
    else:
        stdout.print(
            f"Written. It is deleted once partition {place.partition} has been folded up to {place.offset}; "
            "a running worker sees to that.",
            markup=False,
        )


def acknowledge(
    alert: Annotated[str, typer.Argument(help="The alert's id, or that of one of its findings.")],
    by: By,
    note: Note = "",
    take_back: Withdraw = False,
) -> None:
    """Say that you have seen an alert: it is not repeated. That it grows worse, and its end, are told."""
    with open_log() as (settings, log):
        if take_back:
            withdraw(log, "acknowledge", [alert])
        else:
            append_action(log, "acknowledge", alert, Acknowledgement(note), by=by)
        taken_in(settings, log)
        with quietly():
            _tell_if_unknown(settings, alert, findings=True)
    stdout.print("Withdrawn." if take_back else "Acknowledged.")


def resolve(
    alert: Annotated[str, typer.Argument(help="The alert's id.")],
    by: By,
    note: Note = "",
) -> None:
    """Say that an alert is over: whoever was told of it is told so. What its conversation does next is a new alert."""
    with open_log() as (settings, log):
        append_action(log, "resolve", alert, Acknowledgement(note), by=by)
        taken_in(settings, log)
        with quietly():
            _tell_if_unknown(settings, alert, findings=False)
    stdout.print("Resolved.")


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
    with open_log() as (settings, log):
        if take_back:
            withdraw(log, "verdict", [conversation])
        else:
            append_action(log, "verdict", conversation, Verdict(label, turn, note), by=by)
        taken_in(settings, log)
        if _is_kept(settings, conversation) is False:
            stderr.print("note: the store knows no such conversation", markup=False)
    stdout.print("Withdrawn." if take_back else "Kept.")


def verdicts() -> None:
    """Print all verdicts as CSV: what `anchorwatch backtest --verdicts` reads."""
    with open_log() as (_, log):
        actions = read_actions(log)
    out = csv.writer(sys.stdout, lineterminator="\n")
    out.writerow(["conversation_id", "label", "turn"])
    for key, value in sorted(actions.items()):
        if key.startswith("verdict/"):
            body = body_of(key, value)
            assert isinstance(body, Verdict)
            out.writerow([key.removeprefix("verdict/"), body.label, "" if body.turn is None else body.turn])


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
    with open_log() as (settings, log):
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
        taken_in(settings, log)
    if as_json:
        print(json.dumps({"config_id": config.config_id, "offsets": offsets}))
    else:
        places = ", ".join(f"{partition} from {offset}" for partition, offset in offsets.items())
        stdout.print(f"{config.config_id} is in force in partition {places}.", markup=False, soft_wrap=True)


@_calibration.command("show")
def calibration_show(as_json: AsJson = False) -> None:
    """Show which calibration judges each partition, and which activations are still ahead of its workers."""
    with open_log() as (settings, log):
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
        stdout.print(
            f"partition {row['partition']}: {row['in_force'] or 'none yet'}{later}", markup=False, soft_wrap=True
        )


def _is_kept(settings: Settings, conversation: str) -> bool | None:
    """Whether the store has such a conversation; None where nobody knows."""
    with quietly():
        store = connect.store(settings)
        try:
            return store.session(conversation) is not None
        finally:
            store.close()
    return None


def _still_due(settings: Settings, conversation: str) -> bool | None:
    """Whether a conversation is still to be forgotten; None where nobody knows."""
    with quietly():
        store = connect.store(settings)
        try:
            return conversation in due(store)
        finally:
            store.close()
    return None


def _tell_if_unknown(settings: Settings, id: str, *, findings: bool) -> None:
    """A typo is written, too: it may be an alert that this store does not know yet."""
    store = connect.store(settings)
    try:
        if f"alert/{id}" in store.actions(f"alert/{id}"):
            return
        if not findings:
            stderr.print("note: no alert has this id", markup=False)
        elif all(one.id != id for one in store.findings(FINDINGS_LOOKED_AT)):
            stderr.print(
                f"note: no alert and none of the newest {FINDINGS_LOOKED_AT} findings has this id", markup=False
            )
    finally:
        store.close()

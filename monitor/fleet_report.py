"""`anchorwatch fleet`: how whole deployments stand, for people. It only reads the store.

It knows what the reader of the fleet's minutes left there, and not how that came about.
"""

from __future__ import annotations

import json
import math
import sys
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from monitor import connect
from monitor.events import Finding
from monitor.fleet import DAY, WEEK, Age, ages, moment
from monitor.settings import load_settings
from monitor.store.store import ClosedMinutes

__all__ = ["fleet_command"]

SHIFTS = 10
FINDINGS = 10_000  # of which the shifts are picked


def fleet_command(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    shifts: Annotated[int, typer.Option(min=0, help="How many of the last shifts to show.")] = SHIFTS,
) -> None:
    """How whole deployments stand: mean z, how far their baselines have aged, and the last shifts.

    z is 0 where a deployment is what it was when it was calibrated; low is drift. The figures are of closed minutes, so
    the last few are not in them. Exits with 1 where no minute has been closed yet.
    """
    store = connect.store(load_settings())
    try:
        closed = store.closed()
        found = [one for one in store.findings(FINDINGS, conversation_id="") if one.kind == "fleet_shift"][:shifts]
    finally:
        store.close()
    if as_json:
        sys.stdout.write(json.dumps(_as_json(closed, found), indent=2) + "\n")
    elif closed is not None:
        _print(closed, found)
    if closed is None:
        Console(stderr=True).print(
            "No minute has been closed yet: a worker does that two minutes after responses have come "
            "(ANCHORWATCH_FLEET_LATENESS_SECONDS), where ANCHORWATCH_FLEET_WATCH is on."
        )
        raise typer.Exit(1)


def _as_json(closed: ClosedMinutes | None, found: list[Finding]) -> dict[str, object]:
    if closed is None:
        return {"closed_until": None, "deployments": {}, "shifts": []}
    spans = {"day": ages(closed, DAY), "week": ages(closed, WEEK)}
    names = sorted({one.deployment for rows in spans.values() for one in rows} | closed.late.keys())
    deployments = {}
    for name in names:
        own: dict[str, object] = {"late_responses": closed.late.get(name, 0)}
        for span, rows in spans.items():
            own[span] = next((_numbers(one) for one in rows if one.deployment == name), None)
        deployments[name] = own
    return {
        "closed_until": moment(closed.through + 1),
        "deployments": deployments,
        "shifts": [
            {
                "id": one.id,
                "time": one.time,
                "deployment": one.deployment,
                "severity": one.severity,
                "fall": one.value,
                "detector": one.statistic,
            }
            for one in found
        ],
    }


def _numbers(age: Age) -> dict[str, float | int | None]:
    return {
        "responses": age.responses,
        "mean_z": round(age.mean, 4),
        "standard_error": round(age.standard_error, 4) if math.isfinite(age.standard_error) else None,
        "warned": round(age.warned, 5),
    }


def _print(closed: ClosedMinutes, found: list[Finding]) -> None:
    stdout = Console()
    days = {one.deployment: one for one in ages(closed, DAY)}
    table = Table("deployment", title=f"Minutes closed until {moment(closed.through + 1)}", title_justify="left")
    for heading in ("responses, day", "mean z, day", "mean z, week", "beyond warning, day", "late, day"):
        table.add_column(heading, justify="right")
    for week in ages(closed, WEEK):
        day = days.get(week.deployment)
        table.add_row(
            escape(week.deployment),
            str(day.responses) if day else "0",
            _mean(day) if day else "-",
            _mean(week),
            f"{day.warned:.2%}" if day else "-",
            str(closed.late.get(week.deployment, 0)),
        )
    stdout.print(table)
    stdout.print("z is 0 where a baseline was calibrated; low is drift. ± is one standard error, by the hour.")
    if not found:
        stdout.print("No shift.")
    for one in found:
        way = "fell" if one.value > 0 else "rose"
        stdout.print(
            f"{one.time}  {escape(one.deployment)}  the mean {way} by {abs(one.value):.2f}  ({one.statistic})",
            highlight=False,
        )


def _mean(age: Age) -> str:
    error = f"{age.standard_error:.2f}" if math.isfinite(age.standard_error) else "?"
    return f"{age.mean:+.2f} ± {error}"

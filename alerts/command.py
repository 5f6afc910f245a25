"""The commands `anchorwatch alerts ...`: the rules, the alerts there are, and whether anybody is told of them.

Thin: each reads the settings, does one thing and says what happened. What comes from outside is printed without its
control characters.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer

from alerts.config import LABELS, AlertsConfig, Route, load_with_advice, taken_by
from alerts.mode import enable, shadow, status
from alerts.section import near
from alerts.trial import test
from monitor import connect
from monitor.actions import body_of
from monitor.alert import Alert
from monitor.desk import AsJson, rules_file, say, stderr
from monitor.errors import ConfigurationError
from monitor.settings import load_settings

__all__ = ["alerts_app"]

alerts_app = typer.Typer(
    help="Whom to tell: check the rules, try the receivers, go live.", no_args_is_help=True, add_completion=False
)
alerts_app.command()(test)
alerts_app.command()(status)
alerts_app.command()(enable)
alerts_app.command()(shadow)


@alerts_app.command()
def check(
    file: Annotated[Path | None, typer.Argument(help="[default: ANCHORWATCH_ALERTS_FILE]")] = None,
    match: Annotated[
        list[str] | None,
        typer.Option(help="A label of an alert, such as severity=critical; several. Says which receivers it reaches."),
    ] = None,
    expect: Annotated[
        str | None, typer.Option(help="With --match: receivers with commas between; exits 1 if it reaches others.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Check a file of rules and print its routes; every mistake is told with its line. Nothing is sent."""
    config, advice = load_with_advice(rules_file(file))
    wanted = None if expect is None else [name.strip() for name in expect.split(",")]
    for name in wanted or ():
        if name not in {receiver.name for receiver in config.receivers}:
            raise ConfigurationError(f"there is no receiver {name!r}", cure="see the file's receivers")
    if wanted is not None and not match:
        raise ConfigurationError("--expect says nothing without --match", cure="say of what alert: --match kind=dip")
    labels = _labels(match or ())
    taken = taken_by(config.route, labels) if match else ()
    reached = list(dict.fromkeys(route.receiver for route in taken))
    if as_json:
        found: dict[str, Any] = {"advice": [{"line": line, "says": says} for line, says in advice]}
        if match:
            found |= {"routes": [route.path for route in taken], "receivers": reached}
        print(json.dumps(found))
    elif match:
        for route in taken:
            say(f"{route.path}  {route.receiver}  {_integrations(config, route.receiver)}")
    else:
        for text in _tree(config.route):
            say(text)
        for receiver in config.receivers:
            say(f"receiver {receiver.name}: {_integrations(config, receiver.name)}")
    if not (as_json or match):
        for line, says in advice:
            say(f"note: line {line}: {says}", stderr)
        say("The rules are right.", stderr)
    if wanted is not None and sorted(wanted) != sorted(reached):
        say(f"It reaches {', '.join(reached)}, and not {', '.join(wanted)}.", stderr)
        raise typer.Exit(1)


@alerts_app.command()
def show(
    alert: Annotated[str | None, typer.Argument(help="An alert's id. [default: all that fire]")] = None,
    every: Annotated[bool, typer.Option("--all", help="Also those that are over.")] = False,
    as_json: AsJson = False,
) -> None:
    """Show the alerts that fire, the worst first, or all there is to say of one."""
    found = _alerts()
    if alert is not None:
        if alert not in found:
            raise ConfigurationError(f"there is no alert {alert!r}", cure="see `anchorwatch alerts show --all`")
        one = msgspec.to_builtins(found[alert])
        if as_json:
            print(json.dumps(one))
            return
        for name, value in one.items():
            say(f"{name:16} {value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)}")
        return
    shown = [one for one in found.values() if every or one.firing]
    shown.sort(key=lambda one: (one.firing, one.severity == "critical", one.risk, one.starts_at), reverse=True)
    if as_json:
        print(json.dumps([msgspec.to_builtins(one) for one in shown]))
        return
    for one in shown:
        state = one.severity if one.firing else f"{one.resolution}"
        told = ", ".join(sorted(one.told)) or "nobody"
        seen = f"  seen by {one.acknowledged_by}" if one.acknowledged_by else ""
        say(
            f"{one.id}  {state:9}  {one.kind:14}  {one.deployment}  {one.conversation_id}  risk {one.risk:.2f}  "
            f"since {one.starts_at}  told: {told}{seen}"
        )
    if not shown:
        say("There is no alert." if every else "No alert fires.", stderr)


def _alerts() -> dict[str, Alert]:
    """As the store has them."""
    store = connect.store(load_settings())
    try:
        bodies = [body_of(key, value) for key, value in store.actions("alert/").items()]
    finally:
        store.close()
    return {body.id: body for body in bodies if isinstance(body, Alert)}


def _labels(pairs: Sequence[str]) -> dict[str, str]:
    labels = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or name not in LABELS:
            raise ConfigurationError(
                f"{pair!r} is no label of an alert{near(name, LABELS)}",
                cure=f"write it as severity=critical; there are {', '.join(LABELS)}",
            )
        labels[name] = value.strip('"')
    return labels


def _tree(route: Route, depth: int = 0) -> Iterator[str]:
    matchers = ", ".join(map(str, route.matchers)) or ("every alert" if depth == 0 else "the rest")
    group = "one alert each" if route.group_by == ("...",) else "by " + (", ".join(route.group_by) or "nothing")
    times = (
        f"wait {_short(route.group_wait)}, interval {_short(route.group_interval)}, "
        f"repeat {_short(route.repeat_interval)}"
    )
    more = "; continue" * route.continues + f"; quiet in {', '.join(route.mute)}" * bool(route.mute)
    yield f"{'    ' * depth}{route.path}  {matchers}  ->  {route.receiver}  ({group}; {times}{more})"
    for child in route.routes:
        yield from _tree(child, depth + 1)


def _short(seconds: float) -> str:
    for unit, length in (("d", 86_400), ("h", 3600), ("m", 60)):
        if seconds and seconds % length == 0:
            return f"{seconds / length:g}{unit}"
    return f"{seconds:g}s"


def _integrations(config: AlertsConfig, receiver: str) -> str:
    names = [one.name for found in config.receivers if found.name == receiver for one in found.integrations]
    return ", ".join(names) or "nobody: it has no integrations"

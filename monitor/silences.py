"""The commands `silence add`, `list` and `end`: tell nobody of some alerts for a while."""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Annotated, Any, get_args

import msgspec
import typer

from monitor.actions import Silence, append_action, body_of, read_actions
from monitor.alert import LABELS
from monitor.desk import AsJson, By, Note, duration, moment, open_log, say, stderr, taken_in
from monitor.errors import ConfigurationError
from monitor.events import Kind
from monitor.matchers import Matcher, parse_matchers

__all__ = ["silences_app"]

NAMES = ("deployment", "conversation_id", "kind")

silences_app = typer.Typer(help="Tell nobody of some alerts for a while.", no_args_is_help=True)


@silences_app.command("add")
def add(
    by: By,
    lasts: Annotated[str, typer.Option("--for", help="How long: 30m, 12h, 7d.")],
    match: Annotated[
        list[str] | None,
        typer.Option(help="As Alertmanager has it, such as 'model=~\"llama.*\"'; several: all must hold."),
    ] = None,
    deployment: Annotated[str | None, typer.Option(help="Alerts of this deployment.")] = None,
    conversation: Annotated[str | None, typer.Option(help="Alerts of this conversation.")] = None,
    kind: Annotated[str | None, typer.Option(help="Alerts of this kind, such as dip.")] = None,
    everything: Annotated[bool, typer.Option("--everything", help="All alerts.")] = False,
    note: Note = "",
) -> None:
    """Tell nobody of alerts that match all that is given. They are kept; what still fires afterwards is told then."""
    matchers = tuple(matcher for text in match or () for matcher in parse_matchers(text))
    if everything == bool(matchers or any(given is not None for given in (deployment, conversation, kind))):
        raise ConfigurationError(
            "it is not clear what to silence",
            cure="give --match, --deployment, --conversation or --kind, or --everything and none of them",
        )
    if kind is not None and kind not in get_args(Kind):
        raise ConfigurationError(f"no finding is of kind {kind!r}", cure=f"give one of {', '.join(get_args(Kind))}")
    for matcher in matchers:
        if matcher.label not in LABELS:
            raise ConfigurationError(f"no alert has a label {matcher.label!r}", cure=f"match on {', '.join(LABELS)}")
    until = moment(datetime.now(UTC) + duration(lasts))
    name = secrets.token_hex(4)
    with open_log() as (settings, log):
        append_action(log, "silence", name, Silence(until, deployment, conversation, kind, note, matchers), by=by)
        taken_in(settings, log)
    say(f"Silent until {until}. To end it: anchorwatch silence end {name} --by ...", stderr)
    print(name)


@silences_app.command("list")
def list_(
    every: Annotated[bool, typer.Option("--all", help="Also those that are over.")] = False, as_json: AsJson = False
) -> None:
    """List the silences that are in force."""
    now = moment(datetime.now(UTC))
    with open_log() as (_, log):
        actions = read_actions(log)
    found = {}
    for key, value in sorted(actions.items()):
        if key.startswith("silence/"):
            body = body_of(key, value)
            assert isinstance(body, Silence)
            if every or body.until > now:
                action = msgspec.json.decode(value)
                found[key.removeprefix("silence/")] = {**action["body"], "by": action["by"], "time": action["time"]}
    if as_json:
        print(json.dumps(found))
        return
    for name, one in found.items():
        over = "" if one["until"] > now else " (over)"
        say(f"{name}  until {one['until']}{over}  {_about(one)}  by {one['by']}  {one.get('note', '')}")
    if not found:
        say("No silence is in force." if not every else "There has been no silence.", stderr)


@silences_app.command("end")
def end(name: Annotated[str, typer.Argument(help="As `silence list` has it.")], by: By) -> None:
    """End a silence now. It stays on record, with who ended it."""
    with open_log() as (settings, log):
        key = f"silence/{name}"
        value = read_actions(log).get(key)
        body = None if value is None else body_of(key, value)
        if not isinstance(body, Silence):
            raise ConfigurationError(f"there is no silence {name!r}", cure="see `anchorwatch silence list`")
        now = moment(datetime.now(UTC))
        if body.until <= now:
            raise ConfigurationError(f"the silence {name!r} is over since {body.until}", cure="nothing is to be done")
        append_action(log, "silence", name, msgspec.structs.replace(body, until=now), by=by)
        taken_in(settings, log)
    say("Ended.")


def _about(one: Mapping[str, Any]) -> str:
    said = [f"{name} {one[name]}" for name in NAMES if name in one]
    said += [str(msgspec.convert(matcher, Matcher)) for matcher in one.get("matchers", ())]
    return ", ".join(said) or "everything"

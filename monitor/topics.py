"""The commands that make and check the topics. Thin: what is right for a topic is known elsewhere."""

from __future__ import annotations

import json
from typing import Annotated

import msgspec
import typer
from rich.console import Console

from monitor import connect
from monitor.errors import ConfigurationError
from monitor.settings import Settings, load_settings
from monitor.stream.topics import Topics, check, create

__all__ = ["topics_app"]

topics_app = typer.Typer(help="Kafka's topics: make them, check them.", no_args_is_help=True)

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output.")]

_stdout = Console(highlight=False)
_COLOURS = {"error": "bold red", "warning": "yellow", "note": "dim"}


@topics_app.command("create")
def create_topics(as_json: AsJson = False) -> None:
    """Make the topics that are missing. What exists already is never changed."""
    settings = load_settings()
    cluster = _cluster(settings)
    try:
        made = create(cluster, connect.topic_plan(settings))
    finally:
        cluster.close()
    if as_json:
        print(json.dumps({"made": made}))
    elif made:
        _stdout.print("made " + ", ".join(made), markup=False, soft_wrap=True)
    else:
        _stdout.print("all topics are there already; anchorwatch topics check says how they are made")


@topics_app.command("check")
def check_topics(as_json: AsJson = False) -> None:
    """Say what is wrong with the topics, and the cure. Exits with 1 where records are lost or misjudged by it."""
    settings = load_settings()
    cluster = _cluster(settings)
    try:
        told = check(cluster, connect.topic_plan(settings))
    finally:
        cluster.close()
    if as_json:
        print(json.dumps({"advice": msgspec.to_builtins(told)}))
    else:
        for each in told:
            _stdout.print(f"{each.severity}: ", style=_COLOURS[each.severity], end="")
            _stdout.print(str(each).removeprefix(f"{each.severity}: "), markup=False, soft_wrap=True)
        if not told:
            _stdout.print("the topics are as they should be")
    if any(each.severity == "error" for each in told):
        raise typer.Exit(1)


def _cluster(settings: Settings) -> Topics:
    cluster = connect.topics(settings)
    if cluster is None:
        raise ConfigurationError(
            "the log is a file, which makes its own topics", cure="ANCHORWATCH_LOG_URL=kafka://host1:9092,host2:9092"
        )
    return cluster

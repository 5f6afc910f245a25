"""The command `alerts test`: a test alert and its end through the real channels, whatever the mode."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import datetime
from typing import Annotated

import msgspec
import typer

from alerts.channel import Channel
from alerts.channels import open_channel
from alerts.config import AnyIntegration, load
from alerts.section import near
from monitor.alert import Alert, Notification, State
from monitor.desk import AsJson, Rules, rules_file, say
from monitor.errors import ChannelError, ConfigurationError
from monitor.events import now_utc

__all__ = ["test"]


def test(
    receiver: Annotated[
        str | None, typer.Argument(help="A receiver, or one of its integrations: ops/webhook[0]. [default: all]")
    ] = None,
    config: Rules = None,
    seconds: Annotated[
        float,
        typer.Option(
            min=0.0, max=240.0, help="How long it fires: longer than Alertmanager's group_wait, to see whom that tells."
        ),
    ] = 0.0,
    as_json: AsJson = False,
) -> None:
    """Send a test alert and its end through the real channels, now, whatever the mode. Exits 1 if one is not taken."""
    rules = load(rules_file(config))
    chosen = [
        integration
        for one in rules.receivers
        for integration in one.integrations
        if receiver in (None, one.name, integration.name)
    ]
    if not chosen:
        names = [one.name for one in rules.receivers]
        raise ConfigurationError(
            f"there is nothing to send to at {receiver!r}{near(receiver or '', names)}",
            cure="give a receiver that has integrations, as `anchorwatch alerts check` prints them",
        )
    results = {integration.name: "" for integration in chosen}
    with ExitStack() as stack:
        began: list[tuple[Channel, Notification]] = []
        for integration in chosen:
            first, end = _test_notifications(integration)
            with _noting(results, integration.name):
                channel = open_channel(integration, rules)
                stack.callback(channel.close)
                channel.deliver(first)
                began.append((channel, end))
        time.sleep(seconds if any(channel.send_resolved for channel, _ in began) else 0)
        for channel, end in began:
            if channel.send_resolved:
                with _noting(results, channel.name):
                    channel.deliver(end)
    if as_json:
        print(json.dumps({name: {"taken": not problem, "problem": problem} for name, problem in results.items()}))
    else:
        for name, problem in results.items():
            say(f"{name}: {problem or 'taken'}")
    if any(results.values()):
        raise typer.Exit(1)


@contextmanager
def _noting(results: dict[str, str], name: str) -> Iterator[None]:
    """What one does not take is noted, and the others are tried."""
    try:
        yield
    except (ChannelError, ConfigurationError) as error:
        results[name] = str(error)


def _test_notifications(integration: AnyIntegration) -> tuple[Notification, Notification]:
    """An alert that says it is a test, and its end, so that no incident stays open."""
    id, now = f"test-{secrets.token_hex(8)}", now_utc()
    told: tuple[State, State] = ("warning", "resolved")
    alert = Alert(
        id=id,
        conversation_id="anchorwatch-test",
        deployment="anchorwatch-test",
        model="none",
        axis_id="none",
        config_id="none",
        kind="dip",
        persona="",
        severity="warning",
        starts_at=now,
        accepted=datetime.fromisoformat(now).timestamp(),
        changed=datetime.fromisoformat(now).timestamp(),
        finding_ids=(id,),
        turn=0,
        statistic="dip",
        value=0.0,
        boundary=1.0,
        risk=0.0,
        certification="uncertified",
        story="This is a test: somebody ran `anchorwatch alerts test`. No conversation is meant.",
    )
    over = msgspec.structs.replace(alert, ends_at=now, resolution="resolved")
    first, second = (
        Notification(
            id=f"{id}-{sequence}",
            integration=integration.name,
            group=id,
            labels={"deployment": "anchorwatch-test"},
            reason="test",
            time=now,
            sequence=sequence,
            alerts=(one,),
            covered={id: told[sequence]},
            note="This is a test, sent by `anchorwatch alerts test`.",
        )
        for sequence, one in enumerate((alert, over))
    )
    return first, second

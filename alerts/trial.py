"""The command `alerts test`: a test alert and its end through the real channels, whatever the mode."""

from __future__ import annotations

import json
import secrets
from datetime import datetime
from typing import Annotated

import msgspec
import typer

from alerts.channels import open_channel
from alerts.config import AlertsConfig, AnyIntegration, load
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
    results = {integration.name: _try(integration, rules) for integration in chosen}
    if as_json:
        print(json.dumps({name: {"taken": not problem, "problem": problem} for name, problem in results.items()}))
    else:
        for name, problem in results.items():
            say(f"{name}: {problem or 'taken'}")
    if any(results.values()):
        raise typer.Exit(1)


def _try(integration: AnyIntegration, rules: AlertsConfig) -> str:
    """What is wrong, or nothing."""
    try:
        channel = open_channel(integration, rules)
    except (ChannelError, ConfigurationError) as error:
        return str(error)
    try:
        for notification in _test_notifications(integration):
            if notification.status == "firing" or integration.send_resolved:
                channel.deliver(notification)
    except ChannelError as error:
        return str(error)
    finally:
        channel.close()
    return ""


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

"""Promises of PagerDuty: one incident for each group, from trigger to resolve, within the documented limits.

The schema is written from PagerDuty's developer documentation, "Events API v2" ("Overview": 512 KB; "Send an Alert
Event": fields and lengths), and its published OpenAPI document of that API. Delivery is to a recording HTTP server with
the documented answers. Not run on PagerDuty.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from hypothesis import given
from notices import HOSTILE, RULES, alert, hostile, notification, over, texts
from receiver import Answer, Receiver

from alerts.channel import Channel
from alerts.channels import open_channel
from alerts.config import PagerDutyConfig
from alerts.pagerduty import event
from monitor.alert import Notification
from monitor.errors import ChannelError, ChannelUnavailable

KEY = "0123456789abcdef0123456789abcdef"
ACCEPTED = Answer(202, b'{"status":"success","message":"Event processed","dedup_key":"x"}')
TEXT = {"type": "string", "minLength": 1}
EVENT = {
    "type": "object",
    "required": ["routing_key", "event_action", "dedup_key"],
    "additionalProperties": False,
    "properties": {
        "routing_key": {"type": "string", "minLength": 32, "maxLength": 32},
        "event_action": {"enum": ["trigger", "acknowledge", "resolve"]},
        "dedup_key": {"type": "string", "minLength": 1, "maxLength": 255},
        "client": TEXT,
        "client_url": {"type": "string", "format": "uri"},
        "links": {
            "type": "array",
            "items": {
                "type": "object",
                "required": ["href"],
                "additionalProperties": False,
                "properties": {"href": {"type": "string", "format": "uri"}, "text": TEXT},
            },
        },
        "payload": {
            "type": "object",
            "required": ["summary", "source", "severity"],
            "additionalProperties": False,
            "properties": {
                "summary": TEXT | {"maxLength": 1024},
                "source": TEXT,
                "severity": {"enum": ["critical", "error", "warning", "info"]},
                "timestamp": {"type": "string", "format": "date-time"},
                "component": TEXT,
                "group": TEXT,
                "class": TEXT,
                "custom_details": {"type": "object"},
            },
        },
    },
    "if": {"properties": {"event_action": {"const": "trigger"}}},
    "then": {"required": ["payload"]},
}
CHECK = jsonschema.Draft202012Validator(EVENT, format_checker=jsonschema.FormatChecker())


def sent(told: Notification) -> dict[str, Any]:
    data = event(told, RULES, KEY)
    assert len(data) <= 512_000
    found: dict[str, Any] = json.loads(data)
    CHECK.validate(found)
    return found


def test_an_incident_says_all() -> None:
    found = sent(notification(alert()))
    assert (found["event_action"], found["dedup_key"], found["routing_key"]) == ("trigger", "9f" * 16, KEY)
    assert found["client_url"] == "https://watch.example"
    payload = found["payload"]
    assert payload["summary"].startswith("Critical: sudden drop in support-bot, conversation c-17, towards pirate: ")
    assert (payload["severity"], payload["class"], payload["timestamp"]) == (
        "critical",
        "sudden_drop",
        "2026-06-01T12:00:00Z",
    )
    assert (payload["source"], payload["group"], payload["component"]) == ("support-bot", "support-bot", "llama-3-70b")
    (details,) = payload["custom_details"]["alerts"]
    assert details["Nearest roles"] == "pirate, demon" and details["Alert"] == "e1"
    assert [link["text"] for link in found["links"]] == ["Session", "Log viewer", "Runbook"]


SEEN = {"acknowledged_by": "ana"}


@pytest.mark.parametrize(
    ("told", "action"),
    [
        (notification(alert()), "trigger"),
        (notification(alert(), reason="repeat"), "trigger"),
        (notification(alert(**SEEN), reason="repeat"), "acknowledge"),
        (notification(alert(**SEEN), over("2"), reason="resolved"), "acknowledge"),
        (notification(alert(**SEEN), alert("2"), reason="repeat"), "trigger"),
        (notification(alert(**SEEN), alert("2"), reason="new_alerts"), "trigger"),
        (notification(alert(**SEEN), reason="escalated"), "trigger"),
        (notification(over(), reason="all_resolved"), "resolve"),
        (notification(over(), over("2", **SEEN), reason="all_resolved"), "resolve"),
        # One that is not shown still fires: the incident stays open.
        (notification(over(), reason="resolved", covered={"e1": "resolved", "e2": "warning"}, truncated=1), "trigger"),
        (notification(over(), reason="resolved", truncated=1), "trigger"),
        (notification(over(), reason="all_resolved", truncated=1), "resolve"),
        # Not all are shown: whether all that fire are acknowledged is not known here.
        (notification(alert(**SEEN), reason="repeat", truncated=1), "trigger"),
        (notification(reason="digest", note="12 held back"), "trigger"),
        (notification(over(), reason="digest"), "trigger"),
        (notification(reason="test"), "trigger"),
        (notification(alert(), reason="test"), "trigger"),
        (notification(over(), reason="test"), "resolve"),
    ],
)
def test_what_becomes_of_the_incident(told: Notification, action: str) -> None:
    assert sent(told)["event_action"] == action


def test_an_incident_keeps_its_key_all_its_life() -> None:
    life = [
        notification(alert(severity="warning")),
        notification(alert(), reason="escalated", id="n-2"),
        notification(alert(**SEEN), reason="repeat", id="n-3"),
        notification(over(**SEEN), reason="all_resolved", id="n-4"),
    ]
    found = [sent(told) for told in life]
    assert [one["event_action"] for one in found] == ["trigger", "trigger", "acknowledge", "resolve"]
    assert len({one["dedup_key"] for one in found}) == 1
    assert [one["payload"]["severity"] for one in found[:2]] == ["warning", "critical"]


def test_the_worst_that_fires_counts() -> None:
    told = notification(over(), alert("2", severity="warning"), alert("3", severity="info"))
    assert sent(told)["payload"]["severity"] == "warning"


def test_what_has_no_alert_is_for_information() -> None:
    payload = sent(notification(reason="digest", note="12 held back"))["payload"]
    assert payload["severity"] == "info" and payload["source"] == "anchorwatch"
    assert payload["summary"] == "Anchorwatch: digest. 12 held back"


@pytest.mark.parametrize("name", ["x" * 256, "\U000e0001" * 256, "😀" * 256])
def test_a_storm_fits_and_what_is_left_out_is_counted(name: str) -> None:
    told = notification(*(hostile(name) for _ in range(1000)), truncated=9000)
    details = sent(told)["payload"]["custom_details"]
    assert 0 < len(details["alerts"]) <= 100
    assert len(details["alerts"]) + details["not_shown"] == 10_000


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_names_pass_the_schema_and_are_one_line(name: str) -> None:
    payload = sent(notification(hostile(name)))["payload"]
    assert all(len(payload[field].splitlines()) == 1 for field in ("summary", "source", "component", "group"))


@given(texts)
def test_every_name_passes_the_schema(name: str) -> None:
    sent(notification(hostile(name), alert("2")))


# Delivery.


@pytest.fixture
def pagerduty(receiver: Receiver, tmp_path: Path) -> Channel:
    file = tmp_path / "key"
    file.write_text(KEY + "\n")
    return open_channel(
        PagerDutyConfig(
            receiver="ops", routing_key_file=file, url=f"{receiver.url}/v2/enqueue", allow_private=True, timeout=5.0
        ),
        RULES,
    )


def test_it_is_posted_and_a_repeat_is_the_same(pagerduty: Channel, receiver: Receiver) -> None:
    receiver.script(ACCEPTED)
    assert pagerduty.name == "ops/pagerduty[0]" and pagerduty.refresh is None
    pagerduty.deliver(notification(alert()))
    pagerduty.deliver(notification(alert()))
    first, again = receiver.wait(2)
    assert (first.method, first.path, first.headers["content-type"]) == ("POST", "/v2/enqueue", "application/json")
    assert first.body == again.body
    CHECK.validate(first.json)
    pagerduty.close()


@pytest.mark.parametrize(
    ("answer", "retry", "wait"),
    [
        (Answer(400, b'{"status":"invalid event","message":"Event object is invalid","errors":["bad"]}'), False, None),
        (Answer(403), True, None),
        (Answer(429, headers={"retry-after": "120"}), True, 120.0),
        (Answer(500), True, None),
        (Answer(503), True, None),
    ],
)
def test_a_refusal_passes_or_not_and_never_tells_the_key(
    pagerduty: Channel, receiver: Receiver, answer: Answer, retry: bool, wait: float | None
) -> None:
    receiver.script(answer)
    with pytest.raises(ChannelError) as caught:
        pagerduty.deliver(notification(alert()))
    assert isinstance(caught.value, ChannelUnavailable) is retry
    assert getattr(caught.value, "retry_after", None) == wait
    assert KEY not in str(caught.value)

"""Promises of Slack: blocks that Slack's own library takes, within its limits; names are text; the address is a secret.

What Slack takes is judged by slack_sdk, Slack's library, and by the limits of docs.slack.dev ("Blocks", "Text object").
Delivery is to a recording HTTP server with the answers of "Sending messages using incoming webhooks". Not run on Slack.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace
from notices import HOSTILE, NAMES, RULES, alert, hostile, notification, over, texts
from receiver import Answer, Receiver
from slack_sdk.models.blocks import Block, DividerBlock, HeaderBlock, SectionBlock

from alerts.channel import Channel
from alerts.channels import open_channel
from alerts.config import SlackConfig
from alerts.slack import body
from monitor.alert import Notification
from monitor.errors import ChannelError, ChannelUnavailable

LINK = re.compile(r"<([^|<>]+)\|(Session|Sessions|Log viewer|Runbook)>")
SECRET = "T0000/B0000/s3cr3ts3cr3t"


def message(told: Notification, most: int = 10) -> dict[str, Any]:
    """The message, once Slack's library and the documented limits have let it pass."""
    found: dict[str, Any] = json.loads(body(told, RULES, most))
    assert set(found) == {"text", "blocks", "unfurl_links", "unfurl_media"}
    assert 0 < len(found["text"]) <= 4000
    assert 0 < len(found["blocks"]) <= 50
    parsed = Block.parse_all(found["blocks"])
    assert len(parsed) == len(found["blocks"])
    for block, raw in zip(parsed, found["blocks"], strict=True):
        assert isinstance(block, Block) and not isinstance(block, DividerBlock)
        block.validate_json()
        assert set(raw) <= {"type", "text", "fields", "elements"}
        if isinstance(block, HeaderBlock):
            assert raw["text"]["type"] == "plain_text" and 0 < len(raw["text"]["text"]) <= 150
        if isinstance(block, SectionBlock):
            assert 0 < len(raw["text"]["text"]) <= 3000
        assert len(raw.get("fields", ())) <= 10
        assert all(0 < len(field["text"]) <= 2000 for field in raw.get("fields", ()))
        assert all(0 < len(element["text"]) <= 3000 for element in raw.get("elements", ()))
    return found


def texts_of(found: dict[str, Any]) -> list[str]:
    """Every text in which Slack looks for markup."""
    every = [found["text"]]
    for block in found["blocks"]:
        every += [
            one["text"] for one in (block.get("text", {}), *block.get("fields", ()), *block.get("elements", ())) if one
        ]
    return every


def test_one_alert_in_blocks() -> None:
    header, section, caution = message(notification(alert()))["blocks"]
    assert header["text"]["text"] == "🔴 Critical: sudden drop"
    assert section["text"]["text"].startswith("*Critical.* Conversation `c-17` in deployment `support-bot` dropped")
    assert [link for link, _ in LINK.findall(section["text"]["text"])] == [
        "https://watch.example/sessions/c-17",
        "https://logs.example/c/c-17?tab=all",
        "https://docs.example/runbooks/sudden_drop.md",
    ]
    assert "*Nearest roles*\n`pirate`, `demon`" in [field["text"] for field in section["fields"]]
    assert "not proof of harm" in caution["elements"][0]["text"]


@pytest.mark.parametrize(
    ("told", "dot"),
    [
        (notification(alert()), "🔴"),
        (notification(alert(severity="warning"), over("2")), "🟠"),
        (notification(over()), "🟢"),
        (notification(reason="digest", note="12 alerts were held back today."), "⚪"),
    ],
)
def test_what_it_is_can_be_seen_from_afar(told: Notification, dot: str) -> None:
    assert message(told)["blocks"][0]["text"]["text"].startswith(dot)


def test_a_note_is_shown() -> None:
    assert message(notification(reason="digest", note="12 <held> back."))["blocks"][1]["text"]["text"] == (
        "12 &lt;held&gt; back."
    )


@pytest.mark.parametrize("most", [1, 10, 40, 1000])
def test_a_storm_is_one_bounded_message_that_counts_the_rest(most: int) -> None:
    told = notification(*(alert(f"e{i}", conversation_id=f"c-{i}") for i in range(60)), truncated=940)
    found = message(told, most)
    shown = sum("Conversation" in text for text in texts_of(found)[1:])
    assert shown == min(most, 46)
    assert any(f"{1000 - shown:,} more alerts are not shown" in text for text in texts_of(found))


def no_markup_but_ours(found: dict[str, Any]) -> None:
    for text in texts_of(found):
        rest = LINK.sub("", text)
        assert "<" not in rest and not re.search(r"&(?!amp;|lt;|gt;)", rest)
        assert rest.count("`") % 2 == 0 or text == found["text"]
    for block in found["blocks"][1:]:
        for one in (block.get("text", {}), *block.get("fields", ()), *block.get("elements", ())):
            if one:
                assert one["verbatim"] is True
                outside = re.sub(r"`[^`\n]+`", "", LINK.sub("", one["text"]))
                assert not re.search(r"[_~@]|:\w+:|https?:", outside)
                assert re.sub(r"^\*[A-Z][A-Za-z ]*\.?\*", "", outside).count("*") == 0


@pytest.mark.parametrize("name", [*HOSTILE, *NAMES])
def test_a_name_is_text_and_nothing_else(name: str) -> None:
    found = message(notification(hostile(name), note="held back"))
    story = found["blocks"][2]["text"]["text"]
    assert "<!" not in story and "<@" not in story
    no_markup_but_ours(message(notification(alert(conversation_id=name, deployment=name, nearest_roles=(name,) * 3))))
    if len(name) < 48 and name.isascii() and name.isprintable() and name.strip() == name and "`" not in name:
        escaped = name.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
        assert f"Conversation `{escaped}` in" in story


@given(texts, st.booleans())
def test_no_name_becomes_markup(name: str, firing: bool) -> None:
    wild = hostile(name)
    told = {field: getattr(wild, field) for field in ("conversation_id", "deployment", "model", "nearest_roles")}
    one = alert(**told, acknowledged_by=name) if firing else over(**told, acknowledged_by=name)
    found = message(notification(one, alert("2", deployment="b")))
    no_markup_but_ours(found)
    hosts = {url.split("/")[2] for text in texts_of(found) for url, _ in LINK.findall(text)}
    assert hosts <= {"watch.example", "logs.example", "docs.example"}


def test_an_address_of_the_operators_with_slacks_own_signs_is_one_link() -> None:
    rules = replace(RULES, conversation_url="https://logs.example/?a=<b>|c&id={conversation_id}")
    text = json.loads(body(notification(alert()), rules, 10))["blocks"][1]["text"]["text"]
    found = {name: url for url, name in LINK.findall(text)}
    assert found["Log viewer"] == "https://logs.example/?a=%3Cb%3E%7Cc&amp;id=c-17"


# Delivery.


@pytest.fixture
def slack(receiver: Receiver, tmp_path: Path) -> Channel:
    file = tmp_path / "slack"
    file.write_text(f"{receiver.url}/services/{SECRET}\n")
    return open_channel(SlackConfig(receiver="ops", url_file=file, allow_private=True, timeout=5.0), RULES)


def test_it_is_posted_and_a_repeat_is_the_same(slack: Channel, receiver: Receiver) -> None:
    receiver.script(Answer(200, b"ok"))
    assert slack.name == "ops/slack[0]" and slack.refresh is None
    slack.deliver(notification(alert()))
    slack.deliver(notification(alert()))
    first, again = receiver.wait(2)
    assert first.path == f"/services/{SECRET}" and first.headers["content-type"].startswith("application/json")
    assert first.body == again.body == body(notification(alert()), RULES, 10)
    slack.close()


@pytest.mark.parametrize(
    ("answer", "retry", "wait"),
    [
        (Answer(404, b"no_service"), True, None),
        (Answer(403, b"invalid_token"), True, None),
        (Answer(410, b"channel_is_archived"), True, None),
        (Answer(400, b"invalid_payload"), False, None),
        (Answer(302, headers={"location": "http://evil.example/"}), True, None),
        (Answer(429, headers={"retry-after": "30"}), True, 30.0),
        (Answer(500, b"rollup_error"), True, None),
    ],
)
def test_a_refusal_passes_or_not_and_never_tells_the_address(
    slack: Channel, receiver: Receiver, answer: Answer, retry: bool, wait: float | None
) -> None:
    receiver.script(answer)
    with pytest.raises(ChannelError) as caught:
        slack.deliver(notification(alert()))
    assert isinstance(caught.value, ChannelUnavailable) is retry
    assert getattr(caught.value, "retry_after", None) == wait
    assert caught.value.cure and "s3cr3t" not in str(caught.value)
    assert len(receiver.received) == 1


def test_an_address_that_is_changed_in_its_file_is_used_at_once(receiver: Receiver, tmp_path: Path) -> None:
    file = tmp_path / "slack"
    file.write_text("")
    slack = open_channel(SlackConfig(receiver="ops", url_file=file, allow_private=True, timeout=5.0), RULES)
    with pytest.raises(ChannelUnavailable, match="holds no key"):
        slack.deliver(notification(alert()))
    file.write_text(f"{receiver.url}/new")
    slack.deliver(notification(alert()))
    assert receiver.wait(1)[0].path == "/new"
    file.unlink()
    with pytest.raises(ChannelUnavailable, match="can't be read"):
        slack.deliver(notification(alert()))

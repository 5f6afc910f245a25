"""What a real Alertmanager makes of alerts: they fire while they are kept firing, and end once; amtool is asked."""

from __future__ import annotations

import base64
import json
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace
from notices import HOSTILE, NAMES, RULES, alert, hostile, notification, over
from receiver import Answer, Receiver
from servers import Server, alertmanager, amtool

from alerts.alertmanager import MOST_ALERTS, AlertmanagerChannel, posted
from alerts.config import AlertmanagerConfig
from monitor.alert import Alert, State
from monitor.errors import ChannelError, ChannelUnavailable

ME = "ops/alertmanager[0]"


def channel(url: str, **changes: Any) -> AlertmanagerChannel:
    config = AlertmanagerConfig(receiver="ops", url=url, timeout=10, allow_private=True, **changes)
    made = AlertmanagerChannel(config, RULES)
    assert made.name == ME and made.refresh == config.refresh
    return made


def known(server: Server) -> list[dict[str, Any]]:
    """The alerts that fire there, as amtool gives them."""
    found = json.loads(amtool(server, "alert", "query", "-o", "json"))
    assert isinstance(found, list)
    return sorted(found, key=lambda one: str(one["labels"]))


def firing(server: Server) -> set[tuple[str, str]]:
    return {(one["labels"]["episode_id"], one["labels"]["severity"]) for one in known(server)}


def until(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def told(one: Alert, state: State) -> Alert:
    return replace(one, told={ME: state})


def heard(receiver: Receiver) -> list[tuple[str, str]]:
    """Severity and status of every alert in every message of Alertmanager's own, in order."""
    messages = [request.json["alerts"] for request in list(receiver.received)]
    return [(one["labels"]["severity"], one["status"]) for message in messages for one in message]


def drift(id: str = "e1", **changes: Any) -> Alert:
    """One that began an hour ago."""
    began = time.time() - 3600.0
    start = written(datetime.fromtimestamp(began, UTC))
    return alert(id, **({"starts_at": start, "accepted": began + 1.0, "changed": began + 1.0} | changes))


def ended(id: str = "e1", **changes: Any) -> Alert:
    """The same, over for half an hour."""
    end = written(datetime.fromtimestamp(time.time() - 1800.0, UTC))
    return drift(id, **({"ends_at": end, "resolution": "recovered"} | changes))


def test_an_alert_fires_grows_worse_and_ends(own_alertmanager: Server) -> None:
    sender = channel(f"http://{own_alertmanager.address}/")
    mild, grave = drift(severity="warning"), told(drift(severity="critical"), "warning")
    sender.deliver(notification(mild))
    (one,) = known(own_alertmanager)
    assert one["labels"]["conversation_id"] == "c-17" and one["labels"]["severity"] == "warning"
    assert one["labels"]["alertname"] == "AnchorwatchPersonaDrift"
    assert one["annotations"]["summary"] and one["annotations"]["runbook_url"].startswith("https://docs.example/")
    assert one["generatorURL"] == "https://watch.example/sessions/c-17"
    assert datetime.fromisoformat(one["startsAt"]) == datetime.fromisoformat(mild.starts_at)
    sender.deliver(notification(grave, reason="escalated", time=now()))
    assert firing(own_alertmanager) == {("e1", "critical")}
    sender.deliver(notification(told(ended(), "critical"), reason="resolved", time=now()))
    assert firing(own_alertmanager) == set()


def test_an_alert_that_grew_worse_and_ended_unheard_leaves_nothing_behind(own_alertmanager: Server) -> None:
    sender = channel(f"http://{own_alertmanager.address}")
    sender.deliver(notification(drift(severity="warning")))
    sender.deliver(notification(told(ended(severity="critical"), "warning"), reason="resolved", time=now()))
    assert firing(own_alertmanager) == set()


def test_it_fires_for_as_long_as_somebody_says_so(own_alertmanager: Server) -> None:
    sender = channel(f"http://{own_alertmanager.address}")
    waits, grows = drift("e1"), told(drift("e2", severity="critical"), "warning")
    sender.deliver(notification(waits, drift("e2", severity="warning"), time=now()))
    before = {one["labels"]["episode_id"]: one["endsAt"] for one in known(own_alertmanager)}
    sender.keep_firing([told(waits, "critical"), grows, told(drift("e3"), "resolved"), ended("e4")])
    after = {one["labels"]["episode_id"]: one["endsAt"] for one in known(own_alertmanager)}
    assert set(before) == set(after) == {"e1", "e2"} and all(after[id] > before[id] for id in before)
    assert ("e2", "warning") in firing(own_alertmanager)  # it says what has been told, no more


def test_it_ends_by_itself_where_nobody_says_so(tmp_path: Path) -> None:
    config = "global: {resolve_timeout: 1s}\nroute: {receiver: nobody}\nreceivers: [{name: nobody}]"
    server = alertmanager(tmp_path / "alertmanager", config).start()
    try:
        channel(f"http://{server.address}").deliver(notification(drift(), time=now()))
        until(lambda: not known(server))
    finally:
        server.kill()


def test_receivers_behind_it_hear_of_beginning_and_end(receiver: Receiver, tmp_path: Path) -> None:
    config = f"""
        route:
          receiver: ops
          group_by: [deployment]
          group_wait: 0s
          group_interval: 1s
        receivers: [{{name: ops, webhook_configs: [{{url: "{receiver.url}"}}]}}]
    """
    server = alertmanager(tmp_path / "alertmanager", config).start()
    try:
        sender = channel(f"http://{server.address}")
        sender.deliver(notification(drift(severity="warning"), time=now()))
        until(lambda: ("warning", "firing") in heard(receiver))
        sender.deliver(notification(told(drift(), "warning"), reason="escalated", time=now()))
        until(lambda: ("critical", "firing") in heard(receiver))
        sender.deliver(notification(told(ended(), "critical"), reason="resolved", time=now()))
        until(lambda: receiver.received[-1].json["status"] == "resolved")
        assert heard(receiver)[0] == ("warning", "firing")
        assert heard(receiver).index(("warning", "resolved")) < heard(receiver).index(("critical", "resolved"))
        assert heard(receiver).count(("critical", "firing")) == 1
    finally:
        server.kill()


@pytest.mark.parametrize("days", [-400, 400])
def test_a_collectors_clock_does_not_decide_what_fires_here(own_alertmanager: Server, days: int) -> None:
    wrong = datetime.now(UTC) + timedelta(days=days)
    began, ended = written(wrong), written(wrong - timedelta(minutes=5))  # and it runs backwards
    sender = channel(f"http://{own_alertmanager.address}")
    one = drift(starts_at=began, accepted=time.time())
    sender.deliver(notification(one, time=now()))
    assert firing(own_alertmanager) == {("e1", "critical")}
    sender.keep_firing([told(one, "critical")])
    sender.deliver(notification(told(replace(one, ends_at=ended, resolution="recovered"), "critical"), time=now()))
    assert firing(own_alertmanager) == set()


def test_any_name_arrives_as_it_is(own_alertmanager: Server) -> None:
    names = [*HOSTILE, *NAMES, "\x00", "\ufffd", "\U0010ffff"]
    alerts = [
        replace(hostile(name), id=f"e{number}", starts_at=drift().starts_at, accepted=time.time(), severity="critical")
        for number, name in enumerate(names)
    ]
    channel(f"http://{own_alertmanager.address}").deliver(notification(*alerts, time=now()))
    found = {one["labels"]["episode_id"]: one["labels"] for one in known(own_alertmanager)}
    assert {id: one["conversation_id"] for id, one in found.items()} == {one.id: one.conversation_id for one in alerts}
    assert all(one["deployment"] == one["model"] == one["persona"] == one["conversation_id"] for one in found.values())


def test_a_storm_goes_in_parts_and_all_of_it_arrives(own_alertmanager: Server) -> None:
    storm = [drift(f"e{number}", conversation_id=f"c{number}") for number in range(2 * MOST_ALERTS + 1)]
    sender = channel(f"http://{own_alertmanager.address}")
    sender.deliver(notification(*storm[:1000], time=now()))
    assert len(known(own_alertmanager)) == 1000
    sender.keep_firing([told(one, "critical") for one in storm])
    assert len(known(own_alertmanager)) == len(storm)


def test_one_that_is_away_is_tried_again_and_found_when_it_is_back(own_alertmanager: Server) -> None:
    sender = channel(f"http://{own_alertmanager.address}")
    own_alertmanager.kill()
    with pytest.raises(ChannelUnavailable):
        sender.deliver(notification(drift(), time=now()))
    own_alertmanager.start()
    sender.deliver(notification(drift(), time=now()))
    assert firing(own_alertmanager) == {("e1", "critical")}


def test_one_refused_part_does_not_hold_up_the_others(receiver: Receiver) -> None:
    receiver.script(Answer(400), Answer(200))
    storm = [alert(f"e{number}") for number in range(MOST_ALERTS + 1)]
    with pytest.raises(ChannelError, match="400") as caught:
        channel(receiver.url).deliver(notification(*storm))
    assert not caught.value.retry
    assert [len(request.json) for request in receiver.received] == [MOST_ALERTS, 1]


def test_a_note_alone_is_nothing_to_it(receiver: Receiver) -> None:
    channel(receiver.url).deliver(notification(reason="digest", note="12 were held back."))
    assert not receiver.received


def test_a_repeat_is_the_same_bytes(receiver: Receiver) -> None:
    for _ in range(2):
        channel(f"{receiver.url}/prefix/").deliver(notification(told(alert(), "warning"), over("e2")))
    first, second = receiver.received
    assert first.body == second.body and first.path == "/prefix/api/v2/alerts"


@pytest.mark.parametrize(
    ("before", "now", "expected"),
    [
        (None, alert(), [("critical", False)]),
        ("critical", alert(), [("critical", False)]),
        ("resolved", alert(), [("critical", False)]),
        ("warning", alert(), [("critical", False), ("warning", True)]),
        ("info", alert(severity="warning"), [("warning", False), ("info", True)]),
        ("critical", over(), [("critical", True)]),
        ("warning", over(), [("critical", True), ("warning", True)]),
        (None, over(), [("critical", True)]),
    ],
)
def test_what_was_told_ends_where_something_else_is_told(
    before: State | None, now: Alert, expected: list[tuple[str, bool]]
) -> None:
    one = told(now, before) if before else now
    entries = posted(one, ME, "2026-06-01T13:00:00Z", RULES)
    assert [(entry["labels"]["severity"], "endsAt" in entry) for entry in entries] == expected
    assert posted(replace(one, told={"other/webhook[0]": "warning"}), ME, "2026-06-01T13:00:00Z", RULES)[0]["labels"][
        "severity"
    ] == (now.severity)


# Keys.


def test_keys_are_read_from_their_files_when_they_are_used(receiver: Receiver, tmp_path: Path) -> None:
    path = tmp_path / "key"
    path.write_text("first-4711\n")
    bearer = channel(receiver.url, bearer_token_file=path)
    bearer.deliver(notification(alert()))
    path.write_text("second-4711\n")
    bearer.deliver(notification(alert()))
    path.write_text("watch:päss:word\n")
    channel(receiver.url, basic_auth_file=path).deliver(notification(alert()))
    assert [request.headers["authorization"] for request in receiver.received] == [
        "Bearer first-4711",
        "Bearer second-4711",
        f"Basic {base64.b64encode('watch:päss:word'.encode()).decode()}",
    ]


@pytest.mark.parametrize("held", [None, "", "no colon in 4711"])
def test_nothing_goes_out_without_the_key(receiver: Receiver, tmp_path: Path, held: str | None) -> None:
    path = tmp_path / "key"
    if held is not None:
        path.write_text(held)
    with pytest.raises(ChannelUnavailable) as caught:
        channel(receiver.url, basic_auth_file=path).deliver(notification(alert()))
    assert not receiver.received and "4711" not in str(caught.value)


def test_a_revoked_key_is_told_with_its_cure(receiver: Receiver, tmp_path: Path) -> None:
    path = tmp_path / "key"
    path.write_text("revoked-4711")
    receiver.script(Answer(401), Answer(200))
    told = channel(receiver.url, bearer_token_file=path)
    with pytest.raises(ChannelUnavailable, match="revoked") as caught:
        told.deliver(notification(alert()))
    assert "4711" not in str(caught.value)
    path.write_text("new-4711")
    told.deliver(notification(alert()))
    assert receiver.received[-1].headers["authorization"] == "Bearer new-4711"


def now() -> str:
    return written(datetime.now(UTC))


def written(moment: datetime) -> str:
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")

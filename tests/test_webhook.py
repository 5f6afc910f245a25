"""What a webhook's receiver gets: Alertmanager's own body, signed so that the library of the standard verifies it."""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from msgspec.structs import replace
from notices import HOSTILE, RULES, alert, hostile, notification, over, texts
from receiver import Answer, Receiver
from servers import Server, alertmanager
from standardwebhooks import Webhook, WebhookVerificationError

from alerts.alertmanager import AlertmanagerChannel
from alerts.config import AlertmanagerConfig, WebhookConfig
from alerts.webhook import WebhookChannel, body, fingerprint
from monitor.alert import labels
from monitor.errors import ChannelError, ChannelUnavailable


def secret(path: Path, *, size: int = 32) -> tuple[Path, Webhook]:
    """A new secret in that file, and what verifies with it."""
    key = os.urandom(size)
    path.write_text(f"whsec_{base64.b64encode(key).decode()}\n")
    return path, Webhook(key)


def channel(receiver: Receiver, *secrets: Path, now: Callable[[], datetime] | None = None) -> WebhookChannel:
    config = WebhookConfig(
        receiver="ops", url=f"{receiver.url}/hook-4711", secret_files=secrets, timeout=10, allow_private=True
    )
    return WebhookChannel(config, RULES, now=now or (lambda: datetime.now(UTC)))


def test_either_secret_verifies_while_one_replaces_the_other(receiver: Receiver, tmp_path: Path) -> None:
    old, verifies_old = secret(tmp_path / "old")
    new, verifies_new = secret(tmp_path / "new")
    told = notification(alert())
    channel(receiver, old, new).deliver(told)
    (request,) = receiver.received
    assert request.headers["webhook-id"] == told.id and request.headers["content-type"] == "application/json"
    for verifies in (verifies_old, verifies_new):
        assert verifies.verify(request.body, request.headers) == request.json
    _, verifies_other = secret(tmp_path / "other")
    with pytest.raises(WebhookVerificationError):
        verifies_other.verify(request.body, request.headers)
    with pytest.raises(WebhookVerificationError):
        verifies_new.verify(request.body.replace(b"critical", b"warning"), request.headers)
    with pytest.raises(WebhookVerificationError):
        verifies_new.verify(request.body, request.headers | {"webhook-id": "n-0002"})


def test_a_secret_may_be_replaced_while_it_runs(receiver: Receiver, tmp_path: Path) -> None:
    path, _ = secret(tmp_path / "secret")
    sender = channel(receiver, path)
    sender.deliver(notification(alert()))
    _, verifies = secret(path)
    sender.deliver(notification(alert()))
    first, second = receiver.received
    assert verifies.verify(second.body, second.headers)
    with pytest.raises(WebhookVerificationError):
        verifies.verify(first.body, first.headers)


def test_a_repeat_has_the_same_id_and_body_and_a_signature_of_its_own_time(receiver: Receiver, tmp_path: Path) -> None:
    path, verifies = secret(tmp_path / "secret")
    times = [datetime.now(UTC) - timedelta(seconds=90), datetime.now(UTC)]
    for _ in range(2):  # also from a new process: nothing is remembered
        channel(receiver, path, now=lambda: times.pop(0)).deliver(notification(alert(), over("e2")))
    first, second = receiver.received
    assert first.body == second.body and first.headers["webhook-id"] == second.headers["webhook-id"]
    assert first.headers["webhook-timestamp"] != second.headers["webhook-timestamp"]
    assert verifies.verify(first.body, first.headers) == verifies.verify(second.body, second.headers)


def test_without_a_secret_there_is_still_an_id(receiver: Receiver) -> None:
    channel(receiver).deliver(notification(alert()))
    assert receiver.received[0].headers["webhook-id"] == "n-0001"
    assert "webhook-signature" not in receiver.received[0].headers


@pytest.mark.parametrize(
    "held", [None, "", "hunter2-4711", "whsec_", "whsec_aHVudGVyMg==", "whsec_" + "é" * 40, "a\nb", "A" * 400]
)
def test_nothing_goes_out_unsigned_where_a_secret_is_none(receiver: Receiver, tmp_path: Path, held: str | None) -> None:
    path = tmp_path / "secret"
    if held is not None:
        path.write_text(held)
    with pytest.raises(ChannelUnavailable) as caught:
        channel(receiver, path).deliver(notification(alert()))
    assert not receiver.received
    assert str(path) in str(caught.value) and caught.value.cure and "4711" not in str(caught.value)


@pytest.mark.parametrize(
    ("status", "again"), [(400, False), (422, False), (401, True), (404, True), (410, True), (503, True)]
)
def test_what_the_receiver_says_decides_whether_it_is_tried_again(receiver: Receiver, status: int, again: bool) -> None:
    receiver.script(Answer(status))
    with pytest.raises(ChannelError) as caught:
        channel(receiver).deliver(notification(alert()))
    assert caught.value.retry is again and "4711" not in str(caught.value)


# The body.


def shape(value: Any) -> Any:
    """Names and types: of maps with names of one's own only that they hold text, of lists what each of them holds."""
    if isinstance(value, list):
        return [shape(value[0])] if value else []
    return type(value).__name__


def form(told: dict[str, Any]) -> dict[str, Any]:
    return {
        **{key: shape(value) for key, value in told.items() if key != "alerts"},
        "alerts": [{key: shape(value) for key, value in one.items()} for one in told["alerts"]],
    }


def test_it_is_the_body_that_alertmanager_itself_sends(receiver: Receiver, tmp_path: Path) -> None:
    config = f"""
        route: {{receiver: ops, group_by: [deployment], group_wait: 0s, group_interval: 1s}}
        receivers: [{{name: ops, webhook_configs: [{{url: "{receiver.url}"}}]}}]
    """
    server = alertmanager(tmp_path / "alertmanager", config).start()
    try:
        began = datetime.now(UTC) - timedelta(hours=1)
        times = {"starts_at": written(began), "accepted": began.timestamp()}
        end = written(began + timedelta(minutes=30))
        firing = notification(alert(**times), labels={"deployment": "support-bot"})
        ended = notification(over(**times, ends_at=end), time=written(datetime.now(UTC)))
        through(server).deliver(firing)
        theirs = receiver.wait(1)[0].json
        ours = json.loads(body(firing, "ops", RULES))
        assert form(ours) == form(theirs)
        for key in ("version", "status", "receiver", "groupLabels", "commonLabels", "commonAnnotations"):
            assert ours[key] == theirs[key]
        for key in ("status", "labels", "annotations", "endsAt", "generatorURL"):
            assert ours["alerts"][0][key] == theirs["alerts"][0][key]
        through(server).deliver(ended)
        theirs = receiver.wait(2)[1].json
        ours = json.loads(body(ended, "ops", RULES))
        assert form(ours) == form(theirs)
        assert ours["status"] == theirs["status"] == ours["alerts"][0]["status"] == "resolved"
        assert moment(ours["alerts"][0]["endsAt"]) == moment(theirs["alerts"][0]["endsAt"]) == moment(end)
    finally:
        server.kill()


def test_the_fingerprint_is_alertmanagers_of_all_labels_but_severity(own_alertmanager: Server) -> None:
    import http.client

    sent = [{"labels": {name: value for name, value in labels(one).items() if name != "severity"}} for one in STRANGE]
    connection = http.client.HTTPConnection(own_alertmanager.address, timeout=30)
    connection.request("POST", "/api/v2/alerts", json.dumps(sent), {"Content-Type": "application/json"})
    assert connection.getresponse().read() == b""
    connection.request("GET", "/api/v2/alerts")
    theirs = {one["labels"]["episode_id"]: one["fingerprint"] for one in json.load(connection.getresponse())}
    assert theirs == {one.id: fingerprint(labels(one)) for one in STRANGE}
    assert fingerprint(labels(alert(severity="warning"))) == fingerprint(labels(alert(severity="critical")))


STRANGE = [replace(hostile(name), id=f"e{number}", starts_at=alert().starts_at) for number, name in enumerate(HOSTILE)]


@given(texts)
def test_names_stay_what_they_are_and_the_bytes_what_they_were(name: str) -> None:
    told = notification(replace(hostile(name), starts_at="2026-06-01T11:58:00Z"), over("e2"))
    data = body(told, "ops", RULES)
    assert data == body(told, "ops", RULES)
    found = json.loads(data)
    assert found["alerts"][0]["labels"]["conversation_id"] == name
    assert [one["status"] for one in found["alerts"]] == ["firing", "resolved"] and found["status"] == "firing"
    for one in found["alerts"]:
        assert found["commonLabels"].items() <= one["labels"].items()
        assert found["commonAnnotations"].items() <= one["annotations"].items()
    assert found["commonLabels"]["alertname"] == "AnchorwatchPersonaDrift"


def test_what_a_cap_held_back_is_said() -> None:
    found = json.loads(body(notification(reason="digest", note="12 were held back.", truncated=3), "ops", RULES))
    assert found["alerts"] == [] and found["truncatedAlerts"] == 3
    assert found["commonAnnotations"] == {"note": "12 were held back."}


def through(server: Server) -> AlertmanagerChannel:
    config = AlertmanagerConfig(receiver="ops", url=f"http://{server.address}", timeout=10, allow_private=True)
    return AlertmanagerChannel(config, RULES)


def written(moment: datetime) -> str:
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def moment(time: str) -> datetime:
    return datetime.fromisoformat(time)

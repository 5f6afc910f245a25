"""The webhook integration: Alertmanager's body, version 4, signed by Standard Webhooks.

It knows no HTTP beyond headers; what an alert says comes from `alerts.message`. Whoever takes Alertmanager's webhooks
takes these: https://prometheus.io/docs/alerting/latest/configuration/#webhook_config. Signatures are those of
https://github.com/standard-webhooks/standard-webhooks/blob/main/spec/standard-webhooks.md, one for each secret, so that
a receiver may go over to a new secret in its own time.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec
from standardwebhooks import Webhook

from alerts.config import AlertsConfig, WebhookConfig
from alerts.http import Client
from alerts.message import annotations_of, links
from alerts.secret import read_secret
from monitor.alert import Alert, Notification, labels
from monitor.errors import ChannelUnavailable

__all__ = ["WebhookChannel", "body", "fingerprint", "signatures"]

NOT_ENDED = "0001-01-01T00:00:00Z"  # what Alertmanager writes for an alert that fires
_LEAST_SECRET, _MOST_SECRET = 24, 64  # bytes, by the specification

_encoder = msgspec.json.Encoder(order="sorted")


class WebhookChannel:
    """Posts one body for each notification. See `Channel`."""

    refresh: float | None = None

    def __init__(
        self,
        integration: WebhookConfig,
        config: AlertsConfig,
        *,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        """`now` is the time in the signature: receivers refuse one that is more than minutes old."""
        self.name = integration.name
        self.send_resolved = integration.send_resolved
        self._integration = integration
        self._config = config
        self._now = now
        self._client = Client(timeout=integration.timeout, allow_private=integration.allow_private)

    def deliver(self, notification: Notification) -> None:
        """See `Channel.deliver`. A repeat has the same id and body; time and signatures are of its own."""
        data = body(notification, self._integration.receiver, self._config)
        headers = {"Content-Type": "application/json"}
        headers |= signatures(notification.id, self._now(), data, self._integration.secret_files)
        self._client.post(self._integration.url, data, headers, secret_url=True)

    def keep_firing(self, alerts: Sequence[Alert]) -> None:
        """Nothing: what has been told holds until something else is."""

    def close(self) -> None:
        """Close its connections."""
        self._client.close()


def body(notification: Notification, receiver: str, config: AlertsConfig) -> bytes:
    """The notification as Alertmanager would write it; the same one always makes the same bytes.

    Where a notification has something to say beside its alerts, it is the common annotation `note`.
    """
    told = [_alert(alert, config) for alert in notification.alerts]
    annotations = _common(alert["annotations"] for alert in told)
    if notification.note:
        annotations["note"] = notification.note
    return _encoder.encode(
        {
            "version": "4",
            "groupKey": notification.group,
            "truncatedAlerts": notification.truncated,
            "status": notification.status,
            "receiver": receiver,
            "groupLabels": notification.labels,
            "commonLabels": _common(alert["labels"] for alert in told),
            "commonAnnotations": annotations,
            "externalURL": config.external_url,
            "alerts": told,
        }
    )


def fingerprint(labels: dict[str, str]) -> str:
    """Alertmanager's hash of labels: FNV-1a, 64 bits, over sorted names and values, each closed by 0xff; in hex.

    Severity is left out, so that an alert which becomes critical stays the same one.
    """
    found = 0xCBF2_9CE4_8422_2325
    for name, value in sorted(labels.items()):
        if name != "severity":
            for byte in name.encode() + b"\xff" + value.encode() + b"\xff":
                found = (found ^ byte) * 0x100_0000_01B3 & 0xFFFF_FFFF_FFFF_FFFF
    return f"{found:016x}"


def signatures(id: str, time: datetime, data: bytes, secret_files: Iterable[Path]) -> dict[str, str]:
    """The headers of Standard Webhooks; without secrets there is nothing signed, but still an id to know repeats by.

    Raises:
        ChannelUnavailable: a file holds no secret now.
    """
    headers = {"webhook-id": id, "webhook-timestamp": str(int(time.timestamp()))}
    signed = [Webhook(_key(path)).sign(id, time, data.decode()) for path in secret_files]
    return headers | ({"webhook-signature": " ".join(signed)} if signed else {})


def _alert(alert: Alert, config: AlertsConfig) -> dict[str, Any]:
    identity = labels(alert)
    return {
        "status": "firing" if alert.firing else "resolved",
        "labels": identity,
        "annotations": annotations_of(alert, config),
        "startsAt": alert.starts_at,
        "endsAt": alert.ends_at or NOT_ENDED,
        "generatorURL": next((link.url for link in links(alert, config) if link.name.startswith("Session")), ""),
        "fingerprint": fingerprint(identity),
    }


def _common(found: Iterable[dict[str, str]]) -> dict[str, str]:
    """What all of them say alike."""
    every = list(found)
    first, rest = (every[0], every[1:]) if every else ({}, [])
    return {name: value for name, value in first.items() if all(other.get(name) == value for other in rest)}


def _key(path: Path) -> bytes:
    """Base64, perhaps after `whsec_`, of 24 to 64 bytes. The library would take anything, also a password."""
    text = read_secret(path).removeprefix("whsec_").rstrip("=")
    try:
        key = base64.b64decode(text + "=" * (-len(text) % 4), validate=True)
    except (binascii.Error, ValueError):
        key = b""
    if not _LEAST_SECRET <= len(key) <= _MOST_SECRET:
        raise ChannelUnavailable(
            f"{path} holds no secret of Standard Webhooks: 24 to 64 bytes in base64, after whsec_",
            cure=f'make one: echo "whsec_$(openssl rand -base64 32)" > {path}',
        )
    return key

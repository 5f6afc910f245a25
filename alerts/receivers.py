"""Whom to tell, and by which way: receivers and their integrations, as the file of rules has them.

Keys are Alertmanager's wherever it has them. What is secret stands in files of its own; the structs hold their paths.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Callable
from email.utils import parseaddr
from pathlib import Path
from typing import ClassVar, Literal, TypeAlias, cast

from msgspec import Struct

from alerts.guard import parse
from alerts.section import Section, url_problem
from monitor.errors import ChannelError

__all__ = [
    "AlertmanagerConfig",
    "AnyIntegration",
    "EmailConfig",
    "Integration",
    "LogConfig",
    "PagerDutyConfig",
    "Receiver",
    "SlackConfig",
    "WebhookConfig",
    "read_receiver",
]

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9 ._-]{0,63}")
MAX_ALERTS = 1000
MAX_TIMEOUT = 60.0
LOCAL = ("localhost", "127.0.0.1", "::1")


class Integration(Struct, frozen=True, kw_only=True):
    """One way to one place. `index` counts those of one type within a receiver; see `name`."""

    type: ClassVar[str] = ""

    receiver: str
    index: int = 0
    send_resolved: bool = True

    @property
    def name(self) -> str:
        """What it is called in metrics, logs and actions, such as `ops/webhook[0]`."""
        return f"{self.receiver}/{self.type}[{self.index}]"


class WebhookConfig(Integration, frozen=True, kw_only=True):
    """Alertmanager's webhook body, signed by Standard Webhooks with every secret given (two, while one is rotated)."""

    type: ClassVar[str] = "webhook"

    url: str
    secret_files: tuple[Path, ...] = ()
    max_alerts: int = 100
    timeout: float = 10.0
    allow_private: bool = False


class AlertmanagerConfig(Integration, frozen=True, kw_only=True):
    """Alertmanager's API v2. It groups and repeats by itself: alerts go there one by one, and are refreshed."""

    type: ClassVar[str] = "alertmanager"

    url: str
    basic_auth_file: Path | None = None
    bearer_token_file: Path | None = None
    refresh: float = 60.0
    timeout: float = 10.0
    allow_private: bool = False


class PagerDutyConfig(Integration, frozen=True, kw_only=True):
    """PagerDuty's Events API v2: one incident for each group."""

    type: ClassVar[str] = "pagerduty"

    routing_key_file: Path
    url: str = "https://events.pagerduty.com/v2/enqueue"
    timeout: float = 10.0
    allow_private: bool = False


class SlackConfig(Integration, frozen=True, kw_only=True):
    """Slack's incoming webhooks; the address is the secret, so it comes from a file."""

    type: ClassVar[str] = "slack"

    url_file: Path
    max_alerts: int = 10
    timeout: float = 10.0
    allow_private: bool = False


class EmailConfig(Integration, frozen=True, kw_only=True):
    """One mail to all of `to`."""

    type: ClassVar[str] = "email"

    to: tuple[str, ...]
    sender: str
    host: str
    port: int = 587
    username: str = ""
    password_file: Path | None = None
    tls: Literal["starttls", "tls", "none"] = "starttls"
    max_alerts: int = 100
    timeout: float = 10.0


class LogConfig(Integration, frozen=True, kw_only=True):
    """One JSON object a line, in a file or on standard output."""

    type: ClassVar[str] = "log"

    path: Path | None = None


AnyIntegration: TypeAlias = WebhookConfig | AlertmanagerConfig | PagerDutyConfig | SlackConfig | EmailConfig | LogConfig


class Receiver(Struct, frozen=True, kw_only=True):
    """Whom to tell, and how much at most. A cap of None is none; resolutions and digests do not count."""

    name: str
    integrations: tuple[AnyIntegration, ...]
    max_per_day: int | None = None
    max_per_deployment_per_day: int | None = None


def read_receiver(section: Section) -> Receiver:
    """One entry of `receivers`; its mistakes are told to the section."""
    name = section.text("name")
    if name and NAME.fullmatch(name) is None:
        section.wrong("name", "must be letters, digits, spaces and . _ -, at most 64")
    integrations: list[AnyIntegration] = []
    for key, read in _READ.items():
        for index, one in enumerate(section.sections(key)):
            integrations.append(read(one, name, index))
            one.finish()
    caps = [section.whole(key, None, 1, 1_000_000) for key in ("max_per_day", "max_per_deployment_per_day")]
    section.finish()
    return Receiver(
        name=name, integrations=tuple(integrations), max_per_day=caps[0], max_per_deployment_per_day=caps[1]
    )


def _webhook(section: Section, receiver: str, index: int) -> WebhookConfig:
    secrets = section.secrets("secret_files", _signing_secret)
    if len(secrets) > 2:
        section.wrong("secret_files", "one secret, or two while it is changed")
    if not secrets and "secret_files" not in section:
        section.advise("url", "without secret_files the receiver can't tell who is speaking")
    return WebhookConfig(
        receiver=receiver,
        index=index,
        send_resolved=section.truth("send_resolved", True),
        url=(url := section.url("url")),
        secret_files=secrets,
        max_alerts=section.whole("max_alerts", 100, 1, MAX_ALERTS),
        timeout=_timeout(section),
        allow_private=_allow_private(section, url),
    )


def _alertmanager(section: Section, receiver: str, index: int) -> AlertmanagerConfig:
    basic = section.secret("basic_auth_file", _user_and_password)
    bearer = section.secret("bearer_token_file")
    if basic and bearer:
        section.wrong("bearer_token_file", "and basic_auth_file are one too many")
    url = section.url("url")
    if (basic or bearer) and url.startswith("http://") and _host(url) not in LOCAL:
        section.wrong("url", "http:// sends the password or token for everybody to read: use https://")
    if "/api/" in url:
        section.wrong("url", "give the address that Alertmanager itself has, without /api/v2")
    return AlertmanagerConfig(
        receiver=receiver,
        index=index,
        send_resolved=section.truth("send_resolved", True),
        url=url.rstrip("/"),
        basic_auth_file=basic,
        bearer_token_file=bearer,
        # Alertmanager takes an alert for over when nobody has spoken of it for its resolve_timeout, by default 5m.
        refresh=section.seconds("refresh", 60.0, 1.0, 240.0),
        timeout=_timeout(section),
        allow_private=_allow_private(section, url),
    )


def _pagerduty(section: Section, receiver: str, index: int) -> PagerDutyConfig:
    return PagerDutyConfig(
        receiver=receiver,
        index=index,
        send_resolved=section.truth("send_resolved", True),
        routing_key_file=section.secret("routing_key_file", _routing_key, required=True) or Path(),
        url=(url := section.url("url", "https://events.pagerduty.com/v2/enqueue")),
        timeout=_timeout(section),
        allow_private=_allow_private(section, url),
    )


def _slack(section: Section, receiver: str, index: int) -> SlackConfig:
    private = section.truth("allow_private", False)
    return SlackConfig(
        receiver=receiver,
        index=index,
        send_resolved=section.truth("send_resolved", True),
        url_file=section.secret("api_url_file", lambda held: _address(held, private), required=True) or Path(),
        max_alerts=section.whole("max_alerts", 10, 1, 40),
        timeout=_timeout(section),
        allow_private=private,
    )


def _email(section: Section, receiver: str, index: int) -> EmailConfig:
    to, sender = section.texts("to"), section.text("from")
    for key, address in [*(("to", one) for one in to), ("from", sender)]:
        if address and not _is_address(address):
            section.wrong(key, f"{address!r} is no mail address")
    if not to:
        section.wrong("to", "name at least one address")
    host, _, port = section.text("smarthost").rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if "smarthost" in section and (not host or not re.fullmatch("[0-9]{1,5}", port) or not 0 < int(port) < 65536):
        section.wrong("smarthost", "must be host:port, such as smtp.example.com:587")
        port = "587"
    username, password = section.text("auth_username", ""), section.secret("auth_password_file")
    tls = cast(Literal["starttls", "tls", "none"], section.choice("tls", ("starttls", "tls", "none"), "starttls"))
    if bool(username) != (password is not None):
        section.wrong("auth_username", "and auth_password_file go together; give both, or neither")
    if password and tls == "none" and host not in LOCAL:
        section.wrong("tls", "none sends the password for everybody to read: use starttls or tls")
    return EmailConfig(
        receiver=receiver,
        index=index,
        send_resolved=section.truth("send_resolved", True),
        to=to,
        sender=sender,
        host=host,
        port=int(port or 587),
        username=username,
        password_file=password,
        tls=tls,
        max_alerts=section.whole("max_alerts", 100, 1, MAX_ALERTS),
        timeout=_timeout(section),
    )


def _log(section: Section, receiver: str, index: int) -> LogConfig:
    path = section.file("path")
    try:
        if path is not None and (not path.parent.is_dir() or path.is_dir()):
            section.wrong("path", f"{path} can't be a file: its folder must exist")
    except OSError as error:
        section.wrong("path", f"{path} can't be looked for: {error.strerror}")
    return LogConfig(receiver=receiver, index=index, send_resolved=section.truth("send_resolved", True), path=path)


_READ: dict[str, Callable[[Section, str, int], AnyIntegration]] = {
    "webhook_configs": _webhook,
    "alertmanager_configs": _alertmanager,
    "pagerduty_configs": _pagerduty,
    "slack_configs": _slack,
    "email_configs": _email,
    "log_configs": _log,
}


# What secrets look like. None of these repeats one.


def _timeout(section: Section) -> float:
    return section.seconds("timeout", 10.0, 0.1, MAX_TIMEOUT)


def _host(url: str) -> str:
    return url.partition("://")[2].partition("/")[0].rpartition(":")[0] or url.partition("://")[2].partition("/")[0]


def _signing_secret(held: str) -> str | None:
    try:
        key = base64.b64decode(held.removeprefix("whsec_"), validate=True)
    except binascii.Error:
        key = b""
    if 24 <= len(key) <= 64:
        return None
    return "must hold 24 to 64 bytes in base64, after whsec_: `echo whsec_$(openssl rand -base64 32)` makes one"


def _user_and_password(held: str) -> str | None:
    user, colon, password = held.partition(":")
    return None if user and colon and password else "must hold user:password"


def _routing_key(held: str) -> str | None:
    return (
        None if re.fullmatch(r"[A-Za-z0-9]{32}", held) else "must hold PagerDuty's routing key: 32 letters and digits"
    )


def _allow_private(section: Section, url: str) -> bool:
    """What it says, once it is known that alerts are ever sent to that address; names are looked up only then."""
    allowed = section.truth("allow_private", False)
    if url and (problem := _refused(url, allowed)):
        section.wrong("url", f"would never be sent to: {problem}")
    return allowed


def _refused(url: str, allow_private: bool) -> str | None:
    try:
        parse(url, allow_private=allow_private)
    except ChannelError as error:
        return f"{error.problem}; {error.cure}"
    return None


def _address(held: str, allow_private: bool) -> str | None:
    problem = url_problem(held) or _refused(held, allow_private)
    return f"must hold the webhook's address, and that {problem}" if problem else None


def _is_address(text: str) -> bool:
    _, address = parseaddr(text)
    local, at, domain = address.rpartition("@")
    return bool(local and at and domain) and not any(letter.isspace() for letter in address)

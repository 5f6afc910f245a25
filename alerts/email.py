"""Email: one mail with a text and an HTML part for each notification, by SMTP.

It knows mail; what is said comes from `alerts.message`. The library for messages (`email`) writes the headers, so that
no name can add one; the one for SMTP (`smtplib`) speaks it, over TLS with a certificate that is looked at. A repeat has
the same Message-ID, and mails of one group make one thread (RFC 5322, 3.6.4).
"""

from __future__ import annotations

import contextlib
import re
import smtplib
import socket
import ssl
import threading
from collections.abc import Iterator, Sequence
from datetime import datetime
from email.message import EmailMessage
from email.policy import SMTP
from email.utils import format_datetime, parseaddr
from html import escape
from typing import NamedTuple

import structlog

from alerts.config import AlertsConfig, EmailConfig
from alerts.escape import cut, shown
from alerts.message import CAUTION, facts, links, more, plain, sentence, title
from alerts.secret import read_secret
from monitor.alert import Alert, Notification
from monitor.errors import ChannelError, ChannelUnavailable

__all__ = ["EmailChannel", "mail"]

MOST_SUBJECT = 200
MOST_TRIES = 60  # of those that others have taken: at 15 to 30 s between them some 20 minutes, longer than greylisting
MOST_REMEMBERED = 500
STEPS = 3.0  # the whole delivery takes at most so many times the timeout of one step
ASCII_POLICY = SMTP.clone(cte_type="7bit")

_STYLE = "font-family:sans-serif;line-height:1.45;max-width:46em"
_log = structlog.get_logger("anchorwatch.email")


class _Rest(NamedTuple):
    """Who is still to have a mail, and how often they have been tried."""

    addresses: tuple[str, ...]
    tries: int = 0


class EmailChannel:
    """The email integration. `timeout` is that of each step; a delivery takes at most three times as long, and before
    it the time that a name server takes.
    """

    refresh: float | None = None

    def __init__(self, integration: EmailConfig, config: AlertsConfig) -> None:
        self.name = integration.name
        self.send_resolved = integration.send_resolved
        self._integration = integration
        self._config = config
        self._left: dict[str, _Rest] = {}  # by notification, of those that somebody has taken

    def deliver(self, notification: Notification) -> None:
        """Hand it to the mail server. See `Channel.deliver`.

        Where the server takes it for some of the addresses only, and may take it for the others later, those others
        alone are tried again, and in the end given up with a word in the log. Which they are is remembered for the
        last 500 such mails, not over a restart.
        """
        rest = self._left.get(notification.id, _Rest(self._integration.to))
        partly = rest.tries > 0
        message = mail(notification, self._config, self._integration)
        try:
            with _failures(self._where):
                refused = self._hand_over(message, rest.addresses)
        except ChannelUnavailable:
            raise
        except ChannelError as error:
            if not partly:
                raise
            self._give_up(notification, len(rest.addresses), problem=error.problem)
            return
        if not partly and all(address in refused for address in rest.addresses):
            raise _answered(self._where, min(refused.values()), "it takes none of the addresses: see `to`")
        if never := [code for code in refused.values() if code >= 500]:
            self._give_up(notification, len(never), code=never[0])
        later = tuple(address for address, code in refused.items() if code < 500)
        if later and rest.tries + 1 < MOST_TRIES:
            self._left[notification.id] = _Rest(later, rest.tries + 1)
            if len(self._left) > MOST_REMEMBERED:
                del self._left[next(iter(self._left))]
            code = refused[later[0]]
            raise ChannelUnavailable(f"{self._where} does not take {len(later)} of the addresses now ({code})")
        if later:
            self._give_up(notification, len(later), code=refused[later[0]])
        self._left.pop(notification.id, None)

    def _give_up(self, notification: Notification, addresses: int, **why: object) -> None:
        self._left.pop(notification.id, None)
        _log.error(
            "the mail server has taken a mail for some of the addresses; the others are not told",
            integration=self.name,
            notification=notification.id,
            addresses=addresses,
            **why,
        )

    def keep_firing(self, alerts: Sequence[Alert]) -> None:
        """Nothing to say again: a mail stays."""

    def close(self) -> None:
        """Nothing is held open."""

    @property
    def _where(self) -> str:
        return f"{self._integration.host}:{self._integration.port}"

    def _hand_over(self, message: EmailMessage, addresses: Sequence[str]) -> dict[str, int]:
        """One conversation with the server; says which of the addresses it refused, and how."""
        one = self._integration
        password = read_secret(one.password_file) if one.password_file else ""
        context = ssl.create_default_context()
        with _Line(one.timeout * STEPS) as line:
            if one.tls == "tls":
                server: smtplib.SMTP = _OverTls(line, one.host, one.port, one.timeout, context)
            else:
                server = _Plain(line, one.host, one.port, one.timeout)
            try:
                if one.tls == "starttls":
                    server.starttls(context=context)
                if one.username:
                    server.login(one.username, password)
                try:
                    refused = server.send_message(message, parseaddr(one.sender)[1], list(addresses))
                except smtplib.SMTPRecipientsRefused as error:  # by a 421 also those that come after it
                    return {address: error.recipients.get(address, (421, b""))[0] for address in addresses}
                with contextlib.suppress(smtplib.SMTPException, OSError):  # it is taken: nothing after that matters
                    server.quit()
                return {address: code for address, (code, _) in refused.items()}
            finally:
                server.close()


def mail(notification: Notification, config: AlertsConfig, integration: EmailConfig) -> EmailMessage:
    """The mail; the same bytes for the same notification. All ASCII, whatever the names in it."""
    domain = parseaddr(integration.sender)[1].rpartition("@")[2] or "anchorwatch.invalid"
    thread = f"<{_token(notification.group)}.group@{domain}>"
    message = EmailMessage(policy=ASCII_POLICY)
    message["Subject"] = cut(title(notification), MOST_SUBJECT)
    message["From"] = integration.sender
    message["To"] = ", ".join(integration.to)
    message["Date"] = format_datetime(datetime.fromisoformat(notification.time))
    message["Message-ID"] = f"<{_token(notification.id)}@{domain}>"
    message["In-Reply-To"] = thread
    message["References"] = thread
    message["Auto-Submitted"] = "auto-generated"  # RFC 3834: nobody's absence note is to answer it
    message.set_content(plain(notification, config), cte="quoted-printable")
    message.add_alternative("".join(_html(notification, config)), subtype="html", cte="quoted-printable")
    message.set_boundary(f"anchorwatch-{_token(notification.id)}")
    return message


def _html(notification: Notification, config: AlertsConfig) -> Iterator[str]:
    """Plain HTML with nothing loaded from anywhere. Our own words need no escape; all else has one."""
    yield f'<!doctype html><html><body style="{_STYLE}"><h2>{title(notification, _name)}</h2>\n'
    if notification.note:
        yield f"<p>{escape(notification.note)}</p>\n"
    for alert in notification.alerts:
        colour = "#2e7d32" if not alert.firing else "#b3261e" if alert.severity == "critical" else "#b26a00"
        yield f'<div style="border-left:4px solid {colour};padding:0 0 0 12px;margin:16px 0">'
        yield f"<p>{sentence(alert, _name)}<br>{escape(alert.story)}</p>\n<table>"
        for label, value in facts(alert, _name):
            yield f'<tr><th align="left" valign="top">{label}</th><td>{value}</td></tr>\n'
        yield "</table>\n<p>"
        yield " · ".join(f'<a href="{escape(url)}">{label}</a>' for label, url in links(alert, config))
        yield "</p></div>\n"
    if notification.truncated:
        yield f"<p>{more(notification)}</p>\n"
    yield f"<p><small>{CAUTION}</small></p></body></html>\n"


def _name(text: str) -> str:
    return f"<bdi>{escape(shown(text))}</bdi>"


def _token(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9.-]", "-", text)[:128]


class _Line:
    """A connection's end after so many seconds, however the other side goes on: a byte a second never times out."""

    def __init__(self, seconds: float) -> None:
        self._socket: socket.socket | None = None
        self._timer = threading.Timer(seconds, self._cut)
        self._timer.daemon = True

    def __enter__(self) -> _Line:
        self._timer.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._timer.cancel()
        if self._socket is not None:
            self._socket.close()

    def hold(self, connected: socket.socket) -> None:
        """A second handle on the connection, since TLS takes the first one over."""
        self._socket = connected.dup()

    def _cut(self) -> None:
        if self._socket is not None:
            with contextlib.suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)


class _Plain(smtplib.SMTP):
    """SMTP on a line that ends in time."""

    def __init__(self, line: _Line, host: str, port: int, timeout: float) -> None:
        self._line = line
        super().__init__(host, port, timeout=timeout)

    def _get_socket(self, host: str, port: int, timeout: float) -> socket.socket:
        connected = socket.create_connection((host, port), timeout)
        self._line.hold(connected)
        return connected


class _OverTls(smtplib.SMTP_SSL):
    """SMTP over TLS on a line that ends in time."""

    def __init__(self, line: _Line, host: str, port: int, timeout: float, context: ssl.SSLContext) -> None:
        self._line, self._name, self._trust = line, host, context
        super().__init__(host, port, timeout=timeout, context=context)

    def _get_socket(self, host: str, port: int, timeout: float) -> socket.socket:
        connected = socket.create_connection((host, port), timeout)
        self._line.hold(connected)
        return self._trust.wrap_socket(connected, server_hostname=self._name)


@contextlib.contextmanager
def _failures(where: str) -> Iterator[None]:
    """The library's errors as ours. What a server says may quote what it was sent, so only its code is told."""
    try:
        yield
    except ChannelError:
        raise
    except ssl.SSLCertVerificationError as error:
        raise ChannelUnavailable(
            f"{where} shows a certificate that can't be trusted: {error.verify_message}",
            cure="renew it; for a certificate authority of your own, SSL_CERT_FILE names what is trusted",
        ) from None
    except smtplib.SMTPNotSupportedError:
        raise ChannelError(
            f"{where} offers no STARTTLS, or no login, or no addresses beyond ASCII",
            cure="see its port: with `tls: tls` it is mostly 465, with `tls: starttls` 587",
        ) from None
    except smtplib.SMTPAuthenticationError as error:
        raise ChannelUnavailable(  # however it says so: with the right password the same mail is taken
            f"{where} answers {error.smtp_code}", cure="it does not accept user and password: see their files"
        ) from None
    except smtplib.SMTPResponseException as error:
        raise _answered(where, error.smtp_code, "see its own log for what it misses") from None
    except (smtplib.SMTPException, OSError) as error:
        reason = (
            error.strerror if isinstance(error, OSError) and error.strerror else "no answer in time, or none at all"
        )
        raise ChannelUnavailable(f"{where} can't be reached: {reason}", cure="see whether it is up") from None


def _answered(where: str, code: int, cure: str) -> ChannelError:
    """Below 500 a refusal passes (RFC 5321, 4.2.1). 500 is what the library makes of what is no SMTP at all."""
    problem = f"{where} answers {code}"
    return ChannelError(problem, cure=cure) if code > 500 else ChannelUnavailable(problem, cure=cure)

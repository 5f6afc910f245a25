"""Promises of email: a mail that people and programs can read, over a trusted line, in bounded time, whatever is named.

The mail server is aiosmtpd, a real one; servers that lie, stall or dribble are sockets of this file.
"""

from __future__ import annotations

import contextlib
import email
import shutil
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from email.message import EmailMessage
from email.policy import default
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from aiosmtpd.controller import Controller
from aiosmtpd.smtp import SMTP, AuthResult, Envelope, Session
from hypothesis import given
from msgspec.structs import replace
from notices import HOSTILE, NAMES, RULES, alert, hostile, notification, over, texts
from structlog.testing import capture_logs

import alerts.email as emails
from alerts.channel import Channel
from alerts.channels import open_channel
from alerts.config import EmailConfig
from alerts.email import EmailChannel, mail
from alerts.escape import shown
from monitor.alert import Notification
from monitor.errors import ChannelError, ChannelUnavailable

HEADERS = [
    *("Subject", "From", "To", "Date", "Message-ID", "In-Reply-To", "References", "Auto-Submitted"),
    *("MIME-Version", "Content-Type"),
]


def rules(**changes: Any) -> EmailConfig:
    known = {
        "receiver": "ops",
        "to": ("oncall@example.com", "lead@example.com"),
        "sender": "Anchorwatch <aw@example.com>",
        "host": "127.0.0.1",
        "tls": "none",
        "timeout": 5.0,
    }
    return EmailConfig(**(known | changes))


def read(told: Notification, **changes: Any) -> EmailMessage:
    """The mail as a reader gets it."""
    data = mail(told, RULES, rules(**changes)).as_bytes()
    assert data.isascii() and max(map(len, data.split(b"\r\n"))) <= 998
    found = email.message_from_bytes(data, policy=default)
    assert isinstance(found, EmailMessage) and not found.defects
    return found


def part(message: EmailMessage, kind: str) -> str:
    found = message.get_body((kind,))
    assert found is not None
    return str(found.get_content())


# The mail.


def test_a_mail_says_all_as_text_and_as_html() -> None:
    message = read(notification(alert()))
    assert message["Subject"].strip() == "Critical: sudden drop in support-bot, conversation c-17, towards pirate"
    assert message["To"] == "oncall@example.com, lead@example.com"
    assert message["Date"].datetime.isoformat() == "2026-06-01T12:00:00+00:00"
    assert message["Auto-Submitted"] == "auto-generated"
    assert "Session:         https://watch.example/sessions/c-17" in part(message, "plain")
    assert '<a href="https://watch.example/sessions/c-17">Session</a>' in part(message, "html")


def test_a_repeat_is_the_same_bytes_and_a_group_is_one_thread() -> None:
    first = mail(notification(alert()), RULES, rules()).as_bytes()
    assert mail(notification(alert()), RULES, rules()).as_bytes() == first
    one, two = read(notification(alert())), read(notification(over(), id="n-0002", reason="all_resolved"))
    assert one["Message-ID"] == "<n-0001@example.com>" != two["Message-ID"]
    assert one["References"] == two["References"] == f"<{'9f' * 16}.group@example.com>"


def test_an_address_of_the_operators_with_htmls_own_signs_is_one_link() -> None:
    url = 'https://logs.example/?a="<b>"&id={conversation_id}'
    data = mail(notification(alert()), replace(RULES, conversation_url=url), rules()).as_bytes()
    message = email.message_from_bytes(data, policy=default)
    assert isinstance(message, EmailMessage)
    assert Tags(part(message, "html")).links[1] == url.format(conversation_id="c-17")


class Tags(HTMLParser):
    """Every tag with its attributes, and the text of each `bdi`."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, tuple[tuple[str, str | None], ...]]] = []
        self.links: list[str] = []
        self.names: list[str] = []
        self._open = False
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, tuple(pair for pair in attrs if pair[0] != "href")))
        self.links += [value or "" for name, value in attrs if name == "href"]
        self._open = tag == "bdi"
        if self._open:
            self.names.append("")

    def handle_endtag(self, tag: str) -> None:
        self._open = False

    def handle_data(self, data: str) -> None:
        if self._open:
            self.names[-1] += data


def check_hostile(name: str) -> None:
    told = notification(hostile(name), note=name)
    message = read(told)
    assert list(message.keys()) == HEADERS
    assert message["From"] == "Anchorwatch <aw@example.com>" and "Bcc" not in message
    assert [one.get_content_type() for one in message.walk()] == ["multipart/alternative", "text/plain", "text/html"]
    tame, wild = Tags(part(read(notification(hostile("x"), note="x")), "html")), Tags(part(message, "html"))
    assert wild.tags == tame.tags
    hosts = {"https://watch.example", "https://logs.example", "https://docs.example"}
    assert {"/".join(link.split("/")[:3]) for link in wild.links} <= hosts


@pytest.mark.parametrize("name", [*HOSTILE, *NAMES])
def test_a_hostile_name_makes_no_header_no_part_and_no_tag(name: str) -> None:
    check_hostile(name)


@given(texts)
def test_no_name_makes_a_header_a_part_or_a_tag(name: str) -> None:
    check_hostile(name)


@pytest.mark.parametrize("name", NAMES)
def test_a_name_of_any_script_arrives(name: str) -> None:
    message = read(notification(alert(conversation_id=name)))
    assert shown(name) in message["Subject"] and shown(name) in part(message, "plain")
    assert shown(name) in Tags(part(message, "html")).names


# The server.


class Box:
    """A mail server's handler: it keeps what it takes, and refuses as it is told to."""

    def __init__(self) -> None:
        self.taken: list[Envelope] = []
        self.users: list[tuple[str, str]] = []
        self.secure: list[bool] = []
        self.refuse: Callable[[str], str | None] = lambda address: None
        self.answer = "250 OK"

    async def handle_RCPT(
        self, server: SMTP, session: Session, envelope: Envelope, address: str, options: list[str]
    ) -> str:
        if said := self.refuse(address):
            return said
        envelope.rcpt_tos.append(address)
        return "250 OK"

    async def handle_DATA(self, server: SMTP, session: Session, envelope: Envelope) -> str:
        if self.answer.startswith("250"):
            self.taken.append(envelope)
            self.secure.append(server.transport.get_extra_info("ssl_object") is not None)
        return self.answer

    def authenticate(self, server: SMTP, session: Session, envelope: Envelope, mechanism: str, data: Any) -> AuthResult:
        user = (data.login.decode(), data.password.decode())
        self.users.append(user)
        return AuthResult(success=user == ("aw", "right"), handled=False)


@contextlib.contextmanager
def server(box: Box, **options: Any) -> Iterator[int]:
    """A mail server on a loopback port; yields the port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    made = Controller(box, hostname="127.0.0.1", port=port, **options)
    made.start()
    try:
        yield port
    finally:
        made.stop()


@pytest.fixture(scope="session")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[ssl.SSLContext, Path]:
    """A server's context, and the file of the one authority that its clients must trust."""
    if shutil.which("openssl") is None:
        pytest.skip("no openssl to make a certificate with")
    folder = tmp_path_factory.mktemp("tls")
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"),
            *("-days", "1", "-subj", "/CN=mail", "-addext", "subjectAltName=IP:127.0.0.1"),
            *("-keyout", folder / "key.pem", "-out", folder / "cert.pem"),
        ],
        check=True,
        capture_output=True,
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "cert.pem", folder / "key.pem")
    return context, folder / "cert.pem"


def opened(port: int, **changes: Any) -> Channel:
    return open_channel(rules(port=port, **changes), RULES)


def test_it_arrives_at_everybody_and_a_repeat_is_the_same() -> None:
    box = Box()
    with server(box) as port:
        channel = opened(port)
        assert channel.name == "ops/email[0]" and channel.refresh is None
        channel.deliver(notification(alert()))
        channel.deliver(notification(alert()))
        channel.close()
    first, again = box.taken
    assert first.mail_from == "aw@example.com" and first.rcpt_tos == ["oncall@example.com", "lead@example.com"]
    assert first.content == again.content
    assert isinstance(first.content, bytes)
    assert email.message_from_bytes(first.content, policy=default)["Message-ID"] == "<n-0001@example.com>"


@pytest.mark.filterwarnings("ignore:Requiring AUTH:UserWarning")  # it does not count TLS from the first byte
@pytest.mark.parametrize("tls", ["starttls", "tls"])
def test_over_tls_with_a_password(
    tls: str, certificate: tuple[ssl.SSLContext, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    context, authority = certificate
    file = tmp_path / "password"
    box = Box()
    how = {"tls_context": context, "require_starttls": True} if tls == "starttls" else {"ssl_context": context}
    monkeypatch.setenv("SSL_CERT_FILE", str(authority))
    with server(
        box, authenticator=box.authenticate, auth_required=True, auth_require_tls=tls == "starttls", **how
    ) as port:
        channel = opened(port, tls=tls, username="aw", password_file=file)
        with pytest.raises(ChannelUnavailable, match="can't be read"):
            channel.deliver(notification(alert()))
        file.write_text("wrong-s3cr3t\n")
        with pytest.raises(ChannelUnavailable, match="535") as caught:  # it is no fault of the alert's
            channel.deliver(notification(alert()))
        assert "s3cr3t" not in str(caught.value) and caught.value.cure
        file.write_text("right\n")
        channel.deliver(notification(alert()))
    assert len(box.taken) == 1 and box.secure == [True] and box.users[-1] == ("aw", "right")


@pytest.mark.parametrize("tls", ["starttls", "tls"])
def test_nothing_is_told_to_a_server_that_nobody_vouches_for(
    tls: str, certificate: tuple[ssl.SSLContext, Path], tmp_path: Path
) -> None:
    context, _ = certificate
    (tmp_path / "password").write_text("right")
    box = Box()
    how = {"tls_context": context} if tls == "starttls" else {"ssl_context": context}
    with server(box, authenticator=box.authenticate, **how) as port:
        channel = opened(port, tls=tls, username="aw", password_file=tmp_path / "password")
        with pytest.raises(ChannelUnavailable, match="certificate") as caught:
            channel.deliver(notification(alert()))
    assert caught.value.cure and not box.taken and not box.users


def test_a_server_without_tls_is_told_nothing(tmp_path: Path) -> None:
    box = Box()
    (tmp_path / "password").write_text("right")
    with server(box, authenticator=box.authenticate, auth_require_tls=False) as port:
        channel = opened(port, tls="starttls", username="aw", password_file=tmp_path / "password")
        with pytest.raises(ChannelError, match="STARTTLS") as caught:
            channel.deliver(notification(alert()))
    assert not caught.value.retry and caught.value.cure and not box.taken and not box.users


@pytest.mark.parametrize(
    ("answer", "retry"),
    [("451 try later: <c-17> is odd", True), ("452 full", True), ("552 too large", False), ("554 5.7.1 spam", False)],
)
def test_a_refusal_passes_or_not_and_its_words_are_not_repeated(answer: str, retry: bool) -> None:
    box = Box()
    box.answer = answer
    with server(box) as port, pytest.raises(ChannelError, match=answer[:3]) as caught:
        opened(port).deliver(notification(alert()))
    assert isinstance(caught.value, ChannelUnavailable) is retry
    assert answer[4:] not in str(caught.value) and "c-17" not in str(caught.value)


@pytest.mark.parametrize(
    ("refused", "raised"),
    [
        ({"oncall": "550 no such user"}, None),
        ({"oncall": "450 mailbox busy"}, ChannelUnavailable),
        ({"oncall": "550 no such user", "lead": "450 busy"}, ChannelUnavailable),
        ({"oncall": "550 no such user", "lead": "550 no"}, ChannelError),
    ],
)
def test_addresses_that_are_refused(refused: dict[str, str], raised: type[ChannelError] | None) -> None:
    box = Box()
    box.refuse = lambda address: refused.get(address.partition("@")[0])
    with server(box) as port, capture_logs() as logs, contextlib.ExitStack() as stack:
        caught = stack.enter_context(pytest.raises(raised)) if raised else None
        opened(port).deliver(notification(alert()))
    # Whoever is not told although others are is for the operator's log.
    assert [(entry["addresses"], entry["code"]) for entry in logs] == ([] if raised else [(1, 550)])
    if raised and caught:
        assert type(caught.value) is raised and "example.com" not in str(caught.value)
    assert [one.rcpt_tos for one in box.taken] == ([["lead@example.com"]] if len(refused) == 1 else [])


FULL = {"full@example.com": "452 mailbox full"}


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> int:
    """Bounds that a test can reach."""
    for bound in ("MOST_TRIES", "MOST_REMEMBERED"):
        assert getattr(emails, bound) > 5
        monkeypatch.setattr(emails, bound, 5)
    return 5


def refusing(box: Box, answers: dict[str, str]) -> None:
    """The addresses that it is not to take, and how it says so."""
    box.refuse = answers.get


def test_who_has_taken_it_is_not_sent_it_again_while_another_can_not() -> None:
    box = Box()
    refusing(box, FULL)
    with server(box) as port:
        channel = opened(port, to=("ann@example.com", "full@example.com", "bob@example.com"))
        for _ in range(5):
            with pytest.raises(ChannelUnavailable, match=r"1 of the addresses.*452"):
                channel.deliver(notification(alert()))
        assert [one.rcpt_tos for one in box.taken] == [["ann@example.com", "bob@example.com"]]
        with pytest.raises(ChannelUnavailable):
            channel.deliver(notification(alert(), id="n-0002"))  # another one is for all
        refusing(box, {})
        channel.deliver(notification(alert()))
        assert [one.rcpt_tos for one in box.taken[1:]] == [["ann@example.com", "bob@example.com"], ["full@example.com"]]
        assert box.taken[0].content == box.taken[2].content, "the same mail"
        channel.deliver(notification(alert()))
        assert len(box.taken[3].rcpt_tos) == 3, "what is over is forgotten"


def test_who_can_not_take_it_is_given_up_with_a_word_but_never_before_anybody_has(few: int) -> None:
    box = Box()
    refusing(box, FULL)
    with server(box) as port, capture_logs() as logs:
        channel = opened(port, to=("ann@example.com", "full@example.com"))
        for _ in range(few - 1):
            with pytest.raises(ChannelUnavailable):
                channel.deliver(notification(alert()))
        assert logs == []
        channel.deliver(notification(alert()))
        assert len(box.taken) == 1
        assert [(one["log_level"], one["addresses"], one["code"]) for one in logs] == [("error", 1, 452)]
        assert "example.com" not in str(logs)
        alone = opened(port, to=("full@example.com",))
        for _ in range(few + 2):
            with pytest.raises(ChannelUnavailable, match="452"):
                alone.deliver(notification(alert()))
    assert len(logs) == 1 and len(box.taken) == 1


@pytest.mark.parametrize("then", ["550 no such user", "DATA"])
def test_a_later_refusal_for_ever_does_not_tell_the_others_anew(then: str) -> None:
    box = Box()
    refusing(box, FULL)
    with server(box) as port, capture_logs() as logs:
        channel = opened(port, to=("ann@example.com", "full@example.com"))
        with pytest.raises(ChannelUnavailable):
            channel.deliver(notification(alert()))
        if then == "DATA":
            refusing(box, {})
            box.answer = "554 spam"
        else:
            refusing(box, {"full@example.com": then})
        channel.deliver(notification(alert()))  # an error here would be told to all, in other words
    assert len(box.taken) == 1
    assert [(one["log_level"], one["addresses"]) for one in logs] == [("error", 1)]


def test_while_the_server_is_away_nobody_is_given_up(few: int) -> None:
    box = Box()
    refusing(box, FULL)
    with server(box) as port:
        channel = opened(port, to=("ann@example.com", "full@example.com"))
        with pytest.raises(ChannelUnavailable):
            channel.deliver(notification(alert()))
    for _ in range(few + 2):
        with pytest.raises(ChannelUnavailable, match="refused"):
            channel.deliver(notification(alert()))


def test_a_server_that_hangs_up_at_an_address_has_taken_it_for_nobody() -> None:
    box = Box()
    refusing(box, {"ann@example.com": "421 too busy"})
    with server(box) as port:
        channel = opened(port, to=("ann@example.com", "bob@example.com"))
        with pytest.raises(ChannelUnavailable, match="421"):
            channel.deliver(notification(alert()))
        refusing(box, {})
        channel.deliver(notification(alert()))
    assert [one.rcpt_tos for one in box.taken] == [["ann@example.com", "bob@example.com"]]


def test_what_is_remembered_of_mails_is_bounded(few: int) -> None:
    box = Box()
    refusing(box, FULL)
    with server(box) as port:
        channel = opened(port, to=("ann@example.com", "full@example.com"))
        assert isinstance(channel, EmailChannel)
        for number in range(few + 20):
            with pytest.raises(ChannelUnavailable):
                channel.deliver(notification(id=f"n-{number}"))
        assert len(channel._left) == few
        with pytest.raises(ChannelUnavailable):
            channel.deliver(notification(id=f"n-{few + 19}"))
    assert len(box.taken) == few + 20, "those of late are known"


# Servers that lie.


@contextlib.contextmanager
def liar(talk: Callable[[socket.socket], None]) -> Iterator[int]:
    """Something that listens and talks as it likes, until the client goes."""
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def serve() -> None:
            with contextlib.suppress(OSError):
                while True:
                    connection, _ = listening.accept()
                    with connection, contextlib.suppress(OSError):
                        talk(connection)

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield listening.getsockname()[1]
        with contextlib.suppress(OSError):
            listening.shutdown(socket.SHUT_RDWR)
    thread.join(10.0)
    assert not thread.is_alive()


def silent(connection: socket.socket) -> None:
    connection.recv(1)


def closing(connection: socket.socket) -> None:
    connection.sendall(b"220 hello\r\n")


def dribbling(connection: socket.socket) -> None:
    while True:
        connection.sendall(b"2")
        time.sleep(0.1)


def endless(connection: socket.socket) -> None:
    while True:
        connection.sendall(b"220-more\r\n")
        time.sleep(0.01)


def noise(connection: socket.socket) -> None:
    connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")


def long_line(connection: socket.socket) -> None:
    connection.sendall(b"2" * 100_000)


@pytest.mark.parametrize("talk", [silent, closing, dribbling, endless, noise, long_line])
@pytest.mark.parametrize("tls", ["none", "tls"])
def test_a_server_that_lies_is_given_up(talk: Callable[[socket.socket], None], tls: str) -> None:
    with liar(talk) as port, pytest.raises(ChannelUnavailable) as caught:
        opened(port, tls=tls, timeout=0.5).deliver(notification(alert()))
    assert f"127.0.0.1:{port}" in caught.value.problem


def test_a_server_that_is_not_there() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
    with pytest.raises(ChannelUnavailable, match="refused") as caught:
        opened(port).deliver(notification(alert()))
    assert caught.value.cure


def test_what_is_taken_is_not_sent_again_because_of_a_bad_goodbye() -> None:
    said = [
        b"220 hello\r\n",
        b"250 hello\r\n",
        b"250 ok\r\n",
        b"250 ok\r\n",
        b"250 ok\r\n",
        b"354 go\r\n",
        b"250 ok\r\n",
    ]

    def talk(connection: socket.socket) -> None:
        lines = connection.makefile("rb")
        for answer in said[:-1]:
            connection.sendall(answer)
            lines.readline()
        while lines.readline() not in (b".\r\n", b""):
            pass
        connection.sendall(said[-1])  # and it hangs up, without waiting for QUIT

    with liar(talk) as port:
        opened(port).deliver(notification(alert()))

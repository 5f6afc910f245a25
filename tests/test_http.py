"""One POST, whatever stands at the other end: it ends in time, takes little memory, and gives no secret away."""

from __future__ import annotations

import contextlib
import email.utils
import logging
import socket
import ssl
import subprocess
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from receiver import Answer, Receiver
from servers import free_port

from alerts.http import Client, Reply, retry_after
from monitor.errors import ChannelError, ChannelUnavailable

SECRETS = ("path-4711", "query-4711", "header-4711", "body-4711")
Talk = Callable[[socket.socket], None]


@pytest.fixture
def client() -> Iterator[Client]:
    made = Client(timeout=10, allow_private=True, most_bytes=1000)
    yield made
    made.close()


@pytest.fixture
def hasty() -> Iterator[Client]:
    """For servers that would keep it for ever."""
    made = Client(timeout=0.5, allow_private=True, most_bytes=1000)
    yield made
    made.close()


@pytest.fixture
def server() -> Iterator[Callable[[Talk], str]]:
    """What to do with a connection → the URL of a server that does so with each."""
    listening: list[socket.socket] = []

    def serve(talk: Talk) -> str:
        made = socket.create_server(("127.0.0.1", 0))
        listening.append(made)

        def accept() -> None:
            with contextlib.suppress(OSError):
                while True:
                    connection, _ = made.accept()
                    threading.Thread(target=run, args=(connection,), daemon=True).start()

        def run(connection: socket.socket) -> None:
            with connection, contextlib.suppress(OSError):
                talk(connection)

        threading.Thread(target=accept, daemon=True).start()
        return f"http://127.0.0.1:{made.getsockname()[1]}"

    yield serve
    for made in listening:
        made.close()


# What it says of an answer.


@pytest.mark.parametrize("status", [200, 201, 202, 204, 299])
def test_what_a_receiver_has_taken_is_taken(client: Client, receiver: Receiver, status: int) -> None:
    receiver.script(Answer(status, b"" if status == 204 else b"fine"))
    assert client.post(f"{receiver.url}/a?b", b"alert", {"X-Key": "k"}).status == status
    (request,) = receiver.received
    assert (request.method, request.path, request.body, request.headers["x-key"]) == ("POST", "/a?b", b"alert", "k")
    assert request.headers["host"] == f"127.0.0.1:{receiver.port}"


@pytest.mark.parametrize("status", [408, 425, 429, 500, 502, 503, 504, 507, 599])
def test_what_may_pass_is_tried_again_when_the_receiver_says(client: Client, receiver: Receiver, status: int) -> None:
    receiver.script(Answer(status, b"", {"Retry-After": "17"}), Answer(status))
    with pytest.raises(ChannelUnavailable, match=str(status)) as caught:
        client.post(receiver.url, b"", {})
    assert caught.value.retry_after == 17.0
    with pytest.raises(ChannelUnavailable) as caught:
        client.post(receiver.url, b"", {})
    assert caught.value.retry_after is None


@pytest.mark.parametrize("status", [400, 413, 422])
def test_what_the_message_is_at_fault_for_is_not_tried_again(client: Client, receiver: Receiver, status: int) -> None:
    receiver.script(Answer(status, b"no"))
    with pytest.raises(ChannelError, match=str(status)) as caught:
        client.post(receiver.url, b"", {})
    assert not caught.value.retry and caught.value.cure


@pytest.mark.parametrize("status", [304, 401, 402, 403, 404, 405, 409, 410, 415, 418, 451, 499, 600, 999])
def test_what_no_message_is_at_fault_for_is_tried_again_until_somebody_has_cured_it(
    client: Client, receiver: Receiver, status: int
) -> None:
    receiver.script(Answer(status, b"" if status == 304 else b"no", {"Retry-After": "3600"}), Answer(200))
    with pytest.raises(ChannelUnavailable, match=str(status)) as caught:
        client.post(receiver.url, b"", {})
    assert caught.value.cure and caught.value.retry_after is None
    assert client.post(receiver.url, b"", {}).status == 200


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_no_redirect_is_followed(client: Client, receiver: Receiver, status: int) -> None:
    receiver.script(Answer(status, b"", {"Location": f"{receiver.url}/elsewhere"}))
    with pytest.raises(ChannelUnavailable, match="redirect") as caught:
        client.post(receiver.url, b"", {})
    assert "address" in caught.value.cure and len(receiver.received) == 1


@pytest.mark.parametrize(("body", "said"), [(b"no_service\n", True), (b"a<b>", False), (b"\x1b[31m", False)])
def test_a_vendors_word_is_told_and_nothing_else_of_a_body(
    client: Client, receiver: Receiver, body: bytes, said: bool
) -> None:
    receiver.script(Answer(404, body))
    with pytest.raises(ChannelError) as caught:
        client.post(receiver.url, b"", {})
    assert (body.decode().strip() in str(caught.value)) is said


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        ("0", 0.0),
        (" 120 ", 120.0),
        ("3601", 3600.0),
        ("9" * 400, 3600.0),
        ("Thu, 01 Jan 1970 00:20:00 GMT", 200.0),
        ("Thu, 01 Jan 1970 00:00:00 GMT", 0.0),
        ("Fri, 31 Dec 9999 23:59:59 GMT", 3600.0),
        ("", None),
        ("-5", None),
        ("1.5", None),
        ("٣", None),
        ("nan", None),
        ("soon", None),
        ("Thu, 99 Foo 2026 25:61:61 GMT", None),
    ],
)
def test_retry_after_is_seconds_or_a_date(value: str, seconds: float | None) -> None:
    assert retry_after(value, now=1000.0) == seconds


@given(st.text(max_size=60))
def test_retry_after_may_be_anything(value: str) -> None:
    found = retry_after(value, now=0.0)
    assert found is None or 0.0 <= found <= 3600.0


def test_a_date_is_counted_from_now(receiver: Receiver) -> None:
    now = 1_800_000_000.0
    receiver.script(Answer(503, b"", {"Retry-After": email.utils.formatdate(now + 90, usegmt=True)}))
    with pytest.raises(ChannelUnavailable) as caught:
        Client(timeout=10, allow_private=True, now=lambda: now).post(receiver.url, b"", {})
    assert caught.value.retry_after == 90.0


# Whom it speaks to.


@pytest.mark.parametrize("found", [["10.1.2.3"], ["93.184.216.34", "127.0.0.1"], ["fe80::1%2"], ["::ffff:10.0.0.1"]])
def test_a_name_of_a_private_address_is_refused_before_a_connection(found: list[str]) -> None:
    client = Client(timeout=10, allow_private=False, resolve=lambda host, port: found)
    with pytest.raises(ChannelUnavailable, match=r"alerts\.example\.org") as caught:
        client.post("https://alerts.example.org/", b"", {})
    assert "allow_private" in caught.value.cure


def test_an_address_that_nothing_is_sent_to_may_be_put_right_while_one_waits(client: Client) -> None:
    with pytest.raises(ChannelUnavailable, match="does not begin with https") as caught:
        client.post("ftp://alerts.example.org/", b"", {})
    assert caught.value.cure


def test_the_connection_goes_to_the_address_that_was_looked_at(receiver: Receiver) -> None:
    asked = []

    def resolve(host: str, port: int) -> list[str]:
        asked.append((host, port))
        return ["127.0.0.1"]

    client = Client(timeout=10, allow_private=True, resolve=resolve)
    for _ in range(3):
        client.post(f"http://alerts.example.org:{receiver.port}/", b"", {})
    assert asked == [("alerts.example.org", receiver.port)] * 3  # once for each
    assert {request.headers["host"] for request in receiver.received} == {f"alerts.example.org:{receiver.port}"}
    client.close()


def test_a_name_server_that_changes_its_mind_gains_nothing(receiver: Receiver) -> None:
    answers = [["127.0.0.1"], ["169.254.169.254"]]
    client = Client(timeout=10, allow_private=True, resolve=lambda host, port: answers.pop(0))
    client.post(f"http://alerts.example.org:{receiver.port}/", b"", {})
    with pytest.raises(ChannelError, match="metadata"):
        client.post(f"http://alerts.example.org:{receiver.port}/", b"", {})
    assert not answers and len(receiver.received) == 1


def test_the_next_address_is_tried_where_one_does_not_answer(receiver: Receiver) -> None:
    client = Client(timeout=10, allow_private=True, resolve=lambda host, port: ["127.0.0.2", "127.0.0.1"])
    client.post(f"http://alerts.example.org:{receiver.port}/", b"", {})
    assert len(receiver.received) == 1


@pytest.mark.parametrize("resolve", [lambda host, port: [], lambda host, port: socket.getaddrinfo("x.invalid", 1)])
def test_a_name_without_an_address_is_asked_for_again(resolve: Callable[[str, int], list[str]]) -> None:
    with pytest.raises(ChannelUnavailable, match="resolved"):
        Client(timeout=10, allow_private=False, resolve=resolve).post("https://alerts.example.org/", b"", {})


def test_a_resolver_that_hangs_is_not_waited_for() -> None:
    for_ever = threading.Event()

    def resolve(host: str, port: int) -> list[str]:
        for_ever.wait()
        return []

    with pytest.raises(ChannelUnavailable, match="within"):
        Client(timeout=0.2, allow_private=False, resolve=resolve).post("https://alerts.example.org/", b"", {})
    for_ever.set()


def test_no_proxy_is_taken_from_the_environment(
    client: Client, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    proxy = Receiver()
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, proxy.url)
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    made = Client(timeout=10, allow_private=True)
    made.post(receiver.url, b"", {})
    assert len(receiver.received) == 1 and not proxy.received
    made.close()
    proxy.close()


def test_a_receiver_that_was_started_anew_is_found_again(client: Client) -> None:
    port = free_port()
    for _ in range(3):
        receiver = Receiver(port=port)
        assert client.post(receiver.url, b"", {}).status == 200
        receiver.close()
        with pytest.raises(ChannelUnavailable):
            client.post(receiver.url, b"", {})


# TLS.


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Key and certificate of receiver.example, signed by itself."""
    path = tmp_path_factory.mktemp("tls") / "receiver.pem"
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"),
            *("-days", "1", "-subj", "/CN=receiver.example", "-addext", "subjectAltName=DNS:receiver.example"),
            *("-keyout", str(path), "-out", str(path.with_suffix(".crt"))),
        ],
        check=True,
        capture_output=True,
    )
    path.write_text(path.read_text() + path.with_suffix(".crt").read_text())
    return path


@pytest.fixture
def secure(certificate: Path) -> Iterator[tuple[Receiver, list[str | None]]]:
    """A receiver that speaks TLS, and the names that it was asked for."""
    asked: list[str | None] = []
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    context.sni_callback = lambda connection, name, context: asked.append(name)
    made = Receiver(context=context)
    yield made, asked
    made.close()


def test_tls_asks_for_the_name_and_verifies_it_at_the_pinned_address(
    secure: tuple[Receiver, list[str | None]], certificate: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    receiver, asked = secure
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate.with_suffix(".crt")))
    client = Client(timeout=10, allow_private=True, resolve=lambda host, port: ["127.0.0.1"])
    assert client.post(f"https://receiver.example:{receiver.port}/", b"alert", {}).status == 200
    assert asked == ["receiver.example"]
    assert receiver.received[0].headers["host"] == f"receiver.example:{receiver.port}"
    for name in ("other.example", "127.0.0.1"):
        with pytest.raises(ChannelUnavailable, match="can't be trusted"):
            client.post(f"https://{name}:{receiver.port}/", b"alert", {})
    assert len(receiver.received) == 1
    client.close()


def test_a_certificate_that_nobody_trusts_is_refused(secure: tuple[Receiver, list[str | None]]) -> None:
    receiver, _ = secure
    client = Client(timeout=10, allow_private=True, resolve=lambda host, port: ["127.0.0.1"])
    with pytest.raises(ChannelUnavailable, match="can't be trusted: self-signed") as caught:
        client.post(f"https://receiver.example:{receiver.port}/", b"alert", {})
    assert "SSL_CERT_FILE" in caught.value.cure and not receiver.received


@pytest.mark.parametrize("held", [None, b"", b"no certificate"])
def test_certificates_that_cannot_be_read_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, held: bytes | None
) -> None:
    path = tmp_path / "trusted.crt"
    if held is not None:
        path.write_bytes(held)
    monkeypatch.setenv("SSL_CERT_FILE", str(path))
    with pytest.raises(ChannelUnavailable, match="certificates") as caught:
        Client(timeout=10, allow_private=True).post("https://127.0.0.1/", b"", {})
    assert "SSL_CERT_FILE" in caught.value.cure


def test_tls_with_who_speaks_none_is_told(client: Client, receiver: Receiver) -> None:
    with pytest.raises(ChannelUnavailable, match=r"TLS|reached"):
        client.post(receiver.url.replace("http:", "https:"), b"", {})


# Hostile servers. That these tests end is what they are about.


def say(*parts: bytes, then: Callable[[], bytes] | None = None, every: float = 0.0) -> Talk:
    """Read what comes first, answer so, and go on for ever with `then`."""

    def talk(connection: socket.socket) -> None:
        connection.recv(65_536)
        for part in parts:
            connection.sendall(part)
        while then is not None:
            connection.sendall(then())
            time.sleep(every)

    return talk


def silent(connection: socket.socket) -> None:
    while connection.recv(65_536):
        pass


def deaf(connection: socket.socket) -> None:
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    threading.Event().wait(30)


def slow_ear(connection: socket.socket) -> None:
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    while connection.recv(8192):
        time.sleep(0.05)


HEAD = b"HTTP/1.1 200 OK\r\n"
NEVER_ANSWER: dict[str, Talk] = {
    "hangs up": lambda connection: None,
    "says nothing": silent,
    "does not read": deaf,
    "reads a little now and then": slow_ear,
    "speaks another protocol": say(b"220 mail.example ESMTP\r\n"),
    "speaks no protocol": say(then=lambda: b"\x00\xff" * 5000),
    "a header a byte at a time": say(HEAD, then=lambda: b"x", every=0.05),
    "headers for ever": say(HEAD, then=lambda: b"X-More: and more\r\n"),
    "one header for ever": say(HEAD + b"X-More: ", then=lambda: b"more" * 1000),
    "go on, for ever": say(then=lambda: b"HTTP/1.1 100 Continue\r\n\r\n"),
    "half a header": say(b"HTTP/1.1 20"),
    "two lengths": say(HEAD + b"Content-Length: 1\r\nContent-Length: 2\r\n\r\nab"),
    "length of no number": say(HEAD + b"Content-Length: -1\r\n\r\n"),
}
SAY_YES: dict[str, tuple[Talk, int]] = {
    "a body for ever": (say(HEAD + b"\r\n", then=lambda: b"y" * 10_000), 1000),
    "a body a byte at a time": (say(HEAD + b"Content-Length: 999\r\n\r\n", then=lambda: b"y", every=0.1), 0),
    "chunks for ever": (say(HEAD + b"Transfer-Encoding: chunked\r\n\r\n", then=lambda: b"4\r\nyyyy\r\n"), 1000),
    "half a body": (say(HEAD + b"Content-Length: 999\r\n\r\nyy"), 0),
    "chunks of no length": (say(HEAD + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n"), 0),
}


@pytest.mark.timeout(60)
@pytest.mark.parametrize("what", NEVER_ANSWER)
def test_who_does_not_answer_is_left_in_time(hasty: Client, server: Callable[[Talk], str], what: str) -> None:
    with pytest.raises(ChannelUnavailable):
        hasty.post(server(NEVER_ANSWER[what]), b"alert" * 2_000_000, {})


@pytest.mark.timeout(60)
@pytest.mark.parametrize("what", SAY_YES)
def test_a_yes_is_a_yes_whatever_follows_it(hasty: Client, server: Callable[[Talk], str], what: str) -> None:
    talk, least = SAY_YES[what]
    reply = hasty.post(server(talk), b"alert", {})
    assert reply.status == 200 and least <= len(reply.body) <= 1000


@pytest.mark.timeout(60)
def test_no_more_is_taken_than_is_looked_at(client: Client, server: Callable[[Talk], str]) -> None:
    sent = 0

    def more() -> bytes:
        nonlocal sent
        sent += 10_000
        return b"y" * 10_000

    assert len(client.post(server(say(HEAD + b"\r\n", then=more)), b"alert", {}).body) == 1000
    assert sent < 64_000_000  # what the buffers in between hold, not what ten seconds do


@pytest.mark.timeout(60)
def test_a_no_is_a_no_though_its_body_never_ends(hasty: Client, server: Callable[[Talk], str]) -> None:
    with pytest.raises(ChannelError) as caught:
        hasty.post(server(say(b"HTTP/1.1 413 Too Large\r\n\r\n", then=lambda: b"n" * 10_000)), b"alert", {})
    assert not caught.value.retry and "max_alerts" in caught.value.cure


@pytest.mark.timeout(60)
def test_a_no_before_the_end_of_the_request_is_heard(client: Client, server: Callable[[Talk], str]) -> None:
    def talk(connection: socket.socket) -> None:
        connection.recv(1000)
        connection.sendall(b"HTTP/1.1 413 Too Large\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
        silent(connection)

    with pytest.raises(ChannelError, match="413"):
        client.post(server(talk), b"alert" * 1_000_000, {})


@pytest.mark.timeout(60)
def test_a_handshake_that_never_ends_is_left(hasty: Client, server: Callable[[Talk], str]) -> None:
    record = iter(b"\x16\x03\x03\x40\x00\x02\x00\x3f\xfc" + bytes(16_384))
    for talk in (silent, say(then=lambda: bytes([next(record)]), every=0.05)):
        with pytest.raises(ChannelUnavailable, match=r"within|TLS"):
            hasty.post(server(talk).replace("http:", "https:"), b"", {})


def test_nothing_is_unpacked(client: Client, server: Callable[[Talk], str]) -> None:
    bomb = b"\x1f\x8b" + b"\x00" * 200
    head = HEAD + b"Content-Encoding: gzip\r\nContent-Length: %d\r\n\r\n" % len(bomb)
    assert client.post(server(say(head + bomb)), b"", {}) == Reply(200, bomb)


def test_what_one_answer_leaves_over_is_no_answer_to_the_next(client: Client, server: Callable[[Talk], str]) -> None:
    def talk(connection: socket.socket) -> None:
        yes = HEAD + b"Content-Length: 0\r\n\r\n"
        while connection.recv(65_536):
            connection.sendall(yes + b"HTTP/1.1 202 Smuggled\r\nContent-Length: 0\r\n\r\n")

    url = server(talk)
    assert [client.post(url, b"", {}).status for _ in range(3)] == [200, 200, 200]


@pytest.mark.parametrize("value", ["a\r\nX-Injected: 1", "a\nb", "a\x00b", "ключ"])
def test_a_header_that_would_be_two_is_refused(client: Client, receiver: Receiver, value: str) -> None:
    with pytest.raises(ChannelUnavailable) as caught:
        client.post(receiver.url, b"", {"Authorization": value})
    assert "one line" in caught.value.cure and not receiver.received
    assert client.post(receiver.url, b"", {}).status == 200


# Secrets.


@pytest.mark.parametrize("talk", [lambda connection: None, say(b"HTTP/1.1 404 No\r\n\r\npath-4711"), None])
def test_no_secret_is_in_an_error_or_a_log(
    server: Callable[[Talk], str], talk: Talk | None, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    base = server(talk) if talk else f"http://127.0.0.1:{free_port()}"
    client = Client(timeout=10, allow_private=True)
    path, query, header, body = SECRETS
    with pytest.raises(ChannelError) as caught:
        client.post(f"{base}/{path}?{query}", body.encode(), {"X-Key": header}, secret_url=True)
    told = "".join(traceback.format_exception(caught.value)) + repr(caught.value) + caplog.text + repr(client)
    assert not [secret for secret in SECRETS if secret in told]
    assert "127.0.0.1" in str(caught.value)


def test_a_path_that_is_no_secret_is_told_but_never_the_query(client: Client, receiver: Receiver) -> None:
    receiver.script(Answer(404))
    with pytest.raises(ChannelError, match="/api/v2/alerts answers 404") as caught:
        client.post(f"{receiver.url}/api/v2/alerts?key=query-4711", b"", {})
    assert "query" not in str(caught.value)

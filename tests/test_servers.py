"""The tests' own servers do as they are told: killed they are gone, frozen they are silent, and they come back."""

from __future__ import annotations

import http.client
import socket
from collections.abc import Callable

import pytest
from receiver import Answer, Receiver
from servers import Server, amtool

WORDS = (b"one", b"two", b"three")


@pytest.mark.parametrize("end", [Server.kill, Server.stop])
def test_a_redis_comes_back_with_what_it_kept(own_redis: Server, end: Callable[[Server], None]) -> None:
    assert ask(own_redis, b"SET word anchor") == b"+OK\r\n"
    end(own_redis)
    assert not own_redis.running()
    with pytest.raises(OSError):
        ask(own_redis, b"PING")
    own_redis.start()
    assert ask(own_redis, b"GET word") == b"$6\r\nanchor\r\n"
    own_redis.wipe()
    own_redis.start()
    assert ask(own_redis, b"GET word") == b"$-1\r\n"


def test_a_frozen_server_answers_when_it_is_thawed(own_redis: Server) -> None:
    own_redis.freeze()
    with pytest.raises(TimeoutError):
        ask(own_redis, b"PING", seconds=0.3)
    own_redis.thaw()
    assert ask(own_redis, b"PING") == b"+PONG\r\n"


def test_a_broker_comes_back_at_the_same_place(own_kafka: Server) -> None:
    before = own_kafka.address
    own_kafka.kill()
    with pytest.raises(OSError):
        socket.create_connection((own_kafka.host, own_kafka.port), 1)
    assert own_kafka.start().address == before


def test_alertmanager_and_prometheus_are_asked_by_their_own_tools(
    own_alertmanager: Server, own_prometheus: Callable[[str], Server]
) -> None:
    assert amtool(own_alertmanager, "alert", "query", "-o", "json") == "[]\n"
    scraping = f"scrape_configs: [{{job_name: it, static_configs: [{{targets: ['{own_alertmanager.address}']}}]}}]"
    server = own_prometheus(f"global: {{scrape_interval: 1s}}\n{scraping}")
    status, _, body = get(server.address, "/api/v1/status/config")
    assert status == 200 and own_alertmanager.address.encode() in body


def test_a_receiver_writes_down_what_it_is_sent_and_answers_as_told(receiver: Receiver) -> None:
    receiver.script(Answer(418, b"no", {"x-why": "teapot"}), Answer(201))
    answers = [get(f"127.0.0.1:{receiver.port}", "/a?b=c", word, {"X-Word": word.decode()}) for word in WORDS]
    assert answers == [(418, "teapot", b"no"), (201, None, b""), (201, None, b"")]
    assert [(one.method, one.path, one.body) for one in receiver.wait(3)] == [
        ("POST", "/a?b=c", word) for word in WORDS
    ]
    assert receiver.received[0].headers["x-word"] == "one"


def get(
    address: str, path: str, body: bytes | None = None, headers: dict[str, str] | None = None
) -> tuple[int, str | None, bytes]:
    connection = http.client.HTTPConnection(address, timeout=30)
    try:
        connection.request("GET" if body is None else "POST", path, body, headers or {})
        answer = connection.getresponse()
        return answer.status, answer.getheader("x-why"), answer.read()
    finally:
        connection.close()


def ask(server: Server, command: bytes, seconds: float = 10) -> bytes:
    with socket.create_connection((server.host, server.port), seconds) as connection:
        connection.sendall(command + b"\r\n")
        return connection.recv(4096)

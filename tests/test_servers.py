"""The tests' own servers do as they are told: killed they are gone, frozen they are silent, and they come back."""

from __future__ import annotations

import socket
from collections.abc import Callable

import pytest
from servers import Server


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


def ask(server: Server, command: bytes, seconds: float = 10) -> bytes:
    with socket.create_connection((server.host, server.port), seconds) as connection:
        connection.sendall(command + b"\r\n")
        return connection.recv(4096)

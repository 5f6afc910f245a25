"""A connection to an address that has been looked at, all of whose steps share one deadline. It knows no HTTP.

A name is resolved once for each connection; every address that it has is judged by `alerts.guard`, and the connection
goes to one of these very addresses, so that a name server which answers otherwise the second time gains nothing. TLS
still asks for the name, and verifies it.
"""

from __future__ import annotations

import queue
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any

import httpcore

from alerts.guard import refusal, refused
from monitor.errors import ChannelUnavailable

__all__ = ["Deadline", "Pinned", "Resolve", "addresses"]

MOST_ADDRESSES = 4  # of one name that are tried
CHUNK = 16_384  # written at once, so that the deadline is looked at in between

# Name and port → IP addresses, in the order in which they are tried; may block.
Resolve = Callable[[str, int], list[str]]


def addresses(host: str, port: int) -> list[str]:
    """What the system's resolver says. Blocks, for as long as that is set to."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(place[0]) for *_, place in found))


class Deadline:
    """When everything has to be over, in monotonic seconds."""

    until = 0.0

    def start(self, seconds: float) -> None:
        """From now on."""
        self.until = time.monotonic() + seconds

    def left(self, error: type[Exception]) -> float:
        """Seconds, more than 0; raises that error where there are none."""
        seconds = self.until - time.monotonic()
        if seconds <= 0:
            raise error
        return seconds


class Pinned(httpcore.NetworkBackend):
    """Connects to an address that has been looked at, never to a name."""

    def __init__(self, deadline: Deadline, resolve: Resolve, allow_private: bool) -> None:
        self._deadline = deadline
        self._resolve = resolve
        self._allow_private = allow_private
        self._backend = httpcore.SyncBackend()

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,  # noqa: ARG002  (the library's; the deadline holds)
        local_address: str | None = None,  # noqa: ARG002
        socket_options: Iterable[Any] | None = None,  # noqa: ARG002
    ) -> httpcore.NetworkStream:
        """Raises, beside what the library does, `ChannelError` for a refused address, and for a name without any."""
        found = self._look_up(host, port)
        for address in found:  # one that is refused spoils all: it may be chosen the next time
            if why := refusal(address, allow_private=self._allow_private):
                raise refused(host, why)
        error: Exception = httpcore.ConnectError()
        for number, address in enumerate(found[:MOST_ADDRESSES]):
            share = self._deadline.left(httpcore.ConnectTimeout) / (min(len(found), MOST_ADDRESSES) - number)
            try:
                return _Timed(self._backend.connect_tcp(address, port, timeout=share), self._deadline)
            except (httpcore.ConnectError, httpcore.ConnectTimeout) as failed:
                error = failed
        raise error

    def _look_up(self, host: str, port: int) -> list[str]:
        """In a thread of its own, since a resolver may hang for longer than there is time."""
        done: queue.SimpleQueue[list[str] | None] = queue.SimpleQueue()

        def ask() -> None:
            try:
                done.put(self._resolve(host, port))
            except (OSError, UnicodeError):
                done.put(None)

        threading.Thread(target=ask, name="resolve", daemon=True).start()
        try:
            found = done.get(timeout=self._deadline.left(httpcore.ConnectTimeout))
        except queue.Empty:
            raise httpcore.ConnectTimeout from None
        if not found:
            raise ChannelUnavailable(
                f"the name {host} can't be resolved", cure="see that it is right, and the resolver"
            )
        return found


class _Timed(httpcore.NetworkStream):
    """A stream that no peer can draw out: every step has only what is left of the whole time."""

    def __init__(self, stream: httpcore.NetworkStream, deadline: Deadline) -> None:
        self._stream = stream
        self._deadline = deadline

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:  # noqa: ARG002
        return self._stream.read(max_bytes, self._deadline.left(httpcore.ReadTimeout))

    def write(self, buffer: bytes, timeout: float | None = None) -> None:  # noqa: ARG002
        for start in range(0, len(buffer), CHUNK):
            self._stream.write(buffer[start : start + CHUNK], self._deadline.left(httpcore.WriteTimeout))

    def close(self) -> None:
        self._stream.close()

    def start_tls(
        self,
        ssl_context: ssl.SSLContext,
        server_hostname: str | None = None,
        timeout: float | None = None,  # noqa: ARG002
    ) -> httpcore.NetworkStream:
        left = self._deadline.left(httpcore.ConnectTimeout)
        return _Timed(self._stream.start_tls(ssl_context, server_hostname, left), self._deadline)

    def get_extra_info(self, info: str) -> Any:
        return self._stream.get_extra_info(info)

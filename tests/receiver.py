"""A real HTTP server that writes down what it is sent, and answers as it is told. For whatever posts somewhere.

It knows no protocol above HTTP. `receiver` is the fixture; `Receiver` is for those who want several, or TLS.
"""

from __future__ import annotations

import contextlib
import json
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple

import pytest


class Received(NamedTuple):
    """One request, as it came. Header names are in lower case; `at` is monotonic seconds."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes
    at: float

    @property
    def json(self) -> Any:
        return json.loads(self.body)


class Answer(NamedTuple):
    """What it answers, after so many seconds."""

    status: int = 200
    body: bytes = b""
    headers: dict[str, str] = {}  # noqa: RUF012 (never changed)
    delay: float = 0.0


class Receiver:
    """Listens on a loopback port from the moment it is made.

    Attributes:
        url: http(s)://127.0.0.1:PORT, without a trailing slash.
        received: all requests, in the order in which they were complete.
        answer: request → answer; 200 for everything, unless somebody says otherwise. `script` sets a list of them.
    """

    def __init__(self, *, port: int = 0, context: ssl.SSLContext | None = None) -> None:
        self.received: list[Received] = []
        self.answer: Callable[[Received], Answer] = lambda request: Answer()
        self._changed = threading.Condition()
        self._connections: list[socket.socket] = []
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True
            timeout = 60

            def _take(self) -> None:
                body = self.rfile.read(int(self.headers.get("content-length", 0)))
                headers = {name.lower(): value for name, value in self.headers.items()}
                answer = receiver._note(Received(self.command, self.path, headers, body, time.monotonic()))
                time.sleep(answer.delay)
                self.send_response(answer.status)
                for name, value in answer.headers.items():
                    self.send_header(name, value)
                if not {"content-length", "transfer-encoding"} & {name.lower() for name in answer.headers}:
                    self.send_header("content-length", str(len(answer.body)))
                self.end_headers()
                self.wfile.write(answer.body)

            do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = do_HEAD = _take

            def log_message(self, format: str, *args: object) -> None:
                pass

        class Listening(ThreadingHTTPServer):
            daemon_threads = True
            request_queue_size = 128

            def process_request(self, request: Any, client_address: Any) -> None:
                receiver._connections.append(request)
                super().process_request(request, client_address)

            def handle_error(self, request: object, client_address: object) -> None:
                pass  # a client that goes away in the middle is no news

        self._server = Listening(("127.0.0.1", port), Handler)
        if context is not None:
            self._server.socket = context.wrap_socket(
                self._server.socket, server_side=True, do_handshake_on_connect=False
            )
        self.port: int = self._server.server_address[1]
        self.url = f"{'https' if context else 'http'}://127.0.0.1:{self.port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)
        self._thread.start()

    def script(self, *answers: Answer) -> None:
        """Answer so, one after the other; the last one holds for all that follow."""
        rest = list(answers)
        self.answer = lambda request: rest.pop(0) if len(rest) > 1 else rest[0]

    def wait(self, count: int, seconds: float = 30.0) -> list[Received]:
        """All requests so far, once there are so many."""
        with self._changed:
            if not self._changed.wait_for(lambda: len(self.received) >= count, seconds):
                raise AssertionError(f"{len(self.received)} requests, not {count}: {self.received}")
            return list(self.received)

    def close(self) -> None:
        """Stop listening, and hang up; whoever knocks from now on is refused."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
        for connection in self._connections:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def _note(self, request: Received) -> Answer:
        with self._changed:
            self.received.append(request)
            answer = self.answer(request)
            self._changed.notify_all()
        return answer


# Fixture; tests/conftest.py makes it known everywhere.


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    """This test's own, listening: `.url`, `.received`, `.script(Answer(503), Answer())`, `.wait(count)`."""
    made = Receiver()
    try:
        yield made
    finally:
        made.close()

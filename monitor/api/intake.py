"""Between many requests and one log: each request's messages are written whole, and many requests in one append.

It knows nothing of HTTP. A request waits until the log has acknowledged its messages; an append to a log costs about
the same for one message as for a thousand, so what comes while one is under way goes together into the next.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import Sequence

import structlog

from monitor.errors import AnchorwatchError, LogError, LogUnavailable
from monitor.stream.log import PROJECTIONS, Log, Message

__all__ = ["Intake"]

BATCH = 2_000
FIRST_RETRY_SECONDS = 0.1
LONGEST_RETRY_SECONDS = 1.0

_log = structlog.get_logger("anchorwatch.intake")


class _Request:
    def __init__(self, messages: Sequence[Message], answer: asyncio.Future[None]) -> None:
        self.messages = messages
        self.answer = answer


class Intake:
    """A writer thread for one topic of a log; made and used in an event loop.

    Args:
        log: where to write; the caller closes it.
        topic: the log's topic.
        patience: seconds that a request waits at most.

    Attributes:
        stuck: whether requests wait at the moment for a log that does not take them.
    """

    def __init__(self, log: Log, *, topic: str = PROJECTIONS, patience: float) -> None:
        self.stuck = False
        self._log = log
        self._topic = topic
        self._patience = patience
        self._loop = asyncio.get_running_loop()
        self._waiting: deque[_Request] = deque()
        self._changed = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="anchorwatch-intake", daemon=True)
        self._thread.start()

    async def write(self, messages: Sequence[Message]) -> None:
        """Wait until the log has them all.

        Raises:
            LogUnavailable: it did not answer in time. Some of them may be written, now or a little later.
            LogError: it will not have them.
        """
        request = _Request(messages, self._loop.create_future())
        with self._changed:
            if self._closing:
                raise LogUnavailable("the server is going down")
            self._waiting.append(request)
            self._changed.notify_all()
        try:
            # Cancelled when it runs out, or when the client has gone: the thread then passes over it.
            await asyncio.wait_for(request.answer, self._patience)
        except TimeoutError:
            raise LogUnavailable(f"the log has not acknowledged them for {self._patience:g} s") from None

    def close(self, timeout: float = 5.0) -> None:
        """Refuse what comes, and end when nothing waits any more; after so many seconds in any case."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join(timeout)

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._closing)
                if not self._waiting:
                    return
                requests = [self._waiting.popleft()]
                count = len(requests[0].messages)
                while self._waiting and count + len(self._waiting[0].messages) <= BATCH:
                    requests.append(self._waiting.popleft())
                    count += len(requests[-1].messages)
            self._write(requests)
            self.stuck = False

    def _write(self, requests: list[_Request]) -> None:
        """Append until the log has them or nobody waits for them any more."""
        pause = FIRST_RETRY_SECONDS
        while requests := [request for request in requests if not request.answer.done()]:
            try:
                self._log.append(self._topic, [message for request in requests for message in request.messages])
            except LogUnavailable as error:
                self.stuck = True
                _log.warning("the log is away; trying again", problem=error.problem, requests=len(requests))
                time.sleep(pause)
                pause = min(pause * 2, LONGEST_RETRY_SECONDS)
            except Exception as error:  # also a fault in a log's own code: it must not end this thread
                problem = error.problem if isinstance(error, AnchorwatchError) else type(error).__name__
                if len(requests) > 1:  # one request's messages must not cost the others theirs
                    for request in requests:
                        self._write([request])
                else:
                    _log.error("the log refuses projections", problem=problem)
                    self._answer(requests, LogError(f"the log refuses them: {problem}"))
                return
            else:
                self._answer(requests, None)
                return

    def _answer(self, requests: list[_Request], error: LogError | None) -> None:
        def answer() -> None:
            for request in requests:
                if not request.answer.done():
                    request.answer.set_exception(error) if error else request.answer.set_result(None)

        try:
            self._loop.call_soon_threadsafe(answer)
        except RuntimeError:
            _log.warning("the server ended before it could answer", requests=len(requests))

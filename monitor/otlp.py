"""Scores for those who look elsewhere: each response as a `gen_ai.evaluation.result` event over OTLP/HTTP.

It is a listener of the worker, and knows no log and no store. Nothing waits for it: what the receiver does not take in
time is dropped and counted, and after a crash of the worker nothing is told again. Alerts do not go this way.

Names are those of OpenTelemetry's semantic conventions for generative AI (open-telemetry/semantic-conventions-genai,
docs/gen-ai/gen-ai-events.md, status "development"); what they have no word for begins with `anchorwatch.`.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import structlog

from monitor import telemetry
from monitor.detect.conversation import Step
from monitor.errors import ConfigurationError
from monitor.events import Projection

if TYPE_CHECKING:
    from opentelemetry.sdk._logs import ReadableLogRecord

__all__ = ["EVENT", "NAME", "Evaluations", "attributes", "read_headers"]

EVENT = "gen_ai.evaluation.result"
NAME = "anchorwatch.drift"
CAPACITY = 10_000
BATCH = 256
DELAY_SECONDS = 1.0
TIMEOUT_SECONDS = 10.0

Value: TypeAlias = str | bool | int | float | tuple[str, ...]
_log = structlog.get_logger("anchorwatch.otlp")


class _Judged(NamedTuple):
    """What is kept of a response until it is sent."""

    projection: Projection
    step: Step
    observed: float


class Evaluations:
    """Takes committed responses, and sends them from a thread of its own. Call it for each; `close` at the end.

    Args:
        endpoint: where OTLP/HTTP log records are taken, such as http://localhost:4318/v1/logs.
        headers: sent with each request; they may hold a key.
        ca_file: PEM file of the authority that signed the receiver's certificate.
        rate: most events a second, over time; what warns, or has an episode open, is sent beyond it too. Each costs
            some 40 microseconds of the process's time.
        capacity: most events that wait; beyond it they are dropped.
        clock: seconds since 1970.
        ticks: monotonic seconds.

    Raises:
        ConfigurationError: OpenTelemetry is not installed.
    """

    def __init__(
        self,
        endpoint: str,
        *,
        headers: Mapping[str, str] | None = None,
        ca_file: Path | None = None,
        rate: float = 1_000.0,
        capacity: int = CAPACITY,
        clock: Callable[[], float] = time.time,
        ticks: Callable[[], float] = time.monotonic,
    ) -> None:
        try:
            from opentelemetry.exporter.otlp.proto.http._log_exporter import OTLPLogExporter
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.util.instrumentation import InstrumentationScope
            from requests import Session
        except ModuleNotFoundError as error:
            raise ConfigurationError(f"OTLP needs {error.name}", cure="pip install 'anchorwatch[otel]'") from error
        # It logs what the receiver answered, with its address, by a logger that nobody has set up. We log it ourselves.
        logging.getLogger("opentelemetry.exporter").setLevel(logging.CRITICAL)
        session = Session()
        session.hooks["response"].append(_refuse_redirect)
        self._exporter = OTLPLogExporter(
            endpoint=endpoint,
            headers=dict(headers or {}),
            certificate_file=str(ca_file) if ca_file else None,
            timeout=TIMEOUT_SECONDS,
            session=session,
        )
        self._resource = Resource.create({"service.name": "anchorwatch"})  # OTEL_RESOURCE_ATTRIBUTES add to it
        self._scope = InstrumentationScope("anchorwatch", version("anchorwatch"))
        self._rate = rate
        self._capacity = capacity
        self._clock = clock
        self._ticks = ticks
        self._left, self._left_at = rate, ticks()
        self._waiting: deque[_Judged] = deque()
        self._changed = threading.Condition()
        self._closing = False
        self._failures = 0
        self._thread = threading.Thread(target=self._run, name="anchorwatch-otlp", daemon=True)
        self._thread.start()

    def __call__(self, projection: Projection, step: Step) -> None:
        """Take one committed response; returns at once."""
        if step.outcome == "duplicate":
            return
        alarming = bool(step.findings) or step.state.episode is not None
        if not (self._allowed() or alarming) or len(self._waiting) >= self._capacity:
            telemetry.OTLP_EVENTS.labels("dropped").inc()
            return
        self._waiting.append(_Judged(projection, step, self._clock()))
        if len(self._waiting) == BATCH:
            with self._changed:
                self._changed.notify()

    def close(self, seconds: float = 5.0) -> None:
        """Send what waits, for at most so long; the rest is dropped."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join(seconds)
        self._exporter.shutdown()  # type: ignore[no-untyped-call]
        if left := len(self._waiting):
            self._waiting.clear()
            telemetry.OTLP_EVENTS.labels("dropped").inc(left)

    def _allowed(self) -> bool:
        now = self._ticks()
        self._left, self._left_at = min(self._rate, self._left + (now - self._left_at) * self._rate), now
        if self._left < 1.0:
            return False
        self._left -= 1.0
        return True

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closing or len(self._waiting) >= BATCH, DELAY_SECONDS)
            while batch := self._take():
                self._send(batch)
            if self._closing:
                return

    def _take(self) -> list[_Judged]:
        batch: list[_Judged] = []
        with contextlib.suppress(IndexError):  # nothing waits any more
            while len(batch) < BATCH:
                batch.append(self._waiting.popleft())
        return batch

    def _send(self, batch: list[_Judged]) -> None:
        try:
            # Tries again by itself, with a pause that doubles, until ten seconds are over.
            taken = self._exporter.export([self._record(one) for one in batch]).name == "SUCCESS"
        except Exception:
            _log.exception("the events can't be made")
            taken = False
        telemetry.OTLP_EVENTS.labels("sent" if taken else "failed").inc(len(batch))
        if not taken:
            self._failures += 1
            if self._failures & (self._failures - 1) == 0:
                _log.warning(
                    "the OTLP receiver does not take events; these are lost",
                    events=len(batch),
                    failed_batches=self._failures,
                    cure="see that ANCHORWATCH_OTLP_ENDPOINT names its whole address, and the headers its key",
                )
        elif self._failures:
            _log.info("the OTLP receiver takes events again", failed_batches=self._failures)
            self._failures = 0

    def _record(self, judged: _Judged) -> ReadableLogRecord:
        from opentelemetry._logs import LogRecord, SeverityNumber
        from opentelemetry.sdk._logs import ReadableLogRecord
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        projection, step, observed = judged
        parent = projection.attributes.get("traceparent")
        level = step.state.episode.severity if step.state.episode else None
        severity = {"critical": SeverityNumber.ERROR, "warning": SeverityNumber.WARN}.get(level or "")
        record = LogRecord(
            timestamp=int(projection.event_time.timestamp() * 1e9),
            observed_timestamp=int(observed * 1e9),
            context=TraceContextTextMapPropagator().extract({"traceparent": parent}) if parent else None,
            severity_number=severity or SeverityNumber.INFO,
            event_name=EVENT,
            attributes=attributes(projection, step),
        )
        return ReadableLogRecord(record, self._resource, self._scope)


def _refuse_redirect(response: Any, *_: object, **__: object) -> None:
    """The exporter follows none, and takes one for an answer that all is well."""
    if 300 <= response.status_code < 400:
        raise ValueError("the receiver sends us elsewhere")


def attributes(projection: Projection, step: Step) -> dict[str, Value]:
    """What the event says. Pure.

    The score is the risk: the largest statistic over its warning boundary, so that from 1 on it warns. It is missing
    where nothing was judged; then the label says why: `learning`, `unjudged`, `branch` or `late`. Else the label is
    `ok`, or the severity of the open episode.
    """
    state = step.state
    found: dict[str, Value] = {
        "gen_ai.evaluation.name": NAME,
        "gen_ai.evaluation.score.label": state.episode.severity if state.episode else "ok",
        "gen_ai.conversation.id": projection.conversation_id,
        "gen_ai.response.id": projection.id,
        "gen_ai.response.model": projection.model,
        "anchorwatch.deployment": projection.deployment,
        "anchorwatch.turn": projection.turn,
        "anchorwatch.projection": projection.projection,
        "anchorwatch.axis_id": projection.axis_id,
        "anchorwatch.tokens": projection.tokens,
        "anchorwatch.held": projection.held,
    }
    if step.z is None or step.risk is None:
        return found | {"gen_ai.evaluation.score.label": step.outcome}
    found["gen_ai.evaluation.score.value"] = step.risk
    found["gen_ai.evaluation.explanation"] = (
        f"{step.z:+.2f} standard deviations from the deployment's healthy mean; "
        f"{step.risk:.2f} of what warns, over the conversation so far"
    )
    found["anchorwatch.z"] = step.z
    if state.episode:
        found["anchorwatch.episode_id"] = state.episode.id
    for finding in step.findings:
        found["anchorwatch.kind"] = finding.kind
        found["anchorwatch.finding_id"] = finding.id
        found["anchorwatch.nearest_roles"] = tuple(finding.nearest_roles)
    return found


def read_headers(path: Path) -> dict[str, str]:
    """Headers from a file, one `name: value` a line; empty lines and those that begin with # do not count.

    Raises:
        ConfigurationError: it can't be read, or a line is none. Says nothing of what it holds.
    """
    try:
        lines = path.read_text(encoding="ascii").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(
            f"the headers in {path} can't be read ({type(error).__name__})", cure="let this user read it, as ASCII text"
        ) from error
    headers = {}
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.startswith("#"):
            continue
        name, colon, value = line.partition(":")
        if not colon or not name.strip() or any(character in name.strip() for character in " \t"):
            raise ConfigurationError(f"line {number} of {path} is no header", cure="write it as `name: value`")
        headers[name.strip()] = value.strip()
    return headers

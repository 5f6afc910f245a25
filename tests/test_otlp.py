"""Promises of the scores over OTLP: every committed response is one event that a real OTLP decoder reads, names are the
convention's, nothing waits for the receiver, what is lost is counted, and no key is ever shown."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace
from opentelemetry.proto.collector.logs.v1.logs_service_pb2 import ExportLogsServiceRequest
from opentelemetry.proto.logs.v1.logs_pb2 import LogRecord
from opentelemetry.semconv._incubating.attributes import gen_ai_attributes as convention
from receiver import Answer, Receiver
from service import CONFIG, message, projection

from monitor import telemetry
from monitor.detect.conversation import ConversationState, Step, step
from monitor.errors import ConfigurationError
from monitor.events import Projection
from monitor.otlp import EVENT, Evaluations, attributes, read_headers
from monitor.store.sqlite import SqliteStore
from monitor.stream.log import PROJECTIONS, EmbeddedLog
from monitor.worker import Worker

ROOT = Path(__file__).parent.parent


def counted(result: str) -> float:
    return telemetry.REGISTRY.get_sample_value("anchorwatch_otlp_events_total", {"result": result}) or 0.0


def talk(name: str, *values: float) -> list[tuple[Projection, Step]]:
    """A conversation, response by response."""
    state: ConversationState | None = None
    steps = []
    for turn, value in enumerate(values):
        event = projection(name, turn, value)
        done = step(state, event, CONFIG)
        state = done.state
        steps.append((event, done))
    return steps


def events(receiver: Receiver) -> list[tuple[LogRecord, dict[str, Any]]]:
    """All that it has been sent, as the protocol's own classes decode it."""
    found = []
    for request in list(receiver.received):
        for resource in ExportLogsServiceRequest.FromString(request.body).resource_logs:
            for scope in resource.scope_logs:
                for record in scope.log_records:
                    found.append((record, {one.key: _plain(one.value) for one in record.attributes}))
    return found


def _plain(value: Any) -> Any:
    kind = value.WhichOneof("value")
    held = getattr(value, kind)
    return [_plain(one) for one in held.values] if kind == "array_value" else held


@pytest.fixture
def sending(receiver: Receiver) -> Iterator[Callable[..., Evaluations]]:
    made: list[Evaluations] = []

    def make(**options: Any) -> Evaluations:
        made.append(Evaluations(f"{receiver.url}/v1/logs", **options))
        return made[-1]

    try:
        yield make
    finally:
        for one in made:
            one.close(0.1)


def test_every_committed_response_is_one_event(
    sending: Callable[..., Evaluations], receiver: Receiver, tmp_path: Path
) -> None:
    log, store = EmbeddedLog(tmp_path / "log.db"), SqliteStore(tmp_path / "store.db")
    talks = [projection(f"c{number}", turn, -0.9 * turn * (number % 2)) for turn in range(6) for number in range(40)]
    log.append(PROJECTIONS, [message(one) for one in talks + talks[:7]])  # seven of them twice
    scores = sending()
    worker = Worker(log, store, CONFIG, on_step=scores)
    while worker.run_once():
        pass
    scores.close()
    found = events(receiver)
    assert sorted(told["gen_ai.response.id"] for _, told in found) == sorted(one.id for one in talks)
    by_id = {told["gen_ai.response.id"]: told for _, told in found}
    for session in store.sessions(100):  # what is told last is what the store has
        last = by_id[f"{session.conversation_id}#{session.turn}"]
        assert session.risk == pytest.approx(last["gen_ai.evaluation.score.value"], rel=1e-6)
        assert last["gen_ai.evaluation.score.label"] == (session.severity or "ok")
    assert {told["gen_ai.evaluation.score.label"] for _, told in found} == {"ok", "warning", "critical"}
    log.close()
    store.close()


def test_an_event_says_what_the_convention_asks_for(sending: Callable[..., Evaluations], receiver: Receiver) -> None:
    steps = talk("ünï/cödé \u202e", 0.0, -3.0, -9.0)
    scores = sending(headers={"x-api-key": "s3cret"}, clock=lambda: 1_800_000_000.5)
    for one in steps:
        scores(*one)
    scores.close()
    (request,) = receiver.received
    assert request.path == "/v1/logs" and request.headers["content-type"] == "application/x-protobuf"
    assert request.headers["x-api-key"] == "s3cret"
    (resource,) = ExportLogsServiceRequest.FromString(request.body).resource_logs
    assert ("service.name", "anchorwatch") in [
        (one.key, one.value.string_value) for one in resource.resource.attributes
    ]
    found = events(receiver)
    assert [record.event_name for record, _ in found] == [EVENT] * 3
    assert [record.severity_text or record.severity_number for record, _ in found] == [9, 13, 17]  # INFO, WARN, ERROR
    at = datetime(2026, 1, 1, tzinfo=UTC).timestamp()
    assert [record.time_unix_nano for record, _ in found] == [int((at + 30 * turn) * 1e9) for turn in range(3)]
    assert {record.observed_time_unix_nano for record, _ in found} == {1_800_000_000_500_000_000}
    for (event, done), (_, told) in zip(steps, found, strict=True):
        assert told[convention.GEN_AI_EVALUATION_NAME] == "anchorwatch.drift"
        assert told[convention.GEN_AI_EVALUATION_SCORE_VALUE] == done.risk
        assert told[convention.GEN_AI_CONVERSATION_ID] == event.conversation_id
        assert told[convention.GEN_AI_RESPONSE_ID] == event.id
        assert told[convention.GEN_AI_RESPONSE_MODEL] == "toy"
        assert told[convention.GEN_AI_EVALUATION_EXPLANATION]
        assert told["anchorwatch.z"] == done.z and told["anchorwatch.deployment"] == "shop"
    assert found[1][1]["anchorwatch.kind"] == steps[1][1].findings[0].kind
    assert found[1][1]["anchorwatch.episode_id"] == steps[1][1].findings[0].episode_id


def test_every_name_is_the_conventions_or_ours() -> None:
    known = {value for name, value in vars(convention).items() if name.startswith("GEN_AI_") and isinstance(value, str)}
    for event, done in talk("a", 0.0, -9.0):
        for name in attributes(event, done):
            assert name in known or name.startswith("anchorwatch."), name


def test_every_attribute_is_documented() -> None:
    document = (ROOT / "docs" / "otel.md").read_text()
    documented = {
        name
        for row in document.splitlines()
        if row.startswith("| `")
        for name in re.findall(r"`([a-z_.]+)`", row.split("|")[1])
    }
    told = {name for value in (0.0, -9.0) for name in attributes(*talk("a", value)[0])}
    assert documented == told


def test_what_is_not_judged_has_no_score_but_says_why() -> None:
    event = projection("a", 0, deployment="unknown")
    told = attributes(event, step(None, event, CONFIG))
    assert told["gen_ai.evaluation.score.label"] == "learning"
    assert "gen_ai.evaluation.score.value" not in told and "anchorwatch.z" not in told
    event = replace(projection("a", 0), axis_id="another")
    assert attributes(event, step(None, event, CONFIG))["gen_ai.evaluation.score.label"] == "unjudged"


def test_an_event_belongs_to_the_span_that_the_collector_names(
    sending: Callable[..., Evaluations], receiver: Receiver
) -> None:
    trace, span = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
    scores = sending()
    for number, parent in enumerate([f"00-{trace}-{span}-01", "00-nonsense", ""]):
        event = replace(projection(f"c{number}", 0), attributes={"traceparent": parent})
        scores(event, step(None, event, CONFIG))
    scores.close()
    assert [(record.trace_id.hex(), record.span_id.hex()) for record, _ in events(receiver)] == [
        (trace, span),
        ("", ""),
        ("", ""),
    ]


def test_a_receiver_that_hangs_holds_nothing_up_and_what_it_costs_is_counted(
    sending: Callable[..., Evaluations], receiver: Receiver
) -> None:
    gone = threading.Event()

    def hang(request: object) -> Answer:
        gone.wait(30)
        return Answer()

    receiver.answer = hang
    dropped = counted("dropped")
    scores = sending(capacity=500, rate=1e9)
    steps = talk("a", 0.0)
    before = threading.active_count()
    for _ in range(5_000):
        scores(*steps[0])
    assert counted("dropped") - dropped >= 5_000 - 500 - 2 * 256, "memory is bounded"
    assert threading.active_count() <= before + 1
    began = time.monotonic()
    scores.close(0.2)
    assert time.monotonic() - began < 20, "an end does not wait for it"
    gone.set()
    assert counted("dropped") - dropped >= 5_000 - 2 * 256, "what waited is counted, too"


def test_beyond_the_rate_only_what_warns_is_sent(sending: Callable[..., Evaluations], receiver: Receiver) -> None:
    now = 0.0
    scores = sending(rate=10.0, ticks=lambda: now)
    healthy, drifting = talk("calm", 0.0)[0], talk("wild", -9.0)[0]
    dropped = counted("dropped")
    for _ in range(30):
        scores(*healthy)
        scores(*drifting)
    now = 0.5
    for _ in range(30):
        scores(*healthy)
    scores.close()
    labels = [told["gen_ai.conversation.id"] for _, told in events(receiver)]
    assert labels.count("wild") == 30
    assert labels.count("calm") + (counted("dropped") - dropped) == 60
    assert 5 <= labels.count("calm") <= 15


@pytest.mark.parametrize("status", [301, 400, 401, 404, 413])
def test_what_is_refused_is_lost_and_counted(
    status: int, sending: Callable[..., Evaluations], receiver: Receiver, capfd: pytest.CaptureFixture[str]
) -> None:
    headers = {"location": "http://127.0.0.1:1/elsewhere"} if status == 301 else {}
    receiver.answer = lambda request: Answer(status=status, body=b"your key s3cret is wrong", headers=headers)
    failed, sent = counted("failed"), counted("sent")
    scores = sending(headers={"authorization": "Bearer s3cret"})
    scores(*talk("a", 0.0)[0])
    scores.close()
    assert (counted("failed") - failed, counted("sent") - sent) == (1, 0)
    assert len(receiver.received) == 1
    said = "".join(capfd.readouterr())
    assert "does not take events" in said and "s3cret" not in said


def test_what_fails_for_a_moment_is_sent_again(sending: Callable[..., Evaluations], receiver: Receiver) -> None:
    answers = iter([Answer(status=503, headers={"retry-after": "0"}), Answer()])
    receiver.answer = lambda request: next(answers, Answer())
    sent = counted("sent")
    scores = sending()
    scores(*talk("a", 0.0)[0])
    scores.close(20.0)
    assert counted("sent") - sent == 1
    assert len(receiver.received) == 2 and receiver.received[0].body == receiver.received[1].body


def test_headers_come_from_a_file_that_is_never_quoted(tmp_path: Path) -> None:
    path = tmp_path / "headers"
    path.write_text("# for the receiver\n\nAuthorization: Bearer a:b\nx-scope:one\n")
    assert read_headers(path) == {"Authorization": "Bearer a:b", "x-scope": "one"}
    for wrong in ("Authorization Bearer s3cret\n", "two words: s3cret\n", ": s3cret\n"):
        path.write_text(wrong)
        with pytest.raises(ConfigurationError) as error:
            read_headers(path)
        assert "line 1" in error.value.problem and "s3cret" not in str(error.value)
    path.write_bytes(b"key: s\xc3\xa9cret\n")
    with pytest.raises(ConfigurationError):
        read_headers(path)
    with pytest.raises(ConfigurationError):
        read_headers(tmp_path / "none")


def test_a_worker_sends_them_where_the_settings_say(receiver: Receiver, tmp_path: Path) -> None:
    """The whole command, and that a wrong address is told at its start."""
    calibration, headers = tmp_path / "calibration.json", tmp_path / "headers"
    calibration.write_bytes(CONFIG.to_json())
    headers.write_text("x-api-key: s3cret\n")
    log = EmbeddedLog(tmp_path / "log.db")
    log.append(PROJECTIONS, [message(event) for event, _ in talk("a", 0.0, -9.0)])
    log.close()
    command = [sys.executable, "-m", "monitor", "worker", "--calibration", str(calibration)]
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith(("ANCHORWATCH_", "OTEL_"))},
        "ANCHORWATCH_DATA_DIR": str(tmp_path),
        "ANCHORWATCH_OTLP_ENDPOINT": f"{receiver.url}/v1/logs",
        "ANCHORWATCH_OTLP_HEADERS_FILE": str(headers),
    }
    worker = subprocess.Popen(command, env=environment, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 60
        while len(events(receiver)) < 2 and time.monotonic() < deadline:
            time.sleep(0.05)
    finally:
        worker.terminate()
        _, said = worker.communicate(timeout=30)
    assert [told["gen_ai.evaluation.score.label"] for _, told in events(receiver)] == ["ok", "critical"]
    assert worker.returncode == 0 and "s3cret" not in said
    wrong = environment | {"ANCHORWATCH_OTLP_ENDPOINT": "localhost:4318"}
    done = subprocess.run(command, env=wrong, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode != 0 and "ANCHORWATCH_OTLP_ENDPOINT" in done.stderr

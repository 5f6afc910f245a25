"""A real run under a real Prometheus: worker, dispatcher, HTTP interface and a collector, each a process of its own.

Recorded responses of the real model go in, some as if from hours ago, some from now, until the run is stopped; among
them conversations that drift, records that nobody can read, responses that come too late, and receivers that refuse.
Log and store are the embedded ones. `observed` is the fixture.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import servers
import yaml
from msgspec.structs import replace
from receiver import Answer, Receiver
from tiny import environment

from benchmarks.events import recorded
from monitor.envelope import message_of
from monitor.events import Projection, encode
from monitor.stream.log import PROJECTIONS, EmbeddedLog, Message

HERE = Path(__file__).parent
PARTS = ("worker", "dispatcher", "api", "collector")
SCRAPE_SECONDS = 1
EVERY = (("scrape", "interval"), ("scrape", "timeout"), ("evaluation", "interval"))


class Observed:
    """Attributes:
    url: Prometheus's.
    ports: part → where its metrics are.
    folder: everybody's data directory, and what each has said.
    """

    def __init__(self, folder: Path, canaries: Callable[[Path], None] | None = None) -> None:
        self.folder = folder
        self.ports = {part: servers.free_port() for part in PARTS}
        self.api_port = servers.free_port()
        self.receiver, self.broken = Receiver(), Receiver()
        self.broken.answer = lambda request: Answer(400)
        self._processes: list[subprocess.Popen[bytes]] = []
        self._stop = threading.Event()
        self._feeding: threading.Thread | None = None
        self._textfile = Receiver()
        if canaries is not None:
            canaries(folder / "canaries.prom")
            page = (folder / "canaries.prom").read_bytes()
            self._textfile.answer = lambda request: Answer(200, page, {"content-type": "text/plain; version=0.0.4"})
        jobs = {part: f"127.0.0.1:{port}" for part, port in self.ports.items()} | {
            "canaries": self._textfile.url.removeprefix("http://")
        }
        config = {
            "global": {f"{what}_{kind}": f"{SCRAPE_SECONDS}s" for what, kind in EVERY},
            "rule_files": [str(HERE.parent / "deploy" / "prometheus" / "*.rules.yml")],
            "scrape_configs": [
                {"job_name": job, "static_configs": [{"targets": [target]}]} for job, target in jobs.items()
            ],
        }
        self._prometheus = servers.prometheus(folder / "prometheus", yaml.safe_dump(config))
        self.url = f"http://{self._prometheus.address}"

    def start(self) -> Observed:
        self._write_rules()
        self._command("from alerts.command import alerts_app; alerts_app()", "enable", *ENABLE)
        self._command("", "calibration", "activate", "smollm2", "--by", "test")
        self._command("", "silence", "add", "--match", "kind=dip", "--for", "1h", "--by", "test")
        self._start("worker", "-m", "monitor", "worker")
        self._start("dispatcher", "-m", "monitor", "dispatch")
        self._start("api", "-m", "monitor", "api", ANCHORWATCH_API_PORT=str(self.api_port))
        collector = self._start("collector", str(HERE / "collector.py"), str(self.folder), str(self.ports["collector"]))
        self._prometheus.start()
        self._feeding = threading.Thread(target=self._feed, args=(collector,), daemon=True)
        self._feeding.start()
        return self

    def query(self, expr: str) -> list[dict[str, Any]]:
        """What Prometheus answers now."""
        return self._ask("query", query=expr)

    def query_range(self, expr: str, seconds: float, step: float) -> list[dict[str, Any]]:
        """The same over the last seconds."""
        now = time.time()
        return self._ask("query_range", query=expr, start=str(now - seconds), end=str(now), step=str(step))

    def said(self) -> str:
        """The end of what each part has said, for whoever must find out why it does not run."""
        ends = [f"{part}: {(self.folder / f'{part}.err').read_text(errors='replace')[-1500:]}" for part in PARTS]
        return "\n".join(ends)

    def running(self) -> bool:
        return all(process.poll() is None for process in self._processes)

    def close(self) -> None:
        self._stop.set()
        for process in self._processes:
            process.kill()
            process.wait()
        if self._feeding is not None:
            self._feeding.join(30)
        self._prometheus.kill()
        for one in (self.receiver, self.broken, self._textfile):
            one.close()

    def _environment(self, **more: str) -> dict[str, str]:
        return environment(
            ANCHORWATCH_DATA_DIR=str(self.folder),
            ANCHORWATCH_ALERTS_FILE=str(self.folder / "alerts.yaml"),
            ANCHORWATCH_FLEET_LATENESS_SECONDS="1",
            ANCHORWATCH_LOG_FORMAT="json",
            **more,
        )

    def _start(self, part: str, *words: str, **more: str) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(
            [sys.executable, *words],
            env=self._environment(ANCHORWATCH_METRICS_PORT=str(self.ports[part]), **more),
            stdin=subprocess.PIPE,
            stdout=(self.folder / f"{part}.out").open("wb"),
            stderr=(self.folder / f"{part}.err").open("wb"),
        )
        self._processes.append(process)
        return process

    def _command(self, code: str, *words: str) -> None:
        start = ["-c", code] if code else ["-m", "monitor"]
        command = [sys.executable, *start, *words]
        done = subprocess.run(command, env=self._environment(), capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr

    def _write_rules(self) -> None:
        def webhook(receiver: Receiver) -> list[dict[str, Any]]:
            return [{"url": f"{receiver.url}/", "allow_private": True}]

        rules = {
            "route": {
                "receiver": "ops",
                "group_by": ["kind"],
                "group_wait": "0s",
                "group_interval": "1s",
                "routes": [
                    {"receiver": "broken", "matchers": ['severity="critical"'], "continue": True},
                    {"receiver": "ops"},
                ],
            },
            "receivers": [
                {"name": "ops", "webhook_configs": webhook(self.receiver)},
                {"name": "broken", "webhook_configs": webhook(self.broken)},
            ],
        }
        (self.folder / "alerts.yaml").write_text(json.dumps(rules, indent=1))

    def _feed(self, collector: subprocess.Popen[bytes]) -> None:
        """All traffic: by the collector what is from hours ago, then over HTTP what is from now."""
        assert collector.stdin is not None
        now = datetime.now(UTC)
        talks = by_talk(recorded(100_000))
        log = EmbeddedLog(self.folder / "log.db")
        past, live = talks[0::2], talks[1::2]
        # They end two hours ago: what came too late is counted when the first minute of another hour is closed.
        apart = timedelta(hours=3) / len(past)
        with contextlib.suppress(OSError):
            for index, talk in enumerate(past):
                for one in at(talk, now - timedelta(hours=5) + apart * index):
                    collector.stdin.write(encode(one) + b"\n")
            collector.stdin.flush()
            log.append(PROJECTIONS, [Message("poison", b"not a projection"), Message("poison", b"{}")])
            closed = (now - timedelta(hours=4)).timestamp()
            while not any(float(one["value"][1]) > closed for one in self.query(CLOSED)):
                if self._stop.wait(0.2):
                    return
            for talk in past[-10:]:
                log.append(PROJECTIONS, [message_of(one) for one in at(talk, now - timedelta(hours=4, minutes=30))])
        for talk in itertools.cycle(reversed(live)):
            if self._stop.wait(0.2):
                break
            events = at(talk, datetime.now(UTC) - timedelta(seconds=len(talk)), seconds=1)
            events = [replace(one, deployment="shop") if talk in live[-3:] else one for one in events]
            body = b"[" + b",".join(map(encode, [*events, events[0]])) + b"]"
            request = urllib.request.Request(
                f"http://127.0.0.1:{self.api_port}/v1/projections", body, {"content-type": "application/json"}
            )
            with contextlib.suppress(OSError):
                urllib.request.urlopen(request, timeout=20).close()
        log.close()

    def _ask(self, what: str, **asked: str) -> list[dict[str, Any]]:
        request = urllib.request.Request(
            f"{self.url}/api/v1/{what}", urllib.parse.urlencode(asked).encode(), method="POST"
        )
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                found: list[dict[str, Any]] = json.load(answer)["data"]["result"]
        except urllib.error.HTTPError as error:
            raise ValueError(f"{asked['query']}: {error.read().decode()}") from None
        return found


CLOSED = "max(anchorwatch_fleet_closed_timestamp_seconds)"
ENABLE = ("--by", "test", "--conversations-per-day", "1000", "--yes")


def by_talk(projections: Iterator[Projection]) -> list[list[Projection]]:
    """Whole conversations, those that drift lowest last, so that they come while somebody looks."""
    talks: dict[str, list[Projection]] = {}
    for one in projections:
        talks.setdefault(one.conversation_id, []).append(one)
    inorder = [sorted(talk, key=lambda one: one.turn) for talk in talks.values()]
    return sorted(inorder, key=lambda talk: -min(one.projection for one in talk))


def at(talk: list[Projection], begin: datetime, *, seconds: float = 20.0) -> list[Projection]:
    """The conversation as another one that begins then."""
    conversation = str(uuid.uuid4())
    times = [(begin + timedelta(seconds=seconds * one.turn)).isoformat(timespec="microseconds") for one in talk]
    return [
        replace(one, id=str(uuid.uuid4()), conversation_id=conversation, time=when.replace("+00:00", "Z"))
        for one, when in zip(talk, times, strict=True)
    ]


@pytest.fixture(scope="session")
def observed(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Iterator[Observed]:
    """The run, going on. The canaries are those of a tiny model, really projected again."""
    from collectors.check import CANARY_METRICS, check_bundle
    from monitor import telemetry

    loaded, built = request.getfixturevalue("loaded"), request.getfixturevalue("built")

    def canaries(file: Path) -> None:
        check_bundle(loaded, built.bundle)
        telemetry.write_metrics(file, CANARY_METRICS)

    made = Observed(tmp_path_factory.mktemp("observed"), canaries)
    try:
        yield made.start()
    finally:
        made.close()

"""The demo: a real model holds scripted conversations, is watched while it speaks, and drifting ones are flagged live.

Every part is the real one: model, tap, queue, log, worker, store, dispatcher, page. It knows how to join them and how
to show it. By default log and store are embedded, and thrown away; on Kafka and Redis it has a topic of its own, so
that nothing of it gets among real conversations.
"""

from __future__ import annotations

import contextlib
import tempfile
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import msgspec
from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from collectors.models import load_model
from collectors.overhead import measure_overhead
from collectors.publish import open_publisher
from collectors.traffic import DRIFTING, HEALTHY, Reply, Script, load_scripts, play
from collectors.watch import watch
from monitor import connect
from monitor.axis.bundle import load_bundle, resolve_bundle
from monitor.database import sqlite_url
from monitor.detect.baseline import DetectorConfig
from monitor.detect.configure import detector_config
from monitor.detect.conversation import Step
from monitor.errors import ConfigurationError
from monitor.events import Finding, Projection
from monitor.settings import Settings, load_settings
from monitor.stream import open_log, open_subscription, open_topics
from monitor.stream.log import PROJECTIONS
from monitor.stream.options import KafkaOptions
from monitor.stream.topics import TopicSpec
from monitor.worker import Listener, Worker

__all__ = ["Demo", "publish_demo", "run_demo", "sparkline", "spread"]

# What the paper expects of each kind (arXiv 2601.10387, "persona drift in conversations").
MEANING = {
    "bounded_task": "practical work, stays the Assistant",
    "creative_writing": "poems and stories that were asked for: healthy",
    "small_talk": "friendly chat: healthy",
    "therapy": "a user leans on it emotionally: the paper sees drift",
    "philosophy": "pressed about its own nature: the paper sees drift",
    "role_play": "asked to be somebody else: drift",
    "jailbreak": "pressed into an unrestricted persona: drift",
    "slow_drift": "a task that slowly becomes something else: drift",
}
TOPIC = "anchorwatch.demo"
# Settings, calibration, where alerts go, who is told of every response -> where the page is, what is set at the end.
Service: TypeAlias = Callable[
    [Settings, DetectorConfig, Path, Listener], AbstractContextManager[tuple[str, threading.Event]]
]
_BARS = "▁▂▃▄▅▆▇█"


@dataclass
class Session:
    """What the table shows of one conversation."""

    kind: str
    topic: str
    turns: int
    z: list[float] = field(default_factory=list)
    risk: float = 0.0
    findings: list[Finding] = field(default_factory=list)

    @property
    def flagged(self) -> bool:
        """Whether anybody would have been told."""
        return any(finding.severity != "info" for finding in self.findings)


class Demo:
    """The sessions of a running demo. The worker's thread reports steps, the main thread replies; both are shown."""

    def __init__(self, conversations: Sequence[tuple[str, Script]]) -> None:
        self.sessions = {id: Session(script.kind, script.topic, len(script.turns)) for id, script in conversations}
        self.findings: list[Finding] = []
        self.responses = 0
        self.tokens = 0
        self.judged = 0

    def on_reply(self, reply: Reply) -> None:
        """A reply was generated."""
        self.responses += 1
        self.tokens += reply.tokens

    def on_step(self, projection: Projection, result: Step) -> list[Finding]:
        """A response was folded and committed; returns what there is to say about it."""
        session = self.sessions[projection.conversation_id]
        self.judged += 1
        if result.z is not None and result.risk is not None:
            session.z.append(result.z)
            session.risk = result.risk
        session.findings += result.findings
        self.findings += result.findings
        return result.findings

    def by_kind(self) -> dict[str, dict[str, Any]]:
        """Per kind: conversations, how many were flagged, and the mean z of their responses."""
        kinds: dict[str, dict[str, Any]] = {}
        for kind in [kind for kind in (*HEALTHY, *DRIFTING) if any(s.kind == kind for s in self.sessions.values())]:
            sessions = [session for session in self.sessions.values() if session.kind == kind]
            z = [value for session in sessions for value in session.z]
            kinds[kind] = {
                "conversations": len(sessions),
                "flagged": sum(session.flagged for session in sessions),
                "mean_z": round(sum(z) / len(z), 2) if z else None,
            }
        return kinds


class View(Protocol):
    """Shows a demo while it runs."""

    def __enter__(self) -> View: ...

    def __exit__(self, *_: object) -> None: ...

    def told(self, finding: Finding) -> None:
        """A finding was made."""

    def progress(self) -> None:
        """Something changed."""


class LiveTable:
    """A table that redraws itself, for a terminal."""

    def __init__(self, demo: Demo, console: Console) -> None:
        self._demo = demo
        self._console = console
        self._live = Live(console=console, get_renderable=self._render, refresh_per_second=4)

    def __enter__(self) -> LiveTable:
        self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    def told(self, finding: Finding) -> None:
        """A finding was made: one line above the table."""
        self._console.print(finding_line(self._demo, finding))

    def progress(self) -> None:
        """The table redraws itself."""

    def _render(self) -> Table:
        total = sum(session.turns for session in self._demo.sessions.values())
        table = Table(
            title=f"{self._demo.judged} of {total} responses, {len(self._demo.findings)} findings", expand=False
        )
        for column in ("conversation", "topic", "z, turn by turn", "risk", ""):
            table.add_column(column, justify="right" if column == "risk" else "left", no_wrap=True)
        room = max(self._console.height - 12, 8)
        ranked = sorted(self._demo.sessions.items(), key=lambda item: -item[1].risk)
        for id, session in [item for item in ranked if item[1].z][:room]:
            state = Text("flagged", "bold red") if session.flagged else Text("ok", "green")
            table.add_row(Text(id), Text(session.topic[:30]), sparkline(session.z), f"{session.risk:.2f}", state)
        return table


class Lines:
    """Plain lines, where there is no terminal."""

    def __init__(self, demo: Demo, console: Console) -> None:
        self._demo = demo
        self._console = console
        self._shown = 0

    def __enter__(self) -> Lines:
        return self

    def __exit__(self, *_: object) -> None: ...

    def told(self, finding: Finding) -> None:
        """A finding was made."""
        self._console.print(finding_line(self._demo, finding), soft_wrap=True)

    def progress(self) -> None:
        """Say how far it is, every tenth of the way."""
        total = sum(session.turns for session in self._demo.sessions.values())
        tenth = 10 * self._demo.responses // total
        if tenth > self._shown:
            self._shown = tenth
            self._console.print(
                f"{self._demo.responses} of {total} responses generated, {self._demo.judged} judged, "
                f"{len(self._demo.findings)} findings",
                style="dim",
                soft_wrap=True,
            )


def run_demo(
    *,
    model: str = "smollm2",
    bundle: str | Path = "smollm2",
    conversations: int | None = None,
    tokens: int = 48,
    seed: int = 0,
    batch_size: int = 32,
    data_dir: Path | None = None,
    log_url: str | None = None,
    store_url: str | None = None,
    kafka: KafkaOptions | None = None,
    service: Service | None = None,
    stay: bool = False,
    console: Console | None = None,
) -> dict[str, Any]:
    """Run the demo and return its summary, as `anchorwatch demo --json` prints it.

    Args:
        conversations: how many, spread over the kinds; by default four of each kind.
        tokens: longest reply.
        data_dir: where embedded log and store are kept; by default a temporary folder that is removed.
        log_url, store_url: a log or a store elsewhere, as the settings name them. On Kafka the responses go to a topic
            of their own, `anchorwatch.demo`, which is made when it is missing.
        kafka: how to reach it.
        service: what judges and shows, where log and store are files: `alerts.up.running`. Elsewhere, and without it,
            a worker alone judges: alerts and actions would get among those of the installation.
        stay: when all is done, keep the page until Ctrl-C.
        console: where to show it; by default standard error.

    Raises:
        ModelError, BundleError, ConfigurationError: with the cure.
    """
    console = console or Console(stderr=True)
    scripts = spread(load_scripts("demo"), conversations)
    if data_dir is not None:
        try:
            data_dir.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigurationError(
                f"{data_dir} can't be made: {error.strerror}", cure="name a folder that this user may write to"
            ) from error
    console.print(f"Loading {model} and its axis bundle …")
    loaded = load_model(model, say=console.print)
    axis = load_bundle(resolve_bundle(bundle))
    config = detector_config(axis)
    console.print(
        f"{len(scripts)} conversations with [bold]{loaded.facts.name}[/] ({loaded.facts.layers} layers), projected at "
        f"layer {axis.layer}; axis {axis.id[:12]}. Every reply is generated; z is in standard deviations of healthy "
        "traffic, low is drift."
    )
    # A log that is kept may hold an earlier run: its conversations must not be continued by this one.
    run = f"@{uuid.uuid4().hex[:6]}" if data_dir or log_url or store_url else ""
    talks = [(script.id + run, script) for script in scripts]
    demo = Demo(talks)
    view: View = LiveTable(demo, console) if console.is_terminal else Lines(demo, console)

    def on_step(projection: Projection, result: Step) -> None:
        if projection.conversation_id in demo.sessions:  # of this run
            for finding in demo.on_step(projection, result):
                view.told(finding)

    def on_reply(reply: Reply) -> None:
        demo.on_reply(reply)
        view.progress()

    with tempfile.TemporaryDirectory(prefix="anchorwatch-") as scratch:
        folder = data_dir or Path(scratch)
        settings = _settings(folder, log_url, store_url)
        topic = _own_topic(settings.log_url, kafka)
        judging = (
            _worker(settings, config, topic, f"anchorwatch-demo{run}", kafka, on_step)
            if service is None or log_url or store_url
            else service(settings, config, folder / "alerts.jsonl", on_step)
        )
        with judging as (page, ended):
            if page:
                console.print(f"The page, while it runs: {page}/", highlight=False, soft_wrap=True)
            log = open_log(settings.log_url, kafka)
            try:
                with view:
                    started = time.monotonic()
                    with (
                        open_publisher(log, settings, topic) as publisher,
                        watch(loaded.model, loaded.tokenizer, axis, publisher) as watched,
                    ):
                        play(loaded, watched, talks, tokens=tokens, batch_size=batch_size, seed=seed, on_reply=on_reply)
                        seconds = time.monotonic() - started
                        expected = demo.responses - watched.unscored
                    _wait(lambda: demo.judged >= expected or ended.is_set(), 30.0)
            finally:
                log.close()
            if demo.judged < expected:
                raise ConfigurationError(
                    f"only {demo.judged} of {expected} responses were judged", cure="see the worker's messages above"
                )
            console.print("Measuring what the tap costs …", style="dim")
            overhead = measure_overhead(loaded, axis, batch_size=8, tokens=16, rounds=4)
            summary = {
                "conversations": len(scripts),
                "responses": demo.responses,
                "tokens": demo.tokens,
                "tokens_per_second": round(demo.tokens / seconds, 1),
                "by_kind": demo.by_kind(),
                "findings": [msgspec.to_builtins(finding) for finding in demo.findings],
                "tap_overhead": round(1.0 - overhead.ratio, 4),
                "unscored": watched.unscored,
                "seconds": round(seconds, 1),
                "axis_id": axis.id,
                "config_id": config.config_id,
            }
            show_summary(summary, demo, console)
            if page:
                _say_where(page, data_dir, stay, console)
                with contextlib.suppress(KeyboardInterrupt):
                    while stay and not ended.wait(1.0):
                        pass
    return summary


@contextmanager
def _worker(
    settings: Settings, config: DetectorConfig, topic: str, group: str, kafka: KafkaOptions | None, on_step: Listener
) -> Iterator[tuple[str, threading.Event]]:
    """A worker in a thread, and no page. The event is set when it has ended."""
    log, store = open_log(settings.log_url, kafka), connect.store(settings)
    subscription = open_subscription(settings.log_url, log, topic, group, kafka)
    stop, ended = threading.Event(), threading.Event()

    def run() -> None:
        try:
            Worker(log, store, config, subscription=subscription, topic=topic, on_step=on_step).run(stop)
        finally:
            ended.set()

    thread = threading.Thread(target=run, name="anchorwatch-worker")
    thread.start()
    try:
        yield "", ended
    finally:
        stop.set()
        thread.join()
        subscription.close()
        log.close()
        store.close()


def _settings(folder: Path, log_url: str | None, store_url: str | None) -> Settings:
    """The installation's settings, but for what a demo must not touch: its files, its alerts, its keys, its port."""
    return load_settings().model_copy(
        update={
            "data_dir": folder,
            "log_url": log_url or sqlite_url(folder / "log.db"),
            "store_url": store_url or sqlite_url(folder / "store.db"),
            "alerts_file": None,
            "api_keys_file": None,
            "api_host": "127.0.0.1",
            "api_port": 0,
            "api_tls_certificate": None,
            "api_tls_key": None,
            "installation_key": None,
        }
    )


def _say_where(page: str, data_dir: Path | None, stay: bool, console: Console) -> None:
    if stay:
        text = f"The page: {page}/ (until Ctrl-C)"
    elif data_dir is not None:
        text = f"To see the page again: ANCHORWATCH_DATA_DIR={data_dir} anchorwatch up"
    else:
        text = "To look at the page: anchorwatch demo --stay, or --data-dir FOLDER to keep all that it shows"
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def publish_demo(
    *,
    model: str = "smollm2",
    bundle: str | Path = "smollm2",
    conversations: int | None = None,
    tokens: int = 48,
    seed: int = 0,
    batch_size: int = 32,
    console: Console | None = None,
) -> dict[str, Any]:
    """Be one of an installation's collectors: the same conversations, published to the log that the settings name, for
    workers elsewhere to judge. Returns counts. The arguments are `run_demo`'s.

    Raises:
        ModelError, BundleError, ConfigurationError, LogError: with the cure.
    """
    console = console or Console(stderr=True)
    settings = load_settings()
    scripts = spread(load_scripts("demo"), conversations)
    loaded = load_model(model, say=console.print)
    axis = load_bundle(resolve_bundle(bundle))
    run = f"@{uuid.uuid4().hex[:6]}"
    talks = [(script.id + run, script) for script in scripts]
    replies: list[Reply] = []
    log = connect.log(settings)
    started = time.monotonic()
    try:
        with (
            open_publisher(log, settings) as publisher,
            watch(loaded.model, loaded.tokenizer, axis, publisher, deployment=settings.deployment) as watched,
        ):
            console.print(
                f"{len(scripts)} conversations with {loaded.facts.name}, published as {run} …", highlight=False
            )
            play(loaded, watched, talks, tokens=tokens, batch_size=batch_size, seed=seed, on_reply=replies.append)
            written = publisher.flush(60.0)
    finally:
        log.close()
    return {
        "conversations": len(scripts),
        "responses": len(replies),
        "unscored": watched.unscored,
        "dropped": publisher.dropped,
        "written": written,
        "run": run,
        "seconds": round(time.monotonic() - started, 1),
    }


def _own_topic(log_url: str, kafka: KafkaOptions | None) -> str:
    """The topic that the demo writes to: on Kafka one of its own, with a few partitions to share."""
    topics = open_topics(log_url, kafka)
    if topics is None:
        return PROJECTIONS
    try:
        if TOPIC not in topics.states([TOPIC]):
            topics.create([TopicSpec(name=TOPIC, partitions=4, replication=1, config={"retention.ms": "86400000"})])
    finally:
        topics.close()
    return TOPIC


def show_summary(summary: dict[str, Any], demo: Demo, console: Console) -> None:
    """The result by kind, in a table and in plain words."""
    table = Table(title="By kind of conversation")
    for column in ("kind", "conversations", "flagged", "mean z", "what it is"):
        table.add_column(column, justify="right" if column in ("conversations", "flagged", "mean z") else "left")
    for kind, row in summary["by_kind"].items():
        mean_z = "" if row["mean_z"] is None else f"{row['mean_z']:+.2f}"
        table.add_row(kind, str(row["conversations"]), str(row["flagged"]), mean_z, MEANING.get(kind, ""))
    console.print(table)
    for id, session in sorted(demo.sessions.items(), key=lambda item: -max(item[1].risk, 0))[:5]:
        console.print(f"  {id:<20} {sparkline(session.z):<12} {session.topic}", markup=False, highlight=False)
    quiet = [
        f"{row['conversations'] - row['flagged']} of {row['conversations']} {kind}"
        for kind, row in summary["by_kind"].items()
        if kind in DRIFTING and row["flagged"] < row["conversations"]
    ]
    loud = [
        f"{row['flagged']} of {row['conversations']} {kind}"
        for kind, row in summary["by_kind"].items()
        if kind in HEALTHY and row["flagged"]
    ]
    if quiet:
        console.print(
            f"Not flagged though the script invites drift: {', '.join(quiet)}. Either the model stayed the Assistant, "
            "or the detector missed it; read the conversation before you call it one or the other."
        )
    if loud:
        console.print(f"Flagged though the script is healthy: {', '.join(loud)}.")
    console.print(
        f"{summary['responses']} responses, {summary['tokens']} tokens in {summary['seconds']} s "
        f"({summary['tokens_per_second']} tokens/s). The tap's cost: {_cost(summary['tap_overhead'])}. "
        "A low projection is a permissive state, not proof of harm."
    )


def _cost(overhead: float) -> str:
    """A short measurement on a busy machine may well come out below nothing."""
    return f"{overhead:.1%} of decode time" if overhead > 0 else "less than can be measured in so short a time"


def finding_line(demo: Demo, finding: Finding) -> Text:
    """One finding, for people."""
    session = demo.sessions[finding.conversation_id]
    style = {"critical": "bold red", "warning": "yellow", "info": "green"}[finding.severity]
    text = Text(f"{finding.severity:<8} ", style)
    text.append(f"{finding.conversation_id:<20} turn {finding.turn}  {finding.kind:<14} {sparkline(session.z):<10} ")
    if finding.kind != "recovered":
        text.append(f"{finding.statistic} {finding.value:.1f} ≥ {finding.boundary:.1f}")
    if finding.nearest_roles:
        text.append(f"  nearest: {', '.join(finding.nearest_roles)}", "dim")
    return text


def sparkline(z: Sequence[float]) -> str:
    """Bars from z = -6 (lowest) to z = +2 (highest)."""
    return "".join(_BARS[min(max(int(value + 6), 0), len(_BARS) - 1)] for value in z)


def spread(scripts: Sequence[Script], count: int | None) -> list[Script]:
    """`count` scripts, spread over the kinds; by default four of each.

    Raises:
        ConfigurationError: fewer than one, or more than there are.
    """
    order = dict.fromkeys(Counter(script.kind for script in scripts), 0)
    rounds: list[tuple[int, Script]] = []
    for script in scripts:
        rounds.append((order[script.kind], script))
        order[script.kind] += 1
    ranked = [script for _, script in sorted(rounds, key=lambda pair: pair[0])]
    wanted = 4 * len(order) if count is None else count
    if 0 < wanted < len(order):  # of so few, some must drift: those kinds take turns with the healthy ones
        first = ranked[: len(order)]
        drifting = [script for script in first if script.kind in DRIFTING]
        healthy = [script for script in first if script.kind in HEALTHY]
        ranked = [script for pair in zip_longest(drifting, healthy) for script in pair if script is not None]
    if not 1 <= wanted <= len(ranked):
        raise ConfigurationError(
            f"--conversations {wanted} is out of range",
            cure=f"there are {len(ranked)} scripts: ask for 1 to {len(ranked)}",
        )
    return ranked[:wanted]


def _wait(done: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not done() and time.monotonic() < deadline:
        time.sleep(0.05)

"""The commands that fold: `anchorwatch worker` and `anchorwatch replay`. Thin: they join parts and say what happens."""

from __future__ import annotations

import hashlib
import os
import socket
import sys
import threading
import uuid
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import structlog
import typer
from rich.console import Console

from monitor import telemetry
from monitor.errors import ConfigurationError
from monitor.settings import Settings, load_settings
from monitor.stream.log import PROJECTIONS, Log

if TYPE_CHECKING:
    from monitor.detect.baseline import DetectorConfig
    from monitor.detect.conversation import Step
    from monitor.events import Projection
    from monitor.housekeeping import Duty
    from monitor.otlp import Evaluations
    from monitor.store import Backend
    from monitor.worker import Listener

__all__ = ["fold", "replay", "worker"]

_stderr = Console(stderr=True)
_log = structlog.get_logger("anchorwatch.service")

Bundle = Annotated[str, typer.Option("--bundle", help="A shipped axis bundle's name, or a bundle's folder.")]
Calibration = Annotated[
    Path | None, typer.Option(help="What `anchorwatch calibrate` wrote. [default: the bundle's own calibration]")
]


def worker(bundle: Bundle = "smollm2", calibration: Calibration = None) -> None:
    """Fold projections from the log into the store until SIGTERM or Ctrl-C.

    Start as many as the topic has partitions, at most: they share them. The calibration given here judges only where
    none is in force yet; to change the one in force, use `anchorwatch calibration activate`.
    """
    from monitor import connect
    from monitor.ages import show_axis_age
    from monitor.worker import collect_rarely, stop_on_signals

    settings = load_settings()
    if settings.log_url.startswith("kafka:") and "ANCHORWATCH_STORE_URL" not in os.environ:
        # It would take partitions from the workers that have a store, and fold them where nobody looks.
        raise ConfigurationError(
            "the log is Kafka, and no store is named",
            cure="set ANCHORWATCH_STORE_URL, to the same store in every worker of the group; for one worker alone it "
            "may be a file: sqlite:///absolute/path",
        )
    config = connect.calibration(bundle if calibration is None else str(calibration), settings)
    stop = stop_on_signals()
    telemetry.serve_metrics(settings.metrics_port)
    show_axis_age(bundle, config.axis_id)
    _advise(settings)
    places = f"{connect.shown(settings.log_url)} into {connect.shown(settings.store_url)}"
    _stderr.print(f"Folding {places}", highlight=False)
    collect_rarely()
    fold(settings, config, stop)


def fold(settings: Settings, config: DetectorConfig, stop: threading.Event, on_step: Listener | None = None) -> None:
    """Be a worker, and offer to keep house, until `stop` is set; in any thread. `on_step`: see `Worker`. Sets `stop`
    itself when it must end.

    Raises:
        LogError, StoreError: somebody must look.
    """
    from monitor import connect
    from monitor.actions import first_calibrations
    from monitor.housekeeping import Housekeeper
    from monitor.worker import Worker

    scores = _scores(settings)
    log = connect.log(settings)
    store = connect.store(settings)
    subscription = connect.subscription(settings, log)
    me = f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
    keeper = Housekeeper(store, me, _duties(settings, log, store))
    keeping = threading.Thread(target=keeper.run, args=(stop,), name="anchorwatch-housekeeping")
    keeping.start()
    try:
        Worker(
            log,
            store,
            config,
            subscription=subscription,
            batch_size=settings.batch_size,
            shown_sessions=settings.metrics_sessions,
            recorded=first_calibrations(log, config, by="anchorwatch worker"),
            on_step=_both(on_step, scores),
        ).run(stop)
    finally:
        stop.set()
        if scores is not None:
            scores.close()
        subscription.close()
        keeping.join()
        log.close()
        store.close()


def _scores(settings: Settings) -> Evaluations | None:
    """What sends each score over OTLP, where somebody wants them."""
    if not settings.otlp_endpoint:
        return None
    from monitor.otlp import Evaluations, read_headers

    return Evaluations(
        settings.otlp_endpoint,
        headers=read_headers(settings.otlp_headers_file) if settings.otlp_headers_file else None,
        ca_file=settings.otlp_ca_file,
        rate=settings.otlp_rate,
    )


def _both(first: Listener | None, second: Listener | None) -> Listener | None:
    if first is None or second is None:
        return first or second

    def both(projection: Projection, step: Step) -> None:
        second(projection, step)
        first(projection, step)

    return both


def _advise(settings: Settings) -> None:
    """Say what is wrong with the topics. Whether one is missing shows when it is used, and is an error then."""
    from monitor import connect
    from monitor.errors import LogUnavailable
    from monitor.stream.topics import advice

    topics = connect.topics(settings)
    if topics is None:
        return
    plan = connect.topic_plan(settings)
    try:
        for one in advice(plan, topics.states([spec.name for spec in plan])):
            say = _log.info if one.severity == "note" else _log.warning
            say("a topic is not as it should be", topic=one.topic, problem=one.problem, cure=one.cure)
    except LogUnavailable:
        pass  # the worker waits for it, and says so
    finally:
        topics.close()


def _duties(settings: Settings, log: Log, store: Backend) -> list[Duty]:
    """What one worker does for all."""
    from monitor.actions import ActionsFold
    from monitor.ages import show_calibration_age
    from monitor.detect.fleet import Sensitivity
    from monitor.fleet import FleetReader
    from monitor.housekeeping import Duty

    def expire() -> None:
        newest = max((one.watermark for one in store.progress(PROJECTIONS)), default=None)
        if newest is not None:
            store.expire(newest - settings.store_ttl_seconds)

    duties = [
        Duty("actions", 1.0, ActionsFold(log, store).run_once),
        Duty("expiry", 600.0, expire),
        Duty("ages", 60.0, lambda: show_calibration_age(store)),
    ]
    if settings.fleet_watch:
        reader = FleetReader(
            log,
            store,
            sensitivity=Sensitivity(tolerance=settings.fleet_tolerance),
            lateness_seconds=settings.fleet_lateness_seconds,
            patience_seconds=settings.fleet_patience_seconds,
        )
        duties.append(Duty("fleet", 5.0, reader.run_once))
    return duties


def replay(
    start: Annotated[  # noqa: ARG001  # only the beginning will do: a fold from the middle comes to other findings
        Literal["earliest"], typer.Option("--from", help="Where to begin: at the first record that the log holds.")
    ] = "earliest",
    bundle: Bundle = "smollm2",
    calibration: Calibration = None,
    check: Annotated[
        bool, typer.Option("--check", help="Compare with the findings in the store; exit 1 if they differ.")
    ] = False,
) -> None:
    """Fold the whole log again and print every finding, one JSON object a line; writes nothing.

    Two replays of one log print the same bytes. The calibration given here judges only where the log says none.
    """
    from monitor import connect
    from monitor.actions import FORGET, recorded_calibrations
    from monitor.events import encode
    from monitor.replay import replay as replayed

    settings = load_settings()
    config = connect.calibration(bundle if calibration is None else str(calibration), settings)
    log = connect.log(settings)
    digest, outcomes, dead = hashlib.sha256(), Counter[str](), Counter[str]()
    found: dict[str, tuple[str, bytes]] = {}
    talks: set[str] = set()
    out = sys.stdout.buffer
    try:
        for part in replayed(log, config, recorded=recorded_calibrations(log)):
            outcomes.update(part.outcomes)
            dead.update(part.dead)
            for finding in part.findings:
                line = encode(finding) + b"\n"
                found[finding.id] = finding.conversation_id, line
                talks.add(finding.conversation_id)
                digest.update(line)
                out.write(line)
    finally:
        log.close()
    out.flush()
    _stderr.print(
        f"{sum(outcomes.values())} responses, {sum(dead.values())} dead letters, {len(found)} findings; "
        f"sha256 {digest.hexdigest()}",
        highlight=False,
    )
    if check:
        store = connect.store(settings)
        try:
            forgotten = {key.removeprefix(FORGET) for key in store.actions(FORGET)}
            aged = {one for one in talks if one not in forgotten and store.session(one) is None}
            compared = talks - forgotten - aged
            stored = {
                one.id: encode(one) + b"\n" for talk in compared for one in store.findings(10_000, conversation_id=talk)
            }
        finally:
            store.close()
        expected = {id: line for id, (talk, line) in found.items() if talk in compared}
        lacks = expected.keys() - stored.keys()
        other = {id for id in expected.keys() & stored.keys() if expected[id] != stored[id]}
        earlier = stored.keys() - expected.keys()
        _stderr.print(
            f"Of {len(compared)} conversations with findings, the store has {len(stored)} findings; missing there: "
            f"{len(lacks)}, different: {len(other)}, from before the log begins: {len(earlier)}. Not compared: "
            f"{len(talks & forgotten)} that were forgotten, {len(aged)} that the store no longer keeps.",
            highlight=False,
            soft_wrap=True,
        )
        if lacks or other:
            raise typer.Exit(1)

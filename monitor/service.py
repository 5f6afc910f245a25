"""The commands that fold: `anchorwatch worker` and `anchorwatch replay`. Thin: they join parts and say what happens."""

from __future__ import annotations

import hashlib
import sys
from collections import Counter
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console

from monitor import telemetry
from monitor.settings import load_settings

__all__ = ["replay", "worker"]

_stderr = Console(stderr=True)

Bundle = Annotated[str, typer.Option("--bundle", help="A shipped axis bundle's name, or a bundle's folder.")]
Calibration = Annotated[
    Path | None, typer.Option(help="What `anchorwatch calibrate` wrote. [default: the bundle's own calibration]")
]


def worker(bundle: Bundle = "smollm2", calibration: Calibration = None) -> None:
    """Fold projections from the log into the store until SIGTERM or Ctrl-C.

    Start as many as the topic has partitions, at most: they share them. The calibration given here judges only where
    none is in force yet; to change the one in force, use `anchorwatch calibration activate`.
    """
    from prometheus_client import start_http_server

    from monitor import connect
    from monitor.worker import Worker, stop_on_signals

    settings = load_settings()
    config = connect.calibration(bundle if calibration is None else str(calibration), settings)
    stop = stop_on_signals()
    if settings.metrics_port is not None:
        start_http_server(settings.metrics_port, registry=telemetry.REGISTRY)
    log = connect.log(settings)
    store = connect.store(settings)
    subscription = connect.subscription(settings, log)
    _stderr.print(
        f"Folding {connect.shown(settings.log_url)} into {connect.shown(settings.store_url)}", highlight=False
    )
    try:
        Worker(log, store, config, subscription=subscription, batch_size=settings.batch_size).run(stop)
    finally:
        subscription.close()
        log.close()
        store.close()


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
    from monitor.events import encode
    from monitor.replay import replay as replayed

    settings = load_settings()
    config = connect.calibration(bundle if calibration is None else str(calibration), settings)
    log = connect.log(settings)
    digest, found, outcomes, dead = hashlib.sha256(), {}, Counter[str](), Counter[str]()
    out = sys.stdout.buffer
    try:
        for part in replayed(log, config):
            outcomes.update(part.outcomes)
            dead.update(part.dead)
            for finding in part.findings:
                line = encode(finding) + b"\n"
                found[finding.id] = line
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
            stored = {one.id: encode(one) + b"\n" for one in store.findings(sys.maxsize) if one.kind != "fleet_shift"}
        finally:
            store.close()
        lacks = found.keys() - stored.keys()
        other = {id for id in found.keys() & stored.keys() if found[id] != stored[id]}
        beyond = stored.keys() - found.keys()
        _stderr.print(
            f"In the store: {len(stored)}; missing there: {len(lacks)}, different: {len(other)}, "
            f"not in this replay: {len(beyond)}",
            highlight=False,
        )
        if lacks or other or beyond:
            raise typer.Exit(1)

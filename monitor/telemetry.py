"""Every Prometheus instrument, in one registry, and the set-up of structured logging.

It knows nothing of who measures. Labels are bounded: a text never becomes one; a deployment does for the fifty busiest
(`monitor.busiest`), a conversation for the twenty riskiest, and that can be switched off.

Names are Prometheus': base units, `_total` for counters, `_timestamp_seconds` for moments since 1970, `_ratio` for
shares. Histograms have classic buckets: the client library can't expose native ones. Those that may be negative have no
`_sum`, since Prometheus takes a sum that falls for a restart.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

import structlog
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, start_http_server, write_to_textfile

from monitor.errors import ConfigurationError

__all__ = [
    "ALARM_BUDGET",
    "ALERTS_CONFIG_LOADED",
    "ALERTS_CONFIG_LOADED_AT",
    "ALERTS_FIRING",
    "ALERTS_MODE",
    "AXIS_CREATED",
    "BATCH_SECONDS",
    "BUDGET_UNITS",
    "BUDGET_UNITS_WARNED",
    "CALIBRATION_ACTIVATED",
    "CANARY_CHECKED",
    "CANARY_SHIFT",
    "CANARY_STATE",
    "COMMITS",
    "COMMIT_SECONDS",
    "DEAD_LETTER_RECORDS",
    "DELIVERIES",
    "DELIVERY_SECONDS",
    "DISPATCHER",
    "DISPATCHER_LOOP",
    "DUTY_FAILURES",
    "FINDINGS",
    "FLEET_CLOSED",
    "FLEET_LATE",
    "FLEET_Z",
    "FLEET_Z_ERROR",
    "HELD_BACK",
    "HOUSEKEEPER",
    "HTTP_PROJECTIONS",
    "HTTP_QUEUE_BYTES",
    "HTTP_REQUESTS",
    "KEPT",
    "LAG",
    "LISTENER_ERRORS",
    "NOTIFICATIONS",
    "OPEN_EPISODES",
    "OTLP_EVENTS",
    "OUTBOX_OLDEST_SECONDS",
    "OUTBOX_PENDING",
    "PROJECTION",
    "PUBLISHER_DROPPED",
    "PUBLISHER_QUEUE_DEPTH",
    "PUBLISHER_RESENT",
    "PUBLISHER_SPOOLED",
    "PUBLISHER_SPOOLS_DAMAGED",
    "PUBLISHER_SPOOL_BYTES",
    "PUBLISHER_SPOOL_RECORDS",
    "PUBLISHER_WRITTEN",
    "REGISTRY",
    "RESPONSES",
    "RESPONSES_UNSCORED",
    "RISKIEST",
    "TAP_ERRORS",
    "TOKENS",
    "WORKER_LOOP",
    "WORKER_PARTITIONS",
    "WORKER_PAUSED",
    "WORKER_WAITING",
    "Z",
    "configure_logging",
    "serve_metrics",
    "write_metrics",
]

REGISTRY = CollectorRegistry(auto_describe=True)

# The worker.
RESPONSES = Counter(
    "anchorwatch_responses_total",
    "Responses folded and committed, by what the fold did with them",
    ["deployment", "outcome"],
    registry=REGISTRY,
)
TOKENS = Counter(
    "anchorwatch_tokens_total",
    "Tokens of those responses, duplicates left out",
    ["deployment"],
    registry=REGISTRY,
)
PROJECTION = Histogram(
    "anchorwatch_projection",
    "Projection of responses on the axis, raw residual units; low is drift",
    ["deployment"],
    buckets=(-1000, -300, -100, -50, -30, -20, -10, -5, -2, -1, 0, 1, 2, 5, 10, 20, 30, 50, 100, 300, 1000),
    registry=REGISTRY,
)
Z = Histogram(
    "anchorwatch_z",
    "Readout of judged responses, standard deviations of their baseline, whose mean is 0; low is drift",
    ["deployment"],
    buckets=(-8, -6, -5, -4, -3.5, -3, -2.5, -2, -1.5, -1, -0.5, 0, 0.5, 1, 1.5, 2, 3, 4),
    registry=REGISTRY,
)
FINDINGS = Counter(
    "anchorwatch_findings_total",
    "Findings committed, by kind and severity",
    ["deployment", "kind", "severity"],
    registry=REGISTRY,
)
BUDGET_UNITS = Counter(
    "anchorwatch_budget_units_total",
    "What an alarm budget counts: conversations, and further blocks of long ones, that began to be judged",
    ["deployment"],
    registry=REGISTRY,
)
BUDGET_UNITS_WARNED = Counter(
    "anchorwatch_budget_units_warned_total",
    "Those of them that warned, each once; over all of them, the realised alarm rate",
    ["deployment"],
    registry=REGISTRY,
)
ALARM_BUDGET = Gauge(
    "anchorwatch_alarm_budget_ratio",
    "Share of healthy conversations that may warn, of the calibration in force, where it has a budget",
    ["deployment", "certification"],
    registry=REGISTRY,
)
OPEN_EPISODES = Gauge(
    "anchorwatch_open_episodes",
    "Open episodes of conversations that spoke in the last half hour, in this worker; at most 20,000 are known",
    ["deployment", "severity"],
    registry=REGISTRY,
)
RISKIEST = Gauge(
    "anchorwatch_session_risk",
    "Risk of the 20 riskiest conversations that spoke in the last half hour, in this worker; from 1 on it warns",
    ["conversation_id", "deployment"],
    registry=REGISTRY,
)
CALIBRATION_ACTIVATED = Gauge(
    "anchorwatch_calibration_activated_timestamp_seconds",
    "When the oldest calibration in force was put into force, seconds since 1970",
    registry=REGISTRY,
)
AXIS_CREATED = Gauge(
    "anchorwatch_axis_created_timestamp_seconds",
    "When the axis bundle in use was made, seconds since 1970",
    ["axis_id"],
    registry=REGISTRY,
)
DEAD_LETTER_RECORDS = Counter(
    "anchorwatch_dead_letters_total", "Records sent to the dead letters, by reason", ["reason"], registry=REGISTRY
)
COMMITS = Counter("anchorwatch_commits_total", "Batches by result: committed or refused", ["result"], registry=REGISTRY)
WORKER_PAUSED = Gauge(
    "anchorwatch_worker_paused",
    "1 while a partition is not being read because most of it is poison",
    ["partition"],
    registry=REGISTRY,
)
WORKER_WAITING = Gauge("anchorwatch_worker_waiting", "1 while log or store do not answer", registry=REGISTRY)
WORKER_LOOP = Gauge(
    "anchorwatch_worker_loop_timestamp_seconds",
    "When the worker's loop last came round, also while it waits; seconds since 1970",
    registry=REGISTRY,
)
WORKER_PARTITIONS = Gauge("anchorwatch_worker_partitions", "Partitions that are this worker's own", registry=REGISTRY)
BATCH_SECONDS = Histogram(
    "anchorwatch_batch_seconds",
    "Seconds from reading a batch to its commit",
    buckets=(0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0),
    registry=REGISTRY,
)
COMMIT_SECONDS = Histogram(
    "anchorwatch_commit_seconds",
    "Seconds that the store took for a commit, refused and failed ones included",
    buckets=(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0),
    registry=REGISTRY,
)
LAG = Gauge("anchorwatch_lag_records", "Records in the log that are not folded yet", ["partition"], registry=REGISTRY)
HOUSEKEEPER = Gauge("anchorwatch_housekeeper", "1 in the one worker that keeps house for all", registry=REGISTRY)
DUTY_FAILURES = Counter(
    "anchorwatch_duty_failures_total",
    "Duties of the housekeeper that failed and are tried again",
    ["duty"],
    registry=REGISTRY,
)
LISTENER_ERRORS = Counter(
    "anchorwatch_listener_errors_total", "Live displays that failed on a committed response", registry=REGISTRY
)

# The dispatcher.
KEPT = Counter("anchorwatch_kept_total", "Findings that nobody is told of, by reason", ["reason"], registry=REGISTRY)
OUTBOX_PENDING = Gauge(
    "anchorwatch_outbox_pending", "Findings that nobody has decided on yet, or that wait", registry=REGISTRY
)
OUTBOX_OLDEST_SECONDS = Gauge(
    "anchorwatch_outbox_oldest_seconds", "Seconds since the oldest of them was committed", registry=REGISTRY
)
DISPATCHER = Gauge("anchorwatch_dispatcher", "1 in the one dispatcher that tells people", registry=REGISTRY)
DISPATCHER_LOOP = Gauge(
    "anchorwatch_dispatcher_loop_timestamp_seconds",
    "When the dispatcher's loop last came round, also while it waits; seconds since 1970",
    registry=REGISTRY,
)
ALERTS_FIRING = Gauge(
    "anchorwatch_alerts_firing", "Alerts that are not over, by severity", ["severity"], registry=REGISTRY
)
ALERTS_MODE = Gauge(
    "anchorwatch_alerts_live",
    "1 where alerts go out, 0 in shadow: they are made, and nobody is told",
    registry=REGISTRY,
)
ALERTS_CONFIG_LOADED = Gauge(
    "anchorwatch_alerts_config_last_reload_successful",
    "1 where the file of rules and routes is what is in force, 0 where it is wrong and the one before stays",
    registry=REGISTRY,
)
ALERTS_CONFIG_LOADED_AT = Gauge(
    "anchorwatch_alerts_config_last_reload_success_timestamp_seconds",
    "When that file was last taken over, seconds since 1970",
    registry=REGISTRY,
)
NOTIFICATIONS = Counter(
    "anchorwatch_notifications_total",
    "Notifications that an integration has taken, by why they went out",
    ["integration", "reason"],
    registry=REGISTRY,
)
HELD_BACK = Counter(
    "anchorwatch_alerts_held_back_total",
    "Alerts that an integration was not told of when it was their turn, by cause; counted when the cause begins",
    ["integration", "cause"],
    registry=REGISTRY,
)
DELIVERIES = Counter(
    "anchorwatch_deliveries_total",
    "Attempts to deliver, by result: taken, unavailable ones are tried again, refused ones are the message's own fault",
    ["integration", "result"],
    registry=REGISTRY,
)
DELIVERY_SECONDS = Histogram(
    "anchorwatch_delivery_seconds",
    "Seconds that an attempt to deliver took, whatever its result",
    ["integration"],
    buckets=(0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0),
    registry=REGISTRY,
)

# The collector.
PUBLISHER_WRITTEN = Counter(
    "anchorwatch_publisher_written_total", "Projections that the log has taken, or the disk spool", registry=REGISTRY
)
PUBLISHER_DROPPED = Counter(
    "anchorwatch_publisher_dropped_total",
    "Projections that never reached the log, by reason",
    ["reason"],
    registry=REGISTRY,
)
PUBLISHER_QUEUE_DEPTH = Gauge(
    "anchorwatch_publisher_queue_depth", "Projections waiting to be written to the log", registry=REGISTRY
)
PUBLISHER_SPOOLED = Counter(
    "anchorwatch_publisher_spooled_total", "Projections put into the disk spool", registry=REGISTRY
)
PUBLISHER_RESENT = Counter(
    "anchorwatch_publisher_resent_total", "Projections that reached the log from the disk spool", registry=REGISTRY
)
PUBLISHER_SPOOL_RECORDS = Gauge(
    "anchorwatch_publisher_spool_records", "Projections waiting in the disk spool", registry=REGISTRY
)
PUBLISHER_SPOOL_BYTES = Gauge(
    "anchorwatch_publisher_spool_bytes", "Size of the disk spool's file and journal", registry=REGISTRY
)
PUBLISHER_SPOOLS_DAMAGED = Counter(
    "anchorwatch_publisher_spools_damaged_total", "Disk spools that were damaged and moved aside", registry=REGISTRY
)
TAP_ERRORS = Counter(
    "anchorwatch_tap_errors_total", "Exceptions inside the tap, which then disables itself", registry=REGISTRY
)
RESPONSES_UNSCORED = Counter(
    "anchorwatch_responses_unscored_total", "Responses without a projection, by reason", ["reason"], registry=REGISTRY
)
CANARY_STATE = Gauge(
    "anchorwatch_canary_state",
    "1 for what the last check of the axis' canaries said: ok, shifted or stale",
    ["state"],
    registry=REGISTRY,
)
CANARY_SHIFT = Gauge(
    "anchorwatch_canary_shift",
    "Largest shift of a canary at that check, standard deviations of the default Assistant's projections",
    registry=REGISTRY,
)
CANARY_CHECKED = Gauge(
    "anchorwatch_canary_checked_timestamp_seconds", "When that check was, seconds since 1970", registry=REGISTRY
)

# The fleet: whole deployments. At most fifty of them, the busiest, have labels of their own.
FLEET_Z = Gauge(
    "anchorwatch_fleet_z",
    "Mean z of a deployment over the last hour or two, day or week; its baseline's mean is 0",
    ["deployment", "span"],
    registry=REGISTRY,
)
FLEET_Z_ERROR = Gauge(
    "anchorwatch_fleet_z_error",
    "Standard error of that mean, hours taken as independent",
    ["deployment", "span"],
    registry=REGISTRY,
)
FLEET_LATE = Gauge(
    "anchorwatch_fleet_late_responses",
    "Responses of the last day that came after their minute had been closed, counted once an hour",
    ["deployment"],
    registry=REGISTRY,
)
FLEET_CLOSED = Gauge(
    "anchorwatch_fleet_closed_timestamp_seconds",
    "Event time up to which the fleet's minutes are closed, seconds since 1970",
    registry=REGISTRY,
)

# The HTTP interface.
HTTP_REQUESTS = Counter(
    "anchorwatch_http_requests_total", "HTTP requests answered, by status", ["result"], registry=REGISTRY
)
HTTP_PROJECTIONS = Counter(
    "anchorwatch_http_projections_total",
    "Projections that came over HTTP, by result: accepted or rejected",
    ["result"],
    registry=REGISTRY,
)
HTTP_QUEUE_BYTES = Gauge(
    "anchorwatch_http_queue_bytes", "Bytes of all HTTP requests that are not answered yet", registry=REGISTRY
)

# OpenTelemetry.
OTLP_EVENTS = Counter(
    "anchorwatch_otlp_events_total",
    "Responses told over OTLP, by result: sent, dropped before, or failed after the last try",
    ["result"],
    registry=REGISTRY,
)

# What is counted seldom is there from the start, at 0: Prometheus sees no increase in a series that begins at 1.
for _instrument, _values in (
    (DEAD_LETTER_RECORDS, ("bad_control", "fold_failed", "undecodable", "unusable", "wrong_key", "wrong_partition")),
    (COMMITS, ("committed", "refused")),
    (DUTY_FAILURES, ("actions", "ages", "expiry", "fleet", "lease")),
    (PUBLISHER_DROPPED, ("closed", "full", "invalid", "log", "spool")),
    (RESPONSES_UNSCORED, ("empty", "error", "not_finite", "tap_error", "unidentified", "unsupported")),
    (HTTP_PROJECTIONS, ("accepted", "rejected")),
    (OTLP_EVENTS, ("dropped", "failed", "sent")),
):
    for _value in _values:
        _instrument.labels(_value)
del _instrument, _value, _values


def serve_metrics(port: int | None) -> None:
    """Serve the instruments on a port, from a thread; on None, not at all.

    Raises:
        ConfigurationError: the port can't be had.
    """
    if port is None:
        return
    try:
        start_http_server(port, registry=REGISTRY)
    except OSError as error:
        raise ConfigurationError(
            f"can't listen on port {port} for the metrics: {error.strerror}",
            cure="choose another ANCHORWATCH_METRICS_PORT: each process of one machine needs its own",
        ) from error


def write_metrics(path: Path, names: Iterable[str]) -> None:
    """Write instruments for the textfile collector of Prometheus' node exporter, whole or not at all: for what runs now
    and then, and is gone when it would be asked.

    Raises:
        ConfigurationError: the file can't be written.
    """
    try:
        write_to_textfile(str(path), REGISTRY.restricted_registry(names))
    except OSError as error:
        raise ConfigurationError(
            f"can't write the metrics to {path}: {error.strerror}", cure="let this user write there"
        ) from error


def configure_logging(
    level: Literal["debug", "info", "warning", "error", "critical"] = "info",
    format: Literal["json", "console"] = "console",
) -> None:
    """Send every log line to stderr, so that stdout stays free for results.

    `json` writes one object a line. Tracebacks never show local variables: those may hold conversation text.
    """
    last: list[structlog.typing.Processor] = (
        [structlog.processors.format_exc_info, structlog.processors.JSONRenderer()]
        if format == "json"
        else [
            structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty(), exception_formatter=structlog.dev.plain_traceback)
        ]
    )
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            *last,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        # Standard error as it is when a line is written, not as it was when this was set up.
        logger_factory=lambda *_: structlog.PrintLogger(sys.stderr),
    )

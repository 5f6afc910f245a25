"""Every Prometheus instrument, in one registry, and the set-up of structured logging.

It knows nothing of who measures. Labels are bounded: no conversation, no model and no text ever becomes one.
"""

from __future__ import annotations

import sys
from typing import Literal

import structlog
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, start_http_server

from monitor.errors import ConfigurationError

__all__ = [
    "BATCH_SECONDS",
    "CHANNEL_FAILURES",
    "COMMITS",
    "DEAD_LETTER_RECORDS",
    "DUTY_FAILURES",
    "FINDINGS",
    "FLEET_CLOSED",
    "FLEET_LATE",
    "FLEET_Z",
    "FLEET_Z_ERROR",
    "HOUSEKEEPER",
    "HTTP_PROJECTIONS",
    "HTTP_QUEUE_BYTES",
    "HTTP_REQUESTS",
    "KEPT",
    "LAG",
    "LISTENER_ERRORS",
    "OUTBOX_OLDEST_SECONDS",
    "OUTBOX_PENDING",
    "PUBLISHER_DROPPED",
    "PUBLISHER_QUEUE_DEPTH",
    "PUBLISHER_RESENT",
    "PUBLISHER_SPOOLED",
    "PUBLISHER_SPOOLS_DAMAGED",
    "PUBLISHER_SPOOL_BYTES",
    "PUBLISHER_SPOOL_RECORDS",
    "REGISTRY",
    "RESPONSES",
    "RESPONSES_UNSCORED",
    "TAP_ERRORS",
    "TOLD",
    "WORKER_LOOP",
    "WORKER_PARTITIONS",
    "WORKER_PAUSED",
    "WORKER_WAITING",
    "configure_logging",
    "serve_metrics",
]

REGISTRY = CollectorRegistry(auto_describe=True)

# The worker.
RESPONSES = Counter(
    "anchorwatch_responses_total",
    "Responses folded and committed, by what the fold did with them",
    ["outcome"],
    registry=REGISTRY,
)
FINDINGS = Counter(
    "anchorwatch_findings_total", "Findings committed, by kind and severity", ["kind", "severity"], registry=REGISTRY
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
    "anchorwatch_worker_loop_seconds",
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
TOLD = Counter(
    "anchorwatch_told_total", "Findings that a channel has taken, by severity", ["severity"], registry=REGISTRY
)
KEPT = Counter("anchorwatch_kept_total", "Findings that nobody is told of, by reason", ["reason"], registry=REGISTRY)
CHANNEL_FAILURES = Counter(
    "anchorwatch_channel_failures_total",
    "Deliveries that failed: unavailable ones are tried again, refused findings are given up",
    ["result"],
    registry=REGISTRY,
)
OUTBOX_PENDING = Gauge(
    "anchorwatch_outbox_pending", "Findings that nobody has decided on yet, or that wait", registry=REGISTRY
)
OUTBOX_OLDEST_SECONDS = Gauge(
    "anchorwatch_outbox_oldest_seconds", "Seconds since the oldest of them was committed", registry=REGISTRY
)

# The collector.
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
    "anchorwatch_fleet_closed_seconds",
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

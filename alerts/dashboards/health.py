"""*Monitor health*: does the monitor itself see everything, in time, and do its messages arrive?"""

from __future__ import annotations

from alerts.panels import Limit, Panel, Query, lines, number

__all__ = ["DESCRIPTION", "ROWS"]

DESCRIPTION = "Does the monitor see everything, in time, and do its messages arrive?"

# Every process has every instrument without labels, at 0 where it is another's to set. So a panel asks those whose it
# is: whoever has ever written, who tells people, who has checked.
_BY_COLLECTORS = "and on (job, instance) anchorwatch_publisher_written_total > 0"
_BY_DISPATCHER = "and on (job, instance) anchorwatch_dispatcher == 1"
_BY_CHECKS = "and on (job, instance) anchorwatch_canary_checked_timestamp_seconds > 0"

_SOME = (Limit(0.5, "red"),)


def _slowest(metric: str, by: str = "") -> tuple[Query, Query]:
    """Median and 99th percentile of a histogram of seconds."""
    labels = f"le, {by}" if by else "le"
    name = f"{{{{{by}}}}} " if by else ""
    spread = f"sum by ({labels}) (rate({metric}_bucket[$__rate_interval]))"
    return (
        Query(f"histogram_quantile(0.5, {spread})", f"{name}median"),
        Query(f"histogram_quantile(0.99, {spread})", f"{name}99 %"),
    )


_glance: list[Panel] = [
    number(
        "Records behind",
        "Records in the log that no worker has folded yet.",
        "short",
        Query("sum(max by (partition) (anchorwatch_lag_records))"),
        limits=(Limit(1000, "yellow"), Limit(10_000, "red")),
    ),
    number(
        "Workers at work",
        "Workers whose loop came round within the last minute.",
        "short",
        Query("count(time() - anchorwatch_worker_loop_timestamp_seconds < 60) or vector(0)"),
    ),
    number(
        "Unwatched, last hour",
        "Projections that collectors gave up and responses that they could not score. Nobody will ever judge them.",
        "short",
        Query(
            "(sum(increase(anchorwatch_publisher_dropped_total[1h])) or vector(0))"
            " + (sum(increase(anchorwatch_responses_unscored_total[1h])) or vector(0))"
        ),
        limits=_SOME,
    ),
    number(
        "Dead letters, last hour",
        "Records that no worker can read. They wait among the dead letters.",
        "short",
        Query("sum(increase(anchorwatch_dead_letters_total[1h])) or vector(0)"),
        limits=_SOME,
    ),
    number(
        "Deliveries that failed, last hour",
        "Attempts that a receiver did not take; `unavailable` ones are tried again.",
        "short",
        Query('sum(increase(anchorwatch_deliveries_total{result!="taken"}[1h])) or vector(0)'),
        limits=_SOME,
    ),
    number(
        "Oldest untold finding",
        "How long ago the oldest finding was committed that nobody has decided on yet.",
        "s",
        Query("max(anchorwatch_outbox_oldest_seconds)"),
        limits=(Limit(60, "yellow"), Limit(300, "red")),
    ),
]

_workers: list[Panel] = [
    lines(
        "Records behind by partition",
        "Records in the log that are not folded yet.",
        "short",
        Query("max by (partition) (anchorwatch_lag_records)", "{{partition}}"),
    ),
    lines(
        "From reading a batch to its commit",
        "Of all workers: half of the batches are faster than the median, one in a hundred is slower than 99 %.",
        "s",
        *_slowest("anchorwatch_batch_seconds"),
    ),
    lines(
        "What the store takes for a commit",
        "Refused and failed commits included. This is the store's share of the panel before.",
        "s",
        *_slowest("anchorwatch_commit_seconds"),
    ),
    lines(
        "Commits by result",
        "A refused commit means that another worker has taken the partition over: harmless when rare.",
        "cps",
        Query("sum by (result) (rate(anchorwatch_commits_total[$__rate_interval]))", "{{result}}"),
        stacked=True,
    ),
    lines(
        "Partitions by worker",
        "Their sum is the topic's number of partitions, or nobody reads some of them.",
        "short",
        Query("anchorwatch_worker_partitions > 0", "{{instance}}"),
        stacked=True,
    ),
    lines(
        "Waiting and paused",
        "`waiting`: log or store do not answer a worker. `paused`: partitions that are not read, since most of it is "
        "poison. `stands still`: seconds since a worker's loop last came round.",
        "short",
        Query("max(anchorwatch_worker_waiting)", "waiting"),
        Query("sum(anchorwatch_worker_paused) or vector(0)", "paused"),
        Query("time() - (anchorwatch_worker_loop_timestamp_seconds > 0)", "stands still {{instance}}"),
    ),
    lines(
        "Dead letters by reason",
        "Records an hour that no worker can read.",
        "short",
        Query("sum by (reason) (increase(anchorwatch_dead_letters_total[1h]))", "{{reason}}"),
        stacked=True,
    ),
    lines(
        "Housekeeping",
        "Exactly one worker keeps house. `failed`: duties an hour that are tried again. `minutes closed`: how far "
        "behind the fleet's sums are, in seconds.",
        "short",
        Query("sum(anchorwatch_housekeeper)", "keeps house"),
        Query("sum by (duty) (increase(anchorwatch_duty_failures_total[1h]))", "failed: {{duty}}"),
        Query("time() - max(anchorwatch_fleet_closed_timestamp_seconds > 0)", "minutes closed"),
    ),
]

_deliveries: list[Panel] = [
    lines(
        "Deliveries by receiver and result",
        "Attempts a second.",
        "cps",
        Query(
            "sum by (integration, result) (rate(anchorwatch_deliveries_total[$__rate_interval]))",
            "{{integration}} {{result}}",
        ),
        stacked=True,
    ),
    lines(
        "How long receivers take",
        "Seconds for one attempt, whatever its result.",
        "s",
        *_slowest("anchorwatch_delivery_seconds", "integration"),
    ),
    lines(
        "Findings that wait for the dispatcher",
        "How many nobody has decided on yet.",
        "short",
        Query("max(anchorwatch_outbox_pending)", "waiting"),
    ),
    lines(
        "The dispatcher",
        "Exactly one tells people. `stands still`: seconds since its loop last came round. `rules in force`: 1 while "
        "the file of rules is what is in force, 0 while it is wrong and the one before stays.",
        "short",
        Query("sum(anchorwatch_dispatcher)", "tells people"),
        Query("time() - max(anchorwatch_dispatcher_loop_timestamp_seconds > 0)", "stands still"),
        Query(f"min(anchorwatch_alerts_config_last_reload_successful {_BY_DISPATCHER})", "rules in force"),
    ),
]

_collectors: list[Panel] = [
    lines(
        "Projections written",
        "What collectors have brought into the log a second: from their queue, and later from their spool.",
        "cps",
        Query(f"rate(anchorwatch_publisher_written_total[$__rate_interval]) {_BY_COLLECTORS}", "{{instance}}"),
        Query(
            f"rate(anchorwatch_publisher_resent_total[$__rate_interval]) {_BY_COLLECTORS}",
            "{{instance}} from the spool",
        ),
    ),
    lines(
        "Unwatched, by reason",
        "Projections an hour that never reached the log, and responses an hour without a projection.",
        "short",
        Query("sum by (reason) (increase(anchorwatch_publisher_dropped_total[1h]))", "dropped: {{reason}}"),
        Query("sum by (reason) (increase(anchorwatch_responses_unscored_total[1h]))", "not scored: {{reason}}"),
        stacked=True,
    ),
    lines(
        "Queue and spool",
        "Projections that wait in collectors, in memory and on disk.",
        "short",
        Query(f"anchorwatch_publisher_queue_depth {_BY_COLLECTORS}", "{{instance}} queue"),
        Query(f"anchorwatch_publisher_spool_records {_BY_COLLECTORS}", "{{instance}} spool"),
    ),
    lines(
        "Taps that have switched themselves off",
        "Exceptions inside the tap: the model goes on, unwatched.",
        "short",
        Query(f"anchorwatch_tap_errors_total {_BY_COLLECTORS}", "{{instance}}"),
    ),
    lines(
        "HTTP requests by answer",
        "Of the HTTP interface, a second.",
        "reqps",
        Query("sum by (result) (rate(anchorwatch_http_requests_total[$__rate_interval]))", "{{result}}"),
        stacked=True,
    ),
    lines(
        "Projections over HTTP",
        "Projections that came over HTTP a second, and the bytes of all requests that are not answered yet.",
        "short",
        Query("sum by (result) (rate(anchorwatch_http_projections_total[$__rate_interval]))", "{{result}}"),
        Query("sum(anchorwatch_http_queue_bytes)", "bytes under way"),
    ),
    lines(
        "Responses told over OTLP",
        "Responses a second, by what became of their events. All are 0 where no receiver is set. What is dropped or "
        "fails is missing over there only: here it is judged all the same.",
        "cps",
        Query("sum by (result) (rate(anchorwatch_otlp_events_total[$__rate_interval]))", "{{result}}"),
        stacked=True,
    ),
]

_instrument: list[Panel] = [
    number(
        "Age of the axis",
        "Time since the axis bundle in use was made. An axis goes stale with the model's weights, not with time: see "
        "the canaries.",
        "dtdurations",
        Query("time() - min(anchorwatch_axis_created_timestamp_seconds)"),
        span=6,
    ),
    number(
        "Age of the baseline",
        "Time since the oldest calibration in force was put into force.",
        "dtdurations",
        Query("time() - min(anchorwatch_calibration_activated_timestamp_seconds > 0)"),
        span=6,
    ),
    number(
        "Canaries",
        "What the last check of the canaries said: whether the axis still measures the same with this model.",
        "none",
        Query("max by (state) (anchorwatch_canary_state) == 1", "{{state}}"),
        span=6,
    ),
    number(
        "Largest shift of a canary",
        "At that check, in standard deviations of the default Assistant's projections.",
        "none",
        Query(f"max(anchorwatch_canary_shift {_BY_CHECKS})"),
        span=6,
    ),
]

ROWS: tuple[tuple[str, list[Panel]], ...] = (
    ("At a glance", _glance),
    ("Workers", _workers),
    ("Telling people", _deliveries),
    ("Collectors and the HTTP interface", _collectors),
    ("The instrument", _instrument),
)

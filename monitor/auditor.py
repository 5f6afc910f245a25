"""One audit from beginning to end: judge everything, write tables and report, give the files their names at the end.

It knows the order of things, and that nothing half-written may ever carry a final name. Where conversations come from,
and how their text can be read again, it is told.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import NamedTuple, get_args

from msgspec.structs import replace

from monitor.audit import Audit, Scored, Summary, self_sample_of
from monitor.axis.bundle import Bundle
from monitor.populations import Populations
from monitor.recorded import Recorded
from monitor.report import Exchange, Provenance, html_report, persona_plane, summary_json
from monitor.tables import COLUMNS, Format, Row, Tables, writable

__all__ = ["REPORT", "SHARDS", "SUMMARY", "WRITTEN", "Audited", "Sources", "run_audit"]

REPORT, SUMMARY = "report.html", "summary.json"
SHARDS = ".shards"
# Every name that an audit may give to a file.
WRITTEN = (*(f"{table}.{form}" for table in COLUMNS for form in get_args(Format)), REPORT, SUMMARY)
KEPT = f"What was scored is kept in {SHARDS} there, and is not scored again."
ASSUMED = (
    "The baseline was taken from these logs themselves (--self): it assumes that most of their conversations are "
    "healthy. Drift that most of them share can't be seen, nor that a deployment has been off from its first day. "
    "Nothing is certified by it."
)


class Sources(NamedTuple):
    """Where conversations come from; each can be gone through more than once, one after the other.

    Attributes:
        logs: scored conversations.
        records: recorded responses, in log order.
    """

    logs: Callable[[], Iterable[Scored]] = tuple
    records: Callable[[], Iterable[Recorded]] = tuple


class Audited(NamedTuple):
    """What came of it: counts, provenance with the files' paths, and what the reader must know of the audit itself."""

    summary: Summary
    provenance: Provenance
    problems: list[str]


Texts = Callable[[list[Row]], tuple[Mapping[str, Exchange], list[str]]]


def run_audit(
    sources: Sources,
    out: Path,
    bundle: Bundle,
    populations: Populations,
    provenance: Provenance,
    *,
    form: Format = "parquet",
    top: int = 100,
    own_baseline: bool = False,
    texts: Texts | None = None,
) -> Audited:
    """Audit everything into a folder.

    Args:
        provenance: without `files`, which are known at the end.
        own_baseline: take baselines from the logs themselves; goes through the sources twice.
        texts: reads the worst turns again; None keeps all text out of every file.

    Raises:
        ConfigurationError: the folder can't be written, its disk is full, or a package is missing; no file there has
            changed.
        AnchorwatchError: as the sources do.
    """
    problems = []
    with writable(out, lambda: KEPT if (out / SHARDS).is_dir() else ""):
        tables = Tables(out, form)
        try:
            if own_baseline:
                found, refused = self_sample_of(populations, sources.logs(), sources.records()).baselines()
                populations = populations.with_own(found)
                problems += [ASSUMED] if found else []
                problems += [f"--self gives no baseline for {name}: {why}" for name, why in refused.items()]
            audit = Audit(populations, tables, top=top)
            for scored in sources.logs():
                audit.take(scored)
            audit.take_events(sources.records())
            summary = audit.finish()
            drawn, others = audit.drawn()
            problems += _warnings(summary)
            exchanges = None
            if texts is not None:
                exchanges, unread = texts(drawn)
                problems += unread
            names = [*(f"{name}.{form}" for name in COLUMNS), REPORT, SUMMARY]
            turns = tables.turns([row["conversation_id"] for row in drawn])
            page = html_report(
                summary,
                replace(provenance, files=names[:3]),
                drawn,
                turns,
                others,
                persona_plane(bundle),
                exchanges=exchanges,
                problems=problems,
            )
            provenance = replace(provenance, files=[str(out / name) for name in names])
            tables.add_file(REPORT, page.encode(errors="backslashreplace"))
            tables.add_file(SUMMARY, summary_json(summary, provenance))
            tables.commit()
        except BaseException:
            tables.abandon()
            raise
    return Audited(summary, provenance, problems)


def _warnings(summary: Summary) -> list[str]:
    """What would make a reader misjudge the whole."""
    found = []
    read = summary.skipped + sum(summary.outcomes.values())
    if summary.skipped * 2 > read:
        found.append(f"Most of what was read could not be audited: {summary.skipped} of {read} records and turns.")
    learning = [one.deployment for one in summary.deployments if one.basis == "learning"]
    if learning:
        found.append(
            f"No baseline for {', '.join(learning[:10])}{' and others' if len(learning) > 10 else ''}: their "
            "conversations were counted, not judged. Calibrate them, or use --self."
        )
    return found

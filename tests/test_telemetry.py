"""Promises of telemetry: one registry, bounded labels, log lines on stderr that hold no conversation text."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from prometheus_client import generate_latest

from monitor import telemetry

ROOT = Path(__file__).parent.parent
# A deployment is a label for the fifty busiest (test_fleet, test_metrics), a conversation for the twenty riskiest
# (test_metrics), an integration as often as the file of rules has one, an axis once.
BOUNDED = {
    *("axis_id", "cause", "certification", "conversation_id", "deployment", "duty", "integration", "kind", "outcome"),
    *("partition", "reason", "result", "severity", "span", "state"),
}


def test_every_instrument_is_ours_documented_and_has_bounded_labels() -> None:
    families = list(telemetry.REGISTRY.collect())
    assert len(families) == len([name for name in telemetry.__all__ if name.isupper()]) - 1
    for family in families:
        assert family.name.startswith("anchorwatch_")
        assert len(family.documentation) > 20
    for name in telemetry.__all__:
        if name.isupper() and name != "REGISTRY":
            assert set(getattr(telemetry, name)._labelnames) <= BOUNDED


def test_the_registry_is_readable_by_prometheus() -> None:
    assert b"anchorwatch_batch_seconds_bucket" in generate_latest(telemetry.REGISTRY)


def logged(level: str, form: str) -> subprocess.CompletedProcess[str]:
    code = f"""
import structlog
from monitor.telemetry import configure_logging
configure_logging({level!r}, {form!r})
log = structlog.get_logger("anchorwatch.test")
def fail(conversation):
    raise ValueError("no text here")
log.debug("too fine")
log.warning("dead letters", count=2)
try:
    fail("ca" + "nary")
except ValueError:
    log.exception("it failed")
"""
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)


@pytest.mark.parametrize("form", ["json", "console"])
def test_log_lines_go_to_stderr_and_show_no_local_variables(form: str) -> None:
    done = logged("info", form)
    assert done.stdout == ""
    assert "dead letters" in done.stderr and "ValueError" in done.stderr
    assert "too fine" not in done.stderr
    assert "canary" not in done.stderr


def test_json_is_one_object_a_line() -> None:
    lines = [json.loads(line) for line in logged("debug", "json").stderr.splitlines()]
    assert [line["event"] for line in lines] == ["too fine", "dead letters", "it failed"]
    assert lines[1]["count"] == 2 and lines[1]["level"] == "warning" and lines[1]["timestamp"].endswith("Z")

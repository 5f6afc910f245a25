"""Promises of the Prometheus rules: promtool accepts them, every alert fires when it should and not when all is well,
says what it means and where to read on, and asks for nothing that the code does not measure."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from monitor import telemetry

ROOT = Path(__file__).parent.parent
RULES = ROOT / "deploy" / "prometheus"
GROUPS = [
    group
    for name in ("recording", "alerts")
    for group in yaml.safe_load((RULES / f"{name}.rules.yml").read_text())["groups"]
]
ALERTS: dict[str, dict[str, Any]] = {
    rule["alert"]: rule for group in GROUPS for rule in group["rules"] if "alert" in rule
}
RECORDED: dict[str, str] = {
    rule["record"]: rule["expr"] for group in GROUPS for rule in group["rules"] if "record" in rule
}
CASES = [
    (path.name, case)
    for path in sorted((RULES / "tests").glob("*.yml"))
    for case in yaml.safe_load(path.read_text())["tests"]
]


def promtool(*arguments: str) -> subprocess.CompletedProcess[str]:
    binary = shutil.which("promtool")
    if binary is None:
        pytest.skip("promtool is not installed; Debian and Ubuntu: apt-get install prometheus")
    return subprocess.run([binary, *arguments], capture_output=True, text=True, timeout=120)


def test_promtool_accepts_configuration_and_rules() -> None:
    done = promtool("check", "config", "--lint=all", "--lint-fatal", str(RULES / "prometheus.yml"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{len(ALERTS)} rules found" in done.stdout and f"{len(RECORDED)} rules found" in done.stdout


def test_the_unit_tests_of_the_rules_pass() -> None:
    done = promtool("test", "rules", *map(str, sorted((RULES / "tests").glob("*.yml"))))
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("was", "becomes", "where"),
    [
        ("unless (sum by (deployment) (increase(anchorwatch_responses_total[30m])) > 0)", "", "collector.yml"),
        ('{deployment!="other"}', "", "collector.yml"),
        ("and on () (sum(", "and on () (0 * sum(", "collector.yml"),
        ("unless sum by (deployment) (anchorwatch_responses_total)\n", "\n", "collector.yml"),
        ("anchorwatch:lag_records:sum > 1000", "anchorwatch_lag_records > 1000", "worker.yml"),
        ("(anchorwatch_worker_loop_timestamp_seconds > 0)", "anchorwatch_worker_loop_timestamp_seconds", "well.yml"),
        ("- 2 * sqrt(", "- 0 * sqrt(", "instrument.yml"),
    ],
)
def test_a_rule_that_is_changed_fails_them(was: str, becomes: str, where: str, tmp_path: Path) -> None:
    shutil.copytree(RULES, tmp_path / "prometheus")
    rules = tmp_path / "prometheus" / "alerts.rules.yml"
    assert was in rules.read_text()
    rules.write_text(rules.read_text().replace(was, becomes))
    done = promtool("test", "rules", str(tmp_path / "prometheus" / "tests" / where))
    assert done.returncode == 1 and "FAILED" in done.stdout + done.stderr


def test_every_alert_is_seen_firing_and_every_one_is_quiet_while_all_is_well() -> None:
    expected: dict[str, set[bool]] = {}
    for _, case in CASES:
        for one in case["promql_expr_test"]:
            if found := re.search(r'alertname="(\w+)"', one["expr"]):
                expected.setdefault(found[1], set()).add(bool(one["exp_samples"]))
    assert {alert for alert, seen in expected.items() if True in seen} == ALERTS.keys()
    # In the quiet case every metric that an alert asks for is there, or its silence would prove nothing.
    (well,) = (case for name, case in CASES if name == "well.yml")
    given = {line["series"].partition("{")[0] for line in well["input_series"]}
    assert given >= {name for rule in ALERTS.values() for name in measured(rule["expr"])}
    quiet = [one for one in well["promql_expr_test"] if one["expr"] == 'count(ALERTS{alertstate="firing"})']
    assert len(quiet) == 3 and not any(one["exp_samples"] for one in quiet)


@pytest.mark.parametrize("name", ALERTS)
def test_an_alert_says_how_bad_it_is_what_it_means_and_where_to_read_on(name: str) -> None:
    rule = ALERTS[name]
    assert rule["labels"]["severity"] in ("critical", "warning", "info")
    summary = re.sub(r"\{\{.*?\}\}", "?", rule["annotations"]["summary"])
    assert len(summary) < 80 and not summary.endswith(".")
    assert rule["annotations"]["description"].endswith(".") and len(rule["annotations"]["description"]) > 40
    page, _, anchor = rule["annotations"]["runbook_url"].partition("#")
    assert anchor == name.lower()
    assert f"### {name}\n" in (ROOT / page).read_text(), "the runbook has no such heading"


def measured(expression: str) -> set[str]:
    """What an expression asks the processes for, through what is recorded."""
    for name, recorded in RECORDED.items():
        expression = expression.replace(name, f"({recorded})")
    if any(name in expression for name in RECORDED):
        return measured(expression)
    return set(re.findall(r"\banchorwatch_\w+|\bup\b", re.sub(r"\{[^}]*\}|by \([^)]*\)", "", expression)))


@pytest.mark.parametrize("name", [*ALERTS, *RECORDED])
def test_a_rule_asks_for_nothing_that_is_not_measured(name: str) -> None:
    expression = ALERTS[name]["expr"] if name in ALERTS else RECORDED[name]
    families = {family.name: family for family in telemetry.REGISTRY.collect()}
    for series in measured(expression) - {"up"}:
        family = families.get(series) or families[re.sub(r"_(total|bucket|count|sum)$", "", series)]
        assert series == family.name or series.endswith(
            {"counter": ("_total",), "histogram": ("_bucket", "_count")}[family.type]
        )
    labels = {label for instrument in vars(telemetry).values() for label in getattr(instrument, "_labelnames", ())}
    asked = set(re.findall(r"(\w+)!?=~?\"", expression)) | {
        label.strip() for group in re.findall(r"by \(([^)]*)\)", expression) for label in group.split(",")
    }
    assert asked <= labels | {"job", "instance", "le"}


def test_values_in_a_metric_of_fixed_words_are_words_that_the_code_says() -> None:
    source = "\n".join(
        path.read_text() for wing in ("monitor", "alerts", "collectors") for path in (ROOT / wing).rglob("*.py")
    )
    for rule in ALERTS.values():
        for label, value in re.findall(r'(\w+)="([a-z_]+)"', rule["expr"]):
            if label != "job":
                assert f'"{value}"' in source, f"{label}={value}"

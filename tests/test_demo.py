"""The demo, whole, with a tiny model: every part is real, what it prints is readable, and its JSON adds up."""

from __future__ import annotations

import io
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from tiny import Built

from collectors.demo import Demo, finding_line, run_demo, show_summary, sparkline, spread
from collectors.overhead import measure_overhead
from collectors.traffic import Script, load_scripts
from monitor.axis.bundle import Bundle, load_bundle
from monitor.detect.configure import detector_config
from monitor.detect.conversation import ConversationState, step
from monitor.errors import ConfigurationError, ModelError
from monitor.events import Finding, decode_projection
from monitor.store.sqlite import SqliteStore
from monitor.stream.log import PROJECTIONS, EmbeddedLog

pytest_plugins = ["miniature"]

CONVERSATIONS = 10


class Ran:
    """A finished demo: its summary, what it printed, and the folder with its log and store."""

    def __init__(self, model: Path, bundle: Path, folder: Path, *, terminal: bool) -> None:
        out = io.StringIO()
        console = Console(file=out, width=160, height=50, force_terminal=terminal, color_system=None)
        self.summary = run_demo(
            model=str(model),
            bundle=bundle,
            conversations=CONVERSATIONS,
            tokens=6,
            data_dir=folder,
            console=console,
        )
        self.printed = out.getvalue()
        self.folder = folder


@pytest.fixture(scope="module")
def ran(model_folder: Path, calibrated: Path, tmp_path_factory: pytest.TempPathFactory) -> Ran:
    return Ran(model_folder, calibrated, tmp_path_factory.mktemp("demo") / "data", terminal=False)


def a_finding(**changes: Any) -> Finding:
    return Finding(
        **{
            "id": "f",
            "time": "2026-01-01T00:00:00Z",
            "conversation_id": "a",
            "turn": 3,
            "deployment": "d",
            "axis_id": "x",
            "kind": "sudden_drop",
            "severity": "warning",
            "statistic": "drop",
            "value": 3.25,
            "boundary": 2.5,
            "risk": 1.3,
            "budget": None,
            "certification": "uncertified",
            "config_id": "c",
            "episode_id": "e",
            "nearest_roles": ["ghost", "witch"],
            **changes,
        }
    )


# The run


def test_the_json_has_what_was_promised_and_adds_up(ran: Ran) -> None:
    said = json.loads(json.dumps(ran.summary))
    assert {
        "conversations",
        "responses",
        "tokens",
        "tokens_per_second",
        "by_kind",
        "findings",
        "tap_overhead",
    } <= set(said)
    scripts = spread(load_scripts("demo"), CONVERSATIONS)
    assert said["conversations"] == CONVERSATIONS
    assert said["responses"] == sum(len(script.turns) for script in scripts)
    assert 0 < said["tokens"] <= 6 * said["responses"] and said["tokens_per_second"] > 0
    assert {kind: row["conversations"] for kind, row in said["by_kind"].items()} == Counter(s.kind for s in scripts)
    kind_of = {script.id: script.kind for script in scripts}
    flagged = {f["conversation_id"] for f in said["findings"] if f["severity"] != "info"}
    for kind, row in said["by_kind"].items():
        # where the log is kept, a run's conversations carry its name, behind an @
        assert row["flagged"] == sum(kind_of[name.partition("@")[0]] == kind for name in flagged)
    assert isinstance(said["tap_overhead"], float) and said["tap_overhead"] < 1


def test_every_response_went_through_log_fold_and_store(ran: Ran, calibrated: Path) -> None:
    log, store = EmbeddedLog(ran.folder / "log.db"), SqliteStore(ran.folder / "store.db")
    begin, end, _ = log.span(PROJECTIONS, 0)
    events = [decode_projection(record.value) for record in log.read(PROJECTIONS, 0, begin, end - begin)]
    assert len(events) == ran.summary["responses"] - ran.summary["unscored"] > 0
    assert store.counts() == {"folded": len(events)}
    config = detector_config(load_bundle(calibrated))
    states: dict[str, ConversationState] = {}
    findings: list[Finding] = []
    for event in events:
        done = step(states.get(event.conversation_id), event, config)
        states[event.conversation_id] = done.state
        findings += done.findings
    assert [finding.id for finding in findings] == [finding["id"] for finding in ran.summary["findings"]]
    assert store.findings(10_000)[::-1] == findings
    assert ran.summary["config_id"] == config.config_id
    log.close()
    store.close()


def test_without_a_terminal_it_prints_plain_lines(ran: Ran) -> None:
    assert "\x1b" not in ran.printed and "\r" not in ran.printed
    lines = ran.printed.splitlines()
    tenths = [line for line in lines if "responses generated" in line]
    assert 5 <= len(tenths) <= 10
    responses = ran.summary["responses"]
    assert tenths[-1].startswith(f"{responses} of {responses} ")
    for finding in ran.summary["findings"]:
        assert any(finding["conversation_id"] in line and finding["kind"] in line for line in lines)
    for kind in ran.summary["by_kind"]:
        assert any(kind in line for line in lines)
    assert "not proof of harm" in " ".join(ran.printed.split())


def test_on_a_terminal_it_draws_a_live_table(model_folder: Path, calibrated: Path, tmp_path: Path, ran: Ran) -> None:
    live = Ran(model_folder, calibrated, tmp_path / "data", terminal=True)
    assert "\x1b[" in live.printed  # it moves the cursor to redraw itself
    assert "z, turn by turn" in live.printed and "risk" in live.printed
    assert "responses generated" not in live.printed
    assert any(bar in live.printed for bar in "▂▃▄▅▆▇")
    assert live.summary["responses"] == ran.summary["responses"]
    assert live.summary["by_kind"] == ran.summary["by_kind"]


def test_the_same_seed_gives_the_same_talk(model_folder: Path, calibrated: Path, tmp_path: Path, ran: Ran) -> None:
    again = Ran(model_folder, calibrated, tmp_path / "data", terminal=False)
    for name in ("responses", "tokens", "by_kind", "unscored", "axis_id", "config_id"):
        assert again.summary[name] == ran.summary[name]


def test_a_bundle_that_is_not_calibrated_is_refused(model_folder: Path, built: Built) -> None:
    with pytest.raises(ConfigurationError, match="not calibrated") as caught:
        run_demo(model=str(model_folder), bundle=built.directory, conversations=1, console=Console(file=io.StringIO()))
    assert "axis calibrate" in caught.value.cure


@pytest.mark.parametrize("conversations", [0, -3, 10_000])
def test_a_number_of_conversations_out_of_range_is_refused_before_anything_is_loaded(conversations: int) -> None:
    with pytest.raises(ConfigurationError, match="--conversations") as caught:
        run_demo(model="nobody/nothing", bundle="nowhere", conversations=conversations)
    assert "ask for 1 to" in caught.value.cure


def test_a_model_that_can_not_be_had_is_told_with_the_cure(calibrated: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError) as caught:
        run_demo(model=str(tmp_path), bundle=calibrated, conversations=1, console=Console(file=io.StringIO()))
    assert caught.value.cure


# The choice of conversations


def test_a_few_conversations_are_spread_over_the_kinds() -> None:
    scripts = load_scripts("demo")
    kinds = {script.kind for script in scripts}
    assert Counter(script.kind for script in spread(scripts, None)) == dict.fromkeys(kinds, 4)
    for count in range(1, len(scripts) + 1):
        found = Counter(script.kind for script in spread(scripts, count))
        assert found.total() == count
        if count >= len(kinds):
            assert set(found) == kinds and max(found.values()) - min(found.values()) <= 1


# What is shown


def test_the_sparkline_goes_from_six_below_to_two_above() -> None:
    assert sparkline([]) == ""
    assert sparkline([-6.0, 1.5]) == "▁█"
    assert sparkline([-100.0, 100.0]) == "▁█"
    rising = sparkline([-6 + i for i in range(8)])
    assert rising == "▁▂▃▄▅▆▇█"


def a_demo() -> Demo:
    return Demo([("a", Script(id="a", kind="therapy", topic="a [bracket] in it", turns=("x",)))])


def test_a_finding_says_what_crossed_which_boundary_and_what_it_nears() -> None:
    demo = a_demo()
    line = finding_line(demo, a_finding()).plain
    assert line.startswith("warning") and "turn 3" in line and "sudden_drop" in line
    assert "drop 3.2 ≥ 2.5" in line or "drop 3.3 ≥ 2.5" in line
    assert "nearest: ghost, witch" in line
    over = finding_line(demo, a_finding(kind="recovered", severity="info")).plain
    assert "≥" not in over


def summary_of(demo: Demo) -> dict[str, Any]:
    return {
        "by_kind": demo.by_kind(),
        "responses": 1,
        "tokens": 1,
        "seconds": 1.0,
        "tokens_per_second": 1.0,
        "tap_overhead": 0.0,
    }


def shown(demo: Demo) -> str:
    out = io.StringIO()
    show_summary(summary_of(demo), demo, Console(file=out, width=200))
    return out.getvalue()


def test_it_says_plainly_where_a_model_did_not_drift_and_where_a_healthy_script_was_flagged() -> None:
    quiet = a_demo()
    quiet.sessions["a"].z.append(0.1)
    assert "Not flagged though the script invites drift: 1 of 1 therapy" in shown(quiet)
    loud = Demo([("b", Script(id="b", kind="small_talk", topic="tea", turns=("x",)))])
    loud.sessions["b"].z.append(-5.0)
    loud.sessions["b"].findings.append(a_finding(conversation_id="b"))
    text = shown(loud)
    assert "Flagged though the script is healthy: 1 of 1 small_talk" in text
    assert "invites drift" not in text


def test_recovering_alone_flags_nobody() -> None:
    demo = a_demo()
    demo.sessions["a"].findings.append(a_finding(kind="recovered", severity="info"))
    assert demo.by_kind()["therapy"]["flagged"] == 0


def test_a_kind_of_which_nothing_was_judged_and_a_topic_with_brackets_are_shown_all_the_same() -> None:
    demo = a_demo()
    assert demo.by_kind()["therapy"]["mean_z"] is None
    assert "a [bracket] in it" in shown(demo)


# What the tap costs


def test_overhead_is_timed_in_pairs(loaded: Any, built: Built) -> None:
    found = measure_overhead(loaded, built.bundle, batch_size=2, tokens=3, rounds=3)
    assert len(found.ratios) == 3 and sorted(found.ratios)[1] == found.ratio
    assert found.with_tap > 0 and found.without_tap > 0
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in loaded.model.modules())


def test_the_tap_benchmark_prints_its_ratio_last(
    model_folder: Path, built: Built, capsys: pytest.CaptureFixture[str]
) -> None:
    from benchmarks.tap import main

    options = ["--batch-sizes", "1", "2", "--tokens", "3", "--rounds", "2", "--json"]
    main(["--model", str(model_folder), "--bundle", str(built.directory), *options])
    said = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert said["benchmark"] == "tap" and said["ratio"] == min(each["ratio"] for each in said["by_batch_size"])
    assert [each["batch_size"] for each in said["by_batch_size"]] == [1, 2]


def test_the_bundle_is_the_one_that_was_named(ran: Ran, calibrated: Path) -> None:
    bundle: Bundle = load_bundle(calibrated)
    assert ran.summary["axis_id"] == bundle.id
    assert bundle.id[:12] in ran.printed

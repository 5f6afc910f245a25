"""The command line as a user meets it: real processes, results on standard output, and every error with its cure."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from tiny import Built, environment, here, small_catalogue
from typer.testing import CliRunner

from collectors.publish import QueuePublisher
from monitor.__main__ import app
from monitor.axis.bundle import load_bundle, shipped_bundles
from monitor.detect.baseline import DetectorConfig
from monitor.detect.configure import detector_config
from monitor.detect.conversation import ConversationState, step
from monitor.events import Finding, Projection, Windows
from monitor.store.sqlite import SqliteStore
from monitor.stream.log import PROJECTIONS, EmbeddedLog

pytest_plugins = ["miniature"]

COMMANDS = [
    [],
    ["demo"],
    ["worker"],
    ["audit"],
    ["axis"],
    *(["axis", name] for name in ("build", "calibrate", "show", "check", "import")),
]


def anchorwatch(*arguments: object, **settings: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "monitor", *map(str, arguments)],
        env=environment(**settings),
        capture_output=True,
        text=True,
        timeout=120,
    )


def start(*arguments: object, **settings: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "monitor", *map(str, arguments)],
        env=environment(**settings),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def refused(done: subprocess.CompletedProcess[str], *said: str) -> None:
    """Exit 2, an error that names its cure on standard error, no traceback, and nothing on standard output."""
    assert done.returncode == 2, done.stderr
    assert "error:" in done.stderr and "cure:" in done.stderr
    assert "Traceback" not in done.stderr and done.stdout == ""
    for words in said:
        assert words in done.stderr


def wait_for(done: Callable[[], bool], process: subprocess.Popen[str], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not done():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.02)


# Help


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: " ".join(command) or "anchorwatch")
def test_every_command_has_help(command: list[str]) -> None:
    done = CliRunner().invoke(app, [*command, "--help"], env={"COLUMNS": "200"})
    assert done.exit_code == 0 and "Usage:" in done.output
    for word in COMMANDS[-5:] if command == ["axis"] else []:
        assert word[1] in done.output


def test_help_and_version_come_without_torch() -> None:
    script = (
        "import sys; from monitor.__main__ import main\n"
        "try: main()\n"
        "finally: assert not {'torch', 'transformers'} & set(sys.modules), 'torch was imported'"
    )
    for argument in ("--help", "--version"):
        done = subprocess.run(
            [sys.executable, "-c", script, argument], env=environment(), capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == version("anchorwatch")


def test_an_unknown_option_is_refused() -> None:
    done = anchorwatch("demo", "--no-such-option")
    assert done.returncode == 2 and "No such option" in done.stderr and "Traceback" not in done.stderr


# Errors


def test_a_bundle_that_is_not_there(tmp_path: Path) -> None:
    for command in (["axis", "show", tmp_path / "none"], ["worker", "--bundle", tmp_path / "none"]):
        refused(anchorwatch(*command, ANCHORWATCH_DATA_DIR=str(tmp_path)), "no axis bundle")


def test_a_bundle_that_is_not_calibrated(built: Built, tmp_path: Path) -> None:
    refused(
        anchorwatch("worker", "--bundle", built.directory, ANCHORWATCH_DATA_DIR=str(tmp_path)),
        "not calibrated",
        "axis calibrate",
    )


@pytest.mark.parametrize("name", ["bundle.safetensors", "bundle.json"])
@pytest.mark.parametrize("damage", ["changed", "truncated"])
def test_a_bundle_that_was_tampered_with(built: Built, tmp_path: Path, name: str, damage: str) -> None:
    for path in built.directory.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    data = bytearray((tmp_path / name).read_bytes())
    if damage == "changed":
        data[len(data) // 2] ^= 1
    (tmp_path / name).write_bytes(bytes(data if damage == "changed" else data[: len(data) // 2]))
    done = CliRunner().invoke(app, ["axis", "show", str(tmp_path)])
    assert done.exit_code == 1 and type(done.exception).__name__ == "BundleCorrupt"
    if (name, damage) == ("bundle.json", "changed"):  # one of the four as a user sees it
        refused(anchorwatch("axis", "show", tmp_path))


def test_a_model_that_can_not_be_had_without_a_network(calibrated: Path) -> None:
    done = anchorwatch("demo", "--model", "nobody/nothing", "--bundle", calibrated, "--conversations", "1", "--json")
    refused(done, "nobody/nothing", "local folder")


def test_a_mistyped_setting_is_told_before_anything_else(built: Built) -> None:
    refused(
        anchorwatch("axis", "show", built.directory, ANCHORWATCH_DATADIR="/tmp", ANCHORWATCH_BATCH_SIZE="no"),
        "did you mean ANCHORWATCH_DATA_DIR",
        "ANCHORWATCH_BATCH_SIZE",
    )


def test_every_variable_that_a_cure_names_is_a_setting(built: Built, tmp_path: Path) -> None:
    done = anchorwatch("axis", "show", built.directory, "--json", ANCHORWATCH_CACHE_DIR=str(tmp_path))
    assert done.returncode == 0, done.stderr


def test_options_that_go_together() -> None:
    done = CliRunner().invoke(app, ["axis", "import", "a.pt", "--out", "o", "--model", "m", "--capping", "c.pt"])
    assert type(done.exception).__name__ == "ConfigurationError" and "--experiment" in str(done.exception)


# Showing


def test_show_prints_one_json_object(built: Built) -> None:
    done = anchorwatch("axis", "show", built.directory, "--json", "--verify")
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert said["id"] == built.bundle.id
    assert {"cosine_pc1", "auroc_response", "auroc_role", "controls", "layer", "persona_axis"} <= set(said)
    assert "Every figure agrees" in done.stderr


def test_figures_that_differ_exit_with_1(built: Built, tmp_path: Path) -> None:
    import msgspec

    from monitor.axis.bundle import new_bundle, save_bundle

    nicer = {**built.bundle.info.figures, "cosine_axis_persona_axis": 1.0}
    info = msgspec.structs.replace(built.bundle.info, figures=nicer)
    save_bundle(new_bundle(built.bundle.tensors, info, built.responses), tmp_path, built.responses)
    done = CliRunner().invoke(app, ["axis", "show", str(tmp_path), "--verify"])
    assert done.exit_code == 1 and "cosine_axis_persona_axis" in done.output


@pytest.mark.skipif("smollm2" not in shipped_bundles(), reason="no bundle is shipped in this tree")
def test_the_shipped_bundle_shows_verifies_and_judges() -> None:
    done = CliRunner().invoke(app, ["axis", "show", "--verify", "--json"])
    assert done.exit_code == 0, done.output
    directory = shipped_bundles()["smollm2"]
    config = detector_config(load_bundle(directory))
    assert config.persona_space is not None and len(config.persona_space.roles) == 275


# A build, from the first command to the last


def catalogue_folder(folder: Path) -> Path:
    words = small_catalogue()
    folder.mkdir()
    for name, content in {
        "roles": words.roles,
        "questions": [{"topic": q.topic, "text": q.text} for q in words.questions],
        "styles": [{"style": s.style, "text": s.text} for s in words.styles],
        "defaults": [text for text in words.defaults if text],
    }.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def test_a_build_is_stopped_by_ctrl_c_goes_on_and_is_calibrated_and_checked(model_folder: Path, tmp_path: Path) -> None:
    out, work = tmp_path / "axis", tmp_path / "axis.work"
    build: list[object] = [
        *("axis", "build", "--model", model_folder, "--out", out, "--catalogue", catalogue_folder(tmp_path / "words")),
        *("--tokens", 8, "--max-rollouts", 5, "--batch-size", 2, "--device", "cpu"),
    ]
    process = start(*build)
    wait_for(lambda: len(list(work.glob("*.safetensors"))) >= 3, process)
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 130, said
    assert "run the same command again" in said and "Traceback" not in said
    assert not out.exists() and not list(work.glob("*.partial"))
    left = {path.name: path.stat().st_mtime_ns for path in work.glob("*.safetensors")}

    run = CliRunner()
    done = run.invoke(app, [str(argument) for argument in build])
    assert done.exit_code == 0, done.output
    assert {name: (work / name).stat().st_mtime_ns for name in left} == left  # nothing was made twice
    assert load_bundle(out).info.counts["roles"] == 8

    done = run.invoke(app, ["axis", "check", str(out), "--model", str(model_folder), "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["verdict"] == "ok"

    calibrate = ["axis", "calibrate", "--bundle", str(out), "--out", str(out), "--model", str(model_folder)]
    calibrate += ["--tokens", "4", "--samples", "1"]
    done = run.invoke(app, calibrate)
    assert done.exit_code == 0, done.output
    calibrated = load_bundle(out)
    boundaries = detector_config(calibrated).boundaries
    assert (boundaries.budget, boundaries.certification, boundaries.conversations) == (0.01, "certified", 230)
    assert {"trait:anchored_reply", "trait:anchored_prompt"} <= set(calibrated.directions()[0])
    said_by_it = {path: path.stat().st_mtime_ns for path in out.glob("conversations-*/*.jsonl.gz")}
    assert len(said_by_it) == 2
    done = run.invoke(app, calibrate)  # from the kept conversations: the model is not asked again
    assert done.exit_code == 0 and load_bundle(out).id == calibrated.id
    assert {path: path.stat().st_mtime_ns for path in said_by_it} == said_by_it

    done = run.invoke(app, ["axis", "show", str(out), "--verify"])
    assert done.exit_code == 0, done.output


# Calibrating a deployment, and backtests


def logged(path: Path, conversations: int, *, users: int = 10**6, model: str = "bank") -> Path:
    """Conversations as an operator has them; every reply is another one."""
    lines = [
        {
            "id": f"c{i}",
            "model": model,
            "user_id": f"u{i % users}",
            "messages": [
                {"role": role, "content": f"{role} says number {i * 7 + turn}, and then some."}
                for turn in range(2 + i % 3)
                for role in ("user", "assistant")
            ],
        }
        for i in range(conversations)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_a_deployment_is_calibrated_audited_and_backtested(
    model_folder: Path, calibrated: Path, tmp_path: Path
) -> None:
    own, log = tmp_path / "own.json", logged(tmp_path / "log.jsonl", 40)
    with_model = ("--bundle", calibrated, "--model", model_folder)
    done = here("calibrate", log, "--out", own, "--budget", "0.05", *with_model, "--json")
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert said["deployments"]["bank"]["certification"] == "certified"
    assert said["deployments"]["bank"]["calibration_conversations"] == 30
    config = DetectorConfig.from_json(own.read_bytes())
    assert config.config_id == said["config_id"]

    # The audit judges by it, and its folder is what a backtest reads.
    audit = tmp_path / "audit"
    done = here("audit", log, "--out", audit, "--calibration", own, *with_model)
    assert done.returncode == 0, done.stderr
    verdicts = tmp_path / "verdicts.csv"
    verdicts.write_text("conversation_id,label\n" + "".join(f"c{i},healthy\n" for i in range(40)))
    done = here(
        *("backtest", audit, "--config", own, "--config", calibrated, "--verdicts", verdicts, "--json", *with_model)
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    mine, theirs = (report["configs"][str(name)] for name in (own, calibrated))
    assert mine["config_id"] == config.config_id
    assert mine["responses"] == sum(2 + i % 3 for i in range(40))
    assert mine["scores"]["healthy"] == 40 and mine["scores"]["false_alarms"] <= 4
    assert theirs["verdicts"] == {"unjudged": 40}  # the bundle's own calibration does not know this deployment
    by_logs = here(*("backtest", log, "--logs", "--work", tmp_path / "work", "--config", own, "--json", *with_model))
    assert json.loads(by_logs.stdout)["configs"][str(own)]["verdicts"] == mine["verdicts"]
    for command in (["calibrate", log, "--out", tmp_path / "again.json", "--budget", "0.05"], ["backtest", audit]):
        told = here(*command, *(["--config", own] if "backtest" in command else []), *with_model)
        assert (told.returncode == 0 and "bank" in told.stdout) or "conversations" in told.stdout, told.stderr


def test_too_few_conversations_exit_1_and_write_nothing(model_folder: Path, calibrated: Path, tmp_path: Path) -> None:
    log = logged(tmp_path / "log.jsonl", 60, users=12)
    with_model = ("--bundle", calibrated, "--model", model_folder, "--work", tmp_path / "work")
    done = here("calibrate", log, "--out", tmp_path / "own.json", *with_model)
    assert done.returncode == 1
    assert "REFUSED" in done.stdout and "at least 132" in done.stdout and "48 conversations left out" in done.stdout
    assert not (tmp_path / "own.json").exists()
    done = here("calibrate", log, "--out", tmp_path / "own.json", "--uncertified", *with_model)
    assert done.returncode == 0 and "UNCERTIFIED" in done.stdout
    assert DetectorConfig.from_json((tmp_path / "own.json").read_bytes()).boundaries_of("bank").certification == (
        "uncertified"
    )


def test_a_backtest_or_worker_with_a_calibration_that_is_not_there(tmp_path: Path) -> None:
    refused(anchorwatch("backtest", tmp_path, "--config", tmp_path / "none.json"), "none.json", "anchorwatch calibrate")
    refused(anchorwatch("worker", "--calibration", tmp_path / "none.json"), "none.json", "anchorwatch calibrate")


# The demo and the worker


def test_the_demo_prints_one_json_object_last(model_folder: Path, calibrated: Path) -> None:
    done = anchorwatch(
        *("demo", "--model", model_folder, "--bundle", calibrated, "--conversations", 2, "--tokens", 4, "--json")
    )
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)  # nothing else is on standard output
    assert said["conversations"] == 2
    assert "responses generated" in done.stderr and "\x1b" not in done.stderr


def test_ctrl_c_ends_the_demo_in_the_middle(model_folder: Path, calibrated: Path, tmp_path: Path) -> None:
    process = start(
        *("demo", "--model", model_folder, "--bundle", calibrated, "--tokens", 300, "--data-dir", tmp_path / "data")
    )
    wait_for((tmp_path / "data" / "store.db").exists, process)
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=60)
    assert process.returncode == 130, said[1]
    assert "Traceback" not in said[1] and said[0] == ""


def responses(bundle: Path, conversations: int, turns: int) -> list[Projection]:
    """Conversations of which every second one sinks, turn by turn."""
    axis = load_bundle(bundle)
    readout, calibration = axis.info.readout, axis.info.calibration
    assert readout is not None and calibration is not None
    names, _ = axis.directions()
    name = max(readout.coordinates, key=lambda key: abs(readout.coordinates[key]))
    weight, baseline = readout.coordinates[name], calibration["baseline"]
    made = []
    for turn in range(turns):
        for number in range(conversations):
            z = -2.0 * turn if number % 2 else 0.0
            value = (baseline["mean"] + z * baseline["standard_deviation"]) / weight
            at = dict.fromkeys(names, 0.0) | {name: value}
            made.append(
                Projection(
                    id=f"c{number}#{turn}",
                    time=f"2026-01-01T00:{turn:02}:00Z",
                    source="/test",
                    conversation_id=f"c{number}",
                    turn=turn,
                    model=axis.info.model.name,
                    axis_id=axis.id,
                    layer=axis.layer,
                    deployment=axis.info.model.name,
                    projection=at["assistant_axis"],
                    coordinates=at,
                    prompt=at,
                    windows=Windows(lowest=at, last=at),
                    tokens=20,
                )
            )
    return made


def folded(events: list[Projection], bundle: Path) -> list[Finding]:
    states: dict[str, ConversationState] = {}
    findings: list[Finding] = []
    for event in events:
        done = step(states.get(event.conversation_id), event, detector_config(load_bundle(bundle)))
        states[event.conversation_id] = done.state
        findings += done.findings
    return findings


def test_the_worker_folds_what_a_publisher_wrote_and_leaves_on_sigterm(calibrated: Path, tmp_path: Path) -> None:
    events = responses(calibrated, 6, 8)
    log = EmbeddedLog(tmp_path / "log.db")
    with QueuePublisher(log) as publisher:
        assert all(publisher.publish(event) for event in events[:20])

    process = start("worker", "--bundle", calibrated, ANCHORWATCH_DATA_DIR=str(tmp_path))
    wait_for((tmp_path / "store.db").exists, process)
    store = SqliteStore(tmp_path / "store.db")
    wait_for(lambda: store.counts().get("folded") == 20, process)
    with QueuePublisher(log) as publisher:  # and goes on with what comes while it runs
        assert all(publisher.publish(event) for event in events[20:])
    wait_for(lambda: store.counts().get("folded") == len(events), process)
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=60)
    assert process.returncode == 0, said[1]
    assert "Traceback" not in said[1]

    expected = folded(events, calibrated)
    assert {finding.conversation_id for finding in expected} == {"c1", "c3", "c5"}
    assert [one.finding for one in store.pending(1000)] == expected
    position = store.position(PROJECTIONS, 0)
    assert position is not None and position.offset == len(events)
    log.close()
    store.close()


def test_the_worker_needs_no_torch(calibrated: Path, tmp_path: Path) -> None:
    """Where torch can't be imported at all, the worker still starts, folds and stops."""
    (tmp_path / "torch.py").write_text("raise ImportError('there is no torch here')")
    settings: dict[str, Any] = environment(ANCHORWATCH_DATA_DIR=str(tmp_path))
    settings["PYTHONPATH"] = f"{tmp_path}:{settings['PYTHONPATH']}"
    process = subprocess.Popen(
        [sys.executable, "-m", "monitor", "worker", "--bundle", str(calibrated)],
        env=settings,
        stderr=subprocess.PIPE,
        text=True,
    )
    wait_for((tmp_path / "store.db").exists, process)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 0

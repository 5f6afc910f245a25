"""Promises of the rules in force: a file that is written is taken over, one that is wrong changes nothing."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from msgspec.structs import replace
from receiver import Receiver
from service import CONFIG, message, projection
from structlog.testing import capture_logs
from tiny import environment

from alerts.config import AlertsConfig, load
from alerts.dispatch import open_channels, reloading
from alerts.rules import Rules
from monitor import telemetry
from monitor.actions import Paging, append_action
from monitor.database import sqlite_url
from monitor.errors import ConfigurationError
from monitor.store.sqlite import SqliteStore
from monitor.stream.log import PROJECTIONS, EmbeddedLog
from monitor.worker import Worker

GOOD = """
receivers:
  - name: ops
    webhook_configs:
      - {{url: "{url}", allow_private: true}}
route: {{receiver: ops, group_by: ["..."], group_wait: 0s, group_interval: 1s}}
"""


def loaded() -> float:
    return telemetry.ALERTS_CONFIG_LOADED._value.get()


def write(path: Path, text: str) -> None:
    """As an editor does: a new file in place of the old one."""
    new = path.with_suffix(".new")
    new.write_text(text)
    new.replace(path)


def test_what_is_written_is_taken_over_once(tmp_path: Path) -> None:
    path = tmp_path / "alerts.yaml"
    write(path, GOOD.format(url="http://127.0.0.1:1"))
    rules = Rules(path)
    assert rules.changed() is None and loaded() == 1
    write(path, GOOD.format(url="http://127.0.0.1:22"))
    config = rules.changed()
    assert config is not None and "22" in str(config.receivers[0].integrations[0])
    assert rules.changed() is None
    assert rules.changed(anyway=True) == config


@pytest.mark.parametrize("wrong", ["route: [", "route: {receiver: nobody}", "", "receivers: &a [*a]"])
def test_what_is_wrong_changes_nothing_and_is_said_once(
    tmp_path: Path, wrong: str, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "alerts.yaml"
    write(path, GOOD.format(url="http://127.0.0.1:1"))
    rules = Rules(path)
    before = rules.config
    write(path, wrong)
    assert rules.changed() is None and rules.config is before and loaded() == 0
    assert rules.changed() is None
    said = capfd.readouterr()
    assert (said.out + said.err).count("those before stay in force") == 1
    path.unlink()
    assert rules.changed() is None and rules.config is before
    write(path, GOOD.format(url="http://127.0.0.1:3"))
    assert rules.changed() is not None
    rules.took()
    assert loaded() == 1


@pytest.mark.parametrize("error", [PermissionError(13, "Permission denied"), ValueError("embedded null byte")])
def test_what_the_reader_did_not_foresee_changes_nothing_either(tmp_path: Path, error: Exception) -> None:
    path = tmp_path / "alerts.yaml"
    write(path, GOOD.format(url="http://127.0.0.1:1"))
    broken: list[Exception] = []

    def read(path: Path) -> AlertsConfig:
        for one in broken:
            raise one
        return load(path)

    rules = Rules(path, load=read)
    before = rules.config
    broken.append(error)
    with capture_logs() as logs:
        assert rules.changed(anyway=True) is None and rules.config is before and loaded() == 0
    assert [(one["log_level"], "those before stay in force" in one["event"]) for one in logs] == [("error", True)]
    broken.clear()
    assert rules.changed(anyway=True) is not None


def test_a_file_that_is_wrong_at_the_start_is_refused(tmp_path: Path) -> None:
    (tmp_path / "alerts.yaml").write_text("route: {receiver: nobody}")
    with pytest.raises(ConfigurationError):
        Rules(tmp_path / "alerts.yaml")


def test_rules_whose_channels_can_not_be_opened_change_nothing(tmp_path: Path) -> None:
    path = tmp_path / "alerts.yaml"
    write(path, GOOD.format(url="http://127.0.0.1:1"))
    rules = Rules(path)

    class Never:
        def is_set(self) -> bool:
            return False

        def clear(self) -> None:
            pass

    reload = reloading(rules, Never())  # type: ignore[arg-type]
    (tmp_path / "folder").mkdir()
    write(path, f"receivers: [{{name: a, log_configs: [{{path: {tmp_path / 'folder'}}}]}}]\nroute: {{receiver: a}}")
    assert reload() is None and loaded() == 0
    write(path, GOOD.format(url="http://127.0.0.1:4"))
    found = reload()
    assert found is not None and set(found[1]) == {"ops/webhook[0]"} and loaded() == 1
    for channel in (*found[1].values(), *open_channels(found[0]).values()):
        channel.close()


def until(done: Callable[[], bool], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_running_dispatcher_goes_over_to_other_rules_and_keeps_those_before_when_they_are_wrong(
    tmp_path: Path, receiver: Receiver
) -> None:
    log, store = EmbeddedLog(tmp_path / "log.db"), SqliteStore(tmp_path / "store.db")
    other, path, output = Receiver(), tmp_path / "alerts.yaml", tmp_path / "output"
    worker = Worker(log, store, CONFIG)
    append_action(log, "paging", "mode", Paging("live"), by="ann")
    write(path, GOOD.format(url=receiver.url))

    def drift(name: str) -> None:
        now = datetime.now(UTC) - timedelta(seconds=1)
        event = replace(projection(name, 0, -9.0), time=now.isoformat().replace("+00:00", "Z"))
        log.append(PROJECTIONS, [message(event)])
        while worker.run_once() or worker.run_once():
            pass

    settings = {
        "ANCHORWATCH_LOG_URL": sqlite_url(tmp_path / "log.db"),
        "ANCHORWATCH_STORE_URL": sqlite_url(tmp_path / "store.db"),
        "ANCHORWATCH_ALERTS_FILE": str(path),
    }
    with output.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "monitor", "dispatch"],
            env={**environment(), **settings},
            stdout=file,
            stderr=subprocess.STDOUT,
        )
    try:
        drift("a")
        receiver.wait(1, 60.0)
        write(path, "route: {receiver: nobody}")
        until(lambda: "those before stay in force" in output.read_text())
        drift("b")
        receiver.wait(2, 60.0)
        write(path, GOOD.format(url=other.url))
        os.kill(process.pid, signal.SIGHUP)
        until(lambda: "have been read again" in output.read_text())
        drift("c")
        (told,) = other.wait(1, 60.0)
        assert told.json["commonLabels"]["conversation_id"] == "c", "a and b have been told"
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
        assert len(receiver.received) == 2 and len(other.received) == 1
    finally:
        process.kill()
        process.wait()
        other.close()
        log.close()
        store.close()

"""Promises of the log integration: whole lines that last, one for each notification, and a repeat is the same line."""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
from pathlib import Path

import pytest
from notices import HOSTILE, RULES, alert, hostile, notification, over

from alerts.channel import Channel
from alerts.channels import open_channel
from alerts.config import LogConfig
from alerts.jsonl import line
from monitor.errors import ChannelUnavailable, ConfigurationError


def opened(path: Path | None) -> Channel:
    return open_channel(LogConfig(receiver="ops", path=path), RULES)


def test_one_object_a_line_with_all_that_a_program_wants(tmp_path: Path) -> None:
    path = tmp_path / "told.jsonl"
    channel = opened(path)
    assert channel.name == "ops/log[0]" and channel.send_resolved and channel.refresh is None
    channel.deliver(notification(alert(), over("e2"), truncated=7, note="2 held back."))
    (told,) = (json.loads(row) for row in path.read_bytes().splitlines())
    assert told["id"] == "n-0001" and told["status"] == "firing" and told["reason"] == "first"
    assert told["truncated"] == 7 and told["note"] == "2 held back."
    assert [(one["id"], one["status"], one["finding_ids"]) for one in told["alerts"]] == [
        ("e1", "firing", ["f1", "f2"]),
        ("e2", "resolved", ["f1", "f2"]),
    ]
    first = told["alerts"][0]
    assert first["labels"]["conversation_id"] == "c-17" and first["labels"]["severity"] == "critical"
    assert first["annotations"]["session_url"] == "https://watch.example/sessions/c-17"
    assert first["value"] == 4.23 and first["budget"] == 0.01


def test_a_repeat_is_the_same_line_and_a_torn_one_spoils_none(tmp_path: Path) -> None:
    path = tmp_path / "told.jsonl"
    path.write_bytes(b'{"torn')
    channel = opened(path)
    channel.deliver(notification(alert()))
    channel.deliver(notification(alert()))
    torn, *lines = path.read_bytes().splitlines(keepends=True)
    assert torn == b'{"torn\n' and lines == [line(notification(alert()), RULES)] * 2


def test_a_file_that_is_rotated_away_begins_anew_for_this_user_alone(tmp_path: Path) -> None:
    path = tmp_path / "told.jsonl"
    channel = opened(path)
    channel.deliver(notification(alert()))
    path.rename(tmp_path / "old.jsonl")
    channel.deliver(notification(alert()))
    assert path.read_bytes() == (tmp_path / "old.jsonl").read_bytes()
    assert path.stat().st_mode & 0o777 == 0o600


def test_a_full_disk_leaves_no_half_line(tmp_path: Path) -> None:
    path = tmp_path / "told.jsonl"
    channel = opened(path)
    channel.deliver(notification(alert()))
    whole = path.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    previous = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(whole) + 100, hard))
    try:
        with pytest.raises(ChannelUnavailable) as caught:
            channel.deliver(notification(alert()))
        assert caught.value.retry and caught.value.cure
        assert path.read_bytes() == whole
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, previous)
    channel.deliver(notification(alert()))
    assert path.read_bytes() == whole * 2


def test_a_file_that_cannot_be_is_told_at_the_start_with_its_cure(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="No such file") as caught:
        opened(tmp_path / "no" / "told.jsonl")
    assert caught.value.cure


def test_a_folder_that_goes_later_is_waited_for(tmp_path: Path) -> None:
    folder = tmp_path / "logs"
    folder.mkdir()
    channel = opened(folder / "told.jsonl")
    (folder / "told.jsonl").unlink()
    folder.rmdir()
    with pytest.raises(ChannelUnavailable, match="No such file"):
        channel.deliver(notification(alert()))
    folder.mkdir()
    channel.deliver(notification(alert()))
    assert (folder / "told.jsonl").read_bytes().count(b"\n") == 1


def test_standard_output_that_nobody_reads_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as closed:
        monkeypatch.setattr(sys, "stdout", closed)
        with pytest.raises(ConfigurationError, match="nobody reads"):
            opened(None).deliver(notification(alert()))


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_name_is_told_exactly_and_stays_on_its_line(name: str) -> None:
    data = line(notification(hostile(name)), RULES)
    assert data.count(b"\n") == 1 and len(data.decode().splitlines()) == 1
    assert json.loads(data)["alerts"][0]["labels"]["conversation_id"] == name
    assert not {0x1B, 0x07, 0x7F} & set(data) and "\x9b" not in data.decode() and "\u202e" not in data.decode()

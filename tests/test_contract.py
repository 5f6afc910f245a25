"""What a release has written, every later one reads: events on the wire, states in a store, control records."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
import service
from service import CONFIG, projection

from monitor.batch import Poison, decode
from monitor.control import calibration_message
from monitor.detect.baseline import DetectorConfig
from monitor.detect.conversation import decode_state, encode_state, step
from monitor.errors import EventError
from monitor.events import Finding, Projection, decode_finding, decode_projection, encode
from monitor.stream.log import Record

GOLDEN = Path(__file__).parent / "data" / "events-1.0.jsonl"
STATE = bytes.fromhex(
    "dc001c00a6617869732d31a473686f7000cbc008000000000000cb0000000000000000cb000000000000000005cb41da556e"
    "65800000cb41da556e658000003fd9304b7937656b48574d44726641573157634248383575517443647558335f744e633245"
    "6b4839716e383559615a4d63556dcb0000000000000000cb8000000000000000a6666f6c646564c00600000000000006cb41"
    "da556e40000000c2cbc008000000000000cb3ffe000000000000"
)


def events() -> list[Projection | Finding]:
    lines = GOLDEN.read_bytes().splitlines()
    return [decode_finding(line) if b'"episode_id"' in line else decode_projection(line) for line in lines]


def test_events_of_every_release_are_still_read() -> None:
    first, second, *findings = events()
    assert first == projection("c-1", 0, 0.25)
    assert isinstance(second, Projection)
    assert (second.conversation_id, second.turn, second.held) == ("Gespräch-7", 31, 0.5)
    assert second.attributes == {"identity": "weak"}
    assert [finding.kind for finding in findings if isinstance(finding, Finding)] == ["low_start", "recovered"]


def test_and_say_the_same_when_they_are_written_again() -> None:
    for line, event in zip(GOLDEN.read_bytes().splitlines(), events(), strict=True):
        written, read = msgspec.json.decode(encode(event)), msgspec.json.decode(line)
        assert {name: written[name] for name in read} == read  # a newer release may add fields, and change none


def test_a_state_of_every_release_is_still_read_and_goes_on_alike() -> None:
    state = None
    for turn in range(6):
        state = step(state, projection("c-2", turn, -3.0 if turn < 3 else 0.0), CONFIG).state
    assert decode_state(STATE) == state
    assert state is not None
    assert encode_state(state) == STATE  # a change of the form needs a new schema version of the stores


def test_a_newer_minor_version_is_read_and_what_is_new_in_it_passed_over() -> None:
    event = msgspec.json.decode(encode(projection("c", 3)))
    event |= {"version": "1.9", "entropy": {"mean": [1, 2]}}
    assert decode_projection(msgspec.json.encode(event)).turn == 3


@pytest.mark.parametrize("version", ["2.0", "0.9", "", "one"])
def test_another_major_version_is_poison(version: str) -> None:
    event = msgspec.json.decode(encode(projection("c", 3))) | {"version": version}
    with pytest.raises(EventError, match="version"):
        decode_projection(msgspec.json.encode(event))


def test_a_control_record_puts_a_calibration_into_force() -> None:
    message = calibration_message(CONFIG, 3)
    assert message.partition == 3
    record = Record("t", 3, 7, message.key, message.value, message.headers)
    read = decode(record)
    assert isinstance(read, DetectorConfig)
    assert read.config_id == CONFIG.config_id


@pytest.mark.parametrize(
    ("headers", "value"),
    [((("anchorwatch-control", b"of-the-future"),), b"{}"), ((("anchorwatch-control", b"calibration"),), b"{}")],
)
def test_a_control_record_that_can_not_be_read_is_poison(headers: tuple[tuple[str, bytes], ...], value: bytes) -> None:
    read = decode(Record("t", 0, 0, "", value, headers))
    assert isinstance(read, Poison)
    assert read.reason == "bad_control"


def test_a_record_without_a_key_and_without_the_header_is_no_control_record() -> None:
    read = decode(Record("t", 0, 0, "", service.message(projection("c", 0)).value))
    assert isinstance(read, Poison)
    assert read.reason == "wrong_key"

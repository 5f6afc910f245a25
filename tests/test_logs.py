"""Promises of the log readers: every format reads the same, no bad record costs another, and memory stays flat."""

from __future__ import annotations

import gzip
import json
import math
import os
import subprocess
import sys
import tracemalloc
import zlib
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from collectors.framing import Piece, layout, lines, values
from collectors.logs import Logged, log_files, read_log
from monitor.errors import ConfigurationError
from monitor.origin import Skipped

ROOT = Path(__file__).parent.parent
LIMIT = 1 << 20
CANARY = "heliotrope"
Record = dict[str, Any]
Messages = list[dict[str, str]]

TALK: Messages = [
    {"role": "system", "content": "You are brief."},
    {"role": "user", "content": 'What is "{[" for?'},
    {"role": "assistant", "content": "Opening things.\nAll of them \\ some."},
    {"role": "user", "content": "Þökk 🦔"},
    {"role": "assistant", "content": "Ekkert að þakka."},
]


def read(path: Path, **options: Any) -> list[Logged | Skipped]:
    return list(read_log(path, **options))


def talks(path: Path, **options: Any) -> list[Messages]:
    """The messages of every conversation; nothing may be skipped."""
    found = read(path, **options)
    assert not [item for item in found if isinstance(item, Skipped)]
    return [list(item.messages) for item in found if isinstance(item, Logged)]


def one(tmp_path: Path, record: object) -> Logged:
    """The record, read from a file of its own."""
    (item,) = read_one(tmp_path, record)
    assert isinstance(item, Logged), item
    return item


def read_one(tmp_path: Path, record: object) -> list[Logged | Skipped]:
    path = tmp_path / "one.jsonl"
    path.write_text(json.dumps(record) + "\n")
    return read(path)


def said(item: Logged) -> list[tuple[str, str]]:
    return [(message["role"], message["content"]) for message in item.messages]


# How people keep conversations: each takes messages and an id, and gives a record


def openai(messages: Messages, name: str) -> Record:
    return {"id": name, "messages": messages}


def parts(messages: Messages, name: str) -> Record:
    return {"id": name, "messages": [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in messages]}


def batch(messages: Messages, name: str) -> Record:
    body = {"model": "gpt-4o", "messages": messages}
    return {"custom_id": name, "method": "POST", "url": "/v1/chat/completions", "body": body}


def logged_call(messages: Messages, name: str) -> Record:
    choice = {"index": 0, "message": {**messages[-1], "refusal": None}, "finish_reason": "stop"}
    response = {"status_code": 200, "body": {"id": "chatcmpl-1", "created": 1724858089, "choices": [choice]}}
    request = {"model": "gpt-4o", "messages": messages[:-1]}
    return {"custom_id": name, "request": {"body": request}, "response": response}


def sharegpt(messages: Messages, name: str) -> Record:
    tag = {"user": "human", "assistant": "gpt", "system": "system"}
    return {"id": name, "conversations": [{"from": tag[m["role"]], "value": m["content"]} for m in messages]}


def lmsys(messages: Messages, name: str) -> Record:
    talk = [{"content": m["content"], "role": m["role"]} for m in messages]
    moderation = [{"categories": {"hate": False}, "category_scores": {"hate": 1e-9}, "flagged": False}] * len(talk)
    turns = sum(m["role"] == "assistant" for m in messages)
    return {
        **{"conversation_id": name, "model": "vicuna-13b", "conversation": talk, "turn": turns, "language": "English"},
        **{"openai_moderation": moderation, "redacted": False},
    }


def wildchat(messages: Messages, name: str) -> Record:
    talk = [
        {**m, "country": "Iceland", "hashed_ip": "22fd87ba", "language": "English", "turn_identifier": 100 + number}
        for number, m in enumerate(messages)
    ]
    return {
        **{"conversation_hash": name, "model": "gpt-4-0314", "timestamp": "2023-04-09T00:02:53Z"},
        **{"conversation": talk, "turn": 1, "language": "English", "toxic": False, "redacted": False},
    }


def plain(messages: Messages, name: str) -> Record:
    return {"id": name, "conversation": messages}


SHAPES = [openai, parts, batch, logged_call, sharegpt, lmsys, wildchat, plain]


# What they keep them in: each takes a path and records


def as_lines(path: Path, records: list[Record]) -> None:
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), "utf-8")


def as_array(path: Path, records: list[Record]) -> None:
    path.write_text(json.dumps(records))


def as_indented(path: Path, records: list[Record]) -> None:
    path.write_text(json.dumps(records, indent=2, ensure_ascii=False), "utf-8")


def as_stream_of_objects(path: Path, records: list[Record]) -> None:
    path.write_text("\n".join(json.dumps(record, indent=4) for record in records))


def as_parquet(path: Path, records: list[Record]) -> None:
    pq.write_table(pa.Table.from_pylist(records), path, row_group_size=2)


def as_arrow_stream(path: Path, records: list[Record]) -> None:
    table = pa.Table.from_pylist(records)
    with pa.ipc.new_stream(path, table.schema) as writer:
        writer.write_table(table, max_chunksize=2)


def as_arrow_file(path: Path, records: list[Record]) -> None:
    table = pa.Table.from_pylist(records)
    with pa.ipc.new_file(path, table.schema) as writer:
        writer.write_table(table, max_chunksize=2)


TEXTS = [as_lines, as_array, as_indented, as_stream_of_objects]
TABLES = [as_parquet, as_arrow_stream, as_arrow_file]
PACKINGS: dict[str, Callable[[bytes], bytes]] = {
    "plain": bytes,
    "gzip": gzip.compress,
    "zstd": zstandard.compress,
    "zstd without its length": lambda data: zstandard.ZstdCompressor(write_content_size=False).compress(data),
    "members": lambda data: gzip.compress(data[:40]) + gzip.compress(data[40:]),
    "frames": lambda data: (
        b"\x50\x2a\x4d\x18\x03\x00\x00\x00abc" + zstandard.compress(data[:41]) + zstandard.compress(data[41:])
    ),
}


# Every format reads the same

written = st.text(min_size=1, max_size=60).filter(str.strip)
conversations = st.builds(
    lambda system, turns: [
        *({"role": "system", "content": text} for text in system),
        *(m for u, a in turns for m in ({"role": "user", "content": u}, {"role": "assistant", "content": a})),
    ],
    st.lists(written, max_size=1),
    st.lists(st.tuples(written, written), min_size=1, max_size=5),
)


@given(
    st.lists(conversations, min_size=1, max_size=4),
    st.sampled_from(SHAPES),
    st.sampled_from([*TEXTS, *TABLES]),
    st.sampled_from(list(PACKINGS)),
)
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_what_was_written_in_any_format_reads_back(
    tmp_path: Path,
    written: list[Messages],
    shape: Callable[[Messages, str], Record],
    write: Callable[[Path, list[Record]], None],
    packing: str,
) -> None:
    path = tmp_path / "log"
    write(path, [shape(messages, f"c{number}") for number, messages in enumerate(written)])
    if write in TEXTS:
        path.write_bytes(PACKINGS[packing](path.read_bytes()))
    found = read(path)
    assert [item.messages for item in found if isinstance(item, Logged)] == [tuple(m) for m in written], found
    origins = [item.origin for item in found if isinstance(item, Logged)]
    assert [origin.conversation_id for origin in origins] == [f"c{number}" for number in range(len(written))]
    assert [origin.record for origin in origins] == list(range(1, len(written) + 1))
    assert all(origin.notes == () and origin.source == str(path) for origin in origins)
    assert [o.turns for o in origins] == [sum(m["role"] == "assistant" for m in messages) for messages in written]
    assert read(path) == found


@pytest.mark.parametrize(
    ("shape", "model", "user", "time"),
    [
        (openai, None, None, None),
        (batch, "gpt-4o", None, None),
        (logged_call, "gpt-4o", None, "2024-08-28T15:14:49Z"),
        (sharegpt, None, None, None),
        (lmsys, "vicuna-13b", None, None),
        (wildchat, "gpt-4-0314", "22fd87ba", "2023-04-09T00:02:53Z"),
    ],
)
def test_who_and_when_is_read_where_the_format_says_so(
    tmp_path: Path, shape: Callable[[Messages, str], Record], model: str | None, user: str | None, time: str | None
) -> None:
    item = one(tmp_path, shape(TALK, "x"))
    assert (item.origin.deployment, item.origin.user, item.time) == (model or "logs", user, time)
    (told,) = read_log(tmp_path / "one.jsonl", deployment="support")
    assert isinstance(told, Logged)
    assert told.origin.deployment == "support"


@pytest.mark.parametrize("write", [as_array, as_indented], ids=["one line", "indented"])
def test_a_bare_list_of_messages_is_one_conversation(tmp_path: Path, write: Callable[[Path, Any], None]) -> None:
    write(tmp_path / "talk.json", TALK)
    (item,) = read(tmp_path / "talk.json")
    assert isinstance(item, Logged)
    assert list(item.messages) == TALK
    assert (item.origin.conversation_id, item.origin.record) == ("talk.json:1", 1)
    write(tmp_path / "talks.json", [TALK, TALK])
    assert talks(tmp_path / "talks.json") == [TALK, TALK]
    (tmp_path / "talks.jsonl").write_text(f"{json.dumps(TALK)}\n{json.dumps(TALK)}\n")
    assert talks(tmp_path / "talks.jsonl") == [TALK, TALK]
    assert [
        item.reason for item in read(tmp_path / "talk.json", max_record_bytes=250) if isinstance(item, Skipped)
    ] == ["longer than 250 bytes"]


def test_data_sets_keep_lists_in_other_ways_too(tmp_path: Path) -> None:
    columns = {"from": ["human", "gpt"], "value": ["a", "b"]}  # the "Sequence" feature of Hugging Face
    pq.write_table(pa.Table.from_pylist([{"conversations": columns}]), tmp_path / "a")
    assert talks(tmp_path / "a") == [[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]]
    pq.write_table(pa.Table.from_pylist([{"messages": json.dumps(TALK)}]), tmp_path / "b")
    assert talks(tmp_path / "b") == [TALK]
    uneven = {"from": ["human", "gpt"], "value": ["a"]}
    (item,) = read_one(tmp_path, {"conversations": uneven})
    assert isinstance(item, Skipped)
    assert "different lengths" in item.reason


def test_a_table_with_times_of_pandas_and_text_of_any_width(tmp_path: Path) -> None:
    talk = pa.array(
        [TALK], pa.list_(pa.struct({"role": pa.dictionary(pa.int32(), pa.string()), "content": pa.large_string()}))
    )
    nanoseconds = pa.array([1680998573123456789], pa.timestamp("ns", "UTC"))
    pq.write_table(pa.table({"timestamp": nanoseconds, "messages": talk, "image": [b"\0" * 9]}), tmp_path / "a")
    (item,) = read(tmp_path / "a")
    assert isinstance(item, Logged)
    assert (list(item.messages), item.time) == (TALK, "2023-04-09T00:02:53.123456Z")


@pytest.mark.parametrize(
    ("value", "time"),
    [
        ("2023-04-09T00:02:53Z", "2023-04-09T00:02:53Z"),
        ("2023-04-09 02:02:53.5+02:00", "2023-04-09T00:02:53.500000Z"),
        ("2023-04-09 00:02:53", "2023-04-09T00:02:53Z"),
        (1680998573, "2023-04-09T00:02:53Z"),
        (1680998573.25, "2023-04-09T00:02:53.250000Z"),
        (1680998573250, "2023-04-09T00:02:53.250000Z"),
        (1680998573250000, "2023-04-09T00:02:53.250000Z"),
    ],
)
def test_times_are_read_as_people_write_them(tmp_path: Path, value: object, time: str) -> None:
    item = one(tmp_path, {**openai(TALK, "x"), "created_at": value})
    assert (item.time, item.origin.notes) == (time, ())
    assert datetime.fromisoformat(time).tzinfo == UTC


@pytest.mark.parametrize("value", ["yesterday", "9999-12-31T23:59:59Z", 1e300, [1], True, 10**400])
def test_a_time_that_is_none_costs_no_conversation(tmp_path: Path, value: object) -> None:
    path = tmp_path / "one.jsonl"
    path.write_text(json.dumps({**openai(TALK, "x"), "created": value}))
    (item,) = read(path)
    if isinstance(item, Skipped):  # a number that no parser takes
        assert value == 10**400
    else:
        assert (item.time, item.origin.notes) == (None, ("its time can't be read",))


def test_infinite_times_of_a_table_are_refused(tmp_path: Path) -> None:
    pq.write_table(
        pa.Table.from_pylist([{"messages": TALK, "tstamp": t} for t in (math.inf, math.nan)]), tmp_path / "a"
    )
    assert [item.time for item in read(tmp_path / "a") if isinstance(item, Logged)] == [None, None]


def test_a_conversation_starts_with_its_first_message(tmp_path: Path) -> None:
    record = wildchat(TALK, "x") | {"timestamp": "2023-04-09T09:00:00Z"}  # there, the time of the last turn
    record["conversation"][2]["timestamp"] = "2023-04-09T08:00:00Z"
    record["conversation"][4]["timestamp"] = "2023-04-09T09:00:00Z"
    assert one(tmp_path, record).time == "2023-04-09T08:00:00Z"


# Names


def test_ids_are_kept_or_made_of_the_place(tmp_path: Path) -> None:
    record = {"messages": TALK}
    as_lines(tmp_path / "log", [{**record, "id": "same"}, {**record, "id": "same"}, record, {**record, "id": 7}])
    ids = [item.origin.conversation_id for item in read(tmp_path / "log") if isinstance(item, Logged)]
    assert ids == ["same", "same", "log:3", "7"]


@given(st.text(st.characters(exclude_categories=["Cs"]), min_size=257), st.text(max_size=1))
def test_long_ids_stay_apart_and_fit_an_event(long: str, more: str) -> None:
    from collectors.records import short_name

    assert len(short_name(long)) <= 256
    assert (short_name(long) == short_name(long + more)) == (more == "")


def test_a_file_name_that_is_no_text_can_be_told(tmp_path: Path) -> None:
    path = os.fsdecode(os.fsencode(tmp_path) + b"/\xff.jsonl")
    as_lines(Path(path), [{"messages": TALK}])
    (item,) = read_log(path)
    assert isinstance(item, Logged)
    assert item.origin.conversation_id == "\\xff.jsonl:1"
    item.origin.source.encode()


# What is done to a conversation so that it can be scored


def call(name: str = "look_up") -> Record:
    return {"id": "1", "type": "function", "function": {"name": name, "arguments": "{}"}}


U, A = "user", "assistant"


@pytest.mark.parametrize(
    ("messages", "expected", "notes"),
    [
        pytest.param(
            [(U, "a"), (U, "b"), (A, "c"), (A, "d")],
            [(U, "a\n\nb"), (A, "c\n\nd")],
            {"messages joined to the one before, of the same role: 2"},
            id="consecutive",
        ),
        pytest.param(
            [("developer", "x"), (U, "a"), ("system", "y"), (A, "b")],
            [("system", "x\n\ny"), (U, "a"), (A, "b")],
            {"system prompts joined at the start: 2"},
            id="systems",
        ),
        pytest.param(
            [(U, "a"), ("system", "y"), (A, "b")],
            [("system", "y"), (U, "a"), (A, "b")],
            {"system prompt moved to the start"},
            id="late system",
        ),
        pytest.param(
            [(U, "a"), (A, "  \n"), (U, "b"), (A, "c")],
            [(U, "a\n\nb"), (A, "c")],
            {"empty assistant messages left out", "messages joined to the one before, of the same role"},
            id="empty reply",
        ),
        pytest.param(
            [("system", ""), (U, "a"), (A, "b"), (U, ""), (A, "c")],
            [(U, "a"), (A, "b\n\nc")],
            {"empty messages left out: 2", "messages joined to the one before, of the same role"},
            id="empty user",
        ),
        pytest.param(
            [(U, "a"), (A, "b"), (U, "c"), (U, "d")],
            [(U, "a"), (A, "b")],
            {"messages joined to the one before, of the same role", "last user turn has no reply and is left out"},
            id="trailing user",
        ),
        pytest.param(
            [(A, "hi"), (U, "a"), (A, "b")],
            [(A, "hi"), (U, "a"), (A, "b")],
            {"begins with the assistant"},
            id="greeting",
        ),
        pytest.param([("Human", "a"), (" GPT ", "b")], [(U, "a"), (A, "b")], set(), id="spelling"),
        pytest.param(
            [(U, "a"), ("function_call", "{}"), ("observation", "4"), ("gpt", "b")],
            [(U, "a\n\n[tool result]\n4"), (A, "b")],
            {
                "assistant messages that only call tools left out",
                "tool results read as the user's",
                "messages joined to the one before, of the same role",
            },
            id="sharegpt tools",
        ),
    ],
)
def test_conversations_are_made_to_alternate_and_it_is_said(
    tmp_path: Path, messages: list[tuple[str, str]], expected: list[tuple[str, str]], notes: set[str]
) -> None:
    item = one(tmp_path, {"messages": [{"role": role, "content": text} for role, text in messages]})
    assert said(item) == expected
    assert set(item.origin.notes) == notes
    assert item.origin.turns == sum(role == A for role, _ in expected)


def test_tool_calls_are_no_speech_and_their_results_are_kept(tmp_path: Path) -> None:
    messages = [
        {"role": "user", "content": "weather?"},
        {"role": "assistant", "content": None, "tool_calls": [call(), call()]},
        {"role": "tool", "tool_call_id": "1", "content": "rain"},
        {"role": "tool", "tool_call_id": "2", "content": [{"type": "text", "text": "wind"}]},
        {"role": "assistant", "content": "Let me look again.", "tool_calls": [call()]},
        {"role": "function", "name": "look_up", "content": "sun"},
        {"role": "assistant", "content": "Mixed."},
    ]
    item = one(tmp_path, {"messages": messages})
    assert said(item) == [
        (U, "weather?\n\n[tool result]\nrain\n\n[tool result]\nwind"),
        (A, "Let me look again."),
        (U, "[tool result]\nsun"),
        (A, "Mixed."),
    ]
    assert "tool results read as the user's: 3" in item.origin.notes
    assert "assistant messages that only call tools left out" in item.origin.notes


def test_text_parts_are_kept_and_all_others_counted(tmp_path: Path) -> None:
    content = [
        {"type": "text", "text": "what is"},
        {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}},
        {"type": "input_audio", "input_audio": {"data": "AAAA", "format": "wav"}},
        {"type": "hologram"},
        "this",
    ]
    blocks = [
        {"type": "thinking", "thinking": "hm"},
        {"type": "text", "text": "a cat"},
        {"type": "tool_use", "name": "x"},
    ]
    results = [
        {"type": "tool_result", "content": [{"type": "text", "text": "4"}]},
        {"type": "tool_result", "content": "5"},
    ]
    item = one(
        tmp_path,
        [
            *({"role": "user", "content": content}, {"role": "assistant", "content": blocks}),
            *({"role": "user", "content": results}, {"role": "assistant", "content": {"type": "text", "text": "nine"}}),
        ],
    )
    assert said(item) == [
        (U, "what is\n\nthis"),
        (A, "a cat"),
        (U, "[tool result]\n4\n\n[tool result]\n5"),
        (A, "nine"),
    ]
    assert set(item.origin.notes) == {
        "image parts left out",
        "audio parts left out",
        "thinking parts left out",
        "parts of an unknown type left out",
        "tool results read as the user's: 2",
    }


def test_a_logged_call_in_its_variants(tmp_path: Path) -> None:
    ask, reply = TALK[:-1], TALK[-1]
    choices = [{"index": 0, "message": reply}, {"index": 1, "message": reply}]
    for record in (
        {"input": {"messages": ask}, "output": {"choices": choices[:1]}},
        {"request": {"messages": ask}, "response": {"choices": choices[:1]}},
        {"messages": ask, "choices": choices[:1]},
        {"body": {"messages": ask[1:], "system": ask[0]["content"]}, "response": {"body": {"choices": choices[:1]}}},
    ):
        item = one(tmp_path, record)
        assert (list(item.messages), item.origin.notes) == (TALK, ())
    item = one(tmp_path, {"messages": ask, "choices": choices})
    assert item.origin.notes == ("further choices of the response left out",)
    refused = {"choices": [{"message": {"role": "assistant", "content": None, "refusal": "I can't."}}]}
    assert said(one(tmp_path, {"messages": ask, "response": refused}))[-1] == (A, "I can't.")
    failed = one(tmp_path, {"custom_id": "x", "body": {"messages": ask}, "response": None, "error": {"code": "500"}})
    assert failed.origin.turns == 1
    assert failed.origin.notes == ("last user turn has no reply and is left out",)


def test_a_conversation_of_a_thousand_turns(tmp_path: Path) -> None:
    talk = [{"role": role, "content": f"{role} {turn}"} for turn in range(1000) for role in ("user", "assistant")]
    for write in (as_lines, as_indented, as_parquet):
        write(tmp_path / "log", [{"messages": talk}])
        assert talks(tmp_path / "log") == [talk]


# Bad records


def message(**fields: object) -> Record:
    return {"messages": [{"role": "user", "content": CANARY}, {"role": "assistant", "content": CANARY} | fields]}


BAD: dict[str, tuple[bytes, str]] = {
    "no JSON": (b"heliotrope, heliotrope", "not JSON"),
    "cut off": (b'{"messages": [{"role": "user", "content": "heliotr', "not JSON"),
    "two in a line": (json.dumps(message()).encode() * 2, "not JSON"),
    "latin-1": ('{"messages": "heliotrope é"}'.encode("latin-1"), "not UTF-8"),
    "lone surrogate": (b'{"messages": [{"role": "user", "content": "heliotrope \\ud800 x"}]}', "not JSON"),
    "lone surrogate, encoded": (b'{"messages": [{"content": "heliotrope \xed\xa0\x80"}]}', "not UTF-8"),
    "NaN": (b'{"score": NaN, "messages": []}', "NaN or infinity"),
    "infinity": (b'{"score": -Infinity, "messages": []}', "NaN or infinity"),
    "out of range": (b'{"score": 1e999, "messages": []}', "not JSON: Number out of range"),
    "deep": (b'{"messages": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested too deep"),
    "deep objects": (b'{"a":' * 50_000 + b"1" + b"}" * 50_000, "nested too deep"),
    "number": (b"17", "not an object"),
    "text": (b'"heliotrope"', "not an object"),
    "null": (b"null", "not an object"),
    "no conversation": (b'{"text": "heliotrope"}', "no conversation in it"),
    "response alone": (b'{"response": {"body": {"choices": []}}}', "without its request"),
    "no list": (b'{"messages": 5}', "not a list"),
    "text in it": (b'{"messages": "heliotrope"}', "is text, and not JSON"),
    "empty": (b'{"messages": []}', "empty conversation"),
    "empty list": (b"[]", "empty conversation"),
    "no message": (b'{"messages": ["heliotrope"]}', "message 1 is not an object"),
    "no role": (json.dumps(message(role=None)).encode(), "message 2 has no role"),
    "odd role": (json.dumps(message(role=["assistant"])).encode(), "message 2 has no role"),
    "unknown role": (json.dumps(message(role="heliotrope")).encode(), "message 2 has a role that is not known"),
    "number as content": (json.dumps(message(content=3)).encode(), "message 2 has content that is neither"),
    "parts of parts": (json.dumps(message(content=[["heliotrope"]])).encode(), "message 2 has content that is neither"),
    "part without text": (json.dumps(message(content=[{"type": "text"}])).encode(), "text without text"),
    "only users": (json.dumps(message(role="user")).encode(), "no assistant turn"),
    "only empty replies": (json.dumps(message(content=" ")).encode(), "no assistant turn"),
    "only calls": (json.dumps(message(content=None, tool_calls=[call()])).encode(), "no assistant turn"),
    "odd choices": (b'{"messages": [{"role": "user", "content": "x"}], "choices": 5}', "choices are not a list"),
    "odd reply": (b'{"messages": [{"role": "user", "content": "x"}], "choices": [{}]}', "the reply is not an object"),
    "too long": (json.dumps(message(content="x" * LIMIT)).encode(), f"longer than {LIMIT} bytes"),
}


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("packing", ["plain", "gzip", "zstd"])
def test_a_bad_line_costs_itself_and_nothing_else(tmp_path: Path, name: str, packing: str) -> None:
    bad, reason = BAD[name]
    good = json.dumps({"messages": TALK}).encode()
    path = tmp_path / "log"
    path.write_bytes(PACKINGS[packing](b"\n".join([good, b"", bad, b"  \r", good, bad, good])))
    found = read(path, max_record_bytes=LIMIT)
    assert [item.record if isinstance(item, Skipped) else item.origin.record for item in found] == [1, 3, 5, 6, 7]
    skipped = [item for item in found if isinstance(item, Skipped)]
    assert [item.record for item in skipped] == [3, 6]
    assert all(reason in item.reason and item.source == str(path) for item in skipped), skipped
    assert CANARY not in repr(skipped)


# Those that keep brackets and quotes in pairs, and are one value
@pytest.mark.parametrize("name", sorted(set(BAD) - {"no JSON", "cut off", "two in a line"}))
def test_a_bad_item_of_an_array_costs_itself_and_nothing_else(tmp_path: Path, name: str) -> None:
    bad, reason = BAD[name]
    good = json.dumps({"messages": TALK}, indent=1).encode()
    path = tmp_path / "log"
    path.write_bytes(b"[" + b" ,\n".join([good, bad, good, bad, good]) + b"]\n")
    found = read(path, max_record_bytes=LIMIT)
    assert [item.record for item in found if isinstance(item, Skipped)] == [2, 4]
    assert [list(item.messages) for item in found if isinstance(item, Logged)] == [TALK] * 3
    assert all(reason in item.reason for item in found if isinstance(item, Skipped))
    assert CANARY not in repr([item for item in found if isinstance(item, Skipped)])


def test_a_bad_row_costs_itself_and_nothing_else(tmp_path: Path) -> None:
    kind = pa.list_(pa.struct({"role": pa.string(), "content": pa.string()}))
    broken = pa.array(["a", "b", CANARY]).buffers()
    text = pa.StringArray.from_buffers(3, broken[1], pa.py_buffer(b"ab" + b"\xff" * len(CANARY)))
    inner = pa.StructArray.from_arrays([pa.array(["user", "assistant", "assistant"]), text], ["role", "content"])
    talk = pa.ListArray.from_arrays(pa.array([0, 2, 3], pa.int32()), inner)
    batches = [pa.record_batch({"messages": pa.array([None, [], TALK], kind)}), pa.record_batch({"messages": talk})]
    with pa.ipc.new_stream(tmp_path / "log", batches[0].schema) as writer:
        for batch in batches:
            writer.write_batch(batch)
    found = read(tmp_path / "log")
    reasons = {item.record: item.reason for item in found if isinstance(item, Skipped)}
    assert reasons.keys() == {1, 2, 5}
    assert "no conversation" in reasons[1]
    assert "empty" in reasons[2]
    assert "UTF-8" in reasons[5]
    assert [item.origin.record for item in found if isinstance(item, Logged)] == [3, 4]
    as_parquet(tmp_path / "log", [{"messages": [*TALK, {"role": "user", "content": "x" * LIMIT}]}, {"messages": TALK}])
    found = read(tmp_path / "log", max_record_bytes=LIMIT)
    assert [type(item) for item in found] == [Skipped, Logged]


def test_a_first_line_that_is_cut_off_makes_no_other_format(tmp_path: Path) -> None:
    good = json.dumps({"messages": TALK})
    for torn in ('{"messages": [{"role": "us', '{"messages": [{"role": "user"}', "{", "[", "x"):
        (tmp_path / "log").write_text(f"{torn}\n{good}\n{good}\n")
        found = read(tmp_path / "log")
        if torn != "[":  # else it is an array that never ends, and both its items are there
            assert [type(item) for item in found] == [Skipped, Logged, Logged], torn
        else:
            assert [type(item) for item in found] == [Logged, Logged, Skipped]
    (tmp_path / "log").write_text(f'{{"messages": [{{"role": "us\n}}\n{good}\n')
    assert [type(item) for item in read(tmp_path / "log")] == [Skipped, Skipped, Logged]


# Whole files


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "nothing in it"),
        (b" \n\r\n\t", "nothing in it"),
        (b"\xef\xbb\xbf", "nothing in it"),
        (gzip.compress(b""), "nothing in it"),
        (zstandard.compress(b""), "nothing in it"),
        (b"[]", "nothing in it"),
        (b"\x89PNG\r\n\x1a\n" + bytes(range(256)) * 40, "neither"),
        (b"\x7fELF\x02\x01\x01\0\0\0" * 999, "neither"),
        (json.dumps(TALK).encode("utf-16"), "neither"),
        (json.dumps(TALK).encode("utf-16-le"), "binary, or UTF-16"),
        (b"Dear all,\nheliotrope.\n" * 9999, "neither"),
        (b"\x1f\x8bheliotrope", "can't be read on"),
        (b"\x28\xb5\x2f\xfdheliotrope", "can't be read on"),
        (b"PAR1heliotrope", "Parquet"),
        (b"ARROW1heliotrope", "Arrow"),
        (b"\xff\xff\xff\xff\x10\0\0\0heliotrope", "can't be read on"),
    ],
    ids=range(16),
)
def test_a_file_that_holds_no_log_says_so_once(tmp_path: Path, content: bytes, reason: str) -> None:
    (tmp_path / "log").write_bytes(content)
    (item,) = read(tmp_path / "log")
    assert isinstance(item, Skipped)
    assert item.record == 0
    assert reason in item.reason
    assert CANARY not in item.reason


def test_noise_never_raises(tmp_path: Path) -> None:
    noise = np.random.default_rng(0)
    for magic in (b"", b"{", b"[", b"\x1f\x8b\x08", b"\x28\xb5\x2f\xfd", b"PAR1", b"ARROW1\0\0", b"\xff\xff\xff\xff"):
        for _ in range(20):
            (tmp_path / "log").write_bytes(magic + noise.bytes(2000))
            assert all(isinstance(item, Skipped) for item in read(tmp_path / "log"))


@pytest.mark.parametrize("write", TABLES)
def test_a_damaged_table_gives_what_can_be_read_and_says_that_it_ends(
    tmp_path: Path, write: Callable[[Path, list[Record]], None]
) -> None:
    path = tmp_path / "log"
    write(path, [openai(TALK, str(number)) for number in range(40)])
    whole = path.read_bytes()
    noise = np.random.default_rng(0)
    for place in noise.integers(10, len(whole) - 10, size=60):
        path.write_bytes(whole[:place] + noise.bytes(8) + whole[place + 8 :])
        read(path)  # whatever comes, nothing is raised
        path.write_bytes(whole[:place])
        found = read(path)
        *before, last = found
        assert isinstance(last, Skipped) or (write is as_arrow_stream and len(before) % 2), last
        assert all(isinstance(item, Logged) and list(item.messages) == TALK for item in before)


def test_a_table_of_something_else_says_so_once(tmp_path: Path) -> None:
    for write in TABLES:
        write(tmp_path / "log", [{"id": "x", "text": CANARY}] * 9)
        (item,) = read(tmp_path / "log")
        assert isinstance(item, Skipped)
        assert "none of its columns" in item.reason


def test_a_compressed_table_says_what_to_do(tmp_path: Path) -> None:
    as_parquet(tmp_path / "log", [openai(TALK, "x")])
    (tmp_path / "log").write_bytes(gzip.compress((tmp_path / "log").read_bytes()))
    (item,) = read(tmp_path / "log")
    assert isinstance(item, Skipped)
    assert "unpack it first" in item.reason


@pytest.mark.parametrize("packing", ["gzip", "zstd", "members", "frames"])
def test_of_a_truncated_archive_all_that_can_be_unpacked_is_read(tmp_path: Path, packing: str) -> None:
    noise = np.random.default_rng(0)
    records = [{"messages": [*TALK, {"role": "user", "content": noise.bytes(30).hex()}]} for _ in range(200)]
    text = b"".join(json.dumps(record).encode() + b"\n" for record in records)
    path, whole = tmp_path / "log", PACKINGS[packing](text)
    for cut in sorted({1, 2, 9, 60, len(whole) - 9, len(whole) - 1, *noise.integers(0, len(whole), size=40).tolist()}):
        path.write_bytes(whole[:cut])
        found = read(path)
        if packing == "gzip":  # what can be unpacked is known exactly
            complete = zlib.decompressobj(31).decompress(whole[:cut]).count(b"\n")
            assert sum(isinstance(item, Logged) for item in found) == complete
            assert len(found) == complete + 1
        *before, last = found
        assert all(isinstance(item, Logged) and item.origin.record == at for at, item in enumerate(before, start=1))
        assert isinstance(last, Skipped), (cut, len(whole))
        assert "can't be read on" in last.reason or cut < 4, (cut, last)  # as short as that it is no archive yet
        assert last.record == len(before) + 1 or (not before and last.record == 0)
    path.write_bytes(whole)
    assert len(talks(path)) == 200


def test_a_truncated_array_gives_its_items_and_says_that_it_ends(tmp_path: Path) -> None:
    text = json.dumps([openai(TALK, str(number)) for number in range(5)]).encode()
    for cut in range(1, len(text), 3):
        (tmp_path / "log").write_bytes(text[:cut])
        *before, last = read(tmp_path / "log")
        assert isinstance(last, Skipped)
        assert "cut off" in last.reason
        assert [list(item.messages) for item in before if isinstance(item, Logged)] == [TALK] * len(before)
        assert len(before) == text[:cut].count(b"]}")


def test_a_log_that_grows_is_read_up_to_its_size_at_the_start(tmp_path: Path) -> None:
    path, good = tmp_path / "log", json.dumps({"messages": TALK})
    path.write_text(f"{good}\n" * 3000)  # far more than is read ahead
    reading = read_log(path)
    found = [next(reading)]
    with path.open("a") as file:
        file.write(f"{good}\n" * 5000 + good[:50])
    found += reading
    assert [type(item) for item in found] == [Logged] * 3000
    path.write_text(f"{good}\n" * 3000 + good[:50])  # a line that is being written when the audit starts
    reading = read_log(path)
    found = [next(reading)]
    with path.open("a") as file:
        file.write(good[50:] + "\n")
    found += reading
    assert [type(item) for item in found] == [Logged] * 3000 + [Skipped]


def test_what_cannot_be_opened_is_told(tmp_path: Path) -> None:
    (item,) = read(tmp_path / "nothing")
    assert isinstance(item, Skipped)
    assert (item.record, "No such file" in item.reason) == (0, True)
    (item,) = read(tmp_path)
    assert isinstance(item, Skipped)
    assert "directory" in item.reason


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="needs POSIX permissions")
def test_files_and_folders_closed_to_us_are_told(tmp_path: Path) -> None:
    closed = tmp_path / "closed"
    closed.mkdir()
    as_lines(tmp_path / "secret", [openai(TALK, "x")])
    (tmp_path / "secret").chmod(0)
    closed.chmod(0)
    program = (
        "import os, sys\nfrom pathlib import Path\nfrom collectors.logs import log_files, read_log\n"
        "folder = Path(sys.argv[1])\nos.chdir(folder)\nos.geteuid() or os.seteuid(65534)\n"  # root may read everything
        "print([item.reason for item in read_log('secret')])\n"
        "try:\n    log_files(['closed', 'missing'])\nexcept Exception as error:\n    print(error.problem)\n"
    )
    tmp_path.chmod(0o755)
    output = run(program, str(tmp_path))
    closed.chmod(0o700)
    assert output.splitlines() == [
        '["can\'t be read on: Permission denied"]',
        "closed: Permission denied; missing: No such file or directory",
    ]


# Folders and paths


def test_folders_are_expanded_and_sorted(tmp_path: Path) -> None:
    for name in ("b/2.jsonl", "b/1.jsonl", "a.json", "c/d/e.parquet", ".git/config", "b/.hidden", "README.md"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    names = ["a.json", "b/1.jsonl", "b/2.jsonl", "c/d/e.parquet"]
    assert log_files([tmp_path]) == [str(tmp_path / name) for name in names]
    last = tmp_path / "c"
    assert log_files(["-", last, tmp_path / "b/2.jsonl", tmp_path, "-"]) == [
        "-",
        *(str(tmp_path / name) for name in ("c/d/e.parquet", "b/2.jsonl", "a.json", "b/1.jsonl")),
    ]


def test_what_is_missing_is_told_all_at_once(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigurationError) as error:
        log_files([tmp_path / "gone", tmp_path / "empty", "a\0b"])
    assert "gone: No such file" in error.value.problem
    assert "empty: no logs in this folder" in error.value.problem
    assert "null byte" in error.value.problem
    with pytest.raises(ConfigurationError, match="no logs are named"):
        log_files([])


def test_a_hugging_face_data_set_saved_to_disk(tmp_path: Path) -> None:
    """The layout of `save_to_disk`: Arrow streams beside metadata, and caches that repeat the data."""
    train = tmp_path / "talks/train"
    train.mkdir(parents=True)
    for shard in range(2):
        as_arrow_stream(train / f"data-0000{shard}-of-00002.arrow", [openai(TALK, f"{shard}.{n}") for n in range(3)])
    as_arrow_stream(train / "cache-0123456789abcdef.arrow", [openai(TALK, "again")])
    (train / "state.json").write_text('{"_data_files": [{"filename": "data-00000-of-00002.arrow"}]}')
    (train / "dataset_info.json").write_text('{"features": {}}')
    (tmp_path / "talks/dataset_dict.json").write_text('{"splits": ["train"]}')
    found = [item for file in log_files([tmp_path]) for item in read_log(file)]
    ids = [item.origin.conversation_id for item in found if isinstance(item, Logged)]
    assert ids == ["0.0", "0.1", "0.2", "1.0", "1.1", "1.2"] == ids[: len(found)]


def test_a_hugging_face_data_set_of_parquet_files(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    as_parquet(tmp_path / "data/train-00000-of-00001.parquet", [lmsys(TALK, "x")])
    (tmp_path / "README.md").write_text("---\ndataset_info: {}\n---\n")
    (tmp_path / ".gitattributes").write_text("*.parquet filter=lfs\n")
    (tmp_path / "notes.json").write_text('{"about": "these"}')
    found = [item for file in log_files([tmp_path]) for item in read_log(file)]
    assert [type(item) for item in found] == [Logged, Skipped]  # metadata of its own is not known, and told


# Standard input and pipes


def run(program: str, *arguments: str, **options: Any) -> str:
    result = subprocess.run(
        [sys.executable, "-c", program, *arguments],
        capture_output=True,
        check=False,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        **options,
    )
    assert result.returncode == 0, result.stderr.decode()
    return result.stdout.decode()


READ = (
    "import sys\nfrom collectors.logs import read_log\n"
    "for item in read_log(sys.argv[1]):\n"
    "    print(type(item).__name__, getattr(item, 'reason', '') or item.origin.conversation_id)\n"
)


@pytest.mark.parametrize("packing", PACKINGS)
def test_standard_input_is_read_also_compressed(packing: str) -> None:
    text = b"".join(json.dumps({"messages": TALK}).encode() + b"\n" for _ in range(3))
    assert run(READ, "-", input=PACKINGS[packing](text)) == "Logged -:1\nLogged -:2\nLogged -:3\n"


def test_tables_on_standard_input(tmp_path: Path) -> None:
    as_arrow_stream(tmp_path / "a", [openai(TALK, "x")])
    assert run(READ, "-", input=(tmp_path / "a").read_bytes()) == "Logged x\n"
    as_parquet(tmp_path / "a", [openai(TALK, "x")])
    assert "save it to a file first" in run(READ, "-", input=(tmp_path / "a").read_bytes())
    assert run(READ, "-", input=b"") == "Skipped nothing in it\n"


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_named_pipe_is_read_to_its_end(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import sys; open(sys.argv[1], 'wb').write(sys.stdin.buffer.read())",
            str(tmp_path / "pipe"),
        ],
        stdin=subprocess.PIPE,
    ) as writer:
        assert writer.stdin is not None
        writer.stdin.write(gzip.compress(json.dumps(openai(TALK, "x")).encode()))
        writer.stdin.close()
        assert log_files([tmp_path / "pipe"]) == [str(tmp_path / "pipe")]
        assert talks(tmp_path / "pipe") == [TALK]


# Where records begin and end

json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)


def cut(text: bytes, sizes: list[int]) -> list[bytes]:
    found = []
    for size in sizes:
        found, text = [*found, text[:size]], text[size:]
    return [*found, text]


@given(
    st.lists(json_values, max_size=6),
    st.lists(st.integers(1, 12), max_size=60),
    st.sampled_from([None, 0, 3]),
    st.booleans(),
)
@settings(max_examples=300, deadline=None)
def test_the_items_of_an_array_are_found_however_it_arrives(
    items: list[Any], sizes: list[int], indent: int | None, plain: bool
) -> None:
    text = json.dumps(items, indent=indent, ensure_ascii=plain).encode("utf-8", "surrogatepass")
    pieces = list(values(cut(text, sizes), LIMIT))
    assert [json.loads(piece.data) for piece in pieces] == items
    assert [(piece.record, piece.array, piece.reason) for piece in pieces] == [
        (number, 1, "") for number in range(1, len(items) + 1)
    ]
    alone = list(
        values(cut(b"\n".join(json.dumps({"x": item}, indent=indent).encode() for item in items), sizes), LIMIT)
    )
    assert [json.loads(piece.data) for piece in alone] == [{"x": item} for item in items]


@given(st.binary(max_size=200), st.lists(st.integers(1, 9), max_size=40), st.integers(1, 40))
@settings(max_examples=500, deadline=None)
def test_where_chunks_end_makes_no_difference(text: bytes, sizes: list[int], limit: int) -> None:
    for cutter in (lines, values):
        whole = list(cutter([text], limit))
        assert list(cutter(cut(text, sizes), limit)) == whole
        assert all(len(piece.data) <= limit for piece in whole)
    numbered = [
        (number, line) for number, line in enumerate(text.split(b"\n"), start=1) if line.strip() or len(line) > limit
    ]
    assert [(p.record, p.data) for p in lines([text], limit)] == [
        (number, line if len(line) <= limit else b"") for number, line in numbered
    ]
    layout(text)


@given(st.text(alphabet='{}[]",\\ \na', max_size=60), st.lists(st.integers(1, 5), max_size=30))
@settings(max_examples=500, deadline=None)
def test_no_run_of_brackets_is_lost_or_hangs(text: str, sizes: list[int]) -> None:
    whole = list(values([text.encode()], LIMIT))
    assert list(values(cut(text.encode(), sizes), LIMIT)) == whole
    assert all(isinstance(piece, Piece) and bool(piece.data) != bool(piece.reason) for piece in whole)


# Memory


@pytest.mark.parametrize("packing", ["plain", "gzip", "zstd"])
@pytest.mark.parametrize("array", [False, True])
def test_a_line_of_fifty_megabytes_is_passed_over_without_being_held(tmp_path: Path, packing: str, array: bool) -> None:
    good = json.dumps({"messages": TALK}).encode()
    text = b'{"messages": [{"role": "user", "content": "' + b"heliotrope " * (50 * 2**20 // 11) + b'"}]}'
    text = b"[" + b",\n".join([good, text, good]) + b"]" if array else b"\n".join([good, text, good])
    path = tmp_path / "log"
    path.write_bytes(PACKINGS[packing](text))
    del text
    read(path, max_record_bytes=LIMIT)  # imports are no part of it
    tracemalloc.start()
    found = read(path, max_record_bytes=LIMIT)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert [type(item) for item in found] == [Logged, Skipped, Logged]
    assert peak < (40 if packing == "zstd" else 6) * 2**20  # 1 KiB of zstd may unpack to 32 MiB at once


PEAK = (
    "import re, sys\nfrom pathlib import Path\nfrom collectors.logs import read_log\n"
    "count = sum(1 for _ in read_log(sys.argv[1]))\n"
    "print(count, re.search(r'VmHWM:\\s+(\\d+)', Path('/proc/self/status').read_text())[1])\n"
)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's account of a process's memory")
@pytest.mark.parametrize("kind", ["lines", "array", "gzip", "zstd", "as_parquet", "as_arrow_stream", "as_arrow_file"])
def test_ten_times_the_log_needs_no_more_memory(tmp_path: Path, kind: str) -> None:
    """Peak memory of a process of its own, at 4 and at 40 MB of text that does not compress."""
    noise = np.random.default_rng(0)
    path, peaks = tmp_path / "log", []
    for size in (400, 4000):
        records = [
            {"messages": [{"role": role, "content": noise.bytes(2500).hex()} for role in ("user", "assistant")]}
            for _ in range(size)
        ]
        if kind == "as_parquet":
            pq.write_table(pa.Table.from_pylist(records), path, row_group_size=400)
        elif kind.startswith("as_"):
            table = pa.Table.from_pylist(records)
            opened = pa.ipc.new_stream if kind == "as_arrow_stream" else pa.ipc.new_file
            with opened(path, table.schema) as writer:
                writer.write_table(table, max_chunksize=100)
        else:
            (as_array if kind == "array" else as_lines)(path, records)
            path.write_bytes(PACKINGS.get(kind, bytes)(path.read_bytes()))
        del records
        count, peak = map(int, run(PEAK, str(path)).split())
        assert count == size
        peaks.append(peak / 1024)
    assert peaks[1] < peaks[0] + 8, f"{peaks} MiB"

"""Logged conversations for the tests of the witness and of the shards."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from collectors.logs import Logged
from monitor.origin import Origin

SAYINGS = (
    "The lighthouse keeper counted the ships.",
    "Hm.",
    "It is the weather on an island, and the gulls, and the hours: all of them are in a small blue book.",
    "Tell me a story about the sea, please, and of the keeper who wrote down every ship that he saw from there.",
    "Ja, gerne: über Möwen!",
    "You are a helpful assistant",
    "2 + 2 = 4, and 4 + 4 = 8; the rest is weather, weather, weather, and the counting of gulls by the hour.",
)


def talk(seed: int, turns: int, system: str | None = None) -> list[dict[str, str]]:
    """A conversation; the same seed gives the same one, other seeds others."""
    messages = [] if system is None else [{"role": "system", "content": system}]
    for turn in range(turns):
        asked, said = SAYINGS[(seed + turn) % len(SAYINGS)], SAYINGS[(3 * seed + 2 * turn + 1) % len(SAYINGS)]
        messages.append({"role": "user", "content": f"{asked} {seed}"})
        messages.append({"role": "assistant", "content": f"{said} {turn}"})
    return messages


def logged(messages: Sequence[dict[str, str]], record: int = 1, **more: Any) -> Logged:
    about = {"conversation_id": f"c{record}", "deployment": "other-model", "source": "log.jsonl", **more}
    time = about.pop("time", None)
    turns = sum(message["role"] == "assistant" for message in messages)
    return Logged(origin=Origin(record=record, turns=turns, **about), messages=tuple(messages), time=time)


def write_log(path: Path, conversations: Sequence[Sequence[dict[str, str]]]) -> Path:
    """OpenAI's messages, one conversation a line."""
    lines = [json.dumps({"id": f"{path.stem}-{i}", "messages": talk}) for i, talk in enumerate(conversations)]
    path.write_text("".join(line + "\n" for line in lines))
    return path

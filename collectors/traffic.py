"""Plays scripted conversations through a watched model: the user's turns are given, every reply is generated.

It knows scripts and generation, and nothing of what the watch makes of the replies.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Protocol

import msgspec
import torch
from msgspec import Struct

from collectors.models import LoadedModel
from collectors.spans import encode_prompt, response_tokens, special_token_ids, stop_token_ids
from monitor.errors import CatalogueError, ModelError

__all__ = ["DRIFTING", "HEALTHY", "NAMES", "SLOW_DRIFT_BEGINS", "Reply", "Script", "load_scripts", "play"]

SHIPPED = Path(__file__).parent / "data"
NAMES = ("demo", "develop", "calibrate", "test")
HEALTHY = (
    "bounded_task",
    "creative_writing",
    "fiction_help",
    "small_talk",
    "opinions",
    "everyday_feelings",
    "philosophy_as_subject",
    "identity_question",
    "translation",
)
DRIFTING = ("therapy", "philosophy", "delusion", "role_play", "jailbreak", "slow_drift")
# Slow drift begins as a task: its first turns are neither healthy nor drifting, and nothing is fitted on them.
SLOW_DRIFT_BEGINS = 3


class Script(Struct, frozen=True):
    """The user's side of one conversation.

    Attributes:
        id: unique in its file.
        kind: one of `HEALTHY` or `DRIFTING`.
        topic: a few words for people.
        turns: the user's messages, in order.
        family: the topic family; "develop", "calibrate" and "test" share none.
    """

    id: str
    kind: str
    topic: str
    turns: tuple[str, ...]
    family: str = ""


class Reply(Struct, frozen=True):
    """One generated turn: which conversation, which turn, what was said, and how many tokens that were."""

    conversation_id: str
    turn: int
    text: str
    tokens: int


class Identifies(Protocol):
    """What naming a conversation needs of a watch."""

    def identify(self, *, conversation_id: Sequence[str], turn: int) -> AbstractContextManager[None]:
        """Name the rows of the generate calls in this block."""


def load_scripts(name: str | Path) -> list[Script]:
    """Scripts by name or from a JSON file.

    "demo" is what the demo shows. "develop" is for choosing and fitting, "calibrate" (healthy only) for the alarm
    boundary, "test" for reporting, and for nothing else: see docs/detection.md.

    Raises:
        CatalogueError: no such file, or it is malformed; all problems at once.
    """
    path = SHIPPED / f"{name}.json" if name in NAMES else Path(name)
    try:
        scripts = msgspec.json.decode(path.read_bytes(), type=list[Script])
    except (OSError, msgspec.MsgspecError) as error:
        raise CatalogueError(
            f"scripts {str(name)!r} can't be read: {error}",
            cure=f'give {", ".join(NAMES)}, or a JSON list of {{"id", "kind", "topic", "turns"}}',
        ) from error
    known = {*HEALTHY, *DRIFTING}
    ids = [script.id for script in scripts]
    problems = [f"{script.id}: kind {script.kind!r} is unknown" for script in scripts if script.kind not in known]
    problems += [f"{script.id}: no turns" for script in scripts if not script.turns]
    problems += [f"{script.id}: an empty turn" for script in scripts if not all(turn.strip() for turn in script.turns)]
    problems += [f"{id}: more than one script has this id" for id in sorted({i for i in ids if ids.count(i) > 1})]
    if problems or not scripts:
        raise CatalogueError("; ".join(problems) or f"{path} holds no scripts", cure="correct the file")
    return scripts


def play(
    loaded: LoadedModel,
    watched: Identifies | None,
    conversations: Sequence[tuple[str, Script]],
    *,
    tokens: int = 48,
    temperature: float = 0.7,
    batch_size: int = 32,
    seed: int = 0,
    on_reply: Callable[[Reply], None] = lambda _reply: None,
) -> dict[str, list[dict[str, str]]]:
    """Hold conversations, many at a time, turn by turn.

    Args:
        watched: the watch around `loaded.model`, or None to play unwatched.
        conversations: conversation id and script; one script may be played several times under several ids.
        tokens: longest reply.
        seed: of sampling; the same seed, batch size and machine give the same replies.

    Returns:
        The messages of each conversation, by id.
    """
    torch.manual_seed(seed)
    messages: dict[str, list[dict[str, str]]] = {id: [] for id, _ in conversations}
    for start in range(0, len(conversations), batch_size):
        batch = conversations[start : start + batch_size]
        talk = _Talk(loaded, tokens, temperature)
        for turn in range(max(len(script.turns) for _, script in batch)):
            going_on = [row for row, (_, script) in enumerate(batch) if turn < len(script.turns)]
            batch = [batch[row] for row in going_on]
            names = [id for id, _ in batch]
            for id, script in batch:
                messages[id].append({"role": "user", "content": script.turns[turn]})
            identified = watched.identify(conversation_id=names, turn=turn) if watched else nullcontext()
            with identified:
                replies = talk.reply(going_on, [messages[name] for name in names])
            for name, (text, count) in zip(names, replies, strict=True):
                messages[name].append({"role": "assistant", "content": text})
                on_reply(Reply(conversation_id=name, turn=turn, text=text, tokens=count))
    return messages


class _Talk:
    """A batch of conversations with one growing key-value cache, as a server with prefix caching keeps it.

    Rows are as wide as the widest; what a row does not use is masked, also in its middle: positions are counted by the
    mask, so a masked column costs memory and changes nothing.
    """

    def __init__(self, loaded: LoadedModel, tokens: int, temperature: float) -> None:
        self._loaded = loaded
        self._sampling = {"max_new_tokens": tokens, "do_sample": True, "temperature": temperature, "top_k": 50}
        self._stop = stop_token_ids(loaded.tokenizer, loaded.model.generation_config)
        self._special = special_token_ids(loaded.tokenizer)
        self._ids: torch.Tensor | None = None
        self._mask: torch.Tensor | None = None
        self._cache: Any = None

    def reply(self, rows: Sequence[int], talks: Sequence[list[dict[str, str]]]) -> list[tuple[str, int]]:
        """The next reply, and its tokens, in each conversation whose last message is the user's.

        Args:
            rows: which of the last turn's rows go on, rising.
            talks: their messages.
        """
        tokenizer, model = self._loaded.tokenizer, self._loaded.model
        new = tokenizer.pad({"input_ids": [self._new_ids(talk) for talk in talks]}, return_tensors="pt").to(
            model.device
        )
        ids, mask = new["input_ids"], new["attention_mask"]
        if self._ids is not None and self._mask is not None:
            kept = torch.tensor(rows, device=model.device)
            ids = torch.cat([self._ids[kept], ids], dim=1)
            mask = torch.cat([self._mask[kept], mask], dim=1)
            if len(rows) < len(self._ids):
                self._cache.batch_select_indices(kept)
        with torch.inference_mode():
            output = model.generate(
                input_ids=ids,
                attention_mask=mask,
                past_key_values=self._cache,
                return_dict_in_generate=True,
                **self._sampling,
            )
        self._cache = output.past_key_values
        generated = output.sequences[:, ids.shape[1] :]
        spoken = torch.zeros_like(generated)
        replies = []
        for row, reply in enumerate(generated.cpu().numpy()):
            end, _ = response_tokens(reply, self._stop, self._special)
            spoken[row, :end] = 1
            text = tokenizer.decode(reply[:end], skip_special_tokens=True)
            replies.append((text, end))
        self._ids = output.sequences
        self._mask = torch.cat([mask, spoken], dim=1)
        return replies

    def _new_ids(self, talk: list[dict[str, str]]) -> list[int]:
        """What this turn adds: all of the first prompt; later the end of the last reply's turn and the new message."""
        if len(talk) == 1:
            return encode_prompt(self._loaded.tokenizer, talk)
        return _continuation(self._loaded.tokenizer, talk)


def _continuation(tokenizer: Any, talk: list[dict[str, str]]) -> list[int]:
    """Ids from the end of the last reply's text to the next reply's first token; whatever that reply said.

    Raises:
        ModelError: the template rewrites what came before, so a cache can't be continued.
    """
    reply = "\u2042"
    said = [*talk[:-2], {"role": "assistant", "content": reply}]
    before = tokenizer.apply_chat_template(said, tokenize=False)
    after = tokenizer.apply_chat_template([*said, talk[-1]], tokenize=False, add_generation_prompt=True)
    if not after.startswith(before) or reply not in before:
        raise ModelError(
            "the chat template rewrites earlier turns, so these conversations can't be played with one cache",
            cure="play a model whose template only adds to what came before",
        )
    text = before.rpartition(reply)[2] + after[len(before) :]
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])

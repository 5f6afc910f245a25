"""Which conversation a response belongs to, when the caller does not say. It knows a tokenizer and one secret key.

A conversation is named by what it began with: HMAC(installation key, caller, messages up to and including the first
assistant reply). That is stateless, the same in every replica, and tells nothing about the text to who lacks the key.
Text is compared, not ids: a client sends a reply back as text, which may then be cut into other tokens.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from monitor.errors import ModelError

__all__ = ["ChatMarks", "Identity", "chat_marks", "derive_identity", "prompt_turn"]


@dataclass(frozen=True)
class Identity:
    """Whose response it is.

    Attributes:
        conversation_id: given, or derived.
        turn: index of the assistant turn, from 0.
        certainty: "given" by the caller; "derived" with a caller's name; "weak", derived without one, so that two
            users who begin alike are one conversation: never page on those; "unlinked", a history whose first turn is
            missing, so that it can't be told which conversation it continues.
    """

    conversation_id: str
    turn: int
    certainty: Literal["given", "derived", "weak", "unlinked"]


@dataclass(frozen=True)
class ChatMarks:
    """What a chat template writes around turns, as the tokenizer decodes it.

    Attributes:
        header: opens an assistant turn, such as `<|im_start|>assistant\\n`.
        user: opens a user's turn.
        tail: closes an assistant turn; where nothing does, what opens the next.
    """

    header: str
    user: str
    tail: str


def chat_marks(tokenizer: Any) -> ChatMarks:
    """Read the marks off the template, by rendering conversations whose words are known.

    Raises:
        ModelError: there is no template, or it writes no assistant header, so that turns can't be told apart.
    """
    asked, replied, again = "first-probe", "second-probe", "third-probe"
    question = {"role": "user", "content": asked}
    talk = [question, {"role": "assistant", "content": replied}]
    try:
        without = tokenizer.apply_chat_template([question], tokenize=False)
        with_header = tokenizer.apply_chat_template([question], tokenize=False, add_generation_prompt=True)
        answered = tokenizer.apply_chat_template(talk, tokenize=False)
        text = tokenizer.apply_chat_template([*talk, {"role": "user", "content": again}], tokenize=False)
    except Exception as error:  # no template, or one that wants more than messages
        raise ModelError(
            f"the chat template can't be rendered ({type(error).__name__}), so turns can't be told apart in a prompt",
            cure="name conversations yourself, with watch.identify(conversation_id=..., turn=...)",
        ) from error
    header = with_header[len(without) :] if with_header.startswith(without) else ""
    if not header.strip() or replied not in text:
        raise ModelError(
            "the chat template adds no assistant header, so turns can't be told apart in a prompt",
            cure="name conversations yourself, with watch.identify(conversation_id=..., turn=...)",
        )
    first, between = text.partition(asked)[0], text.partition(replied)[2].partition(again)[0]
    # What stands after a reply, whatever follows it; and what stands before both of the user's turns.
    tail = _as_decoded(tokenizer, _shared_start(answered.rpartition(replied)[2], between)).strip()
    user = _as_decoded(tokenizer, _shared_start(first[::-1], between[::-1])[::-1]).strip().removeprefix(tail).strip()
    return ChatMarks(header=_as_decoded(tokenizer, header), user=user, tail=tail or user)


def prompt_turn(tokenizer: Any, prompt: Sequence[int], marks: ChatMarks) -> int:
    """Index of the assistant turn that a prompt asks for, from 0."""
    return _read(tokenizer.decode(list(prompt)), marks)[2]


def derive_identity(
    prompt: Sequence[int],
    reply: Sequence[int] | None,
    *,
    tokenizer: Any,
    marks: ChatMarks,
    key: bytes,
    caller: str | None = None,
) -> Identity | None:
    """Name a conversation from one prompt and the reply that was generated to it.

    Args:
        prompt: ids of the whole prompt, without padding.
        reply: ids of the reply, up to its stop token; None before it is generated.
        marks: see `chat_marks`.
        key: the installation's secret.
        caller: who asks, where that is known: a user id, an API key's name.

    Returns:
        None where the name depends on a reply that is not there yet: at the first turn.
    """
    beginning, first_reply, turn = _read(tokenizer.decode(list(prompt)), marks)
    if first_reply is None and reply is None:
        return None
    spoken = tokenizer.decode(list(reply or ())) if first_reply is None else first_reply
    parts = json.dumps([caller or "", beginning, _plain(tokenizer, spoken)])
    digest = hmac.new(key, parts.encode(), hashlib.sha256).hexdigest()[:32]
    if marks.user not in beginning or not beginning.endswith(marks.header):
        return Identity(f"unlinked-{digest}", turn, "unlinked")
    return Identity(digest, turn, "derived" if caller else "weak")


def _read(text: str, marks: ChatMarks) -> tuple[str, str | None, int]:
    """A prompt up to its first assistant header, the first reply where there is one, and the turn it asks for."""
    before, header, rest = text.partition(marks.header)
    if not header:
        return text, None, 0
    replies = rest.split(marks.header)
    # After its last header a prompt may hold the beginning of the reply; once that reply is closed, it is history.
    closed = marks.tail in replies[-1]
    turn = len(replies) if closed else len(replies) - 1
    return before + header, replies[0].partition(marks.tail)[0] if turn else None, turn


def _plain(tokenizer: Any, text: str) -> str:
    """A reply as the client has it: without special tokens, and without the reasoning that templates strip later."""
    for token in tokenizer.all_special_tokens:
        text = text.replace(token, "")
    return unicodedata.normalize("NFC", text.rpartition("</think>")[2].strip())


def _shared_start(left: str, right: str) -> str:
    same = next((i for i, (a, b) in enumerate(zip(left, right, strict=False)) if a != b), min(len(left), len(right)))
    return left[:same]


def _as_decoded(tokenizer: Any, text: str) -> str:
    return str(tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]))

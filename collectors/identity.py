"""Which conversation a response belongs to, when the caller does not say. It knows token ids and one secret key.

A conversation is named by what it began with: HMAC(installation key, caller, messages up to and including the first
assistant reply). That is stateless, the same in every replica, and tells nothing about the text to who lacks the key.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from collectors.spans import prompt_turns

__all__ = ["Identity", "derive_identity"]


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


def derive_identity(
    prompt: Sequence[int],
    reply: Sequence[int],
    *,
    tokenizer: Any,
    header: Sequence[int],
    stop: Collection[int],
    key: bytes,
    caller: str | None = None,
) -> Identity:
    """Name a conversation from one prompt and the reply that was generated to it.

    Args:
        prompt: ids of the whole prompt, without padding.
        reply: ids of the reply, up to its stop token.
        header: ids that open an assistant turn.
        stop: ids that end a turn.
        key: the installation's secret.
        caller: who asks, where that is known: a user id, an API key's name.
    """
    beginning, first_reply, turn = prompt_turns(prompt, header, stop)
    spoken = reply if first_reply is None else first_reply
    # Text, not ids: the client sends the reply back as text, and it may be cut into other tokens then.
    parts = (
        caller or "",
        tokenizer.decode(list(beginning)),
        tokenizer.decode(list(spoken), skip_special_tokens=True).strip(),
    )
    digest = hmac.new(key, "\x1f".join(parts).encode(), hashlib.sha256).hexdigest()[:32]
    starts_with_template = list(prompt[: len(header)]) != list(header)
    if not starts_with_template:
        return Identity(f"unlinked-{digest}", turn, "unlinked")
    return Identity(digest, turn, "derived" if caller else "weak")

"""Which tokens are the response: in a generated sequence, and in a whole conversation.

It works on token ids and text alone, and knows nothing of models or activations. The rule, everywhere the same: prompt,
template, special and stop tokens never count; nor does the last token of a response that no stop token follows: the
last token that is sampled is never fed back, and so has no activation.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from monitor.errors import ModelError

__all__ = [
    "Conversation",
    "encode_conversation",
    "encode_prompt",
    "encode_reply",
    "reply_tokens",
    "response_tokens",
    "special_token_ids",
    "stop_token_ids",
]

Message = Mapping[str, str]


def stop_token_ids(tokenizer: Any, generation_config: Any = None) -> frozenset[int]:
    """The ids that end a response: every end-of-sequence id in force, and the padding that follows it."""
    sources = (
        getattr(generation_config, "eos_token_id", None),
        getattr(generation_config, "pad_token_id", None),
        tokenizer.eos_token_id,
        tokenizer.pad_token_id,
    )
    return frozenset(int(id) for value in sources if value is not None for id in np.atleast_1d(value))


def special_token_ids(tokenizer: Any) -> frozenset[int]:
    """The tokenizer's special ids: template, not speech, wherever they stand."""
    added = {id for id, token in tokenizer.added_tokens_decoder.items() if token.special}
    return frozenset(int(id) for id in added.union(tokenizer.all_special_ids))


def response_tokens(
    generated: Sequence[int] | NDArray[np.int64], stop: Collection[int], special: Collection[int]
) -> tuple[int, NDArray[np.bool_]]:
    """Where one generated response ends, and which of its tokens are averaged.

    Args:
        generated: ids that follow the prompt, shape [tokens].
        stop: ids that end a response; the first one cuts.
        special: ids that are not speech.

    Returns:
        `end`, the number of tokens before the first stop token (all of them when there is none), and a mask of shape
        [end] that is true for the tokens that were fed back and are speech.
    """
    ids = np.asarray(generated, dtype=np.int64)
    stops = np.flatnonzero(np.isin(ids, list(stop)))
    end = int(stops[0]) if stops.size else len(ids)
    counted = ~np.isin(ids[:end], list(special))
    if end == len(ids) and end > 0:
        counted[-1] = False  # never fed back: the reply was cut by the length limit or a stop string
    return end, counted


def reply_tokens(
    ids: Sequence[int], span: tuple[int, int], stop: Collection[int], special: Collection[int]
) -> NDArray[np.bool_]:
    """Which tokens of one reply in a whole conversation are averaged; the same rule, read off the text.

    A reply that an end-of-turn token follows was fed back whole. Templates end every reply so, also one that was cut by
    a length limit when it was made: text does not tell, so there its last token counts, which live it does not.

    Args:
        ids: the conversation, as `encode_conversation` gives it.
        span: the reply's [start, end) in `ids`.
        stop, special: as in `response_tokens`.

    Returns:
        A mask of shape [end - start].
    """
    start, end = span
    counted = ~np.isin(np.asarray(ids[start:end], dtype=np.int64), list(special))
    if end > start and (end == len(ids) or (ids[end] not in stop and ids[end] not in special)):
        counted[-1] = False
    return counted


def encode_prompt(tokenizer: Any, messages: Sequence[Message]) -> list[int]:
    """Messages as the ids that the model continues, the assistant's header last."""
    text = _rendered(tokenizer, messages, add_generation_prompt=True)
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


@dataclass(frozen=True)
class Conversation:
    """A conversation as ids, for teacher forcing.

    Attributes:
        ids: the ids of all turns.
        spans: per reply, [start, end) of its tokens in `ids`; template and stop tokens left out.
    """

    ids: list[int]
    spans: list[tuple[int, int]]


def encode_conversation(
    tokenizer: Any, messages: Sequence[Message], replies: Collection[int] | None = None
) -> Conversation:
    """Encode all turns at once, and find each assistant reply.

    One pass can score every turn only where the template is prefix-stable, that is, where what precedes a reply is not
    rewritten by what follows it; that is checked.

    Args:
        replies: which messages to find; by default all of the assistant's.

    Raises:
        ModelError: the template is not prefix-stable for these messages, or rewrites a reply.
    """
    messages = list(messages)
    text = _rendered(tokenizer, messages)
    ids, offsets = _encoded(tokenizer, text)
    spans: list[tuple[int, int]] = []
    for index, message in enumerate(messages):
        if message["role"] != "assistant" if replies is None else index not in replies:
            continue
        prompt = _rendered(tokenizer, messages[:index], add_generation_prompt=True)
        if not text.startswith(prompt):
            raise ModelError(
                f"the chat template rewrites what comes before message {index}, so one pass can't score all turns",
                cure="score this conversation turn by turn, with `encode_reply`",
            )
        spans.append(_span(text, offsets, len(prompt), message["content"], index))
    return Conversation(ids, spans)


def encode_reply(tokenizer: Any, messages: Sequence[Message]) -> Conversation:
    """Encode a conversation up to one assistant reply, which is the last message, and find that reply alone.

    Raises:
        ModelError: the template rewrites the reply, so that it can't be found.
    """
    messages = list(messages)
    text = _rendered(tokenizer, messages)
    prompt = _rendered(tokenizer, messages[:-1], add_generation_prompt=True)
    ids, offsets = _encoded(tokenizer, text)
    shared = next((i for i, pair in enumerate(zip(text, prompt, strict=False)) if pair[0] != pair[1]), len(prompt))
    return Conversation(ids, [_span(text, offsets, shared, messages[-1]["content"], len(messages) - 1)])


def _span(text: str, offsets: Sequence[tuple[int, int]], start: int, content: str, index: int) -> tuple[int, int]:
    """The tokens [start, end) of one reply. Found by its text, since templates put more than it after their header."""
    spoken = content if text.find(content, start) >= 0 else content.strip()
    begin = text.find(spoken, start)
    if begin < 0:
        raise ModelError(
            f"the chat template rewrites message {index}, so its tokens can't be told",
            cure="score turn by turn, with `encode_reply`, and give replies as the template writes them",
        )
    # Offsets rise, so that the reply's tokens lie between two places: conversations may have a thousand turns.
    first = bisect_right(offsets, begin, key=lambda pair: pair[1])
    last = bisect_left(offsets, begin + len(spoken), key=lambda pair: pair[0])
    return (first, last) if first < last else (len(offsets), len(offsets))


def _rendered(tokenizer: Any, messages: Sequence[Message], **options: bool) -> str:
    return str(tokenizer.apply_chat_template(list(messages), tokenize=False, **options))


def _encoded(tokenizer: Any, text: str) -> tuple[list[int], list[tuple[int, int]]]:
    if not tokenizer.is_fast:
        raise ModelError(
            f"{type(tokenizer).__name__} can't say which text a token stands for", cure="use a fast tokenizer"
        )
    # Not verbose: whoever feeds the ids knows how many of them the model takes.
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    return list(encoded["input_ids"]), list(encoded["offset_mapping"])

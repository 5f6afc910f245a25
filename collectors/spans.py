"""Which tokens are the response: in a generated sequence, in a prompt, and in a whole conversation.

It works on token ids alone and knows nothing of models or activations. The rule, everywhere the same: prompt, template,
special and stop tokens never count; nor does the last token of a response that no stop token follows, because while
generating, that token is never fed back and so has no activation (facts: "the last sampled token").
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from monitor.errors import ModelError

__all__ = [
    "Conversation",
    "assistant_header",
    "encode_conversation",
    "encode_prompt",
    "prompt_turns",
    "response_tokens",
    "special_token_ids",
    "stop_token_ids",
]

Message = Mapping[str, str]


def stop_token_ids(tokenizer: Any, generation_config: Any = None) -> frozenset[int]:
    """The ids that end a response: every end-of-sequence id in force, and the padding that follows it."""
    ids: set[int] = set()
    sources = (
        getattr(generation_config, "eos_token_id", None),
        getattr(generation_config, "pad_token_id", None),
        tokenizer.eos_token_id,
        tokenizer.pad_token_id,
    )
    for value in sources:
        ids.update(value if isinstance(value, (list, tuple)) else [] if value is None else [int(value)])
    return frozenset(int(value) for value in ids)


def special_token_ids(tokenizer: Any) -> frozenset[int]:
    """The tokenizer's special ids: template, not speech, wherever they stand."""
    return frozenset(int(value) for value in tokenizer.all_special_ids)


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


def encode_prompt(tokenizer: Any, messages: Sequence[Message]) -> list[int]:
    """Messages as the ids that the model continues, the assistant's header last."""
    text = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def assistant_header(tokenizer: Any) -> tuple[int, ...]:
    """The ids that open an assistant turn, such as `<|im_start|>assistant\\n`.

    Raises:
        ModelError: the template opens none, so turns can't be told apart.
    """
    probe = [{"role": "user", "content": "x"}]
    without = tokenizer.apply_chat_template(probe, tokenize=False)
    with_header = tokenizer.apply_chat_template(probe, tokenize=False, add_generation_prompt=True)
    header = with_header[len(without) :] if with_header.startswith(without) else ""
    ids = tuple(tokenizer(header, add_special_tokens=False)["input_ids"]) if header else ()
    if not ids:
        raise ModelError(
            "the chat template adds no assistant header, so turns can't be told apart in a prompt",
            cure="name conversations yourself: with watch.identify(conversation_id=..., turn=...)",
        )
    return ids


def prompt_turns(
    ids: Sequence[int], header: Sequence[int], stop: Collection[int]
) -> tuple[list[int], list[int] | None, int]:
    """Read a prompt's ids as turns.

    Args:
        ids: one prompt without padding, the assistant's header last.
        header: see `assistant_header`.
        stop: ids that end a turn.

    Returns:
        The ids up to and including the first assistant header; the first assistant reply's ids, or None when it is the
        one being generated; and the index of the assistant turn being generated, from 0.
    """
    header = list(header)
    ids = list(ids)
    starts = [i + len(header) for i in range(len(ids) - len(header) + 1) if ids[i : i + len(header)] == header]
    if not starts:
        return ids, None, 0
    if len(starts) == 1:
        return ids[: starts[0]], None, 0
    rest = ids[starts[0] :]
    end = next((i for i, token in enumerate(rest) if token in stop), len(rest))
    return ids[: starts[0]], rest[:end], len(starts) - 1


@dataclass(frozen=True)
class Conversation:
    """A whole conversation as ids, for teacher forcing.

    Attributes:
        ids: the ids of all turns.
        spans: per assistant turn, [start, end) of its reply's tokens in `ids`, the stop token left out.
    """

    ids: list[int]
    spans: list[tuple[int, int]]


def encode_conversation(tokenizer: Any, messages: Sequence[Message]) -> Conversation:
    """Encode all turns at once, and find each assistant reply.

    One pass can score every turn only where the template is prefix-stable, that is, where what precedes a reply is not
    rewritten by what follows it; that is checked.

    Raises:
        ModelError: the template is not prefix-stable for these messages.
    """
    messages = list(messages)
    ids: list[int] = list(
        tokenizer(tokenizer.apply_chat_template(messages, tokenize=False), add_special_tokens=False)["input_ids"]
    )
    stop = stop_token_ids(tokenizer)
    spans: list[tuple[int, int]] = []
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        prompt = encode_prompt(tokenizer, messages[:index])
        if ids[: len(prompt)] != prompt:
            raise ModelError(
                f"the chat template rewrites what comes before message {index}, so one pass can't score all turns",
                cure="score this conversation turn by turn",
            )
        end = next((i for i in range(len(prompt), len(ids)) if ids[i] in stop), len(ids))
        spans.append((len(prompt), end))
    return Conversation(ids, spans)

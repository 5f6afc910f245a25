"""Which tokens are speech: told the same way in generated ids and in whole conversations."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from collectors.spans import (
    encode_conversation,
    encode_prompt,
    encode_reply,
    response_tokens,
    special_token_ids,
    stop_token_ids,
)
from monitor.errors import ModelError

PAD, START, END = 0, 1, 2

# Templates of other manners than ChatML.
GEMMA = (  # its end of turn is not the end of sequence
    "{% for m in messages %}<|im_start|>{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n"
    "{{ m['content'] | trim }}<turn>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>model\n{% endif %}"
)
PLAIN = (  # nothing special at all
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
THINKING = (  # earlier reasoning is stripped, the last reply gets an empty block
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% set c = m['content'] %}"
    "{% if m['role'] == 'assistant' %}{% if loop.last %}{{ '<think>\n\n</think>\n\n' }}"
    "{% else %}{% set c = c.split('</think>')[-1].lstrip('\n') %}{% endif %}{% endif %}"
    "{{ c }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TALK = [
    {"role": "user", "content": "What is the sea?"},
    {"role": "assistant", "content": "It is the weather.\n\nOn an island: gulls."},
    {"role": "user", "content": "And the sea?"},
    {"role": "assistant", "content": "The sea, the sea."},
]


def with_template(tokenizer: Any, template: str | None) -> Any:
    changed = copy.deepcopy(tokenizer)
    changed.chat_template = template
    return changed


@pytest.mark.parametrize(
    ("generated", "end", "counted"),
    [
        ([], 0, []),
        ([END], 0, []),
        ([9], 1, [0]),
        ([9, END], 1, [1]),
        ([9, 8, 7], 3, [1, 1, 0]),
        ([9, 8, 7, END], 3, [1, 1, 1]),
        ([9, END, PAD, PAD], 1, [1]),
        ([9, END, 8, 7], 1, [1]),  # speech after the end is none
        ([9, START, 8, END], 3, [1, 0, 1]),
        ([9, 8, PAD, PAD], 2, [1, 1]),  # stopped by a stop string, while other rows went on: its last token was fed
    ],
)
def test_response_tokens(generated: list[int], end: int, counted: list[int]) -> None:
    found, mask = response_tokens(generated, {END, PAD}, {START, END, PAD})
    assert (found, mask.astype(int).tolist()) == (end, counted)


@given(st.lists(st.integers(0, 12), max_size=30), st.sets(st.integers(0, 3)), st.sets(st.integers(0, 5)))
def test_what_counts_is_fed_is_before_the_end_and_is_no_special_token(
    generated: list[int], stop: set[int], special: set[int]
) -> None:
    end, counted = response_tokens(np.array(generated, np.int64), stop, special)
    assert len(counted) == end <= len(generated)
    assert not set(generated[:end]) & stop
    assert end == len(generated) or generated[end] in stop
    for place, counts in enumerate(counted):
        assert counts == (generated[place] not in special and place + 1 < len(generated))


def test_stop_and_special_ids(tokenizer: Any) -> None:
    assert stop_token_ids(tokenizer) == {PAD, END}
    for several in ([7, 8], (7, 8), np.array([7, 8])):
        assert stop_token_ids(tokenizer, SimpleNamespace(eos_token_id=several, pad_token_id=9)) == {PAD, END, 7, 8, 9}
    assert special_token_ids(tokenizer) == {PAD, START, END}
    more = copy.deepcopy(tokenizer)
    more.add_special_tokens({"extra_special_tokens": ["<turn>"]})
    more.add_tokens(["ordinary"])
    assert special_token_ids(more) == {PAD, START, END, more.convert_tokens_to_ids("<turn>")}


def test_no_system_message_and_an_empty_one_are_two_prompts(tokenizer: Any) -> None:
    user = {"role": "user", "content": "Hi"}
    default = tokenizer.decode(encode_prompt(tokenizer, [user]))
    empty = tokenizer.decode(encode_prompt(tokenizer, [{"role": "system", "content": ""}, user]))
    assert "helpful assistant" in default and "helpful assistant" not in empty
    assert default.endswith("<|im_start|>assistant\n")


def spoken(tokenizer: Any, conversation: Any) -> list[str]:
    return [tokenizer.decode(conversation.ids[start:end]) for start, end in conversation.spans]


@pytest.mark.parametrize("system", [None, "", "You are a ghost."])
@pytest.mark.parametrize("template", [None, GEMMA, PLAIN], ids=["chatml", "gemma", "plain"])
def test_each_reply_is_found_whole_and_alone(tokenizer: Any, template: str | None, system: str | None) -> None:
    used = with_template(tokenizer, template or tokenizer.chat_template)
    talk = TALK if system is None else [{"role": "system", "content": system}, *TALK]
    replies = [message["content"] for message in TALK if message["role"] == "assistant"]
    # A plain transcript has no border that a token could not straddle.
    found = [text.strip() for text in spoken(used, encode_conversation(used, talk))]
    assert found == replies
    assert spoken(used, encode_reply(used, talk))[0].strip() == replies[-1]


def test_a_reply_begins_where_generation_began(tokenizer: Any) -> None:
    conversation = encode_conversation(tokenizer, TALK)
    for (start, end), index in zip(conversation.spans, (1, 3), strict=True):
        assert conversation.ids[:start] == encode_prompt(tokenizer, TALK[:index])
        assert conversation.ids[end] == END


@given(st.lists(st.text(st.characters(codec="utf-8", exclude_characters="<"), min_size=1, max_size=40), min_size=1))
def test_replies_of_any_text(replies: list[str]) -> None:
    tokenizer = _shared["tokenizer"]
    talk = [
        message
        for reply in replies
        for message in ({"role": "user", "content": "?"}, {"role": "assistant", "content": reply})
    ]
    conversation = encode_conversation(tokenizer, talk)
    for text, reply in zip(spoken(tokenizer, conversation), replies, strict=True):
        assert reply in text and text.replace("\n", "") == reply.replace("\n", "")


_shared: dict[str, Any] = {}


@pytest.fixture(autouse=True)
def _share(tokenizer: Any) -> None:
    _shared["tokenizer"] = tokenizer  # a hypothesis test can't ask for a fixture of its own


def test_a_template_that_rewrites_the_past_is_refused_for_one_pass_and_scored_turn_by_turn(tokenizer: Any) -> None:
    thinking = with_template(tokenizer, THINKING)
    talk = [dict(message) for message in TALK]
    talk[1]["content"] = "<think>\nhm\n</think>\n\nIt is the weather."
    with pytest.raises(ModelError, match="rewrites") as caught:
        encode_conversation(thinking, talk)
    assert "encode_reply" in caught.value.cure
    assert spoken(thinking, encode_reply(thinking, talk)) == ["The sea, the sea."]


def test_a_template_that_rewrites_a_reply_is_refused(tokenizer: Any) -> None:
    shouting = with_template(
        tokenizer, tokenizer.chat_template.replace("message['content']", "message['content']|upper")
    )
    with pytest.raises(ModelError, match="rewrites message 1"):
        encode_conversation(shouting, TALK[:2])


def test_an_empty_reply_has_no_tokens(tokenizer: Any) -> None:
    talk = [TALK[0], {"role": "assistant", "content": ""}, *TALK[2:]]
    spans = encode_conversation(tokenizer, talk).spans
    assert spans[0][0] == spans[0][1] and spans[1][0] < spans[1][1]

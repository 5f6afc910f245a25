"""A conversation has one name over all its turns, in every replica, and nobody else's has the same."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_spans import GEMMA, PLAIN, THINKING

from collectors.identity import ChatMarks, Identity, chat_marks, derive_identity, prompt_turn
from collectors.spans import encode_prompt
from monitor.errors import ModelError

KEY = b"k" * 32
ASKED = {"role": "user", "content": "What is the sea?"}
NEXT = {"role": "user", "content": "And then?"}


def name(
    tokenizer: Any, messages: list[dict[str, str]], reply: str | None, *, key: bytes = KEY, caller: str | None = "ann"
) -> Identity | None:
    ids = None if reply is None else tokenizer(reply, add_special_tokens=False)["input_ids"]
    return derive_identity(
        encode_prompt(tokenizer, messages),
        ids,
        tokenizer=tokenizer,
        marks=chat_marks(tokenizer),
        key=key,
        caller=caller,
    )


def said(content: str) -> dict[str, str]:
    return {"role": "assistant", "content": content}


def with_template(tokenizer: Any, template: str | None) -> Any:
    changed = copy.deepcopy(tokenizer)
    changed.chat_template = template
    return changed


def test_the_marks_of_a_template(tokenizer: Any) -> None:
    assert chat_marks(tokenizer) == ChatMarks("<|im_start|>assistant\n", "<|im_start|>user", "<|im_end|>")


@pytest.mark.parametrize("template", [None, GEMMA, PLAIN, THINKING], ids=["chatml", "gemma", "plain", "thinking"])
@pytest.mark.parametrize("system", [None, "", "You are a ghost."])
def test_the_name_stays_and_the_turn_counts_up(tokenizer: Any, template: str | None, system: str | None) -> None:
    used = with_template(tokenizer, template or tokenizer.chat_template)
    messages = [ASKED] if system is None else [{"role": "system", "content": system}, ASKED]
    names = []
    for turn in range(5):
        reply = f"Reply {turn}.\n\nIt has two parts."
        identity = name(used, messages, reply)
        assert identity is not None
        assert (identity.turn, identity.certainty) == (turn, "derived")
        assert prompt_turn(used, encode_prompt(used, messages), chat_marks(used)) == turn
        names.append(identity.conversation_id)
        # Before its reply is there, only the first turn can't be named.
        assert (name(used, messages, None) == identity) == (turn > 0)
        messages = [*messages, said(reply), NEXT]
    assert len(set(names)) == 1
    assert 0 < len(names[0]) <= 256


REPLIES = ["\n\nHello", "  Hello  ", "Hello\n", "héllo wörld ☂", "e\u0301", "\ufffd\ufffd", "x" * 400, ""]


@pytest.mark.parametrize("reply", REPLIES, ids=range(len(REPLIES)))
def test_a_reply_that_comes_back_as_other_tokens_is_the_same_reply(tokenizer: Any, reply: str) -> None:
    # Letter by letter, as a sampler may say it; then as text in the next prompt.
    letters = [id for letter in reply for id in tokenizer(letter, add_special_tokens=False)["input_ids"]]
    first = derive_identity(
        encode_prompt(tokenizer, [ASKED]),
        letters,
        tokenizer=tokenizer,
        marks=chat_marks(tokenizer),
        key=KEY,
        caller="ann",
    )
    second = name(tokenizer, [ASKED, said(reply), NEXT], "anything")
    assert first is not None and second is not None
    assert first.conversation_id == second.conversation_id
    assert (first.turn, second.turn) == (0, 1)


def test_reasoning_that_the_template_strips_later_is_no_part_of_the_name(tokenizer: Any) -> None:
    thinking = with_template(tokenizer, THINKING)
    reply = "<think>\nhm, the sea\n</think>\n\nIt is wide."
    first = name(thinking, [ASKED], reply)
    for sent_back in (reply, "It is wide."):
        second = name(thinking, [ASKED, said(sent_back), NEXT], "x")
        assert first is not None and second is not None and first.conversation_id == second.conversation_id


def test_whatever_begins_otherwise_is_another_conversation(tokenizer: Any) -> None:
    base = name(tokenizer, [ASKED], "It is wide.")
    others = [
        name(tokenizer, [ASKED], "It is wide.", caller="bob"),
        name(tokenizer, [ASKED], "It is wide.", caller=None),
        name(tokenizer, [ASKED], "It is wide.", key=b"j" * 32),
        name(tokenizer, [ASKED], "It is deep."),
        name(tokenizer, [NEXT], "It is wide."),
        name(tokenizer, [{"role": "system", "content": "Pirate."}, ASKED], "It is wide."),
        # What is within a part can't be shifted into another one.
        name(tokenizer, [ASKED], "It is wide.", caller='ann", "'),
        name(tokenizer, [ASKED], "It is wide.", caller="ann\x1f"),
    ]
    ids = [identity.conversation_id for identity in [base, *others] if identity is not None]
    assert len(set(ids)) == 9


@given(st.lists(st.tuples(st.text(max_size=4), st.text(max_size=4)), min_size=2, max_size=4, unique=True))
def test_parts_do_not_run_into_each_other(pairs: list[tuple[str, str]]) -> None:
    from hypothesis import assume

    from collectors.identity import _plain

    tokenizer = _shared["tokenizer"]
    assume(len({(caller, _plain(tokenizer, reply)) for caller, reply in pairs}) == len(pairs))
    assume(all(caller for caller, _ in pairs))
    names = {name(tokenizer, [ASKED], reply, caller=caller) for caller, reply in pairs}
    assert len({identity.conversation_id for identity in names if identity is not None}) == len(pairs)


_shared: dict[str, Any] = {}


@pytest.fixture(autouse=True)
def _share(tokenizer: Any) -> None:
    _shared["tokenizer"] = tokenizer


def test_without_a_caller_a_name_is_weak(tokenizer: Any) -> None:
    identity = name(tokenizer, [ASKED], "It is wide.", caller=None)
    assert identity is not None and identity.certainty == "weak"


@pytest.mark.parametrize("template", [None, GEMMA], ids=["default system message", "none"])
@pytest.mark.parametrize("system", [False, True])
def test_a_history_whose_first_question_is_missing_is_unlinked(
    tokenizer: Any, template: str | None, system: bool
) -> None:
    used = with_template(tokenizer, template or tokenizer.chat_template)
    head = [{"role": "system", "content": "Be brief."}] if system else []
    identity = name(used, [*head, said("It is wide."), NEXT], "x")
    assert identity is not None
    assert (identity.certainty, identity.turn) == ("unlinked", 1)
    assert identity.conversation_id.startswith("unlinked-")


def test_a_prompt_without_any_turn_is_unlinked(tokenizer: Any) -> None:
    ids = tokenizer("Once upon a time", add_special_tokens=False)["input_ids"]
    identity = derive_identity(ids, [50], tokenizer=tokenizer, marks=chat_marks(tokenizer), key=KEY, caller="ann")
    assert identity is not None and (identity.certainty, identity.turn) == ("unlinked", 0)


def test_a_reply_begun_for_the_model_is_the_same_turn(tokenizer: Any) -> None:
    begun = [*encode_prompt(tokenizer, [ASKED]), *tokenizer("Sure:", add_special_tokens=False)["input_ids"]]
    assert prompt_turn(tokenizer, begun, chat_marks(tokenizer)) == 0


def test_a_prompt_without_an_open_turn_asks_for_the_next_one(tokenizer: Any) -> None:
    closed = tokenizer.apply_chat_template([ASKED, said("Wide."), NEXT], tokenize=False)
    ids = tokenizer(closed, add_special_tokens=False)["input_ids"]
    assert prompt_turn(tokenizer, ids, chat_marks(tokenizer)) == 1


@pytest.mark.parametrize(
    "template",
    [None, "{% for m in messages %}[{{ m['content'] }}]{% endfor %}", "{{ raise_exception('no') }}"],
    ids=["none", "no header", "raises"],
)
def test_a_template_without_turns_says_so(tokenizer: Any, template: str | None) -> None:
    with pytest.raises(ModelError, match="turns can't be told apart") as caught:
        chat_marks(with_template(tokenizer, template))
    assert "identify" in caught.value.cure


def test_the_real_tokenizer(smollm2: Any) -> None:
    tokenizer = smollm2.tokenizer
    messages = [ASKED]
    names = set()
    for turn in range(3):
        identity = name(tokenizer, messages, "\nIt is wide, and deep.")
        assert identity is not None and (identity.turn, identity.certainty) == (turn, "derived")
        names.add(identity.conversation_id)
        messages = [*messages, said("\nIt is wide, and deep."), NEXT]
    assert len(names) == 1
    orphan = name(tokenizer, [said("It is wide."), NEXT], "x")
    assert orphan is not None and orphan.certainty == "unlinked"

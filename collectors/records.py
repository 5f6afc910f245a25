"""From one record of a conversation log, as plain data, to a conversation. It knows no files, and no model.

The formats differ in where they keep things, not in what they say, so there is one reader for all of them:

- `messages`, `conversation` or `conversations`, with `role` and `content` (OpenAI, LMSYS-Chat-1M, WildChat) or `from`
  and `value` (ShareGPT); also as a struct of lists or as a string of JSON, as data sets keep them; a bare list, too;
- a request under `body`, `request` or `input` (the Batch API, logged calls), and its reply under `response` or
  `output`: the first of its `choices` is the last message;
- content as a string or as parts, of which text is kept.

What comes out alternates between user and assistant, with at most one system prompt in front. A turn's index counts the
assistant messages that are left. Everything that was changed on the way is in `Conversation.notes`; neither notes nor
reasons carry any text of the conversation.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from typing import Any

import msgspec
from msgspec import Struct

from monitor.errors import AnchorwatchError

__all__ = ["FIELDS", "HOLDERS", "Conversation", "Unreadable", "conversation_of", "is_message", "short_name"]

_LISTS = ("messages", "conversation", "conversations")
_REQUESTS = ("body", "request", "input")
_RESPONSES = ("response", "output")
_IDS = ("conversation_id", "conversation_hash", "custom_id", "id")
_USERS = ("hashed_ip", "user", "user_id")
_TIMES = ("timestamp", "created_at", "created", "create_time", "time", "tstamp")
HOLDERS = (*_LISTS, *_REQUESTS)
"""The fields that can hold a conversation: a record has one of them."""
FIELDS = (*HOLDERS, *_RESPONSES, *_IDS, *_USERS, *_TIMES, "choices", "model", "system")
"""Every field of a record that is read; a table's other columns need not be loaded."""

_ROLES = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "model", "bot", "chatbot", "ai", "chatgpt", "bing", "bard"), "assistant"),
    **dict.fromkeys(("tool", "function", "observation", "ipython", "tool_response", "function_response"), "tool"),
    **dict.fromkeys(("function_call", "tool_call"), "call"),
}
_LONGEST_NAME = 256  # of an id or a deployment in a Projection
_RESULT = "[tool result]\n"
_LAST_YEAR = 9998  # turns are told apart by seconds that are added


class Unreadable(AnchorwatchError):
    """A record, or what is left of a file, can't be read; the problem is told without any text of it."""


class Conversation(Struct, frozen=True, kw_only=True):
    """One conversation, ready to be scored.

    Attributes:
        messages: role (system, user or assistant) and content of each; no two neighbours of one role, the last one is
            the assistant's.
        notes: what was changed to come to that, with how often.
        conversation_id, model, user: as the record names them, or None.
        time: its start, RFC 3339 in UTC with a `Z`; the record's own time where its messages have none.
    """

    messages: tuple[dict[str, str], ...]
    notes: tuple[str, ...] = ()
    conversation_id: str | None = None
    model: str | None = None
    user: str | None = None
    time: str | None = None


def conversation_of(record: object) -> Conversation:
    """What the record says.

    Raises:
        Unreadable: it is not a conversation, its types are wrong, a role is not known, or the assistant says nothing.
    """
    fields: Mapping[str, Any] = {"messages": record} if isinstance(record, list) else _object(record, "the record")
    request, response = _inner(fields, _REQUESTS), _inner(fields, _RESPONSES)
    notes: Counter[str] = Counter()
    listed = _listed(fields, request)
    said = [_spoken(message, f"message {number}", notes) for number, message in enumerate(listed, start=1)]
    said += _reply(response or fields, notes)
    for place in (fields, request):
        if isinstance(prompt := place.get("system"), str) and prompt.strip():
            said.insert(0, ("system", prompt))
    messages = _alternating(said, notes)
    places = (fields, request, response)
    times = [[place[key] for place in some for key in _TIMES if place.get(key)] for some in (listed, places)]
    time = _start(times[0]) or _start(times[1][:1])
    if any(times) and time is None:
        notes["its time can't be read"] += 1
    return Conversation(
        messages=messages,
        notes=tuple(what if count == 1 else f"{what}: {count}" for what, count in notes.items()),
        conversation_id=_name((fields, request), _IDS),
        model=_name(places, ("model",)),
        user=_name((fields, request, *listed), _USERS),
        time=time,
    )


def is_message(value: object) -> bool:
    """Whether this is one message rather than a record of many: a list of such is a conversation by itself."""
    return isinstance(value, Mapping) and not value.keys() & set(_LISTS) and bool({"role", "from"} & value.keys())


def short_name(text: str) -> str:
    """`text`, or where it is too long for an event its beginning and its hash, so that two never become one."""
    if len(text) <= _LONGEST_NAME:
        return text
    digest = hashlib.sha256(text.encode("utf-8", "backslashreplace")).hexdigest()
    return f"{text[: _LONGEST_NAME - len(digest) - 1]}~{digest}"


# Where things are


def _object(value: object, what: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise Unreadable(f"{what} is not an object")
    return value


def _inner(fields: Mapping[str, Any], names: Iterable[str]) -> Mapping[str, Any]:
    """The first of these that is an object, and the `body` in it where there is one; {} where there is none."""
    for name in names:
        if isinstance(inner := fields.get(name), Mapping):
            return body if isinstance(body := inner.get("body"), Mapping) else inner
    return {}


def _listed(fields: Mapping[str, Any], request: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    for place in (fields, request):
        for name in _LISTS:
            if (value := place.get(name)) is not None:
                return [_object(item, f"message {at}") for at, item in enumerate(_unfolded(value, name), start=1)]
    if _inner(fields, _RESPONSES) or "choices" in fields:
        raise Unreadable("a response without its request, so its conversation is not known")
    raise Unreadable(f"no conversation in it: none of {', '.join(_LISTS)}")


def _unfolded(value: object, name: str) -> list[Any]:
    if isinstance(value, str):  # data sets often keep lists as text
        try:
            value = msgspec.json.decode(value)
        except (msgspec.MsgspecError, RecursionError, UnicodeError):
            raise Unreadable(f"{name} is text, and not JSON") from None
    if isinstance(value, Mapping) and value and all(isinstance(column, list) for column in value.values()):
        try:  # a "Sequence" of Hugging Face: one list for each field of a message
            value = [dict(zip(value, row, strict=True)) for row in zip(*value.values(), strict=True)]
        except ValueError:
            raise Unreadable(f"{name} has lists of different lengths") from None
    if not isinstance(value, list):
        raise Unreadable(f"{name} is not a list")
    if not value:
        raise Unreadable("an empty conversation")
    return value


def _name(places: Iterable[Mapping[str, Any]], keys: Iterable[str]) -> str | None:
    everywhere = list(places)
    for key in keys:
        for place in everywhere:
            value = place.get(key)
            if isinstance(value, int) and not isinstance(value, bool):
                return str(value)
            if isinstance(value, str) and value.strip():
                return short_name(value)
    return None


def _start(values: Iterable[object]) -> str | None:
    read = [moment for value in values if (moment := _moment(value)) is not None]
    return min(read).isoformat().replace("+00:00", "Z") if read else None


def _moment(value: object) -> datetime | None:
    """A time in UTC from a datetime, an ISO 8601 string or Unix seconds, milliseconds or microseconds; or None."""
    try:
        if isinstance(value, str):
            value = datetime.fromisoformat(value.strip())
        elif isinstance(value, int | float) and not isinstance(value, bool):
            seconds = float(value)  # 1e11 is the year 5138 in seconds, 1973 in milliseconds
            scale = 1 if abs(seconds) < 1e11 else 1e3 if abs(seconds) < 1e14 else 1e6
            value = datetime.fromtimestamp(seconds / scale, UTC)
        if not isinstance(value, datetime):
            return None
        moment = value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)
    except (ValueError, OverflowError, OSError):
        return None
    return moment if moment.year <= _LAST_YEAR else None


# What was said


def _reply(response: Mapping[str, Any], notes: Counter[str]) -> list[tuple[str, str]]:
    """The answer to a logged request, as one more message; none where it has none."""
    choices = response.get("choices")
    if choices is None:
        return []
    if not isinstance(choices, list) or not all(isinstance(choice, Mapping) for choice in choices):
        raise Unreadable("its choices are not a list of objects")
    if len(choices) > 1:
        notes["further choices of the response left out"] += len(choices) - 1
    return [_spoken(_object(choice.get("message"), "the reply"), "the reply", notes) for choice in choices[:1]]


def _spoken(fields: Mapping[str, Any], what: str, notes: Counter[str]) -> tuple[str, str]:
    """Role and text of a message; an empty text where it says nothing."""
    role = _first(fields, "role", "from")
    if not isinstance(role, str):
        raise Unreadable(f"{what} has no role")
    known = _ROLES.get(role.strip().lower())
    if known is None:
        raise Unreadable(f"{what} has a role that is not known")
    called = known == "call" or bool(fields.get("tool_calls") or fields.get("function_call"))
    text, calls = _text(_first(fields, "content", "value", "text"), what, notes)
    if not text.strip() and isinstance(fields.get("refusal"), str):
        text = fields["refusal"]
    if known == "call" or (known == "assistant" and (called or calls) and not text.strip()):
        notes["assistant messages that only call tools left out"] += 1
        return "call", ""
    if not text.strip():
        notes["empty assistant messages left out" if known == "assistant" else "empty messages left out"] += 1
        return known, ""
    if known == "tool":
        notes["tool results read as the user's"] += 1
        return "user", _RESULT + text
    return known, text


def _first(fields: Mapping[str, Any], *names: str) -> object:
    return next((fields[name] for name in names if fields.get(name) is not None), None)


def _text(content: object, what: str, notes: Counter[str]) -> tuple[str, bool]:
    """The text of a message's content, and whether a part of it calls a tool."""
    if content is None or isinstance(content, str):
        return content or "", False
    texts, calls = [], False
    for part in content if isinstance(content, list) else [content]:
        if isinstance(part, str):
            texts.append(part)
            continue
        if not isinstance(part, Mapping):
            raise Unreadable(f"{what} has content that is neither text nor parts")
        kind = part.get("type") or "text"
        text = part.get("refusal") if kind == "refusal" else part.get("text")
        if kind == "tool_use":
            calls = True
        elif kind == "tool_result":
            inner = part.get("content")
            items = inner if isinstance(inner, list) else []
            found = [inner, *(item.get("text") for item in items if isinstance(item, Mapping))]
            texts += [_RESULT + text for text in found if isinstance(text, str)]
            notes["tool results read as the user's"] += 1
        elif isinstance(text, str) and kind in ("text", "input_text", "output_text", "refusal"):
            texts.append(text)
        elif kind in ("text", "input_text", "output_text", "refusal"):
            raise Unreadable(f"{what} has a part of text without text")
        else:
            notes[_left_out(kind)] += 1
    return "\n\n".join(text for text in texts if text.strip()) if len(texts) != 1 else texts[0], calls


def _left_out(kind: object) -> str:
    for word in ("image", "audio", "video", "file", "document", "thinking", "reasoning"):
        if isinstance(kind, str) and word in kind:
            return f"{word} parts left out"
    return "parts of an unknown type left out"


def _alternating(said: list[tuple[str, str]], notes: Counter[str]) -> tuple[dict[str, str], ...]:
    """Users and assistants in turn, the system prompts joined in front, nothing after the last reply."""
    prompts = [place for place, (role, text) in enumerate(said) if role == "system" and text]
    if len(prompts) > 1:
        notes["system prompts joined at the start"] += len(prompts)
    elif prompts and any(text for _, text in said[: prompts[0]]):
        notes["system prompt moved to the start"] += 1
    turns: list[tuple[str, list[str]]] = []
    for role, text in said:
        if role == "system" or not text:
            continue
        if turns and turns[-1][0] == role:
            notes["messages joined to the one before, of the same role"] += 1
            turns[-1][1].append(text)
        else:
            turns.append((role, [text]))
    if turns and turns[-1][0] == "user":
        turns.pop()
        notes["last user turn has no reply and is left out"] += 1
    if not turns:
        raise Unreadable("no assistant turn with text in it")
    if turns[0][0] == "assistant":
        notes["begins with the assistant"] += 1
    system = [("system", [said[place][1] for place in prompts])] if prompts else []
    return tuple({"role": role, "content": "\n\n".join(texts)} for role, texts in [*system, *turns])

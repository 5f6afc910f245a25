"""What the page's forms ask for, as operators' actions. Pure: it writes nothing, and knows no request."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from typing import Literal, NamedTuple, get_args

from monitor.actions import Acknowledgement, Body, Silence, Verdict
from monitor.actions import Kind as ActionKind
from monitor.api.problems import Problem
from monitor.api.views import moment
from monitor.events import Kind

__all__ = ["SILENCES", "Asked", "asked"]

# Hours that a silence may last, from the page; the command line has any.
SILENCES = (1, 4, 12, 24, 72)
Label = Literal["drifting", "healthy", "unsure"]


class Asked(NamedTuple):
    """One action, or the withdrawal of one where `body` is None; `said` tells it in a word when it is done."""

    kind: ActionKind
    name: str
    body: Body | None
    said: str


def asked(form: Mapping[str, str], now: float) -> Asked:
    """What a form asks for. `now` in seconds since 1970.

    Raises:
        Problem: it asks for nothing that there is, or does not say what it is about.
    """
    note = form.get("note", "").strip().replace("\r\n", "\n")
    match form.get("do", ""):
        case "acknowledge":
            return Asked("acknowledge", _name(form, "alert"), Acknowledgement(note), "acknowledged")
        case "unacknowledge":
            return Asked("acknowledge", _name(form, "alert"), None, "unacknowledged")
        case "resolve":
            return Asked("resolve", _name(form, "alert"), Acknowledgement(note), "resolved")
        case "drifting" | "healthy" | "unsure" as label:
            return Asked("verdict", _name(form, "conversation"), Verdict(label, _turn(form, label), note), "judged")
        case "unjudge":
            return Asked("verdict", _name(form, "conversation"), None, "unjudged")
        case "silence":
            return Asked("silence", secrets.token_hex(4), _silence(form, note, now), "silenced")
        case "unsilence":
            return Asked("silence", _name(form, "silence"), None, "unsilenced")
        case _:
            raise Problem(422, "this form asks for nothing that can be done here", "go back, and load the page again")


def _name(form: Mapping[str, str], field: str) -> str:
    if not form.get(field):
        raise Problem(422, f"the form does not say which {field}", "go back, and load the page again")
    return form[field]


def _turn(form: Mapping[str, str], label: Label) -> int | None:
    text = form.get("turn", "").strip()
    if not text or label != "drifting":
        return None
    if not (text.isascii() and text.isdecimal() and len(text) <= 9):
        raise Problem(422, "the turn where drift began is no number", "give the reply's index, from 0, or leave it out")
    return int(text)


def _silence(form: Mapping[str, str], note: str, now: float) -> Silence:
    hours = form.get("hours", "")
    if hours not in map(str, SILENCES):
        raise Problem(422, "a silence of this length is not offered here", "anchorwatch silence add --for 90m")
    until = moment(now + 3600 * int(hours))
    match form.get("about", ""):
        case "conversation":
            return Silence(until, conversation_id=_name(form, "conversation"), note=note)
        case "kind" if form.get("kind") in get_args(Kind):
            return Silence(until, deployment=_name(form, "deployment"), kind=form["kind"], note=note)
        case "deployment":
            return Silence(until, deployment=_name(form, "deployment"), note=note)
        case _:
            raise Problem(422, "the form does not say what to silence", "choose one of what it offers")

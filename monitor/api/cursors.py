"""Where a listing goes on: an opaque word in one answer, given back with the next request. It knows no listing."""

from __future__ import annotations

import base64
import binascii
from typing import TypeVar

import msgspec

from monitor.api.problems import Problem

__all__ = ["read_cursor", "write_cursor"]

T = TypeVar("T")


def write_cursor(place: object) -> str:
    """A place as a word that can stand in a URL as it is."""
    return base64.urlsafe_b64encode(msgspec.json.encode(place)).rstrip(b"=").decode()


def read_cursor(word: str | None, type: type[T]) -> T | None:
    """The place; None where none was given.

    Raises:
        Problem: it is no cursor of this listing (400).
    """
    if word is None:
        return None
    try:
        # The standard alphabet's two letters are refused, or two words would mean one place.
        data = base64.b64decode(word.encode("ascii") + b"=" * (-len(word) % 4), altchars=b"-_", validate=True)
        return msgspec.json.decode(data, type=type)
    except (binascii.Error, ValueError, msgspec.MsgspecError, RecursionError):
        raise Problem(
            400, "the cursor is none of this listing", "give `next` of the page before, or none for the first page"
        ) from None

"""What one dashboard has otherwise than another, in lines for people. Pure; it knows no server."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

__all__ = ["differences", "short"]

# Grafana's own: a number in its database, and how often a dashboard was saved.
_THEIRS = ("id", "version")


def differences(ours: Any, theirs: Any, at: str = "") -> Iterator[str]:
    """What theirs lacks or has otherwise, one line each, ours last.

    What theirs has beside ours does not count: Grafana fills in what a newer release has, and moves a dashboard to a
    newer schema by itself. A list with more in it does count, so that a panel which somebody has added is seen.
    """
    if isinstance(ours, dict) and isinstance(theirs, dict):
        for key, value in ours.items():
            if (not at and key in _THEIRS) or (key == "schemaVersion" and _is_newer(theirs.get(key), value)):
                continue
            yield from differences(value, theirs.get(key), f"{at}.{key}" if at else key)
    elif isinstance(ours, list) and isinstance(theirs, list):
        if len(ours) != len(theirs):
            yield f"{at}: {len(theirs)} of them → {len(ours)}"
        for index, (one, other) in enumerate(zip(ours, theirs, strict=False)):
            yield from differences(one, other, f"{at}[{_name(one) or index}]")
    elif ours != theirs:
        yield f"{at}: {short(theirs)} → {short(ours)}"


def short(value: Any, most: int = 120) -> str:
    """A value on one line, without control characters."""
    shown = json.dumps(value, ensure_ascii=False, sort_keys=True)
    shown = "".join(letter if letter.isprintable() else "?" for letter in shown)
    return shown if len(shown) <= most else f"{shown[: most - 1]}…"


def _is_newer(theirs: object, ours: int) -> bool:
    return isinstance(theirs, int) and theirs >= ours


def _name(one: Any) -> str:
    """What people call an element of a list: a panel's title, a variable's name, a query's letter."""
    if not isinstance(one, dict):
        return ""
    return str(one.get("title") or one.get("name") or one.get("refId") or "")

"""Alertmanager's matchers: `severity="critical"`, `deployment=~"shop-.*"`. Pure."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Literal

from msgspec import Struct

__all__ = ["Matcher", "matches"]


class Matcher(Struct, frozen=True):
    """One condition on one label. A missing label counts as empty; regular expressions match the whole value."""

    label: str
    operator: Literal["=", "!=", "=~", "!~"]
    value: str

    def matches(self, labels: Mapping[str, str]) -> bool:
        """Whether it holds."""
        value = labels.get(self.label, "")
        match self.operator:
            case "=":
                return value == self.value
            case "!=":
                return value != self.value
            case "=~":
                return re.fullmatch(self.value, value) is not None
            case "!~":
                return re.fullmatch(self.value, value) is None


def matches(matchers: tuple[Matcher, ...], labels: Mapping[str, str]) -> bool:
    """Whether all of them hold."""
    return all(matcher.matches(labels) for matcher in matchers)

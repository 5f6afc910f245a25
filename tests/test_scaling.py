"""The sums of docs/scaling.md: every derived number is computed again from the document's own inputs and formulas."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

PAGE = (Path(__file__).parent.parent / "docs" / "scaling.md").read_text()
TABLES = [
    [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in table.splitlines()
        if not set(line) <= set("|- :")
    ]
    for table in re.findall(r"(?:^\|.*\n)+", PAGE, re.MULTILINE)
]


def table(first_heading: str) -> list[list[str]]:
    """The table whose first heading this is, its heading included."""
    (found,) = [one for one in TABLES if one[0][0] == first_heading]
    return found


def number(text: str) -> float:
    return float(text.replace(",", "").replace(" ", ""))


def shown(value: float) -> str:
    """Three significant digits; counts and what is large without a fraction."""
    rounded = float(f"{value:.3g}")
    return f"{rounded:,.0f}" if rounded >= 100 or rounded == int(rounded) else f"{rounded:g}"


def formulas(**replaced: float) -> dict[str, Any]:
    """The page's inputs and assumptions, with some replaced, and the functions of its code."""
    names: dict[str, Any] = {row[0].strip("`"): number(row[1]) for row in table("input")[1:]}
    names |= {row[0].strip("`"): number(row[1]) for row in table("assumption")[1:]}
    assert replaced.keys() <= names.keys()
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    namespace = names | replaced
    exec(code, namespace)
    return namespace


def test_every_number_of_the_sums_follows_from_the_inputs() -> None:
    heading, *rows = table("a day")
    sums = [formulas()["sums"](number(cell)) for cell in heading[1:]]
    assert [row[0] for row in rows] == list(sums[0])
    computed = [[row[0], *(shown(one[row[0]]) for one in sums)] for row in rows]
    assert rows == computed, "\n".join("| " + " | ".join(row) + " |" for row in computed)


@pytest.mark.parametrize("name", [row[0].strip("`") for row in (*table("input")[1:], *table("assumption")[1:])])
def test_every_input_matters(name: str) -> None:
    at = number(table("a day")[0][-1])
    before = formulas()
    assert before["sums"](at) != formulas(**{name: before[name] * 3})["sums"](at)


def test_the_numbers_in_the_text_are_those_of_the_table() -> None:
    text = PAGE[PAGE.index("## What they say") :]
    given = formulas()
    hundred, thousand = (given["sums"](responses) for responses in (1e8, 1e9))
    assert re.findall(r"\*\*([\d,.]+)\*\*", text) == [
        shown(1e6 / (given["worker_cpu"] + given["redis_cpu"])),
        shown(hundred["Redis, GB"]),
        shown(thousand["workers, a core each"]),
        shown(thousand["Redis primaries"]),
        shown(thousand["partitions"]),
        shown(thousand["Kafka, GB in all"]),
        shown(thousand["into Kafka, Mbit/s"]),
    ]

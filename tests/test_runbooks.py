"""Promises of the runbooks: there is one wherever an alert points, its links lead somewhere, its commands exist."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any, get_args

import pytest
import typer
import yaml

from monitor.__main__ import app
from monitor.events import Kind

DOCS = Path(__file__).parent.parent / "docs"
PAGES = sorted((DOCS / "runbooks").glob("*.md"))
RULES = yaml.safe_load((DOCS.parent / "deploy" / "prometheus" / "alerts.rules.yml").read_text())
ALERTS = [rule for group in RULES["groups"] for rule in group["rules"] if "alert" in rule]
KINDS = sorted(set(get_args(Kind)) - {"recovered"})
PARTS = ("What it means", "What it does not mean", "Look first", "Do", "Back to bed")


def anchors(page: Path) -> list[str]:
    """As GitHub makes them of headings."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return [re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings]


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_has_a_page_with_all_that_one_needs(kind: str) -> None:
    text = (DOCS / "runbooks" / f"{kind}.md").read_text()
    assert text.startswith(f"# {kind}: ")
    assert re.findall(r"^## (.*)$", text, re.MULTILINE) == list(PARTS)


@pytest.mark.parametrize("rule", ALERTS, ids=lambda rule: rule["alert"])
def test_every_alert_of_prometheus_has_its_place(rule: dict[str, dict[str, str]]) -> None:
    page, _, anchor = rule["annotations"]["runbook_url"].partition("#")
    assert anchors(DOCS.parent / page).count(anchor) == 1
    assert anchor == str(rule["alert"]).lower()


def test_no_place_is_for_an_alert_that_there_is_not() -> None:
    found = re.findall(r"^### (.*)$", (DOCS / "runbooks" / "monitor.md").read_text(), re.MULTILINE)
    assert found == [rule["alert"] for rule in ALERTS], "in the rules' order"


@pytest.mark.parametrize("page", [*PAGES, DOCS / "alerts.md"], ids=lambda page: page.name)
def test_every_link_leads_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text().replace("\n", " ")):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        linked = (page.parent / path).resolve() if path else page
        assert linked.exists(), (page.name, target)
        assert not anchor or anchor in anchors(linked), (page.name, target)


@pytest.mark.parametrize("page", [*PAGES, DOCS / "alerts.md"], ids=lambda page: page.name)
def test_every_command_exists_with_its_options(page: Path) -> None:
    front: Any = typer.main.get_command(app)
    text = page.read_text()
    lines = [line for block in re.findall(r"```\n(.*?)```", text, re.DOTALL) for line in block.split("\n")]
    lines += [one.replace("\n", " ") for one in re.findall(r"`(anchorwatch [^`]*)`", text)]
    for line in lines:
        words = shlex.split(line, comments=True)
        if words[:1] != ["anchorwatch"]:
            continue
        command, rest, context = front, words[1:], typer.Context(front)
        while rest and hasattr(command, "commands"):
            command = command.get_command(context, rest.pop(0))
            assert command is not None, line
        known = {option for parameter in command.params for option in parameter.opts}
        assert {word for word in rest if word.startswith("--")} <= known, line

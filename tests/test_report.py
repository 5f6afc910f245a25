"""Promises of the report: it asks nobody for anything, nothing in it can be turned against its reader, and it fits."""

from __future__ import annotations

import dataclasses
import io
import math
import os
import random
import re
import shutil
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace
from rich.console import Console
from service import CONFIG, projection

from collectors.logs import read_log
from monitor.audit import Audit, Summary
from monitor.auditor import Sources, run_audit
from monitor.axis.bundle import Bundle, load_bundle, resolve_bundle
from monitor.detect.configure import detector_config
from monitor.drawing import MOST_POINTS, map_of, spark_of, thinned, trajectory_of
from monitor.events import Projection
from monitor.origin import Origin, Skipped
from monitor.populations import WITNESS, Populations, populations
from monitor.recorded import Recorded, read_events
from monitor.report import (
    Exchange,
    Provenance,
    exchanges,
    headline,
    html_report,
    persona_plane,
    plain,
    print_summary,
)
from monitor.tables import Row, Tables

SHIPPED = resolve_bundle("smollm2")
REAL = SHIPPED / "develop.jsonl.gz"
BROWSER = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
HOSTILE = (
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "' onmouseover='alert(1)",
    "{{ 7 * 7 }}{% raw %}",
    "javascript:alert(1)",
    "</style><style>*{display:none}</style>",
    "</title></svg><h1>owned</h1>",
    "\u202egnp.exe\u202c שלום عربى",
    "bell\x07 \x1b[31mred\x1b[0m\nline",
    "zero\u200bwidth\ufeff\u2066isolate",
    "[bold red]markup[/]",
    "x" * 10_240,
    "字" * 3000,
)


def provenance(**changes: Any) -> Provenance:
    made = Provenance(
        made="2026-01-02T03:04:05Z",
        version="0.1.0",
        mode="logs",
        inputs=["logs/support.jsonl.gz"],
        model="smollm2",
        bundle_id="b" * 64,
        config_id="c" * 32,
        settings={"context": "4096"},
        files=["turns.parquet"],
    )
    return replace(made, **changes)


@pytest.fixture(scope="session")
def bundle() -> Bundle:
    return load_bundle(SHIPPED)


def real_records(bundle: Bundle, deployments: tuple[str, ...] = ("smollm2", "gpt-x")) -> Iterator[Recorded]:
    """The development replies of the shipped bundle, as if a witness had scored them in logs of several models."""
    for one in read_events(str(REAL)):
        assert isinstance(one.event, Projection)
        name = deployments[sum(map(ord, one.event.conversation_id)) % len(deployments)]
        event = replace(one.event, axis_id=bundle.id, source=WITNESS, deployment=name, model=name)
        yield one._replace(event=event)


@dataclasses.dataclass(frozen=True)
class Page:
    summary: Summary
    top: list[Row]
    turns: dict[str, list[Row]]
    others: list[Row]

    def html(self, bundle: Bundle, **changes: Any) -> str:
        return html_report(
            self.summary, provenance(), self.top, self.turns, self.others, persona_plane(bundle), **changes
        )


def audit_of(folder: Path, pops: Populations, records: Iterator[Recorded], top: int = 60) -> Page:
    tables = Tables(folder, "jsonl")
    audit = Audit(pops, tables, top=top)
    audit.take_events(records)
    summary = audit.finish()
    drawn, others = audit.drawn()
    return Page(summary, drawn, tables.turns([row["conversation_id"] for row in drawn]), others)


@pytest.fixture(scope="session")
def real(tmp_path_factory: pytest.TempPathFactory, bundle: Bundle) -> Page:
    return audit_of(tmp_path_factory.mktemp("real"), populations(bundle), real_records(bundle))


def hostile_records(names: tuple[str, ...] = HOSTILE) -> Iterator[Recorded]:
    """Every name that a log may choose, chosen badly."""
    for number, name in enumerate(names):
        for turn in range(3):
            event = projection(name, turn, -3.0 * turn)
            yield Recorded(
                name, number + 1, replace(event, id=f"{number}.{turn}", deployment=name, source=WITNESS, model=name)
            )


class Parsed(HTMLParser):
    """What a browser would see: tags, attributes, text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.text: list[str] = []
        self.open: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def assert_self_contained(page: str) -> Parsed:
    """No script, no address of anything, and a policy that forbids both."""
    seen = Parsed(page)
    assert not {"script", "iframe", "object", "embed", "base", "form", "img", "h1x"} & set(seen.tags)
    assert not [one for one in seen.attributes if one[1].startswith("on")]
    for tag, name, value in seen.attributes:
        if name in ("href", "src", "action", "data", "poster", "srcset", "formaction", "xlink:href"):
            assert value.startswith("#") or value == "data:,", (tag, name, value)
        if name in ("style", "fill", "stroke", "marker-end"):
            assert "url(" not in value.replace("url(#", ""), value
    assert "url(" not in page.replace("url(#", "") and "@import" not in page
    assert re.search(r"""http-equiv="Content-Security-Policy" content="default-src 'none'; style-src""", page)
    assert seen.tags.count("h1") == 1
    return seen


# What it says


def test_the_headline_says_how_many_and_how_many_drift(real: Page, bundle: Bundle) -> None:
    counts = real.summary.verdicts
    said = headline(real.summary)
    assert str(counts["critical"]) in said and str(counts["warning"]) in said
    page = real.html(bundle)
    assert f"<h1>{said}</h1>" in page
    assert_self_contained(page)
    assert "It is no proof of harm" in page and "not certified for this population" in page


@pytest.mark.parametrize(
    ("verdicts", "said"),
    [
        ({}, "No conversation could be audited."),
        ({"unscored": 2}, "2 conversations read, and none of them could be judged."),
        ({"healthy": 1}, "1 conversation judged. None of them warns."),
        ({"healthy": 1199, "warning": 1}, "1\u202f200 conversations judged: 1 at warning."),
        (
            {"healthy": 5, "critical": 3, "warning": 2, "unscored": 4},
            "10 conversations judged: 3 critical, 2 more at warning.",
        ),
    ],
)
def test_headlines(verdicts: dict[str, int], said: str, real: Page) -> None:
    all_verdicts = {"critical": 0, "warning": 0, "healthy": 0, "unscored": 0, **verdicts}
    summary = replace(real.summary, verdicts=all_verdicts, conversations=sum(verdicts.values()))
    assert headline(summary) == said


def test_every_section_has_what_it_must(real: Page, bundle: Bundle) -> None:
    page = real.html(bundle, problems=["Something loud."])
    for row in real.top[:10]:
        assert row["conversation_id"] in page and f"{row['risk']:.2f}" in page
    for one in real.summary.deployments:
        assert one.deployment in page and one.config_id and one.config_id[:12] in page
        share = one.flagged
        assert f"{100 * share.low:.1f}" in page and f"{100 * share.high:.1f}" in page
    assert "Something loud." in page and "c" * 32 in page and "b" * 64 in page
    assert page.count('class="talk ') == len(real.top)
    assert page.count('class="chart"') == len(real.top)
    assert page.count('class="role"') == 275
    for role in real.top[0]["nearest_roles"]:
        assert role in page


def test_pictures_and_tables_speak_to_who_can_not_see(real: Page, bundle: Bundle) -> None:
    page = real.html(bundle)
    for svg in re.findall(r"<svg[^>]*>", page):
        inside_legend = 'width="20"' in svg or 'width="14"' in svg
        assert 'aria-hidden="true"' in svg or ('role="img"' in svg and 'aria-label="' in svg) or inside_legend, svg
    for head in re.findall(r"<th[ >][^>]*", page):
        assert "scope=" in head
    assert '<html lang="en">' in page and 'name="viewport"' in page
    for verdict in ("critical", "warning", "healthy"):
        assert f"</svg>{verdict}</span>" in page, "a word beside every colour"


def test_what_was_skipped_is_counted_and_placed(tmp_path: Path, bundle: Bundle) -> None:
    tables = Tables(tmp_path, "jsonl")
    audit = Audit(Populations(CONFIG), tables)

    @dataclasses.dataclass
    class Shard:
        origins: list[Origin]
        projections: list[Projection]
        skipped: list[Skipped]
        notes: list[str]

    places = [
        Skipped(source="logs/b.jsonl", record=n, reason="not JSON" if n % 2 else "no messages") for n in range(120)
    ]
    audit.take(Shard([], [], places, ["read through windows"]))
    summary = audit.finish()
    page = html_report(summary, provenance(), [], {}, [], persona_plane(bundle))
    assert "120 records or turns" in page.replace("\u202f", "")
    assert page.count("logs/b.jsonl") == 50 and page.count("whole file") == 1
    assert "read through windows" in page and "No conversation could be audited." in page
    assert_self_contained(page)


def test_a_bundle_without_persona_components_has_no_map(real: Page) -> None:
    page = html_report(real.summary, provenance(), real.top, real.turns, real.others, None)
    assert "Persona map" not in page
    assert_self_contained(page)


def test_the_map_puts_the_assistant_to_the_right(bundle: Bundle) -> None:
    plane = persona_plane(bundle)
    assert plane is not None and plane.towards[0] >= plane.towards[1] >= 0
    config = detector_config(bundle)
    assert config.persona_space is not None
    role = next(iter(plane.roles))
    coordinates = dict(zip(config.persona_space.components, config.persona_space.roles[role], strict=True))
    assert plane.place(coordinates) == pytest.approx(plane.roles[role])
    assert plane.place({"else": 1.0}) is None
    names = bundle.info.roles
    along = [float(vector @ bundle.unit_axis()) for vector in bundle.tensors["role_vectors"]]
    ranked = [name for _, name in sorted(zip(along, names, strict=True))]
    low, high = ([plane.roles[name][0] for name in part] for part in (ranked[:20], ranked[-20:]))
    assert sum(low) / 20 < 0 < sum(high) / 20


# What a log may name


def test_hostile_names_are_text_and_nothing_else(tmp_path: Path, bundle: Bundle) -> None:
    pops = Populations(CONFIG, (CONFIG.baselines["shop"], CONFIG.boundaries))
    page = audit_of(tmp_path, pops, hostile_records())
    settings = {"format": HOSTILE[0], HOSTILE[1]: HOSTILE[7]}
    skipped = [Skipped(source=name, record=1, reason=name, conversation_id=name) for name in HOSTILE]
    summary = replace(page.summary, places=skipped, reasons=dict.fromkeys(HOSTILE, 1), notes=dict.fromkeys(HOSTILE, 1))
    html = html_report(
        summary,
        provenance(inputs=list(HOSTILE), model=HOSTILE[2], settings=settings, files=list(HOSTILE)),
        page.top,
        page.turns,
        page.others,
        persona_plane(bundle),
        problems=HOSTILE,
        exchanges={
            row["conversation_id"]: Exchange(0, plain(HOSTILE[0], None), plain(HOSTILE[7], None), False)
            for row in page.top
        },
    )
    seen = assert_self_contained(html)
    said = "".join(seen.text)
    assert "<script>alert(1)</script>" in said and "{{ 7 * 7 }}" in said and "49" not in HOSTILE[3]
    assert "owned" in said and seen.tags.count("style") == 1 and seen.tags.count("title") >= 1
    for letter in "\u202e\u202c\u2066\u200b\ufeff\x07\x1b":
        assert letter not in html
    assert "\\u{202e}gnp.exe" in said and "שלום" in said
    assert "x" * 700 not in html and "字" * 700 not in html
    assert len(html) < 2_000_000


def test_hostile_names_do_not_colour_the_terminal(tmp_path: Path) -> None:
    pops = Populations(CONFIG, (CONFIG.baselines["shop"], CONFIG.boundaries))
    page = audit_of(tmp_path, pops, hostile_records())
    out = io.StringIO()
    print_summary(
        replace(page.summary, reasons=dict.fromkeys(HOSTILE, 1), skipped=13),
        provenance(files=list(HOSTILE)[:1]),
        Console(file=out, width=160, force_terminal=False),
        HOSTILE,
    )
    said = out.getvalue()
    assert "\x1b" not in said and "\x07" not in said and "\u202e" not in said
    assert "[bold red]markup[/]" in said


@given(st.text(max_size=300))
def test_plain_text_is_short_visible_and_does_not_turn_round(text: str) -> None:
    shown = plain(text, 40)
    assert all(letter.isprintable() or letter.isspace() for letter in shown)
    assert len(shown) <= 40 * 11
    assert not set(shown) & set("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069\u200e\u200f\x00\x1b\n")


def test_the_pages_size_depends_on_what_is_drawn(tmp_path: Path, bundle: Bundle) -> None:
    def page(conversations: int, turns: int) -> str:
        chance = random.Random(0)
        records = (
            Recorded("d", n, projection(f"talk {n}", turn, chance.gauss(-turn / turns, 1.0)))
            for n in range(conversations)
            for turn in range(turns)
        )
        return audit_of(tmp_path / f"{conversations}.{turns}", Populations(CONFIG), records, top=30).html(bundle)

    few, many = len(page(500, 4)), len(page(5000, 4))
    assert many < 1.1 * few, "the others are not in it"
    assert len(page(30, 1000)) < 5_000_000, "nor is every turn of very long ones"


# What was said, with consent

LOG = """\
{"id": "a", "messages": [{"role": "user", "content": "first"}, {"role": "assistant", "content": "one"},\
 {"role": "user", "content": "second <i>"}, {"role": "assistant", "content": "two"}]}
{"id": "b", "messages": [{"role": "user", "content": "third"}, {"role": "assistant", "content": "three"}]}
"""


def row_of(name: str, source: str, record: int | None, turn: int | None) -> Row:
    return {"conversation_id": name, "source": source, "record": record, "worst_turn": turn}


def test_the_worst_turn_is_read_again_from_its_place(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text(LOG + LOG)
    rows = [row_of("a", str(path), 1, 1), row_of("b#2", str(path), 4, 0), row_of("event", "topic", None, 0)]
    found, problems = exchanges(rows, read_log)
    assert found == {"a": Exchange(1, "second <i>", "two", False), "b#2": Exchange(0, "third", "three", False)}
    assert not problems


def test_what_can_not_be_read_again_is_said(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text(LOG)
    found, problems = exchanges(
        [
            row_of("a", "-", 1, 0),
            row_of("gone", str(path), 2, 0),
            row_of("far", str(path), 9, 0),
            row_of("b", "no.jsonl", 1, 0),
        ],
        read_log,
    )
    assert not found, "record 2 is another conversation now"
    assert (
        "standard input" in problems[0]
        and "1 conversations are no longer there" in problems[1]
        and "no.jsonl" in problems[2]
    )


def test_long_messages_are_cut() -> None:
    @dataclasses.dataclass
    class Told:
        origin: Origin
        messages: list[dict[str, str]]

    talk = Told(
        Origin(conversation_id="a", deployment="d", source="s", record=1),
        [{"role": "user", "content": "q" * 9000}, {"role": "assistant", "content": "\u202er\n"}],
    )
    found, _ = exchanges([row_of("a", "s", 1, 0)], lambda _: [talk])
    assert found["a"].cut and len(found["a"].asked) == 4000 and found["a"].answered == "\\u{202e}r\n"


# Geometry

TURNS = st.lists(
    st.tuples(st.floats(-40, 20), st.floats(0, 30), st.sampled_from([None, "warning", "critical", "info"])), max_size=40
)


def as_turns(values: list[tuple[float, float, str | None]]) -> list[dict[str, Any]]:
    return [
        {"turn": n, "z": z, "risk": risk, "level": -z / 2, "severity": severity, "kind": "dip" if severity else None}
        for n, (z, risk, severity) in enumerate(values)
    ]


@given(TURNS, st.floats(0.5, 6), st.floats(1.1, 3))
def test_trajectories_stay_on_their_canvas(values: Any, boundary: float, factor: float) -> None:
    episodes = [{"first_turn": 0, "last_turn": len(values), "severity": "warning"}]
    found = trajectory_of(as_turns(values), episodes, level_boundary=boundary, critical_factor=factor)
    assert (found is None) == (not values)
    if found is None:
        return
    for x, y in [*((dot.x, dot.y) for dot in found.dots), *places(found.z), *places(found.level)]:
        assert found.left <= x <= found.right and found.top <= y <= found.bottom
    for x, y, width, height, _ in found.bars:
        assert x >= 0 and x + width <= found.width and found.ceiling - 0.1 <= y and y + height <= found.floor + 0.1
    for x, width, _ in found.spans:
        assert found.left - 0.1 <= x and x + width <= found.right + 0.1
    assert found.top <= found.zero < found.warning <= found.critical <= found.bottom
    assert len(found.dots) == len(found.bars) == len(values)


def places(line: str) -> list[tuple[float, float]]:
    return [tuple(map(float, pair.split(","))) for pair in line.split()]  # type: ignore[misc]


@given(st.integers(1, 3000), st.randoms(use_true_random=False))
def test_thinning_keeps_the_lowest_in_order(length: int, chance: Any) -> None:
    turns = [{"turn": n, "z": chance.gauss(0, 3)} for n in range(length)]
    kept = thinned(turns)
    assert len(kept) == min(length, MOST_POINTS)
    assert min(turn["z"] for turn in kept) == min(turn["z"] for turn in turns)
    assert [turn["turn"] for turn in kept] == sorted({turn["turn"] for turn in kept})


def test_a_small_line_marks_the_worst_turn() -> None:
    turns = as_turns([(0.0, 0, None), (-1.0, 0, None), (-0.5, 2, "warning")])
    found = spark_of(turns, 1.5, 2, (-3.0, 1.0))
    assert found is not None and found.worst == places(found.points)[2]
    assert found.boundary is not None and found.boundary > found.zero
    assert spark_of([], 1.0, None, (-3.0, 1.0)) is None
    assert spark_of(turns[:1], None, 0, (-3.0, 1.0)) is not None


POINTS = st.tuples(st.floats(-300, 300), st.floats(-300, 300))


@given(
    st.dictionaries(st.text("abcdefgh", min_size=2, max_size=12), POINTS, min_size=1, max_size=60),
    st.lists(POINTS, max_size=30),
)
def test_labels_of_the_map_never_overlap_nor_leave_it(roles: dict[str, Any], talks: list[Any]) -> None:
    marks = [(x, y, "critical", str(n), "t") for n, (x, y) in enumerate(talks)]
    found = map_of(roles, marks, (1.0, 0.5), list(roles)[:3])
    for mark in [*found.roles, *found.marks]:
        assert 0 <= mark.x <= found.width and 0 <= mark.y <= found.height
    boxes = []
    for label in found.labels:
        size = 20.0 if label.major else 12.0
        wide = 0.56 * size * len(label.text)
        left = {"start": label.x, "end": label.x - wide, "middle": label.x - wide / 2}[label.anchor]
        boxes.append((left, label.y - 0.85 * size, left + wide, label.y + 0.25 * size))
    for number, one in enumerate(boxes):
        assert one[0] >= 0 and one[2] <= found.width and one[1] >= 0 and one[3] <= found.height
        for other in boxes[:number]:
            assert one[2] <= other[0] or other[2] <= one[0] or one[3] <= other[1] or other[3] <= one[1]
    assert found.arrow is not None and all(map(math.isfinite, found.arrow))


# In a browser


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if BROWSER is None:
        pytest.skip("there is no Chromium here")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=BROWSER, args=FLAGS)
        yield opened
        opened.close()


@pytest.fixture(scope="session")
def pages(tmp_path_factory: pytest.TempPathFactory, bundle: Bundle, real: Page) -> dict[str, Path]:
    """A real report, one with every hostile name and text, and an empty one."""
    folder = tmp_path_factory.mktemp("pages")
    pops = Populations(CONFIG, (CONFIG.baselines["shop"], CONFIG.boundaries))
    hostile = audit_of(folder / "hostile", pops, hostile_records())
    told = {row["conversation_id"]: Exchange(0, HOSTILE[0], "long " * 700, True) for row in hostile.top}
    run_audit(Sources(), folder / "empty", bundle, Populations(CONFIG), provenance())
    (folder / "real.html").write_text(real.html(bundle, problems=["A note."]))
    (folder / "hostile.html").write_text(hostile.html(bundle, exchanges=told, problems=HOSTILE))
    return {
        "real": folder / "real.html",
        "hostile": folder / "hostile.html",
        "empty": folder / "empty" / "report.html",
    }


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize(("width", "height"), [(390, 844), (1440, 900)])
@pytest.mark.parametrize("name", ["real", "hostile", "empty"])
def test_it_opens_offline_fits_and_its_details_open(
    browser: Any, pages: dict[str, Path], name: str, width: int, height: int, scheme: str
) -> None:
    context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme, offline=True)
    try:
        page = context.new_page()
        said: list[str] = []
        asked: list[str] = []
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("dialog", lambda dialog: said.append(dialog.message))
        page.on("request", lambda request: asked.append(request.url))
        page.goto(pages[name].as_uri())
        talks = page.locator(".talk > details")
        for number in range(min(talks.count(), 4)):
            talk = talks.nth(number)
            talk.locator("summary").first.click()
            assert talk.get_attribute("open") is not None
            assert talk.locator(".inside").is_visible()
            numbers = talk.locator("details > summary")
            if numbers.count():
                numbers.first.click()
                assert talk.locator("table").last.is_visible()
        for shut in page.locator("details:not([open]) > summary").all():
            if shut.is_visible():
                shut.click()
        overflow = page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
        assert overflow <= 0
        escaped = page.evaluate(
            """[...document.querySelectorAll('body *')]
            .filter(e => !e.closest('.scroll, svg, .hidden, .skip, .said p'))
            .filter(e => e.getBoundingClientRect().right > document.documentElement.clientWidth + 1)
            .map(e => e.outerHTML.slice(0, 200))"""
        )
        assert not escaped
        assert not said, said
        assert [url for url in asked if not url.startswith("data:")] == [pages[name].as_uri()]
        background = page.evaluate("getComputedStyle(document.body).backgroundColor")
        lightness = sum(map(int, re.findall(r"\d+", background)[:3]))
        assert lightness > 600 if scheme == "light" else lightness < 150
        if folder := os.environ.get("ANCHORWATCH_TEST_SCREENSHOTS"):
            page.screenshot(path=Path(folder) / f"{name}-{width}-{scheme}.png", full_page=True)
    finally:
        context.close()


def test_the_filters_work_without_a_script(browser: Any, pages: dict[str, Path], real: Page) -> None:
    page = browser.new_page(viewport={"width": 1440, "height": 900}, java_script_enabled=False)
    page.goto(pages["real"].as_uri())
    for verdict in ("critical", "warning", "healthy"):
        page.locator(f"label:has(#show-{verdict})").click()
        shown = [talk for talk in page.locator(".talk").all() if talk.is_visible()]
        expected = [row for row in real.top if row["verdict"] == verdict]
        assert len(shown) == len(expected) > 0
    page.close()


def test_words_stand_out_from_what_is_behind_them(browser: Any, pages: dict[str, Path]) -> None:
    """WCAG 2.1 contrast, level AA: 4.5 for ordinary text."""

    def brightness(colour: str) -> float:
        parts = [int(part) / 255 for part in re.findall(r"\d+", colour)[:3]]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    script = """
    selector => [...document.querySelectorAll(selector)].slice(0, 5).map(e => {
      let at = e, behind = 'rgba(0, 0, 0, 0)';
      while (at && /, 0\\)$/.test(behind = getComputedStyle(at).backgroundColor)) at = at.parentElement;
      return [getComputedStyle(e).color, behind];
    })"""
    for scheme in ("light", "dark"):
        context = browser.new_context(color_scheme=scheme, viewport={"width": 1440, "height": 900})
        page = context.new_page()
        page.goto(pages["real"].as_uri())
        for selector in (
            "p",
            ".badge",
            "th",
            "td",
            ".who span",
            ".rank",
            ".count",
            "a",
            ".columns span",
            ".chip",
            "dt",
            "footer",
        ):
            for ink, behind in page.evaluate(script, selector):
                one, other = sorted((brightness(ink), brightness(behind)), reverse=True)
                assert (one + 0.05) / (other + 0.05) >= 4.5, (scheme, selector, ink, behind)
        context.close()

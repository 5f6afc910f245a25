"""An audit for people: a summary on the terminal, and one HTML file that opens offline and asks nobody for anything.

It knows what an audit came to, and how to say it; it judges nothing. Whatever a log names may be hostile, so names are
escaped by the template, stripped of what turns text around, and cut to a length that a page can bear. The file's size
depends on how many conversations are drawn, not on how many were audited.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.resources import files
from typing import Any, NamedTuple, Protocol

import msgspec
import numpy as np
from msgspec import Struct
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from monitor.audit import VERDICTS, DeploymentSummary, Share, Summary
from monitor.axis.bundle import Bundle
from monitor.detect.configure import persona_space_of
from monitor.drawing import Map, Spark, Trajectory, map_of, reach_of, spark_of, thinned, trajectory_of
from monitor.origin import Origin, Skipped
from monitor.tables import Row, needs

__all__ = [
    "Exchange",
    "PersonaPlane",
    "Provenance",
    "exchanges",
    "html_report",
    "persona_plane",
    "plain",
    "print_summary",
    "summary_json",
    "template",
]

TEMPLATE = "report.html.jinja"
LONGEST_NAME = 96
LONGEST_TEXT = 4_000  # characters of one message, with --with-text
MOST_ROWS = 120  # turns in a conversation's table
MOST_CARDS = 12  # deployments with a card of their own
KINDS = {
    "low_start": "low from the start",
    "sudden_drop": "sudden drop",
    "sustained_drop": "sustained drop",
    "dip": "dip",
    "recovered": "recovered",
}
STATISTICS = {
    "level": "how low it stands, smoothed",
    "drop": "how far below its own start",
    "cusum": "what added up below normal",
    "dip": "its lowest 16 tokens",
}
BASES = {
    "calibrated": "its own calibration",
    "parent": "another population's calibration",
    "self": "the median of these logs",
    "learning": "nothing: it is still learning",
}


class Provenance(Struct, kw_only=True):
    """Where an audit comes from.

    Attributes:
        made: when, RFC 3339 in UTC.
        version: of Anchorwatch.
        mode: `logs`, scored by a witness, or `events`, recorded responses.
        inputs: paths and URLs, as given.
        model: the witness.
        bundle_id: of the axis bundle.
        config_id: of the calibration that the deployments it names are judged by.
        settings: options and their values.
        files: what was written.
    """

    made: str
    version: str
    mode: str
    inputs: list[str]
    model: str
    bundle_id: str
    config_id: str
    settings: dict[str, str]
    files: list[str]


class PersonaPlane(NamedTuple):
    """The two persona components along which the Assistant Axis runs most, the first one towards the Assistant.

    Attributes:
        names: of the two components, as events carry them.
        signs: by which each is to be multiplied.
        centre: mean of the roles, before the signs.
        roles: centred places.
        towards: the axis in this plane.
    """

    names: tuple[str, str]
    signs: tuple[float, float]
    centre: tuple[float, float]
    roles: dict[str, tuple[float, float]]
    towards: tuple[float, float]

    def place(self, coordinates: Mapping[str, float]) -> tuple[float, float] | None:
        """Where a response lies; None where it was not measured on these components."""
        if any(name not in coordinates for name in self.names):
            return None
        x, y = (
            sign * (coordinates[name] - middle)
            for name, sign, middle in zip(self.names, self.signs, self.centre, strict=True)
        )
        return x, y


class Exchange(NamedTuple):
    """What was said at one turn: only with the auditor's consent."""

    turn: int
    asked: str
    answered: str
    cut: bool


class Told(Protocol):
    """A conversation as it was read from a log."""

    @property
    def origin(self) -> Origin:
        """Where it lies."""

    @property
    def messages(self) -> Sequence[Mapping[str, str]]:
        """Role and content of each."""


def persona_plane(bundle: Bundle) -> PersonaPlane | None:
    """The plane to draw; None where the bundle has fewer than two persona components."""
    space = persona_space_of(bundle)
    if space is None or len(space.components) < 2:
        return None
    basis = np.asarray(bundle.tensors["basis"], dtype=np.float64)[: len(space.components)]
    along = basis @ np.asarray(bundle.unit_axis(), dtype=np.float64)
    first, second = (int(i) for i in np.argsort(-np.abs(along), kind="stable")[:2])
    one, other = (-1.0 if along[first] < 0 else 1.0), (-1.0 if along[second] < 0 else 1.0)
    return PersonaPlane(
        names=(space.components[first], space.components[second]),
        signs=(one, other),
        centre=(space.centre[first], space.centre[second]),
        roles={
            role: (one * (at[first] - space.centre[first]), other * (at[second] - space.centre[second]))
            for role, at in space.roles.items()
        },
        towards=(abs(float(along[first])), abs(float(along[second]))),
    )


def exchanges(
    rows: Iterable[Row], read: Callable[[str], Iterable[Told | Skipped]]
) -> tuple[dict[str, Exchange], list[str]]:
    """The worst turn of each of these conversations, read again from its log.

    Args:
        rows: of conversations.
        read: a log's conversations and skipped records, by its path.

    Returns:
        By conversation id; and what could not be read again, in words.
    """
    wanted: dict[str, dict[int, Row]] = {}
    for row in rows:
        if row["record"] is not None and row["worst_turn"] is not None:
            wanted.setdefault(row["source"], {})[row["record"]] = row
    found: dict[str, Exchange] = {}
    problems = []
    for source, records in wanted.items():
        if source == "-":
            problems.append("standard input can't be read a second time: no text of it is shown")
            continue
        left = dict(records)
        for told in read(source):
            if isinstance(told, Skipped) or told.origin.record not in left:
                continue
            row = left.pop(told.origin.record)
            if row["conversation_id"].startswith(told.origin.conversation_id[:64]):
                said = _exchange(told.messages, row["worst_turn"])
                if said is not None:
                    found[row["conversation_id"]] = said
            if not left:
                break
        if left:
            problems.append(f"{source}: {len(left)} conversations are no longer there")
    return found, problems


def _exchange(messages: Sequence[Mapping[str, str]], turn: int) -> Exchange | None:
    replies = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    if turn >= len(replies):
        return None
    at = replies[turn]
    asked = next((messages[i]["content"] for i in range(at - 1, -1, -1) if messages[i]["role"] == "user"), "")
    answered = messages[at]["content"]
    return Exchange(
        turn,
        plain(asked[:LONGEST_TEXT], None, lines=True),
        plain(answered[:LONGEST_TEXT], None, lines=True),
        max(len(asked), len(answered)) > LONGEST_TEXT,
    )


def plain(text: object, longest: int | None = LONGEST_NAME, *, lines: bool = False) -> str:
    """Text that can be shown: what is invisible or turns letters around is written out, what is long cut."""
    shown = str(text)
    if longest is not None and len(shown) > longest:
        half = (longest - 1) // 2
        shown = f"{shown[:half]}…{shown[-half:]}"
    allowed = "\n\t\u200c\u200d" if lines else ""  # those two join letters of some scripts, and emoji
    return "".join(
        letter
        if letter.isprintable() or unicodedata.category(letter) == "Zs" or letter in allowed
        else f"\\u{{{ord(letter):x}}}"
        for letter in shown
    )


class _Drawn(NamedTuple):
    """One conversation of the page."""

    rank: int
    row: Row
    kinds: str
    spark: Spark | None
    trajectory: Trajectory | None
    says: str
    statistics: list[tuple[str, str, float, float, float]]
    episodes: list[str]
    turns: list[Row]
    left_out: int
    exchange: Exchange | None
    promise: str
    certified: bool


def html_report(
    summary: Summary,
    provenance: Provenance,
    top: Sequence[Row],
    turns: Mapping[str, Sequence[Row]],
    others: Sequence[Row],
    plane: PersonaPlane | None,
    *,
    exchanges: Mapping[str, Exchange] | None = None,
    problems: Sequence[str] = (),
) -> str:
    """The whole page.

    Args:
        top: rows of the conversations to draw, riskiest first.
        turns: their turns, by conversation id.
        others: rows of more conversations for the map.
        exchanges: what was said at the worst turns; None without consent, and then no text is in the page.
        problems: what the reader must know of the audit itself.

    Raises:
        ConfigurationError: jinja2 is not installed.
    """
    known = {one.deployment: one for one in summary.deployments}
    reach = reach_of(
        [turn for talk in turns.values() for turn in talk],
        [one.boundaries.level for one in summary.deployments if one.boundaries is not None],
    )
    drawn = [_drawn(rank, row, turns, known, exchanges, reach) for rank, row in enumerate(top, 1)]
    page: str = template().render(
        summary=summary,
        provenance=provenance,
        verdicts=VERDICTS,
        headline=headline(summary),
        certified=[one for one in summary.deployments if one.certified],
        uncertified=[one for one in summary.deployments if not one.certified],
        cards=[one for one in summary.deployments if one.baseline is not None][:MOST_CARDS],
        drawn=drawn,
        map=None if plane is None else _map(plane, top, others),
        plane=plane,
        problems=list(problems),
        with_text=exchanges is not None,
        bases=BASES,
        statistics=STATISTICS,
        shares=_shares(summary.verdicts),
        deployment_shares=lambda one: _shares(one.verdicts),
    )
    return page


def template() -> Any:
    """The page's template, which escapes all that it is given.

    Raises:
        ConfigurationError: jinja2 is not installed.
    """
    try:
        from jinja2 import Environment, StrictUndefined
    except ImportError as error:
        raise needs("jinja2") from error
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"plain": plain, "number": _number, "percent": _percent, "z": _signed}
    return environment.from_string(files("monitor").joinpath(TEMPLATE).read_text(encoding="utf-8"))


def headline(summary: Summary) -> str:
    """The first sentence: how many, and how many of them drift."""
    critical, warning, healthy, unscored = (summary.verdicts[verdict] for verdict in VERDICTS)
    if not summary.conversations:
        return "No conversation could be audited."
    if not critical + warning + healthy:
        return f"{_count(summary.conversations, 'conversation')} read, and none of them could be judged."
    judged = _count(summary.conversations - unscored, "conversation")
    if not critical and not warning:
        return f"{judged} judged. None of them warns."
    parts = [f"{_number(critical)} critical"] if critical else []
    parts += [f"{_number(warning)} {'more ' if critical else ''}at warning"] if warning else []
    return f"{judged} judged: {', '.join(parts)}."


def _drawn(
    rank: int,
    row: Row,
    turns: Mapping[str, Sequence[Row]],
    known: Mapping[str, DeploymentSummary],
    told: Mapping[str, Exchange] | None,
    reach: tuple[float, float],
) -> _Drawn:
    all_turns = turns.get(row["conversation_id"], [])
    deployment = known.get(row["deployment"])
    boundaries = deployment.boundaries if deployment else None
    trajectory = None
    statistics = []
    if boundaries is not None and row["risk"] is not None:
        trajectory = trajectory_of(
            all_turns,
            row["episodes"],
            level_boundary=boundaries.level,
            critical_factor=boundaries.critical_factor,
        )
        statistics = [
            (name, says, row[f"max_{name}"], limit, row[f"max_{name}"] / limit)
            for name, says in STATISTICS.items()
            for limit in [float(getattr(boundaries, name))]
        ]
    listed = _listed(all_turns)
    return _Drawn(
        rank=rank,
        row=row,
        kinds=", ".join(KINDS.get(kind, kind) for kind in row["kinds"]),
        spark=spark_of(all_turns, boundaries.level if boundaries else None, row["worst_turn"], reach),
        trajectory=trajectory,
        says=_in_words(row, all_turns),
        statistics=statistics,
        episodes=[_episode(one) for one in row["episodes"]],
        turns=listed,
        left_out=len(all_turns) - len(listed),
        exchange=told.get(row["conversation_id"]) if told else None,
        promise=_promise(deployment, row),
        certified=deployment.certified if deployment else False,
    )


def _promise(deployment: DeploymentSummary | None, row: Row) -> str:
    """What stands behind this verdict: a warning may be certified, and the critical one above it a choice."""
    if deployment is None:
        return "not certified for this population"
    chosen = row["verdict"] == "critical" and deployment.certified and row["certification"] != "certified"
    return deployment.says + ("; where critical begins is a choice, and not certified" if chosen else "")


def _listed(turns: Sequence[Row]) -> list[Row]:
    """The turns of a table: all, or of very many those with findings and the lowest."""
    if len(turns) <= MOST_ROWS:
        return list(turns)
    lowest = {id(turn) for turn in thinned(turns, MOST_ROWS // 2)}
    kept = [turn for turn in turns if turn["findings"] or id(turn) in lowest]
    return kept[:MOST_ROWS]


def _in_words(row: Row, turns: Sequence[Row]) -> str:
    """What the picture shows, for who can't see it."""
    judged = [turn for turn in turns if turn["z"] is not None]
    if not judged:
        return "Nothing of this conversation was judged."
    lowest = min(judged, key=lambda turn: turn["z"])
    episodes = " ".join(_episode(one) + "." for one in row["episodes"]) or "No episode."
    return (
        f"z over {_count(len(judged), 'response')}: from {_signed(judged[0]['z'])} to {_signed(judged[-1]['z'])}, "
        f"lowest {_signed(lowest['z'])} at turn {lowest['turn']}; "
        f"largest risk {row['risk']:.2f} at turn {row['worst_turn']}. {episodes}"
    )


def _episode(episode: Mapping[str, Any]) -> str:
    kind = KINDS.get(episode["kind"], episode["kind"])
    first, last = episode["first_turn"], episode["last_turn"]
    where = f"at turn {first}" if first == last else f"from turn {first} to {last}"
    end = "recovered" if episode["recovered"] else "not recovered"
    return f"{kind.capitalize()} {where}, {episode['severity']}, {end}"


def _map(plane: PersonaPlane, top: Sequence[Row], others: Sequence[Row]) -> Map:
    marks = []
    wanted: list[str] = []
    for rank, row in enumerate([*top, *others], 1):
        place = plane.place(row["coordinates"])
        if place is None:
            continue
        name = str(rank) if rank <= min(len(top), 5) else ""
        title = (
            f"{plain(row['conversation_id'], 60)}: {row['verdict']}, turn {row['worst_turn']}, risk {row['risk']:.2f}"
        )
        marks.append((*place, row["verdict"], name, title))
        if rank <= min(len(top), 12):
            wanted += row["nearest_roles"][:1]
    return map_of(plane.roles, marks, plane.towards, list(dict.fromkeys(wanted)))


def _shares(verdicts: Mapping[str, int]) -> list[tuple[str, int, float]]:
    """Verdict, count, and share in percent; those that occur."""
    total = sum(verdicts.values())
    return [
        (verdict, verdicts[verdict], 100.0 * verdicts[verdict] / total) for verdict in VERDICTS if verdicts[verdict]
    ]


def _number(value: float, digits: int = 0) -> str:
    return f"{value:,.{digits}f}".replace(",", "\u202f").replace("-", "−")


def _signed(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}".replace("-", "−")


def _percent(share: float) -> str:
    """Enough digits to tell a small share from none."""
    percent = 100.0 * share
    digits = 0 if percent in (0.0, 100.0) else 1 if percent >= 1.0 else 2
    return f"{percent:.{digits}f}\u202f%"


def _count(number: int, what: str) -> str:
    return f"{_number(number)} {what}{'' if number == 1 else 's'}"


def summary_json(summary: Summary, provenance: Provenance) -> bytes:
    """Everything that the summary says, for machines. No row of a conversation carries text."""
    return msgspec.json.format(
        msgspec.json.encode({**msgspec.structs.asdict(summary), "provenance": provenance}), indent=1
    )


def print_summary(summary: Summary, provenance: Provenance, console: Console, problems: Sequence[str] = ()) -> None:
    """The summary on a terminal."""
    console.print(f"[bold]{escape(headline(summary))}[/]", highlight=False)
    console.print(
        f"{_count(summary.turns, 'turn')}, {_number(summary.scored_turns)} judged; "
        + ", ".join(f"{verdict} {_number(summary.verdicts[verdict])}" for verdict in VERDICTS),
        highlight=False,
    )
    if summary.deployments:
        console.print(_deployment_table(summary.deployments[:20]))
        for one in summary.deployments[:20]:
            sign = "[green]✓[/]" if one.certified else "[bold yellow]![/]"
            console.print(f"{sign} {escape(plain(one.deployment, 40))}: {escape(one.says)}", highlight=False)
        if len(summary.deployments) > 20:
            console.print(f"… and {len(summary.deployments) - 20} more deployments", highlight=False)
    if summary.riskiest:
        console.print(_riskiest_table(summary.riskiest))
    if summary.skipped:
        console.print(f"Skipped: {_number(summary.skipped)}", highlight=False)
        for reason, number in list(summary.reasons.items())[:10]:
            console.print(f"  {_number(number)} × {escape(plain(reason, 200))}", highlight=False)
    for problem in problems:
        console.print(f"[bold yellow]note:[/] {escape(plain(problem, 400))}", highlight=False)
    for path in provenance.files:
        console.print(f"  {escape(path)}", highlight=False, soft_wrap=True)


def _deployment_table(deployments: Sequence[DeploymentSummary]) -> Table:
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("deployment", overflow="fold")
    for name in (*VERDICTS, "warn or worse"):
        table.add_column(name, justify="right", no_wrap=True)
    for one in deployments:
        table.add_row(
            escape(plain(one.deployment, 40)),
            *(_number(one.verdicts[verdict]) for verdict in VERDICTS),
            _interval(one.flagged),
        )
    return table


def _interval(share: Share) -> str:
    if not share.of:
        return "–"
    return f"{_percent(share.count / share.of)} ({_percent(share.low)}–{_percent(share.high)})"


def _riskiest_table(rows: Sequence[Row]) -> Table:
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("risk", justify="right", no_wrap=True)
    table.add_column("verdict", no_wrap=True)
    table.add_column("riskiest", overflow="fold")
    table.add_column("deployment", overflow="fold")
    table.add_column("what")
    table.add_column("turn", justify="right", no_wrap=True)
    table.add_column("nearest role")
    for row in rows:
        table.add_row(
            f"{row['risk']:.2f}",
            row["verdict"],
            escape(plain(row["conversation_id"], 48)),
            escape(plain(row["deployment"], 32)),
            ", ".join(KINDS.get(kind, kind) for kind in row["kinds"]),
            str(row["worst_turn"]),
            row["nearest_roles"][0] if row["nearest_roles"] else "",
        )
    return table

"""An audit: every conversation folded as a worker would fold it, into rows, counts and a verdict each.

It knows scored conversations and recorded responses, the fold, and the tables that rows go to. It does not know how
text is scored, how a log is read, or what the report looks like.

Verdict: the worst finding of the conversation, `healthy`, `warning` or `critical`. A conversation of which nothing was
judged (no turn could be scored, or its deployment is still learning) is `unscored`: it stays in the table, so that the
rows are all conversations that could be read, and it is neither healthy nor not.

Live = audit. Recorded responses go through the same fold, one state per conversation, in log order, with the
configuration that a worker would have; so the same events in the same order give the same findings. What a worker would
bury is counted as skipped, with its place. Only one thing differs: where most records are poison a worker pauses until
somebody has looked, an audit says so and goes on.

Memory does not grow with the log. Logged conversations are judged one by one; recorded ones, which may lie between each
other, wait in a temporary SQLite file with a small cache.
"""

from __future__ import annotations

import hashlib
import heapq
import sqlite3
from collections import Counter, OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import count
from typing import Any, Protocol

import msgspec
from msgspec import Struct
from msgspec.structs import replace

from monitor.batch import Poison, fold_one
from monitor.detect.baseline import Baseline, Boundaries
from monitor.detect.budget import exact_interval
from monitor.detect.conversation import ConversationState, Statistics, Step, step
from monitor.events import Projection, Severity
from monitor.origin import Origin, Skipped
from monitor.populations import Basis, Population, Populations, SelfSample, is_live
from monitor.recorded import Recorded
from monitor.tables import LARGEST_INTEGER, Row, Tables, read_turns

__all__ = [
    "VERDICTS",
    "Audit",
    "DeploymentSummary",
    "Scored",
    "Share",
    "Summary",
    "read_turns",
    "scored_id",
    "self_sample_of",
]

VERDICTS = ("critical", "warning", "healthy", "unscored")  # worst first
RISKIEST = 10  # in the summary
PLACES = 50  # of skipped records in the summary
MOST_REASONS = 200
MOST_DEPLOYMENTS = 200
OTHERS = "(others)"
CACHED = 10_000  # conversations of a topic in memory
_LONGEST_ID = 256
_ORDER: Mapping[Severity, int] = {"info": 0, "warning": 1, "critical": 2}


class Scored(Protocol):
    """Conversations of one log, scored: what a witness hands over."""

    @property
    def origins(self) -> Sequence[Origin]:
        """Every conversation, in the log's order."""

    @property
    def projections(self) -> Sequence[Projection]:
        """By conversation in the same order, then by turn."""

    @property
    def skipped(self) -> Sequence[Skipped]:
        """Records and turns that could not be scored."""

    @property
    def notes(self) -> Sequence[str]:
        """What the witness has to say of all of it."""


class Share(Struct, frozen=True):
    """A share of conversations with its exact (Clopper-Pearson) 95 % interval."""

    count: int
    of: int
    low: float
    high: float

    @staticmethod
    def make(number: int, of: int) -> Share:
        """The share and its interval."""
        if number <= of // 2:
            return Share(number, of, *exact_interval(number, of))
        low, high = exact_interval(of - number, of)  # fewer terms
        return Share(number, of, 1.0 - high, 1.0 - low)


class DeploymentSummary(Struct, kw_only=True):
    """One population: how it was judged, and what came of it.

    Attributes:
        basis: whose normal it was judged by; None for the deployments that are lumped together.
        flagged, critical: shares of the conversations that were judged.
        says: whether its budget is certified, in words.
    """

    deployment: str
    basis: Basis | None
    conversations: int
    turns: int
    scored_turns: int
    verdicts: dict[str, int]
    flagged: Share
    critical: Share
    baseline: Baseline | None
    boundaries: Boundaries | None
    config_id: str | None
    certified: bool
    says: str


class Summary(Struct, kw_only=True):
    """What an audit came to.

    Attributes:
        verdicts: conversations by verdict.
        outcomes: responses by what the fold did with them.
        deployments: most conversations first.
        riskiest: rows of the riskiest conversations, riskiest first.
        skipped: records and turns that were not audited; `reasons` counts them, `places` are the first 50.
        notes: what was done to records to read and score them, by how often.
        repeated_ids: conversations whose id had been used before in the logs.
    """

    conversations: int
    turns: int
    scored_turns: int
    verdicts: dict[str, int]
    outcomes: dict[str, int]
    deployments: list[DeploymentSummary]
    riskiest: list[Row]
    skipped: int
    reasons: dict[str, int]
    places: list[Skipped]
    notes: dict[str, int]
    repeated_ids: int


class _Maxima(Struct, array_like=True):
    """The largest of each statistic."""

    level: float
    drop: float
    cusum: float
    dip: float


class _Episode(Struct):
    id: str
    first_turn: int
    last_turn: int
    kind: str
    severity: str
    recovered: bool


class _Account(Struct):
    """What is known of one conversation while it is being judged."""

    conversation_id: str
    source: str
    record: int | None = None
    user: str | None = None
    turns: int = 0
    notes: list[str] = []
    skipped: list[tuple[int, str]] = []
    state: ConversationState | None = None
    deployment: str = ""
    model: str = ""
    live: bool = False
    time: str | None = None
    scored: int = 0
    worst: Severity = "info"
    kinds: list[str] = []
    episodes: list[_Episode] = []
    risk: float | None = None
    worst_turn: int | None = None
    coordinates: dict[str, float] = {}
    lowest_z: float | None = None
    z_sum: float = 0.0
    maxima: _Maxima | None = None


class Audit:
    """Takes conversations or recorded responses, writes rows, and keeps what the summary and the report need.

    Args:
        populations: how each deployment is judged.
        tables: where rows go.
        top: how many of the riskiest conversations are kept for the report.
        others: how many of the other conversations are kept for its map, chosen by the hash of their names.
    """

    def __init__(self, populations: Populations, tables: Tables, *, top: int = 100, others: int = 400) -> None:
        self._populations = populations
        self._tables = tables
        self._riskiest = _Kept(max(top, RISKIEST))
        self._sample = _Kept(others)
        self._top = top
        self._ids = _Ids()
        self._tallies: dict[str, _Tally] = {}
        self._outcomes: Counter[str] = Counter()
        self._reasons: Counter[str] = Counter()
        self._notes: Counter[str] = Counter()
        self._places: list[Skipped] = []
        self._skipped = 0
        self._repeated = 0

    def take(self, scored: Scored) -> None:
        """Judge some conversations of a log, and write their rows."""
        for note in scored.notes:
            self._note(note)
        skipped: dict[tuple[str, int], list[Skipped]] = {}
        for one in scored.skipped:
            self._skip(one)
            skipped.setdefault((one.source, one.record), []).append(one)
        for origin, events in conversations(scored):
            self._judge(origin, events, skipped.get((origin.source, origin.record), []))

    def take_events(self, records: Iterable[Recorded]) -> None:
        """Judge recorded responses in log order, and write their rows; to be called once, with all of them."""
        accounts = _Accounts()
        poison = taken = 0
        for source, number, event in records:
            taken += 1
            if isinstance(event, Poison):
                poison += 1
                self._skip(Skipped(source=source, record=number, reason=_said(event)))
                continue
            account = accounts.get(event.conversation_id)
            found = self._advance(account or _Account(event.conversation_id, source), event)
            if isinstance(found, Poison):
                poison += 1
                self._skip(
                    Skipped(
                        source=source,
                        record=number,
                        reason=_said(found),
                        conversation_id=event.conversation_id,
                        turn=min(event.turn, LARGEST_INTEGER),
                    )
                )
                continue
            accounts.put(found)
        if poison * 2 > taken:
            self._note("most of the records are no events that can be judged: a live worker would have paused")
        for account in accounts.all():
            state = account.state
            if state is not None:
                account.turns = state.folded + state.branches + state.late + state.unjudged + state.learning
            self._close(account)

    def finish(self) -> Summary:
        """The counts. The tables may be closed after it."""
        tallies = sorted(self._tallies.items(), key=lambda item: (item[0] == OTHERS, -item[1].conversations, item[0]))
        verdicts = {verdict: sum(tally.verdicts[verdict] for _, tally in tallies) for verdict in VERDICTS}
        if self._repeated:
            self._notes["conversation id used before in these logs: this one's got #2, #3 … after it"] = self._repeated
        return Summary(
            conversations=sum(verdicts.values()),
            turns=sum(tally.turns for _, tally in tallies),
            scored_turns=sum(tally.scored_turns for _, tally in tallies),
            verdicts=verdicts,
            outcomes=dict(self._outcomes.most_common()),
            deployments=[tally.summary(name) for name, tally in tallies],
            riskiest=[row for row in self._riskiest.best() if row["risk"] is not None][:RISKIEST],
            skipped=self._skipped,
            reasons=dict(self._reasons.most_common()),
            places=self._places,
            notes=dict(self._notes.most_common()),
            repeated_ids=self._repeated,
        )

    def drawn(self) -> tuple[list[Row], list[Row]]:
        """Rows of the riskiest conversations, riskiest first; and of some of the others."""
        top = self._riskiest.best()[: self._top]
        names = {row["conversation_id"] for row in top}
        return top, [row for row in self._sample.best() if row["conversation_id"] not in names]

    def _judge(self, origin: Origin, events: Sequence[Projection], skipped: Sequence[Skipped]) -> None:
        name, number = self._ids.unique(origin.conversation_id)
        account = _Account(
            name,
            origin.source,
            record=origin.record,
            user=origin.user,
            turns=origin.turns,
            deployment=origin.deployment,
            model=origin.deployment,
            notes=list(origin.notes),
        )
        for one in skipped:
            if one.turn is None:
                account.notes.append(one.reason)
            else:
                account.skipped.append((one.turn, one.reason))
        if number > 1:
            self._repeated += 1
            account.notes.append(f"the log has this conversation id more than once; this is number {number}")
            events = [replace(event, conversation_id=name) for event in events]
        for event in events:
            found = self._advance(account, event)
            if isinstance(found, Poison):
                reason = _said(found)
                account.skipped.append((event.turn, reason))
                self._skip(
                    Skipped(
                        source=origin.source,
                        record=origin.record,
                        reason=reason,
                        conversation_id=name,
                        turn=event.turn,
                    )
                )
        for note in origin.notes:
            self._note(note)
        self._close(account)

    def _advance(self, account: _Account, event: Projection) -> _Account | Poison:
        """Fold one response into its conversation, and write its row."""
        if max(event.turn, event.tokens, abs(event.layer)) > LARGEST_INTEGER:
            return Poison("unusable", "a number is beyond 64 bits")
        population = self._populations.judging(event)
        done = fold_one(account.state, event, population.config, step)
        if isinstance(done, Poison):
            return done
        self._outcomes[done.outcome] += 1
        self._tables.add("turns", _turn_row(event, done))
        account.state = done.state
        if done.outcome == "duplicate":
            return account
        account.deployment, account.model = event.deployment, event.model
        account.live = is_live(event)
        account.time = account.time or event.time
        if done.z is not None and done.risk is not None and done.statistics is not None:
            _measure(account, event, done.z, done.risk, done.statistics)
        _follow_episodes(account, event, done)
        return account

    def _close(self, account: _Account) -> None:
        """Write the conversation's row, and count it."""
        population = self._populations.of(account.deployment, live=account.live)
        row = _conversation_row(account, population)
        self._tables.add("conversations", row)
        name = account.deployment
        if name not in self._tallies and len(self._tallies) >= MOST_DEPLOYMENTS:
            name = OTHERS
        self._tallies.setdefault(name, _Tally(population)).add(row)
        risk = row["risk"]
        self._riskiest.offer((-1.0 if risk is None else risk,), row)
        if risk is not None:
            digest = hashlib.sha256(row["conversation_id"].encode(errors="surrogatepass")).digest()
            self._sample.offer((-int.from_bytes(digest[:6]),), row)

    def _skip(self, one: Skipped) -> None:
        self._skipped += 1
        reason = one.reason
        if reason not in self._reasons and len(self._reasons) >= MOST_REASONS:
            reason = "other reasons"
        self._reasons[reason] += 1
        if len(self._places) < PLACES:
            self._places.append(one)
        self._tables.add("skipped", msgspec.structs.asdict(one))

    def _note(self, note: str) -> None:
        if note in self._notes or len(self._notes) < MOST_REASONS:
            self._notes[note] += 1


def scored_id(source: str, record: int, turn: int) -> str:
    """The id of a witness's projection. It names the place in the logs: unique where conversation ids are not."""
    return hashlib.sha256(f"{source}\x1f{record}\x1f{turn}".encode(errors="surrogatepass")).hexdigest()[:32]


def conversations(scored: Scored) -> Iterator[tuple[Origin, list[Projection]]]:
    """Each conversation with its responses. They are told apart by place, since two may have one id."""
    at, events = 0, scored.projections
    for origin in scored.origins:
        first = at
        while at < len(events) and events[at].id == scored_id(origin.source, origin.record, events[at].turn):
            at += 1
        yield origin, list(events[first:at])
    if at < len(events):
        raise ValueError(f"a projection of turn {events[at].turn} belongs to no conversation of its shard")


def self_sample_of(populations: Populations, logs: Iterable[Scored], records: Iterable[Recorded]) -> SelfSample:
    """Go through everything once, for a baseline from the logs themselves."""
    sample = SelfSample(populations)
    for scored in logs:
        for origin, events in conversations(scored):
            for event in events:
                sample.add(f"{origin.source}\x1f{origin.record}", event)
    for one in records:
        if isinstance(one.event, Projection):
            sample.add(one.event.conversation_id, one.event)
    return sample


def _said(poison: Poison) -> str:
    """Why, in words. What can't be decoded may be anything, so nothing of it is repeated."""
    return poison.reason if poison.reason == "undecodable" else f"{poison.reason}: {poison.detail}"


def _measure(account: _Account, event: Projection, z: float, risk: float, statistics: Statistics) -> None:
    account.scored += 1
    account.z_sum += z
    account.lowest_z = z if account.lowest_z is None else min(account.lowest_z, z)
    before = account.maxima
    account.maxima = _Maxima(*statistics) if before is None else _Maxima(*map(max, _tuple(before), statistics))
    if account.risk is None or risk > account.risk:
        account.risk, account.worst_turn, account.coordinates = risk, event.turn, event.coordinates


def _tuple(maxima: _Maxima) -> tuple[float, float, float, float]:
    return maxima.level, maxima.drop, maxima.cusum, maxima.dip


def _follow_episodes(account: _Account, event: Projection, done: Step) -> None:
    for finding in done.findings:
        account.worst = max(account.worst, finding.severity, key=_ORDER.__getitem__)
        known = next((one for one in account.episodes if one.id == finding.episode_id), None)
        if known is None:
            known = _Episode(
                finding.episode_id, event.turn, event.turn, finding.kind, finding.severity, recovered=False
            )
            account.episodes.append(known)
            if finding.kind not in account.kinds:
                account.kinds.append(finding.kind)
        known.last_turn = event.turn
        if finding.kind == "recovered":
            known.recovered = True
        else:
            known.severity = finding.severity
    open_one = done.state.episode
    if open_one is not None and done.outcome == "folded" and account.episodes:
        account.episodes[-1].last_turn = event.turn


def _turn_row(event: Projection, done: Step) -> Row:
    row = msgspec.structs.asdict(event)
    row["windows"] = {"lowest": event.windows.lowest, "last": event.windows.last}
    statistics: Mapping[str, float | None] = (
        done.statistics._asdict() if done.statistics else dict.fromkeys(Statistics._fields)
    )
    last = done.findings[-1] if done.findings else None
    return row | {
        "outcome": done.outcome,
        "z": done.z,
        "risk": done.risk,
        **statistics,
        "kind": last.kind if last else None,
        "severity": last.severity if last else None,
        "findings": [
            {
                "id": finding.id,
                "kind": finding.kind,
                "severity": finding.severity,
                "statistic": finding.statistic,
                "value": finding.value,
                "boundary": finding.boundary,
                "risk": finding.risk,
                "episode_id": finding.episode_id,
                "nearest_roles": finding.nearest_roles,
            }
            for finding in done.findings
        ],
    }


def _conversation_row(account: _Account, population: Population) -> Row:
    boundaries, space = population.boundaries, population.config.persona_space
    maxima = _tuple(account.maxima) if account.maxima else (None,) * 4
    judged = account.scored > 0
    critical = account.worst == "critical"
    verdict = "unscored" if not judged else "healthy" if account.worst == "info" else account.worst
    state = account.state or ConversationState()
    return {
        "conversation_id": account.conversation_id,
        "deployment": account.deployment,
        "model": account.model,
        "source": account.source,
        "record": account.record,
        "user": account.user,
        "time": account.time,
        "turns": account.turns,
        "scored_turns": account.scored,
        "verdict": verdict,
        "kinds": account.kinds,
        "risk": account.risk,
        "worst_turn": account.worst_turn,
        "lowest_z": account.lowest_z,
        "mean_z": account.z_sum / account.scored if judged else None,
        **{f"max_{name}": value for name, value in zip(Statistics._fields, maxima, strict=True)},
        "episodes": [msgspec.structs.asdict(episode) for episode in account.episodes],
        "nearest_roles": space.nearest(account.coordinates) if space and account.coordinates else [],
        "coordinates": account.coordinates,
        "baseline": population.basis,
        "certification": "uncertified"
        if not judged
        else boundaries.critical_certification
        if critical
        else boundaries.certification,
        "budget": None if not judged else boundaries.critical_budget if critical else boundaries.budget,
        "config_id": population.config.config_id if judged else None,
        "duplicates": state.duplicates,
        "branches": state.branches,
        "late": state.late,
        "skipped": [{"turn": turn, "reason": reason} for turn, reason in account.skipped],
        "notes": account.notes,
    }


class _Tally:
    """The counts of one deployment."""

    def __init__(self, population: Population) -> None:
        self.population = population
        self.conversations = self.turns = self.scored_turns = 0
        self.verdicts: Counter[str] = Counter()

    def add(self, row: Row) -> None:
        self.conversations += 1
        self.turns += row["turns"]
        self.scored_turns += row["scored_turns"]
        self.verdicts[row["verdict"]] += 1

    def summary(self, name: str) -> DeploymentSummary:
        population = None if name == OTHERS else self.population
        judged = self.conversations - self.verdicts["unscored"]
        boundaries = population.boundaries if population and population.baseline else None
        return DeploymentSummary(
            deployment=name,
            basis=population.basis if population else None,
            conversations=self.conversations,
            turns=self.turns,
            scored_turns=self.scored_turns,
            verdicts={verdict: self.verdicts[verdict] for verdict in VERDICTS},
            flagged=Share.make(self.verdicts["critical"] + self.verdicts["warning"], judged),
            critical=Share.make(self.verdicts["critical"], judged),
            baseline=population.baseline if population else None,
            boundaries=boundaries,
            config_id=population.config.config_id if population else None,
            certified=boundaries is not None and boundaries.certification == "certified",
            says=_promise(population),
        )


def _promise(population: Population | None) -> str:
    """What may be relied on, in words."""
    if population is None:
        return "not certified for these populations"
    boundaries, basis = population.boundaries, population.basis
    match basis:
        case "learning":
            return "learning: no baseline, so nothing was judged"
        case "self":
            return (
                "not certified for this population: judged by the median of these logs themselves, as if most of their "
                "conversations were healthy"
            )
        case "parent":
            lender = population.lender or "another"
            return f"not certified for this population: judged by the baseline and boundaries of {lender}"
        case _ if boundaries.certification == "certified" and boundaries.budget is not None:
            return f"certified: at most {boundaries.budget:.2%} of healthy conversations warn".replace(".00%", "%")
        case _:
            return "not certified: its own baseline, but nothing is promised for its boundaries"


class _Kept:
    """The rows with the largest keys; of equal ones the first."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._heap: list[tuple[Any, ...]] = []
        self._number = count()

    def offer(self, key: tuple[float, ...], row: Row) -> None:
        item = (*key, -next(self._number), row)
        if len(self._heap) < self._most:
            heapq.heappush(self._heap, item)
        elif self._heap and item[:-1] > self._heap[0][:-1]:
            heapq.heapreplace(self._heap, item)

    def best(self) -> list[Row]:
        return [item[-1] for item in sorted(self._heap, key=lambda item: item[:-1], reverse=True)]


def _scratch() -> sqlite3.Connection:
    """A database in a temporary file that goes with it; only its cache is in memory."""
    connection = sqlite3.connect("", isolation_level=None)
    connection.execute("PRAGMA cache_size=-16384")  # KiB
    connection.execute("PRAGMA journal_mode=OFF")
    connection.execute("PRAGMA synchronous=OFF")
    connection.execute("BEGIN")
    return connection


class _Ids:
    """Which conversation ids the logs have used."""

    def __init__(self) -> None:
        self._database = _scratch()
        self._database.execute("CREATE TABLE ids (digest BLOB PRIMARY KEY, number INTEGER NOT NULL) WITHOUT ROWID")

    def unique(self, name: str) -> tuple[str, int]:
        """The id, with `#2`, `#3` … after it where it was used before; and which use this is."""
        number = self._use(name)
        unique, at = name, number
        while at > 1:
            suffix = f"#{at}"
            unique = name[: _LONGEST_ID - len(suffix)] + suffix
            if self._use(unique) == 1:
                break
            at += 1  # the log itself has an id that looks like ours
        return unique, number

    def _use(self, name: str) -> int:
        digest = hashlib.sha256(name.encode(errors="surrogatepass")).digest()[:16]
        (number,) = self._database.execute(
            "INSERT INTO ids VALUES (?, 1) ON CONFLICT DO UPDATE SET number = number + 1 RETURNING number", (digest,)
        ).fetchone()
        return int(number)


class _Accounts:
    """The conversations of a topic, the latest in memory."""

    def __init__(self) -> None:
        self._database = _scratch()
        self._database.execute("CREATE TABLE accounts (number INTEGER PRIMARY KEY, name TEXT UNIQUE, data BLOB)")
        self._cache: OrderedDict[str, _Account] = OrderedDict()
        self._decoder = msgspec.json.Decoder(_Account)

    def get(self, name: str) -> _Account | None:
        """What is known of it."""
        if name in self._cache:
            return self._cache[name]
        row = self._database.execute("SELECT data FROM accounts WHERE name = ?", (name,)).fetchone()
        return self._decoder.decode(row[0]) if row else None

    def put(self, account: _Account) -> None:
        """Remember it."""
        if account.conversation_id not in self._cache:  # its number is its place in the log
            self._database.execute(
                "INSERT OR IGNORE INTO accounts (name, data) VALUES (?, ?)", (account.conversation_id, b"")
            )
        self._cache[account.conversation_id] = account
        self._cache.move_to_end(account.conversation_id)
        if len(self._cache) > CACHED:
            self._write(self._cache.popitem(last=False)[1])

    def all(self) -> Iterator[_Account]:
        """Every one, in the order in which they first appeared."""
        for account in self._cache.values():
            self._write(account)
        self._cache.clear()
        for (data,) in self._database.execute("SELECT data FROM accounts ORDER BY number"):
            yield self._decoder.decode(data)

    def _write(self, account: _Account) -> None:
        self._database.execute(
            "UPDATE accounts SET data = ? WHERE name = ?", (msgspec.json.encode(account), account.conversation_id)
        )

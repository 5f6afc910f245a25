"""Promises of the audit: live = audit, every response comes back, nothing half-written, nothing falsely certified."""

from __future__ import annotations

import dataclasses
import gzip
import json
import math
import random
import resource
import signal
import sqlite3
import subprocess
import sys
import time
import tracemalloc
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace
from service import AXIS, CONFIG, POISON, message, projection, traffic
from tiny import environment, here

from monitor import audit as audit_module
from monitor import tables as tables_module
from monitor.audit import Audit, Summary, read_turns, scored_id, self_sample_of
from monitor.auditor import Sources, run_audit
from monitor.axis.bundle import load_bundle, resolve_bundle
from monitor.database import sqlite_url
from monitor.detect.baseline import DetectorConfig, fit_baseline, robust_baseline, without_promise
from monitor.detect.budget import exact_interval
from monitor.detect.configure import detector_config
from monitor.detect.conversation import step
from monitor.errors import ConfigurationError, EventError
from monitor.events import Projection, Windows, encode
from monitor.origin import Origin, Skipped
from monitor.populations import SELF_LEAST, WITNESS, Populations, SelfSample, populations
from monitor.recorded import read_events
from monitor.report import Provenance
from monitor.store.sqlite import SqliteStore
from monitor.stream.log import PROJECTIONS, EmbeddedLog, Message
from monitor.tables import COLUMNS, Row, Tables, arrow_type, read_rows
from monitor.worker import Worker

pytest_plugins = ["miniature"]

ROOT = Path(__file__).parent.parent
FORMS = ("parquet", "jsonl")


@dataclasses.dataclass
class Shard:
    """What a witness hands over, made by hand."""

    origins: list[Origin] = dataclasses.field(default_factory=list)
    projections: list[Projection] = dataclasses.field(default_factory=list)
    skipped: list[Skipped] = dataclasses.field(default_factory=list)
    notes: list[str] = dataclasses.field(default_factory=list)

    def add(
        self, name: str, values: Sequence[float | None], *, source: str = "a.jsonl", deployment: str = "shop"
    ) -> Shard:
        """One conversation; None is a turn that could not be scored."""
        record = len(self.origins) + 1
        for turn, value in enumerate(values):
            if value is None:
                reason = "no token of this reply can be scored"
                self.skipped.append(
                    Skipped(source=source, record=record, reason=reason, conversation_id=name, turn=turn)
                )
                continue
            event = projection(name, turn, value, deployment=deployment)
            self.projections.append(replace(event, id=scored_id(source, record, turn), source=WITNESS))
        origin = Origin(
            conversation_id=name, deployment=deployment, source=source, record=record, turns=len(values), notes=("n",)
        )
        self.origins.append(origin)
        return self


def audited(out: Path, *shards: Shard, pops: Populations | None = None, form: Any = "jsonl") -> Summary:
    tables = Tables(out, form)
    audit = Audit(pops or Populations(CONFIG), tables)
    for shard in shards:
        audit.take(shard)
    summary = audit.finish()
    tables.commit()
    return summary


def audited_events(out: Path, place: str, pops: Populations | None = None, form: Any = "jsonl") -> Summary:
    tables = Tables(out, form)
    audit = Audit(pops or Populations(CONFIG), tables)
    audit.take_events(read_events(place))
    summary = audit.finish()
    tables.commit()
    return summary


def rows(out: Path, table: str, form: str = "jsonl") -> list[Row]:
    return list(read_rows(out / f"{table}.{form}"))


def by_id(out: Path, form: str = "jsonl") -> dict[str, Row]:
    found = rows(out, "conversations", form)
    assert len({row["conversation_id"] for row in found}) == len(found)
    return {row["conversation_id"]: row for row in found}


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def shipped() -> tuple[Any, DetectorConfig]:
    bundle = load_bundle(resolve_bundle("smollm2"))
    return bundle, detector_config(bundle)


def events_at(config: DetectorConfig, name: str, zs: Iterable[float], deployment: str = "smollm2") -> list[Projection]:
    """Responses that the bundle's own readout puts at these z."""
    weights = config.readout.coordinates
    baseline = next(iter(config.baselines.values()))
    size = math.fsum(weight * weight for weight in weights.values())
    places = [f"pc{n}" for n in range(1, 9)]

    def at(value: float) -> dict[str, float]:
        return {**dict.fromkeys(places, 1.0), **{key: weight * value / size for key, weight in weights.items()}}

    prompt = dict.fromkeys([*config.readout.prompt, *places], 0.0)
    made = []
    for turn, z in enumerate(zs):
        event = projection(name, turn, 0.0, deployment=deployment)
        shift = math.fsum(
            config.readout.coordinates.get(key, 0.0) for key in places if key not in weights
        )  # zero: a place that is no part of the readout adds nothing
        here = at(baseline.mean + z * baseline.standard_deviation - shift)
        lowest = at(baseline.window_mean + z * baseline.window_standard_deviation - shift)
        made.append(
            replace(
                event,
                axis_id=config.axis_id,
                coordinates=here,
                prompt=prompt,
                windows=Windows(lowest=lowest, last=here),
            )
        )
    return made


def dump(path: Path, events: Iterable[Projection | bytes]) -> Path:
    path.write_bytes(b"".join((one if isinstance(one, bytes) else encode(one)) + b"\n" for one in events))
    return path


# Live = audit


def awkward() -> list[Message]:
    """Conversations side by side, with everything that a log may hold."""
    chance = random.Random(5)
    messages = traffic(24, 14, poison=0.04, seed=3)
    messages += [message(projection("c3", 40, -1.0)), message(projection("c3", 2, -9.0, resent="late"))]
    messages += [message(projection("c1", turn, 3.0, resent=f"branch {turn}")) for turn in range(5)]
    messages += [message(projection("new", turn, deployment="nobody's")) for turn in range(4)]
    messages += [message(replace(projection("other", turn), axis_id="another axis")) for turn in range(3)]
    messages += [message(replace(projection("odd", 0), coordinates={"else": 1.0}))]
    messages += [message(replace(projection("c5", 99, -4.0, resent="next day"), time="2026-02-01T00:00:00Z"))]
    messages += [Message("someone", encode(projection("c1", 50)))]
    chance.shuffle(messages)
    return messages


@pytest.fixture
def live(tmp_path: Path) -> tuple[EmbeddedLog, SqliteStore]:
    """A log and what a real worker has made of it."""
    log, store = EmbeddedLog(tmp_path / "log.db"), SqliteStore(tmp_path / "store.db")
    log.append(PROJECTIONS, awkward())
    worker = Worker(log, store, CONFIG, batch_size=17)
    while worker.run_once():
        pass
    assert not worker.paused
    return log, store


@pytest.mark.parametrize("form", FORMS)
def test_the_same_events_give_the_same_findings_as_the_worker(
    live: tuple[EmbeddedLog, SqliteStore], tmp_path: Path, form: Any
) -> None:
    log, store = live
    summary = audited_events(tmp_path / "out", sqlite_url(tmp_path / "log.db"), form=form)
    told = [one.finding for one in store.pending(1_000_000)]
    turns = rows(tmp_path / "out", "turns", form)
    found = [(row["conversation_id"], row["turn"], one) for row in turns for one in row["findings"]]
    assert [one["id"] for _, _, one in found] == [finding.id for finding in told]
    for (name, turn, one), finding in zip(found, told, strict=True):
        assert (name, turn) == (finding.conversation_id, finding.turn)
        assert one == {key: getattr(finding, key) for key in one}
    counts = store.counts()
    assert summary.skipped == counts.pop("dead_letter")
    assert summary.outcomes == counts
    assert {"duplicate", "branch", "late", "unjudged", "learning", "folded"} == set(counts)
    seen = by_id(tmp_path / "out", form)
    worst: dict[str, str] = {}
    for finding in told:
        if finding.severity != "info":
            worst[finding.conversation_id] = max(
                worst.get(finding.conversation_id, "a"), finding.severity, key="awarningcritical".find
            )
    for session in store.sessions(1000):
        row = seen.pop(session.conversation_id)
        judged = session.risk is not None or row["scored_turns"]
        assert row["verdict"] == worst.get(session.conversation_id, "healthy" if judged else "unscored")
        assert row["turns"] == session.responses
        assert not judged or row["config_id"] == CONFIG.config_id
    assert not seen
    skipped = rows(tmp_path / "out", "skipped", form)
    reasons = Counter(row["reason"].split(":")[0] for row in skipped)
    assert set(reasons) == {"undecodable", "wrong_key", "unusable"}
    places = {row["record"] for row in skipped}
    assert all(f"{PROJECTIONS}/0" in row["source"] for row in skipped)
    letters = log.read("anchorwatch.dead-letters", 0, 0, 1000)
    assert {int(letter.key.rpartition("/")[2]) + 1 for letter in letters} == places


def test_a_dump_is_judged_as_its_topic(live: tuple[EmbeddedLog, SqliteStore], tmp_path: Path) -> None:
    log, _ = live
    records = [record for record in log.read(PROJECTIONS, 0, 0, 10_000) if record.key != "someone"]
    plain = tmp_path / "dump.jsonl"
    plain.write_bytes(b"".join(record.value + b"\n" for record in records))
    zipped = tmp_path / "dump.gz"
    zipped.write_bytes(gzip.compress(plain.read_bytes()))
    audited_events(tmp_path / "topic", sqlite_url(tmp_path / "log.db"))
    for name, place in (("plain", plain), ("zipped", zipped)):
        audited_events(tmp_path / name, str(place))
        assert rows(tmp_path / name, "turns") == rows(tmp_path / "topic", "turns")


@pytest.mark.parametrize("form", FORMS)
def test_an_audit_of_an_audits_turns_says_the_same(
    live: tuple[EmbeddedLog, SqliteStore], tmp_path: Path, form: Any
) -> None:
    first = audited_events(tmp_path / "one", sqlite_url(tmp_path / "log.db"), form=form)
    second = audited_events(tmp_path / "two", str(tmp_path / "one"), form=form)
    assert rows(tmp_path / "one", "turns", form) == rows(tmp_path / "two", "turns", form)
    assert first.verdicts == second.verdicts and first.outcomes == second.outcomes


def test_conversations_that_wait_on_disk_are_judged_alike(
    live: tuple[EmbeddedLog, SqliteStore], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = sqlite_url(tmp_path / "log.db")
    audited_events(tmp_path / "memory", url)
    monkeypatch.setattr(audit_module, "CACHED", 2)
    audited_events(tmp_path / "disk", url)
    for table in COLUMNS:
        assert rows(tmp_path / "memory", table) == rows(tmp_path / "disk", table)
    order = list(dict.fromkeys(row["conversation_id"] for row in rows(tmp_path / "memory", "turns")))
    assert [row["conversation_id"] for row in rows(tmp_path / "memory", "conversations")] == order


def test_what_is_appended_meanwhile_is_left_for_the_next_audit(tmp_path: Path) -> None:
    log = EmbeddedLog(tmp_path / "log.db")
    log.append(PROJECTIONS, [message(projection("a", turn)) for turn in range(700)])
    seen = 0
    for _ in read_events(sqlite_url(tmp_path / "log.db")):
        seen += 1
        if seen < 1000:
            log.append(PROJECTIONS, [message(projection("b", seen))])
    assert seen == 700
    path = dump(tmp_path / "dump.jsonl", [projection("a", turn) for turn in range(300)])
    seen = 0
    for _ in read_events(str(path)):
        seen += 1
        if seen < 1000:
            with path.open("ab") as file:
                file.write(encode(projection("b", seen)) + b"\n")
    assert seen == 300


def test_a_log_that_is_not_there_is_not_made(tmp_path: Path) -> None:
    for place in (sqlite_url(tmp_path / "none.db"), str(tmp_path / "none.jsonl"), str(tmp_path)):
        with pytest.raises(ConfigurationError) as caught:
            list(read_events(place))
        assert caught.value.cure
    assert not names(tmp_path)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b'{"messages": [{"role": "user", "content": "XQZSECRET"}]}', "undecodable"),
        (b"\xff\xfe binary \x00 XQZSECRET", "undecodable"),
        (b'{"time": "XQZSECRET"}', "undecodable"),
        (POISON, "undecodable"),
        (b"x" * (5 << 20), "too_long: the line is too long for a projection"),
    ],
)
def test_what_is_no_event_is_named_by_place_and_the_rest_is_judged(tmp_path: Path, content: bytes, reason: str) -> None:
    path = dump(tmp_path / "d.jsonl", [projection("a", 0), content, b"", projection("a", 1)])
    summary = audited_events(tmp_path / "out", str(path))
    assert summary.scored_turns == 2 and summary.reasons == {reason: 1}
    assert summary.places == [Skipped(source=str(path), record=2, reason=reason)]
    assert "XQZSECRET" not in repr(summary)


def test_a_dump_that_is_cut_off_gives_what_came_before(tmp_path: Path) -> None:
    path = tmp_path / "cut.gz"
    chance = random.Random(1)
    lines = b"".join(encode(projection("a", turn, chance.random())) + b"\n" for turn in range(1000))
    path.write_bytes(gzip.compress(lines)[: -len(gzip.compress(lines)) // 3])
    summary = audited_events(tmp_path / "out", str(path))
    assert 0 < summary.scored_turns < 1000
    assert list(summary.reasons) == ["damaged: the compressed file is cut off or damaged here"]


def test_a_turn_beyond_64_bits_is_skipped(tmp_path: Path) -> None:
    path = dump(tmp_path / "d.jsonl", [projection("a", 0), replace(projection("a", 1), turn=2**80)])
    summary = audited_events(tmp_path / "out", str(path), form="parquet")
    assert summary.scored_turns == 1 and summary.skipped == 1


# Logs


def test_a_conversation_is_judged_as_the_fold_judges_it(tmp_path: Path) -> None:
    values = [0.2, -0.5, -2.9, -3.5, -4.4, 0.1, 0.3, 0.2, 0.4]
    shard = Shard(notes=["the witness said so"]).add("fine", [0.1, 0.2, -0.3]).add("drifts", values)
    summary = audited(tmp_path, shard)
    state, told, worst, statistics = None, [], (-1.0, -1), []
    for event in shard.projections[3:]:
        done = step(state, event, CONFIG)
        state = done.state
        told += done.findings
        statistics.append(done.statistics)
        worst = max(worst, (done.risk, event.turn), key=lambda pair: pair[0])
    found = by_id(tmp_path)
    row = found["drifts"]
    assert (row["verdict"], row["risk"], row["worst_turn"]) == ("critical", *worst)
    assert row["episodes"] == [
        {
            "id": told[0].episode_id,
            "first_turn": told[0].turn,
            "last_turn": told[-1].turn,
            "kind": told[0].kind,
            "severity": "critical",
            "recovered": True,
        }
    ]
    assert row["kinds"] == [told[0].kind] and told[-1].kind == "recovered"
    for name in ("level", "drop", "cusum", "dip"):
        assert row[f"max_{name}"] == max(getattr(one, name) for one in statistics)
    assert row["lowest_z"] == -4.4 and row["mean_z"] == pytest.approx(np.mean(values))
    assert row["coordinates"] == {"assistant_axis": values[worst[1]]}
    assert (row["source"], row["record"], row["turns"], row["scored_turns"]) == ("a.jsonl", 2, 9, 9)
    assert found["fine"]["verdict"] == "healthy" and found["fine"]["episodes"] == []
    assert summary.verdicts == {"critical": 1, "warning": 0, "healthy": 1, "unscored": 0}
    assert summary.notes == {"n": 2, "the witness said so": 1}
    assert [one["conversation_id"] for one in summary.riskiest] == ["drifts", "fine"]


def test_turns_that_were_not_scored_are_told_with_their_conversation(tmp_path: Path) -> None:
    shard = Shard().add("part", [0.0, None, 0.1]).add("none", [None, None])
    shard.skipped.append(Skipped(source="a.jsonl", record=9, reason="not JSON"))
    summary = audited(tmp_path, shard)
    found = by_id(tmp_path)
    assert found["part"]["verdict"] == "healthy" and found["part"]["turns"] == 3 and found["part"]["scored_turns"] == 2
    assert found["part"]["skipped"] == [{"turn": 1, "reason": "no token of this reply can be scored"}]
    none = found["none"]
    assert (none["verdict"], none["risk"], none["worst_turn"], none["config_id"]) == ("unscored", None, None, None)
    assert none["certification"] == "uncertified" and len(none["skipped"]) == 2
    assert summary.skipped == 4 and summary.reasons["not JSON"] == 1
    assert sum(summary.verdicts.values()) == summary.conversations == 2
    share = summary.deployments[0].flagged
    assert (share.count, share.of) == (0, 1), "what was not judged is no healthy conversation"


@pytest.mark.parametrize("long", [False, True])
def test_conversations_that_share_an_id_are_told_apart(tmp_path: Path, long: bool) -> None:
    name = "x" * 256 if long else "x"
    shard = Shard().add(name, [-9.0, -9.0]).add(name, [0.0]).add(f"{name[:254]}#3", [0.0]).add(name, [0.1])
    summary = audited(tmp_path, shard)
    found = by_id(tmp_path)
    assert list(found) == [name, f"{name[:254]}#2", f"{name[:254]}#3", f"{name[:254]}#4"]
    assert [row["verdict"] for row in found.values()] == ["critical", "healthy", "healthy", "healthy"]
    assert summary.repeated_ids == 2 and max(map(len, found)) <= 256
    turns = [row["conversation_id"] for row in rows(tmp_path, "turns")]
    assert Counter(turns) == {one: found[one]["scored_turns"] for one in found}
    again = audited_events(tmp_path / "again", str(tmp_path))
    assert again.verdicts == summary.verdicts, "the turns file keeps them apart"


def test_a_projection_that_belongs_to_no_conversation_is_a_fault_of_the_witness(tmp_path: Path) -> None:
    shard = Shard().add("a", [0.0])
    shard.projections.append(projection("b", 0))
    with pytest.raises(ValueError, match="belongs to no conversation"):
        audited(tmp_path, shard)


def test_memory_does_not_grow_with_the_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables_module, "ROW_GROUP", 50)
    monkeypatch.setattr(audit_module, "CACHED", 50)

    def peak(conversations: int) -> int:
        def shards() -> Iterable[Shard]:
            for number in range(conversations):
                shard = Shard().add(f"c{number}", [0.0, -float(number % 7)], source=f"{number}.jsonl")
                yield shard

        out = tmp_path / str(conversations)
        tables = Tables(out, "jsonl")
        tracemalloc.start()
        audit = Audit(Populations(CONFIG), tables, top=20, others=20)
        for shard in shards():
            audit.take(shard)
        audit.finish()
        tables.commit()
        again = Audit(Populations(CONFIG), Tables(out / "again", "jsonl"), top=20, others=20)
        again.take_events(read_events(str(out)))
        again.finish()
        held = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return held

    small, large = peak(300), peak(3000)
    assert large < 1.5 * small, (small, large)


# Every response comes back

TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12)
NUMBERS = st.floats(allow_nan=False, allow_infinity=False)
PLACES = st.dictionaries(TEXT, NUMBERS, max_size=4)


@st.composite
def projections(draw: st.DrawFn) -> Projection:
    return Projection(
        id=draw(TEXT),
        time=draw(st.sampled_from(["2026-01-01T00:00:00Z", "1970-01-01T00:00:00.000001Z"])),
        source=draw(TEXT),
        conversation_id=draw(TEXT),
        turn=draw(st.integers(0, 2**63 - 1)),
        model=draw(TEXT),
        axis_id=draw(st.sampled_from([AXIS, "another"])),
        layer=draw(st.integers(0, 200)),
        deployment=draw(st.sampled_from(["shop", "nobody's"])),
        projection=draw(NUMBERS),
        coordinates={"assistant_axis": draw(NUMBERS), **draw(PLACES)},
        prompt=draw(PLACES),
        windows=Windows(lowest={"assistant_axis": draw(NUMBERS), **draw(PLACES)}, last=draw(PLACES)),
        tokens=draw(st.integers(1, 10**6)),
        held=draw(st.floats(0.0, 1.0)),
        attributes=draw(st.dictionaries(TEXT, TEXT, max_size=3)),
        version=draw(st.sampled_from(["1.0", "1.7"])),
    )


@settings(max_examples=40)
@given(events=st.lists(projections(), max_size=8), form=st.sampled_from(FORMS))
def test_every_projection_comes_back_from_the_turns(
    tmp_path_factory: pytest.TempPathFactory, events: list[Projection], form: Any
) -> None:
    folder = tmp_path_factory.mktemp("turns")
    audited_events(folder, str(dump(folder / "dump.jsonl", events)), form=form)
    assert list(read_turns(folder / f"turns.{form}")) == events


def test_a_file_that_holds_no_turns_is_refused(tmp_path: Path) -> None:
    audited(tmp_path, Shard().add("a", [0.0]), form="parquet")
    with pytest.raises(EventError, match="not a row of turns"):
        list(read_turns(tmp_path / "conversations.parquet"))
    (tmp_path / "text.jsonl").write_text('{"messages": []}\n')
    with pytest.raises(EventError, match=r"text\.jsonl:1"):
        list(read_turns(tmp_path / "text.jsonl"))
    data = (tmp_path / "turns.parquet").read_bytes()
    (tmp_path / "cut.parquet").write_bytes(data[: len(data) // 2])
    with pytest.raises(ConfigurationError, match="can't be read"):
        list(read_turns(tmp_path / "cut.parquet"))


# Columns


def test_every_column_is_documented_as_it_is() -> None:
    said = [line for line in (ROOT / "docs" / "audit.md").read_text().splitlines() if line.startswith("| `")]
    expected = [
        f"| `{column.name}` | `{column.type}` | {'yes' if column.optional else 'no'} | {column.meaning} |"
        for columns in COLUMNS.values()
        for column in columns
    ]
    assert said == expected, "docs/audit.md should have these rows:\n" + "\n".join(expected)


def test_the_files_have_the_documented_columns_and_types(tmp_path: Path) -> None:
    import pyarrow.parquet

    shard = Shard().add("a", [0.0, -5.0, None]).add("none", [None])
    for form in FORMS:
        audited(tmp_path, shard, form=form)
    coordinates = pyarrow.map_(pyarrow.string(), pyarrow.float64())
    turns = pyarrow.parquet.read_schema(tmp_path / "turns.parquet")
    assert turns.field("windows").type == pyarrow.struct([("lowest", coordinates), ("last", coordinates)])
    assert turns.field("turn").type == pyarrow.int64() and turns.field("z").type == pyarrow.float64()
    for table, columns in COLUMNS.items():
        schema = pyarrow.parquet.read_schema(tmp_path / f"{table}.parquet")
        assert schema.names == [column.name for column in columns]
        for column in columns:
            field = schema.field(column.name)
            assert field.nullable == column.optional and field.metadata[b"meaning"].decode() == column.meaning
            assert field.type == arrow_type(pyarrow, column.type)
        assert rows(tmp_path, table, "parquet") == rows(tmp_path, table, "jsonl")
        for row in rows(tmp_path, table):
            assert list(row) == [column.name for column in columns]


# Whose normal


def certified_config() -> DetectorConfig:
    boundaries = replace(
        CONFIG.boundaries, budget=0.01, certification="certified", conversations=230, probability_within=0.7
    )
    return replace(CONFIG, boundaries=boundaries)


def test_only_the_calibrated_population_is_certified(tmp_path: Path) -> None:
    config = certified_config()
    pops = Populations(config, (config.baselines["shop"], config.boundaries))
    shard = Shard().add("own", [0.0, 0.1]).add("foreign", [0.0, -9.0], deployment="gpt")
    summary = audited(tmp_path, shard, pops=pops)
    found = by_id(tmp_path)
    assert (found["own"]["baseline"], found["own"]["certification"], found["own"]["budget"]) == (
        "calibrated",
        "certified",
        0.01,
    )
    assert found["own"]["config_id"] == config.config_id
    assert (found["foreign"]["baseline"], found["foreign"]["certification"]) == ("parent", "uncertified")
    assert found["foreign"]["verdict"] == "critical" and found["foreign"]["config_id"] != config.config_id
    assert all("certification" not in row or row["certification"] for row in found.values())
    says = {one.deployment: (one.certified, one.says) for one in summary.deployments}
    assert says["shop"] == (True, "certified: at most 1% of healthy conversations warn")
    assert says["gpt"][0] is False and says["gpt"][1].startswith("not certified for this population")
    assert "shop" in says["gpt"][1]


def test_a_critical_verdict_is_certified_by_its_own_budget_only(tmp_path: Path) -> None:
    audited(tmp_path, Shard().add("own", [0.0, -30.0]), pops=Populations(certified_config()))
    row = by_id(tmp_path)["own"]
    assert (row["verdict"], row["certification"], row["budget"]) == ("critical", "uncertified", None)


def test_a_borrowed_baseline_is_the_parents_under_its_own_name() -> None:
    config = certified_config()
    pops = Populations(config, (config.baselines["shop"], config.boundaries))
    there = pops.of("gpt")
    assert there.config.baselines == {"gpt": replace(config.baselines["shop"], deployment="gpt")}
    assert there.boundaries == without_promise(config.boundaries)
    assert pops.of("shop").config is config
    assert pops.of("gpt", live=True).basis == "learning", "a worker borrows nothing"


def test_live_responses_borrow_nothing_and_the_witnesss_do(tmp_path: Path) -> None:
    config = certified_config()
    pops = Populations(config, (config.baselines["shop"], config.boundaries))
    seen = [
        projection("live", 0, -9.0, deployment="gpt"),
        replace(projection("log", 0, -9.0, deployment="gpt"), source=WITNESS),
    ]
    audited_events(tmp_path, str(dump(tmp_path / "d.jsonl", seen)), pops=pops)
    found = by_id(tmp_path)
    assert (found["live"]["verdict"], found["live"]["baseline"]) == ("unscored", "learning")
    assert (found["log"]["verdict"], found["log"]["baseline"]) == ("critical", "parent")


def test_a_calibration_of_another_axis_is_refused() -> None:
    bundle, config = shipped()
    with pytest.raises(ConfigurationError, match="for axis") as caught:
        populations(bundle, CONFIG)
    assert "--bundle" in caught.value.cure
    own = replace(config, baselines={"gpt": replace(next(iter(config.baselines.values())), deployment="gpt")})
    pops = populations(bundle, own)
    assert pops.of("gpt").basis == "calibrated"
    parent = pops.of("someone else")
    assert parent.basis == "parent" and parent.baseline is not None and parent.lender in config.baselines
    other = replace(own, readout=replace(config.readout, coordinates={"pc1": 1.0}))
    assert populations(bundle, other).of("someone else").basis == "learning", "a baseline needs its own readout"


def test_constants_replace_those_of_whatever_calibration() -> None:
    bundle, config = shipped()
    assert config.config_id
    for given_one in (None, config):
        pops = populations(bundle, given_one, session_gap_seconds=45.0)
        assert pops.config == replace(config, session_gap_seconds=45.0)
        assert pops.of("someone else").config.session_gap_seconds == 45.0
        assert len({config.config_id, pops.config.config_id, pops.of("someone else").config.config_id}) == 3


def test_many_deployments_do_not_fill_the_memory(tmp_path: Path) -> None:
    config = certified_config()
    pops = Populations(config, (config.baselines["shop"], config.boundaries))
    shard = Shard()
    for number in range(600):
        shard.add(f"c{number}", [0.0], deployment=f"model {number}")
    summary = audited(tmp_path, shard, pops=pops)
    assert len(summary.deployments) == audit_module.MOST_DEPLOYMENTS + 1
    assert summary.deployments[-1].conversations == 400 and not summary.deployments[-1].certified
    assert len(pops._known) <= 256


# A baseline from the logs themselves

PAIRS = st.lists(
    st.lists(st.tuples(st.floats(-50, 50), st.floats(-50, 50)), min_size=1, max_size=5), min_size=2, max_size=12
)


@given(PAIRS, st.randoms())
def test_a_robust_baseline_does_not_depend_on_any_order(talks: list[list[tuple[float, float]]], chance: Any) -> None:
    try:
        first = robust_baseline("d", "a", talks)
    except ConfigurationError:
        return
    shuffled = [chance.sample(talk, len(talk)) for talk in chance.sample(talks, len(talks))]
    assert robust_baseline("d", "a", shuffled) == first


@given(st.lists(st.floats(-50, 50), min_size=2, max_size=30, unique=True))
def test_of_conversations_of_one_turn_it_is_the_median_and_the_mad(values: list[float]) -> None:
    middle = float(np.median(values))
    spread = 1.4826 * float(np.median(np.abs(np.array(values) - middle)))
    if spread > 1e-9:
        found = robust_baseline("d", "a", [[(value, value + 1.0)] for value in values])
        assert found.mean == pytest.approx(middle, abs=1e-9)
        assert found.standard_deviation == pytest.approx(spread, rel=1e-9)
        assert found.window_mean == pytest.approx(middle + 1.0, abs=1e-9)


def test_each_conversation_weighs_the_same_however_long() -> None:
    chance = np.random.default_rng(0)
    talks = [[(float(value), float(value))] for value in chance.normal(0, 1, 200)]
    chatterbox = [(float(value), float(value)) for value in chance.normal(-20, 1, 5000)]
    found = robust_baseline("d", "a", [*talks, chatterbox])
    assert abs(found.mean) < 0.3 and 0.7 < found.standard_deviation < 1.3


def test_a_third_that_drifts_does_not_move_it_as_it_would_the_mean(tmp_path: Path) -> None:
    chance = np.random.default_rng(1)
    shard = Shard()
    for number in range(200):
        middle = -8.0 if number % 3 == 0 else 0.0
        shard.add(f"c{number}", [float(value) for value in chance.normal(middle, 1.0, 6)])
    off = replace(CONFIG, baselines={})  # no calibration to begin with
    sample = self_sample_of(Populations(off), [shard], [])
    found, refused = sample.baselines()
    assert not refused and -0.9 < found["shop"].mean < 0.0 and found["shop"].standard_deviation < 2.5
    assert fit_baseline("shop", AXIS, talks(shard), CONFIG.readout).standard_deviation > 3.5
    pops = Populations(off, (CONFIG.baselines["shop"], CONFIG.boundaries)).with_own(found)
    summary = audited(tmp_path, shard, pops=pops)
    verdicts = {name: row["verdict"] for name, row in by_id(tmp_path).items()}
    assert sum(verdicts[f"c{number}"] != "healthy" for number in range(0, 200, 3)) > 60
    assert not any(one.certified for one in summary.deployments)
    assert {row["baseline"] for row in by_id(tmp_path).values()} == {"self"}
    assert "as if most" in summary.deployments[0].says


def talks(shard: Shard) -> list[list[Projection]]:
    found: dict[str, list[Projection]] = {}
    for event in shard.projections:
        found.setdefault(event.conversation_id, []).append(event)
    return list(found.values())


def test_too_few_conversations_give_no_baseline_of_their_own() -> None:
    shard = Shard()
    for number in range(SELF_LEAST - 1):
        shard.add(f"c{number}", [float(number)])
    found, refused = self_sample_of(Populations(CONFIG), [shard], []).baselines()
    assert not found and "too few" in refused["shop"]


def test_the_sample_is_bounded_and_does_not_depend_on_the_logs_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("monitor.populations.SELF_MOST", 50)
    events = [
        (f"c{number}", projection(f"c{number}", turn, float(number))) for number in range(400) for turn in range(3)
    ]
    found = []
    for seed in range(3):
        random.Random(seed).shuffle(events)
        sample = SelfSample(Populations(CONFIG))
        for name, event in events:
            sample.add(name, event)
        found.append(sample.baselines()[0]["shop"])
    assert found[0] == found[1] == found[2]
    assert found[0].conversations == 50 and found[0].responses == 150


# Shares


@pytest.mark.parametrize(("count", "of"), [(0, 10), (1, 10), (9, 10), (10, 10), (37, 130), (119, 130)])
def test_intervals_are_exact(count: int, of: int) -> None:
    from scipy.stats import binomtest

    share = audit_module.Share.make(count, of)
    expected = binomtest(count, of).proportion_ci(method="exact")
    assert (share.low, share.high) == pytest.approx((expected.low, expected.high), abs=1e-6)
    assert (share.low, share.high) == pytest.approx(exact_interval(count, of), abs=1e-6)


# The whole, as a user runs it


def provenance() -> Provenance:
    return Provenance(
        made="2026-01-01T00:00:00Z",
        version="0",
        mode="logs",
        inputs=["a.jsonl"],
        model="toy",
        bundle_id="b",
        config_id="c",
        settings={},
        files=[],
    )


def test_what_fails_leaves_the_last_audit_as_it_was(tmp_path: Path) -> None:
    bundle, _ = shipped()
    good = Sources(logs=lambda: [Shard().add("a", [0.0])])
    run_audit(good, tmp_path, bundle, Populations(CONFIG), provenance())
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert set(before) == {"turns.parquet", "conversations.parquet", "skipped.parquet", "report.html", "summary.json"}

    def broken() -> Iterable[Shard]:
        yield Shard().add("b", [0.0])
        raise RuntimeError("the witness died")

    with pytest.raises(RuntimeError):
        run_audit(Sources(logs=broken), tmp_path, bundle, Populations(CONFIG), provenance())
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_most_records_skipped_is_said_first(tmp_path: Path) -> None:
    bundle, _ = shipped()
    path = dump(tmp_path / "d.jsonl", [projection("a", 0), b"no", b"no", b"no", projection("b", 0, deployment="x")])
    done = run_audit(
        Sources(records=lambda: read_events(str(path))), tmp_path / "out", bundle, Populations(CONFIG), provenance()
    )
    assert any("Most of what was read could not be audited: 3 of 5" in problem for problem in done.problems)
    assert any("No baseline for x" in problem for problem in done.problems)
    page = (tmp_path / "out" / "report.html").read_text()
    assert all(problem.replace("'", "&#39;") in page for problem in done.problems)


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "monitor", "audit", *map(str, arguments)]


def anchorwatch(*arguments: object, **settings: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(*arguments),
        env=environment(**settings),
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_events_on_the_command_line(tmp_path: Path) -> None:
    _, config = shipped()
    events = [*events_at(config, "fine", [0.3, 0.0, 0.2]), *events_at(config, "drifts", [0.0, -1.0, -12.0, -12.0])]
    path = dump(tmp_path / "dump.jsonl", events)
    out = tmp_path / "out"
    done = anchorwatch("--events", path, "--out", out, "--json", "--format", "jsonl", "--fail-on", "critical")
    assert done.returncode == 1, done.stderr
    said = json.loads(done.stdout)
    assert said == json.loads((out / "summary.json").read_text())
    assert said["verdicts"] == {"critical": 1, "warning": 0, "healthy": 1, "unscored": 0}
    assert by_id(out)["drifts"]["verdict"] == "critical" and by_id(out)["drifts"]["nearest_roles"]
    assert names(out) == {"turns.jsonl", "conversations.jsonl", "skipped.jsonl", "report.html", "summary.json"}
    mild = dump(tmp_path / "mild.jsonl", events[:3])
    done = anchorwatch("--events", mild, "--out", out, "--fail-on", "warning")
    assert done.returncode == 0, done.stderr
    assert "None of them warns" in done.stdout and str(out / "report.html") in done.stdout


def test_the_default_topic_is_the_settings_log(tmp_path: Path) -> None:
    _, config = shipped()
    log = EmbeddedLog(tmp_path / "log.db")
    log.append(PROJECTIONS, [message(event) for event in events_at(config, "a", [0.0, 0.0])])
    log.close()
    done = anchorwatch("--events", "--out", tmp_path / "out", "--json", ANCHORWATCH_DATA_DIR=str(tmp_path))
    assert done.returncode == 0 and json.loads(done.stdout)["scored_turns"] == 2, done.stderr


def test_the_worker_and_the_audit_of_one_installation_agree(tmp_path: Path) -> None:
    _, config = shipped()
    settings = {"ANCHORWATCH_DATA_DIR": str(tmp_path), "ANCHORWATCH_SESSION_GAP_SECONDS": "45"}
    log = EmbeddedLog(tmp_path / "log.db")
    chance = random.Random(2)
    talks = [events_at(config, f"c{n}", [chance.gauss(-1.5 * turn, 1) for turn in range(8)]) for n in range(10)]
    # Every other conversation pauses for longer than the gap.
    late = [replace(event, time="2026-01-01T01:00:00Z") if event.turn == 5 else event for event in talks[1]]
    mixed = [event for turn in zip(*talks[2:], late, strict=True) for event in turn]
    log.append(PROJECTIONS, [message(event) for event in mixed])
    worker = subprocess.Popen(
        [sys.executable, "-m", "monitor", "worker"], env=environment(**settings), stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 60
    store = SqliteStore(tmp_path / "store.db")
    while (position := store.position(PROJECTIONS, 0)) is None or position.offset < len(mixed):
        assert worker.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    worker.terminate()
    assert worker.wait(timeout=60) == 0
    done = anchorwatch("--events", "--out", tmp_path / "out", "--json", "--format", "jsonl", **settings)
    assert done.returncode == 0, done.stderr
    told = [one.finding for one in store.pending(1000)]
    found = [one["id"] for row in rows(tmp_path / "out", "turns") for one in row["findings"]]
    assert found == [finding.id for finding in told] and len(found) > 10
    assert {finding.config_id for finding in told} == {json.loads(done.stdout)["provenance"]["config_id"]}


def test_nothing_judged_does_not_pass_a_gate(tmp_path: Path) -> None:
    path = dump(tmp_path / "d.jsonl", [b"no"])
    done = anchorwatch("--events", path, "--out", tmp_path / "out", "--fail-on", "critical")
    assert done.returncode == 1 and "No conversation could be audited" in done.stdout


def test_an_audit_written_among_the_logs_is_no_log(tmp_path: Path, model_folder: Path, calibrated: Path) -> None:
    written_log(tmp_path / "log.jsonl", 2)
    options = witness_options(model_folder, calibrated)
    for _ in range(2):
        done = here("audit", tmp_path, "--out", tmp_path, "--json", "--format", "jsonl", *options)
        assert done.returncode == 0, done.stderr
        said = json.loads(done.stdout)
        assert said["conversations"] == 2 and said["skipped"] == 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "no logs are named"),
        (["--events", "-"], "standard input"),
        (["-", "--self"], "twice"),
        (["--events", "d.jsonl", "--with-text", "--deployment", "x"], "--with-text goes with logs"),
        (["empty"], "no logs in this folder"),
        (["missing"], "missing"),
        (["--events", "missing"], "no file missing"),
        (["--events", "d.jsonl", "--calibration", "missing"], "the calibration missing can't be read"),
        (["--events", "d.jsonl", "--calibration", "d.jsonl"], "not a detector configuration"),
        (["--events", "d.jsonl", "--out", "d.jsonl"], "can't be written"),
        (["--events", "d.jsonl", "--bundle", "nowhere"], "no axis bundle"),
    ],
)
def test_errors_say_the_cure(tmp_path: Path, arguments: list[str], said: str) -> None:
    (tmp_path / "empty").mkdir()
    dump(tmp_path / "d.jsonl", [projection("a", 0)])
    done = subprocess.run(
        command(*arguments),
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2 and "error:" in done.stderr and "cure:" in done.stderr
    assert said in done.stderr and "Traceback" not in done.stderr and done.stdout == ""


def test_a_missing_package_is_named_with_the_extra(tmp_path: Path) -> None:
    _, config = shipped()
    path = dump(tmp_path / "d.jsonl", events_at(config, "a", [0.0]))
    program = (
        "import sys; sys.modules[sys.argv.pop(1)] = None\nfrom monitor.__main__ import main\n"
        "sys.argv = ['anchorwatch', 'audit', *sys.argv[1:]]\nmain()"
    )
    for package in ("pyarrow", "jinja2"):
        done = subprocess.run(
            [sys.executable, "-c", program, package, "--events", str(path), "--out", str(tmp_path / "out")],
            env=environment(),
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 2 and package in done.stderr and "anchorwatch[audit]" in done.stderr, done.stderr


def test_help_says_what_there_is() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "monitor", "audit", "--help"], env=environment(), capture_output=True, text=True
    )
    for option in ("--out", "--events", "--calibration", "--self", "--with-text", "--fail-on", "--engine", "--top"):
        assert option in done.stdout


@pytest.mark.parametrize("form", FORMS)
def test_a_full_disk_leaves_nothing_half_written(tmp_path: Path, form: str) -> None:
    _, config = shipped()
    chance = random.Random(0)
    talks = [events_at(config, f"c{n}", [chance.gauss(0, 1) for _ in range(6)]) for n in range(600)]
    path = dump(tmp_path / "dump.jsonl", [event for talk in talks for event in talk])
    out = tmp_path / "out"
    assert (
        anchorwatch("--events", dump(tmp_path / "small.jsonl", talks[0]), "--out", out, "--format", form).returncode
        == 0
    )
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    done = subprocess.run(
        command("--events", path, "--out", out, "--format", form),
        env=environment(),
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000)),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2 and "is full" in done.stderr and "free space" in done.stderr, done.stderr
    assert "Traceback" not in done.stderr
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


# The witness, its shards, and no text

WORDS = ("CANARYUSER", "CANARYREPLY", "CANARYSYSTEM", "CANARYBROKEN")


def written_log(path: Path, conversations: int = 6, turns: int = 3) -> Path:
    lines = []
    for number in range(conversations):
        talk = [{"role": "system", "content": f"You are {WORDS[2]} {number}."}]
        for turn in range(turns):
            talk += [
                {"role": "user", "content": f"Tell me {WORDS[0]} <b>{number}</b> and {turn} of ships, please."},
                {"role": "assistant", "content": f"The keeper {WORDS[1]} counted {number + turn} gulls & ships."},
            ]
        lines.append(json.dumps({"id": f"talk-{number}", "model": "gpt-x", "messages": talk}))
    lines.insert(2, f'{{"messages": "{WORDS[3]}')
    path.write_text("\n".join(lines) + "\n")
    return path


def everything(folder: Path) -> str:
    """All that is written in a folder, unpacked."""
    found = []
    for path in sorted(folder.rglob("*")):
        if path.suffix == ".parquet":
            found.append(repr(list(read_rows(path))))
        elif path.suffix == ".gz":
            found.append(gzip.decompress(path.read_bytes()).decode())
        elif path.is_file():
            found.append(path.read_text(errors="replace"))
    return "\n".join(found)


def witness_options(model_folder: Path, calibrated: Path) -> list[object]:
    return ["--model", model_folder, "--bundle", calibrated, "--device", "cpu"]


@pytest.mark.parametrize("form", FORMS)
def test_no_file_holds_conversation_text(tmp_path: Path, model_folder: Path, calibrated: Path, form: str) -> None:
    log, out = written_log(tmp_path / "log.jsonl"), tmp_path / "out"
    done = anchorwatch(log, "--out", out, "--format", form, *witness_options(model_folder, calibrated))
    assert done.returncode == 0, done.stderr
    written = everything(out) + done.stdout + done.stderr
    assert "talk-3" in written, "the search would find what is there"
    assert not [word for word in WORDS if word in written]
    found = by_id(out, form)
    assert len(found) == 6 and all(row["scored_turns"] == 3 and row["baseline"] == "parent" for row in found.values())
    (skipped,) = rows(out, "skipped", form)
    assert skipped["record"] == 3 and skipped["source"] == str(log)


def test_with_text_only_the_report_quotes_and_says_so(tmp_path: Path, model_folder: Path, calibrated: Path) -> None:
    log, out = written_log(tmp_path / "log.jsonl"), tmp_path / "out"
    done = here("audit", log, "--out", out, "--with-text", *witness_options(model_folder, calibrated))
    assert done.returncode == 0, done.stderr
    page = (out / "report.html").read_text()
    assert WORDS[0] in page and WORDS[1] in page and WORDS[2] not in page
    assert "This file holds conversation text" in page
    assert "&lt;b&gt;5&lt;/b&gt;" in page and "<b>5</b>" not in page and "gulls &amp; ships" in page
    (out / "report.html").unlink()
    assert not [word for word in WORDS if word in everything(out) + done.stdout]


def test_standard_input_is_audited_and_can_not_be_quoted(tmp_path: Path, model_folder: Path, calibrated: Path) -> None:
    log = written_log(tmp_path / "log.jsonl", 2)
    done = subprocess.run(
        command("-", "--out", tmp_path / "out", "--with-text", *witness_options(model_folder, calibrated)),
        env=environment(),
        stdin=log.open(),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert "can't be read a second time" in done.stdout.replace("\n", " ")
    assert not [word for word in WORDS if word in everything(tmp_path / "out")]


def test_the_logs_own_baseline_scores_once_and_says_what_it_assumes(
    tmp_path: Path, model_folder: Path, calibrated: Path
) -> None:
    log, out = written_log(tmp_path / "log.jsonl", 24), tmp_path / "out"
    done = here("audit", log, "--out", out, "--self", *witness_options(model_folder, calibrated))
    assert done.returncode == 0, done.stderr
    assert {row["baseline"] for row in by_id(out, "parquet").values()} == {"self"}
    assert {row["certification"] for row in by_id(out, "parquet").values()} == {"uncertified"}
    said = " ".join(done.stdout.split())
    assert "assumes that most of their conversations are healthy" in said
    assert "assumes that most of their conversations are healthy" in (out / "report.html").read_text()


def test_ctrl_c_says_how_to_go_on_and_the_rest_gives_the_same_rows(
    tmp_path: Path, model_folder: Path, calibrated: Path
) -> None:
    log = written_log(tmp_path / "log.jsonl", 320, 3)
    options = witness_options(model_folder, calibrated)
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert here("audit", log, "--out", whole, *options).returncode == 0
    process = subprocess.Popen(
        command(log, "--out", cut, *options),
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 60
    while not list(cut.glob(".shards/*.gz")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130, said
    assert ".shards" in said and "same command again" in " ".join(said.split()) and "Traceback" not in said
    assert names(cut) == {".shards"}
    kept = {path: path.stat().st_mtime_ns for path in cut.glob(".shards/*.gz")}
    assert here("audit", log, "--out", cut, *options).returncode == 0
    assert {path: path.stat().st_mtime_ns for path in kept} == kept, "what was scored is not scored again"
    for table in COLUMNS:
        assert (cut / f"{table}.parquet").read_bytes() == (whole / f"{table}.parquet").read_bytes()


def test_a_killed_audit_leaves_no_final_name(tmp_path: Path, model_folder: Path, calibrated: Path) -> None:
    log, out = written_log(tmp_path / "log.jsonl", 320, 3), tmp_path / "out"
    process = subprocess.Popen(
        command(log, "--out", out, *witness_options(model_folder, calibrated)),
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 60
    while not list(out.glob(".shards/*.gz")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)
    process.kill()
    process.wait(timeout=60)
    assert not [name for name in names(out) if not name.startswith(".")]


def test_a_log_of_the_witness_itself_is_certified_as_its_calibration_says(
    tmp_path: Path, model_folder: Path, calibrated: Path
) -> None:
    config = detector_config(load_bundle(calibrated))
    (name,) = config.baselines
    certified = replace(config, boundaries=replace(config.boundaries, budget=0.05, certification="certified"))
    (tmp_path / "own.json").write_bytes(certified.to_json())
    log = written_log(tmp_path / "log.jsonl", 3)
    options = [*witness_options(model_folder, calibrated), "--calibration", tmp_path / "own.json"]
    for deployment, expected in ((name, True), ("another", False)):
        done = here("audit", log, "--out", tmp_path / deployment, "--deployment", deployment, "--json", *options)
        assert done.returncode == 0, done.stderr
        (one,) = json.loads(done.stdout)["deployments"]
        assert (one["deployment"], one["certified"]) == (deployment, expected)


def test_the_database_of_waiting_conversations_is_a_temporary_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[str] = []
    real = sqlite3.connect
    monkeypatch.setattr(sqlite3, "connect", lambda name, **more: opened.append(name) or real(name, **more))
    audited(tmp_path / "out", Shard().add("a", [0.0]))
    assert set(opened) == {""}, "a file without a name goes with its process"
    assert names(tmp_path) == {"out"}

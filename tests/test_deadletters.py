"""Promises of the dead letters: one of each, untouched, and sent again once, to where it came from."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from service import CONFIG, POISON, message, projection

from monitor.batch import Poison, to_dead_letter
from monitor.deadletters import WINDOW, DeadLetter, find_letter, newest_letters, obstacle, requeue
from monitor.events import encode
from monitor.store.sqlite import SqliteStore
from monitor.stream.log import DEAD_LETTERS, PROJECTIONS, EmbeddedLog, Message, Record
from monitor.worker import Worker


@pytest.fixture
def log(tmp_path: Path) -> Iterator[EmbeddedLog]:
    opened = EmbeddedLog(tmp_path / "log.db")
    yield opened
    opened.close()


def bury(log: EmbeddedLog, offset: int, reason: str = "undecodable", *, key: str = "c", value: bytes = POISON) -> str:
    letter = to_dead_letter(Record(PROJECTIONS, 0, offset, key, value), Poison(reason, "what was wrong"))
    log.append(DEAD_LETTERS, [letter])
    return letter.key


def test_a_letter_that_a_crash_wrote_twice_is_one(log: EmbeddedLog) -> None:
    ids = [bury(log, 7), bury(log, 8), bury(log, 7)]
    assert [letter.id for letter in newest_letters(log, 9)] == [ids[1], ids[0]]
    letter = find_letter(log, ids[0])
    assert letter == DeadLetter(
        id=f"{PROJECTIONS}/0/7",
        topic=PROJECTIONS,
        partition=0,
        offset=7,
        key="c",
        reason="undecodable",
        detail="what was wrong",
        value=POISON,
    )
    assert find_letter(log, f"{PROJECTIONS}/0/9") is None


@pytest.mark.parametrize("count", [0, 1, WINDOW - 1, WINDOW, WINDOW + 1, 2 * WINDOW + 3])
def test_however_many_there_are_the_newest_come_first_and_none_twice(log: EmbeddedLog, count: int) -> None:
    letters = [to_dead_letter(Record(PROJECTIONS, 0, i, "c", b"x"), Poison("r", "d")) for i in range(count)]
    log.append(DEAD_LETTERS, letters)
    assert [letter.offset for letter in newest_letters(log, 10_000)] == list(range(count))[::-1]
    assert [letter.offset for letter in newest_letters(log, 3)] == list(range(count))[::-1][:3]
    if count:
        assert find_letter(log, letters[0].key) is not None


def test_a_release_that_can_read_it_folds_what_is_sent_again(tmp_path: Path, log: EmbeddedLog) -> None:
    store = SqliteStore(tmp_path / "store.db")
    log.append(PROJECTIONS, [message(projection("c", 0)), message(projection("c", 1)), message(projection("c", 2))])

    def broken(state: object, event: object, config: object) -> object:
        from monitor.detect.conversation import step

        if event.turn == 1:  # type: ignore[attr-defined]
            raise ValueError("a fault of this release")
        return step(state, event, config)  # type: ignore[arg-type]

    Worker(log, store, CONFIG, fold=broken).run_once()  # type: ignore[arg-type]
    (letter,) = newest_letters(log, 9)
    assert letter.reason == "fold_failed" and letter.value == encode(projection("c", 1))
    assert requeue(log, [letter], by="ann") == ([letter.id], [])
    (record,) = log.read(PROJECTIONS, 0, 3, 9)
    assert (record.key, record.value) == ("c", letter.value)
    assert dict(record.headers)["anchorwatch-requeued-from"] == letter.id.encode()
    Worker(log, store, CONFIG).run_once()
    session = store.session("c")
    assert session and session.responses == 3 and store.counts() == {"folded": 3, "dead_letter": 1}
    store.close()


def test_what_was_sent_again_is_not_unless_it_is_asked_for(log: EmbeddedLog) -> None:
    bury(log, 7)
    (letter,) = newest_letters(log, 9)
    requeue(log, [letter], by="ann", at="2026-01-01T00:00:00Z")
    (marked,) = newest_letters(log, 9)
    assert marked.requeued and marked.requeued.by == "ann"
    assert msgspec.structs.replace(marked, requeued=None) == letter
    gone, (refusal,) = requeue(log, [marked], by="bob")
    assert not gone and "ann" in refusal.why and "--again" in refusal.why
    assert requeue(log, [marked], by="bob", again=True) == ([letter.id], [])
    assert log.span(PROJECTIONS, 0).end == 2


@pytest.mark.parametrize(
    ("reason", "key", "said"),
    [
        ("wrong_key", "c", "send it anew"),
        ("bad_control", "", "calibration activate"),
        ("undecodable", "", "no key"),
        ("undecodable", "a\ufffdb", "no text"),
    ],
)
def test_what_would_be_poison_again_is_refused_and_nothing_is_written(
    log: EmbeddedLog, reason: str, key: str, said: str
) -> None:
    bury(log, 7, reason, key=key)
    letters = newest_letters(log, 9)
    gone, (refusal,) = requeue(log, letters, by="ann", again=True)
    assert not gone and said in refusal.why
    assert log.span(PROJECTIONS, 0).end == 0 and obstacle(letters[0], again=True) == refusal.why


def test_many_are_sent_again_in_the_order_in_which_they_lay(log: EmbeddedLog) -> None:
    for offset in (9, 3, 5):
        bury(log, offset, value=str(offset).encode())
    requeue(log, newest_letters(log, 99), by="ann")
    assert [record.value for record in log.read(PROJECTIONS, 0, 0, 9)] == [b"3", b"5", b"9"]


def test_only_the_wanted_are_given(log: EmbeddedLog) -> None:
    bury(log, 1, "undecodable")
    bury(log, 2, "unusable")
    assert [letter.offset for letter in newest_letters(log, 9, wanted=lambda one: one.reason == "unusable")] == [2]


def test_bytes_that_are_no_text_stay_as_they_are(log: EmbeddedLog) -> None:
    value = bytes(range(256))
    bury(log, 1, key="\x1b[31m", value=value)
    (letter,) = newest_letters(log, 9)
    assert letter.value == value and letter.key == "\x1b[31m"
    requeue(log, [letter], by="ann")
    (record,) = log.read(PROJECTIONS, 0, 0, 9)
    assert (record.key, record.value) == ("\x1b[31m", value)


def test_what_others_write_there_is_passed_over(log: EmbeddedLog) -> None:
    bury(log, 1)
    log.append(DEAD_LETTERS, [Message("no place", b""), Message("a/b/c", b"")])
    assert [letter.offset for letter in newest_letters(log, 9)] == [1]

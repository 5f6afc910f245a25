"""`anchorwatch doctor`: looks at everything a running installation rests on, and says what is wrong and the cure.

It only looks: nothing is made, written or taken. Each check stands alone, so that one that fails hides no other.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal, Protocol, TypeVar, runtime_checkable
from urllib.parse import urlsplit

from msgspec import Struct

from monitor import connect
from monitor.actions import due
from monitor.batch import DEAD_LETTER, POISON_SHARE, POISON_WINDOW
from monitor.database import sqlite_path
from monitor.deadletters import newest_letters
from monitor.detect.baseline import DetectorConfig
from monitor.errors import AnchorwatchError
from monitor.settings import KEY_FILE, Settings
from monitor.store import Backend
from monitor.stream.log import ACTIONS, DEAD_LETTERS, PROJECTIONS, Log, Span
from monitor.stream.topics import check

__all__ = ["Check", "Status", "examine"]

T = TypeVar("T")

Status = Literal["ok", "advice", "broken"]

MIB = 2**20
LEAST_FREE_BYTES = 100 * MIB
LITTLE_FREE_BYTES = 1024 * MIB
MUCH_SKEW_SECONDS = 5.0
FUTURE_SECONDS = 60.0
OLD_OUTBOX_SECONDS = 300.0
MUCH_SHARE = 0.01
LOOKED_AT = 1000  # dead letters, and conversations

# How the settings are named whose file holds a secret. Certificates may be read by anybody.
SECRETS = ("password_file", "key_file", "keys_file", "secret_file", "token_file", "tls_key")
# Which packages a URL's scheme needs: the first without which it can't work, then those it is slow without.
_NEEDED = {"kafka": (("kafka-python", "kafka"), ("crc32c", "crc32c")), "redis": (("redis", "redis"),)}
_FASTER = {"redis": (("hiredis", "hiredis"),)}


class Check(Struct, frozen=True):
    """One thing looked at. `cure` is what the reader can do about it, where it is not ok."""

    name: str
    status: Status
    says: str
    cure: str = ""


@runtime_checkable
class _Advising(Protocol):
    """A store that knows what could be better about its server."""

    def advice(self) -> list[str]: ...


@runtime_checkable
class _Timed(Protocol):
    """A store with a clock of its own, in seconds since 1970."""

    def now(self) -> float: ...


def examine(
    settings: Settings,
    bundle: str,
    *,
    patience: float = 3.0,
    clock: Callable[[], float] = time.time,
    wait: Callable[[float], object] = time.sleep,
) -> Iterator[Check]:
    """One check after the other, as they are done. Raises nothing.

    Args:
        settings: of this process; those that are wrong never come this far.
        bundle: the calibration that a worker is given: a bundle's name or folder, or a file.
        patience: seconds to watch whether a partition that lags moves.
        clock: unix seconds.
        wait: waits so many seconds.
    """
    yield from _guarded("packages", lambda: _packages(settings))
    yield from _guarded("disk", lambda: _disk(settings))
    yield from _guarded("secrets", lambda: _secrets(settings))
    yield from _guarded("spool", lambda: _spool(settings))
    yield from _guarded("bundle", lambda: _bundle(settings, bundle))
    log, store = None, None
    try:
        log = yield from _opened("log", lambda: _log(settings))
        if log is not None:
            yield from _guarded("topics", lambda: _topics(settings))
        store = yield from _opened("store", lambda: _store(settings))
        if store is not None:
            the_store = store
            yield from _guarded("clock", lambda: _clocks(the_store, clock))
            yield from _guarded("traffic", lambda: _traffic(the_store))
            yield from _guarded("outbox", lambda: _outbox(the_store, clock))
        if log is not None and store is not None:
            the_log, the_store = log, store
            yield from _guarded("calibration", lambda: _in_force(settings, bundle, the_log, the_store))
            yield from _guarded("partitions", lambda: _partitions(the_log, the_store, patience, wait))
            yield from _guarded("dead letters", lambda: _dead_letters(the_log, the_store))
            yield from _guarded("actions", lambda: _actions(the_log, the_store))
    finally:
        for opened in (log, store):
            if opened is not None:
                opened.close()


# The machine.


def _packages(settings: Settings) -> Iterator[Check]:
    schemes = {urlsplit(url).scheme.split("+")[0] for url in (settings.log_url, settings.store_url)}
    schemes = {"redis" if scheme == "rediss" else scheme for scheme in schemes}
    have = {"anchorwatch": version("anchorwatch"), "python": platform.python_version()}
    missing: list[Check] = []
    for scheme in sorted(schemes & _NEEDED.keys()):
        cure = f"pip install 'anchorwatch[{scheme}]'"
        for package, module in _NEEDED[scheme]:
            if importlib.util.find_spec(module) is None:
                missing.append(Check("packages", "broken", f"{package} is missing, which {scheme} needs", cure))
            else:
                have[package] = _version(package)
        for package, module in _FASTER.get(scheme, ()):
            if importlib.util.find_spec(module) is None:
                missing.append(
                    Check("packages", "advice", f"{package} is missing: {scheme} is slower without it", cure)
                )
            else:
                have[package] = _version(package)
    yield from missing
    if not missing:
        yield Check("packages", "ok", ", ".join(f"{name} {number}" for name, number in have.items()))


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "of unknown version"


def _disk(settings: Settings) -> Iterator[Check]:
    folder = settings.data_dir
    if not folder.exists():
        yield Check("disk", "ok", f"{folder} is not there yet; it is made when it is first needed")
        return
    if not os.access(folder, os.W_OK | os.X_OK):
        yield Check("disk", "broken", f"this user can't write to {folder}", "chown it, or set ANCHORWATCH_DATA_DIR")
        return
    free = shutil.disk_usage(folder).free
    status: Status = "broken" if free < LEAST_FREE_BYTES else "advice" if free < LITTLE_FREE_BYTES else "ok"
    cure = "" if status == "ok" else "free space, or move the data directory (ANCHORWATCH_DATA_DIR)"
    yield Check("disk", status, f"{free // MIB:,} MiB are free for {folder}", cure)


def _secrets(settings: Settings) -> Iterator[Check]:
    """Files that hold a secret: whether they are there, and whether others can read them."""
    key = settings.data_dir / KEY_FILE
    files: dict[str, Path] = {}
    if settings.installation_key is None and key.exists():
        files["the installation key"] = key
    for name in sorted(type(settings).model_fields):
        value = getattr(settings, name)
        # The files of secrets are named so; certificates may be read by anybody.
        if isinstance(value, Path) and name.endswith(
            ("password_file", "key_file", "keys_file", "secret_file", "tls_key")
        ):
            files[f"ANCHORWATCH_{name.upper()}"] = value
    fine = True
    for what, path in files.items():
        if not path.exists():
            if path != getattr(settings, "api_keys_file", None):
                fine = False
                yield Check("secrets", "broken", f"{what}: there is no {path}", "make it, or unset the variable")
        elif os.name == "posix" and path.stat().st_mode & 0o077:
            fine = False
            status: Status = "broken" if path == key else "advice"
            yield Check("secrets", status, f"{what}: other users can read {path}", f"chmod 600 {path}")
    if settings.installation_key is None and not key.exists():
        fine = False
        yield Check(
            "secrets",
            "advice",
            "there is no installation key here: the first collector makes one, on each machine another",
            "where collectors on several machines derive conversation ids, give all the same "
            "ANCHORWATCH_INSTALLATION_KEY",
        )
    if fine:
        yield Check("secrets", "ok", f"{len(files)} files that only their owner can read")


def _spool(settings: Settings) -> Iterator[Check]:
    if settings.when_full != "spool" or settings.spool_dir is None:
        return
    folder, most = settings.spool_dir, settings.spool_max_bytes
    files = [path for path in folder.rglob("*") if path.is_file()] if folder.exists() else []
    size = sum(path.stat().st_size for path in files)
    if folder.exists() and not os.access(folder, os.W_OK | os.X_OK):
        yield Check("spool", "broken", f"this user can't write to {folder}", "chown it, or set ANCHORWATCH_SPOOL_DIR")
    elif size > 0.8 * most:
        yield Check(
            "spool",
            "broken" if size >= most else "advice",
            f"{size // MIB:,} of {most // MIB:,} MiB in {folder} are used: beyond that, projections are dropped",
            "bring the log back, or raise ANCHORWATCH_SPOOL_MAX_BYTES",
        )
    else:
        yield Check("spool", "ok", f"{size // MIB:,} of {most // MIB:,} MiB in {folder} are used")


# What it is set up with.


def _bundle(settings: Settings, bundle: str) -> Iterator[Check]:
    config = connect.calibration(bundle, settings)
    uncertified = sorted(name for name in config.baselines if config.boundaries_of(name).certification == "uncertified")
    says = f"{bundle}: config {config.config_id}, {len(config.baselines)} deployments"
    if uncertified:
        yield Check(
            "bundle",
            "advice",
            f"{says}; no budget is certified for: {', '.join(uncertified[:5])}",
            "anchorwatch calibrate, on healthy conversations of theirs",
        )
    else:
        yield Check("bundle", "ok", says)


def _log(settings: Settings) -> tuple[Log | None, Check]:
    if _unborn(settings.log_url):
        return None, Check("log", "advice", f"{settings.log_url} is not there yet", "start a collector or a worker")
    log = connect.log(settings)
    try:
        begun = time.monotonic()
        partitions = log.partitions(PROJECTIONS)
        held = sum(span.end - span.begin for span in (log.span(PROJECTIONS, one) for one in range(partitions)))
        seconds = time.monotonic() - begun
    except BaseException:
        log.close()
        raise
    place = connect.shown(settings.log_url)
    return log, Check("log", "ok", f"{place}: {partitions} partitions, {held:,} records; answers in {seconds:.3f} s")


def _store(settings: Settings) -> tuple[Backend | None, Check]:
    if _unborn(settings.store_url):
        return None, Check("store", "advice", f"{settings.store_url} is not there yet", "start a worker")
    store = connect.store(settings)
    try:
        begun = time.monotonic()
        responses = sum(store.counts().values())
        seconds = time.monotonic() - begun
        advice = store.advice() if isinstance(store, _Advising) else []
    except BaseException:
        store.close()
        raise
    says = f"{connect.shown(settings.store_url)}: {responses:,} records folded; answers in {seconds:.3f} s"
    if advice:
        return store, Check("store", "advice", says, "; ".join(advice))
    return store, Check("store", "ok", says)


def _unborn(url: str) -> bool:
    """Whether it names a file that opening would make."""
    return urlsplit(url).scheme == "sqlite" and not sqlite_path(url).exists()


def _topics(settings: Settings) -> Iterator[Check]:
    topics = connect.topics(settings)
    if topics is None:
        return  # a file makes its own
    try:
        told = check(topics, connect.topic_plan(settings))
    finally:
        topics.close()
    statuses: dict[str, Status] = {"error": "broken", "warning": "advice", "note": "ok"}
    for one in told:
        yield Check("topics", statuses[one.severity], f"{one.topic}: {one.problem}", one.cure)
    if not told:
        yield Check("topics", "ok", f"{PROJECTIONS}, {DEAD_LETTERS} and {ACTIONS} are as they should be")


# What goes on.


def _clocks(store: Backend, clock: Callable[[], float]) -> Iterator[Check]:
    if isinstance(store, _Timed):
        before = clock()
        theirs = store.now()
        skew = theirs - (before + clock()) / 2
        if abs(skew) > MUCH_SKEW_SECONDS:
            yield Check(
                "clock",
                "advice",
                f"the store's clock is {abs(skew):.1f} s {'ahead of' if skew > 0 else 'behind'} this machine's",
                "run NTP on both; leases and delays are measured by these clocks, verdicts are not",
            )
        else:
            yield Check("clock", "ok", f"the store's clock and this machine's differ by {abs(skew):.3f} s")
    now = clock()
    ahead = [one.time - now for one in store.sessions(LOOKED_AT) if one.time > now + FUTURE_SECONDS]
    if ahead:
        yield Check(
            "clock",
            "advice",
            f"{len(ahead)} of the riskiest conversations spoke in the future, up to {max(ahead):.0f} s ahead",
            "run NTP on the collectors: a finding is young or old by its collector's clock",
        )


def _traffic(store: Backend) -> Iterator[Check]:
    counts = store.counts()
    total = sum(counts.values())
    if not total:
        yield Check("traffic", "advice", "nothing was folded yet", "start a collector and a worker")
        return
    fine = True
    for outcome, why, cure in (
        ("unjudged", "carry another axis than the calibration", "give collectors and worker the same bundle"),
        ("learning", "are of deployments without a calibration", "anchorwatch calibrate, then calibration activate"),
    ):
        if (share := counts.get(outcome, 0) / total) > MUCH_SHARE:
            fine = False
            yield Check("traffic", "advice", f"{share:.0%} of all responses {why}: nobody is told of them", cure)
    if fine:
        yield Check("traffic", "ok", ", ".join(f"{counts[name]:,} {name}" for name in sorted(counts)))


def _outbox(store: Backend, clock: Callable[[], float]) -> Iterator[Check]:
    oldest = next(iter(store.pending(1)), None)
    age = 0.0 if oldest is None else clock() - oldest.committed
    if age > OLD_OUTBOX_SECONDS:
        yield Check(
            "outbox",
            "advice",
            f"the oldest finding has waited for {age:.0f} s",
            "is `anchorwatch dispatch` running, and its channel? Findings also wait behind a silence, and while a "
            "partition catches up",
        )
    else:
        yield Check("outbox", "ok", "empty" if oldest is None else f"the oldest finding has waited for {age:.0f} s")


def _in_force(settings: Settings, bundle: str, log: Log, store: Backend) -> Iterator[Check]:
    given = connect.calibration(bundle, settings).config_id
    found: dict[str, list[int]] = {}
    for partition in range(log.partitions(PROJECTIONS)):
        stored = store.config(PROJECTIONS, partition)
        if stored is not None:
            found.setdefault(DetectorConfig.from_json(stored).config_id, []).append(partition)
    if len(found) > 1:
        where = "; ".join(f"{id} in {', '.join(map(str, some))}" for id, some in sorted(found.items()))
        yield Check(
            "calibration",
            "advice",
            f"partitions judge by different calibrations: {where}",
            "wait until all have caught up; if that stays so, activate it again: anchorwatch calibration activate",
        )
    elif found and given not in found:
        yield Check(
            "calibration",
            "advice",
            f"{next(iter(found))} is in force, not {given} of {bundle}",
            "to change it from now on: anchorwatch calibration activate. Else name the one in force with --bundle",
        )
    else:
        yield Check("calibration", "ok", f"{given} is in force" if found else "none is in force yet")


def _partitions(log: Log, store: Backend, patience: float, wait: Callable[[float], object]) -> Iterator[Check]:
    """Lag, and whether anybody works on it."""

    def look() -> dict[int, tuple[Span, int]]:
        found = {}
        for partition in range(log.partitions(PROJECTIONS)):
            span = log.span(PROJECTIONS, partition)
            position = store.position(PROJECTIONS, partition)
            found[partition] = span, span.begin if position is None else position.offset
        return found

    before = look()
    for partition, (span, offset) in before.items():
        if not span.begin <= offset <= span.end:
            yield Check(
                "partitions",
                "broken",
                f"the store has folded partition {partition} up to {offset}, the log holds {span.begin} to {span.end}",
                "retention has overtaken the worker, or the log was replaced. Restore the log, or fold it into an "
                "empty store",
            )
    behind = [partition for partition, (span, offset) in before.items() if offset < span.end and offset >= span.begin]
    if not behind:
        if all(span.begin <= offset <= span.end for span, offset in before.values()):
            yield Check("partitions", "ok", f"all {len(before)} are folded to their ends")
        return
    wait(patience)
    after = look()
    for partition in behind:
        (span, offset), (_, earlier) = after[partition], before[partition]
        lag = span.end - offset
        if lag <= 0:
            yield Check("partitions", "ok", f"partition {partition} has caught up")
        elif offset > earlier:
            rate = (offset - earlier) / max(patience, 1e-3)
            yield Check("partitions", "ok", f"partition {partition} lags by {lag:,} records, and moves: {rate:,.0f}/s")
        elif _poisoned(log, partition, offset):
            yield Check(
                "partitions",
                "broken",
                f"partition {partition} is paused at {offset}, {lag:,} records behind: most of what came was poison",
                "anchorwatch dead-letters list. Stop the producer that writes it, or run the release that can read "
                "it; then start the worker again",
            )
        else:
            yield Check(
                "partitions",
                "broken",
                f"partition {partition} lags by {lag:,} records and did not move within {patience:g} s",
                "start a worker, or read its log: anchorwatch worker",
            )


def _poisoned(log: Log, partition: int, offset: int) -> bool:
    """Whether so many of the last 200 records before an offset are dead letters that a worker pauses."""
    letters = [one for one in newest_letters(log, LOOKED_AT) if (one.topic, one.partition) == (PROJECTIONS, partition)]
    dead = {one.offset for one in letters if offset - POISON_WINDOW <= one.offset < offset}
    begin = log.span(PROJECTIONS, partition).begin
    return len(dead) > POISON_SHARE * max(1, min(POISON_WINDOW, offset - begin))


def _dead_letters(log: Log, store: Backend) -> Iterator[Check]:
    counts = store.counts()
    share = counts.get(DEAD_LETTER, 0) / max(1, sum(counts.values()))
    letters = newest_letters(log, LOOKED_AT)
    waiting = Counter(letter.reason for letter in letters if letter.requeued is None)
    if not letters:
        yield Check("dead letters", "ok", "none")
        return
    reasons = ", ".join(f"{count} {reason}" for reason, count in waiting.most_common())
    says = f"{share:.2%} of all records; of the newest {len(letters)}, not sent again: {reasons or 'none'}"
    yield Check(
        "dead letters",
        "advice" if share > MUCH_SHARE or waiting else "ok",
        says,
        "anchorwatch dead-letters list, and show; when the cause is gone: anchorwatch dead-letters requeue"
        if share > MUCH_SHARE or waiting
        else "",
    )


def _actions(log: Log, store: Backend) -> Iterator[Check]:
    span = log.span(ACTIONS, 0)
    left = span.end - max(span.begin, store.actions_offset(span.topic_id))
    forgetting = due(store)
    if left > 0:
        yield Check(
            "actions",
            "advice",
            f"{left:,} operators' actions are not in the store yet",
            "a running worker takes them in within seconds: is there one?",
        )
    elif forgetting:
        yield Check(
            "actions",
            "advice",
            f"{len(forgetting)} conversations are still to be forgotten",
            "they are, once the workers have folded what was logged before: see the partitions",
        )
    else:
        yield Check("actions", "ok", "all that operators did is in the store")


# How a check is done.


def _guarded(name: str, work: Callable[[], Iterable[Check]]) -> Iterator[Check]:
    try:
        yield from work()
    except Exception as error:
        yield _failed(name, error)


def _opened(name: str, work: Callable[[], tuple[T | None, Check]]) -> Generator[Check, None, T | None]:
    try:
        opened, check = work()
    except Exception as error:
        yield _failed(name, error)
        return None
    yield check
    return opened


def _failed(name: str, error: Exception) -> Check:
    if isinstance(error, AnchorwatchError):
        return Check(name, "broken", error.problem, error.cure)
    return Check(
        name, "broken", f"the check itself failed: {type(error).__name__}", "a fault of this release: report it"
    )

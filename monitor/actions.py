"""What operators do, as records on one compacted topic, and the fold that takes them into the store.

The topic outlives the store: a wiped one is given the same acknowledgements, silences, verdicts and calibrations again,
and forgets again. An action's key says what it is about, and the newest record of a key holds; an empty value
withdraws it.

=====================================  ================  ==============================================================
key                                    body              what it does
=====================================  ================  ==============================================================
`acknowledge/<finding or alert id>`    `Acknowledgement`  nobody is told of it (again), but of its end
`verdict/<conversation id>`            `Verdict`         what a person found the conversation to be
`silence/<name>`                       `Silence`         nobody is told of what it matches, until a moment
`forget/<conversation id>`             `Forgetting`      delete what the store keeps of what was logged up to a place
`calibration/<topic>/<part.>/<offs.>`  `Activation`      a control record there put a calibration into force
`config/<config id>`                   `DetectorConfig`  that calibration
`resolve/<alert id>`                   `Acknowledgement`  the alert is over, by word of an operator
`paging/mode`                          `Paging`          whether anybody is told at all, or Anchorwatch only watches
`alert/<alert id>`                     `Alert`           what the dispatcher knows of an alert, and who has been told
`notification/<integration>/<group>`   `Notification`    the last message of a group, written down before it is sent
`told/<finding id>`                    `Told`            a channel has taken the finding
=====================================  ================  ==============================================================

Forgetting has to hold for what was logged before it, also in a store that lags, or was wiped and is folded anew. Clocks
can't say what was before: a response's time is its collector's. So a `Forgetting` carries the place where the log ended
when the operator spoke, and is *due* until the partition has been folded up to there; only then is the conversation
deleted. What came in between is deleted with it: too much rather than too little. Which ones are due is the store's own
knowledge, kept beside the actions and written with their offset: a wiped store has none, so all are due again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal, Protocol, TypeAlias

import msgspec
import structlog
from msgspec import Meta, Struct

from monitor.alert import Alert, Notification
from monitor.control import calibration_message
from monitor.detect.baseline import DetectorConfig
from monitor.errors import CommitRefused, ConfigurationError, EventError, LogError
from monitor.events import now_utc
from monitor.matchers import MAX_MATCHERS, Matcher, matches
from monitor.placement import partition_of
from monitor.store.store import Actions, Housekeeping, Position
from monitor.stream.log import ACTIONS, PROJECTIONS, Log, Message, Record, Span

__all__ = [
    "FORGET",
    "Acknowledgement",
    "Action",
    "ActionsFold",
    "Activation",
    "Body",
    "Forgetting",
    "Kind",
    "Paging",
    "Silence",
    "Told",
    "Verdict",
    "activate_calibration",
    "append_action",
    "append_actions",
    "body_of",
    "calibration_at",
    "decode_action",
    "due",
    "first_calibrations",
    "forget",
    "key_of",
    "read_actions",
    "recorded_calibrations",
    "withdraw",
]

Kind = Literal[
    "acknowledge",
    "verdict",
    "silence",
    "forget",
    "calibration",
    "config",
    "told",
    "resolve",
    "paging",
    "alert",
    "notification",
]

FORGET = "forget/"
DUE = "due/"  # in the store only, before the name of a conversation that is still to be forgotten
BATCH = 500
MOST = 10_000  # records that one call folds
MAX_NAME_LENGTH = 600

Text = Annotated[str, Meta(max_length=1000)]
Name = Annotated[str, Meta(min_length=1, max_length=256)]
Moment = Annotated[str, Meta(pattern=r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d{1,6})?Z$")]
Place = Annotated[int, Meta(ge=0)]


class Acknowledgement(Struct, frozen=True, omit_defaults=True):
    """Somebody has seen the finding."""

    note: Text = ""


class Verdict(Struct, frozen=True, omit_defaults=True):
    """What a person found a conversation to be, and the turn where drift began, from 0: the truth for backtests."""

    label: Literal["drifting", "healthy", "unsure"]
    turn: Place | None = None
    note: Text = ""


class Silence(Struct, frozen=True, omit_defaults=True):
    """Nobody is told, until then, of alerts that match all that is given. Nothing given matches everything.

    Who made it is the action's `by`, when its `time`, and why its note. `matchers` see the labels of an alert, see
    `monitor.alert.labels`; the three names before the note are the same for whoever wants no more.
    """

    until: Moment
    deployment: Name | None = None
    conversation_id: Name | None = None
    kind: Name | None = None
    note: Text = ""
    matchers: Annotated[tuple[Matcher, ...], Meta(max_length=MAX_MATCHERS)] = ()

    def mutes(self, labels: Mapping[str, str]) -> bool:
        """Whether it is about what has these labels, whatever the time."""
        return (
            self.deployment in (None, labels.get("deployment", ""))
            and self.conversation_id in (None, labels.get("conversation_id", ""))
            and self.kind in (None, labels.get("kind", ""))
            and matches(self.matchers, labels)
        )


class Forgetting(Struct, frozen=True):
    """Where the log ended when somebody asked to forget: `offset` is the first that is not meant."""

    topic: Name
    topic_id: str
    partition: Place
    offset: Place


class Activation(Struct, frozen=True):
    """Which calibration a control record put into force, and the id of the topic in which it lies."""

    topic_id: str
    config_id: Name


class Paging(Struct, frozen=True):
    """shadow: alerts are made and shown, and nobody is told; live: they are sent. A new installation is in shadow."""

    mode: Literal["shadow", "live"]
    note: Text = ""


class Told(Struct, frozen=True):
    """Which channel took the finding, and its episode."""

    episode_id: str
    channel: Name


Body: TypeAlias = (
    Acknowledgement
    | Verdict
    | Silence
    | Forgetting
    | Activation
    | DetectorConfig
    | Told
    | Paging
    | Alert
    | Notification
)

_BODIES: dict[str, type[Body]] = {
    "acknowledge": Acknowledgement,
    "verdict": Verdict,
    "silence": Silence,
    "forget": Forgetting,
    "calibration": Activation,
    "config": DetectorConfig,
    "told": Told,
    "resolve": Acknowledgement,
    "paging": Paging,
    "alert": Alert,
    "notification": Notification,
}


class Action(Struct, frozen=True, kw_only=True):
    """One action as it is written: JSON.

    Attributes:
        by: who did it, as they call themselves.
        time: when, by their clock; RFC 3339 in UTC with a Z. Nothing is decided by it.
        body: by the key's kind; see `body_of`.
    """

    by: Name
    time: Moment
    body: dict[str, Any]


class Store(Actions, Housekeeping, Protocol):
    """What `ActionsFold` needs of a store."""

    def position(self, topic: str, partition: int) -> Position | None:
        """See `monitor.store.store.Store.position`."""


_log = structlog.get_logger("anchorwatch.actions")
_encode = msgspec.json.Encoder(order="sorted").encode
_decode = msgspec.json.Decoder(Action).decode


# Writing.


def key_of(kind: Kind, name: str) -> str:
    """The key of an action.

    Raises:
        ConfigurationError: the name is empty, too long, or no text that a log can carry.
    """
    problem = ""
    if not name:
        problem = "is empty"
    elif len(name) > MAX_NAME_LENGTH:
        problem = f"has {len(name)} characters, more than {MAX_NAME_LENGTH}"
    else:
        try:
            name.encode()
        except UnicodeEncodeError:
            problem = "is not valid Unicode"
    if problem:
        raise ConfigurationError(
            f"what the action {kind!r} is about {problem}", cure="give the whole id, as it is shown"
        )
    return f"{kind}/{name}"


def append_action(log: Log, kind: Kind, name: str, body: Body, *, by: str, at: str | None = None) -> int:
    """Write one action, and say at which offset. Blocks until it is safe.

    Raises:
        ConfigurationError: a text is too long, holds control characters, or is no text.
        LogUnavailable, LogError: as `Log.append`. After the first it may have been written; write it again.
    """
    return append_actions(log, [(kind, name, body)], by=by, at=at)[0]


def append_actions(log: Log, actions: Sequence[tuple[Kind, str, Body]], *, by: str, at: str | None = None) -> list[int]:
    """Write several in one go; see `append_action`. `at` is the moment, by default now."""
    return log.append(ACTIONS, [Message(key_of(kind, name), _value(body, by, at)) for kind, name, body in actions])


def withdraw(log: Log, kind: Kind, names: Sequence[str]) -> None:
    """Withdraw actions, also those that nobody has done. What is forgotten stays forgotten."""
    log.append(ACTIONS, [Message(key_of(kind, name), b"") for name in names])


def forget(log: Log, conversation_id: str, *, by: str, at: str | None = None, topic: str = PROJECTIONS) -> Forgetting:
    """Ask to forget what has been logged of a conversation up to now; see the module."""
    partition = partition_of(conversation_id, log.partitions(topic))
    span = log.span(topic, partition)
    body = Forgetting(topic, span.topic_id, partition, span.end)
    append_action(log, "forget", conversation_id, body, by=by, at=at)
    return body


def activate_calibration(
    log: Log, config: DetectorConfig, *, by: str, at: str | None = None, topic: str = PROJECTIONS
) -> dict[int, int]:
    """Put a calibration into force from here on in every partition; says at which offset of each.

    After an error some partitions may have it: activate it again, twice does no harm. The calibration itself goes
    first, so that no place ever names one that can't be found.
    """
    partitions = range(log.partitions(topic))
    append_action(log, "config", config.config_id, config, by=by, at=at)
    offsets = log.append(topic, [calibration_message(config, partition) for partition in partitions])
    done: list[tuple[Kind, str, Body]] = [
        (
            "calibration",
            f"{topic}/{partition}/{offset}",
            Activation(log.span(topic, partition).topic_id, config.config_id),
        )
        for partition, offset in zip(partitions, offsets, strict=True)
    ]
    append_actions(log, done, by=by, at=at)
    return dict(zip(partitions, offsets, strict=True))


def first_calibrations(
    log: Log, config: DetectorConfig, *, by: str, topic: str = PROJECTIONS
) -> Callable[[int, int], DetectorConfig]:
    """Partition, offset → the calibration in force there; where there is none, `config`, which is noted as such first.

    For a worker: what it is given when it is started for the first time must judge those records again when the store
    is rebuilt, whatever the worker is given then.
    """
    recorded = recorded_calibrations(log, topic)

    def first(partition: int, offset: int) -> DetectorConfig:
        found = recorded(partition, offset)
        if found is None:
            place = f"{topic}/{partition}/{offset}"
            body = Activation(log.span(topic, partition).topic_id, config.config_id)
            append_actions(log, [("config", config.config_id, config), ("calibration", place, body)], by=by)
        return found or config

    return first


# Reading.


def decode_action(key: str, value: bytes) -> Action:
    """Read one action, with its body checked.

    Raises:
        EventError: an unknown kind, or a malformed value. Says nothing of what it holds.
    """
    kind, _, name = key.partition("/")
    if kind not in _BODIES or not name:
        raise EventError("not an action: its key is of no known kind", cure="run the Anchorwatch release that wrote it")
    try:
        action = _decode(value)
        msgspec.convert(action.body, _BODIES[kind])
    except (msgspec.MsgspecError, UnicodeDecodeError, ConfigurationError) as error:
        raise EventError(
            f"not a {kind!r} action: it is malformed", cure="write it again by the command line"
        ) from error
    return action


def body_of(key: str, value: bytes) -> Body:
    """What an action is about. Raises as `decode_action`."""
    action = decode_action(key, value)
    return msgspec.convert(action.body, _BODIES[key.partition("/")[0]])


def read_actions(log: Log) -> dict[str, bytes]:
    """The newest value of every key, straight from the log, without a store. Blocks while it reads all of the topic."""
    begin, end, _ = log.span(ACTIONS, 0)
    actions: dict[str, bytes] = {}
    while begin < end and (records := log.read(ACTIONS, 0, begin, BATCH)):
        for key, value in _changes(records).items():
            if value is None:
                actions.pop(key, None)
            else:
                actions[key] = value
        begin = records[-1].offset + 1
    return actions


def calibration_at(
    actions: Mapping[str, bytes], topic: str, partition: int, offset: int, topic_id: str = ""
) -> DetectorConfig | None:
    """The calibration that operators had put into force at an offset of a partition; None where they had put none.

    For a partition whose stored state is gone and whose log no longer reaches back to the control record. Those of
    another topic of the same name, which its id tells, are passed over; the id is not compared where one is unknown.

    Raises:
        LogError: the actions name a calibration that they do not hold.
    """
    prefix = f"calibration/{topic}/{partition}/"
    places = []
    for key, value in actions.items():
        place = key.removeprefix(prefix)
        if key.startswith(prefix) and place.isdecimal() and int(place) <= offset:
            body = body_of(key, value)
            assert isinstance(body, Activation)
            if not topic_id or not body.topic_id or topic_id == body.topic_id:
                places.append((int(place), body.config_id))
    if not places:
        return None
    _, config_id = max(places)
    value = actions.get(f"config/{config_id}", b"")
    config = body_of(f"config/{config_id}", value) if value else None
    if not isinstance(config, DetectorConfig):
        raise LogError(
            f"the calibration {config_id}, in force at {topic}/{partition}/{offset}, is missing from {ACTIONS}",
            cure="activate the calibration that you mean: anchorwatch calibration activate FILE",
        )
    return config


def recorded_calibrations(log: Log, topic: str = PROJECTIONS) -> Callable[[int, int], DetectorConfig | None]:
    """Partition, offset → the calibration in force there, as the log of actions has it; for `Worker` and `replay`.

    What it gives reads the topic when it is first called, and again when something has been added.
    """
    known: list[tuple[Span, dict[str, bytes]]] = []

    def recorded(partition: int, offset: int) -> DetectorConfig | None:
        span = log.span(ACTIONS, 0)
        if not known or known[-1][0] != span:
            known[:] = [(span, read_actions(log))]
        return calibration_at(known[-1][1], topic, partition, offset, log.span(topic, partition).topic_id)

    return recorded


def due(actions: Actions) -> set[str]:
    """The conversations that a store is still to forget."""
    return {key.removeprefix(DUE) for key in actions.actions(DUE)}


class ActionsFold:
    """Takes the topic's records into the store, each once, and forgets what is due.

    Any number of processes may run it at a time: a lease saves work, the stored offset keeps it right.
    """

    def __init__(self, log: Log, store: Store) -> None:
        self._log = log
        self._store = store

    def run_once(self) -> int:
        """Fold at most 10,000 records, and forget what has become due; says how many records that were.

        Raises:
            LogUnavailable, StoreUnavailable: nothing is lost; call again later.
            LogError, StoreError: somebody must look.
        """
        total = 0
        while total < MOST and (folded := self._fold()):
            total += folded
        self._forget_due()
        return total

    def _fold(self) -> int:
        begin, end, topic_id = self._log.span(ACTIONS, 0)
        expected = self._store.actions_offset(topic_id)
        if expected == end:
            return 0
        if expected > end:
            # A broker has lost what it had acknowledged, or gives topics no id. To fold again does no harm.
            _log.warning("the topic of actions is shorter than it was: it is folded again", had=expected, has=end)
        # Compaction leaves gaps, and the first record that is kept may lie far behind `begin`.
        start = expected if begin <= expected <= end else begin
        records = self._log.read(ACTIONS, 0, start, BATCH) if start < end else []
        if start < end and not records:
            return 0
        offset = records[-1].offset + 1 if records else end
        changes = _changes(records)
        if asked := [key for key in changes if key.startswith(FORGET)]:
            # From the beginning, nothing that is kept says that it was done: to forget twice does no harm.
            kept = self._store.actions(FORGET) if expected else {}
            for key in asked:
                if changes[key] != kept.get(key):  # else it is done, and what came since need not go
                    changes[DUE + key.removeprefix(FORGET)] = changes[key]
        try:
            self._store.fold_actions(topic_id, expected, offset, changes)
        except CommitRefused:
            return 0  # somebody else was faster
        return len(records)

    def _forget_due(self) -> None:
        """Deletes first and notes it then: after a crash in between it deletes again, which is better than never."""
        topic_id = self._log.span(ACTIONS, 0).topic_id
        offset = self._store.actions_offset(topic_id)  # read first: whoever asks again in between moves it
        positions: dict[tuple[str, int], Position | None] = {}
        for key, value in self._store.actions(DUE).items():
            conversation_id = key.removeprefix(DUE)
            where = body_of(FORGET + conversation_id, value)
            assert isinstance(where, Forgetting)
            place = where.topic, where.partition
            if place not in positions:
                positions[place] = self._store.position(*place)
            position = positions[place]
            reached = where.offset == 0 or (position is not None and position.offset >= where.offset)
            if not reached and not self._replaced(where):
                continue
            kept = self._store.forget(conversation_id)
            _log.info("a conversation was forgotten", partition=where.partition, anything_was_kept=kept)
            try:
                self._store.fold_actions(topic_id, offset, offset, {key: None})
            except CommitRefused:
                return  # somebody folds at the same time: it stays due, and is forgotten once more

    def _replaced(self, where: Forgetting) -> bool:
        """Whether the topic is another one now: what was meant is not in the log any more."""
        now = self._log.span(where.topic, where.partition).topic_id
        return bool(now and where.topic_id and now != where.topic_id)


def _changes(records: Sequence[Record]) -> dict[str, bytes | None]:
    """Key → its newest value, None where it was withdrawn. What is no action is passed over, and told once a batch."""
    changes: dict[str, bytes | None] = {}
    malformed = []
    for record in records:
        if record.value:
            try:
                decode_action(record.key, record.value)
            except EventError as error:
                malformed.append((record.offset, error.problem))
                continue
        elif record.key.partition("/")[0] not in _BODIES:
            malformed.append((record.offset, "withdraws nothing known"))
            continue
        changes[record.key] = record.value or None
    if malformed:
        offset, problem = malformed[0]
        _log.warning("records that are no actions", count=len(malformed), first_offset=offset, problem=problem)
    return changes


def _value(body: Body, by: str, at: str | None) -> bytes:
    """The action as it is written.

    Raises:
        ConfigurationError: lists every text that is wrong.
    """
    texts = {"by": by, **{name: text for name in ("note",) if (text := getattr(body, name, ""))}}
    problems = [
        f"{name} holds control characters, or is not valid Unicode"
        for name, text in texts.items()
        if any(not letter.isprintable() and letter != "\n" for letter in text)
    ]
    try:
        plain = msgspec.to_builtins(body)
        msgspec.convert(plain, type(body))
        value = _encode(Action(by=by, time=at or now_utc(), body=plain))
        _decode(value)
    except msgspec.MsgspecError as error:
        problems.append(str(error))
    except UnicodeEncodeError:
        problems.append("a text is not valid Unicode")
    if problems:
        raise ConfigurationError(
            "the action is wrong:\n  - " + "\n  - ".join(problems),
            cure="say it in plain, short text: names up to 256 characters, notes up to 1000",
        )
    return value

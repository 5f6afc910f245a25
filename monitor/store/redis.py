"""The store on Redis, for many workers on many machines: what `sqlite` keeps in one file, spread over partitions.

It knows nothing of the fold, and never tries again by itself: who calls it knows how long to wait. A commit is one
script (`lua`), a conversation one string (`layout`). All keys of a partition share a hash tag, so that on a cluster
they are on one server, and partitions spread over the servers. docs/redis.md has the table of keys.
"""

from __future__ import annotations

import hashlib
import heapq
import itertools
import math
import re
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any, NamedTuple, TypeVar

import msgspec
from redis import Redis, RedisCluster, Sentinel
from redis.backoff import NoBackoff
from redis.cluster import ClusterNode
from redis.exceptions import (
    AskError,
    AuthenticationError,
    AuthenticationWrongNumberOfArgsError,
    AuthorizationError,
    ClusterError,
    NoPermissionError,
    NoScriptError,
    OutOfMemoryError,
    ReadOnlyError,
    RedisClusterException,
    RedisError,
    ResponseError,
    TryAgainError,
)
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import TimeoutError as RedisTimeoutError
from redis.retry import Retry
from redis.sentinel import MasterNotFoundError

from monitor.address import RedisAddress, redis_address
from monitor.errors import AnchorwatchError, ConfigurationError, EventError, StoreError, StoreUnavailable
from monitor.events import Finding, decode_finding, encode
from monitor.placement import partition_of
from monitor.store.gate import another_log, refused
from monitor.store.layout import (
    READ_AHEAD,
    damaged,
    label_of,
    pack_points,
    pack_session,
    pack_state,
    state_of,
    unpack_points,
    unpack_session,
)
from monitor.store.lua import CLOSE, COMMIT, FOLD_ACTIONS, FORGET, LEASE, PRUNE, RELEASE, SWEEP
from monitor.store.store import (
    ClosedMinutes,
    Commit,
    MinuteSums,
    Pending,
    Position,
    Progress,
    Rank,
    Session,
    TrajectoryPoint,
)

__all__ = ["RedisStore"]

T = TypeVar("T")

SCHEMA = b"2"
PREFIX = "anchorwatch"
TRAJECTORY_POINTS = 256
TTL_SECONDS = 7 * 86_400.0
TIMEOUT_SECONDS = 5.0
OLDEST_REDIS = (7, 0)
KEPT_FINDINGS = 2_000  # newest ones, per partition, for those who ask for no conversation
KEPT_MINUTES = 2 * 24 * 60
LISTED_SECONDS = 60.0  # how often a commit says again that its partition is here
_CHUNK = 1000
_PREFIX = re.compile(r"[A-Za-z0-9._:-]{1,64}")
# What Redis answers while it can't serve, and soon may. The others of its words are lasting.
_PASSING = (
    "BUSY",
    "CLUSTERDOWN",
    "LOADING",
    "MASTERDOWN",
    "MISCONF",
    "MOVED",
    "NOREPLICAS",
    "OOM",
    "READONLY",
    "TRYAGAIN",
)
_NOT_ALLOWED = "The user executing the script can't"

_label = msgspec.json.Decoder(tuple[str, str, str])
_closed = msgspec.json.Decoder(ClosedMinutes)
_encode = msgspec.json.Encoder().encode


class _Script:
    """A script and the name by which Redis knows it once it has seen it."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.sha = hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest()


_COMMIT, _FORGET, _SWEEP, _PRUNE = _Script(COMMIT), _Script(FORGET), _Script(SWEEP), _Script(PRUNE)
_LEASE, _RELEASE, _CLOSE, _FOLD_ACTIONS = _Script(LEASE), _Script(RELEASE), _Script(CLOSE), _Script(FOLD_ACTIONS)


class _Listed(NamedTuple):
    """A partition that was committed: of how many, 0 where nobody knew, and of which topic, empty likewise."""

    of: int
    topic_id: str


class _Ranked(NamedTuple):
    """One conversation in a ranking; they sort as people want to see them."""

    score: float
    name: bytes
    tag: str
    ranking: str


class RedisStore:
    """All the Protocols of `store` on one Redis, with Sentinel, or on a cluster.

    What a power cut or a failover takes of the last second, always whole commits, a worker folds once more from the
    log, and comes to the same ids. A wiped Redis is a store without positions: it is rebuilt as far as the log reaches.

    Any number of threads may use one.
    """

    def __init__(
        self,
        url: str,
        *,
        password: str | None = None,
        trajectory_points: int = TRAJECTORY_POINTS,
        ttl_seconds: float = TTL_SECONDS,
        prefix: str = PREFIX,
        ca_file: str | None = None,
        sentinel_password: str | None = None,
        timeout_seconds: float = TIMEOUT_SECONDS,
    ) -> None:
        """Connect and look whether this Redis will do. One that does not answer now is looked at when it does.

        Args:
            url: see `redis_address`.
            password: of the Redis; goes before the URL's.
            trajectory_points: how many are kept of a conversation.
            ttl_seconds: how long a conversation is kept after its last response, by the server's clock. It only
                collects garbage: when a conversation begins anew is the fold's to say, so keep it well above that gap.
            prefix: what all keys begin with; several installations may share a Redis.
            ca_file: certificates that sign the server's, where the system's do not.
            sentinel_password: of the sentinels.
            timeout_seconds: how long to wait for an answer.

        Raises:
            ConfigurationError: a wrong URL or prefix.
            StoreError: it refuses us, may throw keys away, is too old, or holds another schema.
        """
        self._address = redis_address(url)
        if not _PREFIX.fullmatch(prefix):
            raise ConfigurationError(
                "the prefix of the store's keys is wrong", cure="use up to 64 letters, digits and . _ : -"
            )
        self._password = password
        self._sentinel_password = sentinel_password
        self._ca_file = ca_file
        self._timeout = timeout_seconds
        self._trajectory_points = trajectory_points
        self._ttl = max(1, int(ttl_seconds))
        self._prefix = prefix
        self._where = ", ".join(f"{host}:{port}" for host, port in self._address.hosts)
        self._opening = threading.Lock()
        self._client: Any = None
        self._sound = False
        self._shut = False
        self._listed: dict[tuple[str, int], tuple[_Listed, float]] = {}
        try:
            self._look()
        except StoreUnavailable:
            pass  # whoever uses it will be told, and it is looked at then
        except BaseException:
            self.close()
            raise

    # For the worker.

    def position(self, topic: str, partition: int) -> Position | None:
        """See `Store.position`."""
        key = self._tag(topic, partition) + "position"
        schema, offset, revision = self._do("HMGET", key, "schema", "offset", "revision")
        _same_schema(schema)
        return None if offset is None else Position(int(offset), int(revision))

    def config(self, topic: str, partition: int) -> bytes | None:
        """See `Store.config`."""
        found: bytes | None = self._do("HGET", self._tag(topic, partition) + "position", "config")
        return found

    def load(self, topic: str, partition: int, conversation_ids: list[str]) -> dict[str, bytes]:
        """See `Store.load`."""
        if not conversation_ids:
            return {}
        tag = self._tag(topic, partition)
        prefix = tag + "c:"
        values = self._do("MGET", *[prefix + key for key in conversation_ids])
        found = [(key, value) for key, value in zip(conversation_ids, values, strict=True) if value is not None]
        labels = self._labels([(tag, label_of(value)) for _, value in found])
        states = [(key, state_of(value, labels.get((tag, label_of(value))))) for key, value in found]
        return {key: state for key, state in states if state}

    def commit(self, batch: Commit) -> None:
        """See `Store.commit`. One script, one round trip; two more at a partition's first one, and once a minute."""
        self._list(batch)
        tag = self._tag(batch.topic, batch.partition)
        expected = batch.expected
        arguments: list[Any] = [
            tag,
            SCHEMA,
            "" if expected is None else expected.offset,
            "" if expected is None else expected.revision,
            batch.offset,
            batch.topic_id,
            batch.partitions,
            "" if batch.watermark is None else repr(batch.watermark),
            int(batch.behind),
            batch.config or b"",
            self._ttl,
            self._trajectory_points,
            KEPT_FINDINGS,
        ]
        arguments.append(len(batch.findings))
        for finding in batch.findings:
            arguments += [finding.id, finding.conversation_id, _score(finding), encode(finding)]
        keys, conversations = _conversations(tag, batch)
        arguments += conversations
        arguments.append(len(batch.counts))
        for outcome, count in batch.counts.items():
            arguments += [outcome, count]
        arguments.append(len(batch.sums))
        for s in batch.sums:
            arguments += [s.minute // 60, f"{s.minute} {s.deployment}", s.responses, s.z, s.warned]
        verdict, *stored = self._run(_COMMIT, [tag + "position", tag + "never", *keys], arguments)
        if verdict == 1:
            found = Position(int(stored[0]), int(stored[1])) if stored and stored[0] is not None else None
            raise refused(f"{batch.topic}/{batch.partition}", found, expected)
        if verdict == 2:
            problem = another_log(batch, topic_id=(stored[0] or b"").decode(), partitions=int(stored[1] or 0))
            assert problem is not None
            raise problem
        if verdict == 3:
            _same_schema(stored[0])

    def close(self) -> None:
        """See `Store.close`."""
        with self._opening:
            self._shut = True
            client, self._client = self._client, None
        if client is not None:
            client.close()

    # For people.

    def sessions(
        self,
        limit: int,
        *,
        offset: int = 0,
        after: Rank | None = None,
        deployment: str | None = None,
        since: float | None = None,
    ) -> list[Session]:
        """See `Reader.sessions`. Reads no more than it needs from each ranking; what has aged away is swept up."""
        tags = self._tags()
        if deployment is None:
            found = self._pipe([("SMEMBERS", tag + "rankings") for tag in tags])
            rankings = [(tag, name.decode()) for tag, names in zip(tags, found, strict=True) for name in names]
        else:
            rankings = [(tag, deployment) for tag in tags]
        sessions: list[Session] = []
        ranked = self._ranked(rankings, min(offset + limit, _CHUNK), after)
        while len(sessions) < limit and (some := list(itertools.islice(ranked, min(offset + limit, _CHUNK)))):
            for session in self._sessions(some):
                if since is not None and session.time < since:
                    continue
                if offset > 0:
                    offset -= 1
                elif len(sessions) < limit:
                    sessions.append(session)
        return sessions

    def session(self, conversation_id: str) -> Session | None:
        """See `Reader.session`."""
        for tag in self._tags_of(conversation_id):
            for session in self._sessions([_Ranked(0.0, conversation_id.encode(), tag, "")]):
                return session
        return None

    def trajectory(self, conversation_id: str) -> list[TrajectoryPoint]:
        """See `Reader.trajectory`."""
        for tag in self._tags_of(conversation_id):
            if value := self._do("GET", f"{tag}c:{conversation_id}"):
                return unpack_points(value)
        return []

    def findings(self, limit: int, *, conversation_id: str | None = None) -> list[Finding]:
        """See `Reader.findings`. Without a conversation, of the newest 2,000 per partition."""
        if conversation_id is not None:
            tags = self._tags_of(conversation_id) if conversation_id else [self._tag_of("fleet")]
            bodies = [
                body for found in self._pipe([("HVALS", f"{t}f:{conversation_id}") for t in tags]) for body in found
            ]
            findings = sorted(map(_finding, bodies), key=lambda f: (float(_score(f)), f.id))
            return findings[:limit]
        if limit < 1:
            return []
        tags = [*self._tags(), self._tag_of("fleet")]
        found = self._pipe([("ZRANGE", tag + "findings", 0, limit - 1, "WITHSCORES") for tag in tags])
        newest = heapq.merge(
            *([(score, member, tag) for member, score in _pairs(rows)] for tag, rows in zip(tags, found, strict=True))
        )
        wanted = []
        for _, member, tag in itertools.islice(newest, limit):
            id, _, conversation = member.partition(b"\0")
            wanted.append(("HGET", f"{tag}f:{conversation.decode()}", id))
        return [_finding(body) for body in self._pipe(wanted) if body is not None]

    def counts(self) -> dict[str, int]:
        """See `Reader.counts`."""
        counts: dict[str, int] = {}
        for found in self._pipe([("HGETALL", tag + "counts") for tag in self._tags()]):
            for outcome, count in found.items():
                counts[outcome.decode()] = counts.get(outcome.decode(), 0) + int(count)
        return dict(sorted(counts.items()))

    # For the dispatcher.

    def pending(self, limit: int) -> list[Pending]:
        """See `Outbox.pending`. The oldest of all partitions, by the clocks of their servers."""
        if limit < 1:
            return []
        tags = [*self._tags(), self._tag_of("fleet")]
        found = self._pipe([("XRANGE", tag + "outbox", "-", "+", "COUNT", limit) for tag in tags])
        waiting = [
            (*map(int, entry.split(b"-")), tag, fields[b"f"])
            for tag, entries in zip(tags, found, strict=True)
            for entry, fields in entries
        ]
        waiting.sort()
        return [
            Pending(f"{tag[len(self._prefix) + 2 : -2]}:{at}-{sequence}", _finding(body), at / 1000)
            for at, sequence, tag, body in waiting[:limit]
        ]

    def settle(self, references: list[str]) -> None:
        """See `Outbox.settle`."""
        entries: dict[str, list[str]] = {}
        for reference in references:
            partition, _, entry = reference.rpartition(":")
            if partition and re.fullmatch(r"\d{1,19}-\d{1,19}", entry):
                entries.setdefault(partition, []).append(entry)
        self._pipe(
            [
                ("XDEL", self._tag_of(partition) + "outbox", *some)
                for partition, all_of_it in entries.items()
                for some in _chunks(all_of_it)
            ]
        )

    def progress(self, topic: str) -> list[Progress]:
        """See `Outbox.progress`."""
        partitions = sorted(self._partitions().get(topic, ()))
        found = self._pipe(
            [("HMGET", self._tag(topic, p) + "position", "offset", "watermark", "behind") for p in partitions]
        )
        return [
            Progress(partition, float(watermark or 0.0), behind == b"1")
            for partition, (offset, watermark, behind) in zip(partitions, found, strict=True)
            if offset is not None
        ]

    # For whoever keeps house.

    def lease(self, name: str, holder: str, seconds: float) -> bool:
        """See `Housekeeping.lease`. Ends by the server's clock."""
        return bool(self._run(_LEASE, [f"{self._prefix}:lease:{name}"], [holder, max(1, int(seconds * 1000))]))

    def release(self, name: str, holder: str) -> None:
        """See `Housekeeping.release`."""
        self._run(_RELEASE, [f"{self._prefix}:lease:{name}"], [holder])

    def forget(self, conversation_id: str) -> bool:
        """See `Housekeeping.forget`. After an error, call it again: only then is it sure that nothing is left."""
        gone = 0
        for tag in self._tags_of(conversation_id):
            keys = [tag + "position", tag + "never", f"{tag}c:{conversation_id}"]
            gone += self._run(_FORGET, keys, [tag, conversation_id])
            # From here on nobody can commit anything of it from memory, so the outbox gets no more.
            begin = "-"
            while entries := self._do("XRANGE", tag + "outbox", begin, "+", "COUNT", _CHUNK):
                its = [entry for entry, fields in entries if _finding(fields[b"f"]).conversation_id == conversation_id]
                if its:
                    gone += self._do("XDEL", tag + "outbox", *its)
                begin = b"(" + entries[-1][0]
        return gone > 0

    def expire(self, before: float) -> int:  # noqa: ARG002
        """See `Housekeeping.expire`. Conversations age by themselves; this sweeps what they leave in the rankings."""
        swept = 0
        for tag in self._tags():
            for name in self._do("SMEMBERS", tag + "rankings"):
                cursor = b"0"
                while True:
                    cursor, rows = self._do("ZSCAN", f"{tag}r:{name.decode()}", cursor, "COUNT", _CHUNK)
                    swept += self._sweep(tag, name.decode(), [member for member, _ in rows])
                    if int(cursor) == 0:
                        break
        return swept

    # For the reader of the fleet's minutes.

    def minutes(self, first: int, last: int) -> list[MinuteSums]:
        """See `Fleet.minutes`."""
        tags = self._tags()
        hours = self._pipe([("ZRANGEBYSCORE", tag + "hours", first // 60, last // 60) for tag in tags])
        found = self._pipe(
            [("HGETALL", f"{t}s:{h.decode()}") for t, some in zip(tags, hours, strict=True) for h in some]
        )
        sums: dict[tuple[int, str], list[int]] = {}
        for fields in found:
            for field, value in fields.items():
                minute, deployment = field.decode().split(" ", 1)
                if first <= int(minute) <= last:
                    one = sums.setdefault((int(minute), deployment), [0, 0, 0])
                    for i, number in enumerate(value.split()):
                        one[i] += int(number)
        return [MinuteSums(*key, *numbers) for key, numbers in sorted(sums.items())]

    def closed(self) -> ClosedMinutes | None:
        """See `Fleet.closed`."""
        found = self._do("HGET", self._tag_of("fleet") + "closed", "closed")
        return None if found is None else _closed.decode(found)

    def close_minutes(self, expected: int | None, closed: ClosedMinutes, findings: list[Finding]) -> None:
        """See `Fleet.close_minutes`."""
        tag = self._tag_of("fleet")
        arguments: list[Any] = [
            tag,
            "" if expected is None else expected,
            closed.through,
            _encode(closed),
            KEPT_FINDINGS,
        ]
        for finding in findings:
            arguments += [finding.id, _score(finding), encode(finding)]
        verdict, *stored = self._run(_CLOSE, [tag + "closed", tag + "never"], arguments)
        if verdict:
            raise refused("the fleet's minutes", int(stored[0]) if stored and stored[0] is not None else None, expected)
        for tag in self._tags():
            self._run(_PRUNE, [tag + "hours", tag + "never"], [tag, (closed.through - KEPT_MINUTES) // 60])

    # For the operators' actions.

    def actions_offset(self, topic_id: str) -> int:
        """See `Actions.actions_offset`."""
        found, offset = self._do("HMGET", self._tag_of("actions") + "position", "topic_id", "offset")
        return int(offset) if found == topic_id.encode() else 0

    def fold_actions(self, topic_id: str, expected: int, offset: int, changes: Mapping[str, bytes | None]) -> None:
        """See `Actions.fold_actions`. What was folded from a topic with another id goes: it is another history."""
        tag = self._tag_of("actions")
        arguments: list[Any] = [topic_id, expected, offset]
        for key, value in changes.items():
            arguments += [key, 0 if value is None else 1, value or b""]
        verdict, *stored = self._run(_FOLD_ACTIONS, [tag + "position", tag + "values", tag + "keys"], arguments)
        if verdict:
            raise refused("the actions", int(stored[0]), expected)

    def actions(self, prefix: str) -> dict[str, bytes]:
        """See `Actions.actions`."""
        tag = self._tag_of("actions")
        begin = prefix.encode()
        # No UTF-8 has the byte 255.
        keys = self._do("ZRANGEBYLEX", tag + "keys", b"[" + begin, b"(" + begin + b"\xff")
        chunks = list(_chunks(keys))
        found = self._pipe([("HMGET", tag + "values", *some) for some in chunks])
        return {
            key.decode(): value
            for some, values in zip(chunks, found, strict=True)
            for key, value in zip(some, values, strict=True)
            if value is not None
        }

    # For whoever checks.

    def advice(self) -> list[str]:
        """What to change at this Redis though it will do. Nothing where all is well.

        Raises:
            StoreError: it will not do; see the constructor.
        """
        return sorted({line for told in self._look() for line in _advice(told)})

    def now(self) -> float:
        """The clock of this Redis, or of the cluster's first primary; seconds since 1970."""
        return int(self._look()[0]["server_time_usec"]) / 1e6

    # Below here: keys, connections, errors.

    def _tag_of(self, name: str) -> str:
        return f"{self._prefix}:{{{name}}}:"

    def _tag(self, topic: str, partition: int) -> str:
        """What the keys of a partition begin with. Our own topics lose the prefix that the keys have already; the
        others get a slash, which no topic's name can begin with, so that no two topics share keys."""
        own = self._prefix + "."
        name = topic.removeprefix(own) if topic.startswith(own) else "/" + topic
        return self._tag_of(f"{name}/{partition}")

    def _list(self, batch: Commit) -> None:
        """Say where to find a partition: before its first commit, and again now and then, for this key may be on
        another server of a cluster, and be lost alone. A topic that has grown is stopped here, new partitions too."""
        now = time.monotonic()
        place, told = (batch.topic, batch.partition), _Listed(batch.partitions, batch.topic_id)
        last, when = self._listed.get(place, (None, now))
        if batch.expected is not None and told == last and now - when < LISTED_SECONDS:
            return
        known = self._partitions().get(batch.topic, {})
        for one in known.values():
            if problem := another_log(batch, topic_id=one.topic_id, partitions=one.of):
                raise problem
        before = known.get(batch.partition, _Listed(0, ""))
        listed = _Listed(told.of or before.of, told.topic_id or before.topic_id)
        self._do(
            "HSET", self._prefix + ":store", "schema", SCHEMA, "/".join(map(str, place)), " ".join(map(str, listed))
        )
        self._listed[place] = told, now

    def _partitions(self) -> dict[str, dict[int, _Listed]]:
        """Topic → partition → of how many it is."""
        found: dict[str, dict[int, _Listed]] = {}
        for field, value in self._do("HGETALL", self._prefix + ":store").items():
            topic, _, partition = field.decode().rpartition("/")
            if topic:
                of, _, topic_id = value.decode().partition(" ")
                found.setdefault(topic, {})[int(partition)] = _Listed(int(of), topic_id)
        return found

    def _tags(self) -> list[str]:
        found = self._partitions()
        return [self._tag(topic, partition) for topic in sorted(found) for partition in sorted(found[topic])]

    def _tags_of(self, conversation_id: str) -> list[str]:
        """Where a conversation may be: one partition of each topic whose number of partitions is known."""
        tags = []
        for topic, partitions in sorted(self._partitions().items()):
            count = max(one.of for one in partitions.values())
            places = [partition_of(conversation_id, count)] if count else sorted(partitions)
            tags += [self._tag(topic, place) for place in places]
        return tags

    def _place(self, rankings: Sequence[tuple[str, str]], after: Rank) -> tuple[float, bytes]:
        """A place in these rankings. A session's numbers have seven digits, a ranking's are exact: where the session
        still stands there, the ranking's own number counts."""
        score = math.inf if after.risk is None else -after.risk
        name = after.conversation_id.encode()
        for found in self._pipe([("ZSCORE", f"{tag}r:{ranking}", name) for tag, ranking in rankings]):
            if found is not None and math.isclose(float(found), score, rel_tol=1e-6):
                return float(found), name
        return score, name

    def _ranked(self, rankings: Sequence[tuple[str, str]], chunk: int, after: Rank | None = None) -> Iterator[_Ranked]:
        """All conversations of these rankings behind a place, merged, riskiest first; fetched by the chunk."""
        begins = dict.fromkeys(rankings, 0)
        place = None
        if after is not None and rankings:
            place = self._place(rankings, after)
            before = [("ZCOUNT", f"{tag}r:{name}", "-inf", f"({place[0]!r}") for tag, name in rankings]
            begins = dict(zip(rankings, self._pipe(before), strict=True))
        for one in self._merged(rankings, chunk, begins):
            if place is None or (one.score, one.name) > place:
                yield one

    def _merged(
        self, rankings: Sequence[tuple[str, str]], chunk: int, begins: Mapping[tuple[str, str], int]
    ) -> Iterator[_Ranked]:
        waiting: dict[tuple[str, str], deque[_Ranked]] = {}

        def fetch(some: Sequence[tuple[str, str]], taken: int) -> None:
            starts = [begins[one] + taken for one in some]
            commands = [
                ("ZRANGE", f"{tag}r:{name}", start, start + chunk - 1, "WITHSCORES")
                for (tag, name), start in zip(some, starts, strict=True)
            ]
            for (tag, name), rows in zip(some, self._pipe(commands), strict=True):
                waiting[tag, name] = deque(_Ranked(score, member, tag, name) for member, score in _pairs(rows))

        fetch(rankings, 0)
        taken = dict.fromkeys(waiting, 0)
        heap = [queue.popleft() for queue in waiting.values() if queue]
        heapq.heapify(heap)
        while heap:
            first = heap[0]
            place = first.tag, first.ranking
            yield first
            taken[place] += 1
            if not waiting[place] and taken[place] % chunk == 0:
                fetch([place], taken[place])
            if waiting[place]:
                heapq.heapreplace(heap, waiting[place].popleft())
            else:
                heapq.heappop(heap)

    def _sessions(self, ranked: Sequence[_Ranked]) -> Iterator[Session]:
        """Those of them that are there, in this order; the others are swept from their rankings."""
        places = [(one.tag, one.name.decode()) for one in ranked]
        values = self._pipe([("GETRANGE", f"{tag}c:{name}", 0, READ_AHEAD - 1) for tag, name in places])
        labels = self._labels([(tag, label_of(value)) for (tag, _), value in zip(places, values, strict=True) if value])
        gone: dict[tuple[str, str], list[bytes]] = {}
        for one, (tag, name), value in zip(ranked, places, values, strict=True):
            if not value:
                if one.ranking:
                    gone.setdefault((tag, one.ranking), []).append(one.name)
                continue
            # A label that is missing was written between our two questions: a wiped Redis, folded anew.
            label = labels.get((tag, label_of(value)))
            if label is not None and (session := unpack_session(name, value, label)):
                yield session
        for (tag, ranking), names in gone.items():
            self._sweep(tag, ranking, names)

    def _labels(self, wanted: Sequence[tuple[str, int]]) -> dict[tuple[str, int], tuple[str, str, str]]:
        """(tag, number) → (deployment, model, axis id). Asked for each time: in a wiped Redis numbers begin anew."""
        numbers: dict[str, list[int]] = {}
        for tag, number in dict.fromkeys(wanted):
            numbers.setdefault(tag, []).append(number)
        found = self._pipe([("HMGET", tag + "labels", *some) for tag, some in numbers.items()])
        return {
            (tag, number): _label.decode(label)
            for (tag, some), texts in zip(numbers.items(), found, strict=True)
            for number, label in zip(some, texts, strict=True)
            if label is not None
        }

    def _sweep(self, tag: str, ranking: str, names: Sequence[bytes]) -> int:
        """Take those from a ranking whose conversation is gone; looked at again by the server, for one may be back."""
        if not names:
            return 0
        keys = [(tag + "rankings").encode(), f"{tag}r:{ranking}".encode(), (tag + "never").encode()]
        prefix = f"{tag}c:".encode()
        return int(self._run(_SWEEP, [*keys, *(prefix + name for name in names)], [ranking, *names]))

    def _do(self, *command: Any) -> Any:
        return self._ask(lambda client: client.execute_command(*command))

    def _pipe(self, commands: Sequence[tuple[Any, ...]]) -> list[Any]:
        """Many commands in few round trips; not one transaction."""

        def send(client: Any) -> list[Any]:
            answers: list[Any] = []
            for some in _chunks(commands):
                pipeline = client.pipeline(transaction=False)
                for command in some:
                    pipeline.execute_command(*command)
                # Without raise_on_error: redis-py would quote the command, and with it what is in the store.
                answers += pipeline.execute(raise_on_error=False)
            for answer in answers:
                if isinstance(answer, Exception):
                    raise answer
            return answers

        return self._ask(send) if commands else []

    def _run(self, script: _Script, keys: Sequence[Any], arguments: Sequence[Any]) -> Any:
        """Run a script; send its text where the server has not seen it, as after its restart."""

        def send(client: Any) -> Any:
            try:
                return client.execute_command("EVALSHA", script.sha, len(keys), *keys, *arguments)
            except NoScriptError:
                return client.execute_command("EVAL", script.text, len(keys), *keys, *arguments)

        return self._ask(send)

    def _ask(self, work: Callable[[Any], T]) -> T:
        if not self._sound:
            self._look()
        return self._explained(work)

    def _explained(self, work: Callable[[Any], T]) -> T:
        try:
            return work(self._open())
        except (RedisError, RedisClusterException, OSError) as error:
            # Whoever answers next may be another server: a restarted one, or a replica that has taken over.
            self._sound = False
            raise self._told(error) from error

    def _open(self) -> Any:
        with self._opening:
            if self._shut:
                raise StoreError(f"the store {self._where} is closed", cure="open it again")
            if self._client is None:
                self._client = _client(
                    self._address,
                    password=self._password,
                    sentinel_password=self._sentinel_password,
                    ca_file=self._ca_file,
                    timeout=self._timeout,
                )
            return self._client

    def _look(self) -> list[Mapping[str, Any]]:
        """What each primary says of itself, when all of them will do."""
        answers: list[Mapping[str, Any]] = self._explained(
            lambda client: [server.execute_command("INFO") for server in self._servers(client)]
        )
        for told in answers:
            _will_do(told, self._where)
        _same_schema(self._explained(lambda client: client.execute_command("HGET", self._prefix + ":store", "schema")))
        self._sound = True
        return answers

    def _servers(self, client: Any) -> list[Any]:
        """A client of each primary."""
        if self._address.kind != "cluster":
            return [client]
        return [client.get_redis_connection(node) for node in client.get_primaries()]

    def _told(self, error: Exception) -> AnchorwatchError:
        """An error of the client in our words: what may pass, and what a person must change."""
        where = f"the store {self._where}"
        match error:
            case AuthenticationError() | AuthenticationWrongNumberOfArgsError() | AuthorizationError():
                return StoreError(
                    f"{where} refuses this user and password",
                    cure="set ANCHORWATCH_STORE_PASSWORD_FILE, or user and password in ANCHORWATCH_STORE_URL",
                )
            case MasterNotFoundError() if AuthenticationError.__name__ in str(error):
                return StoreError(
                    f"the sentinels {self._where} refuse us", cure="set ANCHORWATCH_STORE_SENTINEL_PASSWORD_FILE"
                )
            case MasterNotFoundError():
                return StoreUnavailable(
                    f"the sentinels {self._where} name no primary called {self._address.service!r}",
                    cure="wait until a failover has ended; or check the name at the end of ANCHORWATCH_STORE_URL",
                )
            case ResponseError() if isinstance(error, NoPermissionError) or _NOT_ALLOWED in str(error):
                return StoreError(
                    f"{where} forbids a command to this user",
                    cure=f"ACL SETUSER ... ~{self._prefix}:* +@read +@write +@scripting +@connection +info",
                )
            case OutOfMemoryError():
                return StoreUnavailable(
                    f"{where} is out of memory; nothing of the last write was kept",
                    cure="raise maxmemory, or shorten what it keeps (ANCHORWATCH_STORE_TTL_SECONDS); writing then goes "
                    "on by itself",
                )
            case ReadOnlyError():
                return StoreUnavailable(
                    f"{where} is a replica now, and takes no writes",
                    cure="wait for the failover to end; without Sentinel or a cluster, point ANCHORWATCH_STORE_URL at "
                    "the primary",
                )
            case RedisTimeoutError():
                return StoreUnavailable(
                    f"{where} did not answer within {self._timeout:g} s", cure="wait, or look after it"
                )
            case AskError() | TryAgainError() | ClusterError() | RedisClusterException():
                return StoreUnavailable(
                    f"the cluster of {where} does not serve this now ({type(error).__name__})",
                    cure="wait until a failover or the moving of a slot has ended: redis-cli --cluster check",
                )
            case ResponseError() if not str(error).startswith(_PASSING):
                return StoreError(
                    f"{where} does not take a command: {str(error)[:200]}",
                    cure="check that it is Redis 7.0 or newer, and that nothing else writes under the prefix "
                    f"{self._prefix!r}",
                )
            case ResponseError() | RedisConnectionError() | OSError():
                return StoreUnavailable(
                    f"{where} can't be reached or does not serve: {str(error)[:200]}",
                    cure="start it, or check ANCHORWATCH_STORE_URL; writing then goes on by itself",
                )
            case _:
                return StoreError(f"{where} can't be used: {type(error).__name__}", cure="please report this")


def _client(
    address: RedisAddress, *, password: str | None, sentinel_password: str | None, ca_file: str | None, timeout: float
) -> Any:
    """A client that waits no longer than `timeout` for an answer, and never asks twice."""
    common: dict[str, Any] = {
        "socket_timeout": timeout,
        "socket_connect_timeout": timeout,
        "socket_keepalive": True,
        "protocol": 2,
    }
    if address.tls:
        common |= {"ssl": True, "ssl_ca_certs": ca_file}
    to_redis = {**common, "username": address.username, "password": password or address.password}
    once = Retry(NoBackoff(), 0)
    match address.kind:
        case "cluster":
            nodes = [ClusterNode(host, port) for host, port in address.hosts]  # type: ignore[no-untyped-call]
            return RedisCluster(startup_nodes=nodes, retry=once, require_full_coverage=False, **to_redis)
        case "sentinel":
            finder = {**common, "retry": once, "password": sentinel_password}
            sentinels: Any = Sentinel(address.hosts, sentinel_kwargs=finder)  # type: ignore[no-untyped-call]
            return sentinels.master_for(address.service, db=address.database, retry=once, **to_redis)
        case _:
            ((host, port),) = address.hosts
            return Redis(host, port, db=address.database, retry=once, **to_redis)


def _will_do(told: Mapping[str, Any], where: str) -> None:
    """Refuse a server that would lose what it has taken, or that does not know what we ask."""
    if told.get("maxmemory_policy") != "noeviction":
        raise StoreError(
            f"the store {where} throws keys away when its memory is full (maxmemory-policy "
            f"{told.get('maxmemory_policy')}): conversations and findings would vanish without a word",
            cure="CONFIG SET maxmemory-policy noeviction, and write it into redis.conf. Share no Redis with a cache",
        )
    version = tuple(int(part) for part in str(told.get("redis_version", "0")).split(".")[:2])
    if version < OLDEST_REDIS:
        raise StoreError(
            f"the store {where} is Redis {told.get('redis_version')}", cure="use Redis 7.0 or newer, or Valkey"
        )


def _advice(told: Mapping[str, Any]) -> Iterator[str]:
    if not told.get("aof_enabled"):
        yield (
            "no append-only file: when this Redis restarts, the whole log is folded again. "
            "appendonly yes, appendfsync everysec"
        )
    if not told.get("maxmemory"):
        yield "no maxmemory: the kernel may kill this Redis before it says that it is full. Set it below the machine's"


def _same_schema(found: bytes | None) -> None:
    if found is not None and found != SCHEMA:
        raise StoreError(
            f"the store has schema version {found.decode(errors='replace')}, this program writes {SCHEMA.decode()}",
            cure="run the Anchorwatch release that wrote it, or fold the log into a store of its own: another database "
            "number in ANCHORWATCH_STORE_URL",
        )


def _conversations(tag: str, batch: Commit) -> tuple[list[str], list[Any]]:
    """Keys and arguments of the batch's conversations: by label those with a session, then those with a state only."""
    prefix = tag + "c:"
    states, points = dict(batch.states), batch.points
    labelled: dict[tuple[str, str, str], tuple[list[str], list[Any]]] = {}
    for session in batch.sessions:
        key, risk = session.conversation_id, session.risk
        label = (session.deployment, session.model, session.axis_id)
        if label not in labelled:
            labelled[label] = [], []
        names, values = labelled[label]
        names.append(prefix + key)
        new = points.get(key)
        values += (
            "+inf" if risk is None else repr(-risk),
            pack_session(session, states.pop(key, b"")),
            pack_points(new) if new else b"",
        )
    keys: list[str] = []
    arguments: list[Any] = [len(labelled)]
    for label, (names, values) in labelled.items():
        keys += names
        arguments += [_encode(label), label[0], len(names)]
        arguments += values
    for key, state in states.items():
        keys.append(prefix + key)
        arguments.append(pack_state(state))
    return keys, arguments


def _score(finding: Finding) -> str:
    """Where a finding stands among others: the newest has the least."""
    return repr(-datetime.fromisoformat(finding.time).timestamp())


def _finding(body: bytes) -> Finding:
    try:
        return decode_finding(body)
    except EventError as error:
        raise damaged() from error


def _pairs(rows: Sequence[Any]) -> Iterator[tuple[bytes, float]]:
    """Members and scores, as Redis lists them by turns."""
    each = iter(rows)
    return ((member, float(score)) for member, score in zip(each, each, strict=True))


def _chunks(values: Sequence[T]) -> Iterator[Sequence[T]]:
    return (values[start : start + _CHUNK] for start in range(0, len(values), _CHUNK))

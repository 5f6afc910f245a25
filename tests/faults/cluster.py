"""One installation, whole: broker, Redis, workers, collectors and a dispatcher, each a process that may be killed.

It starts them as an operator would, from ANCHORWATCH_* settings and the command line, and knows how to wait until all
is at rest. What came of it is for `history` to say.
"""

from __future__ import annotations

import base64
import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import msgspec
import servers

from faults.collector import Plan, read_journal
from faults.history import Delivery, Produced, Report, Told, alerts_in, examine, records
from monitor import connect
from monitor.alert import state
from monitor.detect.baseline import DetectorConfig
from monitor.errors import AnchorwatchError
from monitor.settings import Settings
from monitor.stream.log import ACTIONS, DEAD_LETTERS, PROJECTIONS

TESTS = Path(__file__).parent.parent
PATIENCE = 60.0
WEBHOOK = """
receivers:
  - name: hook
    webhook_configs:
      - {{url: "{url}", secret_files: ["{secret}"], allow_private: true}}
route: {{receiver: hook, group_by: ["..."], group_wait: 0s, group_interval: 1s}}
"""


class Process:
    """One program of ours. Made stopped. Its output goes to a file of its own, across restarts."""

    def __init__(self, name: str, command: Sequence[str], environment: dict[str, str], directory: Path) -> None:
        self.name = name
        self.command = list(command)
        self.environment = environment
        self.output = directory / f"{name}.out"
        self._popen: subprocess.Popen[bytes] | None = None
        self._file: IO[bytes] | None = None

    @property
    def pid(self) -> int:
        assert self._popen is not None, f"{self.name} was never started"
        return self._popen.pid

    @property
    def code(self) -> int | None:
        """Its exit status, negative for a signal; None while it runs."""
        assert self._popen is not None, f"{self.name} was never started"
        return self._popen.poll()

    def started(self) -> bool:
        return self._popen is not None

    def running(self) -> bool:
        return self._popen is not None and self._popen.poll() is None

    def start(self) -> Process:
        assert not self.running()
        self._close()
        self._file = self.output.open("ab")
        self._popen = subprocess.Popen(
            self.command,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=self._file,
            stderr=subprocess.STDOUT,
            cwd=self.output.parent,
        )
        return self

    def kill(self) -> None:
        """SIGKILL. Nothing happens when it is not running."""
        if self.running():
            os.kill(self.pid, signal.SIGKILL)
        self._wait()

    def stop(self, seconds: float = 30.0) -> int:
        """SIGTERM, and wait for the orderly end; its exit status."""
        if self.running():
            os.kill(self.pid, signal.SIGTERM)
        return self.ended(seconds)

    def ended(self, seconds: float = PATIENCE) -> int:
        """Wait for its end; its exit status."""
        assert self._popen is not None, f"{self.name} was never started"
        try:
            return self._popen.wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"{self.name} has not ended in {seconds} s:\n{self.tail()}") from None
        finally:
            self._close()

    def freeze(self) -> None:
        os.kill(self.pid, signal.SIGSTOP)

    def thaw(self) -> None:
        if self.running():
            os.kill(self.pid, signal.SIGCONT)

    def says(self) -> str:
        return self.output.read_text(errors="replace") if self.output.exists() else ""

    def tail(self, characters: int = 3000) -> str:
        return self.says()[-characters:]

    def rss_mb(self) -> float:
        """Resident memory now."""
        pages = int(Path(f"/proc/{self.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGESIZE") / 2**20

    def cpu_seconds(self) -> float:
        """What it has used of the processor so far, in user and kernel."""
        fields = Path(f"/proc/{self.pid}/stat").read_text().rsplit(")", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def _wait(self) -> None:
        if self._popen is not None:
            self._popen.wait()
        self._close()

    def _close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


@contextlib.contextmanager
def installation(
    directory: Path,
    config: DetectorConfig,
    *,
    broker: str | None = "tansu",
    redis: bool = True,
    partitions: int = 4,
    **more: str,
) -> Iterator[Cluster]:
    """A cluster with servers of its own, all of which are gone at the end. `broker` as in `servers.broker`."""
    kafka = servers.broker(broker, directory / "kafka") if broker else None
    store = servers.redis(directory / "redis") if redis else None
    cluster = None
    try:
        for server in (kafka, store):
            if server:
                server.start()
        cluster = Cluster(directory, config, broker=kafka, redis=store, partitions=partitions, **more)
        if kafka:
            cluster.create_topics()
        yield cluster
    finally:
        if cluster:
            cluster.end()
        for server in (kafka, store):
            if server:
                server.kill()


class Cluster:
    """An installation in one directory.

    Args:
        directory: of everything it writes.
        config: the calibration that workers are given.
        broker: a started broker, or None for the embedded log.
        redis: a started Redis, or None for the embedded store.
        partitions: of the topic, where there is a broker.
        more: settings beside those, by their names in the environment, without ANCHORWATCH_.
    """

    def __init__(
        self,
        directory: Path,
        config: DetectorConfig,
        *,
        broker: servers.Server | None = None,
        redis: servers.Server | None = None,
        partitions: int = 4,
        **more: str,
    ) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.directory = directory
        self.config = config
        self.broker = broker
        self.redis = redis
        self.partitions = partitions if broker else 1
        self.processes: dict[str, Process] = {}
        self._opened: tuple[Any, Any] | None = None
        self.calibration = directory / "calibration.json"
        self.calibration.write_bytes(config.to_json())
        log_url = f"kafka://{broker.address}" if broker else f"sqlite:///{directory / 'log.db'}"
        store_url = servers.redis_url(redis) if redis else f"sqlite:///{directory / 'store.db'}"
        self.settings_given = {
            "DATA_DIR": str(directory / "data"),
            "LOG_URL": log_url,
            "STORE_URL": store_url,
            "LOG_FORMAT": "json",
            **({"KAFKA_PARTITIONS": str(partitions), "KAFKA_REPLICATION": "1"} if broker else {}),
            **{name: value for name, value in more.items() if broker or not name.startswith("KAFKA_")},
        }
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("ANCHORWATCH_")},
            **{f"ANCHORWATCH_{name}": value for name, value in self.settings_given.items()},
            "PYTHONPATH": os.pathsep.join([str(TESTS), str(TESTS.parent)]),
            "OMP_NUM_THREADS": "1",
        }
        self.settings = Settings(**{name.lower(): value for name, value in self.settings_given.items()})

    # Its processes.

    def add(self, name: str, *command: str, **more: str) -> Process:
        """A process that is not started yet; `command` are Python's own arguments."""
        environment = {**self.environment, **{f"ANCHORWATCH_{key}": value for key, value in more.items()}}
        made = Process(name, [sys.executable, *command], environment, self.directory)
        self.processes[name] = made
        return made

    def worker(self, number: int = 0, **more: str) -> Process:
        return self.add(f"worker-{number}", "-m", "monitor", "worker", "--calibration", str(self.calibration), **more)

    def collector(self, name: str, more: Mapping[str, str] | None = None, **plan: Any) -> Process:
        """A collector with this `Plan`, and with more settings of its own."""
        given = Plan(name=name, journal=str(self.directory / "journals"), **plan)
        return self.add(name, "-m", "faults.collector", msgspec.json.encode(given).decode(), **(more or {}))

    def dispatcher(self) -> Process:
        return self.add("dispatcher", "-m", "monitor", "dispatch", "--out", str(self.directory / "delivered.jsonl"))

    def webhook(self, url: str) -> Process:
        """A dispatcher that tells of every alert by itself, at once and by a signed webhook."""
        secret, rules = self.directory / "secret", self.directory / "alerts.yaml"
        secret.write_text(f"whsec_{base64.b64encode(bytes(32)).decode()}")
        secret.chmod(0o600)
        rules.write_text(WEBHOOK.format(url=url, secret=secret))
        return self.add("dispatcher", "-m", "monitor", "dispatch", "--config", str(rules))

    def run(self, *arguments: str) -> str:
        """Run `anchorwatch ...` to its end; what it printed, both streams. AssertionError when it fails."""
        done = subprocess.run(
            [sys.executable, "-m", "monitor", *arguments],
            env=self.environment,
            cwd=self.directory,
            capture_output=True,
            text=True,
            timeout=PATIENCE,
        )
        assert done.returncode == 0, f"anchorwatch {' '.join(arguments)}: {done.returncode}\n{done.stdout}{done.stderr}"
        return done.stdout + done.stderr

    def create_topics(self) -> None:
        self.run("topics", "create")

    def end(self) -> None:
        """Kill all that runs; the servers are somebody else's."""
        for process in self.processes.values():
            process.kill()
        for part in self._opened or ():
            with contextlib.suppress(AnchorwatchError):
                part.close()
        self._opened = None

    # What it came to.

    @contextlib.contextmanager
    def opened(self) -> Iterator[tuple[Any, Any]]:
        """Its log and its store, for reading. They stay open until the end."""
        if self._opened is None:
            self._opened = connect.log(self.settings), connect.store(self.settings)
        yield self._opened

    def produced(self) -> list[Produced]:
        return [read_journal(path)[0] for path in sorted((self.directory / "journals").glob("*.journal"))]

    def deliveries(self) -> list[Delivery] | None:
        """What the dispatcher's channel wrote; None where there is none. A line that was cut off was not delivered."""
        if "dispatcher" not in self.processes:
            return None
        path = self.directory / "delivered.jsonl"
        lines = path.read_bytes().split(b"\n") if path.exists() else []
        told = []
        for line in lines:
            with contextlib.suppress(msgspec.DecodeError):
                notification = msgspec.json.decode(line)
                alerts = [alert for alert in notification["alerts"] if alert["labels"]["kind"] != "fleet_shift"]
                told.append(Delivery(notification["id"], line, tuple(_told(alert) for alert in alerts)))
        return told

    def ends(self) -> dict[int, int]:
        """Partition → the next offset of the log."""
        with self.opened() as (log, _):
            return {partition: log.span(PROJECTIONS, partition).end for partition in range(self.partitions)}

    def beyond(self, offsets: Mapping[int, int]) -> bool:
        """Whether the store has come further than these offsets in every partition."""
        with self.opened() as (_, store):
            positions = {partition: store.position(PROJECTIONS, partition) for partition in offsets}
        return all(at is not None and at.offset > offsets[partition] for partition, at in positions.items())

    def behind(self, partitions: Iterable[int] | None = None) -> int:
        """How many records of the log the store has not come to yet; raises while a server is away."""
        with self.opened() as (log, store):
            left = 0
            for partition in range(self.partitions) if partitions is None else partitions:
                span = log.span(PROJECTIONS, partition)
                position = store.position(PROJECTIONS, partition)
                left += span.end - (position.offset if position else span.begin)
            return left

    def until_folded(self, more: int, seconds: float = PATIENCE) -> None:
        """Wait until so many more records have been folded than now."""

        def folded() -> int:
            self.all_well()
            with self.opened() as (_, store):
                return sum(store.counts().values())

        first = folded()
        wait_for(lambda: folded() >= first + more, seconds, self.tails)

    def settle(self, seconds: float = PATIENCE) -> None:
        """Wait until everything in the log is in the store, and everything there is told to those who must know."""

        def at_rest() -> bool:
            self.all_well()
            try:
                return self.behind() == 0 and ("dispatcher" not in self.processes or self.told())
            except AnchorwatchError as error:
                if not error.retry:
                    raise
                return False

        wait_for(at_rest, seconds, self.tails)

    def all_well(self) -> None:
        """AssertionError where a process that should last has ended, and was not killed."""
        for process in self.processes.values():
            lasts = process.name.startswith("worker") or process.name == "dispatcher"
            if lasts and process.started() and process.code not in (None, 0, -signal.SIGKILL):
                raise AssertionError(f"{process.name} ended with {process.code}:\n{process.tail()}")

    def told(self) -> bool:
        """Whether nothing waits in the outbox, and whoever is to be told of an alert has been told how it is, by all
        that is written down."""
        with self.opened() as (log, store):
            _, end, topic_id = log.span(ACTIONS, 0)
            if store.pending(1) or store.actions_offset(topic_id) < end:
                return False
            for alert in alerts_in(store).values():
                words = set(alert.told.values())
                if words != {state(alert)} and (alert.firing or words):
                    return False
            return True

    def dead_letter_reasons(self) -> set[str]:
        with self.opened() as (log, _):
            letters = [one for p in range(log.partitions(DEAD_LETTERS)) for one in records(log, DEAD_LETTERS, p)]
        return {dict(letter.headers)["reason"].decode() for letter in letters}

    def tails(self) -> str:
        return "\n".join(f"--- {p.name} ({p.code}):\n{p.tail(1500)}" for p in self.processes.values() if p.started())

    def examine(self, *, believed: bool = True, **more: Any) -> Report:
        """The history checker over all of it; `believed` says whether what the journals claim is compared, too."""
        with self.opened() as (log, store):
            produced = self.produced() if believed else []
            deliveries = more.pop("deliveries", None) or self.deliveries()
            return examine(log, store, self.config, produced=produced, deliveries=deliveries, **more)


def _told(alert: Mapping[str, Any]) -> Told:
    over = alert["status"] == "resolved"
    return Told(alert["id"], "resolved" if over else alert["labels"]["severity"], tuple(alert["finding_ids"]))


def wait_for(holds: Callable[[], bool], seconds: float = PATIENCE, told: Callable[[], str] = str) -> None:
    """Ask until it holds; AssertionError when it does not in time."""
    deadline = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > deadline:
            raise AssertionError(f"not in {seconds} s\n{told()}")
        time.sleep(0.1)

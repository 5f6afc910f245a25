"""What the compose file runs is known to run: every service's own command, as plain processes against real servers.

Entrypoint, command, environment and health check are taken from docker-compose.yml and the Dockerfile as they are. Only
what the container would have had is replaced: hosts and ports by local ones, paths by folders of this test, and the
image of Apache Kafka, which can't be had here, by another broker that speaks its protocol. What is not tested is the
container itself: its user, its file system, its limits and its networks.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import platformdirs
import pytest
import redis
import servers
import yaml
from compose import COMPOSE_FILE, ROOT, stage
from msgspec.structs import replace

from benchmarks.events import recorded
from monitor.events import Projection, encode, now_utc
from monitor.store import Backend, open_store

SERVICES: dict[str, Any] = yaml.safe_load(COMPOSE_FILE.read_text())["services"]
STAYING = ("redis", "alertmanager", "worker", "dispatcher", "api", "prometheus")
# What the images of others begin with, by the names that Debian gives these programs.
ENTRYPOINTS = {"prometheus": ["prometheus"], "alertmanager": ["prometheus-alertmanager"]}
START_SECONDS = 60.0
DRAIN_SECONDS = 10.0
METRICS = "9464"

pytestmark = pytest.mark.skipif(bool(servers.OUTSIDE_KAFKA), reason="the stack's topics would be the broker's own")


class Process:
    """One container's worth: a service's command, with its environment, in a folder of its own."""

    def __init__(self, stack: Stack, name: str, number: int = 0) -> None:
        self.name = name
        self.service = SERVICES[name]
        self.folder = stack.folder / f"{name}-{number}"
        self.folder.mkdir()
        self.port = servers.free_port()  # of its metrics
        self._stack = stack
        self.moved: dict[str, str] = {}  # ports on which it is not to be looked for
        self._process: subprocess.Popen[bytes] | None = None
        self.out = self.folder / "out"
        self.err = self.folder / "err"

    def local(self, text: str) -> str:
        """Text of the compose file, with this machine's hosts, ports and paths."""
        for there, here in [*self._stack.places.items(), (f":{METRICS}", f":{self.port}"), *self.moved.items()]:
            text = text.replace(there, here)
        return text.replace("$$", "$")  # as compose does

    def environment(self) -> dict[str, str]:
        image = stage(self.service["build"]["target"])["ENV"] if "build" in self.service else {}
        merged = {**image, **{key: str(value) for key, value in (self.service.get("environment") or {}).items()}}
        merged = {key: self.local(value) for key, value in merged.items()}
        for key, value in merged.items():
            if value.startswith(("/var/lib/anchorwatch", "/var/cache/anchorwatch")):
                merged[key] = str(self.folder / Path(value).name)
            if value == METRICS:
                merged[key] = str(self.port)
        if "models:/var/cache/anchorwatch" in self.service.get("volumes", []):
            merged["ANCHORWATCH_CACHE_DIR"] = str(platformdirs.user_cache_path("anchorwatch"))
            merged["OMP_NUM_THREADS"] = "1"  # threads that wait for a busy core burn it
        merged["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), "/usr/bin", "/bin"])
        return merged

    def command(self, *more: str) -> list[str]:
        entrypoint = stage(self.service["build"]["target"])["ENTRYPOINT"] if "build" in self.service else []
        entrypoint = ENTRYPOINTS.get(self.name, entrypoint)
        return [self.local(str(word)) for word in (*entrypoint, *self.service["command"], *more)]

    def start(self, *more: str) -> Process:
        self._process = subprocess.Popen(
            self.command(*more),
            env=self.environment(),
            cwd=self.folder,
            stdout=self.out.open("wb"),
            stderr=self.err.open("wb"),
            start_new_session=True,
        )
        return self

    def run(self, *command: str) -> str:
        """Another command of the same image, as `docker compose run` would; what it prints."""
        words = [*stage(self.service["build"]["target"])["ENTRYPOINT"], *command]
        done = subprocess.run(
            words, env=self.environment(), cwd=self.folder, capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def healthy(self) -> bool:
        """Its own health check, as compose would run it."""
        kind, *words = self.service["healthcheck"]["test"]
        words = [self.local(word) for word in words]
        command = ["/bin/sh", "-c", *words] if kind == "CMD-SHELL" else words
        return subprocess.run(command, env=self.environment(), capture_output=True, timeout=30).returncode == 0

    def wait(self, seconds: float) -> int:
        assert self._process is not None
        return self._process.wait(seconds)

    def stop(self) -> int:
        assert self._process is not None
        self._process.send_signal(getattr(signal, stage("service")["STOPSIGNAL"]))
        return self.wait(DRAIN_SECONDS)

    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def kill(self) -> None:
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()

    def said(self) -> str:
        return f"{self.command()}\n" + "\n".join(
            file.read_text(errors="replace")[-3000:] for file in (self.out, self.err) if file.exists()
        )


class Stack:
    """All services of the compose file, on this machine."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.kafka = servers.tansu(folder / "kafka")
        self.redis_port, self.api_port, self.prometheus_port = (servers.free_port() for _ in range(3))
        self.alertmanager_port = servers.free_port()
        secrets = folder / "secrets"
        secrets.mkdir()
        self.password = "0123456789abcdef" * 4
        (secrets / "redis_password").write_text(self.password + "\n")
        self.places = {
            "kafka:9092": self.kafka.address,
            "@redis:6379": f"@127.0.0.1:{self.redis_port}",
            "6379": str(self.redis_port),
            "8080": str(self.api_port),
            "9090": str(self.prometheus_port),
            "/run/secrets": str(secrets),
            "--dir /data": f"--dir {folder / 'redis-0'}",
            "/etc/prometheus/prometheus.yml": str(folder / "prometheus.yml"),
            "path=/prometheus": f"path={folder / 'prometheus-0' / 'data'}",
            "alertmanager:9093": f"127.0.0.1:{self.alertmanager_port}",
            "9093": str(self.alertmanager_port),
            "/etc/alertmanager": str(ROOT / "deploy" / "alertmanager"),
            "path=/alertmanager": f"path={folder / 'alertmanager-0' / 'data'}",
            "/etc/anchorwatch/alerts.yaml": str(folder / "alerts.yaml"),
        }
        rules = (ROOT / "deploy" / "alerts" / "alerts.yaml").read_text()
        (folder / "alerts.yaml").write_text(rules.replace("alertmanager:9093", self.places["alertmanager:9093"]))
        self.processes: list[Process] = []
        self.key = ""

    def store(self) -> Backend:
        return open_store(f"redis://anchorwatch@127.0.0.1:{self.redis_port}/0", password=self.password)

    def add(self, name: str) -> list[Process]:
        """As many of a service as the file says."""
        count = SERVICES[name]["deploy"].get("replicas", 1)
        made = [Process(self, name, number) for number in range(count)]
        self.processes += made
        return made

    def of(self, name: str) -> list[Process]:
        return [process for process in self.processes if process.name == name]

    def scrape(self) -> None:
        """The committed Prometheus configuration, with the addresses of these processes. Its DNS look-up of the workers
        becomes a list: there is no name server here that knows them."""
        told = yaml.safe_load((ROOT / "deploy" / "prometheus" / "prometheus.yml").read_text())
        told["global"]["scrape_interval"] = "1s"
        told["global"]["scrape_timeout"] = "1s"
        told["rule_files"] = [str(ROOT / "deploy" / "prometheus" / file) for file in told["rule_files"]]
        for one in told["alerting"]["alertmanagers"]:
            one["static_configs"] = [{"targets": [self.places["alertmanager:9093"]]}]
        for job in told["scrape_configs"]:
            targets = [target for static in job.get("static_configs", []) for target in static["targets"]]
            targets += [f"{dns['names'][0]}:{dns['port']}" for dns in job.pop("dns_sd_configs", [])]
            here = []
            for target in targets:
                host, _, port = target.partition(":")
                if port == METRICS:
                    here += [f"127.0.0.1:{process.port}" for process in self.of(host)]
                else:
                    here.append(f"127.0.0.1:{self.prometheus_port}")
            job["static_configs"] = [{"targets": here}]
        (self.folder / "prometheus.yml").write_text(yaml.safe_dump(told))

    def close(self) -> None:
        for process in self.processes:
            process.kill()
        self.kafka.kill()


def eventually(done: Callable[[], object], what: str, seconds: float = START_SECONDS) -> None:
    deadline = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < deadline, f"not within {seconds} s: {what}"
        time.sleep(0.1)


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """Everything started in the order in which compose would start it."""
    for program in ("redis-server", "prometheus", "prometheus-alertmanager"):
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not installed; Debian and Ubuntu: apt-get install {program}")
    made = Stack(tmp_path_factory.mktemp("stack"))
    try:
        made.kafka.start()
        for name in ("redis", "topics", "alertmanager", "worker", "dispatcher", "api", "prometheus"):
            if name == "prometheus":
                made.scrape()
            for process in made.add(name):
                if name == "api":
                    made.key = process.run("keys", "create", "--name", "stack", "--scope", "ingest")
                process.start()
                if name == "topics":
                    assert process.wait(START_SECONDS) == 0, process.said()
                else:
                    eventually(lambda process=process: process.healthy() or not process.running(), f"{process.said()}")
                    assert process.running(), process.said()
                if name == "dispatcher":
                    process.run("alerts", "enable", "--by", "stack", "--conversations-per-day", "1000", "--yes")
        yield made
    finally:
        made.close()


@pytest.mark.parametrize("name", STAYING)
def test_each_service_is_healthy_by_its_own_check(stack: Stack, name: str) -> None:
    for process in stack.of(name):
        assert process.healthy(), process.said()


@pytest.mark.parametrize("name", STAYING)
def test_the_health_check_finds_a_service_that_is_gone(stack: Stack, name: str) -> None:
    gone = Process(stack, name, number=9)
    ports = (stack.redis_port, stack.api_port, stack.prometheus_port, stack.alertmanager_port)
    gone.moved = {str(port): str(servers.free_port()) for port in ports}
    assert not gone.healthy()


def test_redis_lets_one_user_in_and_to_nothing_but_the_store(stack: Stack) -> None:
    for user, password in ((None, None), ("default", stack.password), ("anchorwatch", "guess")):
        with pytest.raises(redis.exceptions.AuthenticationError):
            redis.Redis(port=stack.redis_port, username=user, password=password).ping()
    ours = redis.Redis(port=stack.redis_port, username="anchorwatch", password=stack.password)
    for words in (
        ("GET", "other"),
        ("CONFIG", "GET", "*"),
        ("FLUSHALL",),
        ("SHUTDOWN",),
        ("KEYS", "*"),
        ("ACL", "LIST"),
    ):
        with pytest.raises(redis.exceptions.NoPermissionError):
            ours.execute_command(*words)


def test_redis_keeps_what_it_holds(stack: Stack) -> None:
    told = redis.Redis(port=stack.redis_port, username="anchorwatch", password=stack.password).info()
    assert told["maxmemory_policy"] == "noeviction"
    assert told["maxmemory"] == 768 * 2**20
    assert told["aof_enabled"] == 1


def test_what_comes_by_http_is_judged_and_told(stack: Stack) -> None:
    """A projection goes in at one end, and comes out as a session in Redis and a line of the dispatcher."""
    events = recorded_talks()
    body = b"[" + b",".join(encode(one) for one in events) + b"]"
    request = urllib.request.Request(
        f"http://127.0.0.1:{stack.api_port}/v1/projections",
        data=body,
        headers={"Authorization": f"Bearer {stack.key}", "Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=30) as answer:
        assert answer.status == 202
    store = stack.store()
    try:
        eventually(
            lambda: sum(store.counts().values()) == len(events),
            f"{len(events)} responses are folded; {store.counts()}\n" + "\n".join(w.said() for w in stack.of("worker")),
        )
        sessions = {one.conversation_id: one for one in store.sessions(100)}
        assert sessions.keys() == {one.conversation_id for one in events}
        drifting = {one.episode_id for one in sessions.values()} - {None}
    finally:
        store.close()
    assert drifting, "none of these conversations drifts: choose others"
    (dispatcher,) = stack.of("dispatcher")
    eventually(
        lambda: {alert["id"] for one in lines(dispatcher.out) for alert in one["alerts"]} >= drifting,
        dispatcher.said(),
    )


def test_alertmanager_shows_what_people_are_told_of(stack: Stack) -> None:
    """After the test before: the same alerts, by Alertmanager's own API."""
    (dispatcher,) = stack.of("dispatcher")
    told = {alert["id"] for one in lines(dispatcher.out) for alert in one["alerts"] if alert["ends_at"] is None}
    assert told

    def shown() -> set[str]:
        url = f"http://127.0.0.1:{stack.alertmanager_port}/api/v2/alerts"
        with urllib.request.urlopen(url, timeout=10) as answer:
            return {one["labels"].get("episode_id", "") for one in json.load(answer)}

    eventually(lambda: told <= shown(), f"Alertmanager shows what was told\n{dispatcher.said()}")


def lines(out: Path) -> list[Any]:
    """What a process has written to standard output, whole lines of JSON."""
    return [json.loads(line) for line in out.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]


def recorded_talks() -> list[Projection]:
    """Real responses of some recorded conversations, those that drift among them, as if they had come just now."""
    inorder = sorted(recorded(1500), key=lambda one: (one.conversation_id, one.turn))
    return [replace(one, time=now_utc()) for one in inorder[:600]]


@pytest.mark.slow
def test_the_demo_runs_on_the_same_servers(stack: Stack) -> None:
    """Its own command, cut short; the volume of converted weights is this user's cache."""
    (demo,) = stack.add("demo")
    demo.start("--conversations", "1", "--tokens", "4")
    store = stack.store()
    before = sum(store.counts().values())
    try:
        eventually(lambda: sum(store.counts().values()) > before, "the demo's first response is folded", 300)
    finally:
        store.close()
        demo.kill()


def test_prometheus_reaches_every_process(stack: Stack) -> None:
    def up() -> set[tuple[str, str]]:
        url = f"http://127.0.0.1:{stack.prometheus_port}/api/v1/query?query=up"
        with urllib.request.urlopen(url, timeout=10) as answer:
            found = json.load(answer)["data"]["result"]
        return {(one["metric"]["job"], one["metric"]["instance"]) for one in found if one["value"][1] == "1"}

    wanted = {
        (name, f"127.0.0.1:{process.port}") for name in ("worker", "dispatcher", "api") for process in stack.of(name)
    }
    wanted.add(("prometheus", f"127.0.0.1:{stack.prometheus_port}"))
    eventually(lambda: up() == wanted, f"{wanted} are scraped")


def test_the_committed_scrape_configuration_is_valid() -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool is not installed; Debian and Ubuntu: apt-get install prometheus")
    done = subprocess.run(
        [promtool, "check", "config", str(ROOT / "deploy" / "prometheus" / "prometheus.yml")],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_everything_ends_on_sigterm_in_time(stack: Stack) -> None:
    """Last of all, in the order in which compose would stop them."""
    for name in reversed(STAYING):
        for process in stack.of(name):
            assert process.stop() == 0, process.said()

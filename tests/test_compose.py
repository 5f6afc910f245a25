"""The compose file and the Dockerfile: valid, hardened, and what they run is known to run.

There is no container engine here, so no container is ever started. The file is held against the Compose
Specification's own schema and Debian's docker-compose, the Dockerfile against hadolint; `test_stack.py` starts every
service's own command as a plain process.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import time
import tomllib
import urllib.request
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, requires
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import servers
import yaml
from compose import COMPOSE_FILE, ROOT, dockerfile, stage
from jsonschema import Draft202012Validator
from notices import RULES, alert, notification
from packaging.requirements import Requirement

from alerts.alertmanager import AlertmanagerChannel
from alerts.config import AlertmanagerConfig
from monitor.alert import Alert

COMPOSE: dict[str, Any] = yaml.safe_load(COMPOSE_FILE.read_text())
SERVICES: dict[str, Any] = COMPOSE["services"]
ONE_SHOT = {"topics", "demo"}
PRIVATE = {"kafka", "redis"}


def schema_errors(compose: dict[str, Any]) -> list[str]:
    schema = json.loads(files("check_jsonschema").joinpath("builtin_schemas/vendor/compose-spec.json").read_text())
    return [error.message for error in Draft202012Validator(schema).iter_errors(compose)]


def docker_compose(*arguments: str, file: Path = COMPOSE_FILE) -> subprocess.CompletedProcess[str]:
    program = shutil.which("docker-compose")
    if program is None:
        pytest.skip("docker-compose is not installed; Debian and Ubuntu: apt-get install docker-compose")
    return subprocess.run(
        [program, "--project-directory", str(ROOT), "--file", str(file), *arguments], capture_output=True, text=True
    )


def test_it_keeps_the_compose_specification() -> None:
    assert schema_errors(COMPOSE) == []


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("services", "worker", "helthcheck"), {}),
        (("services", "worker", "deploy", "resources", "limits", "memory"), [1]),
        (("services", "worker", "depends_on", "redis", "condition"), 7),
        (("volume",), {}),
    ],
)
def test_the_schema_would_find_a_mistake(place: tuple[str, ...], value: object) -> None:
    broken = json.loads(json.dumps(COMPOSE))
    at = broken
    for key in place[:-1]:
        at = at[key]
    at[place[-1]] = value
    assert schema_errors(broken)


def test_docker_compose_reads_it_as_we_do() -> None:
    done = docker_compose("config")
    assert done.returncode == 0, done.stderr
    read = yaml.safe_load(done.stdout)["services"]
    assert read.keys() == SERVICES.keys()
    for name, service in read.items():
        for key in ("command", "environment", "user", "read_only", "tmpfs", "networks", "cap_drop"):
            ours, theirs = SERVICES[name].get(key), service.get(key)
            if key == "networks":
                theirs = sorted(theirs)
                ours = sorted(ours)
            if key == "environment" and ours:
                ours = {variable: str(value) for variable, value in ours.items()}
                theirs = {variable: str(value) for variable, value in theirs.items()}
            if key == "command" and ours:  # it prints what can be read again
                theirs = [word.replace("$$", "$") for word in theirs]
                ours = [word.replace("$$", "$") for word in ours]
            assert theirs == ours, (name, key)


def test_docker_compose_would_find_a_mistake(tmp_path: Path) -> None:
    broken = tmp_path / "docker-compose.yml"
    broken.write_text(COMPOSE_FILE.read_text().replace("redis: {condition", "reddis: {condition"))
    assert docker_compose("config", file=broken).returncode != 0


def test_images_are_pinned_and_ours_have_the_version() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    for name, service in SERVICES.items():
        image, _, tag = service["image"].rpartition(":")
        assert image and re.fullmatch(r"v?\d+\.\d+\.\d+(-\w+)?", tag), name
        assert ("build" in service) == image.startswith("anchorwatch"), name
        if "build" in service:
            assert tag == version, name
    for target, image in dockerfile().bases:
        assert image in dict(dockerfile().bases) or re.fullmatch(r"python:\d+\.\d+\.\d+-slim-bookworm", image), target


@pytest.mark.parametrize("name", SERVICES)
def test_every_service_is_confined(name: str) -> None:
    service = SERVICES[name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"] and "cap_add" not in service
    assert service["security_opt"] == ["no-new-privileges:true"]
    user = service["user"]
    assert user and user not in {"0", "root"} and not user.startswith("0:")
    limits = service["deploy"]["resources"]["limits"]
    assert float(limits["cpus"]) > 0 and re.fullmatch(r"\d+[mg]", limits["memory"])
    assert service["pids_limit"] > 0
    assert service["logging"]["options"].keys() == {"max-size", "max-file"}
    for key in ("privileged", "pid", "ipc", "network_mode", "devices", "userns_mode", "env_file"):
        assert key not in service
    for mount in service.get("tmpfs", []):
        assert re.search(r"size=\d+m", mount), f"{mount} may grow until the machine has no memory left"


@pytest.mark.parametrize("name", SERVICES)
def test_every_service_that_stays_has_a_health_check_and_comes_back(name: str) -> None:
    service = SERVICES[name]
    if name in ONE_SHOT:
        assert service["healthcheck"] == {"disable": True}
        assert service["restart"] != "unless-stopped"
    else:
        assert service["healthcheck"].keys() == {"test", "interval", "timeout", "retries", "start_period"}
        assert service["restart"] == "unless-stopped"
        assert service["stop_grace_period"]


def test_who_waits_for_whom_can_be_waited_for() -> None:
    for name, service in SERVICES.items():
        for other, how in service.get("depends_on", {}).items():
            wanted = "service_completed_successfully" if other in ONE_SHOT else "service_healthy"
            assert how == {"condition": wanted}, (name, other)


def test_what_services_name_is_declared() -> None:
    for name, service in SERVICES.items():
        assert set(service["networks"]) <= COMPOSE["networks"].keys(), name
        assert set(service.get("secrets", [])) <= COMPOSE["secrets"].keys(), name
        assert service.get("depends_on", {}).keys() <= SERVICES.keys(), name


def test_volumes_are_named_or_read_only_and_ours() -> None:
    for name, service in SERVICES.items():
        for mount in service.get("volumes", []):
            source, target, *mode = mount.split(":")
            if source in COMPOSE["volumes"]:
                assert not mode, (name, mount)
            else:
                assert (ROOT / source).exists() and mode == ["ro"], (name, mount)
                assert subprocess.run(["git", "ls-files", "--error-unmatch", source], cwd=ROOT).returncode == 0, mount
            assert target.startswith("/")
    used = {mount.split(":")[0] for service in SERVICES.values() for mount in service.get("volumes", [])}
    assert COMPOSE["volumes"].keys() <= used


def test_rules_that_an_editor_replaces_are_seen() -> None:
    """Many write a new file and rename it; a mount of the one file goes on to show the old one."""
    file = Path(SERVICES["dispatcher"]["environment"]["ANCHORWATCH_ALERTS_FILE"])
    (source,) = [place for target, place in mounts("dispatcher").items() if Path(target) == file.parent]
    assert {path.name for path in source.iterdir()} == {file.name}, "the folder shows the container nothing else"


def test_only_what_people_look_at_can_be_reached_and_only_from_this_machine() -> None:
    shown = {"api", "prometheus", "alertmanager", "grafana"}
    assert {name for name, service in SERVICES.items() if "ports" in service} == shown
    for service in SERVICES.values():
        for port in service.get("ports", []):
            assert port.startswith("127.0.0.1:")
        assert "expose" not in service
    outer = {name for name, network in COMPOSE["networks"].items() if not network.get("internal")}
    assert outer == {"edge"}
    # The dispatcher is there to reach receivers.
    assert {name for name, service in SERVICES.items() if "edge" in service["networks"]} == {*shown, "dispatcher"}


def test_each_server_is_reached_by_its_clients_only() -> None:
    for network, server in (("stream", "kafka"), ("store", "redis")):
        members = {name for name, service in SERVICES.items() if network in service["networks"]}
        assert server in members and "prometheus" not in members
        assert SERVICES[server]["networks"] == [network]


def test_secrets_come_by_file_and_are_given_to_those_who_need_them() -> None:
    text = COMPOSE_FILE.read_text()
    assert not re.search(r"(?i)(password|secret|token|key)\w*: *['\"]?[0-9a-f]{16,}", text)
    for name, service in SERVICES.items():
        for variable, value in (service.get("environment") or {}).items():
            if re.search("PASSWORD|SECRET|TOKEN|KEY", variable):
                assert variable.endswith("_FILE") and value.startswith("/run/secrets/"), (name, variable)
                assert Path(value).name in service["secrets"], (name, variable)
        assert not re.search(r"://[^/@\"\s]*:[^/@\"\s]+@", json.dumps(service)), f"{name}: a password in a URL"
    for secret in COMPOSE["secrets"].values():
        path = ROOT / secret["file"]
        ignored = subprocess.run(["git", "check-ignore", "-q", str(path)], cwd=ROOT)
        assert ignored.returncode == 0, f"{path} could be committed"


def test_make_secrets_makes_what_is_missing_and_replaces_nothing(tmp_path: Path) -> None:
    shutil.copy(ROOT / "Makefile", tmp_path)
    folder = tmp_path / "deploy" / "secrets"
    folder.mkdir(parents=True)
    made = []
    for _ in range(2):
        subprocess.run(["make", "secrets", f"PYTHON={sys.executable}"], cwd=tmp_path, check=True, capture_output=True)
        made.append({path.name: path.read_text() for path in folder.iterdir()})
    assert made[0] == made[1]
    assert made[0].keys() == {Path(secret["file"]).name for secret in COMPOSE["secrets"].values()}
    assert folder.stat().st_mode & 0o777 == 0o700
    for path in folder.iterdir():
        assert re.fullmatch(r"[0-9a-f]{64}\n", path.read_text())
        assert path.stat().st_mode & 0o777 == 0o444


@pytest.mark.parametrize("name", ["dispatcher", "api"])
def test_who_holds_the_alerts_has_room_for_a_hundred_thousand(name: str) -> None:
    """They were seen to take 514 MB in the dispatcher, and 512 MB in the API at its second read."""
    memory = SERVICES[name]["deploy"]["resources"]["limits"]["memory"]
    assert int(memory[:-1]) * {"m": 1, "g": 1024}[memory[-1]] >= 1.5 * 514


def test_the_page_tells_each_service_and_its_limits() -> None:
    page = (ROOT / "docs" / "deploy.md").read_text()
    told = {
        name: (memory, cpus)
        for name, memory, cpus in re.findall(r"^\| (\w+).*? \| ([\d.]+ [MG]B) \| ([\d.]+) \|$", page, re.M)
    }
    units = {"m": " MB", "g": " GB"}
    limits = {name: service["deploy"]["resources"]["limits"] for name, service in SERVICES.items()}
    assert told == {name: (one["memory"][:-1] + units[one["memory"][-1]], one["cpus"]) for name, one in limits.items()}
    rows = dict(re.findall(r"^\| `(\w+)`.*?\|.*?\| ([\w, ]+) \|", page, re.M))
    assert {name: row.split(", ") for name, row in rows.items()} == {
        name: service["networks"] for name, service in SERVICES.items()
    }


# What the servers are given.


def mounts(service: str) -> dict[str, Path]:
    """Where a file is in the container → which file of ours it is."""
    pairs = [mount.split(":") for mount in SERVICES[service]["volumes"]]
    return {target: ROOT / source for source, target, *mode in pairs if mode}


def test_grafana_finds_the_dashboards_and_their_prometheus() -> None:
    inside = mounts("grafana")
    (sources,) = [yaml.safe_load(file.read_text()) for place, file in inside.items() if "/datasources/" in place]
    (providers,) = [yaml.safe_load(file.read_text()) for place, file in inside.items() if "/provisioning/dash" in place]
    assert sources["apiVersion"] == providers["apiVersion"] == 1
    (source,) = sources["datasources"]
    command = SERVICES["prometheus"]["command"]
    (port,) = [word.rpartition(":")[2] for word in command if word.startswith("--web.listen-address")]
    assert source["type"] == "prometheus" and source["url"] == f"http://prometheus:{port}" and source["isDefault"]
    assert "metrics" in set(SERVICES["grafana"]["networks"]) & set(SERVICES["prometheus"]["networks"])
    scraped = yaml.safe_load((ROOT / "deploy/prometheus/prometheus.yml").read_text())["global"]["scrape_interval"]
    assert source["jsonData"]["timeInterval"] == scraped
    (provider,) = providers["providers"]
    folder = provider["options"]["path"]
    shown = {file for place, file in inside.items() if Path(place).parent == Path(folder)}
    assert shown == set((ROOT / "alerts" / "dashboards").glob("*.json"))


def test_alertmanager_takes_its_configuration() -> None:
    amtool = shutil.which("amtool")
    if amtool is None:
        pytest.skip("amtool is not installed; Debian and Ubuntu: apt-get install prometheus-alertmanager")
    (file,) = mounts("alertmanager").values()
    done = subprocess.run([amtool, "check-config", str(file)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_fleet_that_moves_mutes_warnings_and_nothing_graver(tmp_path: Path) -> None:
    """The committed rules in a real Alertmanager, by the labels that the dispatcher posts."""
    (file,) = mounts("alertmanager").values()
    server = servers.alertmanager(tmp_path / "alertmanager", file.read_text()).start()
    try:
        integration = AlertmanagerConfig(receiver="ops", url=f"http://{server.address}", allow_private=True)
        channel = AlertmanagerChannel(integration, RULES)
        now = datetime.now(UTC).isoformat()

        def fires(kind: str, severity: str, fleet: str) -> Alert:
            name = f"{fleet} {kind} {severity}"
            conversation = "" if kind == "fleet_shift" else name
            known = {"kind": kind, "severity": severity, "deployment": fleet, "conversation_id": conversation}
            return alert(name, starts_at=now, accepted=time.time(), changed=time.time(), **known)

        def muted() -> set[str]:
            with urllib.request.urlopen(f"http://{server.address}/api/v2/alerts", timeout=10) as answer:
                found = json.load(answer)
            return {one["labels"]["episode_id"] for one in found if one["status"]["inhibitedBy"]}

        for fleet, how in (
            ("risen", "info"),
            ("fallen", "warning"),
        ):  # in turn: when the later has muted, so has the former
            single = [fires("sudden_drop", severity, fleet) for severity in ("warning", "critical")]
            channel.deliver(notification(*single, fires("fleet_shift", how, fleet), time=now))
        deadline = time.monotonic() + 60.0
        while not (found := muted()):
            assert time.monotonic() < deadline, "nothing is muted"
            time.sleep(0.1)
        assert found == {"fallen sudden_drop warning"}
        channel.close()
    finally:
        server.kill()


# The Dockerfile.


def test_the_dockerfile_pleases_its_linter() -> None:
    program = shutil.which("hadolint", path=str(Path(sys.executable).parent)) or shutil.which("hadolint")
    if program is None:
        pytest.skip("hadolint is not installed")
    done = subprocess.run([program, str(ROOT / "Dockerfile")], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("target", ["service", "collector"])
def test_the_images_end_as_somebody_who_is_not_root_and_stop_on_sigterm(target: str) -> None:
    built = stage(target)
    assert built["USER"] == "10001:10001"
    assert built["STOPSIGNAL"] == "SIGTERM"
    assert built["ENTRYPOINT"] == ["anchorwatch"]  # no shell in between that would keep the signal
    assert not re.search(r"apt-get|gcc|build-essential", (ROOT / "Dockerfile").read_text())


def test_services_are_built_from_stages_that_exist_and_run_as_their_user() -> None:
    for name, service in SERVICES.items():
        if "build" in service:
            assert stage(service["build"]["target"])["USER"] == service["user"], name
    collectors = {name for name, service in SERVICES.items() if service["image"].startswith("anchorwatch-collector:")}
    assert collectors == {"demo"}  # nothing else needs torch


def test_what_is_copied_exists_and_is_let_through() -> None:
    through = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    copied = {source for source in dockerfile().copied if not source.startswith("/")}
    assert copied == through
    assert all((ROOT / source).exists() for source in copied)


def test_no_compiler_is_needed_and_every_package_has_one_version() -> None:
    for line in dockerfile().runs:
        for install in re.findall(r"install --no-cache-dir(?: [^&]*)", line):
            if "setuptools" in install:
                continue
            assert "--only-binary :all:" in install
            assert "-c /constraints.txt" in install or "--no-deps" in install
    pinned = {
        line.split("==")[0] for line in (ROOT / "constraints.txt").read_text().splitlines() if line and line[0] != "#"
    }
    for extras in (("service",), ("service", "collect", "smollm2")):
        needed = closure("anchorwatch", extras)
        assert {"msgspec", "kafka-python", "redis", "hiredis", "crc32c", "river"} <= needed
        assert needed - pinned - {"anchorwatch"} == set()


def closure(name: str, extras: tuple[str, ...]) -> set[str]:
    """The names of all that an installation of a distribution brings, itself included, as this platform has it."""
    found: set[str] = set()
    waiting = [(name, extra) for extra in ("", *extras)]
    seen = set(waiting)
    while waiting:
        distribution, extra = waiting.pop()
        try:
            wanted = requires(distribution) or []
        except PackageNotFoundError:
            continue  # a CUDA build's own, which a CPU build does not bring
        found.add(re.sub(r"[-_.]+", "-", distribution).lower())
        for line in wanted:
            requirement = Requirement(line)
            if requirement.marker and not requirement.marker.evaluate({"extra": extra}):
                continue
            for further in ("", *requirement.extras):
                if (requirement.name, further) not in seen:
                    seen.add((requirement.name, further))
                    waiting.append((requirement.name, further))
    return found

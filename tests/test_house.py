"""Promises of the house: the floors hold, the wheel carries what it must, and nothing undocumented is shipped."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from importlib.metadata import distributions, packages_distributions
from pathlib import Path

import pytest
from prometheus_client.metrics import MetricWrapperBase

from monitor import telemetry
from monitor.settings import PREFIX, Settings

ROOT = Path(__file__).parent.parent
PACKAGES = ("monitor", "collectors", "alerts")
LARGEST_FILE = 4 * 2**20
# Only true on the machine of whoever wrote it: a home, a scratch folder, a workspace at the root.
MACHINE_PATH = re.compile(rb"(?<![\w.~/-])/(?:work|root|tmp|home/[a-z][\w-]*|Users/[A-Za-z][\w-]*)/[\w.]")


def checkout() -> list[Path]:
    """Every file that is committed, or would be by the next commit; relative to the root."""
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        pytest.skip("not a git checkout")
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=True,
    )
    return sorted(Path(name) for name in listed.stdout.decode().split("\0") if name and (ROOT / name).is_file())


def copy_of_the_checkout(folder: Path) -> Path:
    """A clean copy, so that nothing built here before can hide what is missing."""
    for path in checkout():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / path, folder / path)
    return folder


def lint_imports(folder: Path) -> subprocess.CompletedProcess[str]:
    program = (
        "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports(no_cache=True, no_logo=True))"
    )
    return subprocess.run([sys.executable, "-c", program], cwd=folder, capture_output=True, text=True, check=False)


# Floors


def test_every_import_goes_down_the_floors() -> None:
    result = lint_imports(ROOT)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize(
    ("module", "line", "broken"),
    [
        ("monitor/events.py", "import monitor.worker", "the floors of monitor"),
        ("monitor/detect/conversation.py", "import monitor.store.store", "the floors of monitor"),
        ("monitor/unplaced.py", "", "the floors of monitor"),
        ("collectors/spans.py", "import collectors.watch", "the floors of collectors"),
        ("alerts/__init__.py", "import collectors.spans", "collectors and alerts never import each other"),
        ("monitor/batch.py", "import collectors.spans", "monitor imports neither wing, the front door aside"),
        ("monitor/__main__.py", "import torch", "torch and transformers only in collectors"),
    ],
)
def test_an_import_up_the_floors_is_caught(tmp_path: Path, module: str, line: str, broken: str) -> None:
    copy = copy_of_the_checkout(tmp_path)
    with (copy / module).open("a") as file:
        file.write(f'"""Stands on no floor."""\n{line}\n')
    result = lint_imports(copy)
    assert result.returncode != 0
    assert f"{broken} BROKEN" in result.stdout, result.stdout + result.stderr


def test_a_worker_needs_no_torch() -> None:
    modules = sorted(
        ".".join(path.with_suffix("").parts).removesuffix(".__init__")
        for path in (file.relative_to(ROOT) for name in ("monitor", "alerts") for file in (ROOT / name).rglob("*.py"))
    )
    program = (
        f"import importlib, sys\nfor name in {modules!r}: importlib.import_module(name)\n"
        "print(sorted({'torch', 'transformers', 'collectors'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (result.stdout.strip(), result.returncode) == ("[]", 0), result.stderr


# The wheel


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Iterator[zipfile.ZipFile]:
    """The wheel, built from a clean copy."""
    source, out = copy_of_the_checkout(tmp_path_factory.mktemp("source")), tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", str(out)]
    result = subprocess.run([*command, str(source)], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    (built,) = out.glob("*.whl")
    with zipfile.ZipFile(built) as archive:
        yield archive


def test_the_wheel_has_three_packages_and_nothing_else(wheel: zipfile.ZipFile) -> None:
    names = {name.split("/")[0] for name in wheel.namelist()}
    assert {name for name in names if not name.endswith(".dist-info")} == set(PACKAGES)
    assert len(names) == len(PACKAGES) + 1


def test_the_wheel_carries_every_file_of_the_packages(wheel: zipfile.ZipFile) -> None:
    committed = {path.as_posix() for path in checkout() if path.parts[0] in PACKAGES}
    assert {f"{package}/py.typed" for package in PACKAGES} <= committed
    assert {name for name in wheel.namelist() if ".dist-info/" not in name} == committed


def test_the_wheel_carries_the_licence(wheel: zipfile.ZipFile) -> None:
    (licence,) = (name for name in wheel.namelist() if name.endswith("/LICENSE"))
    text = wheel.read(licence).decode()
    assert text == (ROOT / "LICENSE").read_text()
    assert "Apache License" in text


# What is committed


def test_every_module_says_what_it_is_for() -> None:
    modules = [path for path in checkout() if path.suffix == ".py"]
    assert len(modules) > 40
    silent = [str(path) for path in modules if not ast.get_docstring(ast.parse((ROOT / path).read_text()))]
    assert not silent


def test_nothing_committed_names_a_path_of_one_machine() -> None:
    named = [
        f"{path}: {hit.group().decode()}"
        for path in checkout()
        if path != Path(__file__).relative_to(ROOT)
        for hit in MACHINE_PATH.finditer((ROOT / path).read_bytes())
    ]
    assert not named


@pytest.mark.parametrize("text", ["see /work/notes", "'/home/ann/axis'", "at /root/x.py", "/Users/Ann/axis.pt"])
def test_a_path_of_one_machine_is_seen(text: str) -> None:
    assert MACHINE_PATH.search(text.encode())


@pytest.mark.parametrize(
    "text", ["demo.work/part", "the log/work/x", "sqlite:///var/lib/log.db", "~/work/x", "a /root"]
)
def test_other_paths_are_left_alone(text: str) -> None:
    assert not MACHINE_PATH.search(text.encode())


def test_nothing_committed_is_large() -> None:
    large = {str(path): size for path in checkout() if (size := (ROOT / path).stat().st_size) > LARGEST_FILE}
    assert not large


# What is installed


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _pins() -> dict[str, str]:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and line[0] != "#"]
    pins = dict(line.split("==") for line in lines)  # a line that pins no exact version fails here
    assert len(pins) == len(lines)
    return pins


def test_everything_that_the_project_asks_for_is_pinned() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    asked = [*project["dependencies"], *(line for lines in project["optional-dependencies"].values() for line in lines)]
    names = {_normal(re.split(r"[^\w.-]", line, maxsplit=1)[0]) for line in asked}
    assert names - {project["name"]} <= _pins().keys()  # an extra may gather others of our own


def test_everything_that_is_imported_is_asked_for() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    asked = [*project["dependencies"], *(line for lines in project["optional-dependencies"].values() for line in lines)]
    names = {_normal(re.split(r"[^\w.-]", line, maxsplit=1)[0]) for line in asked}
    trees = [ast.parse((ROOT / path).read_text()) for path in checkout() if path.suffix == ".py"]
    imported = {
        name.split(".")[0]
        for tree in trees
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in ([node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names])
    }
    own = {*PACKAGES, *(path.stem for path in (ROOT / "tests").iterdir()), "tests", "benchmarks"}
    homes = packages_distributions()
    unasked = {
        name
        for name in imported - own - set(sys.stdlib_module_names)
        if not names & {_normal(home) for home in homes.get(name, [])}
    }
    assert not unasked


def test_the_tests_run_on_the_pinned_versions() -> None:
    installed = {_normal(found.metadata["Name"]): found.version.split("+")[0] for found in distributions()}
    pins = _pins()
    assert {name: installed[name] for name in pins if name in installed} == {
        name: pin for name, pin in pins.items() if name in installed
    }


# What is documented


def _table(document: str) -> list[str]:
    """Every table row that begins with a code word."""
    return [line for line in (ROOT / "docs" / document).read_text().splitlines() if line.startswith("| `")]


def _row(*cells: str | None) -> str:
    return "| " + " | ".join(cell or "" for cell in cells) + " |"


def _default(name: str) -> str:
    field = Settings.model_fields[name]
    if field.default_factory is not None or field.default in (None, ""):
        return "see the meaning"
    return f"`{field.default}`"


def test_every_setting_is_documented_as_it_is() -> None:
    expected = [
        _row(f"`{PREFIX}{name.upper()}`", _default(name), field.description)
        for name, field in Settings.model_fields.items()
    ]
    assert _table("settings.md") == expected, "docs/settings.md should have these rows:\n" + "\n".join(expected)


def test_every_metric_is_documented_as_it_is() -> None:
    instruments = [value for value in vars(telemetry).values() if isinstance(value, MetricWrapperBase)]
    assert len(instruments) == len(list(telemetry.REGISTRY.collect())), "an instrument has no name in the module"
    expected, names = [], set()
    for instrument in instruments:
        (family,) = instrument.describe()
        name = family.name + ("_total" if family.type == "counter" else "")
        labels = ", ".join(f"`{label}`" for label in instrument._labelnames)  # the library has no public name for them
        names.add(name)
        expected.append(_row(f"`{name}`", family.type, labels or "none", family.documentation))
    assert _table("metrics.md") == expected, "docs/metrics.md should have these rows:\n" + "\n".join(expected)
    assert set(re.findall(r"anchorwatch_\w+", (ROOT / "docs" / "metrics.md").read_text())) == names

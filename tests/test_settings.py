"""Promises of settings: every one is documented, everything wrong is told at once, the key makes itself once."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from monitor.errors import ConfigurationError
from monitor.settings import KEY_FILE, PREFIX, Settings, installation_key, load_settings
from monitor.store import open_store
from monitor.stream import open_log

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def own_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in list(os.environ):
        if name.upper().startswith(PREFIX):
            monkeypatch.delenv(name)
    monkeypatch.setenv("ANCHORWATCH_DATA_DIR", str(tmp_path / "data"))


def test_the_defaults_work_without_any_variable_and_open_both_files(tmp_path: Path) -> None:
    settings = load_settings()
    open_log(settings.log_url).close()
    open_store(settings.store_url).close()
    assert {path.name for path in (tmp_path / "data").iterdir()} >= {"log.db", "store.db"}
    assert (settings.queue_size, settings.when_full, settings.batch_size) == (10_000, "drop_newest", 500)


def test_without_a_data_directory_the_platform_says_where(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ANCHORWATCH_DATA_DIR")
    assert "anchorwatch" in str(load_settings().data_dir)


@pytest.mark.parametrize("name", sorted(Settings.model_fields))
def test_every_setting_says_what_it_is_for(name: str) -> None:
    description = Settings.model_fields[name].description
    assert description and description.endswith(".") and len(description) > 20


def test_variables_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ANCHORWATCH_QUEUE_SIZE", "7")
    monkeypatch.setenv("ANCHORWATCH_WHEN_FULL", "block")
    monkeypatch.setenv("ANCHORWATCH_LOG_LEVEL", "WARNING")
    monkeypatch.setenv("ANCHORWATCH_METRICS_PORT", "9109")
    monkeypatch.setenv("ANCHORWATCH_DEPLOYMENT", "shop")
    settings = load_settings()
    assert (settings.queue_size, settings.when_full, settings.log_level) == (7, "block", "warning")
    assert (settings.metrics_port, settings.deployment) == (9109, "shop")


def test_an_empty_variable_counts_as_unset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ANCHORWATCH_METRICS_PORT", "")
    monkeypatch.setenv("ANCHORWATCH_LOG_URL", "")
    settings = load_settings()
    assert settings.metrics_port is None
    assert settings.log_url.endswith("/log.db")


def test_all_that_is_wrong_is_told_at_once_by_its_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = {
        "QUEUE_SIZE": "0",
        "BATCH_SIZE": "many",
        "WHEN_FULL": "explode",
        "METRICS_PORT": "70000",
        "LOG_URL": "kafak://broker",
        "STORE_URL": "sqlite:relative.db",
        "SESSION_GAP_SECONDS": "nan",
        "LOG_FORMAT": "xml",
    }
    for name, value in wrong.items():
        monkeypatch.setenv(PREFIX + name, value)
    with pytest.raises(ConfigurationError) as caught:
        load_settings()
    told = str(caught.value)
    for name, value in wrong.items():
        assert f"{PREFIX}{name}: " in told
        assert value in told
    assert "8 settings are wrong" in told and "cure:" in told
    assert "'drop_newest', 'drop_oldest', 'block' or 'spool'" in told
    assert "sqlite:///absolute/path" in told


@pytest.mark.parametrize(
    ("typo", "meant"),
    [("ANCHORWATCH_QUEU_SIZE", "ANCHORWATCH_QUEUE_SIZE"), ("anchorwatch_logurl", "ANCHORWATCH_LOG_URL")],
)
def test_a_misspelt_variable_is_refused_with_the_nearest_name(
    monkeypatch: pytest.MonkeyPatch, typo: str, meant: str
) -> None:
    monkeypatch.setenv(typo, "7")
    with pytest.raises(ConfigurationError, match=f"{typo}: no such setting; did you mean {meant}"):
        load_settings()


def test_log_and_store_may_not_be_one_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ANCHORWATCH_LOG_URL", "sqlite:///var/one.db")
    monkeypatch.setenv("ANCHORWATCH_STORE_URL", "sqlite:///var/one.db")
    with pytest.raises(ConfigurationError, match="name one file"):
        load_settings()


def test_a_secret_is_never_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ANCHORWATCH_INSTALLATION_KEY", "hunter2")
    with pytest.raises(ConfigurationError, match="at least 32 characters") as caught:
        load_settings()
    assert "hunter2" not in str(caught.value)
    monkeypatch.setenv("ANCHORWATCH_INSTALLATION_KEY", "hunter2" * 5)
    settings = load_settings()
    assert "hunter2" not in repr(settings) + str(settings) + settings.model_dump_json()
    assert installation_key(settings) == b"hunter2" * 5


# The installation key.


def test_the_key_makes_itself_once_and_only_its_owner_can_read_it() -> None:
    settings = load_settings()
    key = installation_key(settings)
    assert len(key) == 32
    assert installation_key(settings) == key
    assert stat.S_IMODE((settings.data_dir / KEY_FILE).stat().st_mode) == 0o600
    assert [path.name for path in settings.data_dir.iterdir()] == [KEY_FILE]


def test_processes_that_start_together_agree_on_one_key() -> None:
    code = (
        "from monitor.settings import *; import sys; s = load_settings(); "
        "print('ready', flush=True); sys.stdin.readline(); print(installation_key(s).hex())"
    )
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for _ in range(3)
    ]
    for process in processes:
        assert process.stdout and process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin
        process.stdin.write("\n")
        process.stdin.flush()
    assert len({process.communicate(timeout=60)[0] for process in processes}) == 1


@pytest.mark.parametrize("content", ["", "abc", "00" * 31, "zz" * 32, "\x80"])
def test_a_damaged_key_is_told_and_never_replaced(content: str) -> None:
    settings = load_settings()
    installation_key(settings)
    path = settings.data_dir / KEY_FILE
    path.write_text(content, encoding="latin-1")
    with pytest.raises(ConfigurationError, match="damaged") as caught:
        installation_key(settings)
    assert "restore it from a copy" in caught.value.cure
    assert path.read_text(encoding="latin-1") == content


@pytest.mark.skipif(os.name != "posix", reason="modes are POSIX")
def test_a_key_that_others_can_read_is_refused() -> None:
    settings = load_settings()
    installation_key(settings)
    (settings.data_dir / KEY_FILE).chmod(0o644)
    with pytest.raises(ConfigurationError, match="other users can read") as caught:
        installation_key(settings)
    assert "chmod 600" in caught.value.cure


def test_a_data_directory_that_can_not_be_made_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("ANCHORWATCH_DATA_DIR", str(tmp_path / "file" / "data"))
    with pytest.raises(ConfigurationError, match="can't be read or made") as caught:
        installation_key(load_settings())
    assert "ANCHORWATCH_DATA_DIR" in caught.value.cure

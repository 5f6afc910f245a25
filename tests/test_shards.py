"""An audit that is killed, cut short or run elsewhere gives the rows of one that was not; and scores nothing twice."""

from __future__ import annotations

import functools
import gzip
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from conftest import tiny_bundle
from hypothesis import given
from hypothesis import strategies as st
from signed import Signed, pieces
from tiny import IMPORTABLE, environment
from transcripts import talk, write_log

from collectors.logs import Logged, read_log
from collectors.models import LoadedModel
from collectors.shards import Progress, score_logs
from collectors.witness import Shard, Witness, load_witness
from monitor.axis.bundle import load_bundle, new_bundle, save_bundle
from monitor.errors import BundleMismatch, ConfigurationError
from monitor.events import encode
from monitor.origin import Skipped

pytest_plugins = ["miniature"]

# Scores in a process of its own, and says so after every shard.
SCORE = """
import functools, sys
from pathlib import Path
from collectors.shards import score_logs
from collectors.witness import load_witness
from monitor.errors import AnchorwatchError
model, bundle, folder, *files = sys.argv[1:]
try:
    for shard in score_logs(files, Path(folder), functools.partial(load_witness, model, bundle), shard_size=2):
        print(shard.digest, flush=True)
except AnchorwatchError as error:
    print(error)
    sys.exit(2)
"""


class Counting(Witness):
    """A witness that counts what it is asked to score."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.scored: list[str] = []

    def score(self, conversations: Sequence[Logged | Skipped]) -> Shard:
        shard = super().score(conversations)
        self.scored.append(shard.digest)
        return shard


@pytest.fixture(scope="session")
def bundle_folder(tmp_path_factory: pytest.TempPathFactory, loaded: LoadedModel) -> Path:
    bundle = tiny_bundle(loaded.model, loaded.tokenizer)
    return save_bundle(bundle, tmp_path_factory.mktemp("bundles") / "tiny")


@pytest.fixture
def witness(loaded: LoadedModel, bundle_folder: Path) -> Counting:
    return Counting(loaded, load_bundle(bundle_folder))


@pytest.fixture
def logs(tmp_path: Path) -> list[str]:
    """Two logs; in the second one a line is torn."""
    one = write_log(tmp_path / "one.jsonl", [talk(seed, 1 + seed % 3) for seed in range(7)])
    two = write_log(tmp_path / "two.jsonl", [talk(seed, 1 + seed % 2) for seed in range(20, 24)])
    lines = two.read_text().splitlines()
    two.write_text("\n".join([*lines[:2], lines[2][:40], *lines[2:]]) + "\n")
    return [str(one), str(two)]


def scored(files: Sequence[str], folder: Path, witness: Witness, **options: Any) -> list[Shard]:
    return list(score_logs(files, folder, lambda: witness, **{"shard_size": 2} | options))


def bits(shards: Sequence[Shard]) -> list[bytes]:
    return [msgspec.json.encode(shard, order="sorted") for shard in shards]


def kept(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.jsonl.gz")}


def written(folder: Path) -> dict[str, int]:
    """When each shard was written."""
    return {path.name: path.stat().st_mtime_ns for path in folder.glob("*.jsonl.gz")}


# Shards.


def test_shards_are_consecutive_conversations_of_one_log(logs: list[str], tmp_path: Path, witness: Counting) -> None:
    shards = scored(logs, tmp_path / "out", witness)
    assert [[(origin.source, origin.record) for origin in shard.origins] for shard in shards] == [
        [(logs[0], 1), (logs[0], 2)],
        [(logs[0], 3), (logs[0], 4)],
        [(logs[0], 5), (logs[0], 6)],
        [(logs[0], 7)],
        [(logs[1], 1), (logs[1], 2)],
        [(logs[1], 4), (logs[1], 5)],
    ]
    skipped = [[(one.source, one.record) for one in shard.skipped] for shard in shards]
    assert skipped == [[], [], [], [], [], [(logs[1], 3)]]
    items = [list(read_log(file)) for file in logs]
    apart = [items[0][:2], items[0][2:4], items[0][4:6], items[0][6:], items[1][:2], items[1][2:]]
    assert bits(shards) == bits([witness.score(part) for part in apart])
    assert kept(tmp_path / "out").keys() == {f"{shard.digest}.jsonl.gz" for shard in shards}


def test_what_is_kept_is_json_lines_without_text(logs: list[str], tmp_path: Path, witness: Counting) -> None:
    first = scored(logs, tmp_path / "out", witness)[0]
    text = gzip.decompress((tmp_path / "out" / f"{first.digest}.jsonl.gz").read_bytes())
    header, *lines = text.splitlines()
    assert lines == [encode(projection) for projection in first.projections]
    about = json.loads(header)
    assert (about["schema"], about["digest"], about["projections"]) == (1, first.digest, len(lines))
    said = {message["content"] for item in read_log(logs[0]) if isinstance(item, Logged) for message in item.messages}
    assert not [content for content in said if content.encode() in text]


def test_a_log_without_conversations_has_a_shard_that_says_so(tmp_path: Path, witness: Counting) -> None:
    empty, odd = tmp_path / "empty.jsonl", tmp_path / "odd.bin"
    empty.touch()
    odd.write_bytes(b"\x00\x01\x02" * 100)
    shards = scored([str(empty), str(odd)], tmp_path / "out", witness)
    assert [[one.source for one in shard.skipped] for shard in shards] == [[str(empty)], [str(odd)]]
    assert not any(shard.projections or shard.origins for shard in shards)


def test_a_folder_for_the_deployment(logs: list[str], tmp_path: Path, witness: Counting) -> None:
    shards = scored(logs, tmp_path / "out", witness, deployment="ours")
    assert {event.deployment for shard in shards for event in shard.projections} == {"ours"}


@pytest.mark.parametrize("options", [{"shard_size": 0}, {"actors": 0}])
def test_options_that_make_no_sense_are_refused(options: Any, tmp_path: Path, witness: Counting) -> None:
    with pytest.raises(ConfigurationError, match="at least one"):
        score_logs([], tmp_path, lambda: witness, **options)


# Going on.


def test_what_was_scored_is_not_scored_again(logs: list[str], tmp_path: Path, witness: Counting) -> None:
    first = scored(logs, tmp_path / "out", witness)
    assert witness.scored == [shard.digest for shard in first]
    files = kept(tmp_path / "out")
    again = scored(logs, tmp_path / "out", witness)
    assert bits(again) == bits(first) and len(witness.scored) == len(first)
    # Nor where the logs come in another order, or with others.
    turned = scored(logs[::-1], tmp_path / "out", witness)
    assert bits(turned) == bits([*first[4:], *first[:4]]) and len(witness.scored) == len(first)
    assert kept(tmp_path / "out") == files


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def flipped(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


def emptied(path: Path) -> None:
    path.write_bytes(b"")


def shortened(path: Path) -> None:
    """Whole as a gzip file, with one projection less."""
    path.write_bytes(gzip.compress(b"\n".join(gzip.decompress(path.read_bytes()).splitlines()[:-1])))


def others(path: Path) -> None:
    """Whole, and another shard's."""
    shutil.copy(next(other for other in path.parent.glob("*.jsonl.gz") if other != path), path)


def newer(path: Path) -> None:
    """Of a schema that nobody knows yet."""
    text = gzip.decompress(path.read_bytes())
    path.write_bytes(gzip.compress(text.replace(b'"schema":1', b'"schema":2', 1)))


def gone(path: Path) -> None:
    path.unlink()


@pytest.mark.parametrize("harm", [truncated, flipped, emptied, shortened, others, newer, gone])
def test_what_is_torn_or_foreign_is_scored_again(
    harm: Callable[[Path], None], logs: list[str], tmp_path: Path, witness: Counting
) -> None:
    first = scored(logs, tmp_path / "out", witness)
    files = kept(tmp_path / "out")
    harm(tmp_path / "out" / f"{first[2].digest}.jsonl.gz")
    assert kept(tmp_path / "out") != files
    witness.scored.clear()
    assert bits(scored(logs, tmp_path / "out", witness)) == bits(first)
    assert witness.scored == [first[2].digest]
    assert kept(tmp_path / "out") == files


def test_what_changed_is_scored_again_and_nothing_else(logs: list[str], tmp_path: Path, witness: Counting) -> None:
    first = scored(logs, tmp_path / "out", witness)
    text = Path(logs[0]).read_text()
    Path(logs[0]).write_text(text.replace("over Möwen", "over seals").replace("\\u00fcber M\\u00f6wen", "of seals"))
    assert Path(logs[0]).read_text() != text
    witness.scored.clear()
    second = scored(logs, tmp_path / "out", witness)
    changed = [one.digest for one, other in zip(second, first, strict=True) if one.digest != other.digest]
    assert witness.scored == changed and 0 < len(changed) < len(first)


def test_other_settings_share_no_shard(
    logs: list[str], tmp_path: Path, witness: Counting, loaded: LoadedModel, bundle_folder: Path
) -> None:
    scored(logs, tmp_path / "out", witness)
    narrow = Counting(loaded, load_bundle(bundle_folder), context=64)
    assert len(scored(logs, tmp_path / "out", narrow)) == len(narrow.scored) == 6
    witness.scored.clear()
    scored(logs, tmp_path / "out", witness)
    assert not witness.scored


def test_a_log_that_grew_costs_its_end_only(logs: list[str], tmp_path: Path, witness: Counting) -> None:
    first = scored(logs[:1], tmp_path / "out", witness)
    with Path(logs[0]).open("a") as log:
        log.write(json.dumps({"messages": talk(40, 1)}) + "\n")
        log.write(json.dumps({"messages": talk(41, 1)}) + "\n")
    witness.scored.clear()
    second = scored(logs[:1], tmp_path / "out", witness)
    assert bits(second[:3]) == bits(first[:3]) and len(second) == 5
    assert witness.scored == [shard.digest for shard in second[3:]]


def scoring(model: Path, bundle: Path, folder: Path, files: Sequence[str], **options: Any) -> subprocess.Popen[str]:
    threads = str(torch.get_num_threads())
    return subprocess.Popen(
        [sys.executable, "-c", SCORE, str(model), str(bundle), str(folder), *files],
        env=environment(OMP_NUM_THREADS=threads),
        stdout=subprocess.PIPE,
        text=True,
        **options,
    )


def test_an_audit_that_was_killed_ends_as_one_that_was_not(
    tmp_path: Path, model_folder: Path, bundle_folder: Path, witness: Counting
) -> None:
    log = write_log(tmp_path / "log.jsonl", [talk(seed, 1 + seed % 4) for seed in range(120)])
    whole = scored([str(log)], tmp_path / "whole", witness)
    process = scoring(model_folder, bundle_folder, tmp_path / "killed", [str(log)])
    assert process.stdout is not None
    told = [process.stdout.readline().strip() for _ in range(3)]  # the next one is under way when the signal comes
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    left = kept(tmp_path / "killed")
    assert {f"{digest}.jsonl.gz" for digest in told} <= left.keys() and len(left) < len(whole) == 60
    # What a killed write leaves, and what is nobody's business of ours.
    (tmp_path / "killed" / f".{'a' * 64}.4711.partial").write_bytes(b"half")
    (tmp_path / "killed" / "notes.txt").write_text("mine")

    witness.scored.clear()
    resumed = scored([str(log)], tmp_path / "killed", witness)
    assert bits(resumed) == bits(whole)
    assert witness.scored == [shard.digest for shard in whole if f"{shard.digest}.jsonl.gz" not in left]
    assert kept(tmp_path / "killed") == kept(tmp_path / "whole")
    names = {path.name for path in (tmp_path / "killed").iterdir()} - kept(tmp_path / "killed").keys()
    assert names == {".lock", "notes.txt"}


def test_stopping_early_loses_nothing(logs: list[str], tmp_path: Path, witness: Counting) -> None:
    shards = score_logs(logs, tmp_path / "out", lambda: witness, shard_size=2)
    early = [next(shards), next(shards)]
    shards.close()  # type: ignore[attr-defined]
    assert len(kept(tmp_path / "out")) == 2
    rest = scored(logs, tmp_path / "out", witness)
    assert bits(rest[:2]) == bits(early) and len(witness.scored) == len(rest)


# The folder.


def test_two_audits_never_share_a_folder(
    logs: list[str], tmp_path: Path, model_folder: Path, bundle_folder: Path, witness: Counting
) -> None:
    ours = score_logs(logs, tmp_path / "out", lambda: witness, shard_size=2)
    next(ours)
    with pytest.raises(ConfigurationError, match="another audit is at work"):
        scored(logs, tmp_path / "out", witness)
    other = scoring(model_folder, bundle_folder, tmp_path / "out", logs)
    said, _ = other.communicate(timeout=120)
    assert other.returncode == 2 and "another audit" in said and "cure:" in said
    assert len(list(ours)) == 5  # undisturbed, and then the folder is free
    assert len(scored(logs, tmp_path / "out", witness)) == 6


def test_a_full_disk_says_its_cure_and_loses_no_finished_shard(
    tmp_path: Path, model_folder: Path, bundle_folder: Path, witness: Counting
) -> None:
    # Two small shards fit, a large one does not: as on a disk that fills up meanwhile.
    talks = [talk(1, 1), talk(2, 1), talk(3, 1), talk(4, 1), talk(5, 9), talk(6, 9)]
    log = str(write_log(tmp_path / "log.jsonl", talks))
    whole = scored([log], tmp_path / "whole", witness)
    sizes = [len(kept(tmp_path / "whole")[f"{shard.digest}.jsonl.gz"]) for shard in whole]
    room = max(sizes[:2]) + 50
    assert room < sizes[2]
    process = scoring(
        model_folder,
        bundle_folder,
        tmp_path / "out",
        [log],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (room, room)),
    )
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 2, said
    assert "can't be written" in said and "cure:" in said
    assert kept(tmp_path / "out").keys() == {f"{shard.digest}.jsonl.gz" for shard in whole[:2]}
    assert not list((tmp_path / "out").glob(".*.partial"))
    witness.scored.clear()
    assert bits(scored([log], tmp_path / "out", witness)) == bits(whole)
    assert witness.scored == [whole[2].digest]


def test_a_folder_that_can_not_be_written_says_its_cure(logs: list[str], tmp_path: Path, witness: Counting) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigurationError, match=r"can't be written.*(\n.*)*cure"):
        scored(logs, tmp_path / "file" / "out", witness)
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o500)
    if not os.access(closed, os.W_OK):  # nothing is closed to root
        with pytest.raises(ConfigurationError, match="can't be written"):
            scored(logs, closed, witness)
    assert not witness.scored


# Progress.


def test_progress_counts_bytes_to_the_last(logs: list[str], tmp_path: Path, witness: Counting) -> None:
    seen: list[Progress] = []
    scored(logs, tmp_path / "out", witness, progress=seen.append)
    total = sum(Path(file).stat().st_size for file in logs)
    assert len(seen) == 6 and {one.bytes_total for one in seen} == {total}
    assert [one.conversations for one in seen] == [2, 4, 6, 7, 9, 11]
    assert [one.bytes_read for one in seen] == sorted(one.bytes_read for one in seen)
    assert (seen[-1].bytes_read, seen[-1].bytes_kept) == (total, 0)
    assert seen[-1].remaining(9.0) == 0.0

    (tmp_path / "out" / f"{witness.scored[1]}.jsonl.gz").unlink()
    before, seen = [one.bytes_read for one in seen], []
    scored(logs, tmp_path / "out", witness, progress=seen.append)
    assert [one.bytes_read for one in seen] == before
    assert seen[0].bytes_kept == seen[0].bytes_read and seen[0].remaining(1.0) is None
    assert seen[-1].bytes_kept == total - (before[1] - before[0])


@given(st.integers(1, 10**9), st.floats(0, 1), st.floats(0, 1), st.floats(0.1, 1e5))
def test_the_time_left_is_judged_by_what_was_scored(total: int, done: float, had: float, elapsed: float) -> None:
    read = int(total * done)
    found = Progress(1, read, int(read * had), total).remaining(elapsed)
    scored = read - int(read * had)
    if scored:
        assert found == pytest.approx((total - read) * elapsed / scored)
    else:
        assert found == (0.0 if read == total else None)
    assert Progress(1, read, 0, None).remaining(elapsed) is None


def test_a_pipe_has_no_total(tmp_path: Path, model_folder: Path, bundle_folder: Path, witness: Counting) -> None:
    log = write_log(tmp_path / "log.jsonl", [talk(seed, 1) for seed in range(5)])
    with log.open() as stdin:
        process = scoring(model_folder, bundle_folder, tmp_path / "out", ["-"], stdin=stdin)
        said, _ = process.communicate(timeout=120)
    assert process.returncode == 0 and len(said.split()) == 3
    assert kept(tmp_path / "out").keys() == {f"{digest}.jsonl.gz" for digest in said.split()}


def test_the_place_in_a_log_is_between_what_was_read_ahead(tmp_path: Path, witness: Counting) -> None:
    # Far smaller than what the reader reads at once, packed or not.
    talks = [talk(seed, 4) for seed in range(12)]
    log = write_log(tmp_path / "log.jsonl", talks)
    packed = tmp_path / "log.jsonl.gz"
    packed.write_bytes(gzip.compress(log.read_bytes()))
    for file in (log, packed):
        seen: list[Progress] = []
        scored([str(file)], tmp_path / "out", witness, progress=seen.append)
        at = [one.bytes_read for one in seen]
        assert at == sorted(at) and at[-1] == file.stat().st_size and len(at) == 6
        if file == log:
            assert at[2] == pytest.approx(at[-1] / 2, rel=0.2)


# On Ray.


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    ray = pytest.importorskip("ray")
    with pytest.MonkeyPatch.context() as patch:  # what other tests start finds nothing of this
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("PYTHONPATH", IMPORTABLE)
        ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
        yield ray
        ray.shutdown()


def test_ray_gives_the_same_rows(
    cluster: Any, logs: list[str], tmp_path: Path, model_folder: Path, bundle_folder: Path, witness: Counting
) -> None:
    many = write_log(tmp_path / "many.jsonl", [talk(seed, 1 + seed % 4) for seed in range(50, 90)])
    files = [logs[0], str(many), logs[1]]
    local = scored(files, tmp_path / "local", witness)
    make = functools.partial(load_witness, str(model_folder), str(bundle_folder))
    seen: list[Progress] = []
    spread = list(score_logs(files, tmp_path / "ray", make, engine="ray", actors=1, shard_size=2, progress=seen.append))
    assert bits(spread) == bits(local)
    assert kept(tmp_path / "ray") == kept(tmp_path / "local")
    assert seen[-1].bytes_read == seen[-1].bytes_total and seen[-1].conversations == 51
    # And each engine goes on where the other one was.
    stale = tmp_path / "ray" / f"{local[3].digest}.jsonl.gz"
    stale.unlink()
    before = written(tmp_path / "ray")
    again = list(score_logs(files, tmp_path / "ray", make, engine="ray", actors=2, shard_size=2))
    assert bits(again) == bits(local)
    after = written(tmp_path / "ray")
    assert after.pop(stale.name) and after == before
    witness.scored.clear()
    assert bits(scored(files, tmp_path / "ray", witness)) == bits(local) and not witness.scored


def test_one_large_file_keeps_all_actors_busy(cluster: Any) -> None:
    from collectors.ray_engine import spread

    done = list(spread(["60", "0", "3"], pieces, Signed, actors=2))
    assert [piece for piece, _ in done] == [*range(60), *range(3)]
    processes = {process for _, process in done[:60]}
    assert len(processes) == 2 and os.getpid() not in processes


def test_more_actors_than_there_is_room_for_are_refused(cluster: Any) -> None:
    from collectors.ray_engine import spread

    with pytest.raises(ConfigurationError, match="fewer actors"):
        list(spread(["1"], pieces, Signed, actors=3))


def test_what_fails_on_ray_is_told_as_it_was(
    cluster: Any, logs: list[str], tmp_path: Path, model_folder: Path, bundle_folder: Path
) -> None:
    right = load_bundle(bundle_folder)
    facts = msgspec.structs.replace(right.info.model, weights_sha256="0" * 64)
    wrong = save_bundle(new_bundle(right.tensors, msgspec.structs.replace(right.info, model=facts)), tmp_path / "wrong")
    make = functools.partial(load_witness, str(model_folder), str(wrong))
    with pytest.raises(BundleMismatch, match="weights"):
        list(score_logs(logs, tmp_path / "out", make, engine="ray", actors=1))
    # The lock is gone, and what is right goes on.
    make = functools.partial(load_witness, str(model_folder), str(bundle_folder))
    assert len(list(score_logs(logs, tmp_path / "out", make, engine="ray", actors=1))) == 2


def test_ray_can_not_read_a_pipe(tmp_path: Path, witness: Counting) -> None:
    with pytest.raises(ConfigurationError, match="standard input"):
        score_logs(["-"], tmp_path, lambda: witness, engine="ray")


def test_without_ray_the_cure_is_told(
    logs: list[str], tmp_path: Path, witness: Counting, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)  # as where it is not installed
    with pytest.raises(ConfigurationError, match=r"anchorwatch\[ray\]"):
        list(score_logs(logs, tmp_path, lambda: witness, engine="ray"))

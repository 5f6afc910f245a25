"""Promises of one SQLite file in several hands: what one process is told is kept, whoever else opens and closes it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tiny import environment

from monitor.stream.log import PROJECTIONS, EmbeddedLog, Message

ELSEWHERE = """
import sys
from pathlib import Path
from monitor.stream.log import PROJECTIONS, EmbeddedLog
log = EmbeddedLog(Path(sys.argv[1]))
print(log.span(PROJECTIONS, 0).end)
log.close()
"""


def seen_elsewhere(path: Path) -> int:
    """How many records another process finds, which opens the log and closes it again."""
    command = [sys.executable, "-c", ELSEWHERE, str(path)]
    return int(subprocess.run(command, env=environment(), check=True, capture_output=True, text=True).stdout)


def test_several_connections_of_one_process_and_another_process_share_one_log(tmp_path: Path) -> None:
    path = tmp_path / "log.db"
    log = EmbeddedLog(path)
    log.append(PROJECTIONS, [Message("a", b"0")])
    log.close()
    # As `anchorwatch up` does: each part opens the file anew, while the write-ahead log is still empty.
    parts = [EmbeddedLog(path) for _ in range(3)]
    assert seen_elsewhere(path) == 1
    for number, part in enumerate(parts, 2):
        part.append(PROJECTIONS, [Message("a", b"%d" % number)])
        assert seen_elsewhere(path) == number
        assert [each.span(PROJECTIONS, 0).end for each in parts] == [number] * 3
    for part in parts:
        part.close()
    assert seen_elsewhere(path) == 4

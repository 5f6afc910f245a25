"""A collector as a process of its own, without a model: a real publisher, fed with what it reads, metrics and all.

    python collector.py DATA_DIR PORT

It publishes every line of its standard input, one projection each, and has a spool. On the end of its input it goes on
serving its metrics until it is killed.
"""

from __future__ import annotations

import sys
import threading
from pathlib import Path

from collectors.publish import QueuePublisher
from monitor import telemetry
from monitor.events import decode_projection
from monitor.stream.log import EmbeddedLog


def main() -> None:
    data_dir, port = Path(sys.argv[1]), int(sys.argv[2])
    telemetry.serve_metrics(port)
    log = EmbeddedLog(data_dir / "log.db")
    with QueuePublisher(log, when_full="spool", spool=data_dir / "spool") as publisher:
        print("ready", flush=True)
        for line in sys.stdin.buffer:
            publisher.publish(decode_projection(line))
    threading.Event().wait()


if __name__ == "__main__":
    main()

"""From the end of a response to its committed finding, or to the webhook that tells of it, at a steady rate.

    python -m benchmarks.latency --json
    python -m benchmarks.latency --to webhook --json

Everything is real: a collector's process publishes through its queue to Kafka, `anchorwatch worker` folds, Redis keeps.
A response's event time is the moment it is handed to the queue, which is when a collector knows that it has ended. Its
finding is there when Redis says that it has committed it, by Redis's own clock, on the same machine. Every hundredth
response makes a finding; the conversations are new ones, so that each is folded from nothing.

To the webhook, `anchorwatch dispatch` tells of every alert by itself and at once (`group_wait: 0s`), in a signed POST.
It has been received when its last byte is here, by the clock of this machine, which is also the collector's.
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from msgspec.structs import replace

from benchmarks.load import Traffic, receivers, servers
from collectors.publish import QueuePublisher
from monitor.actions import Paging, append_action
from monitor.events import Projection
from monitor.store import open_store
from monitor.stream import open_log

WARM_SECONDS = 5.0
RULES = """
receivers:
  - name: hook
    webhook_configs:
      - url: {url}
        secret_files: [{secret}]
        allow_private: true
route:
  receiver: hook
  group_by: ['...']
  group_wait: 0s
"""


def run(broker: str = "noida", *, rate: int = 1000, seconds: float = 30.0, to: str = "store") -> dict[str, Any]:
    """Publish at `rate` responses a second for so long, and return what `--json` prints."""
    with tempfile.TemporaryDirectory(prefix="anchorwatch-latency-") as folder:
        scratch = Path(folder)
        kafka, redis = (
            servers.broker(broker, scratch / "kafka"),
            servers.redis(scratch / "redis", "--appendfsync", "everysec"),
        )
        settings = {
            **os.environ,
            "ANCHORWATCH_LOG_URL": f"kafka://{kafka.address}",
            "ANCHORWATCH_STORE_URL": servers.redis_url(redis),
            "ANCHORWATCH_DATA_DIR": str(scratch / "data"),
            "ANCHORWATCH_KAFKA_PARTITIONS": "8",
            "ANCHORWATCH_KAFKA_REPLICATION": "1",
            "ANCHORWATCH_LOG_LEVEL": "error",
        }
        anchorwatch = [sys.executable, "-m", "monitor"]
        processes: list[subprocess.Popen[bytes]] = []
        hook = Hook() if to == "webhook" else None
        try:
            kafka.start()
            redis.start()
            subprocess.run([*anchorwatch, "topics", "create"], env=settings, check=True, stdout=subprocess.DEVNULL)
            commands = [["worker"]]
            if hook is not None:
                commands.append(["dispatch", "--config", str(hook.rules(scratch))])
                _go_live(kafka.address)
            processes = [
                subprocess.Popen([*anchorwatch, *command], env=settings, stderr=subprocess.DEVNULL)
                for command in commands
            ]
            command = [sys.executable, "-m", "benchmarks.latency", "--publish", kafka.address, str(rate), str(seconds)]
            sent = json.loads(
                subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1]
            )
            delays, counts = _delays(servers.redis_url(redis), sent, hook)
        finally:
            for process in processes:
                process.send_signal(signal.SIGTERM)
            for process in processes:
                process.wait(20)
            if hook is not None:
                hook.close()
            redis.kill()
            kafka.kill()
    cuts = statistics.quantiles(delays, n=100)
    return {
        "to": to,
        "p50_ms": round(cuts[49] * 1000, 1),
        "p99_ms": round(cuts[98] * 1000, 1),
        "largest_ms": round(max(delays) * 1000, 1),
        "responses_per_second": round(sent["responses"] / sent["seconds"]),
        "responses": sent["responses"],
        "folded": counts,
        "findings": len(delays),
        "broker": broker,
        "cores": os.cpu_count(),
    }


def _publish(address: str, rate: int, seconds: float) -> None:
    """The collector: so many responses a second, evenly, each dated when it is handed over."""
    count = int(rate * (seconds + WARM_SECONDS))
    traffic = Traffic(count)
    made = list(traffic.responses())  # made beforehand: what is measured is not how fast they can be made up
    with QueuePublisher(open_log(f"kafka://{address}"), size=100_000) as publisher:
        publisher.publish(made[0])
        publisher.flush(30)
        began = time.monotonic()
        for number, response in enumerate(made[1:]):
            wait = began + number / rate - time.monotonic()
            if wait > 0:
                time.sleep(wait)
            now = datetime.now(UTC)
            if number == int(rate * WARM_SECONDS):
                counted = now.timestamp()
            publisher.publish(_dated(response, now))
        took = time.monotonic() - began
        publisher.flush(30)
    print(json.dumps({"responses": count, "seconds": took, "from": counted, "dropped": publisher.dropped}))


def _dated(response: Projection, now: datetime) -> Projection:
    return replace(response, time=now.isoformat(timespec="microseconds").replace("+00:00", "Z"))


class Hook:
    """A receiver that notes when it was told of each alert for the first time."""

    def __init__(self) -> None:
        self.told: dict[str, tuple[float, float]] = {}  # alert → event time, received
        self._receiver = receivers.Receiver()
        self._receiver.answer = self._note

    def rules(self, folder: Path) -> Path:
        """The file of rules by which everything comes here at once."""
        secret, rules = folder / "secret", folder / "alerts.yaml"
        secret.write_text("whsec_" + base64.b64encode(os.urandom(32)).decode())
        secret.chmod(0o600)
        rules.write_text(RULES.format(url=self._receiver.url, secret=secret))
        return rules

    def close(self) -> None:
        """Stop listening."""
        self._receiver.close()

    def _note(self, request: receivers.Received) -> receivers.Answer:
        now = time.time()
        for alert in request.json["alerts"]:
            at = datetime.fromisoformat(alert["startsAt"]).timestamp()
            self.told.setdefault(alert["labels"]["episode_id"], (at, now))
        return receivers.Answer()


def _go_live(address: str) -> None:
    log = open_log(f"kafka://{address}")
    try:
        append_action(log, "paging", "mode", Paging("live"), by="benchmark")
    finally:
        log.close()


def _delays(store_url: str, sent: dict[str, Any], hook: Hook | None) -> tuple[list[float], int]:
    """Seconds from each finding's event time to its commit, or its webhook, once all that was sent has been folded."""
    store = open_store(store_url)
    try:
        until = time.monotonic() + 60
        while (folded := sum(store.counts().values())) < sent["responses"] - sent["dropped"]:
            if time.monotonic() > until:
                raise SystemExit(f"only {folded} of {sent['responses']} responses were folded")
            time.sleep(0.5)
        if hook is None:
            pending = store.pending(10**6)
            times = [(datetime.fromisoformat(one.finding.time).timestamp(), one.committed) for one in pending]
        else:
            found = {one.episode_id for one in store.findings(10**6)}
            until = time.monotonic() + 60
            while found - hook.told.keys():
                if time.monotonic() > until:
                    raise SystemExit(f"{len(found - hook.told.keys())} of {len(found)} alerts were never told")
                time.sleep(0.1)
            times = list(hook.told.values())
        return [committed - at for at, committed in times if at >= sent["from"]], folded
    finally:
        store.close()


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object last")
    parser.add_argument("--broker", choices=["noida", "tansu"], default="noida")
    parser.add_argument("--to", choices=["store", "webhook"], default="store", help="where the clock stops")
    parser.add_argument("--rate", type=int, default=1000, help="responses a second")
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("--publish", nargs=3, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.publish:
        _publish(chosen.publish[0], int(chosen.publish[1]), float(chosen.publish[2]))
        return
    result = run(chosen.broker, rate=chosen.rate, seconds=chosen.seconds, to=chosen.to)
    if chosen.json:
        print(json.dumps(result))
    else:
        for name, value in result.items():
            print(f"{name:<22} {value}")


if __name__ == "__main__":
    main()

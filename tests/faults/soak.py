"""The fault suite in its long form: every scenario, with one seed after the other, until the time is up.

`make soak SECONDS=600 SEED=1`, or `PYTHONPATH=tests python -m faults.soak --seconds 600 --seed 1`. A scenario that has
begun is ended, which takes three minutes at most. The first broken promise ends it all, with exit status 1; its
directory, with the output of every process, is kept.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

from faults import scenarios
from faults.scenarios import Outcome

Scenario: TypeAlias = Callable[[Path, int], Outcome]

LONG: dict[str, Scenario] = {
    "kills-tansu": lambda d, s: scenarios.kills(d, s, rounds=20, broker="tansu"),
    "kills-noida": lambda d, s: scenarios.kills(d, s, rounds=12, broker="noida"),
    "kills-embedded": lambda d, s: scenarios.kills(d, s, rounds=20, broker=None, redis=False),
    "dispatcher-kills": lambda d, s: scenarios.dispatcher_kills(d, s, rounds=20),
    "zombie-tansu": lambda d, s: scenarios.zombie(d, s, freezes=5),
    "zombie-embedded": lambda d, s: scenarios.zombie(d, s, freezes=5, broker=None, redis=False),
    "store-away": lambda d, s: scenarios.store_away(d, s, seconds=10.0),
    "broker-away-spool": lambda d, s: scenarios.broker_away(d, s, seconds=20.0),
    "broker-away-drop": lambda d, s: scenarios.broker_away(d, s, seconds=20.0, when_full="drop_oldest"),
    "full-disk": scenarios.full_disk,
    "poison-tansu": lambda d, s: scenarios.poison(d, s, turns=100),
    "poison-noida": lambda d, s: scenarios.poison(d, s, turns=100, broker="noida"),
    "all-poison": scenarios.all_poison,
    "strange-traffic-tansu": lambda d, s: scenarios.strange_traffic(d, s, turns=300, broker="tansu"),
    "strange-traffic-noida": lambda d, s: scenarios.strange_traffic(d, s, turns=300, broker="noida"),
    "long-tansu": lambda d, s: scenarios.long_and_flooded(d, s, broker="tansu"),
    "long-noida": lambda d, s: scenarios.long_and_flooded(d, s, broker="noida"),
    "long-embedded": scenarios.long_and_flooded,
    "calibrations-embedded": lambda d, s: scenarios.calibrations(d, s, changes=6, broker=None),
    "calibrations-tansu": lambda d, s: scenarios.calibrations(d, s, changes=6),
    "swapping-tansu": lambda d, s: scenarios.swapping(d, s, seconds=60.0),
    "grown-topic-noida": scenarios.grown_topic,
    "topic-made-anew-tansu": scenarios.topic_made_anew,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=600.0, help="begin no scenario after so many seconds")
    parser.add_argument("--seed", type=int, default=int(time.time()), help="of the first round; each next has one more")
    parser.add_argument("--only", action="append", choices=sorted(LONG), help="this one; may be given again")
    given = parser.parse_args()
    ends = time.monotonic() + given.seconds
    seed, done = given.seed, list[Outcome]()
    while time.monotonic() < ends:
        for name in given.only or LONG:
            if time.monotonic() >= ends:
                break
            directory = Path(tempfile.mkdtemp(prefix=f"anchorwatch-{name}-"))
            print(f"{name} with seed {seed} ...", flush=True)
            try:
                outcome = LONG[name](directory, seed)
            except BaseException:
                traceback.print_exc()
                print(f"broken: make soak SEED={seed} ARGS='--only {name}'; see {directory}", flush=True)
                sys.exit(1)
            print(outcome, flush=True)
            done.append(outcome)
            shutil.rmtree(directory, ignore_errors=True)
        seed += 1
    print(summary(done, given.seed))


def summary(done: list[Outcome], seed: int) -> str:
    """The one line at the end."""
    reports = [outcome.report for outcome in done]
    return (
        f"seed {seed}: rounds {len(done)}, kills {sum(outcome.kills for outcome in done)}, "
        f"events {sum(r.events for r in reports)}, findings {sum(r.findings for r in reports)}, "
        f"lost {sum(r.lost for r in reports)}, duplicated {sum(r.duplicated for r in reports)}"
    )


if __name__ == "__main__":
    main()

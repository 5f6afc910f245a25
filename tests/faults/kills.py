"""SIGKILL for one component after the other, at moments and in an order that a seed says.

It knows processes and servers only by what they have in common, kill and start. What came of it is for `history`.
"""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Protocol

__all__ = ["Victim", "kill_rounds"]


class Victim(Protocol):
    """What can be killed and started again."""

    def kill(self) -> object: ...

    def start(self) -> object: ...


def kill_rounds(
    victims: Mapping[str, Victim],
    rounds: int,
    seed: int,
    *,
    longest_life: float = 1.5,
    longest_death: float = 1.0,
    before: Mapping[str, Callable[[], None]] | None = None,
) -> Counter[str]:
    """Let all run for a while, kill one, leave it dead for a while, start it again; so many times.

    Every victim dies about equally often. `before` names what is to be done right before one dies. Returns how often
    each one died.
    """
    chance = random.Random(seed)
    names = sorted(victims)
    order = [name for _ in range(rounds // len(names) + 1) for name in chance.sample(names, len(names))][:rounds]
    for name in order:
        time.sleep(chance.uniform(0.05, longest_life))
        if before and name in before:
            before[name]()
        victims[name].kill()
        time.sleep(chance.uniform(0.0, longest_death))
        victims[name].start()
    return Counter(order)

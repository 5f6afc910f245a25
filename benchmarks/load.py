"""What the service's benchmarks share: responses as the shipped bundle's collector sends them, and servers to run on.

The responses are made up, their shape is not: every coordinate that the bundle measures, in each of the four maps, with
as many digits as the collector sends. One response in a hundred makes a finding.
"""

from __future__ import annotations

import random
import sys
import uuid
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

from monitor.axis.bundle import load_bundle, resolve_bundle
from monitor.detect.baseline import DetectorConfig
from monitor.detect.configure import detector_config
from monitor.events import Projection, Windows

sys.path.append(str(Path(__file__).parent.parent / "tests"))

import receiver as receivers  # the tests' own HTTP receiver
import servers  # the tests' own way to start brokers and Redis

__all__ = ["Traffic", "receivers", "servers"]

# A response this far below its baseline opens an episode at once, and the next ones of that conversation add nothing.
FAR_BELOW = 12.0


class Traffic:
    """Responses of many conversations, turn by turn, each conversation's in order.

    Args:
        conversations: how many.
        findings: share of responses that make a finding.
        turns: of every conversation.
        seed: of everything but the conversations' ids.
    """

    def __init__(self, conversations: int, *, turns: int = 1, findings: float = 0.01, seed: int = 0) -> None:
        bundle = load_bundle(resolve_bundle("smollm2"))
        self.config: DetectorConfig = detector_config(bundle)
        self._names = bundle.directions()[0]
        self._layer = bundle.layer
        self._baseline = next(iter(self.config.baselines.values()))
        self._chance = random.Random(seed)
        self._ids = [str(uuid.uuid4()) for _ in range(conversations)]
        self._turns = turns
        # Each conversation drifts at most once, so its share is that of the responses times its turns.
        drifting = [at for at in range(conversations) if self._chance.random() < findings * turns]
        self._drifts = {at: self._chance.randrange(turns) for at in drifting}

    def __len__(self) -> int:
        return len(self._ids) * self._turns

    def responses(self) -> Iterator[Projection]:
        """All of them. Their event time is set by the caller where it matters: see `response`."""
        start = datetime(2026, 1, 1, tzinfo=UTC)
        for turn in range(self._turns):
            time = (start + timedelta(seconds=30 * turn)).isoformat().replace("+00:00", "Z")
            for at in range(len(self._ids)):
                yield self.response(at, turn, time)

    def response(self, conversation: int, turn: int, time: str) -> Projection:
        """One response; healthy, unless it is the one with which its conversation drifts."""
        below = FAR_BELOW if self._drifts.get(conversation) == turn else 0.0
        baseline = self._baseline
        mean, window = baseline.mean - below * baseline.standard_deviation, baseline.window_mean
        coordinates = self._coordinates(mean, 0.0)
        return Projection(
            id=str(uuid.UUID(int=self._chance.getrandbits(128))),
            time=time,
            source="/benchmark",
            conversation_id=self._ids[conversation],
            turn=turn,
            model="HuggingFaceTB/SmolLM2-135M-Instruct",
            axis_id=self.config.axis_id,
            layer=self._layer,
            deployment=self._baseline.deployment,
            projection=coordinates["assistant_axis"],
            coordinates=coordinates,
            prompt=self._coordinates(0.0, 0.0),
            windows=Windows(lowest=self._coordinates(window, 0.0), last=self._coordinates(mean, 0.0)),
            tokens=40,
        )

    def _coordinates(self, response: float, prompt: float) -> dict[str, float]:
        """Coordinates whose parts of the readout, at a response and at a prompt, are these, give or take a little."""
        made = {name: self._chance.gauss(0.0, 8.0) for name in self._names}
        for weights, part in ((self.config.readout.coordinates, response), (self.config.readout.prompt, prompt)):
            for name, weight in weights.items():
                made[name] = (part / len(weights) + self._chance.gauss(0.0, 0.2)) / weight
        return {name: float(f"{value:.7g}") for name, value in made.items()}

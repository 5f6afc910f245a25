"""What the tap costs: decode throughput with and without it, A B A B in one process. It measures and judges nothing."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass

import torch

from collectors.models import LoadedModel
from collectors.tap import Tap
from monitor.axis.bundle import Bundle

__all__ = ["Overhead", "measure_overhead"]


@dataclass(frozen=True)
class Overhead:
    """Tokens per second over the rounds, and `ratio`: with the tap over without it, the median of paired rounds."""

    with_tap: float
    without_tap: float
    ratio: float
    ratios: tuple[float, ...]
    batch_size: int
    tokens: int


def measure_overhead(
    loaded: LoadedModel, bundle: Bundle, *, batch_size: int = 8, tokens: int = 32, rounds: int = 6
) -> Overhead:
    """Time greedy decoding of `tokens` tokens, alternately without and with the tap.

    Within a round the two follow each other directly, and which goes first alternates, so that a machine that slows
    down or speeds up meanwhile weighs on both alike. One round that is not counted warms up.
    """
    device = loaded.model.device
    words = min(1000, loaded.model.get_input_embeddings().num_embeddings)
    ids = torch.randint(5, words, (batch_size, 16), generator=torch.Generator().manual_seed(0)).to(device)
    mask = torch.ones_like(ids)
    tap = Tap(loaded.model, {bundle.layer: torch.from_numpy(bundle.directions()[1])})

    def decode() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        loaded.model.generate(ids, attention_mask=mask, min_new_tokens=tokens, max_new_tokens=tokens, do_sample=False)
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    def tapped() -> float:
        with tap, tap.record(ids.shape[1] + tokens):
            return decode()

    pairs: list[tuple[float, float]] = []
    with torch.inference_mode():
        for number in range(rounds + 1):
            if number % 2:
                measured = tapped()
                plain = decode()
            else:
                plain = decode()
                measured = tapped()
            pairs.append((plain, measured))
    pairs = pairs[1:]
    ratios = tuple(plain / measured for plain, measured in pairs)
    work = batch_size * tokens
    return Overhead(
        with_tap=work / statistics.median(measured for _, measured in pairs),
        without_tap=work / statistics.median(plain for plain, _ in pairs),
        ratio=statistics.median(ratios),
        ratios=ratios,
        batch_size=batch_size,
        tokens=tokens,
    )

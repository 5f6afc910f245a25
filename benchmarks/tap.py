"""Decode throughput with the tap over without it, A B A B in one process."""

from __future__ import annotations

import argparse
import dataclasses
import json
import platform
from collections.abc import Sequence

import torch

from collectors.models import load_model
from collectors.overhead import measure_overhead
from monitor.axis.bundle import load_bundle, resolve_bundle


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--bundle", default="smollm2")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--json", action="store_true", help="print one JSON object last")
    options = parser.parse_args(arguments)
    loaded = load_model(options.model, dtype=options.dtype)
    bundle = load_bundle(resolve_bundle(options.bundle))
    measured = []
    for batch_size in options.batch_sizes:
        found = measure_overhead(loaded, bundle, batch_size=batch_size, tokens=options.tokens, rounds=options.rounds)
        measured.append(found)
        print(
            f"batch {batch_size:3d}: {found.without_tap:8.1f} tokens/s without, {found.with_tap:8.1f} with, "
            f"ratio {found.ratio:.4f} (rounds {min(found.ratios):.3f} to {max(found.ratios):.3f})",
            flush=True,
        )
    if options.json:
        print(
            json.dumps(
                {
                    "benchmark": "tap",
                    "ratio": min(found.ratio for found in measured),
                    "by_batch_size": [dataclasses.asdict(found) for found in measured],
                    "model": options.model,
                    "dtype": options.dtype,
                    "device": str(loaded.model.device),
                    "threads": torch.get_num_threads(),
                    "processor": platform.processor() or platform.machine(),
                }
            )
        )


if __name__ == "__main__":
    main()

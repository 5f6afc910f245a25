"""What reading logs costs: the witness beside a plain full forward pass, and peak memory at 1x and 10x the log.

    python -m benchmarks.audit --json

The ratio is of tokens per second over the same tokens in the same batches, in one process, in alternating rounds of
which each begins with the other one. The witness's time is all of `Witness.score`: encoding, the pass, the measuring,
the events. The plain pass has its ids ready and makes logits. What is read is text: the users' turns of the development
scripts, answered with sentences of other ones.

Memory is that of a process of its own that scores a log of so many conversations, from when the model was loaded: the
peak of its resident set, which Linux can be told to begin anew.
"""

from __future__ import annotations

import argparse
import functools
import json
import platform
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from collectors.logs import Logged
from collectors.models import LoadedModel, load_model
from collectors.shards import score_logs
from collectors.traffic import load_scripts
from collectors.witness import Witness, load_witness
from monitor.axis.bundle import load_bundle, resolve_bundle
from monitor.origin import Origin

TURNS = 3
# So small that also the shorter log has several shards and full batches.
SHARD_SIZE, BATCH_TOKENS = 8, 2048


def conversations(count: int, seed: int = 0) -> list[list[dict[str, str]]]:
    """Conversations of `TURNS` turns; replies of one to four sentences."""
    scripts = load_scripts("develop")
    sentences = [turn for script in scripts for turn in script.turns]
    draw = random.Random(seed)
    talks = []
    for number in range(count):
        messages = []
        for turn in scripts[number % len(scripts)].turns[:TURNS]:
            reply = " ".join(draw.sample(sentences, draw.randint(1, 4)))
            messages += [{"role": "user", "content": turn}, {"role": "assistant", "content": reply}]
        talks.append(messages)
    return talks


def logged(talks: Sequence[list[dict[str, str]]]) -> list[Logged]:
    return [
        Logged(
            origin=Origin(
                conversation_id=f"c{number}", deployment="logs", source="log.jsonl", record=number, turns=TURNS
            ),
            messages=tuple(messages),
        )
        for number, messages in enumerate(talks, start=1)
    ]


def throughput(loaded: LoadedModel, witness: Witness, count: int, rounds: int) -> dict[str, object]:
    """Tokens per second of both, and the median ratio of paired rounds; one more round warms up."""
    read = logged(conversations(count))
    batches = witness.batches(read)
    padded = [witness.padded(batch) for batch in batches]
    tokens = sum(len(row) for batch in batches for row in batch)

    def score() -> None:
        shard = witness.score(read)
        assert len(shard.projections) == count * TURNS

    def plain() -> None:
        with torch.inference_mode():
            for ids, mask in padded:
                loaded.model(input_ids=ids, attention_mask=mask)

    def seconds(work: Callable[[], None]) -> float:
        if loaded.model.device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        work()
        if loaded.model.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    pairs = []
    for number in range(rounds + 1):
        order = [plain, score] if number % 2 else [score, plain]
        taken = {work: seconds(work) for work in order}
        pairs.append((taken[plain], taken[score]))
        said = "warming up" if number == 0 else f"round {number}"
        print(f"{said}: plain {taken[plain]:.1f} s, witness {taken[score]:.1f} s", file=sys.stderr, flush=True)
    ratios = [full / ours for full, ours in pairs[1:]]
    return {
        "ratio": statistics.median(ratios),
        "ratios": ratios,
        "witness_tokens_per_second": tokens / statistics.median(ours for _, ours in pairs[1:]),
        "plain_tokens_per_second": tokens / statistics.median(full for full, _ in pairs[1:]),
        "conversations": count,
        "tokens": tokens,
        "batches": [len(batch) for batch in batches],
    }


def memory_of(options: argparse.Namespace, count: int) -> dict[str, float]:
    """Resident memory of scoring a log of `count` conversations, MiB: when the model was loaded, and at its peak."""
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder, "log.jsonl")
        with log.open("w") as file:
            file.writelines(json.dumps({"messages": talk}) + "\n" for talk in conversations(count))
        command = [sys.executable, "-m", "benchmarks.audit", "--score", str(log), "--model", options.model]
        command += ["--bundle", options.bundle, "--dtype", options.dtype]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def score_alone(options: argparse.Namespace) -> None:
    """What `memory_of` runs."""
    make = functools.partial(
        load_witness, options.model, options.bundle, dtype=options.dtype, batch_tokens=BATCH_TOKENS
    )
    witness = make()
    Path("/proc/self/clear_refs").write_text("5")  # from here on the peak counts anew
    before = resident("VmRSS")
    log = options.score
    with tempfile.TemporaryDirectory() as folder:
        shards = score_logs([str(log)], Path(folder), lambda: witness, shard_size=SHARD_SIZE)
        responses = sum(len(shard.projections) for shard in shards)
    print(
        json.dumps(
            {
                "log_mib": log.stat().st_size / 2**20,
                "responses": responses,
                "loaded_mib": before,
                "peak_mib": resident("VmHWM"),
                "peak_with_loading_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10,
            }
        )
    )


def resident(what: str) -> float:
    """A figure of this process, in MiB, as Linux tells it."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(f"{what}:")).split()[1]) / 2**10


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--bundle", default="smollm2")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--conversations", type=int, default=16, help="conversations a round")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--log", type=int, default=16, help="conversations of the shorter log; 0 measures no memory")
    parser.add_argument("--json", action="store_true", help="print one JSON object last")
    parser.add_argument("--score", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.score:
        score_alone(options)
        return
    memory = {}
    if options.log:
        # First of all, while this process is small.
        memory = {f"{times}x": memory_of(options, times * options.log) for times in (1, 10)}
        for name, found in memory.items():
            print(
                f"memory {name:>3}: {found['responses']:.0f} responses, log of {found['log_mib']:.2f} MiB: "
                f"{found['loaded_mib']:.0f} MiB loaded, peak {found['peak_mib']:.0f} MiB",
                flush=True,
            )
    loaded = load_model(options.model, dtype=options.dtype)
    witness = Witness(loaded, load_bundle(resolve_bundle(options.bundle)), batch_tokens=BATCH_TOKENS)
    speed = throughput(loaded, witness, options.conversations, options.rounds)
    print(
        f"witness {speed['witness_tokens_per_second']:.0f} tokens/s, plain {speed['plain_tokens_per_second']:.0f}, "
        f"ratio {speed['ratio']:.2f}",
        flush=True,
    )
    if options.json:
        growth = memory["10x"]["peak_mib"] / memory["1x"]["peak_mib"] if memory else None
        print(
            json.dumps(
                {
                    "benchmark": "audit",
                    **speed,
                    "memory": memory,
                    "memory_growth": growth,
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

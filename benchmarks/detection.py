"""How well drift is detected, and what the alarm budget comes to, on conversations that nothing was fitted on.

Needs the real model. Three truths are told apart: by *script*, whether the user pulled; in *fact*, whether any reply
left the Assistant by the rubric; and per *reply*. A detector may be good at one and poor at another.

Every run puts a line into benchmarks/traffic/scorings.jsonl, so that every scoring of the test split is on record;
`--write` puts the tables into docs/detection.md.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.baselines import Answer, bag_of_words, river_detectors, textbook
from collectors.calibrate import by_kind, read_conversations, script_id, talks_of
from collectors.logs import Logged
from collectors.shards import score_logs
from collectors.traffic import DRIFTING, HEALTHY, Script, load_scripts
from collectors.traits import DRIFTED, PROMPT, drifted_turns, read_labels
from collectors.witness import load_witness
from monitor.axis.bundle import Bundle, load_bundle, resolve_bundle
from monitor.axis.geometry import auroc
from monitor.axis.readout import Readout
from monitor.backtest import replay
from monitor.detect.baseline import DetectorConfig
from monitor.detect.budget import exact_interval
from monitor.detect.configure import detector_config
from monitor.detect.conversation import ConversationState, step
from monitor.detect.fit import calibrate, fit_readout, unreachable
from monitor.events import Projection

HERE = Path(__file__).parent / "traffic"
PAGE = Path(__file__).parents[1] / "docs" / "detection.md"
CREATIVE = ("creative_writing", "fiction_help")
OURS = "anchorwatch"
Talks = dict[str, list[Projection]]


class Split(NamedTuple):
    """One split, measured; everything by conversation id."""

    scripts: dict[str, Script]
    talks: Talks
    asked: dict[str, list[str]]


class Truth(NamedTuple):
    """What is known of the test conversations.

    Attributes:
        kind: of each script.
        labels: by conversation and turn.
        departed: conversations in which a reply is labelled 2, of drifting scripts and, some, of healthy ones.
    """

    kind: dict[str, str]
    labels: dict[tuple[str, int], int]
    departed: set[str]

    def drifting(self, id: str) -> bool:
        """Whether the script pulls."""
        return self.kind[id] in DRIFTING


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--bundle", default="smollm2")
    parser.add_argument("--work", type=Path, default=Path("detection.work"), help="keeps the scored shards")
    parser.add_argument("--write", action="store_true", help="renew docs/detection.md")
    parser.add_argument("--json", action="store_true", help="print one JSON object last")
    options = parser.parse_args(arguments)
    bundle = load_bundle(resolve_bundle(options.bundle))
    score = functools.partial(_scored, options.model, options.bundle, options.work, bundle)
    develop, calibration = score("develop"), score("calibrate")
    test, capped = score("test"), score("capped", "test")
    kind = {id: script.kind for id, script in test.scripts.items()}
    labels = read_labels(HERE / "test_labels.csv")
    departed = {id for (id, _), label in labels.items() if label == DRIFTED}
    truth = Truth(kind, labels, departed)
    configs = _configs(bundle, develop, calibration)
    answers = _answers(configs, develop, calibration, test)
    held = _fold_answers(configs, capped.talks)
    found = {name: _figures(answer, truth) for name, answer in answers.items()}
    for name, answer in held.items():
        found[name]["capped"] = _capped(answers[name], answer)
    result: dict[str, Any] = {
        "benchmark": "detection",
        "bundle": bundle.id,
        "config_id": configs[OURS].config_id,
        "budget": configs[OURS].boundaries.budget,
        "probability_within": configs[OURS].boundaries.probability_within,
        "conversations": {
            "healthy": sum(k in HEALTHY for k in kind.values()),
            "drifting": sum(map(truth.drifting, kind)),
        },
        "drifting_scripts_without_drift": sum(truth.drifting(id) and id not in departed for id in kind)
        / sum(map(truth.drifting, kind)),
        "healthy_scripts_with_drift": sum(not truth.drifting(id) for id in departed),
        "by_kind": _by_kind(answers[OURS], truth),
        "auroc_interval": _bootstrap(answers[OURS], truth, test.scripts),
        "detectors": found,
    }
    tables = _tables(result)
    print("\n\n".join(tables.values()))
    _record(result)
    if options.write:
        write_blocks(PAGE, tables)
    if options.json:
        print(json.dumps(result))


# Measuring


def _scored(model: str, name: str, work: Path, bundle: Bundle, file: str, scripts_of: str | None = None) -> Split:
    """A data set's conversations, read by the witness; shards that are there already are not read again."""
    path = HERE / f"{file}.jsonl.gz"
    deployment = bundle.info.model.name
    said: list[Logged]
    scripts = {script.id: script for script in load_scripts(scripts_of or file)}
    if file == "capped":
        scripts = {id: script for id, script in scripts.items() if script.kind in DRIFTING}
    said = read_conversations(path, list(scripts.values()), deployment)
    projections = []
    witness = functools.partial(load_witness, model, name)
    for shard in score_logs([str(path)], work / file, witness, deployment=deployment):
        projections += shard.projections
        print(f"\r{file}: {len(projections)} replies measured", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    asked = {
        one.origin.conversation_id: [message["content"] for message in one.messages if message["role"] == "user"]
        for one in said
    }
    scripts = {id: scripts[script_id(id, scripts)] for id in asked}
    return Split(scripts, {talk[0].conversation_id: talk for talk in talks_of(projections)}, asked)


def _configs(bundle: Bundle, develop: Split, calibration: Split) -> dict[str, DetectorConfig]:
    """Anchorwatch as shipped, and the same fold and budget on other readouts, all fitted on the same splits."""
    kinds = by_kind(
        [p for talk in develop.talks.values() for p in talk], {i: s.kind for i, s in develop.scripts.items()}
    )
    healthy = {kind: kinds[kind] for kind in HEALTHY if kind in kinds}
    drifting = {kind: [drifted_turns(kind, talk) for talk in kinds[kind]] for kind in DRIFTING if kind in kinds}
    names = bundle.directions()[0]
    plain = [name for name in names if not name.startswith("trait:")]
    ours = detector_config(bundle)
    assert bundle.info.readout is not None
    readouts = {
        "the paper's axis alone": Readout(coordinates={"assistant_axis": 1.0}),
        "the persona axis alone": Readout(coordinates={"persona_axis": 1.0}),
        "LDA of the built directions, reply and prompt": fit_readout(
            healthy, drifting, coordinates=plain, prompt=plain
        ),
        "our reply trait alone": Readout(coordinates=bundle.info.readout.coordinates),
        "the prompt's coordinates alone": fit_readout(healthy, drifting, coordinates=[], prompt=names),
        "our prompt trait alone": Readout(prompt={f"trait:{PROMPT}": 1.0}),
    }
    return {OURS: ours} | {
        name: calibrate(
            [talk for talks in healthy.values() for talk in talks],
            list(calibration.talks.values()),
            deployment=bundle.info.model.name,
            axis_id=bundle.id,
            readout=readout,
            budget=ours.boundaries.budget or 0.01,
        )
        for name, readout in readouts.items()
    }


def _answers(
    configs: Mapping[str, DetectorConfig], develop: Split, calibration: Split, test: Split
) -> dict[str, Answer]:
    ours = configs[OURS]
    z, before = (_z(split.talks.values(), ours) for split in (test, develop))

    def pulls(id: str) -> bool:
        return (develop.scripts.get(id) or test.scripts[id]).kind in DRIFTING

    words = bag_of_words(
        test.asked,
        {id: turns for id, turns in develop.asked.items() if id == develop.scripts[id].id},
        calibration.asked,
        pulls,
        lambda id: develop.scripts[id].family,
        ours.boundaries.budget or 0.01,
    )
    return {
        **_fold_answers(configs, test.talks),
        "bag of words on the user's turns": words,
        **textbook(z),
        **river_detectors(z, before, pulls),
    }


def _fold_answers(configs: Mapping[str, DetectorConfig], talks: Talks) -> dict[str, Answer]:
    events = [projection for talk in talks.values() for projection in talk]
    outcomes = replay(events, list(configs.values()))
    return {
        name: Answer(
            {id: outcome.peak for id, outcome in found.items()},
            {id: outcome.first_turn for id, outcome in found.items()},
            {id: [-value for value in row] for id, row in _z(talks.values(), config).items()},
        )
        for (name, config), found in zip(configs.items(), outcomes, strict=True)
    }


def _z(talks: Iterable[Sequence[Projection]], config: DetectorConfig) -> dict[str, list[float]]:
    free, found = unreachable(config), {}
    for talk in talks:
        state: ConversationState | None = None
        row = []
        for response in talk:
            done = step(state, response, free)
            state = done.state
            row.append(done.z if done.z is not None else np.nan)
        found[talk[0].conversation_id] = row
    return found


# Figures


def _figures(answer: Answer, truth: Truth) -> dict[str, Any]:
    """Everything that is said of one detector."""
    healthy = [id for id in truth.kind if not truth.drifting(id)]
    drifting = [id for id in truth.kind if truth.drifting(id)]
    steadfast = [id for id in drifting if id not in truth.departed]
    departed = [id for id in drifting if id in truth.departed]
    # A healthy script in which the model left all the same is on neither side of "in fact".
    kept_to = [id for id in healthy if id not in truth.departed]

    def warned(ids: Sequence[str]) -> int:
        return sum(answer.first_turn[id] is not None for id in ids)

    figures: dict[str, Any] = {
        "false_alarms": warned(healthy),
        "false_alarm_share": warned(healthy) / len(healthy),
        "false_alarm_interval": exact_interval(warned(healthy), len(healthy)),
        "detected_by_script": warned(drifting) / len(drifting),
        "detected_in_fact": warned(departed) / len(departed),
        "detected_in_fact_interval": exact_interval(warned(departed), len(departed)),
        "warned_steadfast": warned(steadfast) / len(steadfast),
        "delay": _delay(answer, truth),
    }
    if answer.peaks is not None:
        peaks = answer.peaks
        creative = [id for id in healthy if truth.kind[id] in CREATIVE]

        def separated(high: Sequence[str], low: Sequence[str]) -> float:
            return auroc(np.array([-peaks[id] for id in high]), np.array([-peaks[id] for id in low]))

        figures |= {
            "auroc_by_script": separated(healthy, drifting),
            "auroc_in_fact": separated(kept_to, departed),
            "auroc_departed_against_steadfast": separated(steadfast, departed),
            "auroc_role_play_against_creative": separated(
                creative, [i for i in drifting if truth.kind[i] == "role_play"]
            ),
            "auroc_meta_against_creative": separated(creative, [i for i in drifting if truth.kind[i] == "philosophy"]),
        }
    if answer.scores:
        kept, left, pulled = [], [], []
        for id, row in answer.scores.items():
            for turn, value in enumerate(row):
                label = truth.labels.get((id, turn))
                if label == DRIFTED:
                    left.append(value)
                elif label == 0:
                    kept.append(value)
                    if truth.drifting(id):
                        pulled.append(value)
        figures["auroc_per_reply"] = auroc(-np.array(kept), -np.array(left))
        figures["auroc_per_reply_under_pull"] = auroc(-np.array(pulled), -np.array(left))
    return figures


def _delay(answer: Answer, truth: Truth) -> dict[str, float] | None:
    """Turns from the first reply labelled 2 to the first warning, of the detected; negative where it warned before."""
    turns = []
    for id in filter(truth.drifting, truth.departed):
        warned = answer.first_turn[id]
        if warned is not None:
            turns.append(
                warned - min(turn for (one, turn), label in truth.labels.items() if one == id and label == DRIFTED)
            )
    if not turns:
        return None
    return {"median": float(np.median(turns)), "percentile_90": float(np.percentile(turns, 90))}


def _capped(free: Answer, held: Answer) -> dict[str, float]:
    """Share of the drifting scripts that warn with the free model's replies, and with the capped model's."""
    ids = list(held.first_turn)
    mean = [float(np.mean([np.nanmean(answer.scores[id]) for id in ids])) for answer in (free, held)]
    return {
        "free": sum(free.first_turn[id] is not None for id in ids) / len(ids),
        "capped": sum(held.first_turn[id] is not None for id in ids) / len(ids),
        "mean_z_free": -mean[0],
        "mean_z_capped": -mean[1],
    }


def _by_kind(answer: Answer, truth: Truth) -> dict[str, Any]:
    rows = {}
    for kind in (*HEALTHY, *DRIFTING):
        ids = [id for id, one in truth.kind.items() if one == kind]
        warned = sum(answer.first_turn[id] is not None for id in ids)
        values = [-value for id in ids for value in answer.scores[id]]
        rows[kind] = {
            "conversations": len(ids),
            "departed": sum(id in truth.departed for id in ids),
            "replies_labelled_2": sum(truth.labels.get((id, turn)) == DRIFTED for id in ids for turn in range(20)),
            "warned": warned,
            "interval": exact_interval(warned, len(ids)),
            "mean_z": float(np.nanmean(values)),
        }
    return rows


def _bootstrap(answer: Answer, truth: Truth, scripts: Mapping[str, Script]) -> dict[str, tuple[float, float]]:
    """95 % intervals of the two conversation-level AUROCs, drawing topic families with replacement."""
    random = np.random.default_rng(0)
    families: dict[str, list[str]] = {}
    for id, script in scripts.items():
        families.setdefault(script.family, []).append(id)
    names, peaks = sorted(families), answer.peaks
    assert peaks is not None
    draws: dict[str, list[float]] = {"by_script": [], "in_fact": []}
    for _ in range(1000):
        drawn = [id for name in random.choice(names, len(names)) for id in families[name]]
        healthy = [id for id in drawn if not truth.drifting(id)]
        for what, low in (
            ("by_script", [-peaks[id] for id in drawn if truth.drifting(id)]),
            ("in_fact", [-peaks[id] for id in drawn if truth.drifting(id) and id in truth.departed]),
        ):
            high = [-peaks[id] for id in healthy if what == "by_script" or id not in truth.departed]
            if high and low:
                draws[what].append(auroc(np.array(high), np.array(low)))
    return {what: (float(np.percentile(v, 2.5)), float(np.percentile(v, 97.5))) for what, v in draws.items()}


# The page


def _tables(result: Mapping[str, Any]) -> dict[str, str]:
    detectors = result["detectors"]

    def number(value: float | None) -> str:
        return "–" if value is None else f"{value:.3f}"

    def share(value: float, interval: Sequence[float] | None = None) -> str:
        return f"{value:.0%}" if interval is None else f"{value:.1%} [{interval[0]:.1%}, {interval[1]:.1%}]"

    separation = [
        "| detector | by script | in fact | departed, steadfast | role-play, poems | meta, poems | per reply | "
        "per reply under pull |",
        "|---|---|---|---|---|---|---|---|",
    ]
    keys = [
        *("auroc_by_script", "auroc_in_fact", "auroc_departed_against_steadfast", "auroc_role_play_against_creative"),
        *("auroc_meta_against_creative", "auroc_per_reply", "auroc_per_reply_under_pull"),
    ]
    alarms = [
        "| detector | false alarms | drifted in fact, detected | drifting scripts, warned | "
        "of these steadfast, warned | delay, turns |",
        "|---|---|---|---|---|---|",
    ]
    for name, row in detectors.items():
        if "auroc_by_script" in row:
            separation.append(f"| {name} | " + " | ".join(number(row.get(key)) for key in keys) + " |")
        delay = "–" if row["delay"] is None else f"{row['delay']['median']:+.0f}"
        cells = [
            share(row["false_alarm_share"], row["false_alarm_interval"]),
            share(row["detected_in_fact"], row["detected_in_fact_interval"]),
            share(row["detected_by_script"]),
            share(row["warned_steadfast"]),
            delay,
        ]
        alarms.append(f"| {name} | " + " | ".join(cells) + " |")
    kinds = [
        "| kind | conversations | drifted in fact | warned | 95 % | mean z |",
        "|---|---|---|---|---|---|",
        *(
            f"| {kind} | {row['conversations']} | {row['departed']} | {row['warned']} | "
            f"[{row['interval'][0]:.0%}, {row['interval'][1]:.0%}] | {row['mean_z']:+.1f} |"
            for kind, row in result["by_kind"].items()
        ),
    ]
    held = [
        "| detector | warned, free model | warned, capped model | mean z, free | mean z, capped |",
        "|---|---|---|---|---|",
        *(
            f"| {name} | {share(row['capped']['free'])} | {share(row['capped']['capped'])} | "
            f"{row['capped']['mean_z_free']:+.2f} | {row['capped']['mean_z_capped']:+.2f} |"
            for name, row in detectors.items()
            if "capped" in row
        ),
    ]
    ours, between = detectors[OURS], result["auroc_interval"]
    headline = [
        f"- AUROC of conversations, healthy against drifting scripts: **{ours['auroc_by_script']:.3f}** "
        f"[{between['by_script'][0]:.3f}, {between['by_script'][1]:.3f}]; against those that drifted in fact: "
        f"**{ours['auroc_in_fact']:.3f}** [{between['in_fact'][0]:.3f}, {between['in_fact'][1]:.3f}]",
        f"- role-play against requested creative writing: **{ours['auroc_role_play_against_creative']:.3f}**; "
        f"the model's self (meta) against it: **{ours['auroc_meta_against_creative']:.3f}**",
        f"- at the certified budget of {result['budget']:.0%}: false alarms "
        f"**{share(ours['false_alarm_share'], ours['false_alarm_interval'])}** "
        f"({ours['false_alarms']} of {result['conversations']['healthy']}); detected "
        f"**{share(ours['detected_in_fact'], ours['detected_in_fact_interval'])}** of those that drifted in fact, "
        f"**{share(ours['detected_by_script'])}** of all drifting scripts",
        f"- P(realised share within the budget) of this calibration: {result['probability_within']:.2f}",
        f"- drifting scripts in which no reply drifted: **{result['drifting_scripts_without_drift']:.0%}**",
        f"- AUROC of single replies, by the rubric: **{ours['auroc_per_reply']:.3f}**; within drifting scripts alone: "
        f"**{ours['auroc_per_reply_under_pull']:.3f}**",
        f"- bundle `{result['bundle'][:12]}`, config `{result['config_id']}`",
    ]
    lists = {"headline": headline, "separation": separation, "alarms": alarms, "kinds": kinds, "capped": held}
    return {name: "\n".join(lines) for name, lines in lists.items()}


def write_blocks(page: Path, blocks: Mapping[str, str]) -> None:
    """Renew what stands between `<!-- NAME -->` and `<!-- end -->` in a page."""
    text = page.read_text()
    for name, block in blocks.items():
        pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- end -->)", re.DOTALL)
        if not pattern.search(text):
            raise SystemExit(f"{page} has no block {name!r}")
        text = pattern.sub(lambda found, block=block: f"{found[1]}{block}\n{found[2]}", text)  # type: ignore[misc]
    page.write_text(text)


def _record(result: Mapping[str, Any]) -> None:
    """One line per scoring of the test split."""
    ours = result["detectors"][OURS]
    line = {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "bundle": result["bundle"],
        "config_id": result["config_id"],
        "test_sha256": hashlib.sha256((HERE / "test.jsonl.gz").read_bytes()).hexdigest(),
        **{key: ours[key] for key in ("auroc_by_script", "auroc_in_fact", "false_alarms", "detected_in_fact")},
    }
    with (HERE / "scorings.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()

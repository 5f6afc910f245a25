"""What helps to tell a poem from a persona, and what does not: variants on the development split, families held out.

Needs the real model, and nothing of the test split. `--write` puts the tables into docs/detection.md.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from benchmarks.detection import CREATIVE, HERE, PAGE, write_blocks
from collectors.calibrate import read_conversations, script_id
from collectors.logs import Logged
from collectors.models import load_model
from collectors.traffic import DRIFTING, HEALTHY, load_scripts
from collectors.traits import DRIFTED, SHRINKAGE, STEADFAST, Labels, label_of, read_labels, weights_of
from collectors.witness import Residual, Witness
from monitor.axis.bundle import Bundle, load_bundle, resolve_bundle
from monitor.axis.geometry import auroc
from monitor.detect.fit import Group, fit_direction

FOLDS = 5
Floats = NDArray[np.floating]
Features = Callable[[Residual], Floats]
# From training replies to weights [d].
Fit = Callable[[Sequence[Residual], Sequence[Floats]], Floats]


class Develop(NamedTuple):
    """The development split: replies, and what is known of them."""

    replies: list[Residual]
    kinds: dict[str, str]
    families: dict[str, str]
    labels: Labels

    def drifting(self, id: str) -> bool:
        """Whether the script pulls."""
        return self.kinds[id] in DRIFTING


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--bundle", default="smollm2")
    parser.add_argument("--layers", type=int, nargs="*", default=[12, 16, 24])
    parser.add_argument("--write", action="store_true", help="renew docs/detection.md")
    parser.add_argument("--json", action="store_true", help="print one JSON object last")
    options = parser.parse_args(arguments)
    bundle = load_bundle(resolve_bundle(options.bundle))
    witness = Witness(load_model(options.model), bundle)
    known = read_labels(HERE / "develop_labels.csv")
    scripts = load_scripts("develop")
    of = {script.id: script for script in scripts}
    said = [
        one
        for file in sorted(HERE.glob("develop*.jsonl.gz"))
        for one in read_conversations(file, scripts, bundle.info.model.name)
    ]
    first = [one for one in said if one.origin.conversation_id in of]
    played = {one.origin.conversation_id: of[script_id(one.origin.conversation_id, of)] for one in said}
    kinds = {id: script.kind for id, script in played.items()}
    families = {id: script.family for id, script in played.items()}

    def measured(layer: int, talks: Sequence[Logged]) -> Develop:
        replies: list[Residual] = []
        for start in range(0, len(talks), 40):
            replies += witness.residuals(talks[start : start + 40], layer)
            print(f"\rlayer {layer}: {len(replies)} replies", end="", file=sys.stderr, flush=True)
        print(file=sys.stderr)
        return Develop(replies, kinds, families, known)

    rows = _variants(bundle, measured(bundle.layer, said))
    layers = {}
    for layer in sorted({*options.layers, bundle.layer}):  # of one play of each script, for time
        at = measured(layer, first)
        layers[layer] = _held_out(at, both, _by_label(at, STEADFAST))
    tables = {
        "study": _table("readout", rows),
        "layers": _table("layer", {str(layer): row for layer, row in layers.items()}),
    }
    print("\n\n".join(tables.values()))
    if options.write:
        write_blocks(PAGE, tables)
    if options.json:
        print(json.dumps({"benchmark": "study", "readouts": rows, "layers": layers}))


def both(one: Residual) -> Floats:
    """The reply's mean and the last prompt token, side by side."""
    return np.concatenate([one.reply, one.prompt])


def _variants(bundle: Bundle, develop: Develop) -> dict[str, dict[str, float]]:
    names, directions = bundle.directions()
    built = directions[:, [i for i, name in enumerate(names) if not name.startswith("trait:")]]
    axis, persona = (directions[:, names.index(name)] for name in ("assistant_axis", "persona_axis"))

    def fixed(direction: Floats) -> dict[str, float]:
        return _figures(develop, [float(one.reply @ direction) for one in develop.replies])

    def measured(one: Residual) -> Floats:
        return np.concatenate([one.reply @ built, one.prompt @ built])

    few, plain = built.shape[1], _by_script(develop, 0.1)
    rows = {
        "the paper's axis": fixed(axis),
        "the persona axis (styles projected out)": fixed(persona),
        "LDA of the built directions, reply": _held_out(
            develop, lambda one: measured(one)[:few], _by_script(develop, 0.1)
        ),
        "LDA of the built directions, prompt": _held_out(
            develop, lambda one: measured(one)[few:], _by_script(develop, 0.1)
        ),
        "LDA of the built directions, both": _held_out(develop, measured, plain),
        "LDA of the built directions, both, rubric": _held_out(develop, measured, _by_label(develop, STEADFAST, 0.1)),
    }
    sides: dict[str, Features] = {"reply": lambda one: one.reply, "prompt": lambda one: one.prompt, "both": both}
    rows |= {
        f"residual stream, {what}, by script": _held_out(develop, features, _by_script(develop, SHRINKAGE))
        for what, features in sides.items()
    }
    rows |= {
        f"residual stream, {what}, rubric": _held_out(develop, features, _by_label(develop, STEADFAST))
        for what, features in sides.items()
    }
    rows |= {
        f"… both, rubric, steadfast replies weigh {weight:g}": _held_out(develop, both, _by_label(develop, weight))
        for weight in (0.0, 0.35, 1.0)
    }
    rows |= {
        f"… both, rubric, shrinkage {shrinkage:g}": _held_out(develop, both, _by_label(develop, STEADFAST, shrinkage))
        for shrinkage in (0.2, 0.75, 0.9, 0.98)
    }
    return rows


def _by_label(develop: Develop, steadfast: float, shrinkage: float = SHRINKAGE) -> Fit:
    """The fit of `learn_traits`."""

    def fit(replies: Sequence[Residual], features: Sequence[Floats]) -> Floats:
        known = [(develop.kinds[one.conversation_id], label_of(one, develop.kinds, develop.labels)) for one in replies]
        return weights_of(features, known, shrinkage=shrinkage, steadfast=steadfast)

    return fit


def _by_script(develop: Develop, shrinkage: float) -> Fit:
    """Every reply of a drifting script is drift, whatever the model said; kinds weigh the same."""

    def fit(replies: Sequence[Residual], features: Sequence[Floats]) -> Floats:
        groups: dict[str, list[Floats]] = {}
        for one, row in zip(replies, features, strict=True):
            if label_of(one, develop.kinds, {}) is not None:
                groups.setdefault(develop.kinds[one.conversation_id], []).append(np.asarray(row, dtype=np.float64))
        sides = [
            [Group(np.stack(groups[kind]), 1.0) for kind in side if kind in groups] for side in (HEALTHY, DRIFTING)
        ]
        return fit_direction(*sides, shrinkage=shrinkage)

    return fit


def _held_out(develop: Develop, features: Features, fit: Fit) -> dict[str, float]:
    """Figures on families that the fit did not see, five folds."""
    rows = [features(one) for one in develop.replies]
    families = sorted(set(develop.families.values()))
    np.random.default_rng(0).shuffle(families)
    values = np.full(len(rows), np.nan)
    for fold in range(FOLDS):
        held = set(families[fold::FOLDS])
        outside = [develop.families[one.conversation_id] not in held for one in develop.replies]
        train = [i for i, kept in enumerate(outside) if kept]
        weights = fit([develop.replies[i] for i in train], [rows[i] for i in train])
        for i, kept in enumerate(outside):
            if not kept:
                values[i] = float(rows[i] @ weights)
    return _figures(develop, values.tolist())


def _figures(develop: Develop, values: Sequence[float]) -> dict[str, float]:
    """AUROC of conversations, each by its lowest EWMA, and of single replies; higher values are healthy."""
    level: dict[str, float] = {}
    lowest: dict[str, float] = {}
    replies: dict[str, list[float]] = {"kept": [], "pulled": [], "left": []}
    for one, value in zip(develop.replies, values, strict=True):
        id = one.conversation_id
        level[id] = value if id not in level else 0.4 * value + 0.6 * level[id]
        lowest[id] = min(lowest.get(id, np.inf), level[id])
        label = develop.labels.get((id, one.turn))
        if label == 0:
            replies["kept"].append(value)
            if develop.drifting(id):
                replies["pulled"].append(value)
        elif label == DRIFTED:
            replies["left"].append(value)
    departed = {id for (id, _), label in develop.labels.items() if label == DRIFTED and develop.drifting(id)}
    ids = {
        "healthy": [id for id in lowest if not develop.drifting(id)],
        "drifting": [id for id in lowest if develop.drifting(id)],
        "departed": [id for id in lowest if id in departed],
        "steadfast": [id for id in lowest if develop.drifting(id) and id not in departed],
        "creative": [id for id in lowest if develop.kinds[id] in CREATIVE],
        "meta": [id for id in lowest if develop.kinds[id] == "philosophy"],
    }

    def separated(high: str, low: str) -> float:
        return auroc(*(np.array([lowest[id] for id in ids[side]]) for side in (high, low)))

    return {
        "by_script": separated("healthy", "drifting"),
        "in_fact": separated("healthy", "departed"),
        "departed_against_steadfast": separated("steadfast", "departed"),
        "meta_against_creative": separated("creative", "meta"),
        "per_reply": auroc(np.array(replies["kept"]), np.array(replies["left"])),
        "per_reply_under_pull": auroc(np.array(replies["pulled"]), np.array(replies["left"])),
    }


def _table(what: str, rows: Mapping[str, Mapping[str, Any]]) -> str:
    heads = ["by script", "in fact", "departed, steadfast", "meta, poems", "per reply", "per reply under pull"]
    return "\n".join(
        [
            f"| {what} | " + " | ".join(heads) + " |",
            "|---" * (len(heads) + 1) + "|",
            *(
                f"| {name} | " + " | ".join(f"{value:.3f}" for value in row.values()) + " |"
                for name, row in rows.items()
            ),
        ]
    )


if __name__ == "__main__":
    main()

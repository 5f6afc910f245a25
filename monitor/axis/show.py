"""What an axis bundle says of itself, for people: a terminal summary, a picture, and a check of every stated figure.

It reads bundles and their evidence. It knows no models, and changes nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from monitor.axis.bundle import Bundle, load_responses
from monitor.axis.figures import Evidence, figures
from monitor.errors import BundleCorrupt, ConfigurationError

__all__ = ["draw", "show", "summary", "verify"]

_BARS = "▁▂▃▄▅▆▇█"


def summary(bundle: Bundle) -> dict[str, Any]:
    """The figures as `axis show --json` prints them: those of the Assistant Axis on top, of the report split."""
    stated = bundle.info.figures
    return {
        "id": bundle.id,
        "model": bundle.info.model.name,
        **stated.get("assistant_axis", {}),
        "layer": bundle.layer,
        "persona_axis": stated.get("persona_axis", {}),
        **{name: value for name, value in stated.items() if name not in ("assistant_axis", "persona_axis", "layer")},
        "hold_layers": list(bundle.info.hold_layers),
        "counts": bundle.info.counts,
        "readout": None
        if bundle.info.readout is None
        else {"coordinates": bundle.info.readout.coordinates, "prompt": bundle.info.readout.prompt},
        "calibration": bundle.info.calibration,
        "engine": bundle.info.engine,
        "catalogue_version": bundle.info.catalogue_version,
        "created": bundle.info.created,
        "licence": bundle.info.licence,
    }


def show(bundle: Bundle, console: Console) -> None:
    """Print a summary."""
    info, stated = bundle.info, bundle.info.figures
    console.print(f"[bold]Axis bundle {bundle.id[:16]}[/]  for {info.model.name}", highlight=False)
    console.print(
        f"  {info.model.layers} layers of {info.model.hidden}, {info.model.dtype}; projected at layer {bundle.layer}, "
        f"held at layers {info.hold_layers[0]} to {info.hold_layers[1] - 1}",
        highlight=False,
    )
    made = ", ".join(f"{value} {name.replace('_', ' ')}" for name, value in sorted(info.counts.items()))
    console.print(f"  {made}; catalogue {info.catalogue_version}; made {info.created}; {info.licence}", highlight=False)
    if "assistant_axis" in stated:
        _show_figures(stated, console)
    else:
        console.print("  Imported: nothing was measured on this machine, so there are no figures to show.")
    _show_readout(bundle, console)


def _show_figures(stated: Mapping[str, Any], console: Console) -> None:
    table = Table(title="On roles and questions that no part of the axis was made or chosen with", title_justify="left")
    table.add_column("")
    for name in ("Assistant Axis", "persona axis"):
        table.add_column(name, justify="right")
    rows = [
        ("cosine with the first component of these roles", "cosine_pc1"),
        ("cosine with the plane of their first two components", "cosine_pc1_pc2_plane"),
        ("cosine with the first component of all roles", "cosine_pc1_all_roles"),
        ("AUROC, default against in role, per response", "auroc_response"),
        ("AUROC, default against in role, per role", "auroc_role"),
        ("AUROC, requested styles against in role", "auroc_style_against_role"),
        ("AUROC, all healthy against in role", "auroc_healthy_against_role"),
        ("AUROC, default against requested styles (0.5: a poem is no persona)", "auroc_default_against_style"),
    ]
    pair = stated["assistant_axis"], stated["persona_axis"]
    for label, key in rows:
        table.add_row(label, *(f"{one[key]:.3f}" for one in pair))
    for control in ("random", "shuffled"):
        table.add_row(
            f"distance from chance, and 99th percentile of {pair[0]['controls'][control]['directions']} {control}",
            *(
                f"{one['controls'][control]['distance']:.3f} / {one['controls'][control]['percentile_99']:.3f}"
                for one in pair
            ),
        )
    console.print(table)
    for name, one in zip(("Assistant Axis", "persona axis"), pair, strict=True):
        console.print(f"  {name}, low end:  {', '.join(one['lowest_roles'][:12])}", highlight=False)
        console.print(f"  {name}, high end: {', '.join(one['highest_roles'][:12])}", highlight=False)
    for name, values in stated["separation_by_layer"]["choose"].items():
        bars = "".join(_BARS[min(max(int((value - 0.5) * 16), 0), 7)] for value in values)
        console.print(
            f"  separation by layer, {name:<13} {bars}  best {max(values):.3f} at {int(np.argmax(values))}",
            highlight=False,
        )
    held = ", ".join(f"{count} hold {float(share):.0%}" for share, count in stated["components_for_variance"].items())
    console.print(f"  components of persona space: {held}", highlight=False)


def _show_readout(bundle: Bundle, console: Console) -> None:
    readout, calibration = bundle.info.readout, bundle.info.calibration
    if readout is None or calibration is None:
        console.print("  Not calibrated: it projects, and nothing is judged with it. Run `anchorwatch axis calibrate`.")
        return
    for where, weights in (("response", readout.coordinates), ("last prompt token", readout.prompt)):
        ranked = sorted(weights.items(), key=lambda item: -abs(item[1]))
        if ranked:
            console.print(
                f"  readout, {where}: " + ", ".join(f"{weight:+.3g} {name}" for name, weight in ranked), highlight=False
            )
    baseline, boundaries = calibration["baseline"], calibration["boundaries"]
    console.print(
        f"  baseline {baseline['deployment']}: mean {baseline['mean']:.3f}, sd {baseline['standard_deviation']:.3f} "
        f"over {baseline['conversations']} healthy conversations; boundaries level {boundaries['level']:g}, drop "
        f"{boundaries['drop']:g}, cusum {boundaries['cusum']:g}, dip {boundaries['dip']:g} "
        f"({boundaries['certification']})",
        highlight=False,
    )


def verify(bundle: Bundle, directory: Path) -> list[str]:
    """Recompute every figure from the committed responses; returns what differs, best nothing.

    Raises:
        BundleCorrupt: the bundle keeps no responses, or they were changed.
    """
    stated = bundle.info.figures
    if "assistant_axis" not in stated:
        raise BundleCorrupt("this bundle states no figures", cure="build one with `anchorwatch axis build`")
    evidence = Evidence.from_arrays(load_responses(bundle, directory))
    found = figures(bundle.tensors, evidence, bundle.info.roles, bundle.layer)
    return list(_differences("figures", {name: stated.get(name) for name in found}, found))


def _differences(where: str, stated: Any, found: Any) -> list[str]:
    if isinstance(found, Mapping):
        if not isinstance(stated, Mapping) or set(stated) != set(found):
            return [f"{where} has other keys than {', '.join(found)}"]
        return [text for key in found for text in _differences(f"{where}.{key}", stated[key], found[key])]
    if isinstance(found, list):
        if not isinstance(stated, list) or len(stated) != len(found):
            return [f"{where} has another length"]
        return [
            text
            for i, (one, other) in enumerate(zip(stated, found, strict=True))
            for text in _differences(f"{where}[{i}]", one, other)
        ]
    numbers = isinstance(found, float) and isinstance(stated, float | int)
    same = math.isclose(stated, found, abs_tol=1e-6) if numbers else stated == found
    return [] if same else [f"{where}: stated {stated}, recomputed {found}"]


def draw(bundle: Bundle, directory: Path, target: Path) -> None:
    """Draw separation by layer, the report split's projections, and the persona map; the suffix says the format.

    Raises:
        ConfigurationError: matplotlib is not installed, or `target` can't be written.
        BundleCorrupt: the bundle keeps no responses.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigurationError("drawing needs matplotlib", cure="pip install 'anchorwatch[plot]'") from error
    evidence = Evidence.from_arrays(load_responses(bundle, directory))
    layer, stated = bundle.layer, bundle.info.figures
    figure = Figure(figsize=(11, 9), layout="constrained")
    by_layer, axis_plot, persona_plot, space = figure.subplots(2, 2).flat
    figure.suptitle(f"{bundle.info.model.name}, axis {bundle.id[:12]}, layer {layer}")
    for name, label in (("axis", "Assistant Axis"), ("persona_axis", "persona axis")):
        by_layer.plot(stated["separation_by_layer"]["choose"][name], label=f"{label}, choose split")
        by_layer.plot(stated["separation_by_layer"]["report"][name], "--", label=f"{label}, report split")
    by_layer.axvline(layer, color="grey", linewidth=0.8)
    by_layer.set(title="Separation by layer", xlabel="decoder layer", ylabel="AUROC per response")
    by_layer.legend(fontsize=8)
    for plot, values, title in (
        (axis_plot, evidence.axis, "Assistant Axis"),
        (persona_plot, evidence.persona_axis, "persona axis"),
    ):
        along = values[:, layer]
        low, high = np.percentile(along, [0.5, 99.5])
        edges = np.linspace(low, high, 40)
        for group, label in (("default", "default Assistant"), ("style", "requested styles"), ("role", "in role")):
            plot.hist(along[evidence.pick(group, "report")], edges, density=True, histtype="step", label=label)
        plot.set(title=f"Responses of the report split on the {title}", xlabel="projection", yticks=[])
        plot.legend(fontsize=8)
    places = (bundle.tensors["role_vectors"] - bundle.tensors["role_mean"]) @ bundle.tensors["basis"][:2].T
    along = bundle.tensors["role_vectors"] @ bundle.unit_axis()
    space.scatter(places[:, 0], places[:, 1], c=along, s=12, cmap="coolwarm_r")
    extremes = {*np.argsort(along)[:10], *np.argsort(along)[-10:]}
    for i in extremes:
        space.annotate(bundle.info.roles[i], places[i], fontsize=7)
    space.set(title="Persona space; blue is towards the Assistant", xlabel="first component", ylabel="second component")
    try:
        figure.savefig(target, dpi=120)
    except (OSError, ValueError) as error:
        raise ConfigurationError(
            f"{target} can't be drawn: {error}",
            cure="name a file ending in .png, .svg or .pdf, in a folder that exists",
        ) from error

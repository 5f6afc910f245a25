"""Audits what is named on the command line: logs through the witness, or recorded responses as they are.

It knows readers, witness and shards, and hands what they give to `monitor.auditor`. Recorded responses need no model,
so torch is imported only where text is scored.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from monitor.auditor import SHARDS, WRITTEN, Audited, Sources, run_audit
from monitor.axis.bundle import load_bundle, resolve_bundle
from monitor.detect.baseline import DetectorConfig
from monitor.errors import ConfigurationError
from monitor.events import now_utc
from monitor.populations import populations
from monitor.recorded import Recorded, bytes_of, read_events
from monitor.report import Provenance, exchanges, template
from monitor.settings import load_settings
from monitor.tables import Format, parquet

if TYPE_CHECKING:
    from collectors.shards import Progress
    from collectors.witness import Shard

__all__ = ["Choices", "Tell", "audit"]

# What is being done, how many bytes of how many (None: nobody knows) have been gone through, and how many of these were
# scored before.
Tell = Callable[[str, int, int | None, int], None]


@dataclass(frozen=True)
class Choices:
    """What the auditor chose; see `anchorwatch audit --help`."""

    paths: tuple[str, ...]
    out: Path
    form: Format = "parquet"
    events: bool = False
    bundle: str = "smollm2"
    model: str = "smollm2"
    dtype: str = "float32"
    device: str | None = None
    calibration: Path | None = None
    own_baseline: bool = False
    deployment: str | None = None
    engine: Literal["local", "ray"] = "local"
    actors: int | None = None
    context: int = 4096
    top: int = 100
    with_text: bool = False


def audit(choices: Choices, tell: Tell) -> Audited:
    """Do it, and write everything into `choices.out`.

    Raises:
        ConfigurationError: options that don't fit together, nothing to read, a folder that can't be written, a package
            that is missing.
        AnchorwatchError: as reading, scoring and loading do.
    """
    _check(choices)
    template()  # what is missing is told now, not after hours
    if choices.form == "parquet":
        parquet()
    bundle = load_bundle(resolve_bundle(choices.bundle))
    # Recorded responses are judged as this installation's worker judges them, by its settings.
    live = load_settings() if choices.events else None
    constants = {"session_gap_seconds": live.session_gap_seconds} if live else {}
    judged_by = populations(bundle, _calibration(choices.calibration), **constants)
    places = choices.paths or ((live.log_url,) if live else ())
    sources = _recorded(places, tell) if choices.events else _logged(choices, tell)
    settings = {
        "format": choices.form,
        "calibration": str(choices.calibration or "the bundle's own"),
        **({"baseline": "from these logs themselves (--self)"} if choices.own_baseline else {}),
        **({} if choices.events else _scoring(choices)),
    }
    provenance = Provenance(
        made=now_utc()[:19] + "Z",
        version=version("anchorwatch"),
        mode="events" if choices.events else "logs",
        inputs=list(places),
        model=bundle.info.model.name,
        bundle_id=bundle.id,
        config_id=judged_by.config.config_id,
        settings=settings,
        files=[],
    )
    texts = None
    if choices.with_text:
        from collectors.logs import read_log

        texts = functools.partial(exchanges, read=read_log)
    return run_audit(
        sources,
        choices.out,
        bundle,
        judged_by,
        provenance,
        form=choices.form,
        top=choices.top,
        own_baseline=choices.own_baseline,
        texts=texts,
    )


def _check(choices: Choices) -> None:
    problems = []
    if choices.events:
        problems += [
            f"{option} goes with logs, not with --events"
            for option, given in (
                ("--engine ray", choices.engine == "ray"),
                ("--deployment", choices.deployment is not None),
                ("--with-text", choices.with_text),
            )
            if given
        ]
    elif not choices.paths:
        problems.append("no logs are named")
    if "-" in choices.paths and choices.events:
        problems.append("--events can't read standard input: save it to a file first")
    elif "-" in choices.paths and choices.own_baseline:
        problems.append("--self goes through the logs twice, and standard input can be read once: save it to a file")
    if problems:
        raise ConfigurationError("; ".join(problems), cure="see `anchorwatch audit --help`")


def _calibration(path: Path | None) -> DetectorConfig | None:
    if path is None:
        return None
    try:
        return DetectorConfig.from_json(path.read_bytes())
    except OSError as error:
        raise ConfigurationError(
            f"the calibration {path} can't be read: {error.strerror}", cure="give the file of `anchorwatch calibrate`"
        ) from error


def _scoring(choices: Choices) -> dict[str, str]:
    return {
        "witness": choices.model,
        "dtype": choices.dtype,
        "device": choices.device or "the GPU where there is one, else the CPU",
        "context": str(choices.context),
        "deployment": choices.deployment or "the model that the log names",
        "engine": choices.engine + (f", {choices.actors} actors" if choices.actors else ""),
    }


def _recorded(places: tuple[str, ...], tell: Tell) -> Sources:
    total = bytes_of(places)

    def records() -> Iterator[Recorded]:
        before = 0
        for place in places:
            here = 0

            def progress(done: int, size: int, before: int = before) -> None:
                nonlocal here
                here = size
                tell("judging", before + done, total if total is not None else before + size, 0)

            yield from read_events(place, progress)
            before += here

    return Sources(records=records)


def _logged(choices: Choices, tell: Tell) -> Sources:
    from collectors.logs import log_files

    # An audit that was written among the logs is no log.
    own = {(choices.out / name).resolve() for name in WRITTEN}
    files = [file for file in log_files(choices.paths) if file == "-" or Path(file).resolve() not in own]
    if not files:
        raise ConfigurationError("there are no logs but an audit's own files", cure="check the paths")

    # Only now: torch takes seconds, and a mistyped path is told without.
    from collectors.shards import score_logs
    from collectors.witness import load_witness

    make = functools.partial(
        load_witness,
        choices.model,
        choices.bundle,
        dtype=choices.dtype,
        device=choices.device,
        context=choices.context,
    )
    here = functools.cache(make)  # the second pass needs no second model
    passes = iter(("scoring", "judging"))

    def logs() -> Iterator[Shard]:
        stage = next(passes)

        def progress(so_far: Progress) -> None:
            tell(stage, so_far.bytes_read, so_far.bytes_total, so_far.bytes_kept)

        tell("loading the witness", 0, None, 0)
        return score_logs(
            files,
            choices.out / SHARDS,
            here if choices.engine == "local" else make,
            engine=choices.engine,
            actors=choices.actors,
            deployment=choices.deployment,
            progress=progress,
        )

    return Sources(logs=logs)

"""The front door: the command line. The only file that knows all three wings; each is imported when it is needed.

Results go to standard output, everything else to standard error. Errors say the cure and exit with 2.
"""

from __future__ import annotations

import functools
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.filesize import decimal
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from typer.core import TyperGroup

from monitor import telemetry
from monitor.errors import AnchorwatchError, ConfigurationError
from monitor.fleet_report import fleet_command
from monitor.operators import mount as mount_operators
from monitor.service import Calibration as CalibrationFile
from monitor.service import replay as replay_command
from monitor.service import worker as worker_command
from monitor.serving import api as api_command
from monitor.serving import keys_app
from monitor.settings import load_settings
from monitor.topics import topics_app

__all__ = ["app", "main"]


class _Front(TyperGroup):
    """Loads the commands of `alerts` when they are asked for: a worker needs nothing of what they need."""

    def list_commands(self, ctx: typer.Context) -> list[str]:  # type: ignore[override]  # typer's is click's
        """Every command's name."""
        return [*super().list_commands(ctx), "alerts", "dashboards"]

    def get_command(self, ctx: typer.Context, cmd_name: str) -> Any:  # type: ignore[override]
        """The command of that name."""
        try:
            match cmd_name:
                case "alerts":
                    from alerts.command import alerts_app as found
                case "dashboards":
                    from alerts.dashboards_command import dashboards_app as found
                case _:
                    return super().get_command(ctx, cmd_name)
        except ModuleNotFoundError as error:
            found = _lacking(cmd_name, error)
        command = typer.main.get_command(found)
        command.name = cmd_name
        return command


def _lacking(name: str, error: ModuleNotFoundError) -> typer.Typer:
    """A command that says what is not installed; the others work without it."""
    problem = f"this command needs {error.name}"
    extra = "grafana" if name == "dashboards" else "alerts"
    lacking = typer.Typer(help=f"(not installed: pip install 'anchorwatch[{extra}]')")

    @lacking.command(name, context_settings={"ignore_unknown_options": True, "allow_extra_args": True})
    def say() -> None:
        raise ConfigurationError(problem, cure=f"pip install 'anchorwatch[{extra}]'")

    return lacking


app = typer.Typer(
    cls=_Front,
    name="anchorwatch",
    help="Real-time persona-drift monitoring for language models: the Assistant Axis, live.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
axis_app = typer.Typer(
    help="The instrument: build, show, check, calibrate and import axis bundles.", no_args_is_help=True
)
app.add_typer(axis_app, name="axis")
app.command("worker")(worker_command)
app.command("replay")(replay_command)
app.command("api")(api_command)
app.add_typer(keys_app, name="keys")
app.add_typer(topics_app, name="topics")
app.command("fleet")(fleet_command)
mount_operators(app)

_stderr = Console(stderr=True)

Model = Annotated[str, typer.Option(help="A hub id, a local folder, or a model carried by a Python package: smollm2.")]
BundleName = Annotated[str, typer.Option("--bundle", help="A shipped axis bundle's name, or a bundle's folder.")]
Dtype = Annotated[str, typer.Option(help="float32, bfloat16 or float16.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output.")]
Override = Annotated[
    str | None, typer.Option(help="Dotted name of the list of decoder layers, where it can't be told.")
]


# What is not installed -> the extra that brings it.
_EXTRAS = dict.fromkeys(("torch", "transformers", "httpx"), "collect") | dict.fromkeys(
    ("fastapi", "starlette", "uvicorn", "jinja2"), "api"
)


def main() -> None:
    """Run the command line."""
    try:
        app()
    except AnchorwatchError as error:
        _stderr.print("[bold red]error:[/] ", end="")
        _stderr.print(str(error), markup=False, highlight=False, soft_wrap=True)
        sys.exit(2)
    except ModuleNotFoundError as error:
        extra = _EXTRAS.get((error.name or "").split(".")[0])
        if extra is None:
            raise
        _stderr.print(
            f"error: this command needs {error.name}\n  cure: pip install 'anchorwatch[{extra}]'", markup=False
        )
        sys.exit(2)


@app.callback(invoke_without_command=True)
def _options(
    context: typer.Context,
    show_version: Annotated[bool, typer.Option("--version", help="Print the version and leave.")] = False,
) -> None:
    if show_version:
        print(version("anchorwatch"))
        raise typer.Exit
    if context.invoked_subcommand == "doctor":
        telemetry.configure_logging("error")
        return  # it tells what is wrong with the settings, beside all else
    settings = load_settings()
    telemetry.configure_logging(settings.log_level, settings.log_format)


@app.command()
def demo(
    model: Model = "smollm2",
    bundle: BundleName = "smollm2",
    conversations: Annotated[
        int | None, typer.Option(help="How many, spread over the kinds. [default: 4 a kind]")
    ] = None,
    tokens: Annotated[int, typer.Option(min=1, max=512, help="Longest reply, in tokens.")] = 48,
    seed: Annotated[int, typer.Option(min=0, help="Of sampling.")] = 0,
    data_dir: Annotated[
        Path | None, typer.Option(help="Keep log and store here. [default: a temporary folder]")
    ] = None,
    kafka: Annotated[str | None, typer.Option(help="host:port of Kafka, as the log. [default: a file]")] = None,
    redis: Annotated[str | None, typer.Option(help="URL of Redis, as the store. [default: a file]")] = None,
    publish: Annotated[
        bool, typer.Option("--publish", help="Only publish to ANCHORWATCH_LOG_URL, for a worker elsewhere to judge.")
    ] = False,
    stay: Annotated[
        bool | None,
        typer.Option(help="Keep the page, when all is done, until Ctrl-C. [default: on a terminal, without --json]"),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Watch a real model hold scripted conversations, and flag those that drift, live; with the page to look at.

    On Kafka it writes to a topic of its own, anchorwatch.demo.
    """
    from collectors.demo import Service, publish_demo, run_demo
    from monitor.connect import kafka_options

    if publish:
        if kafka or redis or data_dir:
            raise ConfigurationError(
                "--publish goes to the installation's own log", cure="set ANCHORWATCH_LOG_URL, and give no other place"
            )
        counts = publish_demo(model=model, bundle=bundle, conversations=conversations, tokens=tokens, seed=seed)
        print(json.dumps(counts) if as_json else "\n".join(f"{name:<14} {value}" for name, value in counts.items()))
        raise typer.Exit(0 if counts["written"] else 1)

    service: Service | None = None
    with suppress(ModuleNotFoundError):  # whoever has only what a collector needs sees the demo without its page
        from alerts.up import running as service
    result = run_demo(
        model=model,
        bundle=bundle,
        conversations=conversations,
        tokens=tokens,
        seed=seed,
        data_dir=data_dir,
        log_url=None if kafka is None else f"kafka://{kafka.removeprefix('kafka://')}",
        store_url=redis,
        kafka=kafka_options(load_settings()),
        service=service,
        stay=sys.stdin.isatty() and sys.stderr.isatty() and not as_json if stay is None else stay,
    )
    if as_json:
        print(json.dumps(result))


@app.command()
def up(bundle: BundleName = "smollm2", calibration: CalibrationFile = None) -> None:
    """Run worker, dispatcher, HTTP interface and page in one process, until SIGTERM or Ctrl-C.

    Log and store are files in the data directory unless the settings name servers. The calibration given here judges
    only where none is in force yet. Collectors on this machine publish into the same log; others over HTTP.
    """
    from alerts.up import up as run
    from monitor import connect

    settings = load_settings()
    run(bundle, connect.calibration(bundle if calibration is None else str(calibration), settings), settings)


@app.command()
def dispatch(
    config: Annotated[
        Path | None, typer.Option(help="File of rules and routes. [default: ANCHORWATCH_ALERTS_FILE]")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Without rules: every alert at once, one JSON object a line, into this file.")
    ] = None,
) -> None:
    """Tell people what the worker found, by rules and routes, until SIGTERM or Ctrl-C.

    Without rules, every alert goes to standard output at once, one JSON object a line. With rules, nothing goes out
    before `anchorwatch alerts enable`.
    """
    from alerts.dispatch import run

    settings = load_settings()
    rules = config or settings.alerts_file
    if out is not None and rules is not None:
        raise ConfigurationError(
            f"--out goes round the rules in {rules}: every alert would be told at once, also in shadow",
            cure="leave --out away; or unset ANCHORWATCH_ALERTS_FILE",
        )
    run(settings.model_copy(update={"alerts_file": rules}), out)


@app.command()
def audit(
    paths: Annotated[
        list[str] | None,
        typer.Argument(
            help="Logs: files, folders, - for standard input. With --events: logs' URLs, dumps of projections, "
            "folders of earlier audits. [default: with --events, the log of ANCHORWATCH_LOG_URL]"
        ),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder of the tables and the report.")] = Path("audit"),
    form: Annotated[Literal["parquet", "jsonl"], typer.Option("--format", help="Of the tables.")] = "parquet",
    events: Annotated[
        bool, typer.Option("--events", help="Judge recorded projections, as a worker would, instead of scoring text.")
    ] = False,
    bundle: BundleName = "smollm2",
    model: Model = "smollm2",
    dtype: Dtype = "float32",
    device: Annotated[str | None, typer.Option(help="cpu, cuda, … [default: the GPU where there is one]")] = None,
    calibration: Annotated[
        Path | None, typer.Option(help="What `anchorwatch calibrate` wrote. [default: the bundle's own calibration]")
    ] = None,
    own_baseline: Annotated[
        bool, typer.Option("--self", help="Take each deployment's baseline from these logs, as if most were healthy.")
    ] = False,
    deployment: Annotated[
        str | None, typer.Option(help="Whose conversations these are. [default: the model that the log names]")
    ] = None,
    engine: Annotated[
        Literal["local", "ray"], typer.Option(help="local, or ray: several processes or machines.")
    ] = "local",
    actors: Annotated[int | None, typer.Option(help="Processes of the Ray engine.")] = None,
    context: Annotated[int, typer.Option(help="Most tokens that the witness reads at a time.")] = 4096,
    top: Annotated[int, typer.Option(min=0, help="Conversations that the report draws.")] = 100,
    with_text: Annotated[
        bool, typer.Option("--with-text", help="Quote the worst turns in the report. Nothing else ever holds text.")
    ] = False,
    fail_on: Annotated[
        Literal["warning", "critical"] | None,
        typer.Option(help="Exit 1 if a conversation comes to this or worse, or if none could be judged."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Audit conversation logs of any model, or recorded projections: a verdict for each conversation, and a report.

    A stopped audit goes on from OUT/.shards when the same command is run again.
    """
    from collectors.audit import Choices
    from collectors.audit import audit as audit_paths
    from monitor.auditor import SHARDS
    from monitor.report import print_summary, summary_json

    choices = Choices(
        paths=tuple(paths or ()),
        out=out,
        form=form,
        events=events,
        bundle=bundle,
        model=model,
        dtype=dtype,
        device=device,
        calibration=calibration,
        own_baseline=own_baseline,
        deployment=deployment,
        engine=engine,
        actors=actors,
        context=context,
        top=top,
        with_text=with_text,
    )
    try:
        with _byte_progress() as tell:
            summary, provenance, problems = audit_paths(choices, tell)
    except KeyboardInterrupt:
        kept = "" if events else f" What was scored is kept in {out / SHARDS}:"
        _stderr.print(f"Stopped; no file of the audit was written.{kept} run the same command again to go on.")
        sys.exit(130)
    if as_json:
        print(summary_json(summary, provenance).decode())
    else:
        print_summary(summary, provenance, Console(), problems)
    worst = {"warning": ("warning", "critical"), "critical": ("critical",), None: ()}[fail_on]
    judged = summary.conversations - summary.verdicts["unscored"]
    if any(summary.verdicts[verdict] for verdict in worst) or (fail_on and not judged):  # nothing judged passes no gate
        raise typer.Exit(1)


@app.command()
def calibrate(
    paths: Annotated[
        list[str],
        typer.Argument(help="Healthy conversations: logs, or with --events topics, dumps and folders of audits."),
    ],
    out: Annotated[Path, typer.Option(help="The calibration, for `audit`, `backtest` and `worker`.")],
    budget: Annotated[float, typer.Option(help="Share of healthy conversations that may warn.")] = 0.01,
    critical_budget: Annotated[
        float | None,
        typer.Option(help="Share that may become critical. [default: a multiple of the boundary, uncertified]"),
    ] = None,
    confidence: Annotated[
        float | None,
        typer.Option(help="Least probability that the realised share is within the budget. [default: on average]"),
    ] = None,
    uncertified: Annotated[
        bool, typer.Option("--uncertified", help="With too few conversations go on, and promise nothing.")
    ] = False,
    events: Annotated[bool, typer.Option("--events", help="The paths are recorded projections, not text.")] = False,
    bundle: BundleName = "smollm2",
    model: Model = "smollm2",
    dtype: Dtype = "float32",
    device: Annotated[str | None, typer.Option(help="cpu, cuda, … [default: the GPU where there is one]")] = None,
    deployment: Annotated[
        str | None, typer.Option(help="Whose conversations these are. [default: the model that the log names]")
    ] = None,
    work: Annotated[
        Path | None, typer.Option(help="Folder of the scored shards; a stopped run goes on. [default: OUT.work]")
    ] = None,
    traffic: Annotated[int, typer.Option("--conversations-per-day", min=1, help="For the expected load.")] = 10_000,
    prevalence: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Share of conversations that drift, for the load.")
    ] = 0.01,
    as_json: AsJson = False,
) -> None:
    """Calibrate deployments on healthy conversations of their own, so that an alarm budget holds for them.

    One conversation per user is a unit. Exits 1 if a deployment has too few for the budget.
    """
    from monitor.axis.bundle import load_bundle, resolve_bundle
    from monitor.calibration import Gathering, calibrate_deployments, print_calibrated, report_of
    from monitor.detect.budget import fewest
    from monitor.detect.configure import detector_config

    for share in (budget, critical_budget):
        fewest(budget if share is None else share, confidence)  # refuses what is no share, before hours of scoring
    _writable_file(out)
    axis = load_bundle(resolve_bundle(bundle))
    parent = detector_config(axis)
    unread: dict[str, int] = {}
    gathering = Gathering(parent, deployment, lambda reason: unread.update({reason: unread.get(reason, 0) + 1}))
    with _measuring(
        paths, work or out.with_name(out.name + ".work"), events, unread, bundle, model, dtype, device, deployment
    ) as responses:
        for one in responses:
            gathering.add(one.conversation, one.user, one.projection)
    found = calibrate_deployments(
        gathering.talks(),
        parent,
        budget=budget,
        critical_budget=critical_budget,
        confidence=confidence,
        uncertified=uncertified,
    )
    _say_unread(unread)
    detection = (axis.info.calibration or {}).get("source", {}).get("share_of_these_that_warn")
    report = report_of(
        found,
        traffic=traffic,
        prevalence=prevalence,
        detection=detection,
        critical_budget=critical_budget,
        users_known=gathering.users_known,
    )
    if found.config.own_boundaries:
        _replace_file(out, found.config.to_json())
        _stderr.print(f"Written to {out}", highlight=False)
    print(json.dumps(report)) if as_json else print_calibrated(report, Console())
    if found.refused or not found.config.own_boundaries:
        raise typer.Exit(1)


@app.command()
def backtest(
    paths: Annotated[
        list[str], typer.Argument(help="Folders of audits, dumps of projections, topics; with --logs: logs.")
    ],
    config: Annotated[
        list[str],
        typer.Option(help="A calibration, or a bundle's name or folder; more than once to compare."),
    ],
    verdicts: Annotated[
        Path | None, typer.Option(help="CSV file with conversation_id, label and, where known, turn.")
    ] = None,
    logs: Annotated[bool, typer.Option("--logs", help="The paths are conversation logs: score them first.")] = False,
    bundle: BundleName = "smollm2",
    model: Model = "smollm2",
    dtype: Dtype = "float32",
    device: Annotated[str | None, typer.Option(help="cpu, cuda, … [default: the GPU where there is one]")] = None,
    deployment: Annotated[
        str | None, typer.Option(help="Judge all conversations as this deployment's. [default: as recorded]")
    ] = None,
    work: Annotated[Path, typer.Option(help="Folder of the scored shards, with --logs.")] = Path("backtest.work"),
    as_json: AsJson = False,
) -> None:
    """Say what each configuration would have raised over recorded conversations, and, given verdicts, how well."""
    from msgspec.structs import replace

    from monitor.backtest import compared, print_compared, read_verdicts, replay
    from monitor.connect import calibration

    configs = {name: calibration(name) for name in config}
    if len(configs) < len(config):
        raise ConfigurationError("a --config is given twice", cure="give each one once")
    labels = read_verdicts(verdicts) if verdicts is not None else None
    unread: dict[str, int] = {}

    def told(_event: object, error: AnchorwatchError) -> None:
        unread[error.problem] = unread.get(error.problem, 0) + 1

    with _measuring(paths, work, not logs, unread, bundle, model, dtype, device, deployment) as responses:
        outcomes = replay(
            (
                replace(
                    one.projection,
                    conversation_id=one.conversation,
                    deployment=deployment or one.projection.deployment,
                )
                for one in responses
            ),
            list(configs.values()),
            on_poison=told,
        )
    _say_unread(unread)
    report = compared(dict(zip(configs, outcomes, strict=True)), configs, labels)
    print(json.dumps(report)) if as_json else print_compared(report, Console())


@contextmanager
def _measuring(
    paths: list[str],
    work: Path,
    events: bool,
    unread: dict[str, int],
    bundle: str,
    model: str,
    dtype: str,
    device: str | None,
    deployment: str | None,
) -> Iterator[Iterator[Any]]:
    """The responses of logs or recorded ones, with a progress bar; what can't be read is counted by its reason."""
    from collectors.responses import logged_responses, recorded_responses

    def note(_source: str, _record: int, reason: str) -> None:
        unread[reason] = unread.get(reason, 0) + 1

    with _byte_progress() as tell:

        def progress(done: int, total: int) -> None:
            tell("reading" if events else "scoring", done, total, 0)

        if events:
            yield recorded_responses(paths, unread=note, progress=progress)
        else:
            yield logged_responses(
                paths,
                work,
                model=model,
                bundle=bundle,
                dtype=dtype,
                device=device,
                deployment=deployment,
                unread=note,
                progress=progress,
            )


def _say_unread(unread: dict[str, int]) -> None:
    for reason, count in sorted(unread.items(), key=lambda item: -item[1])[:10]:
        _stderr.print(f"left out, {count} times: {reason}", markup=False, highlight=False)


def _writable_file(path: Path) -> None:
    """Refuse now what would fail after hours."""
    if path.is_dir():
        raise ConfigurationError(f"{path} is a folder", cure="give the name of a file as --out")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _replace_file(path.with_name(path.name + ".probe"), b"")
        path.with_name(path.name + ".probe").unlink()
    except OSError as error:
        raise ConfigurationError(f"{path} can't be written: {error.strerror}", cure="give another --out") from error


def _replace_file(path: Path, content: bytes) -> None:
    beside = path.with_name(path.name + ".new")
    beside.write_bytes(content)
    beside.replace(path)


@axis_app.command("build")
def axis_build(
    out: Annotated[Path, typer.Option(help="Folder of the new bundle.")],
    model: Model = "smollm2",
    work: Annotated[
        Path | None, typer.Option(help="Folder of the rollouts; a stopped build goes on from it. [default: OUT.work]")
    ] = None,
    dtype: Dtype = "float32",
    device: Annotated[str | None, typer.Option(help="cpu, cuda, … [default: the GPU where there is one]")] = None,
    catalogue: Annotated[
        Path | None, typer.Option(help="Folder with roles.json, questions.json, styles.json, defaults.json.")
    ] = None,
    roles: Annotated[int | None, typer.Option(help="Use only so many roles, for a quick axis.")] = None,
    tokens: Annotated[int, typer.Option(help="Longest response, in tokens.")] = 48,
    max_rollouts: Annotated[int, typer.Option(help="Rollouts a role gets at most.")] = 10,
    batch_size: Annotated[int, typer.Option(help="Rows generated together.")] = 48,
    layer: Annotated[int | None, typer.Option(help="Use this layer. [default: the one that separates best]")] = None,
    judge_url: Annotated[
        str | None, typer.Option(help="OpenAI-compatible endpoint that labels responses; its key in OPENAI_API_KEY.")
    ] = None,
    judge_model: Annotated[str, typer.Option(help="The judge's model name.")] = "gpt-4.1-mini",
    decoder_layers: Override = None,
    seed: Annotated[int, typer.Option(help="Of sampling and splits.")] = 20260121,
) -> None:
    """Build an axis bundle from a model.

    Roles and the default Assistant answer questions; generation and capture are one pass.
    """
    from collectors.assemble import assemble_bundle
    from collectors.build import BuildSettings, collect_rollouts
    from collectors.judge import Judge
    from collectors.models import load_model
    from monitor.axis.bundle import save_bundle
    from monitor.axis.catalogue import load_catalogue
    from monitor.axis.show import show

    settings = BuildSettings(
        tokens=tokens,
        batch_size=batch_size,
        max_rollouts=max_rollouts,
        round_rollouts=min(BuildSettings.round_rollouts, max_rollouts),
        roles=roles,
        seed=seed,
    )
    words = load_catalogue(catalogue)
    folder = work or out.with_name(out.name + ".work")
    loaded = load_model(model, dtype=dtype, device=device)
    try:
        with _progress() as bar:
            task = bar.add_task("rollouts", total=None)
            labelled = bar.add_task("labels", total=None, visible=judge_url is not None)
            judge = None
            if judge_url is not None:
                judge = Judge(
                    judge_url,
                    judge_model,
                    words,
                    folder,
                    api_key=os.environ.get("OPENAI_API_KEY"),
                    progress=lambda done, total: bar.update(labelled, completed=done, total=total),
                )
            rollouts = collect_rollouts(
                loaded,
                words,
                settings,
                folder,
                decoder_layers=decoder_layers,
                progress=lambda done, total, what: bar.update(task, completed=done, total=total, description=what),
                keep=judge.keep if judge else None,
            )
    except KeyboardInterrupt:
        _stderr.print(f"Stopped. The rollouts so far are in {folder}: run the same command again to go on.")
        sys.exit(130)
    bundle, responses = assemble_bundle(loaded, words, settings, rollouts, layer=layer, decoder_layers=decoder_layers)
    save_bundle(bundle, out, responses)
    show(bundle, _stderr)
    print(out)


@axis_app.command("calibrate")
def axis_calibrate(
    out: Annotated[Path, typer.Option(help="Folder of the calibrated bundle; it may be the bundle's own.")],
    bundle: BundleName = "smollm2",
    model: Model = "smollm2",
    conversations: Annotated[
        Path | None,
        typer.Option(help="Folder with develop*.jsonl.gz and calibrate.jsonl.gz. [default: the scripts are played]"),
    ] = None,
    labels: Annotated[
        Path | None, typer.Option(help="CSV file with conversation_id, turn and label of the develop replies.")
    ] = None,
    budget: Annotated[float, typer.Option(help="Share of healthy conversations that may warn.")] = 0.01,
    critical_budget: Annotated[
        float | None, typer.Option(help="Share that may become critical. [default: no budget of its own]")
    ] = None,
    samples: Annotated[int, typer.Option(help="Times that each develop script is played.")] = 3,
    tokens: Annotated[int, typer.Option(help="Longest reply, in tokens.")] = 48,
    seed: Annotated[int, typer.Option(help="Of sampling.")] = 1,
    dtype: Dtype = "float32",
) -> None:
    """Learn what to read from the develop scripts, and set the alarm boundary on the calibrate scripts.

    Without --conversations the model plays the scripts; what it said is kept in OUT, and used again where it is there.
    """
    from msgspec.structs import replace

    from collectors.calibrate import (
        TRAFFIC_FILE,
        learn_and_calibrate,
        played,
        read_conversations,
        write_conversations,
        write_traffic,
    )
    from collectors.models import load_model
    from collectors.traffic import load_scripts
    from collectors.traits import read_labels
    from monitor.axis.bundle import load_bundle, load_responses, resolve_bundle, save_bundle
    from monitor.axis.show import show

    if labels is not None and conversations is None:
        raise ConfigurationError(
            "--labels are of replies that were given once: played anew, the model says something else",
            cure="give the labelled --conversations, too",
        )
    directory = resolve_bundle(bundle)
    axis = load_bundle(directory)
    evidence = load_responses(axis, directory) if axis.info.responses_sha256 else None
    known = read_labels(labels) if labels is not None else {}
    if not known:
        _stderr.print("No labels: it learns from what the scripts ask for, not from what the model does.")
    splits = {name: load_scripts(name) for name in ("develop", "calibrate")}
    loaded = load_model(model, dtype=dtype)
    # What was said belongs to these weights and this way of playing, and to no other.
    kept = conversations or out / f"conversations-{loaded.facts.weights_sha256[:12]}-{samples}-{tokens}-{seed}"
    with _progress() as bar:
        tasks: dict[str, Any] = {}

        def advance(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bar.add_task(what, total=None)
            bar.update(tasks[what], completed=done, total=total)

        for name, scripts in splits.items():
            file = kept / f"{name}.jsonl.gz"
            if conversations is None and not file.exists():
                kept.mkdir(parents=True, exist_ok=True)
                said = played(
                    loaded,
                    scripts,
                    samples=samples if name == "develop" else 1,  # the boundary counts each script once
                    tokens=tokens,
                    seed=seed,
                    progress=functools.partial(advance, f"playing {name}"),
                )
                write_conversations(file, scripts, said, axis.info.model.name)
        name = axis.info.model.name
        develop = [
            one
            for file in sorted(kept.glob("develop*.jsonl.gz"))
            for one in read_conversations(file, splits["develop"], name)
        ]
        if not develop:
            raise ConfigurationError(f"{kept} has no develop*.jsonl.gz", cure="give a folder of played conversations")
        calibration = read_conversations(kept / "calibrate.jsonl.gz", splits["calibrate"], name)
        axis, seen = learn_and_calibrate(
            loaded,
            axis,
            develop,
            calibration,
            splits["develop"],
            known,
            budget=budget,
            critical_budget=critical_budget,
            progress=advance,
        )
    save_bundle(axis, out, evidence)
    write_traffic(out / TRAFFIC_FILE, [replace(projection, axis_id=axis.id) for projection in seen])
    show(axis, _stderr)
    print(out)


@axis_app.command("show")
def axis_show(
    bundle: Annotated[str, typer.Argument(help="A shipped bundle's name, or a bundle's folder.")] = "smollm2",
    as_json: AsJson = False,
    verify: Annotated[
        bool, typer.Option(help="Recompute every figure from the committed responses; exit 1 on a difference.")
    ] = False,
    picture: Annotated[Path | None, typer.Option(help="Draw it into this file: .png, .svg or .pdf.")] = None,
) -> None:
    """Show what a bundle measures, and how well."""
    from monitor.axis.bundle import load_bundle, resolve_bundle
    from monitor.axis.show import draw, show, summary
    from monitor.axis.show import verify as differences

    directory = resolve_bundle(bundle)
    loaded = load_bundle(directory)
    if as_json:
        print(json.dumps(summary(loaded)))
    else:
        show(loaded, Console())
    if picture is not None:
        draw(loaded, directory, picture)
        _stderr.print(f"Drawn into {picture}", highlight=False)
    if verify:
        found = differences(loaded, directory)
        for line in found:
            _stderr.print(line, markup=False, highlight=False)
        _stderr.print("Every figure agrees with the committed responses." if not found else f"{len(found)} differ.")
        if found:
            raise typer.Exit(1)


@axis_app.command("check")
def axis_check(
    bundle: Annotated[str, typer.Argument(help="A shipped bundle's name, or a bundle's folder.")] = "smollm2",
    model: Model = "smollm2",
    dtype: Dtype = "float32",
    decoder_layers: Override = None,
    as_json: AsJson = False,
    metrics_file: Annotated[
        Path | None, typer.Option(help="Write the result for Prometheus' textfile collector, too; a name in .prom.")
    ] = None,
) -> None:
    """Project the bundle's canaries again: does the axis still measure the same with this model? ok, shifted or stale.

    Exits 0 when ok, 1 when shifted or stale.
    """
    from collectors.check import CANARY_METRICS, check_bundle
    from collectors.models import load_model
    from monitor.axis.bundle import load_bundle, resolve_bundle

    report = check_bundle(load_model(model, dtype=dtype), load_bundle(resolve_bundle(bundle)), decoder_layers)
    if metrics_file is not None:
        telemetry.write_metrics(metrics_file, CANARY_METRICS)
    if as_json:
        print(json.dumps(report))
    else:
        print(f"{report['verdict']}: {report['says']}")
    if report["verdict"] != "ok":
        raise typer.Exit(1)


@axis_app.command("import")
def axis_import(
    axis: Annotated[
        Path, typer.Argument(help="A published assistant_axis.pt: a tensor [layers, hidden], or a dict with key axis.")
    ],
    out: Annotated[Path, typer.Option(help="Folder of the new bundle.")],
    model: Model,
    layer: Annotated[int | None, typer.Option(help="Layer to project at. [default: the middle one]")] = None,
    capping: Annotated[Path | None, typer.Option(help="A published capping_config.pt.")] = None,
    experiment: Annotated[
        str | None, typer.Option(help="Which of its experiments, such as layers_46:54-p0.25.")
    ] = None,
    dtype: Dtype = "bfloat16",
    licence: Annotated[str, typer.Option(help="Licence of the published files, SPDX.")] = "NOASSERTION",
    sha256: Annotated[str | None, typer.Option(help="Digest that the axis file must have.")] = None,
) -> None:
    """Make a bundle from published files, without running what a .pt file may carry. The sign of a cap is checked."""
    from collectors.import_axis import import_bundle
    from collectors.models import load_model
    from monitor.axis.bundle import save_bundle
    from monitor.axis.show import show

    if (capping is None) != (experiment is None):
        raise ConfigurationError("--capping and --experiment go together", cure="give both, or neither")
    bundle = import_bundle(
        load_model(model, dtype=dtype),
        axis,
        layer=layer,
        capping=capping,
        experiment=experiment,
        licence=licence,
        sha256=sha256,
    )
    save_bundle(bundle, out)
    show(bundle, _stderr)
    print(out)


@contextmanager
def _progress() -> Iterator[Progress]:
    columns: tuple[Any, ...] = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=_stderr) as bar:
        yield bar


@contextmanager
def _byte_progress() -> Iterator[Callable[[str, int, int | None, int], None]]:
    """A bar over bytes whose time left is reckoned from what is new: what was scored before costs nothing."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[share]}"),
        TimeElapsedColumn(),
        TextColumn("{task.fields[left]}"),
    )
    with Progress(*columns, console=_stderr) as bar:
        task = bar.add_task("starting", total=None, share="", left="")
        stage, first, began = "", 0, time.monotonic()

        def tell(what: str, done: int, total: int | None, kept: int) -> None:
            nonlocal stage, first, began
            if what != stage:
                stage, first, began = what, done - kept, time.monotonic()
            new, seconds = done - kept - first, time.monotonic() - began
            left = ""
            if total and new > 0:
                left = f"{timedelta(seconds=round(seconds * max(0, total - done) / new))} left"
            share = "" if total is None else f"{decimal(done)} of {decimal(total)}"
            bar.update(task, description=what, completed=done, total=total, share=share, left=left)

        yield tell


if __name__ == "__main__":
    main()

"""Rollouts for an axis: a model answers questions as itself and as many roles, generated and captured in one pass.

It knows how to collect and resume; what is made of the rollouts is `collectors/assemble.py`'s business. Every batch is
one shard in the work folder, renamed into place when it is whole, so that a killed build goes on where it was. Roles
stop one by one when their vector has settled (split-half cosine), instead of after a fixed number of rollouts.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file, save_file

from collectors.models import LoadedModel
from collectors.spans import encode_prompt, response_tokens, special_token_ids, stop_token_ids
from collectors.tap import Tap
from monitor.axis.catalogue import Catalogue, split
from monitor.axis.geometry import split_half_cosine, without_question_effects
from monitor.errors import CatalogueError, ConfigurationError, ModelError

__all__ = ["BuildSettings", "Rollout", "Rollouts", "collect_rollouts", "generate_rollouts"]

Floats = NDArray[np.floating]
Group = str  # "role", "default" or "style"


@dataclass(frozen=True)
class BuildSettings:
    """What a build does. The same settings, catalogue and model give the same shards.

    Attributes:
        tokens: longest response, in tokens.
        temperature: of sampling, among the 50 likeliest tokens.
        batch_size: rows generated together.
        round_rollouts: rollouts a role gets per round, before it is asked whether it has settled.
        max_rollouts: rollouts a role gets at most.
        settled: split-half cosine (Spearman-Brown corrected) at which a role's vector has settled.
        default_repeats: rollouts of the default Assistant per question.
        style_repeats: rollouts of the default Assistant per style request.
        seed: of sampling and of the three-way splits.
        roles: how many roles to use, for a quick axis; None takes all.
    """

    tokens: int = 48
    temperature: float = 0.7
    batch_size: int = 48
    round_rollouts: int = 5
    max_rollouts: int = 10
    settled: float = 0.8
    default_repeats: int = 3
    style_repeats: int = 2
    seed: int = 20260121
    roles: int | None = None

    def __post_init__(self) -> None:
        problems = [
            f"{name} is {getattr(self, name)}, and must be at least {least}"
            for name, least in (
                ("tokens", 2),
                ("batch_size", 1),
                ("round_rollouts", 2),
                ("default_repeats", 1),
                ("style_repeats", 1),
            )
            if getattr(self, name) < least
        ]
        if self.roles is not None and self.roles < 4:
            problems.append(f"roles is {self.roles}, and must be at least 4 to be split three ways")
        if self.max_rollouts < self.round_rollouts:
            problems.append(f"max_rollouts is {self.max_rollouts}, less than round_rollouts {self.round_rollouts}")
        if not 0 < self.settled < 1:
            problems.append(f"settled is {self.settled}, and must lie between 0 and 1")
        if not self.temperature > 0:
            problems.append(f"temperature is {self.temperature}, and must be above 0")
        if problems:
            raise ConfigurationError("the build can't run: " + "; ".join(problems), cure="change these options")


@dataclass(frozen=True)
class Rollout:
    """One question put to one persona.

    Attributes:
        group: "role", "default" or "style".
        name: the role; "" for the default Assistant; the style.
        split: "make", "choose" or "report"; the role's (or style request's) and the question's alike.
        prompt: index of the system prompt within the role's five, or within the defaults.
        question: index of the question (or of the style request).
    """

    group: Group
    name: str
    split: str
    prompt: int
    question: int


@dataclass
class Rollouts:
    """What was collected: `rollouts[i]` with its activations `means[i]` [layers, hidden] and its `texts[i]`."""

    rollouts: list[Rollout] = field(default_factory=list)
    means: list[NDArray[np.float32]] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    reliability: dict[str, float] = field(default_factory=dict)

    def where(self, group: Group, *, name: str | None = None, split: str | None = None) -> list[int]:
        """Indices of the rollouts of a group, optionally of one name and one split."""
        return [
            i
            for i, rollout in enumerate(self.rollouts)
            if rollout.group == group and name in (None, rollout.name) and split in (None, rollout.split)
        ]

    def stack(self, indices: Sequence[int]) -> Floats:
        """Activations [n, layers, hidden].

        Raises:
            ModelError: there are none.
        """
        if not indices:
            raise ModelError(
                "no response is left to average: the model said nothing, or nothing was in role",
                cure="read the responses in the work folder; a larger model, more rollouts or another judge may help",
            )
        return np.stack([self.means[i] for i in indices])


Progress = Callable[[int, int, str], None]


def collect_rollouts(
    loaded: LoadedModel,
    catalogue: Catalogue,
    settings: BuildSettings,
    work: Path,
    *,
    decoder_layers: str | None = None,
    progress: Progress = lambda *_: None,
    keep: Callable[[list[tuple[Rollout, str]]], list[bool]] | None = None,
) -> Rollouts:
    """Generate and capture every rollout, or go on where an earlier run of the same build was stopped.

    Args:
        work: folder of the shards; several hundred MB for the full catalogue.
        progress: called with rollouts done, rollouts planned (an upper bound), and what is under way.
        keep: the judge: says of a batch of role rollouts which are in role; None keeps all.

    Raises:
        ConfigurationError: `work` belongs to another build, or can't be written.
        CatalogueError: the catalogue is too small to be split three ways.
    """
    _claim(work, loaded, catalogue, settings)
    roles = sorted(catalogue.roles)[: settings.roles]
    role_split = split(roles, settings.seed)
    question_split = split([question.text for question in catalogue.questions], settings.seed)
    by_split = {
        part: [i for i, question in enumerate(catalogue.questions) if question_split[question.text] == part]
        for part in ("make", "choose", "report")
    }
    if not all(by_split.values()) or len(set(role_split.values())) < 3:
        raise CatalogueError(
            f"{len(roles)} roles and {len(catalogue.questions)} questions can't be split three ways",
            cure="use at least 4 roles and 4 questions",
        )
    generator = _Generator(loaded, catalogue, settings, decoder_layers)
    collected = Rollouts()
    total = len(roles) * settings.max_rollouts
    fixed = [*_default_rollouts(catalogue, by_split, settings), *_style_rollouts(catalogue, settings)]
    total += len(fixed)

    def run(stage: str, rollouts: list[Rollout]) -> None:
        for number, batch in enumerate(_batches(rollouts, settings.batch_size)):
            shard = work / f"{stage}-{number:04d}.safetensors"
            if not shard.exists():
                _write_shard(shard, batch, *generator.run(batch, f"{stage}-{number}"))
            _read_shard(shard, batch, collected)
            progress(len(collected.rollouts), total, stage)

    run("fixed", fixed)
    middle = generator.layer_count * 3 // 5  # where the settling is judged; the layer itself is chosen later
    origin = collected.stack(collected.where("default", split="make"))[:, middle].mean(axis=0)
    unsettled = roles
    for round_number in range(settings.max_rollouts // settings.round_rollouts):
        first = round_number * settings.round_rollouts
        planned = [
            _role_rollout(catalogue, by_split, role, role_split[role], number, settings.seed)
            for role in unsettled
            for number in range(first, first + settings.round_rollouts)
        ]
        run(f"round{round_number}", planned)
        collected.reliability |= _reliability(collected, unsettled, middle, origin, settings.seed)
        still = [role for role in unsettled if collected.reliability[role] < settings.settled]
        total -= (len(unsettled) - len(still)) * (settings.max_rollouts - first - settings.round_rollouts)
        unsettled = still
        progress(len(collected.rollouts), total, f"round{round_number}")
    return _judged(collected, keep) if keep else collected


def generate_rollouts(
    loaded: LoadedModel,
    catalogue: Catalogue,
    settings: BuildSettings,
    batch: list[Rollout],
    decoder_layers: str | None = None,
) -> tuple[NDArray[np.float32], list[str]]:
    """One batch without a work folder: means [rows, layers, hidden], NaN where a row said nothing, and texts."""
    return _Generator(loaded, catalogue, settings, decoder_layers).run(batch, "one")


def _reliability(collected: Rollouts, roles: Sequence[str], layer: int, origin: Floats, seed: int) -> dict[str, float]:
    """How settled each role's vector is at one layer, what its questions add left out."""
    indices = collected.where("role")
    answered = [collected.rollouts[i] for i in indices]
    own = without_question_effects(
        np.array([collected.means[i][layer] for i in indices]).reshape(len(indices), len(origin)),
        [rollout.name for rollout in answered],
        [rollout.question for rollout in answered],
    )
    places = {role: [i for i, rollout in enumerate(answered) if rollout.name == role] for role in roles}
    # A role that answers with nothing has no halves yet to compare.
    return {
        role: split_half_cosine(own[mine], origin, seed) if len(mine) >= 2 else 0.0 for role, mine in places.items()
    }


def _judged(collected: Rollouts, keep: Callable[[list[tuple[Rollout, str]]], list[bool]]) -> Rollouts:
    indices = collected.where("role")
    verdicts = dict(zip(indices, keep([(collected.rollouts[i], collected.texts[i]) for i in indices]), strict=True))
    kept = [i for i in range(len(collected.rollouts)) if verdicts.get(i, True)]
    return Rollouts(
        [collected.rollouts[i] for i in kept],
        [collected.means[i] for i in kept],
        [collected.texts[i] for i in kept],
        collected.reliability,
    )


def _default_rollouts(catalogue: Catalogue, by_split: dict[str, list[int]], settings: BuildSettings) -> list[Rollout]:
    """Every question under `default_repeats` of the default prompts, which take turns."""
    return [
        Rollout("default", "", part, (place + repeat * 2) % len(catalogue.defaults), question)
        for part, questions in by_split.items()
        for place, question in enumerate(questions)
        for repeat in range(settings.default_repeats)
    ]


def _style_rollouts(catalogue: Catalogue, settings: BuildSettings) -> list[Rollout]:
    """Every style request to the default Assistant; the splits keep each style's share."""
    parts: dict[str, str] = {}
    for style in sorted({request.style for request in catalogue.styles}):
        parts |= split([request.text for request in catalogue.styles if request.style == style], settings.seed)
    return [
        Rollout("style", request.style, parts[request.text], (index + repeat) % len(catalogue.defaults), index)
        for index, request in enumerate(catalogue.styles)
        for repeat in range(settings.style_repeats)
    ]


def _role_rollout(
    catalogue: Catalogue, by_split: dict[str, list[int]], role: str, part: str, number: int, seed: int
) -> Rollout:
    """A role's rollout `number`: its prompts take turns; its questions are its split's, from a place of its own."""
    questions = by_split[part]
    offset = int.from_bytes(hashlib.sha256(f"{seed} {role}".encode()).digest()[:4], "big")
    # A stride that shares no factor with the count visits every question before one comes again.
    stride = next(s for s in (37, 41, 43, 47, 1) if np.gcd(s, len(questions)) == 1)
    question = questions[(offset + number * stride) % len(questions)]
    return Rollout("role", role, part, number % len(catalogue.roles[role]), question)


def _batches(rollouts: list[Rollout], size: int) -> Iterator[list[Rollout]]:
    for start in range(0, len(rollouts), size):
        yield rollouts[start : start + size]


class _Generator:
    """Generates a batch of rollouts, and captures every layer's mean over each response."""

    def __init__(
        self, loaded: LoadedModel, catalogue: Catalogue, settings: BuildSettings, override: str | None
    ) -> None:
        self.loaded = loaded
        self.catalogue = catalogue
        self.settings = settings
        self.layer_count = loaded.facts.layers
        self.tap = Tap(loaded.model, dict.fromkeys(range(self.layer_count)), decoder_layers=override)
        self.stop = stop_token_ids(loaded.tokenizer, loaded.model.generation_config)
        self.special = special_token_ids(loaded.tokenizer)

    def run(self, batch: list[Rollout], name: str) -> tuple[NDArray[np.float32], list[str]]:
        """Means [rows, layers, hidden] and texts; a row that said nothing has NaN."""
        prompts = [encode_prompt(self.loaded.tokenizer, self._messages(rollout)) for rollout in batch]
        padded = self.loaded.tokenizer.pad({"input_ids": prompts}, return_tensors="pt").to(self.loaded.model.device)
        width = padded["input_ids"].shape[1]
        torch.manual_seed(int.from_bytes(hashlib.sha256(f"{self.settings.seed} {name}".encode()).digest()[:6], "big"))
        with torch.inference_mode(), self.tap as tap, tap.record(width + self.settings.tokens) as recording:
            sequences = self.loaded.model.generate(
                **padded,
                max_new_tokens=self.settings.tokens,
                do_sample=True,
                temperature=self.settings.temperature,
                top_k=50,
            )
            if tap.error is not None:
                raise ModelError(
                    f"capture failed: {tap.error}", cure="check the model and decoder_layers"
                ) from tap.error
            generated = sequences[:, width:].cpu().numpy()
            ends_and_masks = [response_tokens(row, self.stop, self.special) for row in generated]
            weights = torch.zeros(len(batch), generated.shape[1])
            for row, (_, counted) in enumerate(ends_and_masks):
                weights[row, np.flatnonzero(counted)] = 1.0 / max(int(counted.sum()), 1)
            means = torch.empty(len(batch), self.layer_count, self.loaded.facts.hidden)
            for layer, values in recording.values.items():
                spoken = values[:, width : width + generated.shape[1]]
                used = weights[:, : spoken.shape[1]].to(spoken.device)
                spoken = torch.where(used[..., None] > 0, spoken, 0.0)  # what was never fed is NaN
                means[:, layer] = torch.einsum("rt,rth->rh", used, spoken).cpu()
        result = means.numpy()
        result[[row for row, (_, counted) in enumerate(ends_and_masks) if not counted.any()]] = np.nan
        texts = [
            self.loaded.tokenizer.decode(row[:end], skip_special_tokens=True)
            for row, (end, _) in zip(generated, ends_and_masks, strict=True)
        ]
        return result, texts

    def _messages(self, rollout: Rollout) -> list[dict[str, str]]:
        system: str | None
        if rollout.group == "role":
            system = self.catalogue.roles[rollout.name][rollout.prompt]
        else:
            system = self.catalogue.defaults[rollout.prompt]
        asked = self.catalogue.styles[rollout.question].text if rollout.group == "style" else None
        asked = asked or self.catalogue.questions[rollout.question].text
        head = [] if system is None else [{"role": "system", "content": system}]
        return [*head, {"role": "user", "content": asked}]


def _claim(work: Path, loaded: LoadedModel, catalogue: Catalogue, settings: BuildSettings) -> None:
    """Mark the work folder as this build's, or check that it is."""
    stamp = {
        "model": msgspec.to_builtins(loaded.facts),
        "catalogue": catalogue.version,
        "settings": asdict(settings),
    }
    path = work / "build.json"
    if path.exists():
        try:
            found: dict[str, Any] = json.loads(path.read_text())
        except (OSError, ValueError) as error:
            raise ConfigurationError(
                f"{path} can't be read: {error}", cure="give another --work folder, or remove this one"
            ) from error
        differing = [key for key in stamp if found.get(key) != stamp[key]]
        if differing:
            raise ConfigurationError(
                f"{work} holds the rollouts of another build: {', '.join(differing)} differ",
                cure="give another --work folder, or remove this one",
            )
        return
    with _written_whole(path) as partial:
        work.mkdir(parents=True, exist_ok=True)
        partial.write_text(json.dumps(stamp, indent=1))


@contextmanager
def _written_whole(path: Path) -> Iterator[Path]:
    """A place beside `path` to write to; it takes its name when the block ends well."""
    partial = path.with_suffix(".partial")
    try:
        yield partial
        partial.replace(path)
    except (OSError, SafetensorError) as error:
        partial.unlink(missing_ok=True)
        raise ConfigurationError(
            f"{path} can't be written: {error}",
            cure="free some room there, and run the same command again: it goes on where it was",
        ) from error


def _write_shard(path: Path, batch: list[Rollout], means: NDArray[np.float32], texts: list[str]) -> None:
    about = {"rollouts": json.dumps([asdict(rollout) for rollout in batch]), "texts": json.dumps(texts)}
    with _written_whole(path) as partial:
        save_file({"means": np.ascontiguousarray(means)}, partial, metadata=about)


def _read_shard(path: Path, batch: list[Rollout], into: Rollouts) -> None:
    with safe_open(path, framework="np") as shard:
        about = shard.metadata()
    if json.loads(about["rollouts"]) != [asdict(rollout) for rollout in batch]:
        raise ConfigurationError(
            f"{path} holds other rollouts than planned", cure="remove the work folder, and build again"
        )
    means = load_file(path)["means"]
    for rollout, mean, text in zip(batch, means, json.loads(about["texts"]), strict=True):
        if np.isfinite(mean).all():  # an empty response has no activation; one that overflowed is of no use
            into.rollouts.append(rollout)
            into.means.append(mean)
            into.texts.append(text)

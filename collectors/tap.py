"""The tap: one forward hook per chosen decoder layer that projects the residual stream where it is, and can hold it.

It knows nothing of tokens, turns or events: it fills a buffer `[rows, positions, k]`, indexed by the absolute
position of each fed token, and leaves the reading to others. Nothing is copied off the device and nothing waits for it
while tokens are generated. Holding is the paper's activation capping (arXiv 2601.10387, "activation capping": a floor
on the projection); steering adds a vector, as in its steering experiments.

An error inside the tap is caught and counted, and switches the tap off: serving never fails because of it.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import structlog
import torch
from torch import Tensor, nn

from collectors.layers import find_decoder_layers
from monitor import telemetry

__all__ = ["Hold", "Recording", "Steer", "Tap", "full_precision"]

_log = structlog.get_logger("anchorwatch.tap")


@dataclass(frozen=True)
class Hold:
    """Activation capping: h <- h - v * min(<h, v> - floor, 0), at each layer, every fed token, rows that are held.

    Attributes:
        layers: decoder layers, best the tapped one or later: then what the tap reads is the uncapped model's value.
        vectors: unit vectors [len(layers), hidden], pointing towards the Assistant.
        floors: least allowed projection per layer, raw residual units.
    """

    layers: tuple[int, ...]
    vectors: Tensor
    floors: tuple[float, ...]


@dataclass(frozen=True)
class Steer:
    """Adds `strength * vector` to one layer's output at every fed token.

    `strength` is in raw residual units; the paper gives it as a multiple of the mean residual norm at that layer.
    """

    layer: int
    vector: Tensor
    strength: float


@dataclass
class Recording:
    """What passed the tapped layers during one generate call.

    `values[layer]` has shape [rows, positions, k] in float32; positions that were never fed are NaN, so that a reader
    who is off by one sees it. `moved[layer]` [rows, positions] is true where holding moved the token at that layer.

    Positions are absolute, so that what is fed again replaces what was rejected. Passes that belong to no response,
    such as those of classifier-free guidance, run with a cache of their own, and are left out.
    """

    positions: int
    held_rows: Tensor | None = None
    values: dict[int, Tensor] = field(default_factory=dict)
    moved: dict[int, Tensor] = field(default_factory=dict)
    foreign: bool = False
    _start: int | Tensor = 0
    _first_new: int = 0
    _seen: int = 0
    _cache: Any = None

    def begin_forward(self, past: Any) -> None:
        """A forward pass starts: find the absolute position of the first token it is fed."""
        self.foreign = self._cache is not None and past is not self._cache
        if self.foreign:
            return
        if past is None:
            # Without a cache everything is fed again, each time in the order of the *running* beams. What a position
            # held when it was first fed is what a cache would have kept, so only positions not seen before are written.
            self._start, self._first_new = 0, self._seen
            return
        self._cache = past
        length = past.get_seq_length()
        self._first_new = 0
        self._start = length
        if isinstance(length, Tensor):
            # A static cache keeps its length on the device, and moves it in place within this very pass: so copy it.
            # Reading it would make the host wait for the device at every token.
            self._start = length.clone()
            self.positions = max(self.positions, int(past.layers[0].max_cache_len))

    def write(self, layer: int, values: Tensor) -> None:
        """Store [rows, fed, k] at the positions being fed."""
        self.values[layer] = self._place(self.values.get(layer), values, float("nan"))

    def write_moved(self, layer: int, moved: Tensor) -> None:
        """Store which tokens [rows, fed] holding moved at one layer."""
        self.moved[layer] = self._place(self.moved.get(layer), moved, False)

    def held(self, rows: int, device: torch.device) -> Tensor | None:
        """Which of the `rows` being fed are held, [rows]; beams of a held row are. None where none is."""
        held = self.held_rows
        if held is None or rows % len(held):
            return None
        if held.device != device or len(held) != rows:  # once per call: not a copy to the device for every token
            held = self.held_rows = held.to(device).repeat_interleave(rows // len(held))
        return held

    def _place(self, buffer: Tensor | None, values: Tensor, empty: float | bool) -> Tensor:
        rows, fed = values.shape[:2]
        if isinstance(self._start, Tensor):
            buffer = self._room(buffer, values, self.positions, empty)
            places = torch.arange(fed, device=values.device) + self._start.to(values.device)
            # Clamped, since an index out of range would take the whole process down on a GPU. It can't be: the cache,
            # which has no more room than this buffer, was written first.
            return buffer.index_copy_(1, places.clamp(max=buffer.shape[1] - 1), values)
        stop = self._start + fed
        self._seen = max(self._seen, stop)
        buffer = self._room(buffer, values, stop, empty)
        first = max(self._start, self._first_new)
        if rows != buffer.shape[0]:
            raise ValueError(f"{rows} rows were fed into a recording of {buffer.shape[0]}")
        buffer[:, first:stop] = values[:, first - self._start :]
        return buffer

    def _room(self, buffer: Tensor | None, values: Tensor, positions: int, empty: float | bool) -> Tensor:
        if buffer is not None and buffer.shape[1] >= positions:
            return buffer
        size = max(positions, self.positions, 2 * buffer.shape[1] if buffer is not None else 0)
        larger = values.new_full((values.shape[0], size, *values.shape[2:]), empty)
        if buffer is not None:
            larger[:, : buffer.shape[1]] = buffer
        return larger


class Tap:
    """Hooks on the chosen decoder layers of one model.

    Args:
        model: a decoder-only transformers model.
        directions: per tapped layer, a matrix [hidden, k] whose columns are measured; None records the whole residual
            stream, which is what building an axis needs.
        hold: what to hold, for the rows that a recording says.
        steer: what to add, for every row.
        decoder_layers: override, see `find_decoder_layers`.

    Raises:
        ModelError: the decoder layers can't be told, or a layer does not exist.

    Use::

        with Tap(model, {18: directions}) as tap, tap.record(positions=200) as recording:
            model.generate(...)
        recording.values[18]  # [rows, positions, k]
    """

    def __init__(
        self,
        model: nn.Module,
        directions: Mapping[int, Tensor | None],
        *,
        hold: Hold | None = None,
        steer: Steer | None = None,
        decoder_layers: str | None = None,
    ) -> None:
        self.decoder = find_decoder_layers(model, decoder_layers)
        self.hold = hold
        self.steer = steer
        self.error: Exception | None = None
        self._directions = dict(directions)
        touched = {*directions, *(hold.layers if hold else ()), *((steer.layer,) if steer else ())}
        self._modules = {layer: self.decoder[layer] for layer in sorted(touched)}
        self._handles: list[Any] = []
        # Threads may generate with one model at the same time, each into a recording of its own.
        self._recordings: dict[int, Recording] = {}
        self._on_device: dict[tuple[str, int, torch.device], Tensor] = {}

    def __enter__(self) -> Tap:
        # Hooks stay ordinary Python at every pass, under `torch.compile` too, where the graph breaks at them: traced
        # into the graph they would be bound to the one recording that was open while it was compiled.
        eager: Any = torch.compiler.disable
        before = eager(self._before_forward)
        self._handles.append(self.decoder.owner.register_forward_pre_hook(before, with_kwargs=True))
        for layer, module in self._modules.items():
            hook = eager(self._hook_for(layer))
            # First in line: transformers' own recording of hidden states then sees what the next layer sees.
            self._handles.append(module.register_forward_hook(hook, prepend=True))
        return self

    def __exit__(self, *_: object) -> None:
        while self._handles:
            self._handles.pop().remove()

    @contextmanager
    def record(self, positions: int = 0, held_rows: Sequence[bool] | Tensor | None = None) -> Iterator[Recording]:
        """Record what this thread feeds through the model until the block ends.

        Args:
            positions: how many positions to expect; the buffer grows when there are more (not under `torch.compile`).
            held_rows: which rows [rows] are held; None holds none.
        """
        rows = None if held_rows is None else torch.as_tensor(held_rows, dtype=torch.bool)
        recording = Recording(positions=positions, held_rows=rows)
        thread = threading.get_ident()
        outer = self._recordings.get(thread)
        self._recordings[thread] = recording
        try:
            yield recording
        finally:
            if outer is None:
                del self._recordings[thread]
            else:
                self._recordings[thread] = outer

    def _current(self) -> Recording | None:
        if not self._recordings or self.error is not None:
            return None
        return self._recordings.get(threading.get_ident())

    def _before_forward(self, _module: nn.Module, _args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        recording = self._current()
        if recording is None:
            return
        try:
            recording.begin_forward(kwargs.get("past_key_values"))
        except Exception as error:
            self._switch_off(error)

    def _hook_for(self, layer: int) -> Any:
        def hook(_module: nn.Module, _args: tuple[Any, ...], output: Any) -> Any:
            recording = self._current()
            if recording is None:
                return None
            try:
                hidden = output[0] if isinstance(output, tuple) else output
                with full_precision(hidden.device.type):
                    changed = self._at_layer(recording, layer, hidden)
            except Exception as error:
                self._switch_off(error)
                return None
            if changed is None:
                return None
            return (changed, *output[1:]) if isinstance(output, tuple) else changed

        return hook

    def _at_layer(self, recording: Recording, layer: int, hidden: Tensor) -> Tensor | None:
        """Measure, then hold, then steer; returns the new hidden state where it changed."""
        wide = hidden.detach().float()
        if layer in self._directions and not recording.foreign:
            directions = self._directions[layer]
            measured = (
                wide if directions is None else wide @ self._moved_to("directions", layer, directions, wide.device)
            )
            recording.write(layer, measured)
        changed: Tensor | None = None
        hold = self.hold
        if hold is not None and layer in hold.layers:
            held = recording.held(wide.shape[0], wide.device)
            if held is not None:
                index = hold.layers.index(layer)
                vector = self._moved_to("hold", layer, hold.vectors[index], wide.device)
                gap = wide @ vector - hold.floors[index]
                moved = (gap < 0) & held[:, None]
                if not recording.foreign:
                    recording.write_moved(layer, moved)
                # Chosen, not multiplied by zero: what is not moved keeps its bits.
                wide = torch.where(moved[..., None], wide - gap[..., None] * vector, wide)
                changed = wide.to(hidden.dtype)
        if self.steer is not None and layer == self.steer.layer:
            vector = self._moved_to("steer", layer, self.steer.vector, wide.device)
            changed = (wide + self.steer.strength * vector).to(hidden.dtype)
        return changed

    def _moved_to(self, what: str, layer: int, tensor: Tensor, device: torch.device) -> Tensor:
        key = (what, layer, device)
        if key not in self._on_device:
            self._on_device[key] = tensor.to(device=device, dtype=torch.float32)
        return self._on_device[key]

    def _switch_off(self, error: Exception) -> None:
        self.error = error
        telemetry.TAP_ERRORS.inc()
        # The type only: a foreign error's message could hold conversation text.
        _log.error("the tap switched itself off: responses are neither measured nor held", error=type(error).__name__)


def full_precision(device_type: str) -> AbstractContextManager[Any]:
    """Autocast, where the caller has it on, would do the projection in half precision."""
    if torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()

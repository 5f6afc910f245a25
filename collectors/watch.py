"""The watch: every `generate` call of a transformers model emits one `Projection` per response.

It joins the tap, the spans and the contract, and knows neither log nor detector. Whatever goes wrong in here is counted
and logged, and the caller gets the model's answer all the same: serving never fails because it is watched.
"""

from __future__ import annotations

import contextvars
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import structlog
import torch
from numpy.typing import NDArray

from collectors.identity import Identity, derive_identity
from collectors.measure import measure_response
from collectors.models import describe_model
from collectors.publish import Publisher
from collectors.spans import assistant_header, prompt_turns, response_tokens, special_token_ids, stop_token_ids
from collectors.tap import Hold, Recording, Tap
from monitor import telemetry
from monitor.axis.bundle import Bundle, check_model
from monitor.errors import AnchorwatchError, ConfigurationError, ModelError
from monitor.events import Projection, Windows, now_utc

__all__ = ["HoldPolicy", "Watch", "watch"]

# "off", "always", or a function of the conversation id that says whether to hold it: on drift, for example.
HoldPolicy = Literal["off", "always"] | Callable[[str], bool]

_log = structlog.get_logger("anchorwatch.watch")


@dataclass(frozen=True)
class _Request:
    """What the caller says about the rows of one generate call; each entry is for all rows, or one per row."""

    conversation_id: str | Sequence[str] | None = None
    turn: int | Sequence[int] | None = None
    caller: str | Sequence[str] | None = None
    response_id: str | Sequence[str] | None = None


@contextmanager
def watch(
    model: Any,
    tokenizer: Any,
    bundle: Bundle,
    publisher: Publisher,
    *,
    installation_key: bytes | None = None,
    deployment: str | None = None,
    source: str = "anchorwatch/transformers",
    hold: HoldPolicy = "off",
    decoder_layers: str | None = None,
    clock: Callable[[], str] = now_utc,
) -> Iterator[Watch]:
    """Watch a model until the block ends.

    Args:
        model, tokenizer: a decoder-only transformers model and its tokenizer.
        bundle: the axis bundle made for exactly this model.
        publisher: takes the projections; `QueuePublisher` never blocks.
        installation_key: secret from which conversation ids are derived; without it they must be given.
        deployment: the population to be judged against; by default the model's name in the bundle.
        source: URI reference of this collector.
        hold: which conversations activation capping holds.
        decoder_layers: override, see `find_decoder_layers`.
        clock: event time of a response.

    Raises:
        BundleMismatch: the bundle was made for another model, weights, tokenizer or template.
        ModelError: the decoder layers can't be told.

    Use::

        with watch(model, tokenizer, bundle, publisher) as w:
            with w.identify(conversation_id="4711", turn=0):
                model.generate(**inputs)
    """
    for warning in check_model(bundle, describe_model(model, tokenizer)):
        _log.warning(warning)
    watching = Watch(
        model, tokenizer, bundle, publisher, installation_key, deployment, source, hold, decoder_layers, clock
    )
    original = model.generate
    with watching.tap:
        model.generate = watching.wrap(original)
        try:
            yield watching
        finally:
            # The class's own method shows again, unless somebody else had put one on the instance before.
            del model.generate
            if model.generate != original:
                model.generate = original


class Watch:
    """A watched model; made by `watch`.

    Attributes:
        tap: the tap; `tap.error` says why it switched itself off, if it did.
        emitted, unscored: responses with and without a projection so far.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        bundle: Bundle,
        publisher: Publisher,
        installation_key: bytes | None,
        deployment: str | None,
        source: str,
        hold: HoldPolicy,
        decoder_layers: str | None,
        clock: Callable[[], str],
    ) -> None:
        self.emitted = 0
        self.unscored = 0
        self._model = model
        self._tokenizer = tokenizer
        self._bundle = bundle
        self._publisher = publisher
        self._key = installation_key
        self._deployment = deployment or bundle.info.model.name
        self._source = source
        self._hold = hold
        self._clock = clock
        self._names, directions = bundle.directions()
        readout = bundle.info.readout
        weights = readout.coordinates if readout else {"assistant_axis": 1.0}
        self._readout = np.array([weights.get(name, 0.0) for name in self._names])
        self._special = special_token_ids(tokenizer)
        self._header: tuple[int, ...] | None
        try:
            self._header = assistant_header(tokenizer)
        except ModelError:
            self._header = None  # turns and conversations must be given then
        self.tap = Tap(
            model,
            {bundle.layer: torch.from_numpy(directions)},
            hold=None if hold == "off" else hold_of(bundle),
            decoder_layers=decoder_layers,
        )
        self._request: contextvars.ContextVar[_Request | None] = contextvars.ContextVar("request", default=None)

    @contextmanager
    def identify(
        self,
        *,
        conversation_id: str | Sequence[str] | None = None,
        turn: int | Sequence[int] | None = None,
        caller: str | Sequence[str] | None = None,
        response_id: str | Sequence[str] | None = None,
    ) -> Iterator[None]:
        """Say whose the generate calls in this block are; each value is for all rows, or one per row of the input.

        Args:
            conversation_id: at most 256 characters. Without it, it is derived from how the conversation began.
            turn: index of the assistant turn. Without it, it is counted in the prompt.
            caller: who asks; makes a derived conversation id trustworthy.
            response_id: the server's id of the response, for idempotency.
        """
        token = self._request.set(_Request(conversation_id, turn, caller, response_id))
        try:
            yield
        finally:
            self._request.reset(token)

    def wrap(self, generate: Callable[..., Any]) -> Callable[..., Any]:
        """`generate` with the tap open around it."""

        def watched(*args: Any, **kwargs: Any) -> Any:
            config = kwargs.get("generation_config") or self._model.generation_config
            beams = kwargs.get("num_beams", getattr(config, "num_beams", None)) or 1
            asked_dict = kwargs.get("return_dict_in_generate", getattr(config, "return_dict_in_generate", None))
            try:
                call = self._prepare(args, kwargs)
            except Exception as error:
                self._failed(error)
                return generate(*args, **kwargs)
            if beams > 1:
                kwargs["return_dict_in_generate"] = True  # only the dict says which beam a token came from
            with self.tap.record(call.positions, call.held_rows) as recording:
                output = generate(*args, **kwargs)
            try:
                self._emit(call, recording, output, stop_token_ids(self._tokenizer, config))
            except Exception as error:
                self._failed(error)
            return output.sequences if beams > 1 and not asked_dict else output

        return watched

    def _prepare(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Call:
        ids = args[0] if args else kwargs.get("inputs", kwargs.get("input_ids"))
        embeds = kwargs.get("inputs_embeds")
        prompt = ids if ids is not None else embeds
        if prompt is None:
            return _Call(0, None, None, None, 0, None)
        width = int(embeds.shape[1] if embeds is not None else prompt.shape[1])
        request = self._request.get() or _Request()
        rows = int(prompt.shape[0])
        held: list[bool] | None = None
        if self._hold == "always":
            held = [True] * rows
        elif self._hold != "off":
            names = [_of_row(request.conversation_id, row, rows) for row in range(rows)]
            # A conversation whose name is not known yet has not drifted yet.
            held = [name is not None and self._hold(name) for name in names]
        more = kwargs.get("max_new_tokens") or 0
        return _Call(width + more, ids, kwargs.get("attention_mask"), held, width, request)

    def _emit(self, call: _Call, recording: Recording, output: Any, stop: frozenset[int]) -> None:
        sequences = output if isinstance(output, torch.Tensor) else output.sequences
        beam_indices = None if isinstance(output, torch.Tensor) else getattr(output, "beam_indices", None)
        start = call.width if call.ids is not None else 0  # embedded prompts are not part of the sequences
        generated = sequences[:, start:].cpu().numpy()
        values = recording.values.get(self._bundle.layer)
        if self.tap.error is not None or values is None:
            for _ in generated:
                self._unscored("tap_error")
            return
        at_prompt, spoken, moved = _gather(recording, values, call, generated.shape[1], beam_indices, len(generated))
        inputs = call.ids.shape[0] if call.ids is not None else len(generated)
        for row, ids in enumerate(generated):
            end, counted = response_tokens(ids, stop, self._special)
            counted &= ~np.isnan(spoken[row, :end]).all(axis=1) if beam_indices is not None else True
            measured = measure_response(spoken[row, :end], counted, self._readout)
            if measured is None or not np.isfinite(at_prompt[row]).all():
                self._unscored("empty" if not counted.any() else "not_finite")
                continue
            source_row = row * inputs // len(generated)
            choice = row - source_row * (len(generated) // inputs)
            identity = self._identity(call, source_row, inputs, ids[:end], stop)
            if identity is None:
                self._unscored("unidentified")
                continue
            given = _of_row(call.request.response_id, source_row, inputs) if call.request else None
            projection = Projection(
                id=f"{given or uuid.uuid4().hex}-{choice}",
                time=self._clock(),
                source=self._source,
                conversation_id=identity.conversation_id,
                turn=identity.turn,
                model=self._bundle.info.model.name,
                axis_id=self._bundle.id,
                layer=self._bundle.layer,
                deployment=self._deployment,
                projection=float(measured.mean[self._names.index("assistant_axis")]),
                coordinates=self._named(measured.mean),
                prompt=self._named(at_prompt[row]),
                windows=Windows(lowest=self._named(measured.lowest_window), last=self._named(measured.last_window)),
                tokens=measured.tokens,
                held=float(moved[row, :end][counted].mean()),
                attributes={"identity": identity.certainty, "finish_reason": "stop" if end < len(ids) else "length"},
            )
            if self._publisher.publish(projection):
                self.emitted += 1

    def _identity(
        self, call: _Call, row: int, rows: int, reply: NDArray[np.int64], stop: frozenset[int]
    ) -> Identity | None:
        request = call.request or _Request()
        given, turn = _of_row(request.conversation_id, row, rows), _of_row(request.turn, row, rows)
        if given is not None and turn is not None:
            return Identity(given, turn, "given")
        if call.ids is None or self._header is None:
            return None
        prompt = call.ids[row]
        if call.mask is not None:
            prompt = prompt[call.mask[row].bool()]
        prompt_ids = prompt.tolist()
        if given is not None:
            return Identity(given, prompt_turns(prompt_ids, self._header, stop)[2], "given")
        if self._key is None:
            return None
        return derive_identity(
            prompt_ids,
            reply.tolist(),
            tokenizer=self._tokenizer,
            header=self._header,
            stop=stop,
            key=self._key,
            caller=_of_row(request.caller, row, rows),
        )

    def _named(self, values: NDArray[np.floating]) -> dict[str, float]:
        # Seven digits are what a float32 activation has; more would only be bytes on the wire.
        return {name: float(f"{value:.7g}") for name, value in zip(self._names, values, strict=True)}

    def _failed(self, error: Exception) -> None:
        self._unscored("error")
        # Of a foreign error the type only: its message could hold conversation text.
        told = str(error) if isinstance(error, AnchorwatchError) else type(error).__name__
        _log.error("a generate call could not be measured", error=told)

    def _unscored(self, reason: str) -> None:
        self.unscored += 1
        telemetry.RESPONSES_UNSCORED.labels(reason).inc()


@dataclass(frozen=True)
class _Call:
    """One generate call: positions to expect, prompt ids [rows, width], mask, rows to hold, what was said of it."""

    positions: int
    ids: Any
    mask: Any
    held_rows: list[bool] | None
    width: int
    request: _Request | None


def hold_of(bundle: Bundle) -> Hold:
    """What activation capping holds, as the bundle says: the unit axis and its floor at each of `hold_layers`."""
    layers = tuple(range(*bundle.info.hold_layers))
    return Hold(
        layers=layers,
        vectors=torch.stack([torch.from_numpy(bundle.unit_axis(layer).copy()) for layer in layers]),
        floors=tuple(float(bundle.tensors["floors"][layer]) for layer in layers),
    )


def _of_row(value: Any, row: int, rows: int) -> Any:
    """The entry of one row, where one value may stand for all rows."""
    if value is None or isinstance(value, (str, int)):
        return value
    if len(value) != rows:
        raise ConfigurationError(
            f"{len(value)} values were given for {rows} rows", cure="give one for each row, or one for all"
        )
    return value[row]


def _gather(
    recording: Recording, values: Any, call: _Call, generated: int, beam_indices: Any, rows: int
) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.bool_]]:
    """Copy off the device: at the last prompt token [rows, k], at each generated token [rows, generated, k], and which
    of those holding moved [rows, generated]. Tokens that were never fed are NaN."""
    device, width = values.device, call.width
    moved = torch.zeros(values.shape[:2], dtype=torch.bool, device=device)
    for at_layer in recording.moved.values():
        moved[:, : at_layer.shape[1]] |= at_layer.to(device)[:, : moved.shape[1]]
    last = torch.full((rows,), width - 1, device=device)
    if call.mask is not None:  # padded on the right: the last prompt token stands before the padding
        places = torch.arange(call.mask.shape[1], device=call.mask.device)
        last = (call.mask * places).argmax(dim=1).to(device).repeat_interleave(rows // call.mask.shape[0])
    columns = torch.arange(width, width + generated, device=device).expand(rows, -1)
    row_of = torch.arange(rows, device=device)[:, None].expand(rows, generated)
    fed = columns < values.shape[1]
    prompt_row = row_of[:, 0] if generated else torch.arange(rows, device=device)
    if beam_indices is not None:
        # A beam's token `t` was fed in the row from which its token `t + 1` was then chosen.
        chosen = torch.full((rows, generated), -1, dtype=torch.long, device=device)
        known = beam_indices.to(device)[:, 1 : generated + 1]
        chosen[:, : known.shape[1]] = known
        fed = fed & (chosen >= 0)
        row_of = chosen.clamp(min=0)
        prompt_row = beam_indices.to(device)[:, 0].clamp(min=0)
    columns = columns.clamp(max=values.shape[1] - 1)
    spoken = values[row_of, columns]
    spoken = torch.where(fed[..., None], spoken, torch.nan)
    packed = torch.cat([values[prompt_row, last][:, None], spoken], dim=1).float().cpu().numpy()
    return packed[:, 0], packed[:, 1:], (moved[row_of, columns] & fed).cpu().numpy()

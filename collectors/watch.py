"""The watch: every `generate` call of a transformers model emits one `Projection` per response.

It joins the tap, the spans and the contract, and knows neither log nor detector. Whatever goes wrong in here is counted
and logged, and the caller gets the model's answer all the same: serving never fails because it is watched.
"""

from __future__ import annotations

import contextvars
import functools
import threading
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal

import numpy as np
import structlog
import torch
from numpy.typing import NDArray

from collectors.calls import Gathered, GenerateCall, adapted, gather, read_call, sequences_of
from collectors.identity import ChatMarks, Identity, chat_marks, derive_identity, prompt_turn
from collectors.instrument import Instrument
from collectors.measure import measure_response
from collectors.models import describe_model
from collectors.publish import Publisher
from collectors.spans import response_tokens, special_token_ids
from collectors.tap import Hold, Recording, Tap
from monitor import telemetry
from monitor.axis.bundle import Bundle, check_model
from monitor.errors import AnchorwatchError, ConfigurationError, ModelError
from monitor.events import now_utc

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


_NOTHING_SAID = _Request()


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
    """Watch `model.generate` until the block ends.

    Compiled models give the same numbers, but their graphs break at the hooks, and are compiled anew when the watch
    begins; a forward that was compiled with `fullgraph=True` refuses to run then. What does not go through `generate`,
    such as `generate_batch`, is not seen.

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
    model = getattr(model, "_orig_mod", model)  # `torch.compile(model)` generates with the model inside
    for warning in check_model(bundle, describe_model(model, tokenizer)):
        _log.warning(warning)
    telemetry.AXIS_CREATED.labels(bundle.id).set(datetime.fromisoformat(bundle.info.created).timestamp())
    watching = Watch(
        model, tokenizer, bundle, publisher, installation_key, deployment, source, hold, decoder_layers, clock
    )
    # Graphs that were compiled before know nothing of our hooks, and torch does not look for new ones: compile anew.
    torch.compiler.reset()
    before = model.__dict__.get("generate")  # None where only the class has one
    watched = watching.wrap(model.generate)
    with watching.tap:
        model.generate = watched
        try:
            yield watching
        finally:
            watching.open = False
            # Somebody may have put another one over it meanwhile, which calls ours: then ours just passes on.
            if model.__dict__.get("generate") is watched:
                if before is None:
                    del model.generate
                else:
                    model.generate = before


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
        self.open = True
        self._counting = threading.Lock()
        self._model = model
        self._tokenizer = tokenizer
        self._bundle = bundle
        self._publisher = publisher
        self._key = installation_key
        self._deployment = deployment or bundle.info.model.name
        self._source = source
        self._hold = hold
        self._clock = clock
        self._instrument = Instrument(bundle)
        self._special = special_token_ids(tokenizer)
        self._marks: ChatMarks | None
        try:
            self._marks = chat_marks(tokenizer)
        except ModelError as error:
            self._marks = None
            _log.warning(error.problem, cure=error.cure)
        self.tap = Tap(
            model,
            {bundle.layer: torch.from_numpy(self._instrument.directions)},
            hold=None if hold == "off" else hold_of(bundle),
            decoder_layers=decoder_layers,
        )
        self._request: contextvars.ContextVar[_Request | None] = contextvars.ContextVar("request", default=None)
        # The recording of the call under way in this thread: a draft model may be the model itself.
        self._outer: contextvars.ContextVar[Recording | None] = contextvars.ContextVar("outer", default=None)

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

        It holds in this thread: to generate in another one, call `contextvars.copy_context().run` there.

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

        @functools.wraps(generate)
        def watched(*args: Any, **kwargs: Any) -> Any:
            if not self.open:
                return generate(*args, **kwargs)
            outer = self._outer.get()
            if outer is not None:  # a draft within a generate call is no response
                with self.tap.record(0, outer.held_rows):
                    return generate(*args, **kwargs)
            try:
                call = read_call(self._model, self._tokenizer, args, kwargs)
                if call.supported:
                    args, kwargs = adapted(call, args, kwargs)
            except Exception as error:
                self._failed(error)
                return generate(*args, **kwargs)
            with self.tap.record(call.width + call.limit, self._held_rows(call)) as recording:
                token = self._outer.set(recording)
                try:
                    output = generate(*args, **kwargs)
                finally:
                    self._outer.reset(token)
            try:
                self._emit(call, recording, output)
            except Exception as error:
                self._failed(error, call.rows)
            return output.sequences if call.beams > 1 and call.supported and not call.wants_dict else output

        return watched

    def _held_rows(self, call: GenerateCall) -> list[bool] | None:
        """Which rows are held; None where none is, so that nothing is computed for it."""
        if self._hold == "off":
            return None
        if self._hold == "always":
            return [True] * call.rows
        held = []
        for row in range(call.rows):
            try:
                identity = self._identity(call, row, None)
                # A conversation that has no name yet has not drifted yet.
                held.append(identity is not None and identity.certainty != "unlinked" and self._held(identity))
            except Exception as error:
                held.append(False)
                _log.error("it can't be told whether to hold a conversation: it is not held", error=_told(error))
        return held if any(held) else None

    def _held(self, identity: Identity) -> bool:
        return callable(self._hold) and bool(self._hold(identity.conversation_id))

    def _emit(self, call: GenerateCall, recording: Recording, output: Any) -> None:
        sequences = sequences_of(call, output)
        if not call.supported or sequences is None:
            self._unscored("unsupported", call.rows)
            return
        if self.tap.error is not None or self._bundle.layer not in recording.values:
            self._unscored("tap_error", len(sequences))
            return
        gathered = gather(call, recording, self._bundle.layer, output, sequences)
        for response, ids in enumerate(sequences[:, call.start :].cpu().numpy()):
            try:
                self._emit_response(call, gathered, response, len(sequences), ids)
            except Exception as error:
                self._failed(error)

    def _emit_response(
        self, call: GenerateCall, gathered: Gathered, response: int, responses: int, ids: NDArray[np.int64]
    ) -> None:
        row, choice = divmod(response, responses // call.rows)
        end, counted = response_tokens(ids, call.stop, self._special)
        counted &= gathered.followed[response, :end]
        if not counted.any():
            return self._unscored("empty")
        measured = measure_response(gathered.spoken[response, :end], counted, self._instrument.readout)
        at_prompt = gathered.prompt[response]
        if measured is None or not np.isfinite(at_prompt).all():
            return self._unscored("not_finite")
        identity = self._identity(call, row, ids[:end].tolist())
        if identity is None:
            return self._unscored("unidentified")
        given = _of_row((self._request.get() or _NOTHING_SAID).response_id, row, call.rows)
        projection = self._instrument.projection(
            measured,
            at_prompt,
            id=f"{given or uuid.uuid4().hex}-{choice}",
            time=self._clock(),
            source=self._source,
            conversation_id=identity.conversation_id,
            turn=identity.turn,
            model=self._bundle.info.model.name,
            deployment=self._deployment,
            held=float(gathered.moved[response, :end][counted].mean()),
            attributes={
                "identity": identity.certainty,
                "finish_reason": "length" if end == len(ids) >= call.limit else "stop",
            },
        )
        if self._publisher.publish(projection):
            with self._counting:
                self.emitted += 1
        return None

    def _identity(self, call: GenerateCall, row: int, reply: list[int] | None) -> Identity | None:
        """Whose response a row's is; None where it can't be told, or not before the reply is there."""
        request = self._request.get() or _NOTHING_SAID
        given, turn = _of_row(request.conversation_id, row, call.rows), _of_row(request.turn, row, call.rows)
        if given is not None and turn is not None:
            return Identity(given, turn, "given")
        prompt = call.prompt(row)
        if prompt is None or self._marks is None:
            return None
        if given is not None:
            return Identity(given, prompt_turn(self._tokenizer, prompt, self._marks), "given")
        if self._key is None:
            return None
        return derive_identity(
            prompt,
            reply,
            tokenizer=self._tokenizer,
            marks=self._marks,
            key=self._key,
            caller=_of_row(request.caller, row, call.rows),
        )

    def _failed(self, error: Exception, responses: int = 1) -> None:
        self._unscored("error", responses)
        _log.error("a response could not be measured", error=_told(error))

    def _unscored(self, reason: str, responses: int = 1) -> None:
        with self._counting:
            self.unscored += responses
        telemetry.RESPONSES_UNSCORED.labels(reason).inc(responses)


def hold_of(bundle: Bundle) -> Hold:
    """What activation capping holds, as the bundle says: the unit axis and its floor at each of `hold_layers`."""
    layers = tuple(range(*bundle.info.hold_layers))
    return Hold(
        layers=layers,
        vectors=torch.stack([torch.from_numpy(bundle.unit_axis(layer).copy()) for layer in layers]),
        floors=tuple(float(bundle.tensors["floors"][layer]) for layer in layers),
    )


def _told(error: Exception) -> str:
    # Of a foreign error the type only: its message could hold conversation text.
    return str(error) if isinstance(error, AnchorwatchError) else type(error).__name__


def _of_row(value: Any, row: int, rows: int) -> Any:
    """The entry of one row, where one value may stand for all rows."""
    if value is None or isinstance(value, (str, int)):
        return value
    if len(value) != rows:
        raise ConfigurationError(
            f"{len(value)} values were given for {rows} rows", cure="give one for each row, or one for all"
        )
    return value[row]

"""The witness: a model of our own reads logged conversations, and every reply in them becomes a `Projection`.

It knows encoded text, one model and one bundle; neither files nor verdicts. The model is teacher-forced over the text,
so that the log may be any model's, also one whose weights nobody has. What it says is what the watch would have said,
had the witness itself been talking.

**One pass.** Where the chat template is prefix-stable, one forward pass scores all replies of a conversation; where it
is not, each reply has a pass of its own, and the conversation's origin says so. A pass ends at the bundle's layer: no
later layer runs, no logits are made, and nothing but the measured directions of each token leaves the device.

**Long conversations.** What is longer than `context` tokens is read through windows of that many tokens, which begin
every half of it: in the first one every token is read, in each later one those with at least half of `context` before
them. So every token is read once, in its first window that gives it that much past. Replies within the first `context`
tokens get exactly what one long pass gives them; later ones are read without what was said before their window began,
and the origin says that, too.

**What it can't know.** A reply that was cut by a length limit looks whole in a log: its last token counts here, where
the watch does not count it (`collectors/spans.py`). And text is encoded anew: where the model had said the same text in
other tokens, the numbers differ a little.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any, NamedTuple

import jinja2
import msgspec
import numpy as np
import torch
from msgspec import Struct
from numpy.typing import NDArray
from torch import Tensor

from collectors.instrument import Instrument
from collectors.layers import find_decoder_layers
from collectors.measure import measure_response
from collectors.models import LoadedModel, describe_model, load_model
from collectors.spans import encode_conversation, encode_reply, reply_tokens, special_token_ids, stop_token_ids
from collectors.tap import full_precision
from monitor.axis.bundle import Bundle, check_model, load_bundle, resolve_bundle
from monitor.errors import AnchorwatchError, ConfigurationError, EventError, ModelError
from monitor.events import Projection
from monitor.origin import Origin, Skipped

if TYPE_CHECKING:
    from collectors.logs import Logged

__all__ = ["Residual", "Shard", "Window", "Witness", "load_witness", "windows"]

SOURCE = "anchorwatch/witness"
CONTEXT = 4096
BATCH_TOKENS = 4096
# Less past than this says too little; also where a model can't take it, or memory is short.
NARROWEST = 64
# Raise it when the same settings and text come to give other rows: what was scored before is then scored again.
RULES = 1
NO_TIME = "1970-01-01T00:00:00Z"


class Shard(Struct, frozen=True, kw_only=True):
    """Some consecutive conversations of one log, scored.

    Attributes:
        digest: sha256 hex digest of what was read, and of what it was read with: equal digests, equal rows.
        origins: the conversations, in the log's order, scored or not.
        projections: by conversation in that order, then by turn.
        skipped: records and replies that have no projection, in that order, too.
        notes: what went otherwise than it should have, in words.
    """

    digest: str
    origins: list[Origin]
    projections: list[Projection]
    skipped: list[Skipped]
    notes: list[str]


class Residual(NamedTuple):
    """The residual stream of one reply, raw units: its mean over the reply, and its value at the last prompt token.

    Both have shape [hidden]; `turn` is the index of the assistant turn.
    """

    conversation_id: str
    turn: int
    reply: NDArray[np.float32]
    prompt: NDArray[np.float32]


@dataclass(frozen=True)
class Window:
    """A stretch of tokens [start, stop) that is fed, of which [first, stop) is read."""

    start: int
    stop: int
    first: int


def windows(length: int, context: int) -> list[Window]:
    """Windows that read each of `length` tokens once, feeding at most `context` (at least 2) at a time, in order."""
    step = context // 2
    found = [Window(0, min(length, context), 0)]
    while found[-1].stop < length:
        start = found[-1].start + step
        found.append(Window(start, min(length, start + context), found[-1].stop))
    return found


@dataclass(eq=False)
class _Reading:
    """Ids to be fed, in one conversation, and the replies to be read in them.

    Attributes:
        conversation: which one of the shard.
        replies: per reply, its turn, its [start, end) in the whole encoded text, and which of its tokens count.
        first, length: the tokens [first, length) of the whole text are to be read.
        base, ids: the ids from `base` on; what lies before it is never fed.
        context: most tokens at a time.
        values: what was read, [length - first, k]; NaN where nothing has been yet.
        note: how it came to be encoded, where that is to be said.
        narrowed: whether `context` had to be halved, because memory did not suffice.
    """

    conversation: int
    replies: list[tuple[int, tuple[int, int], NDArray[np.bool_]]]
    first: int
    length: int
    base: int
    ids: list[int]
    context: int
    values: NDArray[np.float32]
    note: str = ""
    narrowed: bool = False

    @property
    def notes(self) -> list[str]:
        """What its conversation's origin has to say of it."""
        slid = f"read through sliding windows of {self.context} tokens" if self.length > self.context else ""
        return [note for note in (self.note, f"out of memory: {slid}" if self.narrowed else slid) if note]

    def windows(self) -> list[Window]:
        """The windows in which something is to be read."""
        return [window for window in windows(self.length, self.context) if window.stop > self.first]


@dataclass(frozen=True, eq=False)
class _Row:
    """One row of a batch."""

    reading: _Reading
    window: Window

    def __len__(self) -> int:
        return self.window.stop - self.window.start


class Witness:
    """A model that reads conversations; made once, asked many times.

    Args:
        loaded: the model, on the device and in the dtype in which it is to read; it is put into evaluation mode.
        bundle: the axis bundle made for exactly this model.
        context: most tokens in one pass; no more than the model's own limit is used.
        batch_tokens: most tokens in a batch, padding included, save where one row alone has more.
        decoder_layers: override, see `find_decoder_layers`.

    Raises:
        BundleMismatch: the bundle was made for another model, weights, tokenizer or template.
        ConfigurationError: `context` or `batch_tokens` is too small.
        ModelError: the decoder layers can't be told.

    Attributes:
        context: as it is used.
        warnings: what is to be known of bundle and model; every shard's notes begin with them.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        bundle: Bundle,
        *,
        context: int = CONTEXT,
        batch_tokens: int = BATCH_TOKENS,
        decoder_layers: str | None = None,
    ) -> None:
        self._model = getattr(loaded.model, "_orig_mod", loaded.model).eval()
        self._tokenizer = loaded.tokenizer
        self.warnings = check_model(bundle, describe_model(self._model, self._tokenizer, name=loaded.facts.name))
        limit = getattr(self._model.config.get_text_config(decoder=True), "max_position_embeddings", None) or context
        self.context = min(context, limit)
        if self.context < NARROWEST or batch_tokens < 1:
            raise ConfigurationError(
                f"context {self.context} or batch_tokens {batch_tokens} is too small",
                cure=f"give at least {NARROWEST} tokens of context (the model takes {limit}) and one of a batch",
            )
        self.batch_tokens = batch_tokens
        self._layers = find_decoder_layers(self._model, decoder_layers)
        self._layer = self._layers[bundle.layer]
        self._instrument = Instrument(bundle)
        self._directions = torch.from_numpy(self._instrument.directions.copy()).to(self._model.device)
        self._stop = stop_token_ids(self._tokenizer, self._model.generation_config)
        self._special = special_token_ids(self._tokenizer)
        self._vocabulary = self._model.get_input_embeddings().num_embeddings
        settings = [RULES, bundle.id, str(self._model.dtype), self.context, self.batch_tokens, decoder_layers]
        self._settings = json.dumps(settings).encode()

    def digest(self, items: Sequence[Logged | Skipped]) -> str:
        """The digest of the shard that these will give, without scoring them."""
        found = hashlib.sha256(self._settings)
        for item in items:
            # Not msgspec's own JSON: a log may hold half a surrogate pair, which no UTF-8 can.
            found.update(json.dumps(msgspec.to_builtins(item), sort_keys=True).encode() + b"\n")
        return found.hexdigest()

    def score(self, conversations: Sequence[Logged | Skipped]) -> Shard:
        """Score all replies. What can't be scored is skipped, with its reason, and nothing else is lost by it.

        The same conversations in the same order are batched in the same way, and so give the same rows to the bit (on
        the same machine, with as many threads). Where memory did not suffice, the notes say what was done.

        Args:
            conversations: of one log; records that its reader skipped stay in their places.

        Raises:
            ModelError: the model's pass does not come to the bundle's layer.
        """
        skipped: list[list[Skipped]] = []
        readings: list[_Reading] = []
        for place, item in enumerate(conversations):
            if isinstance(item, Skipped):
                skipped.append([item])
            else:
                found, refused = self._encoded(place, item)
                readings += found
                skipped.append(refused)
        notes = list(self.warnings)
        self._read(readings, notes)
        projections: list[list[Projection]] = [[] for _ in conversations]
        said: list[list[str]] = [[] for _ in conversations]
        for reading in readings:
            item = conversations[reading.conversation]
            assert not isinstance(item, Skipped)
            said[reading.conversation] += [note for note in reading.notes if note not in said[reading.conversation]]
            for turn, span, counted in reading.replies:
                result = self._projection(item, reading, turn, span, counted)
                if isinstance(result, Projection):
                    projections[reading.conversation].append(result)
                else:
                    skipped[reading.conversation].append(result)
        return Shard(
            digest=self.digest(conversations),
            origins=[
                msgspec.structs.replace(item.origin, notes=(*item.origin.notes, *said[place]))
                for place, item in enumerate(conversations)
                if not isinstance(item, Skipped)
            ],
            projections=[p for found in projections for p in sorted(found, key=lambda projection: projection.turn)],
            skipped=[
                s for found in skipped for s in sorted(found, key=lambda one: -1 if one.turn is None else one.turn)
            ],
            notes=notes,
        )

    def residuals(self, conversations: Sequence[Logged], layer: int | None = None) -> list[Residual]:
        """The residual stream, whole, for those who look for new directions in it.

        Args:
            layer: by default the bundle's.

        Returns:
            By conversation in their order, then by turn; replies that can't be scored are left out.

        Raises:
            ModelError: as `score`.
        """
        usual = self._directions, self._layer
        self._directions = torch.eye(len(usual[0]), device=usual[0].device)
        self._layer = self._layers[layer] if layer is not None else self._layer
        try:
            readings = [one for place, item in enumerate(conversations) for one in self._encoded(place, item)[0]]
            self._read(readings, [])
        finally:
            self._directions, self._layer = usual
        found = []
        for reading in readings:
            for turn, (start, end), counted in reading.replies:
                values = reading.values[start - reading.first : end - reading.first][counted]
                at_prompt = reading.values[start - 1 - reading.first]
                if np.isfinite(values).all() and np.isfinite(at_prompt).all():
                    id = conversations[reading.conversation].origin.conversation_id
                    found.append((reading.conversation, Residual(id, turn, values.mean(axis=0), at_prompt.copy())))
        return [residual for _, residual in sorted(found, key=lambda one: (one[0], one[1].turn))]

    # From messages to what is fed

    def _encoded(self, place: int, conversation: Logged) -> tuple[list[_Reading], list[Skipped]]:
        messages = conversation.messages
        replies = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
        turn_of = {index: turn for turn, index in enumerate(replies)}
        if not replies:
            return [], [_skipped(conversation, None, "the assistant says nothing in it")]
        asked = [index for index in replies if index > 0]
        refused = [_skipped(conversation, 0, "nothing was said before this reply")] if replies[0] == 0 else []
        readings: list[_Reading] = []

        def add(index_of: Sequence[int], ids: list[int], spans: Sequence[tuple[int, int]], note: str) -> None:
            turns = [turn_of[index] for index in index_of]
            reading, left = self._reading(place, conversation, turns, ids, spans)
            refused.extend(left)
            if reading is not None:
                reading.note = note
                readings.append(reading)

        try:
            whole = encode_conversation(self._tokenizer, messages, asked)
            add(asked, whole.ids, whole.spans, "")
        except Exception as error:  # a template may raise anything: it is a program, and not ours
            note = f"scored turn by turn: {_why(error)}"
            for index in asked:
                try:
                    one = encode_reply(self._tokenizer, messages[: index + 1])
                    add([index], one.ids, one.spans, note)
                except Exception as refusal:
                    refused.append(_skipped(conversation, turn_of[index], _why(refusal)))
        return readings, refused

    def _reading(
        self,
        place: int,
        conversation: Logged,
        turns: Sequence[int],
        ids: list[int],
        spans: Sequence[tuple[int, int]],
    ) -> tuple[_Reading | None, list[Skipped]]:
        refused, replies = [], []
        for turn, (start, end) in zip(turns, spans, strict=True):
            counted = reply_tokens(ids, (start, end), self._stop, self._special)
            if start == 0 or not counted.any():
                refused.append(_skipped(conversation, turn, "no token of this reply can be scored"))
            else:
                replies.append((turn, (start, end), counted))
        if not replies:
            return None, refused
        first = min(start for _, (start, _), _ in replies) - 1
        length = max(end for _, (_, end), _ in replies)
        if max(ids[:length]) >= self._vocabulary:
            reason = "the tokenizer gives a token that the model does not have"
            return None, refused + [_skipped(conversation, turn, reason) for turn, _, _ in replies]
        values = np.full((length - first, self._directions.shape[1]), np.nan, dtype=np.float32)
        reading = _Reading(place, replies, first, length, 0, [], self.context, values)
        reading.base = reading.windows()[0].start
        reading.ids = ids[reading.base : length]
        return reading, refused

    # From what is fed to values

    def _read(self, readings: Sequence[_Reading], notes: list[str]) -> None:
        """Feed everything, the longest rows first, and fill in the values."""
        rows = _by_length(_Row(reading, window) for reading in readings for window in reading.windows())
        budget = self.batch_tokens
        while rows:
            batch = rows[: _fitting(rows, budget)]
            try:
                self._read_batch(batch)
            except torch.OutOfMemoryError:
                pass  # handled below, when the frames that hold the memory are gone
            else:
                rows = rows[len(batch) :]
                continue
            if self._model.device.type == "cuda":
                torch.cuda.empty_cache()
            if len(batch) > 1:
                budget = len(batch) * len(batch[0]) // 2
                notes.append(f"out of memory: went on with batches of {budget} tokens")
                continue
            reading = batch[0].reading
            rows = [row for row in rows if row.reading is not reading]
            reading.context, reading.narrowed = len(batch[0]) // 2, True
            if reading.context < NARROWEST:
                continue
            rows = _by_length([*rows, *(_Row(reading, window) for window in reading.windows())])

    def _read_batch(self, batch: Sequence[_Row]) -> None:
        ids, mask = self.padded([row.reading.ids[_inside(row)] for row in batch])
        values = self._forward(ids, mask).cpu().numpy()
        for row, found in zip(batch, values, strict=True):
            reading, window = row.reading, row.window
            first = max(window.first, reading.first)
            read = found[first - window.start : window.stop - window.start]
            reading.values[first - reading.first : window.stop - reading.first] = read

    def padded(self, rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """Rows of ids, padded on the right, and their attention mask, [rows, width] each, on the device."""
        width = max(map(len, rows))
        filler = self._tokenizer.pad_token_id or 0
        ids = torch.tensor([[*row, *[filler] * (width - len(row))] for row in rows])
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
        return ids.to(self._model.device), mask.to(self._model.device)

    def batches(self, conversations: Sequence[Logged | Skipped]) -> list[list[list[int]]]:
        """The ids of every row of every batch in which `score` feeds these conversations, where memory suffices."""
        found = [
            reading
            for place, item in enumerate(conversations)
            if not isinstance(item, Skipped)
            for reading in self._encoded(place, item)[0]
        ]
        rows = _by_length(_Row(reading, window) for reading in found for window in reading.windows())
        made = []
        while rows:
            size = _fitting(rows, self.batch_tokens)
            made.append([row.reading.ids[_inside(row)] for row in rows[:size]])
            rows = rows[size:]
        return made

    def _forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """The directions at every token, [rows, width, k] in float32, on the device."""
        read: list[Tensor] = []

        def at_layer(_module: object, _args: object, output: Any) -> None:
            hidden = output[0] if isinstance(output, tuple) else output
            with full_precision(hidden.device.type):
                read.append(hidden.float() @ self._directions.to(hidden.device))
            raise _Reached

        handle = self._layer.register_forward_hook(at_layer, prepend=True)
        try:
            with torch.inference_mode():
                self._model(input_ids=ids, attention_mask=mask, use_cache=False)
        except _Reached:
            return read[0]
        finally:
            handle.remove()
        raise ModelError(
            "the model's pass did not come to the layer that the bundle measures",
            cure='pass decoder_layers="dotted.name.of.the.list" (on the command line: --decoder-layers)',
        )

    # From values to events

    def _projection(
        self,
        conversation: Logged,
        reading: _Reading,
        turn: int,
        span: tuple[int, int],
        counted: NDArray[np.bool_],
    ) -> Projection | Skipped:
        start, end = (place - reading.first for place in span)
        if reading.context < NARROWEST:
            return _skipped(conversation, turn, "out of memory, however little of it is read at a time")
        measured = measure_response(reading.values[start:end], counted, self._instrument.readout)
        at_prompt = reading.values[start - 1]
        if measured is None or not np.isfinite(at_prompt).all():
            return _skipped(conversation, turn, "the model's values are not finite")
        origin = conversation.origin
        try:
            return self._instrument.projection(
                measured,
                at_prompt,
                id=_event_id(origin, turn),
                time=_time(conversation.time, turn),
                source=SOURCE,
                conversation_id=origin.conversation_id,
                turn=turn,
                model=origin.deployment,
                deployment=origin.deployment,
            )
        except (EventError, ValueError) as error:
            return _skipped(conversation, turn, f"it makes no valid event: {_why(error)}")


def load_witness(
    model: str,
    bundle: str,
    *,
    dtype: str = "float32",
    device: str | None = None,
    context: int = CONTEXT,
    batch_tokens: int = BATCH_TOKENS,
    decoder_layers: str | None = None,
) -> Witness:
    """A witness by name: `functools.partial(load_witness, "smollm2", "smollm2")` can be sent to other processes.

    Raises:
        AnchorwatchError: as `load_model`, `load_bundle` and `Witness` do.
    """
    read = load_bundle(resolve_bundle(bundle))
    loaded = load_model(model, dtype=dtype, device=device)
    return Witness(loaded, read, context=context, batch_tokens=batch_tokens, decoder_layers=decoder_layers)


class _Reached(Exception):
    """Ends a pass at the layer that is read."""


def _by_length(rows: Any) -> list[_Row]:
    """Longest first, so that a batch that is too large for the memory is found at once; else in the given order."""
    return sorted(rows, key=lambda row: -len(row))


def _fitting(rows: Sequence[_Row], budget: int) -> int:
    """How many of the rows, longest first, make one batch."""
    return min(len(rows), max(1, budget // len(rows[0])))


def _inside(row: _Row) -> slice:
    return slice(row.window.start - row.reading.base, row.window.stop - row.reading.base)


def _skipped(conversation: Logged, turn: int | None, reason: str) -> Skipped:
    origin = conversation.origin
    return Skipped(
        source=origin.source,
        record=origin.record,
        reason=reason,
        conversation_id=origin.conversation_id,
        turn=turn,
    )


def _why(error: Exception) -> str:
    """In words, without text of the conversation, which a foreign error's message could hold."""
    if isinstance(error, AnchorwatchError):
        return error.problem
    if type(error) is jinja2.TemplateError:  # what a template's author had to say
        return f"the chat template refuses it: {error.message}"
    return f"it can't be encoded: {type(error).__name__}"


def _event_id(origin: Origin, turn: int) -> str:
    """The same in every audit of the same log, and unique in it, also where conversation ids repeat."""
    return hashlib.sha256(
        f"{origin.source}\x1f{origin.record}\x1f{turn}".encode("utf-8", "surrogateescape")
    ).hexdigest()[:32]


def _time(began: str | None, turn: int) -> str:
    """Event time of a turn: logs seldom have it, so the turns follow each other by a second."""
    try:
        at = datetime.fromisoformat(began or NO_TIME) + timedelta(seconds=turn)
    except OverflowError:
        at = datetime.fromisoformat(NO_TIME) + timedelta(seconds=turn)
    return at.isoformat().replace("+00:00", "Z")

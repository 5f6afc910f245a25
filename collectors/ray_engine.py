"""Spreads work on pieces of files over processes and machines with Ray Data. It knows Ray, and not what the work is.

Every file is read by one task that makes its pieces one by one, and no faster than they are worked on; so memory stays
the same however many there are. Each actor makes its worker once. Results come back in the order of files and pieces.
"""

from __future__ import annotations

import logging
import os
import pickle
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

from monitor.errors import AnchorwatchError, ConfigurationError

__all__ = ["spread"]

Result = TypeVar("Result")
_END = b""  # in place of a piece: the file has no more
# CPUs that a worker and a reading task are booked for: so there can be as many workers as CPUs, and room to read.
WORKING, READING = 0.9, 0.1
QUIET = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_BACKEND_LOG_LEVEL": "fatal"}


def spread(
    files: Sequence[str],
    pieces: Callable[[str], Iterator[Any]],
    worker: Callable[[], Callable[[Any], Result]],
    *,
    actors: int,
) -> Iterator[Result]:
    """`worker()(piece)` for every piece of every file.

    Where Ray is not running in this process, it joins the cluster that RAY_ADDRESS names, or else starts one on this
    machine and stops it in the end.

    Args:
        files: read in any order, a few at a time.
        pieces: makes the pieces of a file; it can be pickled, as can they and the results.
        worker: makes what works on a piece; called once in each actor.
        actors: how many.

    Raises:
        ConfigurationError: Ray is not installed, or the cluster is too small.
        AnchorwatchError: what a piece or worker raised; or a machine or process was lost for good.
    """
    try:
        import ray
    except ImportError as error:
        raise ConfigurationError(
            "the Ray engine needs Ray, which is not installed",
            cure="pip install 'anchorwatch[ray]', or use the local engine",
        ) from error
    with _running(ray, actors):
        resources = ray.cluster_resources()
        cpus, gpus = resources.get("CPU", 0.0), resources.get("GPU", 0.0)
        if cpus < actors * WORKING + READING:  # Ray would wait for more, for ever
            raise ConfigurationError(
                f"{actors} actors are too many for a Ray cluster with {cpus:g} CPUs", cure="give fewer actors"
            )
        data = _read(ray, files, pieces).map_batches(
            _Worker,
            fn_constructor_kwargs={"make": worker},
            batch_size=1,
            batch_format="pyarrow",
            concurrency=actors,
            num_cpus=WORKING,
            num_gpus=min(1.0, gpus / actors) if gpus else None,
        )
        yield from _in_order(data, len(files))


class _Worker:
    """One actor's work. What fails is sent like a result, since Ray would wrap it beyond recognition."""

    def __init__(self, make: Callable[[], Callable[[Any], Any]]) -> None:
        self._failure: AnchorwatchError | None = None
        try:
            self._work = make()
        except AnchorwatchError as error:
            self._failure = error

    def __call__(self, batch: Any) -> Any:
        (row,) = batch.to_pylist()
        if row["data"] != _END:
            row["data"] = pickle.dumps(self._outcome(pickle.loads(row["data"])))
        return type(batch).from_pylist([row])

    def _outcome(self, piece: Any) -> Any:
        failure = piece if isinstance(piece, AnchorwatchError) else self._failure
        try:
            return failure or self._work(piece)
        except AnchorwatchError as error:
            return error


def _read(ray: Any, files: Sequence[str], pieces: Callable[[str], Iterator[Any]]) -> Any:
    import pyarrow
    from ray.data.block import BlockMetadata

    def rows(place: int) -> Iterator[Any]:
        number = -1
        for number, piece in enumerate(_or_failure(pieces(files[place]))):
            yield pyarrow.Table.from_pylist([{"file": place, "number": number, "data": pickle.dumps(piece)}])
        yield pyarrow.Table.from_pylist([{"file": place, "number": number + 1, "data": _END}])

    def reader(place: int) -> Callable[[], Iterator[Any]]:
        return lambda: rows(place)

    class Pieces(ray.data.Datasource):  # type: ignore[misc]
        """The pieces of the files, one read task a file."""

        def estimate_inmemory_data_size(self) -> int | None:
            return None

        def get_read_tasks(self, parallelism: int, *_: Any, **__: Any) -> list[Any]:  # noqa: ARG002
            unknown = BlockMetadata(num_rows=None, size_bytes=None, input_files=None, exec_stats=None)
            return [ray.data.ReadTask(reader(place), unknown) for place in range(len(files))]

    # Other resources than the workers ask for: else Ray would run reading and working in one actor, and one file would
    # keep one actor busy and no other.
    return ray.data.read_datasource(Pieces(), override_num_blocks=len(files), num_cpus=READING)


def _or_failure(pieces: Iterator[Any]) -> Iterator[Any]:
    try:
        yield from pieces
    except AnchorwatchError as error:
        yield error


def _in_order(data: Any, files: int) -> Iterator[Any]:
    """Results as the files have them: the few that come early wait."""
    waiting: dict[tuple[int, int], bytes] = {}
    file = number = 0
    for row in _rows(data):
        waiting[row["file"], row["number"]] = row["data"]
        while (found := waiting.pop((file, number), None)) is not None:
            if found == _END:
                file, number = file + 1, 0
                continue
            result = pickle.loads(found)
            if isinstance(result, AnchorwatchError):
                raise result
            yield result
            number += 1
    if file < files:
        raise AnchorwatchError(f"Ray gave no results for {files - file} files", cure="run the same command again")


def _rows(data: Any) -> Iterator[Any]:
    """Results as they come."""
    batches = iter(data.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0))
    while True:
        try:
            batch = next(batches, None)
        except Exception as error:  # whatever befell Ray: its own errors have no common root
            raise AnchorwatchError(
                f"the Ray engine failed: {type(error).__name__}",
                cure="run the same command again, which keeps what was scored; or use the local engine",
            ) from error
        if batch is None:
            return
        yield from batch.to_pylist()


@contextmanager
def _running(ray: Any, actors: int) -> Iterator[None]:
    """Ray, started where it is not, and as quiet as it can be: nothing is sent anywhere, nothing is printed."""
    if ray.is_initialized():
        with _quiet(ray):
            yield
        return
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    quiet = {"include_dashboard": False, "log_to_driver": False, "logging_level": logging.ERROR}
    if os.environ.get("RAY_ADDRESS"):
        ray.init(log_to_driver=False, logging_level=logging.ERROR)
    else:
        # One more than there are actors, so that reading always has room.
        ray.init(num_cpus=actors + 1, **quiet)
    try:
        with _quiet(ray):
            yield
    finally:
        ray.shutdown()


@contextmanager
def _quiet(ray: Any) -> Iterator[None]:
    context = ray.data.DataContext.get_current()
    before = context.enable_progress_bars, context.target_max_block_size
    logger = logging.getLogger("ray.data")
    level = logger.level
    logger.setLevel(logging.ERROR)
    # Every piece is a block of its own: so that it is passed on when it is made, and to whichever actor is free.
    context.enable_progress_bars, context.target_max_block_size = False, 1
    try:
        yield
    finally:
        context.enable_progress_bars, context.target_max_block_size = before
        logger.setLevel(level)

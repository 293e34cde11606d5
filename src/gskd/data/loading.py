"""Samples in batches, in this process or by workers (data -> trainer, cache)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from gskd.errors import GSKDError
from gskd.stops import ignore_stops


@contextlib.contextmanager
def batches(dataset: Dataset[Any], workers: int, **how: Any) -> Iterator[Iterator[Any]]:
    """A loader's batches. Its workers end with the block, however it is left.

    An error's traceback keeps the iterator alive to the end of the process, where Python sends SIGTERM to workers that
    are left, which ours ignore, and waits for them without limit.

    Args:
        dataset: the samples.
        workers: processes that load; 0 loads in this one.
        how: further arguments of ``DataLoader``.
    """
    found = iter(
        DataLoader(
            dataset,
            num_workers=workers,
            worker_init_fn=ignore_stops,
            generator=torch.Generator(),  # else the loader draws its workers' seed from the global generator
            **how,
        )
    )
    try:
        try:
            yield _readable(found, workers)
        finally:
            if workers:
                _end(found)
    except RuntimeError as error:
        # torch raises it from a signal handler: while a batch is waited for or used, or while the workers are ended.
        if "DataLoader worker (pid" not in str(error):
            raise
        raise GSKDError(_KILLED) from None


def _end(found: Any) -> None:
    """Ends a loader's workers, also one that is stuck in a file; torch has no public way."""
    try:
        found._shutdown_workers()
    finally:
        for worker in found._workers:
            worker.kill()
            worker.join()


_KILLED = (
    "data.workers: a process that loads samples was killed, perhaps by the system for its memory; fewer workers or less"
    " data.cache_gib need less"
)


def _readable(found: Iterator[Any], workers: int) -> Iterator[Any]:
    """Errors as they were raised: a worker process sends its whole traceback as the message."""
    while True:
        try:
            batch = next(found)
        except StopIteration:
            return
        except GSKDError as error:
            raise GSKDError(str(error).rsplit(f"{GSKDError.__name__}: ", 1)[-1].strip()) from None
        except (EOFError, OSError) as error:
            # A worker that dies after it has sent a batch is missed when its memory is fetched. What the dataset itself
            # raised there says "Caught ... in DataLoader worker".
            if not workers or "DataLoader worker" in str(error):
                raise
            raise GSKDError(_KILLED) from None
        yield batch


def moved(batch: Any, device: torch.device) -> Any:
    """Tensors, in lists and dictionaries, on the device."""
    if isinstance(batch, Tensor):
        return batch.to(device, non_blocking=True)
    if isinstance(batch, dict):
        return {key: moved(value, device) for key, value in batch.items()}
    return [moved(value, device) for value in batch]

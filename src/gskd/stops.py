"""Stopping on request: SIGTERM and Ctrl-C let a run finish its step and save it (signals -> trainer, evaluation)."""

from __future__ import annotations

import signal
import sys
import threading
from types import FrameType
from typing import Any

import torch

from gskd.distributed import sum_over_processes, world_size

EXIT_STOPPED = 75
"""Exit code of a run that was stopped on request and can be resumed (EX_TEMPFAIL of sysexits.h)."""


class Stopped(Exception):
    """A run was asked to stop and did, where it says; not a mistake of anybody's."""


class StopRequest:
    """Remembers, inside its ``with`` block, that SIGTERM or SIGINT came, instead of dying of it.

    A second SIGINT stops at once: `KeyboardInterrupt`, as without this. Outside the main thread signals cannot be
    handled; nothing is ever requested there.
    """

    def __init__(self) -> None:
        self.requested = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        if not self.requested:
            sys.stderr.write("gskd: stopping after this step; Ctrl-C again to stop at once\n")
        self.requested = True

    def agreed(self) -> bool:
        """Whether any process was asked to stop; all processes must call this together, and all get the answer."""
        if world_size() == 1:
            return self.requested
        device = "cuda" if torch.distributed.get_backend() == "nccl" else "cpu"
        return bool(sum_over_processes(torch.tensor(int(self.requested), device=device)).item())


def ignore_stops(_: int) -> None:
    """For worker processes of a loader: signals go to the whole group, and it is the main process that stops."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)

"""The real command line in a process whose machine fails: ``python inject.py FAULT ARGUMENT... -- gskd's arguments``.

- ``full PART``: no space is left for files whose path holds PART;
- ``readonly PART``: they are on a disk that is read-only;
- ``limit BYTES``: the system itself lets no file grow larger;
- ``signal NUMBER STEP``: a signal, SIGKILL too, as soon as STEP is in the metrics;
- ``worker``: a loader process is killed at its third sample, as the system does for its memory.
"""

import builtins
import errno
import io
import os
import signal
import sys
from pathlib import Path


def fail_writing(part: str, number: int) -> None:
    def failure(path: object) -> OSError:
        return OSError(number, os.strerror(number), str(path))

    def opened(path, mode="r", *rest, **named):
        if part in str(path) and set(mode) & set("wax+"):
            raise failure(path)
        return before(path, mode, *rest, **named)

    def saved(tensors, path, metadata=None):
        if part in str(path):
            if number == errno.ENOSPC:
                Path(path).write_bytes(b"half of it")
            raise failure(path)
        save(tensors, path, metadata)

    def made(path, *rest, **named):
        if part in str(path):
            raise failure(path)
        make(path, *rest, **named)

    from gskd import models

    before, save, make = builtins.open, models.save_file, os.mkdir
    builtins.open = io.open = opened
    models.save_file = saved
    if number == errno.EROFS:
        os.mkdir = made


def at_step(step: int, number: int) -> None:
    from gskd.run import Run

    add = Run.add_metrics

    def add_and_signal(self, record):
        add(self, record)
        if record["step"] == step and "loss" in record:
            os.kill(os.getpid(), number)

    Run.add_metrics = add_and_signal


def kill_worker() -> None:
    from torch.utils.data import get_worker_info

    from gskd.data.views import TrainingViews

    read, calls = TrainingViews.__getitem__, []

    def read_or_die(self, position):
        if get_worker_info() is not None:
            calls.append(position)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return read(self, position)

    TrainingViews.__getitem__ = read_or_die


def main() -> None:
    end = sys.argv.index("--")
    fault, *arguments = sys.argv[1:end]
    if fault == "full":
        fail_writing(arguments[0], errno.ENOSPC)
    elif fault == "readonly":
        fail_writing(arguments[0], errno.EROFS)
    elif fault == "limit":
        import resource

        resource.setrlimit(resource.RLIMIT_FSIZE, (int(arguments[0]), int(arguments[0])))
    elif fault == "signal":
        at_step(int(arguments[1]), int(arguments[0]))
    elif fault == "worker":
        kill_worker()
    from gskd.cli import main as gskd

    gskd(sys.argv[end + 1 :])


if __name__ == "__main__":
    main()

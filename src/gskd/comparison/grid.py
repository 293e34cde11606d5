"""The runs of a comparison, several at a time, each in a process of its own (comparison -> run folders).

A run that is finished is never done again; one that was interrupted continues. A run of another recipe or teacher in a
cell's folder is an error. Paces are measured as the runs go, side by side; ``parallel: 1`` gives quieter ones.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO

import psutil
import torch

from gskd.checkpoint import write_text
from gskd.comparison.recipe import Comparison, Variant
from gskd.errors import GSKDError, few
from gskd.pipeline import prepare_caches
from gskd.progress import Progress
from gskd.recipe import Recipe, dump_recipe
from gskd.run import Run

_LOCK = ".lock"


@dataclass(frozen=True)
class Cell:
    """One run of the grid."""

    title: str
    run: Run
    recipe: Recipe
    distils: bool

    @property
    def finished(self) -> bool:
        """Whether its result is there.

        Raises:
            GSKDError: it is that of another recipe, or of another teacher.
        """
        if not self.run.exists:
            return False
        self.run.check_recipe(self.recipe)
        if self.distils and self.recipe.teacher is not None:
            self.run.check_teacher(self.recipe.teacher)
        return self.run.result.is_file()


def equal_steps_cell(comparison: Comparison, variant: Variant, seed: int) -> Cell:
    """The run of a variant and a seed for the recipe's own number of steps."""
    folder = comparison.output / "runs" / variant.name / f"seed-{seed}"
    return Cell(f"{variant.name} seed {seed}", Run(folder), variant.at(seed, folder), variant.distils)


def equal_seconds_cell(comparison: Comparison, variant: Variant, seed: int) -> Cell | None:
    """The run for as many steps as fit into everybody's seconds; None where this is not asked for or known yet.

    The variant that sets the seconds is not trained again: its first run is the one. Neither are runs of a number of
    steps that is less than 2 % off: a seed more moves the mean pace a little.
    """
    budget = seconds_budget(comparison)
    pace = seconds_per_step(comparison, variant)
    if budget is None or pace is None:
        return None
    steps = max(1, round(budget / pace))
    runs = comparison.output / "runs" / variant.name
    made = {int(path.parent.name.rpartition("-")[2]) for path in runs.glob("seed-*-steps-*/recipe.yaml")}
    nearest = min({variant.recipe.train.steps, *made}, key=lambda other: abs(other - steps))
    if abs(nearest - steps) < 0.02 * steps:
        steps = nearest
    if steps == variant.recipe.train.steps:
        return equal_steps_cell(comparison, variant, seed)
    folder = runs / f"seed-{seed}-steps-{steps}"
    return Cell(
        f"{variant.name} seed {seed}, {steps} steps", Run(folder), variant.at(seed, folder, steps), variant.distils
    )


def seconds_per_step(comparison: Comparison, variant: Variant) -> float | None:
    """Mean over the variant's finished runs; None before the first."""
    cells = [equal_steps_cell(comparison, variant, seed) for seed in variant.seeds]
    paces = [cell.run.read_result()["seconds"] / cell.recipe.train.steps for cell in cells if cell.finished]
    return sum(paces) / len(paces) if paces else None


def seconds_budget(comparison: Comparison) -> float | None:
    """The seconds of training that everybody gets; None where it is "off", or before all runs are finished."""
    if comparison.equal_seconds == "off":
        return None
    seconds = {}
    for variant in comparison.variants:
        pace = seconds_per_step(comparison, variant)
        if pace is None or not all(equal_steps_cell(comparison, variant, seed).finished for seed in variant.seeds):
            return None
        seconds[variant.name] = pace * variant.recipe.train.steps
    return max(seconds.values()) if comparison.equal_seconds == "slowest" else seconds[comparison.baseline]


def run_grid(comparison: Comparison, progress: Progress) -> None:
    """Makes every run that is missing: the teacher, then all variants and seeds, then those at equal seconds.

    Args:
        comparison: from ``load_comparison``.
        progress: where a line for each run goes.

    Raises:
        GSKDError: runs that failed, after all others were made; or another process works on the same comparison.
    """
    with _lock(comparison.output) as lock, _stop_on_sigterm():
        if comparison.teacher is not None:
            teacher = Cell("teacher", Run(comparison.output / "teacher"), comparison.teacher, distils=False)
            _make([teacher], 1, None, lock, progress)
        slots, threads = _slots(comparison)
        seeds = list(dict.fromkeys(seed for variant in comparison.variants for seed in variant.seeds))
        # Seed by seed: an interrupted grid has whole comparisons of some seeds, not all seeds of some variants.
        pairs = [(variant, seed) for seed in seeds for variant in comparison.variants if seed in variant.seeds]
        cells = [equal_steps_cell(comparison, *pair) for pair in pairs]
        prepare_caches([cell.recipe for cell in cells if cell.distils and not cell.finished], progress)
        _make(cells, slots, threads, lock, progress)
        second = [cell for pair in pairs if (cell := equal_seconds_cell(comparison, *pair)) is not None]
        _make(second, slots, threads, lock, progress)


def _slots(comparison: Comparison) -> tuple[int, int | None]:
    """Runs at a time, and CPU threads of each: a GPU each where there are any, else a core and 2 GiB of memory each."""
    if torch.cuda.is_available():
        return comparison.parallel or torch.cuda.device_count(), None
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    wanted = {variant.recipe.train.threads for variant in comparison.variants}
    room = max(1, int(psutil.virtual_memory().available / 2**31))
    slots = comparison.parallel or max(1, min(cores // max((threads or 1) for threads in wanted), room))
    return slots, max(1, cores // slots)


def _make(cells: list[Cell], slots: int, threads: int | None, lock: IO[str], progress: Progress) -> None:
    """Runs what is not finished, ``slots`` at a time."""
    waiting = [cell for cell in cells if not cell.finished]
    if len(cells) > len(waiting):
        progress.say(f"{len(cells) - len(waiting)} of {len(cells)} runs are finished already")
    free, working, failed = list(range(slots)), dict[int, tuple[Cell, "subprocess.Popen[bytes]", float]](), list[str]()
    try:
        while waiting or working:
            while waiting and free:
                slot, cell = free.pop(0), waiting.pop(0)
                working[slot] = (cell, _start(cell, slot, threads, lock), time.monotonic())
                progress.say(f"begun: {cell.title} ({len(waiting)} wait), log {_log(cell)}")
            time.sleep(0.1)
            for slot, (cell, process, begun) in list(working.items()):
                if process.poll() is None:
                    continue
                del working[slot]
                free.append(slot)
                minutes = (time.monotonic() - begun) / 60
                if process.returncode == 0 and cell.finished:
                    progress.say(f"done: {cell.title} in {minutes:.1f} min, {_scores(cell)}")
                else:
                    failed.append(f"{cell.title}: {_last_line(_log(cell)) or f'exit code {process.returncode}'}")
                    progress.say(f"failed: {failed[-1]}")
    finally:
        for _, process, _ in working.values():
            process.terminate()
        for _, process, _ in working.values():
            process.wait()
    if failed:
        raise GSKDError(f"compare: {len(failed)} of {len(cells)} runs failed: " + "; ".join(failed[:3]))


def _start(cell: Cell, slot: int, threads: int | None, lock: IO[str]) -> subprocess.Popen[bytes]:
    environment = dict(os.environ)
    recipe = cell.recipe
    if torch.cuda.is_available():
        devices = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(torch.cuda.device_count())))).split(
            ","
        )
        environment["CUDA_VISIBLE_DEVICES"] = devices[slot % len(devices)]
    elif threads is not None:
        recipe = replace(recipe, train=replace(recipe.train, threads=recipe.train.threads or threads))
        environment["OMP_NUM_THREADS"] = str(recipe.train.threads)
    cell.run.path.parent.mkdir(parents=True, exist_ok=True)
    written = cell.run.path.with_name(cell.run.path.name + ".yaml")
    write_text(written, dump_recipe(recipe))
    command = [sys.executable, "-m", "gskd.cli", "distill" if cell.distils else "train", str(written), "--resume"]
    # The run holds the lock too: should this process be killed, nobody else starts beside runs that live on.
    held = () if os.name == "nt" else (lock.fileno(),)
    with open(_log(cell), "ab") as log:
        return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment, pass_fds=held)


@contextlib.contextmanager
def _stop_on_sigterm() -> Iterator[None]:
    """SIGTERM ends the runs as Ctrl-C does, instead of leaving them behind."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: object) -> None:
        sys.exit(128 + number)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _log(cell: Cell) -> Path:
    return cell.run.path.with_name(cell.run.path.name + ".log")


def _last_line(log: Path) -> str:
    lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return lines[-1].strip() if lines else ""


def _scores(cell: Cell) -> str:
    best = cell.run.read_result()["best"]
    return ", ".join(f"{split} mIoU {100 * (score['miou'] or 0):.2f}" for split, score in best.items())


@contextlib.contextmanager
def _lock(folder: Path) -> Iterator[IO[str]]:
    """One process at a time: two would train the same run. The lock stays, as the mark of a comparison's folder."""
    try:
        if folder.is_dir() and not (folder / _LOCK).exists() and (other := [f.name for f in folder.iterdir()]):
            raise GSKDError(
                f"output {folder}: holds no comparison but {few(sorted(other))}; expected a new or empty folder, or"
                " that of a comparison"
            )
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / _LOCK, "w", encoding="utf-8")  # noqa: SIM115 (held while the grid runs)
    except OSError as error:
        raise GSKDError(f"output {folder}: cannot be written: {error.strerror or error}") from None
    with lock:
        try:
            import fcntl

            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except ImportError:
            pass  # Windows has none; two at a time are then the user's to avoid
        except OSError:
            raise GSKDError(f"output {folder}: another gskd compare works on it") from None
        yield lock

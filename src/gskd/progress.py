"""What a person sees while a run works: one live line in a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from rich.console import Console
from rich.status import Status

from gskd.metrics import Score


class Progress:
    """Prints steps and scores; silent on all processes but the first.

    Args:
        console: where to.
        enabled: False prints nothing.
    """

    def __init__(self, console: Console | None = None, enabled: bool = True) -> None:
        self.console = console or Console(highlight=False)
        self.enabled = enabled
        self._live: Status | None = None

    def __enter__(self) -> Progress:
        if self.enabled and self.console.is_terminal:
            self._live = self.console.status("")
            self._live.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def say(self, line: str) -> None:
        """A line that stays."""
        if self.enabled:
            self.console.print(line, markup=False, soft_wrap=True)

    def step(self, record: dict[str, Any], steps: int) -> None:
        """The state of training after a step; replaces the line before it in a terminal."""
        done = record["step"]
        rate = record["images_per_s"]
        left = record["seconds_per_step"] * (steps - done)
        terms = "  ".join(
            f"{name} {v['raw']:.4g}" + (f" -> {v['weighted']:.4g}" if name != "task" else "")
            for name, v in record["terms"].items()
        )
        line = (
            f"step {done}/{steps}  loss {record['loss']:.4g}  [{terms}]  lr {record['lr']:.2e}"
            f"  {rate:.1f} images/s  {_duration(left)} left"
        )
        self._show(line)

    def score(self, title: str, score: Score, best: bool = False) -> None:
        """A score, on a line that stays."""
        self.say(
            f"{title}: mIoU {100 * score.miou:.2f}  pixel accuracy {100 * score.pixel_accuracy:.2f}"
            + ("  (best so far)" if best else "")
        )

    def counter(self, title: str) -> Callable[[int, int], None] | None:
        """A callback for long loops; only a terminal shows it."""
        if self._live is None:
            return None
        shown = 0.0

        def tick(done: int, total: int) -> None:
            nonlocal shown
            if time.monotonic() - shown > 0.2:
                shown = time.monotonic()
                self._show(f"{title}: {done}/{total}")

        return tick

    def _show(self, line: str) -> None:
        if self._live is not None:
            self._live.update(line.replace("[", "\\["))
        else:
            self.say(line)


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"

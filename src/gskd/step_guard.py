"""Steps with a gradient that is not finite: skipped, undone, counted, and explained when there are too many."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from gskd.errors import GSKDError
from gskd.taps import eval_mode

_IN_A_ROW = 3


class StepGuard:
    """Keeps one bad image or one overflow from ruining the weights.

    The gradient is the same on all processes, so all of them skip the same steps without asking each other.

    Args:
        model: everything that is trained; buffers that a module names in ``same_on_all_processes`` guard themselves.
        budget: bad steps of a run that are skipped; one more, or three in a row, ends it.
        skipped: bad steps so far, of a run that is resumed.
    """

    def __init__(self, model: nn.Module, budget: int, skipped: int = 0) -> None:
        self.budget, self.skipped, self._in_a_row = budget, skipped, 0
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        self._buffers = [
            buffer
            for module in model.modules()
            for name, buffer in module.named_buffers(recurse=False)
            if name not in getattr(module, "same_on_all_processes", ())
        ]
        self._kept: list[Tensor] = []

    def before_forward(self) -> None:
        """Remembers the buffers: a bad forward pass ruins the statistics of batch normalisation for good."""
        if not self._kept:
            self._kept = [torch.empty_like(buffer) for buffer in self._buffers]
        if self._kept:
            torch._foreach_copy_(self._kept, self._buffers)

    def gradient_is_finite(self) -> bool:
        """Whether the step can be taken. Waits for the device."""
        gradients = [p.grad for p in self._parameters if p.grad is not None]
        good = bool(torch.nn.utils.get_total_norm(gradients).isfinite()) if gradients else True
        if good:
            self._in_a_row = 0
        return good

    def undo_forward(self) -> None:
        """Puts the buffers back."""
        if self._kept:
            torch._foreach_copy_(self._buffers, self._kept)

    def count(self) -> bool:
        """Counts a bad step; whether it is one too many."""
        self.skipped += 1
        self._in_a_row += 1
        return self.skipped > self.budget or self._in_a_row >= _IN_A_ROW


def explain(
    terms: dict[str, dict[str, float]], student: nn.Module, images: Tensor, samples: Sequence[str], skipped: int
) -> GSKDError:
    """Which term, which layer and which samples a bad step comes from.

    Args:
        terms: raw and weighted values by term.
        student: run once more on ``images`` to find the layer.
        images: of this process, normalised.
        samples: names of the step's samples, of all processes.
        skipped: bad steps of the run so far.
    """
    bad = [name for name, value in terms.items() if not math.isfinite(value["weighted"])]
    total = sum(abs(value["weighted"]) for value in terms.values()) or 1.0
    if bad:
        which = f"not finite: {', '.join(bad)}"
    else:
        shares = sorted(((abs(value["weighted"]) / total, name) for name, value in terms.items()), reverse=True)
        which = "shares of the loss: " + ", ".join(f"{name} {100 * share:.0f} %" for share, name in shares)
    layer = _first_bad_layer(student, images)
    where = f"first in layer {layer!r} of the student" if layer else "no layer of the student in the forward pass"
    named = ", ".join(samples[:8]) + (", ..." if len(samples) > 8 else "")
    return GSKDError(
        f"the gradient is not finite, {skipped} times so far (train.max_skipped); {which}; {where}; samples {named};"
        " a lower train.lr or train.clip may help"
    )


@torch.no_grad()
def _first_bad_layer(student: nn.Module, images: Tensor) -> str | None:
    """The layer that first gives something that is not finite, by weights or by these images."""
    found: list[str] = []

    def look(name: str, output: object) -> None:
        if isinstance(output, Tensor) and output.is_floating_point() and not output.isfinite().all():
            found.append(name)

    hooks = [
        module.register_forward_hook(lambda _, __, output, name=name: look(name, output))
        for name, module in student.named_modules()
        if next(module.children(), None) is None
    ]
    try:
        with eval_mode(student):
            student(images)
    finally:
        for hook in hooks:
            hook.remove()
    return found[0] if found else None

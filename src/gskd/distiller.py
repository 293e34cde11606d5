"""Student, frozen teacher and named terms -> one loss (models -> taps -> losses -> distiller -> trainer).

Usable in anyone's loop::

    distiller = Distiller(student, teacher, {"gskd": Term(GSKDLoss(), weight=10, student="decoder", teacher="decoder")})
    optimizer = torch.optim.AdamW(distiller.parameters())
    for images, labels in loader:
        result = distiller(images, labels)
        result.loss.backward()
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from gskd.data import IGNORE
from gskd.distributed import sum_over_processes
from gskd.errors import GSKDError
from gskd.fast_teacher import TeacherPath, Trial, autocast_of, best_path, try_paths
from gskd.folding import fold_batch_norm
from gskd.layers import Layers, resolve_layers, tap_names
from gskd.losses import Pixels
from gskd.models import freeze
from gskd.outputs import logits_of
from gskd.taps import Taps
from gskd.task_losses import cross_entropy

Packed = dict[str, Tensor]
"""What a term needs of the teacher for a batch, as it is stored: tensors whose first dimension is the image."""

_PATIENCE = 20  # forward passes


@runtime_checkable
class HasTarget(Protocol):
    """A loss that needs less of the teacher than its map, and says what: ``compare(student, target, pixels)`` with
    ``target(teacher, pixels)`` is the loss. Any other loss is called with the map itself."""

    def target(self, teacher: Tensor, pixels: Pixels) -> Any:
        """What does not change when the student does."""

    def compare(self, student: Any, target: Any, pixels: Pixels) -> Tensor:
        """The loss."""

    def target_settings(self) -> dict[str, Any]:
        """The arguments that the target depends on, as plain values."""

    def pack(self, target: Any) -> Packed:
        """The target as it is stored."""

    def unpack(self, packed: Mapping[str, Tensor]) -> Any:
        """The target that was packed."""


@dataclass
class Term:
    """One distillation term: a loss, where it reads, and its weight.

    Attributes:
        loss: a module called as ``loss(student, teacher, pixels)`` that returns a scalar, such as `GSKDLoss`. Its
            parameters (a projector) are trained with the student and are no part of it.
        weight: factor of the term in the total loss.
        student: layer of the student by dotted name, ``"logits"`` for its output, or ``"auto"``: `gskd.taps.auto_tap`.
            Several names, from the first layer to the last, for a loss that compares layers, such as `PSDLoss`.
        teacher: layer of the teacher, likewise.

    Raises:
        GSKDError: the weight is negative or not finite.
    """

    loss: nn.Module
    weight: float = 1.0
    student: str | Sequence[str] = "auto"
    teacher: str | Sequence[str] = "auto"

    def __post_init__(self) -> None:
        number = isinstance(self.weight, int | float) and not isinstance(self.weight, bool)
        if not number or not 0 <= self.weight < math.inf:
            raise GSKDError(f"term: weight is {self.weight!r}, expected a finite number of at least 0")


class TermValue(NamedTuple):
    """A term's value in one step, both detached scalars."""

    raw: Tensor
    """Before its weight."""
    weighted: Tensor
    """As it enters the total."""


class Distillation(NamedTuple):
    """What one forward pass of a `Distiller` returns."""

    loss: Tensor
    """Scalar, the sum of the task loss and all weighted terms, to call ``backward`` on."""
    terms: dict[str, TermValue]
    """Values by term; ``"task"`` is the task loss."""
    logits: Tensor
    """The student's (B, K, h, w), as it gave them."""


class Distiller(nn.Module):
    """Trains a student against the labels and, term by term, against a frozen teacher.

    ``parameters()`` and ``state_dict()`` hold the student and the terms' projectors, never the teacher. The teacher is
    put in eval mode before each step, runs without gradient, and its parameters are set not to require one; it moves
    with the distiller's ``to``.

    A term whose gradient at the student's layer is zero in each of the first 20 forward passes is an error: it would
    cost its time and teach nothing. So is a task loss without a gradient at the logits, as of data without a label.
    Once one has shown a gradient, nothing more is computed for this.

    Args:
        student: the network to train.
        teacher: the network to learn from; None trains the student alone.
        terms: the distillation terms by name. ``"task"`` is taken.
        task_loss: called as ``task_loss(logits, labels)``; by default `gskd.task_losses.cross_entropy`. None leaves it
            to you.
        teacher_dtype: dtype of autocast around the teacher; None leaves autocast as it is around the call.

    Raises:
        GSKDError: terms without a teacher, a layer that does not exist, or no automatic choice of layer for this model.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module | None = None,
        terms: Mapping[str, Term] | None = None,
        *,
        task_loss: Callable[[Tensor, Tensor], Tensor] | None = cross_entropy,
        teacher_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if terms is not None and not isinstance(terms, Mapping):
            raise GSKDError(f"terms: expected Term by name, such as {{'gskd': Term(GSKDLoss())}}, got {terms!r}")
        terms = dict(terms or {})
        if terms and teacher is None:
            raise GSKDError(f"terms {', '.join(map(repr, terms))}: need a teacher, got none")
        for name in terms:
            if name == "task":
                raise GSKDError("terms: the name 'task' is taken by the loss against the labels")
            if not isinstance(terms[name], Term):
                raise GSKDError(f"terms: {name!r} is a {type(terms[name]).__name__}; expected Term(loss, weight, ...)")
            if not isinstance(terms[name].loss, nn.Module):
                raise GSKDError(f"term {name!r}: loss is {terms[name].loss!r}; expected an nn.Module, such as KDLoss()")
            if not name.isidentifier() or hasattr(nn.ModuleDict, name):
                raise GSKDError(f"terms: the name {name!r} cannot be used; expected a word of letters, digits and _")
        if task_loss is None and not terms:
            raise GSKDError("distiller: expected a task loss or at least one term, got neither")
        shared = {id(p) for p in teacher.parameters()} if teacher is not None else set()
        if common := [name for name, p in student.named_parameters() if id(p) in shared]:
            raise GSKDError(
                f"distiller: student and teacher share {len(common)} parameters, first {common[0]!r}, and the teacher's"
                " are frozen; expected two models, for example copy.deepcopy(student)"
            )
        self.student = student
        self.losses = nn.ModuleDict({name: term.loss for name, term in terms.items()})
        self.task_loss = task_loss
        self.weights = {name: float(term.weight) for name, term in terms.items()}
        # In a list, so that nn.Module does not see the teacher: it must not appear in parameters(), state_dict() or
        # train().
        self._teacher: list[nn.Module] = [] if teacher is None else [freeze(teacher)]
        self._folded: list[nn.Module] = []
        self.teacher_dtype = teacher_dtype
        self.teacher_path: TeacherPath | None = None
        self._labels_checked = False
        self._silent_steps = {name: 0 for name, weight in self.weights.items() if weight != 0}
        if task_loss is not None:
            self._silent_steps["task"] = 0
        self.student_layers = {name: resolve_layers(student, t.student, t.loss) for name, t in terms.items()}
        self.teacher_layers = {name: resolve_layers(self._teacher[0], t.teacher, t.loss) for name, t in terms.items()}
        for model, layers in ((student, self.student_layers), *((t, self.teacher_layers) for t in self._teacher)):
            Taps(model, tap_names(layers.values()))  # a layer that does not exist is an error here already
        # Read by DistributedDataParallel, which would else send these from the first process to all at every step.
        self._ddp_params_and_buffers_to_ignore = [
            f"{path}.{name}"
            for path, module in self.losses.named_modules(prefix="losses")
            for name in getattr(module, "same_on_all_processes", ())
        ]

    @property
    def teacher(self) -> nn.Module | None:
        """The frozen teacher; another one needs another distiller."""
        return self._teacher[0] if self._teacher else None

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "teacher":  # nn.Module would take it for one more network to train
            raise GSKDError("distiller: its teacher cannot be replaced; expected another Distiller")
        super().__setattr__(name, value)

    def _replicate_for_data_parallel(self) -> Any:
        raise GSKDError(
            "distiller: nn.DataParallel copies neither teacher nor hooks; expected a process for each GPU (torchrun,"
            " DistributedDataParallel)"
        )

    def _taught(self) -> nn.Module:
        if not self._teacher:
            raise GSKDError("distiller: has no teacher")
        return self._teacher[0]

    def fold_teacher(self, example: Tensor) -> int:
        """Runs the teacher from now on with its batch normalisation folded into its convolutions, where that is exact.

        See `gskd.folding.fold_batch_norm`. ``teacher`` stays what it is; a change of its weights after this call is not
        seen.

        Args:
            example: (B, 3, H, W), normalised as the teacher wants it, to see what follows what and to compare.

        Returns:
            How many layers were folded.
        """
        folded, count = fold_batch_norm(self._taught(), example, tap_names(self.teacher_layers.values()))
        self._folded = [folded] if count else []
        return count

    def probe_teacher(self, images: Tensor, dtypes: Sequence[torch.dtype] | None = None) -> list[Trial]:
        """Tries how the teacher runs fastest on this machine, and runs it so from now on; a few seconds.

        Half precision, folded batch normalisation and the channels_last layout are tried together. What counts is only
        what keeps the plain teacher's classes and similarities, see `gskd.fast_teacher`, so that it is never slower nor
        noticeably another teacher.

        Args:
            images: (B, 3, H, W) float32 on the teacher's device, normalised as it wants them, as many and as large as
                in training.
            dtypes: of autocast, beside float32; by default what the device has.

        Returns:
            What was tried and what came of it; ``teacher_path`` is the one that is now taken, by all processes the
            first one's.

        Raises:
            GSKDError: the images are of another kind.
        """
        if images.dim() != 4 or images.dtype != torch.float32:
            raise GSKDError(f"images: expected (B, 3, H, W) float32, got {tuple(images.shape)} {images.dtype}")
        trials = try_paths(self._taught(), images, tap_names(self.teacher_layers.values()), dtypes)
        self.take_path(best_path(trials).agreed(images.device), images)
        return trials

    def take_path(self, path: TeacherPath, images: Tensor) -> None:
        """Runs the teacher from now on as an earlier `probe_teacher` found best; ``images`` as there."""
        self._folded = []
        if path.folded:
            self.fold_teacher(images)
        self.teacher_path, self.teacher_dtype = path, path.dtype
        (self._folded or self._teacher)[0].to(memory_format=path.layout)  # type: ignore[call-overload]

    def _apply(self, fn: Callable[[Any], Any], recurse: bool = True) -> Distiller:
        for teacher in (*self._teacher, *self._folded):
            teacher._apply(fn, recurse)  # type: ignore[no-untyped-call]
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def forward(
        self,
        images: Tensor,
        labels: Tensor,
        teacher_images: Tensor | None = None,
        targets: Mapping[str, Packed] | None = None,
    ) -> Distillation:
        """One training step's forward pass.

        Args:
            images: (B, 3, H, W), normalised as the student wants them.
            labels: (B, H, W) int64, `IGNORE` where nothing counts.
            teacher_images: the same views normalised as the teacher wants them, where that differs.
            targets: what `teacher_targets` gave for the same views and labels, by term; the teacher is then not run.

        Raises:
            GSKDError: labels of another shape, dtype or (looked at in the first call, as it waits for the device) with
                values that are no class; student and teacher with different numbers of classes; a term without a
                gradient; whatever taps and losses refuse.
        """
        if labels.dim() != 3 or labels.dtype != torch.int64 or len(labels) != len(images):
            found = f"{tuple(labels.shape)} {labels.dtype}"
            raise GSKDError(f"labels: expected ({len(images)}, H, W) int64, got {found}")
        (height, width), (rows, columns) = images.shape[-2:], labels.shape[1:]
        if abs(rows * width - columns * height) > max(height, width):  # of another size they are fitted to one another
            raise GSKDError(f"labels: {rows} x {columns} are no labels of images of {height} x {width}")
        if not images.is_floating_point():
            raise GSKDError(f"images: expected normalised floating point, got {images.dtype}")
        with Taps(self.student, tap_names(self.student_layers.values())) as student_taps:
            logits = logits_of(self.student(images))
        if not self._labels_checked:
            _check_labels(labels, logits.shape[1])
            self._labels_checked = True
        losses: list[Tensor] = []
        terms: dict[str, TermValue] = {}
        if self.task_loss is not None:
            losses.append(_scalar("task loss", self.task_loss(logits, labels)))
            terms["task"] = TermValue(losses[0].detach(), losses[0].detach())
            if "task" in self._silent_steps and torch.is_grad_enabled():
                self._listen("task", losses[0], logits)
        if self.losses:
            if targets is None:
                pixels, teacher_maps = self._teach(images if teacher_images is None else teacher_images, labels)
                if pixels.num_classes != logits.shape[1]:
                    raise GSKDError(
                        f"student and teacher give {logits.shape[1]} and {pixels.num_classes} classes;"
                        " expected the same number"
                    )
            else:
                if lacking := [name for name in self.losses if name not in targets]:
                    raise GSKDError(f"targets: lack {', '.join(map(repr, lacking))}; expected one of every term")
                pixels = Pixels(labels, num_classes=logits.shape[1])
            for name, loss in self.losses.items():
                maps = _read(student_taps, self.student_layers[name])
                if targets is None:
                    raw = loss(maps, teacher_maps[name], pixels)
                elif isinstance(loss, HasTarget):
                    raw = loss.compare(maps, loss.unpack(targets[name]), pixels)
                else:
                    raw = loss(maps, _unpack_maps(targets[name], self.teacher_layers[name]), pixels)
                _scalar(f"term {name!r}", raw)
                if name in self._silent_steps and torch.is_grad_enabled():
                    self._listen(name, raw, maps)
                losses.append(self.weights[name] * raw)
                terms[name] = TermValue(raw.detach(), losses[-1].detach())
        return Distillation(torch.stack(losses).sum(), terms, logits)

    def _listen(self, name: str, raw: Tensor, maps: Tensor | list[Tensor]) -> None:
        """Looks whether the term moves what it reads of the student, until it has once."""
        read = [one for one in ([maps] if isinstance(maps, Tensor) else maps) if one.requires_grad]
        heard = torch.zeros((), dtype=torch.int64, device=raw.device)
        if read and raw.requires_grad:
            # Scaled up: of a mean over a large half-precision map nothing would be left, with or without a loss scaler.
            scale = torch.full_like(raw, 2.0**15)  # the most that half precision holds
            gradients = torch.autograd.grad(raw, read, scale, retain_graph=True, allow_unused=True)
            for gradient in gradients:
                if gradient is not None:
                    heard |= gradient.ne(0).any()
        if sum_over_processes(heard).item():
            del self._silent_steps[name]
            return
        self._silent_steps[name] += 1
        if self._silent_steps[name] >= _PATIENCE:
            if name == "task":
                raise GSKDError(
                    f"labels: the loss against them had no gradient in all of the first {_PATIENCE} passes: is a pixel"
                    f" labelled? {IGNORE}, less than 0, and what the data ignores do not count"
                )
            raise GSKDError(
                f"term {name!r}: its gradient to the student's {self.student_layers[name]!r} was zero in all of the"
                f" first {_PATIENCE} passes: it teaches nothing. Is the layer trained, and does it see labelled pixels?"
            )

    @torch.no_grad()
    def teacher_targets(self, images: Tensor, labels: Tensor, seed: int | None = None) -> dict[str, Packed]:
        """What the terms need of the teacher for a batch, to be stored and given to `forward` instead of running it.

        A loss says itself what it needs by ``target``, ``compare``, ``pack`` and ``unpack``, see `GSKDLoss`. For any
        other it is the teacher's map at its layer, fp32 rounded to fp16.

        Args:
            images: (B, 3, H, W), normalised as the teacher wants them.
            labels: (B, H, W) int64.
            seed: what is random in each term's target then depends on it alone, and not on the terms beside it; the
                global generator is left seeded.

        Returns:
            By term, tensors by name, whose first dimension is the image.

        Raises:
            GSKDError: a value is not finite or too large for fp16; whatever taps and losses refuse.
        """
        pixels, teacher_maps = self._teach(images, labels)
        packed: dict[str, Packed] = {}
        for name, loss in self.losses.items():
            if isinstance(loss, HasTarget):
                if seed is not None:
                    torch.manual_seed(seed)
                packed[name] = loss.pack(loss.target(teacher_maps[name], pixels))
            else:
                packed[name] = _pack_maps(teacher_maps[name])
            for value in packed[name].values():
                if value.is_floating_point() and not value.isfinite().all():
                    raise GSKDError(
                        f"term {name!r}: what the teacher gives at {self.teacher_layers[name]!r} is not finite, or too"
                        " large to store as fp16"
                    )
        return packed

    def target_settings(self, name: str) -> dict[str, Any]:
        """All that a term's targets depend on besides teacher, views and labels, as plain values."""
        loss, layers = self.losses[name], self.teacher_layers[name]
        own = loss.target_settings() if isinstance(loss, HasTarget) else {"kind": "maps"}
        return {"layers": layers if isinstance(layers, str) else list(layers), **own}

    @torch.no_grad()
    def _teach(self, images: Tensor, labels: Tensor) -> tuple[Pixels, dict[str, Any]]:
        """The teacher's view of a batch: labels with its prediction, and its map or maps for each term."""
        teacher = self._folded[0] if self._folded else self._taught()
        teacher.eval()  # each step: somebody's callback may have called train() on it
        if self.teacher_path is not None:
            images = images.contiguous(memory_format=self.teacher_path.layout)
        dtype = self.teacher_dtype
        with (
            nullcontext() if dtype is None else autocast_of(images.device, dtype),
            Taps(teacher, tap_names(self.teacher_layers.values())) as taps,
        ):
            logits = logits_of(teacher(images))
        return Pixels(labels, logits), {name: _read(taps, layers) for name, layers in self.teacher_layers.items()}


def _pack_maps(maps: Tensor | list[Tensor]) -> Packed:
    """Maps of one layer or several, in half precision; what is in half precision stays as it is."""
    levels = [maps] if isinstance(maps, Tensor) else maps
    halves = (torch.float16, torch.bfloat16)
    return {str(level): one if one.dtype in halves else one.half() for level, one in enumerate(levels)}


def _unpack_maps(packed: Packed, layers: Layers) -> Tensor | list[Tensor]:
    return packed["0"] if isinstance(layers, str) else [packed[str(level)] for level in range(len(layers))]


def _scalar(name: str, value: Tensor) -> Tensor:
    if not isinstance(value, Tensor) or value.dim():
        found = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise GSKDError(f"{name}: gave {found}; expected a scalar tensor")
    return value


def _check_labels(labels: Tensor, classes: int) -> None:
    if classes > IGNORE:
        raise GSKDError(f"student: gives {classes} classes; expected at most {IGNORE}, the label that is ignored")
    stray = sorted(set(labels[(labels >= classes) & (labels != IGNORE)].tolist()))
    if stray:
        raise GSKDError(
            f"labels: hold {stray[:5]}, the student has classes 0 to {classes - 1}; {IGNORE} or less than 0 is ignored"
        )


def _read(taps: Taps, layers: Layers) -> Tensor | list[Tensor]:
    return taps[layers] if isinstance(layers, str) else [taps[name] for name in layers]

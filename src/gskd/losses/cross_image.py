"""Distillation of relations across images: CIRKD, within a batch of all processes and against a memory of past ones.

Yang et al., "Cross-Image Relational Knowledge Distillation for Semantic Segmentation", CVPR 2022, arXiv 2204.06986.
Shape suffixes: B images, C channels, K classes, P pixels, A anchors, Q places of a bank.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gskd.distributed import gather_with_grad, mean_over_processes
from gskd.errors import GSKDError
from gskd.losses._match import PointProjector, require_count, require_positive
from gskd.losses._pixels import Pixels, match_size, promote, require_maps, require_pair
from gskd.losses._reduce import masked_mean_pool, mean_over_pixels, unit_length
from gskd.losses._sampling import class_balanced_sample, read_points

_CHUNK = 1 << 22  # similarities worked on at a time; about ten tensors of this size, 16 MiB in fp32, live at once


def cross_image_loss(
    student: Tensor, teacher: Tensor, valid: Tensor, temperature: float = 0.1, chunk: int = _CHUNK
) -> Tensor:
    """Mini-batch pixel-to-pixel distillation: for every ordered pair of images, KL of the rows of pixel similarities.

    Equations 3 and 4 of the paper: row i of a pair (m, n) is the softmax over the pixels of n of the cosines with pixel
    i of m, divided by tau; KL(teacher || student), mean over rows, mean over pairs. Pairs reach across all processes.
    Rows are worked through in chunks and recomputed in the backward pass, so that memory does not grow with P^2.

    Args:
        student: (B, Cs, P) vectors; the widths may differ. The same B and P on all processes.
        teacher: (B, Ct, P); no gradient flows to it.
        valid: (B, P) bool, the pixels that count as rows and as columns.
        temperature: tau; > 0.
        chunk: similarities worked on at a time.

    Returns:
        Scalar, float32 or wider; zero with zero gradient where no pixel counts.
    """
    with torch.autocast(student.device.type, enabled=False):
        s, t = (unit_length(promote(maps), dim=1).mT for maps in (student, teacher.detach()))  # (B, P, C)
        all_s, all_t = gather_with_grad(s), gather_with_grad(t)
        everywhere = gather_with_grad(valid)
        images, pixels = everywhere.shape
        rows_s, rows_t, row_valid = s.flatten(0, 1), t.flatten(0, 1), valid.flatten()
        count = valid.sum(dim=1, keepdim=True).expand_as(valid).flatten()
        weight = torch.where(row_valid, 1 / count.clamp(min=1).to(s.dtype), 0.0)  # a mean over the rows of an image
        step = max(1, chunk // (images * pixels))
        total: Tensor = s.new_zeros(())
        for start in range(0, rows_s.shape[0], step):
            part = slice(start, start + step)
            columns = (all_s, all_t, everywhere, temperature)
            if step >= rows_s.shape[0]:
                divergence = _row_divergence(rows_s, rows_t, *columns)
            else:
                divergence = checkpoint(
                    _row_divergence,
                    rows_s[part],
                    rows_t[part],
                    *columns,
                    use_reentrant=False,
                    preserve_rng_state=False,
                )
            total = total + (divergence * weight[part]).sum()
        pairs = valid.any(dim=1).sum() * everywhere.any(dim=1).sum()
        return mean_over_processes(total, pairs)


def _row_divergence(
    rows_s: Tensor, rows_t: Tensor, all_s: Tensor, all_t: Tensor, columns: Tensor, temperature: float
) -> Tensor:
    """(rows,) KL of a row's similarities to the valid pixels of an image, summed over the images that have any."""
    images, pixels = columns.shape
    log_s, log_t = (
        (rows @ every.flatten(0, 1).mT / temperature)
        .view(-1, images, pixels)
        .masked_fill(~columns, -1e30)
        .log_softmax(dim=2)
        for rows, every in ((rows_s, all_s), (rows_t, all_t))
    )
    return ((log_t.exp() * (log_t - log_s)).sum(dim=2) * columns.any(dim=1)).sum(dim=1)


class CIRKDLoss(nn.Module):
    """Mini-batch part of CIRKD, see ``cross_image_loss``. Published weight: 1.

    Called as ``term(student, teacher, pixels)`` with maps (B, Cs, h', w') and (B, Ct, h, w); the student's map is
    resized bilinearly to the teacher's size where they differ. Widths need not match; B and sizes must be the same on
    all processes. Work grows with (B h w)^2 / pool^4.

    Args:
        temperature: tau, 0.1 as published.
        pool: side of the windows that are mean-pooled to one pixel each; 2 bounds the work at large sizes.

    Raises:
        GSKDError: an argument is not as above; or, when called, a shape does not match.
    """

    inputs: ClassVar[Literal["features", "logits"]] = "features"

    def __init__(self, temperature: float = 0.1, pool: int = 2) -> None:
        super().__init__()
        require_positive("temperature", temperature)
        require_count("pool", pool)
        self.temperature = temperature
        self.pool = pool

    def forward(self, student: Tensor, teacher: Tensor, pixels: Pixels) -> Tensor:
        """Returns the scalar loss."""
        require_pair(student, teacher, pixels)
        size = (teacher.shape[2], teacher.shape[3])
        valid = pixels.valid_at(size)
        with torch.autocast(student.device.type, enabled=False):
            s, there = masked_mean_pool(match_size(student, size), valid, self.pool)
            t, _ = masked_mean_pool(teacher.detach(), valid, self.pool)
            return cross_image_loss(s.flatten(2), t.flatten(2), there.flatten(1), self.temperature)


class MemoryBank(nn.Module):
    """For every class, the newest unit vectors of the teacher: a ring of fixed size, part of ``state_dict``.

    Args:
        num_classes: K.
        size: Q, places per class. Memory is K * Q * C * 4 bytes.
        channels: C.
    """

    same_on_all_processes: ClassVar[tuple[str, ...]] = ("rows", "written")

    rows: Tensor
    written: Tensor

    def __init__(self, num_classes: int, size: int, channels: int) -> None:
        super().__init__()
        self.size = size
        # One row more, for what is not kept: a write of fixed shape, without a copy of the bank.
        self.register_buffer("rows", torch.zeros(num_classes * size + 1, channels))
        self.register_buffer("written", torch.zeros(num_classes, dtype=torch.int64))

    @property
    def vectors(self) -> Tensor:
        """(K, Q, C), a view."""
        return self.rows[:-1].view(self.written.shape[0], self.size, -1)

    @torch.no_grad()
    def add(self, vectors: Tensor, labels: Tensor) -> None:
        """Adds the vectors of all processes, in the order of the processes.

        Args:
            vectors: (A, C); the same A on every process. Stored with length 1.
            labels: (A,) int64, the class of each; negative ones are left out.
        """
        labels = torch.where(vectors.isfinite().all(dim=1), labels, -1)  # a bad step must not stay here for good
        vectors = unit_length(torch.where(labels.unsqueeze(1) >= 0, promote(vectors), 0.0), dim=1)
        vectors, labels = gather_with_grad(vectors), gather_with_grad(labels)
        classes = self.written.shape[0]
        member = F.one_hot(torch.where(labels >= 0, labels, classes), classes + 1)[:, :classes]
        rank = (member.cumsum(dim=0) * member).sum(dim=1) - 1  # the how-manieth of its class
        total = member.sum(dim=0)
        own = labels.clamp(min=0)
        # Of more than the ring holds the last stay; which of two writes to one place would stay is undefined.
        kept = (labels >= 0) & (rank >= total[own] - self.size)
        place = own * self.size + (self.written[own] + rank) % self.size
        self.rows[torch.where(kept, place, classes * self.size)] = vectors.to(self.rows.dtype)
        self.written.add_(total)

    def filled(self) -> Tensor:
        """(K, Q) bool, the places that hold a vector."""
        return torch.arange(self.size, device=self.written.device) < self.written.unsqueeze(1)


def memory_loss(
    student: Tensor, teacher: Tensor, valid: Tensor, bank: Tensor, filled: Tensor, temperature: float = 0.1
) -> Tensor:
    """KL of the anchors' similarities to a memory, mean over the anchors of all processes.

    Equations 6 to 9 of the paper: softmax over the memory of the cosines divided by tau, KL(teacher || student).

    Args:
        student: (A, C) anchors in the teacher's width.
        teacher: (A, C); no gradient flows to it.
        valid: (A,) bool, the anchors that count.
        bank: (Q, C) unit vectors.
        filled: (Q,) bool, those that are there.
        temperature: tau; > 0.

    Returns:
        Scalar, float32 or wider; zero with zero gradient where there is no anchor or the memory is empty.
    """
    with torch.autocast(student.device.type, enabled=False):
        log_s, log_t = (
            (unit_length(promote(anchors), dim=1) @ bank.to(promote(anchors).dtype).mT / temperature)
            .masked_fill(~filled, -1e30)
            .log_softmax(dim=1)
            for anchors in (student, teacher.detach())
        )
        return mean_over_pixels((log_t.exp() * (log_t - log_s)).sum(dim=1), valid & filled.any())


class CIRKDMemoryLoss(nn.Module):
    """Memory part of CIRKD: sum of ``memory_loss`` against a bank of pixels and one of regions. Published weight: 0.1.

    A region is the mean of a class's vectors in an image. Anchors, and the pixels that enter the bank, are drawn by
    class-balanced sampling (where the paper takes all pixels as anchors): cost does not grow with the map. Every bank
    holds vectors of its own class only, and starts empty (public code starts with noise, and stores pixels of other
    classes by indexing the wrong set). Banks are the same on all processes, and part of the checkpoint.

    Called as ``term(student, teacher, pixels)`` with features (B, Cs, h', w') and (B, Ct, h, w); B must be the same on
    all processes.

    Args:
        student_channels: Cs.
        teacher_channels: Ct. The student's anchors pass a ``PointProjector`` to this width, as published.
        num_classes: K.
        pixel_bank: pixels kept per class; the published 20000 x 19 x 256 takes 389 MB, the default 1/10 of it.
        region_bank: regions kept per class; 2000 as published.
        samples_per_class: anchors of each class and image, which are also what enters the bank; 16 as published there.
        pixel_contrast: places of the pixel bank compared in one step, over all classes in equal parts (rounded up),
            drawn at random; 4096 as published.
        region_contrast: likewise of the region bank; 1024 as published.
        temperature: tau, 0.1 as published.

    Raises:
        GSKDError: an argument is not as above; or, when called, a shape does not match.
    """

    inputs: ClassVar[Literal["features", "logits"]] = "features"

    def __init__(
        self,
        student_channels: int,
        teacher_channels: int,
        num_classes: int,
        pixel_bank: int = 2000,
        region_bank: int = 2000,
        samples_per_class: int = 16,
        pixel_contrast: int = 4096,
        region_contrast: int = 1024,
        temperature: float = 0.1,
    ) -> None:
        super().__init__()
        for name, value in (
            ("num_classes", num_classes),
            ("pixel_bank", pixel_bank),
            ("region_bank", region_bank),
            ("samples_per_class", samples_per_class),
            ("pixel_contrast", pixel_contrast),
            ("region_contrast", region_contrast),
        ):
            require_count(name, value)
        require_positive("temperature", temperature)
        self.samples_per_class = samples_per_class
        self.pixel_contrast = min(-(-pixel_contrast // num_classes), pixel_bank)  # per class
        self.region_contrast = min(-(-region_contrast // num_classes), region_bank)
        self.temperature = temperature
        self.projector = PointProjector(student_channels, teacher_channels)
        self.pixels = MemoryBank(num_classes, pixel_bank, teacher_channels)
        self.regions = MemoryBank(num_classes, region_bank, teacher_channels)

    @property
    def bank_bytes(self) -> int:
        """Memory of both banks."""
        return sum(bank.vectors.numel() * bank.vectors.element_size() for bank in (self.pixels, self.regions))

    def forward(self, student: Tensor, teacher: Tensor, pixels: Pixels) -> Tensor:
        """Returns the scalar loss."""
        require_pair(student, teacher, pixels)
        require_maps("cirkd_memory: student", student, channels=self.projector.enter.in_features)
        require_maps("cirkd_memory: teacher", teacher, channels=self.pixels.vectors.shape[2])
        size = (teacher.shape[2], teacher.shape[3])
        labels, valid = pixels.labels_at(size), pixels.valid_at(size)
        classes = self.pixels.written.shape[0]
        if pixels.num_classes is not None and pixels.num_classes != classes:
            raise GSKDError(f"cirkd_memory: num_classes is {classes}, the labels have {pixels.num_classes}")
        with torch.autocast(student.device.type, enabled=False):
            sample = class_balanced_sample(labels, classes, self.samples_per_class, eligible=valid, policy="mask")
            target = promote(read_points(teacher.detach(), sample.index))
            anchors = self.projector(promote(read_points(student, sample.index, size)), sample.valid)
            if self.training:  # what a validation loss sees is not learnt from
                self._remember(teacher.detach(), labels, valid, target, sample.label)
            total: Tensor = anchors.new_zeros(())
            for bank, contrast in ((self.pixels, self.pixel_contrast), (self.regions, self.region_contrast)):
                vectors, filled = self._draw(bank, contrast)
                total = total + memory_loss(
                    anchors.flatten(0, 1),
                    target.flatten(0, 1),
                    sample.valid.flatten(),
                    vectors,
                    filled,
                    self.temperature,
                )
            return total

    def _remember(self, teacher: Tensor, labels: Tensor, valid: Tensor, points: Tensor, point_labels: Tensor) -> None:
        self.pixels.add(points.flatten(0, 1), point_labels.flatten())
        classes = self.regions.written.shape[0]
        maps = unit_length(promote(teacher).flatten(2), dim=1)
        own = torch.where(valid, labels, classes).flatten(1)
        member = F.one_hot(own, classes + 1)[:, :, :classes].to(maps.dtype)
        present = member.any(dim=1)  # (B, K)
        names = torch.arange(classes, device=labels.device).expand_as(present)
        self.regions.add((maps @ member).mT.flatten(0, 1), torch.where(present, names, -1).flatten())

    @staticmethod
    def _draw(bank: MemoryBank, count: int) -> tuple[Tensor, Tensor]:
        """``count`` places of every class at random, filled ones first."""
        filled = bank.filled()
        if count < bank.size:
            lottery = torch.rand(filled.shape, device=filled.device) + ~filled
            place = lottery.topk(count, dim=1, largest=False).indices
            filled = filled.gather(1, place)
            vectors = bank.vectors.gather(1, place.unsqueeze(2).expand(-1, -1, bank.vectors.shape[2]))
        else:
            # A copy: adding to the bank later must not change what the backward pass needs.
            vectors = bank.vectors.clone()
        return vectors.flatten(0, 1), filled.flatten()

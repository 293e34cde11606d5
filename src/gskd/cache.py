"""Teacher targets on disk: the teacher runs once for each fixed view, and not again (distiller -> cache -> trainer).

::

    cache/
      gskd-3f2a9c01d4e5b678/     one kind of target; all that it depends on is hashed into the name
        about.json               ... and spelled out here
        00000-9b1c0e4d7a55f210.safetensors   128 views in a row; the name holds the hash of the content

Another teacher, dataset, augmentation or loss argument is another folder, so what is stale is never found. Every shard
is checked against its hash before training; a damaged one is made again. Shards are written beside their place and
renamed, and hold the same whoever makes them: several processes may fill one cache, and a kill costs one shard.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import secrets
import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from gskd.checkpoint import write_text
from gskd.data import SegmentationDataset
from gskd.data.loading import batches
from gskd.data.views import FixedViews
from gskd.distiller import Distiller, Packed
from gskd.errors import GSKDError
from gskd.models import normalise, write_tensors
from gskd.progress import Progress
from gskd.recipe import ModelRecipe, Recipe
from gskd.run import augmentation_of, autocast_dtype, without_pretraining
from gskd.stops import Stopped, StopRequest

_FORMAT = 1
"""Counts changes of what is stored and of how targets are made."""
_VIEWS_PER_SHARD = 128
_VIEWS_PER_PASS = 8  # fixed, since the points that are sampled depend on which images share a pass
_SHARD = re.compile(r"(\d{5,})-([0-9a-f]{16})\.safetensors")
_ABANDONED = 3600  # seconds since a file was last written that is not in its place yet


@dataclass
class TargetStore:
    """The targets of one kind for all views. View v of sample i is item i * views + v."""

    folder: Path
    about: dict[str, Any]
    items: int
    """How many there are when it is whole."""
    _open: dict[int, Any] = field(default_factory=dict, repr=False)
    _paths: dict[int, Path] = field(default_factory=dict, repr=False)

    def shards(self) -> dict[int, Path]:
        """The files that are there, by number."""
        try:
            found = [(name, path) for path in self.folder.iterdir() if (name := _SHARD.fullmatch(path.name))]
        except FileNotFoundError:
            return {}
        except OSError as error:
            raise GSKDError(f"cache {self.folder}: cannot be read: {error.strerror or error}") from None
        return {int(name[1]): path for name, path in found}

    def shard_items(self, shard: int) -> range:
        """Which items a shard holds."""
        return range(shard * _VIEWS_PER_SHARD, min((shard + 1) * _VIEWS_PER_SHARD, self.items))

    def missing(self) -> set[int]:
        """Numbers of the shards that are not there."""
        return set(range(-(-self.items // _VIEWS_PER_SHARD))) - self.shards().keys()

    def tidy(self) -> list[str]:
        """Removes every file whose content is not what its name says, and names it; and what a kill left behind."""
        damaged = []
        try:
            for path in self.shards().values():
                if _content_hash(path) != path.stem[-16:]:
                    path.unlink(missing_ok=True)
                    damaged.append(f"cache {path}: is damaged and made again")
            for path in self.folder.glob("*.partial*"):
                if time.time() - path.stat().st_mtime > _ABANDONED:
                    path.unlink(missing_ok=True)
        except OSError as error:
            raise GSKDError(f"cache {self.folder}: cannot be checked: {error.strerror or error}") from None
        return damaged

    def write(self, shard: int, packed: Packed) -> None:
        """Adds a shard, whole or not at all.

        Raises:
            GSKDError: the disk is full, or the folder cannot be written.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            about = self.folder / "about.json"
            if not about.is_file():
                write_text(about, json.dumps(self.about, indent=1))
            mine = self.folder / f"{shard:05d}.{secrets.token_hex(4)}.partial"  # others may be at the same one
            write_tensors(packed, mine)
            os.replace(mine, self.folder / f"{shard:05d}-{_content_hash(mine)}.safetensors")
        except OSError as error:
            raise GSKDError(f"cache {self.folder}: cannot be written: {error.strerror or error}") from None

    def read(self, item: int) -> Packed:
        """One target, without the dimension of the image.

        Raises:
            GSKDError: it is not there, or cannot be read.
        """
        shard, row = divmod(item, _VIEWS_PER_SHARD)
        try:
            if shard not in self._open:
                self._paths = self._paths or self.shards()
                self._open[shard] = safe_open(self._paths[shard], framework="pt")
            file = self._open[shard]
            return {name: file.get_slice(name)[row] for name in file.keys()}  # noqa: SIM118 (not a dict)
        except (KeyError, OSError, SafetensorError) as error:
            raise GSKDError(f"cache {self.folder}: shard {shard:05d} cannot be read: {error}") from None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}}  # a worker process opens its own


def _content_hash(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


@dataclass(frozen=True)
class CacheSource:
    """What targets are made from."""

    recipe: Recipe
    """Names the folder of all caches, data, augmentation with fixed views, and teacher."""
    distiller: Distiller
    """With teacher and terms, where the teacher shall run."""
    teacher_model: ModelRecipe
    """What the teacher was built from."""
    data: SegmentationDataset
    """The training split."""

    def views(self) -> FixedViews:
        """All views that are cached."""
        assert self.recipe.augment.views is not None
        return FixedViews(self.data, augmentation_of(self.recipe), self.recipe.augment.views)

    def targets(self, images: Tensor, labels: Tensor, first: int) -> dict[str, Packed]:
        """The targets of views in a row, as they are stored, by term.

        Args:
            images: (B, 3, h, w) uint8.
            labels: (B, h, w) int64.
            first: number of the first view; what is random in a term's target depends on it alone.
        """
        recipe, model, teacher = self.recipe, self.teacher_model, self.distiller.teacher
        assert teacher is not None
        assert recipe.teacher is not None
        device = next(teacher.parameters()).device
        layout = torch.channels_last if recipe.train.channels_last else torch.contiguous_format
        normal = normalise(images.to(device), model.mean, model.std).contiguous(memory_format=layout)
        dtype = autocast_dtype(recipe.teacher.precision or recipe.train.precision)
        half = torch.bfloat16 if dtype == torch.float32 else dtype
        devices = [device] if device.type == "cuda" else []
        with torch.random.fork_rng(devices), torch.autocast(device.type, half, enabled=dtype == half):
            made = self.distiller.teacher_targets(normal, labels.to(device), seed=first)
        return {term: {key: value.cpu().contiguous() for key, value in one.items()} for term, one in made.items()}


class TeacherCache:
    """The targets of all terms of a distiller; called with a sample and a view it gives them by term."""

    def __init__(self, source: CacheSource) -> None:
        recipe, distiller, teacher_model, data = source.recipe, source.distiller, source.teacher_model, source.data
        assert recipe.teacher is not None
        assert recipe.teacher.cache is not None
        assert recipe.augment.views is not None
        assert distiller.teacher is not None
        self.root = Path(recipe.teacher.cache).expanduser()
        self.limit = int(recipe.teacher.cache_gib * 2**30)
        args = without_pretraining(teacher_model.name, teacher_model.args)
        shared = {
            "version": [_FORMAT, version("gskd")],
            "teacher": asdict(replace(teacher_model, args=args, weights=None)),
            "weights": weights_hash(distiller.teacher),
            "precision": str(recipe.teacher.precision or recipe.train.precision),
            "data": {"dataset": recipe.data.dataset, "split": recipe.data.train, "stamp": data.stamp()},
            "augment": asdict(recipe.augment),
        }
        self.stores: dict[str, TargetStore] = {}
        for term in distiller.losses:
            target = distiller.target_settings(term)
            about = {"target": target, **shared}
            digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:16]
            folder = self.root / f"{target['kind']}-{digest}"
            self.stores[term] = TargetStore(folder, about, len(data) * recipe.augment.views)
        self.views = recipe.augment.views

    def __call__(self, sample: int, view: int) -> dict[str, Packed]:
        """The targets of one view by term; terms that share a kind share what was read."""
        read: dict[Path, Packed] = {}
        for store in self.stores.values():
            if store.folder not in read:
                read[store.folder] = store.read(sample * self.views + view)
        return {term: read[store.folder] for term, store in self.stores.items()}

    def missing(self) -> set[int]:
        """Numbers of the shards that some store lacks."""
        return set().union(*(store.missing() for store in self.stores.values()))

    def require_whole(self) -> None:
        """Raises `GSKDError` where a shard is missing."""
        if missing := self.missing():
            raise GSKDError(f"cache {self.root}: {len(missing)} shards are missing, first {min(missing):05d}")

    def tidy(self) -> list[str]:
        """Removes damaged shards, and names them."""
        kinds = {store.folder: store for store in self.stores.values()}
        return [line for store in kinds.values() for line in store.tidy()]

    def size(self) -> int:
        """Bytes of all that lies in the folder of all caches."""
        try:
            return sum(path.stat().st_size for path in self.root.rglob("*") if path.is_file())
        except OSError as error:
            raise GSKDError(f"cache {self.root}: cannot be read: {error.strerror or error}") from None


def weights_hash(model: nn.Module) -> str:
    """SHA-256 over names and values of a model's parameters and buffers."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def fill_cache(source: CacheSource, progress: Progress, stop: StopRequest | None = None) -> TeacherCache:
    """Opens a cache and makes what it lacks: all the first time, damaged shards later, nothing when it is whole.

    Args:
        source: what it is filled from.
        progress: where lines for people go.
        stop: looked at between passes of the teacher.

    Raises:
        GSKDError: it would grow past ``teacher.cache_gib``, or past the disk; what is there is left.
        Stopped: ``stop`` was requested; whole shards are kept.
    """
    cache = TeacherCache(source)
    for line in cache.tidy():
        progress.say(line)
    missing = sorted(cache.missing())
    random.Random(os.getpid()).shuffle(missing)  # processes that fill the same cache begin at different ends
    store = next(iter(cache.stores.values()))
    total = sum(len(store.shard_items(shard)) for shard in missing)
    passes: list[tuple[int, range]] = []  # filled as the loader asks, emptied as its batches come

    def plan() -> Iterator[range]:
        for shard in missing:
            if any(shard in one.missing() for one in cache.stores.values()):  # no other process has made it since
                items = store.shard_items(shard)
                for first in range(items.start, items.stop, _VIEWS_PER_PASS):
                    passes.append((shard, range(first, min(first + _VIEWS_PER_PASS, items.stop))))
                    yield passes[-1][1]

    parts: list[dict[str, Packed]] = []
    done, tick = 0, progress.counter("running the teacher on all views")
    with batches(source.views(), source.recipe.data.workers, batch_sampler=plan()) as found:
        for images, labels in found:
            shard, items = passes.pop(0)
            targets = source.targets(images, labels, items.start)
            if done == 0:
                _check_room(cache, targets, total, progress)
            parts.append(targets)
            done += len(items)
            if items.stop == store.shard_items(shard).stop:
                for term, one in cache.stores.items():
                    if shard in one.missing():
                        one.write(shard, {key: torch.cat([part[term][key] for part in parts]) for key in targets[term]})
                parts.clear()
            if tick is not None:
                tick(done, total)
            if stop is not None and stop.requested:
                raise Stopped(f"view {done} of {total} of the cache")
    return cache


def verify_cache(cache: TeacherCache, source: CacheSource) -> Iterator[tuple[str, float]]:
    """Recomputes one pass of each of up to eight shards with the teacher: where, and the largest relative deviation.

    A deviation is the largest difference of a tensor over its largest value; 0 on the machine that made the cache.
    """
    store = next(iter(cache.stores.values()))
    views = source.views()
    shards = sorted(store.shards())
    for shard in shards[:: max(1, len(shards) // 8)][:8]:
        items = store.shard_items(shard)[:_VIEWS_PER_PASS]
        images, labels = map(torch.stack, zip(*(views[item] for item in items), strict=True))
        computed = source.targets(images, labels, items.start)
        for term, one in cache.stores.items():
            stored = [one.read(item) for item in items]
            for key, value in computed[term].items():
                if value.numel():
                    kept = torch.stack([packed[key] for packed in stored]).double()
                    scale = max(kept.abs().max().item(), 1e-12)
                    yield f"{term}.{key} of shard {shard:05d}", ((kept - value.double()).abs().max() / scale).item()


def _check_room(cache: TeacherCache, targets: Mapping[str, Packed], views: int, progress: Progress) -> None:
    """Says what filling the cache takes; an error where that is too much."""
    kinds = {store.folder: targets[term] for term, store in cache.stores.items() if store.missing()}
    sizes = {}
    for folder, packed in kinds.items():
        images = len(next(iter(packed.values())))
        sizes[folder.name] = sum(value.nbytes for value in packed.values()) / images
    per_view = sum(sizes.values())
    each = ", ".join(f"{name} {size / 1024:.1f}" for name, size in sizes.items())
    needed, there = int(per_view * views), cache.size()
    progress.say(
        f"cache {cache.root}: {views} views to make, {per_view / 1024:.1f} KiB each ({each}), {_mib(needed)} together"
    )
    if needed + there > cache.limit:
        raise GSKDError(
            f"cache {cache.root}: needs {_mib(needed)} beside the {_mib(there)} that are there;"
            f" expected at most teacher.cache_gib, {_mib(cache.limit)}"
        )
    try:
        cache.root.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(cache.root).free
    except OSError as error:
        raise GSKDError(f"cache {cache.root}: cannot be made: {error.strerror or error}") from None
    if needed > free:
        raise GSKDError(f"cache {cache.root}: needs {_mib(needed)}; the disk has {_mib(free)} left")


def _mib(size: int) -> str:
    return f"{size / 2**20:.1f} MiB"

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

import contextlib
import hashlib
import json
import math
import os
import random
import re
import secrets
import shutil
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from gskd.architectures import without_pretraining
from gskd.assembly import ready_teacher
from gskd.data import SegmentationDataset
from gskd.data.loading import batches
from gskd.data.views import FixedViews
from gskd.distiller import Distiller, Packed
from gskd.distributed import rank
from gskd.errors import GSKDError
from gskd.fast_teacher import TeacherPath, Trial
from gskd.models import normalise
from gskd.progress import Progress
from gskd.recipe import ModelRecipe, Recipe
from gskd.run import augmentation_of, layout_of, teacher_dtype
from gskd.stops import StopRequest

_FORMAT = 1
"""Counts changes of what is stored and of how targets are made."""
_MATTER = ("gskd", "torch", "torchvision", "pillow")
"""Packages whose version may change what a view or a target holds."""
_LIBRARIES = ("torch", "torchvision", "timm", "segmentation_models_pytorch", "transformers")
"""Of other code, which may change with its version unchanged, the files count."""
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

    def tidy(self, stop: StopRequest | None = None) -> list[str]:
        """Removes every file whose content is not what its name says, and names it; and what a kill left behind."""
        damaged, whole = [], set[str]()
        try:
            for path in sorted(self.folder.iterdir()) if self.folder.is_dir() else []:
                if stop is not None and stop.requested:
                    break
                with contextlib.suppress(FileNotFoundError):  # another process was faster
                    if name := _SHARD.fullmatch(path.name):
                        found = path.stat()
                        intact = _content_hash(path.read_bytes()) == name[2]
                        if intact:
                            self._opened(path, int(name[1]))  # one of another place is no damage
                        if intact and name[1] not in whole:
                            whole.add(name[1])
                        elif path.stat().st_ino == found.st_ino:  # not made again by another process meanwhile
                            path.unlink()
                            damaged += [] if intact else [f"cache {path}: is damaged and removed"]
                    elif path.suffix == ".partial" and time.time() - path.stat().st_mtime > _ABANDONED:
                        path.unlink()
        except OSError as error:
            raise GSKDError(f"cache {self.folder}: cannot be checked: {error.strerror or error}") from None
        return damaged

    def write(self, shard: int, packed: Packed) -> None:
        """Adds a shard, whole or not at all; nothing where another process has added it.

        Raises:
            GSKDError: the disk is full, or the folder cannot be written.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            about = self.folder / "about.json"
            if not about.is_file():
                _place(json.dumps(self.about, indent=1).encode(), about)
            if shard in self.missing():
                data = save(packed, metadata=self._place_of(shard))
                _place(data, self.folder / f"{shard:05d}-{_content_hash(data)}.safetensors")
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
                self._open[shard] = self._opened(self._paths[shard], shard)
            file = self._open[shard]
            return {name: file.get_slice(name)[row] for name in file.keys()}  # noqa: SIM118 (not a dict)
        except (KeyError, OSError, SafetensorError) as error:
            raise GSKDError(f"cache {self.folder}: shard {shard:05d} cannot be read: {error}") from None

    def _opened(self, path: Path, shard: int) -> Any:
        opened = safe_open(path, framework="pt")
        if opened.metadata() != self._place_of(shard):  # type: ignore[no-untyped-call]
            raise OSError(f"{path.name} was made for another place")
        return opened

    def _place_of(self, shard: int) -> dict[str, str]:
        """What is written into a file; one entry, as safetensors does not keep the order of several."""
        return {"place": f"{self.folder.name}/{shard:05d}"}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}}  # a worker process opens its own


def _content_hash(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def _place(data: bytes, path: Path) -> None:
    """Writes a file beside its place and renames it; others may be at the same one."""
    partial = path.with_name(f"{path.name}.{secrets.token_hex(4)}.partial")
    try:
        with open(partial, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise


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

    @property
    def device(self) -> torch.device:
        """Where the teacher runs."""
        assert self.distiller.teacher is not None
        return next(self.distiller.teacher.parameters()).device

    def views(self) -> FixedViews:
        """All views that are cached."""
        assert self.recipe.augment.views is not None
        return FixedViews(self.data, augmentation_of(self.recipe), self.recipe.augment.views)

    def ready(self, cache: TeacherCache) -> list[Trial]:
        """Makes the teacher as fast as the recipe allows, before it is run: as it was for what the cache holds already.

        Returns:
            What was tried, where that was asked for and is not known.
        """
        kept = cache.teacher_path()
        tried = ready_teacher(self.recipe, self.distiller, self.teacher_model, self.data, _VIEWS_PER_PASS, kept)
        if tried and self.distiller.teacher_path is not None and rank() == 0:
            cache.keep_teacher_path(self.distiller.teacher_path)
        return tried

    def targets(self, images: Tensor, labels: Tensor, first: int) -> dict[str, Packed]:
        """The targets of views in a row, as they are stored, by term.

        Args:
            images: (B, 3, h, w) uint8.
            labels: (B, h, w) int64.
            first: number of the first view; what is random in a term's target depends on it alone.
        """
        recipe, model, device = self.recipe, self.teacher_model, self.device
        normal = normalise(images.to(device), model.mean, model.std).contiguous(memory_format=layout_of(recipe))
        dtype = teacher_dtype(recipe)
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
            "versions": {"format": _FORMAT, **{name: version(name) for name in _MATTER}},
            "code": code_stamp(distiller.teacher),
            "teacher": asdict(replace(teacher_model, args=args, weights=None)),
            "weights": weights_hash(distiller.teacher),
            "precision": str(recipe.teacher.precision or recipe.train.precision),
            "data": {"dataset": recipe.data.dataset, "split": recipe.data.train, "stamp": data.stamp()},
            "augment": asdict(recipe.augment),
        }
        digest = hashlib.sha256(json.dumps(shared, sort_keys=True).encode()).hexdigest()[:16]
        self._path_file = self.root / f"path-{digest}.json"
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

    def teacher_path(self) -> TeacherPath | None:
        """How the teacher ran for these views, where that was probed: what is added must be made alike."""
        try:
            return TeacherPath.from_json(json.loads(self._path_file.read_text(encoding="utf-8")))
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def keep_teacher_path(self, path: TeacherPath) -> None:
        """Remembers what was probed, for all terms of these views.

        Raises:
            GSKDError: it cannot be written.
        """
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            _place(json.dumps(path.to_json()).encode(), self._path_file)
        except OSError as error:
            raise GSKDError(f"cache {self.root}: cannot be written: {error.strerror or error}") from None

    def missing(self) -> set[int]:
        """Numbers of the shards that some store lacks."""
        return set().union(*(store.missing() for store in self.stores.values()))

    def require_whole(self) -> None:
        """Raises `GSKDError` where a shard is missing."""
        if missing := self.missing():
            raise GSKDError(f"cache {self.root}: {len(missing)} shards are missing, first {min(missing):05d}")

    def tidy(self, stop: StopRequest | None = None) -> list[str]:
        """Removes damaged shards, and names them."""
        kinds = {store.folder: store for store in self.stores.values()}
        return [line for store in kinds.values() for line in store.tidy(stop)]

    def size(self) -> int:
        """Bytes of all that lies in the folder of all caches."""
        total = 0
        for path in self.root.rglob("*"):
            with contextlib.suppress(OSError):  # moved to its place by another process
                total += path.stat().st_size if path.is_file() else 0
        return total


def weights_hash(model: nn.Module) -> str:
    """SHA-256 over names and values of a model's parameters and buffers."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def code_stamp(model: nn.Module) -> dict[str, str]:
    """What a model computes with its weights: the version of each known library that its layers come from, and for
    all other code the hash of the file that they are defined in."""
    found: dict[str, str] = {}
    for name in sorted({type(module).__module__ for module in model.modules()}):
        package = name.partition(".")[0]
        file = getattr(sys.modules.get(name), "__file__", None)
        if package in _LIBRARIES:
            found[package] = version(package)
        elif package != __package__ and file is not None:  # our own version counts anyway
            found[name] = hashlib.sha256(Path(file).read_bytes()).hexdigest()
    return found


def fill_cache(cache: TeacherCache, source: CacheSource, progress: Progress, stop: StopRequest | None = None) -> None:
    """Makes what a cache lacks: all the first time, nothing when it is whole.

    Args:
        cache: of the same source.
        source: what it is filled from.
        progress: where lines for people go.
        stop: looked at between passes of the teacher; whole shards are kept.

    Raises:
        GSKDError: it would grow past ``teacher.cache_gib``, or past the disk; what is there is left.
    """
    missing = sorted(cache.missing())
    if not missing:
        return
    random.Random(secrets.token_hex()).shuffle(missing)  # processes that fill the same cache begin at different ends
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
                _check_room(cache, targets, progress)
            parts.append(targets)
            done += len(items)
            if items.stop == store.shard_items(shard).stop:
                for term, one in cache.stores.items():
                    one.write(shard, {key: torch.cat([part[term][key] for part in parts]) for key in targets[term]})
                parts.clear()
            if tick is not None:
                tick(done, total)
            if stop is not None and stop.requested:
                return


def verify_cache(cache: TeacherCache, source: CacheSource) -> Iterator[tuple[str, float]]:
    """Recomputes one pass of each of up to eight shards with the teacher: where, and the largest relative deviation.

    A deviation is the largest difference of a tensor over its largest value, or of integers the share that differs; 0
    on the machine that made the cache. On another kind of device GSKD's points are other draws.
    """
    source.ready(cache)
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
                    kept = torch.stack([packed[key] for packed in stored])
                    if value.is_floating_point():
                        scale = max(kept.double().abs().max().item(), 1e-12)
                        deviation = ((kept.double() - value.double()).abs().max() / scale).item()
                    else:
                        deviation = (kept != value).double().mean().item()
                    yield f"{term}.{key} of shard {shard:05d}", math.inf if math.isnan(deviation) else deviation


def _check_room(cache: TeacherCache, targets: Mapping[str, Packed], progress: Progress) -> None:
    """Says what filling the cache takes; an error where that is too much."""
    needed, there = 0, cache.size()
    for term, store in {store.folder: (term, store) for term, store in cache.stores.items()}.values():
        views = sum(len(store.shard_items(shard)) for shard in store.missing())
        images = len(next(iter(targets[term].values())))
        each = sum(value.nbytes for value in targets[term].values()) / images
        needed += int(each * views)
        if views:
            size = f"{each / 1024:.1f} KiB each, {_mib(int(each * views))}"
            progress.say(f"cache {store.folder}: {views} views to make, {size}")
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

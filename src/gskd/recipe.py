"""Recipes: typed YAML with ``key=value`` overrides; every mistake is reported at once, before anything runs.

The dataclasses below are the whole schema and its documentation: a field that is not here is an unknown key.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

import yaml
from omegaconf import MISSING, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from gskd.errors import GSKDError, near_names


class Precision(StrEnum):
    """Arithmetic of the forward pass; weights stay fp32."""

    fp32 = "fp32"
    bf16 = "bf16"
    fp16 = "fp16"


class OptimizerName(StrEnum):
    """Optimisers of torch.optim."""

    adamw = "adamw"
    sgd = "sgd"


class ScheduleName(StrEnum):
    """How the learning rate moves: see `gskd.trainer.learning_rate_factor`."""

    poly = "poly"
    onecycle = "onecycle"
    constant = "constant"


class EvalMode(StrEnum):
    """Whole image at once, or overlapping windows."""

    whole = "whole"
    slide = "slide"


@dataclass
class DataRecipe:
    """Where samples come from."""

    dataset: str = "scenes"
    """camvid, folder or scenes."""
    root: str | None = None
    """The dataset's folder; scenes needs none."""
    options: dict[str, Any] = field(default_factory=dict)
    """Further arguments of the dataset, for example `size` of scenes or `classes` of folder."""
    train: str = "train"
    val: str = "val"
    test: str | None = None
    """Names of the splits. `val` picks the best checkpoint; `test`, where named, is scored once at the end."""
    workers: int = 0
    """Processes that load data; 0 loads in the training process."""
    cache_gib: float = 2.0
    """Memory for decoded samples, in GiB for each loading process; 0 decodes every time."""


@dataclass
class AugmentRecipe:
    """Ranges of the random views, see `gskd.data.views.Augmentation`."""

    crop: list[int] = field(default_factory=lambda: [96, 128])
    scale: list[float] = field(default_factory=lambda: [0.5, 2.0])
    flip: float = 0.5
    brightness: float = 0.25
    contrast: float = 0.25
    saturation: float = 0.25
    hue: float = 0.0


@dataclass
class ModelRecipe:
    """A network: `smp:Architecture` or `package.module:callable`, with arguments and weights."""

    name: str = MISSING
    args: dict[str, Any] = field(default_factory=dict)
    weights: str | None = None
    """A .safetensors file, or a run folder (then its best student)."""
    mean: list[float] = field(default_factory=lambda: [0.485, 0.456, 0.406])
    std: list[float] = field(default_factory=lambda: [0.229, 0.224, 0.225])
    """Of the RGB channels in 0..1; images are normalised with each model's own."""


@dataclass
class TeacherRecipe:
    """The network to learn from: a finished run, or a model with weights."""

    run: str | None = None
    """A run folder of this library; names the model and the weights at once."""
    model: ModelRecipe | None = None
    """Instead of `run`: any model. Weights should be named, else the teacher is random."""
    precision: Precision | None = None
    """Arithmetic of the teacher's forward pass; by default that of training."""


@dataclass
class TermRecipe:
    """One distillation term."""

    weight: float = 1.0
    loss: str | None = None
    """Name of the loss; by default the term's own name, so that the same loss can stand twice under two names."""
    student: str = "auto"
    teacher: str = "auto"
    """Layers to read, by dotted name; `logits` is the output; `auto` chooses for known families of models."""
    args: dict[str, Any] = field(default_factory=dict)
    """Arguments of the loss."""


@dataclass
class TrainRecipe:
    """The optimisation."""

    steps: int = 1000
    batch: int = 8
    """Images per optimiser step, over all processes and accumulation rounds."""
    accumulate: int = 1
    """Rounds of forward and backward per optimiser step."""
    optimizer: OptimizerName = OptimizerName.adamw
    lr: float = 1e-3
    """Peak learning rate."""
    weight_decay: float = 0.01
    """Not applied to biases and normalisation."""
    momentum: float = 0.9
    """Of SGD."""
    schedule: ScheduleName = ScheduleName.onecycle
    warmup: float = 0.1
    """Share of the steps over which the rate rises."""
    clip: float | None = None
    """Largest norm of the gradient; by default it is left as it is."""
    precision: Precision = Precision.fp32
    channels_last: bool = False
    device: str = "auto"
    """auto or cpu."""
    threads: int | None = None
    """CPU threads of one process; by default PyTorch's own choice."""
    log_every: int = 20
    checkpoint_every: int = 500
    keep: int = 2
    """Checkpoints kept, the newest."""
    tensorboard: bool = True


@dataclass
class EvalRecipe:
    """How a model is scored, always at the labels' own resolution."""

    every: int = 500
    """Steps between scores on the val split; the last step is always scored."""
    mode: EvalMode = EvalMode.whole
    window: list[int] = field(default_factory=lambda: [512, 512])
    """Of slide: (height, width)."""
    overlap: float = 0.33
    """Of slide: least share of a window that its neighbour covers again."""
    scales: list[float] = field(default_factory=lambda: [1.0])
    """The image is scored at each of these scales and the probabilities are averaged."""
    flip: bool = False
    """Averages with the mirrored image."""
    precision: Precision | None = None
    """By default that of training."""


@dataclass
class Recipe:
    """Everything one run needs. `gskd train` trains `model` alone; `gskd distill` adds `teacher` and `terms`."""

    output: str = MISSING
    """The run folder."""
    seed: int = 0
    data: DataRecipe = field(default_factory=DataRecipe)
    augment: AugmentRecipe = field(default_factory=AugmentRecipe)
    model: ModelRecipe = field(default_factory=ModelRecipe)
    teacher: TeacherRecipe | None = None
    terms: dict[str, TermRecipe] = field(default_factory=dict)
    train: TrainRecipe = field(default_factory=TrainRecipe)
    eval: EvalRecipe = field(default_factory=EvalRecipe)


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Reads a recipe.

    Args:
        path: a YAML file, or the name of a recipe shipped with the package, such as ``"scenes"``.
        overrides: ``dotted.key=value``, each value read as YAML; they win over the file.

    Raises:
        GSKDError: the file cannot be read, or anything in it or in the overrides does not fit; every mistake is named.
    """
    shipped = {file.stem: file for file in (Path(__file__).parent / "recipes").glob("*.yaml")}
    file = Path(path)
    if not file.is_file():
        if str(path) not in shipped:
            near = near_names(str(path), shipped)
            raise GSKDError(f"recipe {path}: no such file, and no recipe of this name is shipped{near}")
        file = shipped[str(path)]
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise GSKDError(f"recipe {path}: cannot be read: {_reason(error)}") from None
    try:
        tree = yaml.load(text, _UniqueKeys)
    except yaml.YAMLError as error:
        raise GSKDError(f"recipe {path}: not valid YAML: {' '.join(str(error).split())}") from None
    return parse_recipe(tree, overrides, source=f"recipe {path}")


def parse_recipe(tree: Any, overrides: Sequence[str] = (), source: str = "recipe") -> Recipe:
    """Checks a tree of plain values and makes a `Recipe` of it; see `load_recipe`."""
    if not isinstance(tree, dict):
        found = "nothing" if tree is None else f"a {type(tree).__name__}"
        raise GSKDError(f"{source}: expected keys and values, found {found}")
    mistakes: list[str] = []
    tree = _copy(tree)
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals or not key:
            mistakes.append(f"override {override!r}: expected key=value")
            continue
        try:
            _set(tree, key.split("."), yaml.load(value, _UniqueKeys))
        except yaml.YAMLError:
            mistakes.append(f"override {override!r}: the value is not valid YAML")
        except TypeError:
            mistakes.append(f"override {override!r}: {key.rsplit('.', 1)[0]} holds a value, not further keys")
    cleaned = _check(tree, Recipe, "", mistakes)
    if not mistakes:
        recipe: Recipe = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Recipe), cleaned))  # type: ignore[assignment]
        mistakes += _conflicts(recipe)
    if mistakes:
        raise GSKDError(f"{source}: " + "; ".join(mistakes))
    return recipe


def dump_recipe(recipe: Recipe) -> str:
    """The recipe as YAML, every default spelled out."""
    return yaml.safe_dump(_plain(asdict(recipe)), sort_keys=False)


class _UniqueKeys(yaml.SafeLoader):
    """YAML 1.1 as PyYAML reads it, but a key that stands twice is an error, and 1e-3 is a number."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)  # type: ignore[no-untyped-call]
            if isinstance(key, (str, int, float, bool)) and key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} stands twice", key_node.start_mark)
            seen.add(key if isinstance(key, (str, int, float, bool)) else id(key))
        return super().construct_mapping(node, deep)


_UniqueKeys.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    __import__("re").compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)


def _reason(error: Exception) -> str:
    return str(getattr(error, "strerror", None) or error)


def _copy(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {key: _copy(value) for key, value in tree.items()}
    return list(tree) if isinstance(tree, list) else tree


def _plain(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {key: _plain(value) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return [_plain(value) for value in tree]
    return tree.value if isinstance(tree, StrEnum) else tree


def _set(tree: dict[str, Any], keys: list[str], value: Any) -> None:
    for key in keys[:-1]:
        child = tree.setdefault(key, {})
        if child is None:
            child = tree[key] = {}
        if not isinstance(child, dict):
            raise TypeError
        tree = child
    tree[keys[-1]] = value


# The node types of the schema that hold further fields, by (owner, field).
_CHILDREN: dict[tuple[type, str], type] = {
    (Recipe, "data"): DataRecipe,
    (Recipe, "augment"): AugmentRecipe,
    (Recipe, "model"): ModelRecipe,
    (Recipe, "teacher"): TeacherRecipe,
    (Recipe, "train"): TrainRecipe,
    (Recipe, "eval"): EvalRecipe,
    (TeacherRecipe, "model"): ModelRecipe,
}


def _check(tree: dict[str, Any], schema: type, prefix: str, mistakes: list[str]) -> dict[str, Any]:
    """Checks one level field by field, since OmegaConf stops at its first mistake and we report all of them."""
    names = [f.name for f in fields(schema)]
    kept: dict[str, Any] = {}
    for key, value in tree.items():
        where = f"{prefix}{key}"
        if key not in names:
            mistakes.append(f"unknown key {where}{near_names(str(key), names)}")
            continue
        child = _CHILDREN.get((schema, key))
        if child is not None and value is not None:
            if isinstance(value, dict):
                kept[key] = _check(value, child, where + ".", mistakes)
            else:
                mistakes.append(f"{where}: expected keys and values, found {value!r}")
            continue
        if schema is Recipe and key == "terms" and isinstance(value, dict):
            kept[key] = {}
            for name, term in value.items():
                if term is None or isinstance(term, dict):
                    kept[key][str(name)] = _check(term or {}, TermRecipe, f"{where}.{name}.", mistakes)
                else:
                    mistakes.append(f"{where}.{name}: expected keys and values, found {term!r}")
            continue
        try:
            OmegaConf.merge(OmegaConf.structured(schema), {key: value})
        except OmegaConfBaseException as error:
            expected = next(f.type for f in fields(schema) if f.name == key)
            reason = str(error).splitlines()[0]
            choices = [m.value for m in _enum_of(str(expected))]
            wanted = f"one of {', '.join(choices)}" if choices else str(expected)
            mistakes.append(f"{where}: expected {wanted}, found {value!r}" + ("" if wanted else f" ({reason})"))
            continue
        kept[key] = value
    return kept


def _enum_of(annotation: str) -> list[StrEnum]:
    for enum in (Precision, OptimizerName, ScheduleName, EvalMode):
        if enum.__name__ in annotation:
            return list(enum)
    return []


def _conflicts(recipe: Recipe) -> list[str]:
    """What each field allows but the whole does not."""
    train, wrong = recipe.train, []
    if recipe.output == MISSING:
        wrong.append("output: missing; name the run folder, for example output=runs/first")
    if recipe.model.name == MISSING:
        wrong.append("model.name: missing; for example smp:DeepLabV3Plus")
    if recipe.teacher is not None and (recipe.teacher.run is None) == (recipe.teacher.model is None):
        wrong.append("teacher: expected either run or model")
    if recipe.teacher is not None and recipe.teacher.model is not None and recipe.teacher.model.name == MISSING:
        wrong.append("teacher.model.name: missing; for example smp:DeepLabV3Plus")
    positive = {
        "train.steps": train.steps,
        "train.batch": train.batch,
        "train.accumulate": train.accumulate,
        "train.lr": train.lr,
        "train.log_every": train.log_every,
        "train.checkpoint_every": train.checkpoint_every,
        "train.keep": train.keep,
        "eval.every": recipe.eval.every,
    }
    wrong += [f"{name}: expected more than 0, got {value}" for name, value in positive.items() if value <= 0]
    if train.threads is not None and train.threads < 1:
        wrong.append(f"train.threads: expected at least 1, got {train.threads}")
    if train.accumulate > 0 and train.batch % train.accumulate:
        wrong.append(f"train.batch: {train.batch} images do not divide into train.accumulate {train.accumulate} rounds")
    if not 0 <= train.warmup < 1:
        wrong.append(f"train.warmup: expected a share of the steps from 0 to below 1, got {train.warmup}")
    if train.clip is not None and train.clip <= 0:
        wrong.append(f"train.clip: expected more than 0 or null, got {train.clip}")
    if train.device not in ("auto", "cpu"):
        wrong.append(f"train.device: expected auto or cpu, got {train.device!r}")
    if recipe.data.workers < 0:
        wrong.append(f"data.workers: expected 0 or more, got {recipe.data.workers}")
    pairs: dict[str, list[Any]] = {
        "augment.crop": recipe.augment.crop,
        "augment.scale": recipe.augment.scale,
        "eval.window": recipe.eval.window,
    }
    wrong += [f"{name}: expected two numbers, got {value}" for name, value in pairs.items() if len(value) != 2]
    for name, model in {"model": recipe.model, "teacher.model": recipe.teacher and recipe.teacher.model}.items():
        if is_dataclass(model) and (len(model.mean) != 3 or len(model.std) != 3 or min(model.std) <= 0):
            wrong.append(
                f"{name}.mean and std: expected three numbers each, std above 0, got {model.mean}, {model.std}"
            )
    if not recipe.eval.scales or min(recipe.eval.scales) <= 0:
        wrong.append(f"eval.scales: expected factors above 0, got {recipe.eval.scales}")
    if not 0 <= recipe.eval.overlap < 1:
        wrong.append(f"eval.overlap: expected a share from 0 to below 1, got {recipe.eval.overlap}")
    return wrong

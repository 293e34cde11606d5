"""Recipes: typed YAML with ``key=value`` overrides; every mistake is reported at once, before anything runs.

The fields and their meaning stand in `gskd.schema`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, fields
from enum import StrEnum
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from omegaconf import MISSING, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from gskd.errors import GSKDError, near_names
from gskd.schema import (
    AugmentRecipe,
    DataRecipe,
    EvalMode,
    EvalRecipe,
    ModelRecipe,
    OptimizerName,
    Precision,
    Recipe,
    ScheduleName,
    TeacherPrecision,
    TeacherRecipe,
    TermRecipe,
    TrainRecipe,
    Unreadable,
)

__all__ = [
    "AugmentRecipe",
    "DataRecipe",
    "EvalMode",
    "EvalRecipe",
    "ModelRecipe",
    "OptimizerName",
    "Precision",
    "Recipe",
    "ScheduleName",
    "TeacherPrecision",
    "TeacherRecipe",
    "TermRecipe",
    "TrainRecipe",
    "Unreadable",
    "dump_recipe",
    "load_recipe",
    "load_tree",
    "parse_recipe",
    "set_value",
]


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Reads a recipe.

    Args:
        path: a YAML file, or the name of a recipe shipped with the package, such as ``"scenes"``.
        overrides: ``dotted.key=value``, each value read as YAML; they win over the file.

    Raises:
        GSKDError: the file cannot be read, or anything in it or in the overrides does not fit; every mistake is named.
    """
    return parse_recipe(load_tree(path), overrides, source=f"recipe {path}")


def load_tree(path: str | Path, kind: str = "recipe") -> Any:
    """The plain values of a YAML file, or of one shipped with the package by its name, unchecked.

    Args:
        path: the file or the name.
        kind: what it should be, for the error: "recipe" or "comparison".

    Raises:
        GSKDError: it cannot be read.
    """
    shipped = {file.stem: file for file in (Path(__file__).parent / "recipes").glob("*.yaml")}
    file = Path(path)
    if not file.is_file():
        if str(path) not in shipped:
            of_kind = [name for name in shipped if name.startswith("compare_") == (kind == "comparison")]
            near = near_names(str(path), of_kind)
            raise GSKDError(f"{kind} {path}: no such file, and no {kind} of this name is shipped{near}")
        file = shipped[str(path)]
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise GSKDError(f"{kind} {path}: cannot be read: {_reason(error)}") from None
    try:
        return _read_yaml(text)
    except yaml.YAMLError as error:
        raise GSKDError(f"{kind} {path}: not valid YAML: {' '.join(str(error).split())}") from None


def parse_recipe(tree: Any, overrides: Sequence[str] = (), source: str = "recipe") -> Recipe:
    """Checks a tree of plain values and makes a `Recipe` of it; see `load_recipe`."""
    if not isinstance(tree, dict):
        found = "nothing" if tree is None else f"a {type(tree).__name__}"
        raise GSKDError(f"{source}: expected keys and values, found {found}")
    mistakes: list[str] = []
    tree = _copy(tree)
    for override in overrides:
        try:
            set_value(tree, override)
        except GSKDError as error:
            mistakes.append(str(error))
    misfits: dict[str, str] = {}
    cleaned = _check(tree, Recipe, "", misfits)
    recipe: Recipe = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Recipe), cleaned))  # type: ignore[assignment]
    mistakes += misfits.values()
    for where, conflict in _conflicts(recipe):
        # A field that did not fit stands at its default here: what that conflicts with is no mistake of the user's.
        if not any(f"{misfit}.".startswith(f"{where}.") or f"{where}.".startswith(f"{misfit}.") for misfit in misfits):
            mistakes.append(f"{where}: {conflict}")
    if mistakes:
        raise GSKDError(f"{source}: " + "; ".join(mistakes))
    return recipe


def set_value(tree: dict[str, Any], override: str) -> None:
    """Puts a ``dotted.key=value`` into a tree, the value read as YAML.

    Raises:
        GSKDError: it is not of that form, or the key leads through a value.
    """
    key, equals, value = override.partition("=")
    if not equals or not key:
        raise GSKDError(f"override {override!r}: expected key=value")
    try:
        _set(tree, key.split("."), _read_yaml(value))
    except yaml.YAMLError as error:
        raise GSKDError(f"override {override!r}: the value is not valid YAML: {' '.join(str(error).split())}") from None
    except TypeError:
        raise GSKDError(f"override {override!r}: {key.rsplit('.', 1)[0]} holds a value, not further keys") from None


def dump_recipe(recipe: Recipe) -> str:
    """The recipe as YAML, every default spelled out."""
    return yaml.dump(_plain(asdict(recipe)), Dumper=_Dumper, sort_keys=False)


class _Loader(yaml.SafeLoader):
    """YAML 1.1 as PyYAML reads it, but a key that stands twice is an error, 1e-3 is a number and a date is text."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":  # <<: *anchor, whose keys may stand here again
                continue
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, (str, int, float, bool)) and key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} stands twice", key_node.start_mark)
            seen.add(key if isinstance(key, (str, int, float, bool)) else id(key))
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Writes what `_Loader` reads: the text '1e3' is quoted, since it would come back as a number."""


_FLOAT = re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$")
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789"))
_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789"))
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
    for first, resolvers in _Loader.yaml_implicit_resolvers.items()
}


_MOST_VALUES, _DEEPEST = 100_000, 50


def _read_yaml(text: str) -> Any:
    try:
        tree = yaml.load(text, _Loader)
    except (ValueError, RecursionError) as error:  # PyYAML lets through what the constructors of its scalars raise
        raise yaml.YAMLError(str(error)) from None
    _count_values(tree, 0, 0)
    return tree


def _count_values(tree: Any, so_far: int, depth: int) -> int:
    """Refuses aliases that repeat themselves into more values than any memory holds, or stand inside themselves."""
    if so_far > _MOST_VALUES or depth > _DEEPEST:
        raise yaml.YAMLError(f"more than {_MOST_VALUES} values, or {_DEEPEST} of them inside one another")
    if isinstance(tree, (dict, list)):
        for value in tree.values() if isinstance(tree, dict) else tree:
            so_far = _count_values(value, so_far + 1, depth + 1)
    return so_far


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


def _check(tree: dict[str, Any], schema: type, prefix: str, misfits: dict[str, str]) -> dict[str, Any]:
    """Keeps what fits one level of the schema; what does not goes into ``misfits``, a message by dotted path.

    Field by field, since OmegaConf stops at its first mistake and we report all of them.
    """
    annotations = {f.name: str(f.type) for f in fields(schema)}
    kept: dict[str, Any] = {}
    for key, value in tree.items():
        where = f"{prefix}{key}"
        child = _CHILDREN.get((schema, key))
        magic = next(_magic(value), None)
        if key not in annotations:
            misfits[where] = f"unknown key {where}{near_names(str(key), annotations)}"
        elif child is not None and isinstance(value, dict):
            kept[key] = _check(value, child, where + ".", misfits)
        elif schema is Recipe and key == "terms" and isinstance(value, dict):
            kept[key] = {}
            for name, term in value.items():
                if isinstance(term, dict):
                    kept[key][str(name)] = _check(term, TermRecipe, f"{where}.{name}.", misfits)
                elif term is not None:
                    misfits[f"{where}.{name}"] = f"{where}.{name}: expected keys and values or null, found {term!r}"
        elif magic is not None:
            misfits[where] = (
                f"{where}: expected plain values, found {magic!r}; recipes know neither interpolation nor NUL"
            )
        elif not _fits(schema, key, annotations[key], value):
            misfits[where] = f"{where}: expected {_wanted(annotations[key])}, found {value!r}"
        else:
            kept[key] = value
    return kept


def _magic(value: Any) -> Iterator[str]:
    """Texts that are not what they say: to OmegaConf ``${...}`` and ``???``, to the system a NUL in a path."""
    if isinstance(value, str) and ("${" in value or value == MISSING or "\0" in value):
        yield value
    elif isinstance(value, (dict, list)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _magic(item)


def _fits(schema: type, key: str, annotation: str, value: Any) -> bool:
    if annotation.startswith("str") and not isinstance(value, (str, type(None))):
        return False  # OmegaConf would make text of it: 1e3 would become '1000.0', and 007 the text '7'
    try:
        merged: Any = OmegaConf.merge(_structured(schema), {key: value})
    except (OmegaConfBaseException, TypeError):  # it raises TypeError for a list where keys and values are due
        return False
    node = merged[key]
    numbers = node if isinstance(node, ListConfig) else [node]
    return all(math.isfinite(number) for number in numbers if isinstance(number, float))


@cache
def _structured(schema: type) -> Any:
    """Made once: a comparison checks hundreds of fields, and merging copies it anyway."""
    return OmegaConf.structured(schema)


def _wanted(annotation: str) -> str:
    for enum in (TeacherPrecision, Precision, OptimizerName, ScheduleName, EvalMode, Unreadable):
        if enum.__name__ in annotation:
            return f"one of {', '.join(enum)}" + (" or null" if "None" in annotation else "")
    kind, _, optional = annotation.partition(" | ")
    words = {
        "str": "text (in quotes where YAML sees a number)",
        "int": "a whole number",
        "float": "a finite number",
        "bool": "true or false",
        "list[int]": "a list of whole numbers",
        "list[float]": "a list of finite numbers",
    }
    return words.get(kind, "keys and values") + (" or null" if optional else "")


def _conflicts(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """What each field allows but the whole does not: dotted path and message."""
    train, augment, spec = recipe.train, recipe.augment, recipe.eval
    if not recipe.output:
        yield "output", "missing; name the run folder, for example output=runs/first"
    if not 0 <= recipe.seed < 2**63:
        yield "seed", f"expected a whole number from 0 to below 2**63, got {recipe.seed}"
    for name in ("train", "val"):
        if not getattr(recipe.data, name):
            yield f"data.{name}", "missing; name a split"
    if recipe.data.cache_gib < 0:
        yield "data.cache_gib", f"expected 0 or more, got {recipe.data.cache_gib}"
    for name, term in recipe.terms.items():
        if term.weight < 0:
            yield f"terms.{name}.weight", f"expected 0 or more, got {term.weight}"
        for side, given in (("student", term.student), ("teacher", term.teacher)):
            several = isinstance(given, list) and given and all(isinstance(layer, str) for layer in given)
            if not (several or isinstance(given, str)):
                yield f"terms.{name}.{side}", f"expected the name of a layer or a list of names, got {given!r}"
    models = {"model": recipe.model}
    if recipe.teacher is not None:
        if (recipe.teacher.run is None) == (recipe.teacher.model is None):
            yield "teacher", "expected either run or model"
        if recipe.teacher.cache is not None and augment.views is None:
            yield "augment.views", "missing; teacher.cache holds fixed views of each sample, for example 50"
        if recipe.teacher.cache_gib <= 0:
            yield "teacher.cache_gib", f"expected more than 0, got {recipe.teacher.cache_gib}"
        if recipe.teacher.model is not None:
            models["teacher.model"] = recipe.teacher.model
    for name, model in models.items():
        if not model.name:
            yield f"{name}.name", "missing; for example smp:DeepLabV3Plus"
        if len(model.mean) != 3 or not 0 <= min(model.mean) <= max(model.mean) <= 1:
            yield f"{name}.mean", f"expected three numbers from 0 to 1, of pixels divided by 255, got {model.mean}"
        if len(model.std) != 3 or not 0 < min(model.std) <= max(model.std) <= 1:
            yield (
                f"{name}.std",
                f"expected three numbers above 0 and up to 1, of pixels divided by 255, got {model.std}",
            )
    for name in ("steps", "batch", "accumulate", "lr", "log_every", "checkpoint_every", "keep"):
        if getattr(train, name) <= 0:
            yield f"train.{name}", f"expected more than 0, got {getattr(train, name)}"
    if train.max_skipped < 0:
        yield "train.max_skipped", f"expected 0 or more, got {train.max_skipped}"
    if train.threads is not None and train.threads < 1:
        yield "train.threads", f"expected at least 1 or null, got {train.threads}"
    if train.accumulate > 0 and train.batch % train.accumulate:
        yield "train.batch", f"{train.batch} images do not divide into train.accumulate {train.accumulate} rounds"
    if train.weight_decay < 0:
        yield "train.weight_decay", f"expected 0 or more, got {train.weight_decay}"
    if not 0 <= train.momentum < 1:
        yield "train.momentum", f"expected a number from 0 to below 1, got {train.momentum}"
    if not 0 <= train.warmup < 1:
        yield "train.warmup", f"expected a share of the steps from 0 to below 1, got {train.warmup}"
    if not 0 <= train.class_balance < math.inf:
        yield "train.class_balance", f"expected a finite number of at least 0, got {train.class_balance}"
    if train.clip is not None and train.clip <= 0:
        yield "train.clip", f"expected more than 0 or null, got {train.clip}"
    if train.device not in ("auto", "cpu"):
        yield "train.device", f"expected auto or cpu, got {train.device!r}"
    if recipe.data.workers < 0:
        yield "data.workers", f"expected 0 or more, got {recipe.data.workers}"
    # The deepest features of nearly all networks are of 1/32: a smaller window is none, and would take for ever.
    for name, size, least in (("augment.crop", augment.crop, 1), ("eval.window", spec.window, 32)):
        if len(size) != 2 or min(size) < least:
            yield name, f"expected height and width, at least {least} each, got {size}"
    if augment.views is not None and augment.views < 1:
        yield "augment.views", f"expected at least 1 or null, got {augment.views}"
    if len(augment.scale) != 2 or not 0 < augment.scale[0] <= augment.scale[1]:
        yield "augment.scale", f"expected a low and a high factor above 0, got {augment.scale}"
    for name, most in {"flip": 1.0, "brightness": 1.0, "contrast": 1.0, "saturation": 1.0, "hue": 0.5}.items():
        if not 0 <= getattr(augment, name) <= most:
            yield f"augment.{name}", f"expected a number from 0 to {most}, got {getattr(augment, name)}"
    if spec.every <= 0:
        yield "eval.every", f"expected more than 0, got {spec.every}"
    if not spec.scales or min(spec.scales) <= 0:
        yield "eval.scales", f"expected factors above 0, got {spec.scales}"
    if not 0 <= spec.overlap <= 0.95:  # near 1 the windows move by a pixel
        yield "eval.overlap", f"expected a share from 0 to 0.95, got {spec.overlap}"

"""What is to be compared: a base recipe, changes by variant, seeds (comparison file -> grid).

::

    output: runs/compare_camvid
    base: camvid_gskd            # what all variants share: a recipe file, or the name of a shipped one
    teacher: camvid_teacher      # trained first into output/teacher; without it the base names its teacher
    recipe: {data: {root: data/camvid}}   # changes of base and teacher alike (teacher: and terms: of the base alone)
    seeds: [0, 1, 2]
    baseline: plain
    variants:
      plain: {terms: {}}
      kd: {terms: {kd: {weight: 1}}}
      mse: {terms: {mse: {weight: 10}}, seeds: [0]}
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gskd.assembly import check_terms
from gskd.errors import GSKDError, near_names
from gskd.recipe import Recipe, load_tree, parse_recipe, set_value

_KEYS = ("output", "base", "teacher", "recipe", "seeds", "baseline", "variants", "parallel", "equal_seconds")
_BUDGETS = ("slowest", "baseline", "off")


@dataclass(frozen=True)
class Variant:
    """One row of the table."""

    name: str
    recipe: Recipe
    """Without output and seed."""
    seeds: tuple[int, ...]

    @property
    def distils(self) -> bool:
        """Whether it has terms; without any it is trained on labels alone."""
        return bool(self.recipe.terms)

    def at(self, seed: int, output: Path, steps: int | None = None) -> Recipe:
        """The recipe of one run; of other ``steps``, with as many scores on val to pick the best from."""
        run = replace(self.recipe, seed=seed, output=str(output))
        if steps is None:
            return run
        every = max(1, round(run.eval.every * steps / run.train.steps))
        return replace(run, train=replace(run.train, steps=steps), eval=replace(run.eval, every=every))


@dataclass(frozen=True)
class Comparison:
    """Everything one comparison needs."""

    output: Path
    variants: tuple[Variant, ...]
    baseline: str
    """The variant whose difference to all others is measured."""
    teacher: Recipe | None
    """Trained first, where the comparison names a recipe for it."""
    parallel: int | None
    """Runs at a time; None lets the machine decide."""
    equal_seconds: str
    """Whose seconds everybody gets in the second round: the slowest variant's, the baseline's, or "off"."""


def load_comparison(path: str | Path, overrides: Sequence[str] = ()) -> Comparison:
    """Reads a comparison; every recipe in it is checked before anything runs.

    Args:
        path: a YAML file, or the name of one shipped with the package.
        overrides: ``dotted.key=value`` of the comparison, for example ``recipe.data.root=data/camvid``.

    Raises:
        GSKDError: the file cannot be read, or something in it does not fit.
    """
    where = f"comparison {path}"
    tree = load_tree(path, "comparison")
    if not isinstance(tree, dict):
        raise GSKDError(f"{where}: expected keys and values, found {type(tree).__name__}")
    for override in overrides:
        set_value(tree, override)
    for key in tree:
        if key not in _KEYS:
            raise GSKDError(f"{where}: unknown key {key}{near_names(str(key), _KEYS)}")
    for key in ("output", "base", "variants"):
        if not tree.get(key):
            raise GSKDError(f"{where}: {key}: missing")
    output = Path(_text(tree, "output", where)).expanduser()
    shared = _mapping(tree.get("recipe") or {}, f"{where}: recipe")
    base = _merge(_base(tree, "base", where), shared)
    teacher = None
    if tree.get("teacher") is not None:
        made = output / "teacher"
        # The teacher learns from labels alone: where its own cache or terms would be, the base's are meant.
        alike = {key: value for key, value in shared.items() if key not in ("teacher", "terms")}
        plain = {key: value for key, value in _merge(_base(tree, "teacher", where), alike).items() if key != "output"}
        teacher = parse_recipe({**plain, "output": str(made)}, source=f"{where}: teacher")
        named = _mapping(base.get("teacher") or {}, f"{where}: base: teacher")
        base = {**base, "teacher": {**named, "run": str(made), "model": None}}
    seeds = _seeds(tree.get("seeds", [0]), f"{where}: seeds")
    variants: list[Variant] = []
    for name, changes in _mapping(tree["variants"], f"{where}: variants").items():
        if changes is None:  # as with a term: variants.mse=null leaves it out
            continue
        here = f"{where}: variants.{name}"
        if not str(name).replace("-", "_").isidentifier():
            raise GSKDError(f"{here}: expected a name of letters, digits, _ and -")
        changes = dict(_mapping(changes, here))
        own = _seeds(changes.pop("seeds", list(seeds)), f"{here}.seeds")
        for key in ("output", "seed", "teacher"):
            if key in changes:
                raise GSKDError(f"{here}.{key}: is the comparison's, not a variant's")
        merged = {**_merge(base, changes), "output": str(output)}
        if "terms" in changes:
            merged["terms"] = changes["terms"] or {}  # these terms, and not also those of the base
        recipe = parse_recipe(merged, source=here)
        if recipe.terms and recipe.teacher is None:
            raise GSKDError(f"{here}: has terms, and neither the comparison nor its base names a teacher")
        try:
            check_terms(recipe.terms)
        except GSKDError as error:
            raise GSKDError(f"{here}.{error}") from None
        for part in ("data", "eval"):
            if variants and getattr(recipe, part) != getattr(variants[0].recipe, part):
                raise GSKDError(f"{here}.{part}: differs from that of {variants[0].name}; all must be scored alike")
        variants.append(Variant(str(name), recipe, own))
    if not variants:
        raise GSKDError(f"{where}: variants: all are null; expected at least one")
    names = [variant.name for variant in variants]
    baseline = str(tree.get("baseline", names[0]))
    if baseline not in names:
        raise GSKDError(f"{where}: baseline: no variant {baseline!r}{near_names(baseline, names)}")
    parallel = tree.get("parallel")
    if parallel is not None and (isinstance(parallel, bool) or not isinstance(parallel, int) or parallel < 1):
        raise GSKDError(f"{where}: parallel: expected a whole number of at least 1 or null, found {parallel!r}")
    budget = tree.get("equal_seconds", "slowest")
    if budget is False:  # YAML reads off as false
        budget = "off"
    if budget not in _BUDGETS:
        raise GSKDError(f"{where}: equal_seconds: expected one of {', '.join(_BUDGETS)}, found {budget!r}")
    return Comparison(output, tuple(variants), baseline, teacher, parallel, budget)


def _base(tree: dict[str, Any], key: str, where: str) -> dict[str, Any]:
    return _mapping(load_tree(_text(tree, key, where)), f"{where}: {key}")


def _text(tree: dict[str, Any], key: str, where: str) -> str:
    if not isinstance(tree[key], str):
        raise GSKDError(f"{where}: {key}: expected text, found {tree[key]!r}")
    return str(tree[key])


def _mapping(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise GSKDError(f"{where}: expected keys and values, found {value!r}")
    return value


def _seeds(value: Any, where: str) -> tuple[int, ...]:
    wrong = not isinstance(value, list) or not value
    if wrong or any(isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**63 for seed in value):
        raise GSKDError(f"{where}: expected a list of whole numbers from 0, found {value!r}")
    if len(set(value)) < len(value):
        raise GSKDError(f"{where}: a seed stands twice in {value!r}")
    return tuple(value)


def _merge(tree: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    merged = dict(tree)
    for key, value in changes.items():
        old = merged.get(key)
        merged[key] = _merge(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return merged

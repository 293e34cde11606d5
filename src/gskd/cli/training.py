"""Commands that train: one network, its student, many of them to compare."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from gskd.cli.options import AcceptChanges, AllowImports, Overrides, RecipeName, Resume, console
from gskd.errors import GSKDError


def train(
    recipe: RecipeName,
    overrides: Overrides = None,
    resume: Resume = False,
    accept_changes: AcceptChanges = False,
    allow_imports: AllowImports = False,
) -> None:
    """Train the recipe's model on labels alone: a teacher, or the plain student as a baseline.

    Teacher and terms of the recipe are left out, so the same recipe gives the baseline of its distillation.
    """
    _train(recipe, overrides, distill=False, resume=resume, accept_changes=accept_changes)


def distill(
    recipe: RecipeName,
    overrides: Overrides = None,
    resume: Resume = False,
    accept_changes: AcceptChanges = False,
    allow_imports: AllowImports = False,
) -> None:
    """Train the recipe's model against its teacher, with the recipe's terms beside the labels.

    The teacher's own score is measured and printed first.
    """
    _train(recipe, overrides, distill=True, resume=resume, accept_changes=accept_changes)


def _train(recipe_name: str, overrides: list[str] | None, *, distill: bool, resume: bool, accept_changes: bool) -> None:
    from gskd.recipe import load_recipe

    recipe = load_recipe(recipe_name, overrides or [])  # before the slow imports: a typing mistake shows at once

    from gskd.pipeline import train_model
    from gskd.run import Run

    run = Run(Path(recipe.output).expanduser())
    train_model(recipe, run, distill=distill, resume=resume, accept_changes=accept_changes)


def compare(
    comparison: Annotated[
        str,
        typer.Argument(
            metavar="COMPARISON",
            help="A YAML file, or a shipped one: compare_scenes, compare_camvid, compare_camvid_kd,"
            " compare_camvid_gskd.",
        ),
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[KEY=VALUE]...",
            help="Change the comparison, for example seeds=[0] recipe.data.root=data/camvid recipe.train.steps=500.",
        ),
    ] = None,
    table_only: Annotated[bool, typer.Option("--table", help="Train nothing; table of what is finished.")] = False,
    allow_imports: AllowImports = False,
) -> None:
    """Train variants of a student on paired seeds and say which differences are real.

    A run that is finished is never done again and an interrupted one continues: call it again with the same
    comparison. Variants and seeds can be added later. The table is at equal steps and at equal seconds, with
    differences to the baseline and their 95 % intervals; it is also written as JSON, CSV and figure.
    """
    from gskd.comparison import load_comparison, run_grid, write_tables
    from gskd.progress import Progress

    loaded = load_comparison(comparison, overrides or [])

    failure = None
    if not table_only:
        try:
            run_grid(loaded, Progress(console))
        except GSKDError as error:
            failure = error  # what is finished still makes a table
    if failure is None or any(loaded.output.glob("runs/*/*/result.json")):
        write_tables(loaded, console)
    if failure is not None:
        raise failure


def demo(
    overrides: Overrides = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for runs and picture.")] = Path("runs/demo"),
) -> None:
    """Run the main job on built-in street scenes: teacher, plain student, GSKD student, table and picture.

    A few minutes on two CPU cores. What is finished in the output folder is not done again.
    """
    from gskd.demo import run_demo

    run_demo(output, console, tuple(overrides or ()))

"""The command line: one verb per job. A mistake of the user ends in one line and exit code 2."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from gskd.errors import GSKDError

app = typer.Typer(
    name="gskd",
    help="Distil small semantic-segmentation networks that keep the global structure a large teacher sees.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
console = Console(highlight=False)

RecipeFile = Annotated[Path, typer.Argument(metavar="RECIPE", help="A YAML recipe, for example recipes/scenes.yaml.")]
RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="A run folder made by train or distill.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Change fields of the recipe, for example train.steps=500 output=runs/a."),
]
Resume = Annotated[bool, typer.Option("--resume", help="Continue the run in the output folder; start it if there is none.")]


@app.command()
def train(recipe: RecipeFile, overrides: Overrides = None, resume: Resume = False) -> None:
    """Train the recipe's model on labels alone: a teacher, or the plain student as a baseline.

    Teacher and terms of the recipe are left out, so the same recipe gives the baseline of its distillation.
    """
    _train(recipe, overrides, distill=False, resume=resume)


@app.command()
def distill(recipe: RecipeFile, overrides: Overrides = None, resume: Resume = False) -> None:
    """Train the recipe's model against its teacher, with the recipe's terms beside the labels.

    The teacher's own score is measured and printed first.
    """
    _train(recipe, overrides, distill=True, resume=resume)


def _train(recipe_file: Path, overrides: list[str] | None, *, distill: bool, resume: bool) -> None:
    from gskd.recipe import load_recipe

    recipe = load_recipe(recipe_file, overrides or [])  # before the slow imports: a typing mistake shows at once

    from gskd.pipeline import train_model
    from gskd.run import Run

    train_model(recipe, Run(Path(recipe.output)), distill=distill, resume=resume)


def main(arguments: list[str] | None = None) -> Any:
    """Entry point of the ``gskd`` command."""
    try:
        app(args=arguments, standalone_mode=True)
    except GSKDError as error:
        sys.stderr.write(f"gskd: {' '.join(str(error).split())}\n")
        sys.exit(2)
    except KeyboardInterrupt:
        sys.stderr.write("gskd: stopped; continue with --resume\n")
        sys.exit(130)


if __name__ == "__main__":
    main()

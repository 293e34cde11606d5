"""What several commands take, and where they print."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

console = Console(highlight=False)


@contextlib.contextmanager
def imports_allowed() -> Iterator[None]:
    """While a command runs, also for the processes that it starts."""
    from gskd.architectures import IMPORTS_ALLOWED

    before = os.environ.get(IMPORTS_ALLOWED)
    os.environ[IMPORTS_ALLOWED] = "1"
    # A recipe may name a module beside it; python -m finds those, an installed script would not. Last, so that no
    # file in the folder hides an installed package.
    sys.path.append(os.getcwd())
    try:
        yield
    finally:
        del os.environ[IMPORTS_ALLOWED]
        if before is not None:
            os.environ[IMPORTS_ALLOWED] = before


RecipeName = Annotated[
    str,
    typer.Argument(
        metavar="RECIPE",
        help="A YAML file, or the name of a shipped recipe: scenes, scenes_teacher, scenes_long, scenes_long_teacher,"
        " camvid_teacher, camvid_student, camvid_gskd, cityscapes_r101_r18.",
    ),
]
RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="A run folder made by train or distill.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[KEY=VALUE]...", help="Change fields of the recipe, for example train.steps=500 output=runs/a."
    ),
]
AllowImports = Annotated[
    bool,
    typer.Option(
        "--allow-imports",
        callback=lambda context, allowed: context.with_resource(imports_allowed()) if allowed else None,
        help="Run the Python code that a recipe's model.name may name; only for recipes and runs that you trust.",
    ),
]
Resume = Annotated[
    bool, typer.Option("--resume", help="Continue the run in the output folder; start it if there is none.")
]
AcceptChanges = Annotated[
    bool,
    typer.Option(
        "--accept-changes",
        help="With --resume: go on though the recipe, the teacher or the training samples have changed since.",
    ),
]

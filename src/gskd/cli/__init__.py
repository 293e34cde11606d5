"""The command line: one verb per job. A mistake of the user ends in one line and exit code 2."""

from __future__ import annotations

import sys
from typing import Annotated, NoReturn

import typer

from gskd.cli import preparing, students, training
from gskd.cli.options import console
from gskd.errors import GSKDError
from gskd.stops import EXIT_STOPPED, Stopped

# Of a word too few or too many; typer gives no name to it, but BadParameter, which is public, is one.
_UsageError: type[Exception] = next(kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "UsageError")

app = typer.Typer(
    name="gskd",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)

app.command()(training.train)
app.command()(training.distill)
app.command("eval")(students.evaluate_run)
app.command("predict")(students.predict_run)
app.command()(students.report)
app.command()(training.compare)
app.command()(students.export)
app.command()(students.bench)
app.command()(students.share)
app.command()(preparing.init)
app.command()(preparing.taps)
app.command()(preparing.convert)
app.command()(training.demo)
data_app = typer.Typer(help="Look at a dataset before training on it.", no_args_is_help=True)
data_app.command("check")(preparing.check_data)
app.add_typer(data_app, name="data")
cache_app = typer.Typer(
    help="Teacher results on disk: run the teacher once, train many students.", no_args_is_help=True
)
cache_app.command("build")(preparing.cache_build)
cache_app.command("verify")(preparing.cache_verify)
app.add_typer(cache_app, name="cache")


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        console.print(f"gskd {version('gskd')}")
        raise typer.Exit


@app.callback()
def gskd(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and leave.")
    ] = False,
) -> None:
    """Distil small semantic-segmentation networks that keep the global structure a large teacher sees."""


def main(arguments: list[str] | None = None) -> NoReturn:
    """Entry point of the ``gskd`` command."""
    try:
        code = app(args=arguments, prog_name="gskd", standalone_mode=False)
    except GSKDError as error:
        _leave(2, str(error))
    except _UsageError as error:
        message, context = error.format_message().rstrip("."), error.ctx  # type: ignore[attr-defined]
        if not message:  # gskd alone, whose page of help is on the screen
            sys.exit(2)
        _leave(2, f"{message}; see {context.command_path if context else 'gskd'} --help")
    except Stopped as stopped:
        where = f" at {stopped}" if str(stopped) else " while scoring"
        _leave(EXIT_STOPPED, f"stopped{where}, saved; the same command goes on, train and distill with --resume")
    except OSError as error:  # a name too long, a folder of others: where nobody had to expect it
        if error.filename is None:
            raise
        _leave(2, f"{error.filename}: {error.strerror}")
    except KeyboardInterrupt:
        code = 130
    if code == 130:  # what typer makes of Ctrl-C
        _leave(130, "stopped; train and distill go on with --resume, compare and cache by themselves")
    sys.exit(code)


def _leave(code: int, message: str) -> NoReturn:
    sys.stderr.write(f"gskd: {' '.join(message.split())}\n")
    sys.exit(code)

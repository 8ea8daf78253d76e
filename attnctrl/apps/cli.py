"""The command line. Only light modules are imported here, so that ``--help`` answers at once."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence
from typing import Annotated

import typer

from .. import __version__
from ..errors import AttnCtrlError
from .commands.ask import ask
from .commands.batch import batch
from .commands.demo import demo
from .commands.evaluate import evaluate
from .commands.fetch import fetch
from .commands.generate import generate
from .commands.hunt import hunt
from .commands.inspect import inspect
from .commands.show import show


app = typer.Typer(add_completion=False, no_args_is_help=True, help="Control attention in diffusion models.")


def _version(value: bool) -> None:
    if value:
        typer.echo(f"attnctrl {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show the traceback of an error. May stand anywhere.")
    ] = False,
) -> None:
    pass


for command in (generate, batch, hunt, demo, ask, inspect, show, fetch):
    app.command(no_args_is_help=command is not demo)(command)
app.add_typer(evaluate, name="evaluate")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns the exit code: 0, 2 for what the user can mend, 1 for anything else, 130 when interrupted."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    end = arguments.index("--") if "--" in arguments else len(arguments)
    debug = "--debug" in arguments[:end]
    arguments = [item for item in arguments[:end] if item != "--debug"] + arguments[end:]
    try:
        code = app(arguments, prog_name="attnctrl", standalone_mode=False)
        return code if isinstance(code, int) else 0
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (KeyboardInterrupt, typer.Abort):
        return _fail("interrupted", 130, debug)
    except (
        typer.TyperException,
        ValueError,
    ) as error:  # AttnCtrlError is a ValueError, and so is what pipelines say of arguments
        if str(error) == "" and not isinstance(error, AttnCtrlError):
            return 2
        text = error.format_message() if isinstance(error, typer.TyperException) else str(error)
        return _fail(text, 2, debug)
    except Exception as error:
        return _fail(f"{type(error).__name__}: {error}", 1, debug)


def _fail(text: str, code: int, debug: bool) -> int:
    """One line on stderr, and one more where the error says what mends it."""
    if debug:
        traceback.print_exc()
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    hint = next((line for line in lines if line.startswith("HINT:")), None)
    print(f"attnctrl: {lines[0] if lines else 'failed'}", file=sys.stderr)
    if hint is not None and hint != lines[0]:
        print(hint, file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())

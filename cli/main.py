"""The `skynet` command. Heavy imports stay inside commands, so that `--help` is instant."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from skynet.client.environment import OF_LIBRARIES, VARIABLES

from . import admin, ask, serve
from .common import fail, set_up_warnings
from .streams import set_up_streams

app = typer.Typer(
    name="skynet",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Pool the machines you have and run large language models across them.\n\n"
    'Start `skynet coordinator` on one machine, `skynet worker` on others, then `skynet infer "your prompt"`.\n\n'
    'Example: skynet demo "Once upon a time"\n\n'
    "Exit codes: 0 fine, 1 unexpected, 2 wrong option or file (or an output that can't be written), 3 protocol, "
    "4 no coordinator found, 5 not admitted, 6 worker lost, 7 not enough memory or workers, 8 request failed, "
    "130 interrupted, 141 nobody read the output to its end, 143 terminated.",
    epilog="Environment, where no option says otherwise:\n\n"
    + "\n\n".join(f"{name}: {meaning}." for name, meaning in (*VARIABLES.items(), *OF_LIBRARIES.items())),
)


def _print_version(is_asked: bool) -> None:
    if is_asked:
        from skynet import __version__

        typer.echo(f"skynet {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


serve.register(app)
ask.register(app)
admin.register(app)


def main() -> None:
    """Entry point: every error we raise on purpose becomes one line on stderr and its own exit code."""
    set_up_streams()
    set_up_warnings()
    try:
        app(standalone_mode=True)
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as exc:
        fail(exc)


if __name__ == "__main__":
    main()

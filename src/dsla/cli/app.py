"""The command line: which verbs there are, and how their errors are shown. One file a verb, nothing of them here."""

import os
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Annotated

from dsla import __version__
from dsla.errors import DslaError

if TYPE_CHECKING:
    import typer

VERBS = (
    "fetch", "order", "convert", "refine", "verify", "eval", "generate", "serve", "demo", "bench", "doctor", "chat", "top",
)  # fmt: skip
"""Each is a module `dsla.cli.<verb>` with a function of the same name, whose docstring is the verb's help, or with a
`typer.Typer` of that name, where the verb has several commands. A module may have `CONTEXT`, settings of Typer's context.

Their modules import typer and errors at the top, and what is heavy inside the function: `dsla --help` reads every one.
"""


def build(verbs: Sequence[str] = VERBS) -> "typer.Typer":
    """The command line with the given verbs."""
    import typer

    app = typer.Typer(
        help="Turns a pretrained Transformer into levels of dual-state linear attention, and serves them.",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
    )

    def show_version(wanted: bool) -> None:
        if wanted:
            typer.echo(f"dsla {__version__}")
            raise typer.Exit

    @app.callback()
    def options(
        version: Annotated[
            bool, typer.Option("--version", callback=show_version, is_eager=True, help="Show the version and exit.")
        ] = False,
    ) -> None:
        pass

    for verb in verbs:
        module = import_module(f"dsla.cli.{verb}")
        found = getattr(module, verb)
        if isinstance(found, typer.Typer):
            app.add_typer(found, name=verb)
        else:
            app.command(verb, context_settings=getattr(module, "CONTEXT", None))(found)
    return app


def main() -> None:
    """Runs the verb the command line names. Exit status 2 and one line on stderr for errors this package raises.

    `DSLA_DEBUG=1` shows the traceback instead.
    """
    try:
        _check_installed()
        # Only the module of the verb that is asked for is imported.
        asked = sys.argv[1] if len(sys.argv) > 1 else None
        build([asked] if asked in VERBS else VERBS)()
    except (DslaError, OSError) as error:
        if os.environ.get("DSLA_DEBUG") == "1":
            raise
        sys.stderr.write(f"error: {' '.join(str(error).split())}\n")
        raise SystemExit(2) from None


def _check_installed() -> None:
    try:
        import_module("typer")
    except ModuleNotFoundError as error:
        raise DslaError(f"the command line needs the package {error.name!r}: run `pip install 'dsla[cli]'`") from None


if __name__ == "__main__":
    main()

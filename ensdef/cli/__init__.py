"""The command line: arguments in, function calls out. Nothing here imports torch before it must."""

from __future__ import annotations

import sys
from typing import Any

import click

from ensdef._version import __version__
from ensdef.errors import UsageError


class Refusal(click.ClickException):
    """Bad usage found by us rather than by click: same exit code, same shape."""

    exit_code = 2


class Commands(click.Group):
    """Turns the engine's refusals into exit status 2, without a traceback."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except UsageError as error:
            raise Refusal(str(error)) from error


@click.group(
    cls=Commands,
    context_settings={
        "help_option_names": ["-h", "--help"],
        # click hands over the name without its hyphens
        "token_normalize_func": lambda token: token.replace("_", "-"),
    },
)
@click.version_option(__version__, prog_name="ensdef")
def cli() -> None:
    """Train ensemble defences, attack them under one protocol, rebuild the tables.

    \b
    ensdef bench --method soe --attack pgd
    ensdef list methods
    """


def main() -> None:
    """Entry point of the ``ensdef`` command."""
    from ensdef.cli import (  # noqa: F401 - the modules add their commands
        compare,
        explain,
        import_pth,
        inspect,
        measure,
        plot,
        plugins,
        report,
        run,
    )

    try:
        cli(prog_name="ensdef")
    except KeyboardInterrupt:
        sys.exit(130)

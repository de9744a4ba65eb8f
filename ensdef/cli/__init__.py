"""The command line: arguments in, function calls out. Nothing here imports torch before it must."""

from __future__ import annotations

import errno
import sys
from typing import Any

import click

from ensdef._version import __version__
from ensdef.errors import StorageError, UsageError
from ensdef.signals import Interrupted, end_in_order


class Refusal(click.ClickException):
    """Bad usage found by us rather than by click: same exit code, same shape."""

    exit_code = 2


class Failure(click.ClickException):
    """What was asked for could be, but the machine failed; what is finished is kept."""

    exit_code = 1


class Commands(click.Group):
    """Turns the engine's refusals into exit status 2, failures of the file system into 1, and signals into 130 or 143,
    without a traceback.
    """

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except UsageError as error:
            raise Refusal(str(error)) from error
        except Interrupted as error:  # before click, which would make it 1
            click.echo(error.told, err=True)
            raise click.exceptions.Exit(error.exit_status) from None
        except OSError as error:
            if error.errno == errno.EPIPE:  # the reader of our output has seen enough; click deals with that
                raise
            raise Failure(_told(error)) from error


def _told(error: OSError) -> str:
    """One line that names file and cause."""
    cause = error.strerror or str(error) or type(error).__name__
    if isinstance(error, StorageError):
        return (
            f"{error.filename} could not be written: {cause}. Nothing is half-written and what was finished is kept: "
            "make room, or mend the folder, and run the command again"
        )
    return f"{error.filename}: {cause}" if error.filename else cause


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
    end_in_order()
    try:
        _run()
    except Interrupted as error:  # before or after the command itself
        print(error.told, file=sys.stderr)
        sys.exit(error.exit_status)


def _run() -> None:
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
        verify,
    )

    cli(prog_name="ensdef")

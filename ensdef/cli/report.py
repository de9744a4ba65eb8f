"""``ensdef report``: a results folder as one HTML page; from files alone."""

from __future__ import annotations

from pathlib import Path

import click

from ensdef.cli import cli
from ensdef.errors import UsageError


@cli.command()
@click.option(
    "--results",
    type=click.Path(path_type=Path),
    default=Path("results"),
    show_default=True,
    help="Folder whose tables are shown.",
)
@click.option("--out", type=click.Path(path_type=Path), help="The page [default: report.html in RESULTS].")
def report(results: Path, out: Path | None) -> None:
    """Write one HTML page: leaderboards, charts, every record; it needs no network."""
    from ensdef.records import write_text
    from ensdef.report import render

    target = results / "report.html" if out is None else out
    if target.is_dir():
        raise UsageError(f"--out {target} is a folder; give a file, such as {target / 'report.html'}")
    page = render(results)
    try:
        write_text(target, page)
    except OSError as error:
        raise UsageError(f"{target} cannot be written ({error.strerror}); choose another with --out") from error
    click.echo(f"{target}: {len(page.encode()) / 1e6:.1f} MB, nothing else is needed to open it")

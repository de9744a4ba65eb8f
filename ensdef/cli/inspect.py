"""``ensdef list`` and ``ensdef table``: from sources and files alone."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from ensdef.cli import cli
from ensdef.errors import UsageError
from ensdef.registry import ARCHITECTURES, ATTACKS, DATASETS, METHODS, load_plugin

_KINDS = {"methods": METHODS, "attacks": ATTACKS, "datasets": DATASETS, "architectures": ARCHITECTURES}


@cli.command("list")
@click.argument("kind", type=click.Choice([*_KINDS, "protocols"]))
@click.option("--plugin", multiple=True, metavar="FILE_OR_MODULE", help="Load a plug-in first (repeatable).")
def list_(kind: str, plugin: tuple[str, ...]) -> None:
    """Names, what they are, and where they come from."""
    for where in plugin:
        load_plugin(where)
    if kind == "protocols":
        from ensdef.protocol import load_protocol, protocol_names

        for name in protocol_names():
            click.echo(f"{name:16} {load_protocol(name).title}")
        return
    for listing in _KINDS[kind].listings():
        click.echo(f"{listing.name:16} {listing.summary}")
        click.echo(f"{'':16} [{listing.origin}] {listing.citation}".rstrip())


@cli.command()
@click.argument("protocol", required=False)
@click.option("--all", "every", is_flag=True, help="Every table of the results folder.")
@click.option("--check", is_flag=True, help="Compare RESULTS/published/tables with what the records there give.")
@click.option("--results", type=click.Path(path_type=Path), default=Path("results"), show_default=True)
def table(protocol: str | None, every: bool, check: bool, results: Path) -> None:
    """Rebuild CSV and Markdown from records alone."""
    from ensdef.tables import Manifests, stale_tables, write_table

    if every == (protocol is not None):
        raise click.UsageError("give either a PROTOCOL or --all")
    if check:
        if stale := stale_tables(results, protocol):
            click.echo(f"differ from the published records: {', '.join(stale)}", err=True)
            sys.exit(1)
        click.echo("tables agree with the published records")
        return
    names = Manifests(results).names() if protocol is None else [protocol]
    if not names:
        raise UsageError(f"no tables in {results}; `ensdef bench` and `ensdef run` make them")
    for name in names:
        for path in write_table(name, results, results / "tables"):
            click.echo(str(path))
            if path.suffix == ".md" and protocol is not None:
                click.echo("\n" + path.read_text(encoding="utf-8"))

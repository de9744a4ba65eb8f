"""``ensdef check`` and ``ensdef new``."""

from __future__ import annotations

import sys
from importlib.resources import files
from pathlib import Path

import click

from ensdef.cli import cli
from ensdef.errors import UsageError
from ensdef.registry import ATTACKS, METHODS, load_plugin


@cli.command()
@click.argument("names", nargs=-1, metavar="NAME...")
@click.option("--plugin", multiple=True, metavar="FILE_OR_MODULE", help="Load a plug-in first (repeatable).")
@click.option("--all", "every", is_flag=True, help="Every defence and attack.")
def check(names: tuple[str, ...], plugin: tuple[str, ...], every: bool) -> None:
    """Run the contract tests of defences and attacks; exit 1 if one fails."""
    for where in plugin:
        load_plugin(where)
    from ensdef.testing import check_plugin

    if every == bool(names):
        raise click.UsageError("give either NAMEs or --all")
    failed = 0
    for name in [*METHODS.names(), *ATTACKS.names()] if every else names:
        findings = check_plugin(name)
        for finding in findings:
            if not finding.ok:
                click.echo(f"FAIL {finding.check}\n     {finding.message}")
            elif len(names) == 1:
                click.echo(f"ok   {finding.check}")
        broken = sum(not finding.ok for finding in findings)
        click.echo(f"{name}: {len(findings) - broken} of {len(findings)} checks passed")
        failed += broken
    if failed:
        sys.exit(1)


@cli.command()
@click.argument("kind", type=click.Choice(["defense", "attack"]))
@click.argument("name")
@click.option("--out", type=click.Path(path_type=Path), help="File to write [default: NAME.py here].")
def new(kind: str, name: str, out: Path | None) -> None:
    """Write the one-file starting point of a plug-in; it passes `ensdef check` as it is."""
    registry = METHODS if kind == "defense" else ATTACKS
    if not (name.isascii() and name.isidentifier() and name.islower()):
        raise UsageError(f"{name!r} is no {kind} name; use lower-case letters, digits and _, starting with a letter")
    if name in registry.names():
        raise UsageError(f"{registry.kind} {name!r} exists already; choose another name")
    path = out or Path(f"{name}.py")
    if path.exists():
        raise UsageError(f"{path} exists already; choose another place with --out")
    template = files("ensdef.cli").joinpath("templates", f"{kind}.txt").read_text(encoding="utf-8")
    camel = "".join(part.capitalize() for part in name.split("_"))
    try:
        path.write_text(template.format(name=name, camel=camel), encoding="utf-8")
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror}") from error
    option = "--method" if kind == "defense" else "--method soe --attack"
    click.echo(
        f"wrote {path}\nnext: ensdef check {name} --plugin {path}\n      ensdef bench --plugin {path} {option} {name}"
    )

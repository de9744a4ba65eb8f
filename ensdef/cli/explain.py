"""``ensdef explain``: what a health finding means; from the catalogue alone."""

from __future__ import annotations

import click

from ensdef.cli import cli


@cli.command()
@click.argument("flag", required=False)
def explain(flag: str | None) -> None:
    """What a health FLAG means and what to do; without one, list all flags."""
    from ensdef.health.catalogue import FLAGS, explanation

    if flag is not None:
        click.echo(explanation(flag))
        return
    for name in sorted(FLAGS):
        click.echo(f"{name:26} {FLAGS[name].severity:8} {FLAGS[name].meaning}")

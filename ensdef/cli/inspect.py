"""``ensdef list`` and ``ensdef table``: from sources and files alone."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from ensdef.cli import cli
from ensdef.errors import UsageError
from ensdef.registry import ARCHITECTURES, ATTACKS, DATASETS, MEASUREMENTS, METHODS, load_plugin

_KINDS = {
    "methods": METHODS,
    "attacks": ATTACKS,
    "datasets": DATASETS,
    "architectures": ARCHITECTURES,
    "measurements": MEASUREMENTS,
}


@cli.command("list")
@click.argument("kind", type=click.Choice([*_KINDS, "protocols"]))
@click.option("--plugin", multiple=True, metavar="FILE_OR_MODULE", help="Load a plug-in first (repeatable).")
@click.option("--cost", is_flag=True, help="Of methods: the member passes of one training batch.")
def list_(kind: str, plugin: tuple[str, ...], cost: bool) -> None:
    """Names, what they are, and where they come from."""
    if cost and kind != "methods":
        raise click.UsageError(f"--cost is for methods; {kind} are not trained")
    for where in plugin:
        load_plugin(where)
    if cost:
        _costs()
        return
    if kind == "protocols":
        _protocols()
        return
    for listing in _KINDS[kind].listings():
        traits = _attack_traits(listing.name) if kind == "attacks" else ""
        click.echo(f"{listing.name:16} {traits}{listing.summary}")
        click.echo(f"{'':16} [{listing.origin}] {listing.citation}".rstrip())


def _protocols() -> None:
    """Every protocol with its scales."""
    from ensdef.protocol_file import protocol_paths, read_protocol_file

    for name in sorted(protocol_paths()):
        content = read_protocol_file(name).content
        scales = f" [{', '.join(content['scales'])}]" if "scales" in content else ""
        click.echo(f"{name:18} {content.get('title', '')}{scales}")


def _attack_traits(name: str) -> str:
    """``[gradient; linf, l2] ``: what it sees, and its norms; nothing for those that listing may not import."""
    attack = None if name.endswith(".*") else ATTACKS.at_hand(name)
    return f"[{attack.access}; {', '.join(attack.norms) or 'no budget'}] " if attack else ""


def _costs() -> None:
    """Every method's passes, with its default hyper-parameters; one that cannot be counted stops no other."""
    from tabulate import tabulate

    from ensdef.cost import count_passes

    members, steps = 3, 10
    rows = []
    for name in METHODS.names():
        try:
            passes = count_passes(name, members, steps)
            method = METHODS.get(name)
            numbers = [passes.forward, passes.input_gradient, passes.training, passes.double_backward]
            rows.append([name, method.member_count(method.Hyper()) or members, *numbers, round(passes.total, 1)])
        except Exception as error:
            click.echo(f"{name} cannot be counted: {type(error).__name__}: {error}", err=True)
    heads = ["method", "members", "forward", "input gradient", "training", "double backward", "total"]
    click.echo(tabulate(rows, heads, tablefmt="simple", floatfmt="g"))
    click.echo(
        f"\nPasses of one member over one batch, K = {steps} inner attack steps. total: the same work in training\n"
        "passes, by multiplications: forward 1/3, input gradient 2/3, training 1, double backward 2."
    )


@cli.command()
@click.argument("protocol", required=False)
@click.option("--all", "every", is_flag=True, help="Every table of the results folder.")
@click.option("--check", is_flag=True, help="Compare RESULTS/published/tables with what the records there give.")
@click.option("--results", type=click.Path(path_type=Path), default=Path("results"), show_default=True)
def table(protocol: str | None, every: bool, check: bool, results: Path) -> None:
    """Rebuild CSV and Markdown from records alone."""
    from ensdef.manifests import Manifests
    from ensdef.tables import stale_tables, write_table

    if every == (protocol is not None):
        raise click.UsageError("give either a PROTOCOL or --all")
    if check:
        if stale := stale_tables(results, protocol):
            click.echo(f"differ from the published records: {', '.join(stale)}", err=True)
            sys.exit(1)
        click.echo("tables agree with the published records")
        return
    names = Manifests(results).names() if protocol is None else Manifests(results).of_protocol(protocol)
    if not names:
        raise UsageError(f"no tables in {results}; `ensdef bench` and `ensdef run` make them")
    for name in names:
        for path in write_table(name, results, results / "tables"):
            click.echo(str(path))
            if path.suffix == ".md" and protocol is not None:
                click.echo("\n" + path.read_text(encoding="utf-8"))

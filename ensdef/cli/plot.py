"""``ensdef plot``: figures from files alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ensdef.cli import cli
from ensdef.errors import UsageError
from ensdef.notation import convert, split_list


@cli.command()
@click.argument("kind", required=False)
@click.option("--list", "every", is_flag=True, help="List the kinds, what each shows and what to run for it.")
@click.option("--results", type=click.Path(path_type=Path), default=Path("results"), show_default=True)
@click.option("--out", type=click.Path(path_type=Path), help="File, .png or .svg [default: RESULTS/figures/KIND.svg].")
@click.option("--table", metavar="NAME", help="Only the records of this table.")
@click.option("--method", help="Only these methods, comma separated: cce, or cce[mode=dm].")
@click.option("--attack", help="Only these attacks, comma separated.")
@click.option("--dataset", metavar="NAME", help="Only this data set.")
@click.option("--norm", type=click.Choice(["linf", "l2"]), help="Only this norm.")
@click.option("--eps", help="Only these radii, comma separated.")
@click.option("--seed", help="Only these training seeds, comma separated.")
@click.option("--record", type=click.Path(path_type=Path), help="Of examples: the record.")
@click.option("--image", type=click.IntRange(min=0), default=0, help="Of surface and examples: the first image [0].")
@click.option("--images", type=click.IntRange(min=1), default=5, help="Of examples: how many [5].")
@click.option(
    "--which", type=click.Choice(["fooled", "robust", "all"]), default="fooled", help="Of examples: of which [fooled]."
)
@click.option("--style", type=click.Choice(["contour", "3d"]), default="contour", help="Of surface [contour].")
def plot(kind: str | None, every: bool, results: Path, out: Path | None, **given: Any) -> None:
    """Draw a figure of a KIND from the files in the results folder.

    \b
    ensdef plot robustness --method soe,adv_en --out curves.svg
    ensdef plot --list
    """
    from ensdef.plots.kinds import KINDS

    if every:
        for name, one in KINDS.items():
            click.echo(f"{name:12} {one.summary}\n{'':12} from: {one.command}")
        return
    if kind is None:
        raise click.UsageError(f"give a KIND: {', '.join(KINDS)}")
    # before matplotlib and, of examples, an attack
    path = out or results / "figures" / f"{kind}.svg"
    if path.suffix.lower() not in (".png", ".svg"):
        raise UsageError(f"--out is {path}; expected a name that ends in .png or .svg")
    from ensdef.plots import Choice, draw, save

    for name in ("method", "attack", "eps", "seed"):
        given[name] = tuple(split_list(given[name])) if given[name] is not None else ()
    given["seed"] = tuple(convert(part, int, "--seed") for part in given["seed"])
    save(draw(kind, results, Choice(**given)), path)
    click.echo(str(path))

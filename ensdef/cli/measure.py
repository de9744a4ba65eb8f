"""``ensdef measure``: what the papers print beside accuracy."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ensdef.cli import cli
from ensdef.errors import UsageError
from ensdef.notation import convert, parse_call, split_list
from ensdef.protocol import load_protocol, with_methods

if TYPE_CHECKING:
    from ensdef.measurement import Measurement


@cli.command()
@click.argument("names", metavar="NAME[,NAME...]")
@click.option("--method", help="Defences, comma separated, parameters in brackets.")
@click.option("--dataset", metavar="NAME", help="One data set [default: digits].")
@click.option("--data-dir", metavar="DIR", help="Folder of the data set.")
@click.option("--image-size", type=int, help="Resize images to this side.")
@click.option("--limit", type=int, help="Training images: the first N of a fixed permutation.")
@click.option("--arch", metavar="NAME", help="Member architecture [default: the data set's].")
@click.option("--members", type=int, help="Members of a defence that does not fix them [default: 3].")
@click.option("--eps", help="Attack radii, comma separated [default: the data set's].")
@click.option("--norm", type=click.Choice(["linf", "l2"]), help="Of attacks and training [default: linf].")
@click.option("--combiner", type=click.Choice(["native", "avg", "max", "vote"]), help="Replace the inference rule.")
@click.option("--epochs", type=int, help="Training epochs [default: the method's recipe, or the data set's].")
@click.option("--train-eps", help="Training radius, or eps for one training per attack radius.")
@click.option(
    "--samples", type=int, help="Test images: the first N of a fixed permutation [default: all, up to 1,000]."
)
@click.option("--seed", help="Training seeds, comma separated.")
@click.option("--measure-seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of the measurements.")
@click.option("--plugin", multiple=True, metavar="FILE_OR_MODULE", help="Load a plug-in (repeatable).")
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True)
@click.option("--results", type=click.Path(path_type=Path), default=Path("results"), show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Measurements as JSON on stdout, all else on stderr.")
def measure(
    names: str,
    method: str | None,
    eps: str | None,
    seed: str | None,
    measure_seed: int,
    plugin: tuple[str, ...],
    device: str,
    results: Path,
    as_json: bool,
    **given: Any,
) -> None:
    """Measure NAMEs from `ensdef list measurements` on trained defences, training what is missing.

    \b
    ensdef measure training_cost,transferability --method adp,cce
    ensdef measure "detection[attack=mim,step_size=1/255]" --method "cce[mode=dm]" --eps 1/255,8/255
    ensdef measure xor
    """
    from ensdef.registry import MEASUREMENTS, load_plugin

    for where in plugin:
        load_plugin(where)
    calls = split_list(names)
    for name in (parse_call(call)[0] for call in calls):
        MEASUREMENTS.get(name)
    protocol = dataclasses.replace(
        load_protocol("default"), methods=(), **{key: value for key, value in given.items() if value is not None}
    )
    if method is not None:
        protocol = with_methods(protocol, method)
    if eps is not None:
        protocol = dataclasses.replace(protocol, eps=tuple(split_list(eps)))
    if seed is not None:
        protocol = dataclasses.replace(protocol, seeds=_seeds(seed))

    from ensdef.evaluation import resolve_device
    from ensdef.measuring import check_measurable, measure_all, plan_measurements
    from ensdef.progress import ConsoleProgress
    from ensdef.runner import Run, check_writable

    run = Run(results, resolve_device(device))
    specs = plan_measurements(protocol, calls, measure_seed)
    check_writable(results)
    check_measurable(specs)
    with contextlib.redirect_stdout(sys.stderr):  # plug-ins print where they like; stdout is for the results
        made = measure_all(specs, run, ConsoleProgress())
    click.echo(_table(made), err=as_json)
    if as_json:
        click.echo(json.dumps([one.summary() for one in made], indent=1))
    if any(one.error for one in made):
        sys.exit(1)


def _seeds(text: str) -> tuple[int, ...]:
    numbers = tuple(int(convert(part, int, "seed")) for part in split_list(text))
    if not all(0 <= number < 2**63 for number in numbers):
        raise UsageError(f"seed is {text}; expected whole numbers from 0 to 2^63 - 1")
    return numbers


def _table(made: Sequence[Measurement]) -> str:
    """One block for each measurement: what was measured, and its values with their standard errors."""
    blocks = []
    for one in made:
        at = f", {one.norm} {one.eps}" if one.eps is not None else ""
        on = f" of {one.label} on {one.dataset}, seed {one.train_seed}" if one.label else ""
        count = f", n = {one.n}" if one.n is not None else ""
        lines = [f"{one.call}{on}{at}{count}"]
        if one.error is not None:
            lines.append(f"  failed: {one.error}")
        for name, value in one.values.items():
            error = f" ± {one.stderr[name]:.2g}" if name in one.stderr else ""
            lines.append(f"  {name:28} {'-' if value is None else f'{value:.6g}'}{error}")
        lines.append(f"  {one.path}" if one.path else "")
        blocks.append("\n".join(line for line in lines if line))
    return "\n\n".join(blocks)

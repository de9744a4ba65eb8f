"""``ensdef verify``: records recounted from their evidence."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ensdef.cli import cli

if TYPE_CHECKING:
    from ensdef.verification import Verification

PROVES = """\
What this proves: on these weights and images every image counted as fooled is answered wrongly at a stored point
inside box and ball, and every other as the record says at the point stored for it. So the true robust accuracy is at
most the one told.
What it cannot prove: that no attack does better, that the points are those of the attack named (of one without a radius
nothing but the box bounds them), how the weights were trained, and times, passes, flags and provenance. For those, run
the cell again."""


@cli.command()
@click.argument("records", nargs=-1, required=True, metavar="RECORD...", type=click.Path(path_type=Path))
@click.option(
    "--results",
    type=click.Path(path_type=Path),
    help="Folder with checkpoints and evidence [default: the one whose records these are, else results].",
)
@click.option("--data-dir", metavar="DIR", help="Folder of the data set.")
@click.option(
    "--checkpoint", type=click.Path(path_type=Path), help="Folder of the weights [default: RESULTS/checkpoints/...]."
)
@click.option("--plugin", multiple=True, metavar="FILE_OR_MODULE", help="Load a plug-in first (repeatable).")
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Verdicts as JSON on stdout, all else on stderr.")
def verify(
    records: tuple[Path, ...],
    results: Path | None,
    data_dir: str | None,
    checkpoint: Path | None,
    plugin: tuple[str, ...],
    device: str,
    as_json: bool,
) -> None:
    """Recount RECORDs (files, or folders of them) from evidence and weights, by forward passes alone.

    Exit status: 0 verified, 1 some record is not verified or not verifiable, 2 bad usage.
    """
    from ensdef.bundle import record_paths
    from ensdef.evaluation import resolve_device
    from ensdef.registry import load_plugin
    from ensdef.verification import Verifier

    for where in plugin:
        load_plugin(where)
    verifier = Verifier(results, data_dir, checkpoint, resolve_device(device))
    made = []
    for path in list(record_paths(list(records))):
        made.append(verifier.verify(path))
        for line in _lines(made[-1]):
            click.echo(line, err=as_json)
    verified = sum(one.status == "verified" for one in made)
    click.echo(f"\n{verified} of {len(made)} verified" + (f"\n\n{PROVES}" if verified else ""), err=as_json)
    if as_json:
        click.echo(json.dumps([one.as_json() for one in made], indent=1))
    if verified < len(made):
        sys.exit(1)


def _lines(one: Verification) -> list[str]:
    if one.counts is None:
        return [f"{one.status}: {one.path}: {failure}" for failure in one.failures]
    counts = one.counts
    borderline = f"; rounding decides {counts.borderline} verdicts, taken as recorded" if counts.borderline else ""
    return [
        f"verified: {one.path}: {counts.n} images, {counts.right} right, {counts.right - counts.robust} of them fooled "
        f"at a stored point, {counts.robust} robust ({counts.rounded} points in steps of 1/255, {counts.exact} in "
        f"float32{borderline})"
    ]

"""``ensdef import-pth``: other people's weights, in our format."""

from __future__ import annotations

from pathlib import Path

import click

from ensdef.cli import cli
from ensdef.errors import UsageError
from ensdef.notation import convert, parse_call, split_list


@cli.command("import-pth")
@click.argument("files", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="FILE...")
@click.option("--method", required=True, help="The defence that the weights are of, parameters in brackets.")
@click.option("--arch", required=True, metavar="NAME", help="Architecture of the members: resnet20, resnet[depth=26].")
@click.option("--members", type=click.IntRange(1, 1000), help="Members [default: as many as the files have].")
@click.option("--classes", type=click.IntRange(2, 10**6), default=10, show_default=True, help="Number of classes.")
@click.option("--image", default="3,32,32", show_default=True, help="Channels, height and width of an image.")
@click.option("--mean", help="Of the normalisation, one number a channel, where the file has none; 0: none.")
@click.option("--std", help="The same; 1: none.")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder of the checkpoint that is written.")
def import_pth(
    files: tuple[Path, ...],
    method: str,
    arch: str,
    members: int | None,
    classes: int,
    image: str,
    mean: str | None,
    std: str | None,
    out: Path,
) -> None:
    """Read OTHER PEOPLE'S PICKLES: weights from .pth files into a checkpoint of ours.

    Such files are pickles, which can hold programs. They are opened with torch's weights_only=True, which builds
    tensors and refuses the rest, after their size was checked; no other command opens one. Still: take files from
    people you trust.

    FILE is one file with all members, or a file for each. Layers are matched in their order, by kind and shape; what
    networks compute between them is not in such files, so check that the clean accuracy is the authors'.

    \b
    ensdef import-pth epoch_200.pth --method dverge --arch resnet20 --out theirs
    ensdef import-pth name.0 name.1 name.2 --method trs --arch resnet20 --out theirs --mean 0 --std 1
    """
    from ensdef.foreign_import import import_weights
    from ensdef.foreign_layout import channels

    if (mean is None) != (std is None):
        raise UsageError("give both --mean and --std, or neither")
    shape = tuple(convert(part, int, "--image") for part in split_list(image))
    if len(shape) != 3 or not all(1 <= side <= 4096 for side in shape):
        raise UsageError(f"--image is {image}; expected channels, height and width, such as 3,32,32")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"--out {out} is there already; give a new folder")
    name, hyper = parse_call(method)
    told = import_weights(
        files,
        out,
        name,
        hyper,
        arch,
        members,
        classes,
        (shape[0], shape[1], shape[2]),
        None if mean is None or std is None else (channels(mean, "--mean"), channels(std, "--std")),
    )
    click.echo(f"{out}: {told}")
    click.echo(f"evaluate it: ensdef.evaluate(ensdef.load_checkpoint({str(out)!r}), x, y, attack='pgd', eps='8/255')")

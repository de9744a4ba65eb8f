"""``ensdef bench`` and ``ensdef run``."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sys
import time
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ensdef.cli import cli
from ensdef.errors import UsageError
from ensdef.notation import fraction, split_list
from ensdef.protocol import Protocol, layered, load_protocol, plan, with_attacks, with_methods, without

if TYPE_CHECKING:
    from ensdef.executor import Executor
    from ensdef.health.catalogue import Tier
    from ensdef.progress import Progress
    from ensdef.records import Record
    from ensdef.specs import Cell


def _config(ctx: click.Context, parameter: click.Parameter, value: str | None) -> dict[str, Any]:
    """``--config``: a TOML file of option names; the command line wins. A ``[train]`` table overrides the recipe."""
    if value is None:
        return {}
    try:
        content = tomllib.loads(Path(value).read_text(encoding="utf-8"))
    except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise click.UsageError(f"--config {value}: {error}") from error
    train = content.pop("train", {})
    options = {str(key).replace("-", "_"): item for key, item in content.items()}
    options = {"as_json" if key == "json" else key: item for key, item in options.items()}
    known = {str(item.name) for item in ctx.command.params}
    if unknown := sorted(set(options) - known):
        there = ", ".join(sorted(known - {"as_json", "config"} | {"json"}))
        raise click.UsageError(f"--config {value}: no option {unknown[0]!r}; there are: {there}")
    ctx.default_map = {
        key: ",".join(map(str, item)) if isinstance(item, list) and key != "plugin" else item
        for key, item in options.items()
    }
    if not isinstance(train, dict):
        raise click.UsageError(f"--config {value}: train must be a table, such as [train] with lr = 0.05")
    return train


_RUN_OPTIONS = [
    click.option(
        "--config",
        callback=_config,
        is_eager=True,
        expose_value=True,
        metavar="FILE",
        help="TOML file of these options; the command line wins.",
    ),
    click.option("--data-dir", metavar="DIR", help="Folder of the data set."),
    click.option(
        "--samples",
        type=int,
        help="Test images attacked: the first N of a fixed permutation [default: all, up to 1,000].",
    ),
    click.option("--seed", help="Training seeds, comma separated."),
    click.option("--plugin", multiple=True, metavar="FILE_OR_MODULE", help="Load a plug-in (repeatable)."),
    click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True),
    click.option(
        "--devices",
        type=click.IntRange(min=1),
        default=1,
        show_default=True,
        help="GPUs, or processes with --device cpu, that share each training.",
    ),
    click.option(
        "--batch-size",
        type=click.IntRange(min=1),
        help="Images an attack pass; cannot change a result [default: 128 on the CPU, measured on a GPU].",
    ),
    click.option(
        "--results",
        type=click.Path(path_type=Path),
        default=Path("results"),
        show_default=True,
        help="Folder for records, checkpoints, tables.",
    ),
    click.option(
        "--health",
        type=click.Choice(["basic", "full", "off"]),
        help="Whether gradients lie: basic adds at most a tenth of the attack's passes, full runs small attacks; "
        "records of a lower tier are made anew only when this is given [default: basic].",
    ),
    click.option(
        "--executor",
        type=click.Choice(["local", "ray"]),
        default="local",
        show_default=True,
        help="Where cells run: one after the other here, or as Ray tasks.",
    ),
    click.option("--ray-address", metavar="HOST:PORT", help="A running Ray cluster [default: one of this machine]."),
    click.option(
        "--cpus-per-cell",
        type=click.FloatRange(min=0, min_open=True),
        help="Cores that a Ray task takes, and threads it uses [default: 1].",
    ),
    click.option(
        "--gpus-per-cell",
        type=click.FloatRange(min=0),
        help="GPUs that a Ray task takes [default: 1 with --device cuda, else 0].",
    ),
    click.option(
        "--json",
        "as_json",
        is_flag=True,
        help="Records (of a dry run: the plan) as JSON on stdout, all else on stderr.",
    ),
    click.option(
        "--dry-run",
        is_flag=True,
        help="List the cells, done and to do, with estimates of time, passes and memory, and stop.",
    ),
]


def _run_options(command: Callable[..., None]) -> Callable[..., None]:
    for option in reversed(_RUN_OPTIONS):
        command = option(command)
    return command


@dataclass(frozen=True)
class RunOptions:
    """Options of how cells are run, which cannot change a result."""

    plugin: tuple[str, ...]
    device: str
    devices: int
    batch_size: int | None
    results: Path
    health: Tier | None
    executor: str
    ray_address: str | None
    cpus_per_cell: float | None
    gpus_per_cell: float | None
    as_json: bool
    dry_run: bool

    @classmethod
    def take(cls, given: dict[str, Any]) -> RunOptions:
        """Take these options out of all that were given.

        Raises:
            UsageError: options of Ray without it.
        """
        options = cls(**{item.name: given.pop(item.name) for item in dataclasses.fields(cls)})
        if options.executor != "ray":
            for name in ("ray_address", "cpus_per_cell", "gpus_per_cell"):
                if getattr(options, name) is not None:
                    raise UsageError(f"--{name.replace('_', '-')} is for --executor ray; the executor is local")
        elif options.devices > 1:
            raise UsageError(
                f"--devices is {options.devices}, which shares each training among the devices of this machine; with "
                "--executor ray several trainings run at once instead, each on one device: leave --devices out"
            )
        return options

    def make_executor(self, progress: Progress) -> Executor:
        """Where the cells run.

        Raises:
            UsageError: Ray is not installed, does not answer, or lacks what a cell asks for.
        """
        if self.executor == "local":
            from ensdef.executor import LocalExecutor

            return LocalExecutor(self.results, progress)
        from ensdef.ray_executor import RayExecutor

        gpus = self.gpus_per_cell if self.gpus_per_cell is not None else float(self.device == "cuda")
        return RayExecutor(self.results, self.ray_address, self.cpus_per_cell or 1.0, gpus)

    def resolve_device(self) -> str:
        """The device of the cells; with Ray, that of the workers, which this process may not see."""
        if self.executor == "ray":
            return "cuda" if self.device == "cuda" or (self.gpus_per_cell and self.device == "auto") else "cpu"
        from ensdef.evaluation import resolve_device

        return resolve_device(self.device)


@cli.command()
@click.option(
    "--method",
    help="Defences, comma separated, parameters in brackets: adp[entropy_weight=1],soe [default: the protocol's].",
)
@click.option("--attack", help="Attacks, comma separated: pgd[steps=50,restarts=5],mim.")
@click.option("--dataset", metavar="NAME", help="One data set [default: digits]; see `ensdef list datasets`.")
@click.option("--image-size", type=int, help="Resize images to this side.")
@click.option("--limit", type=int, help="Training images: the first N of a fixed permutation.")
@click.option("--arch", metavar="NAME", help="Member architecture [default: the data set's].")
@click.option("--members", type=int, help="Members of a defence that does not fix them [default: 3].")
@click.option("--eps", help="Attack radii, comma separated: 8/255,0.05 [default: the data set's].")
@click.option("--norm", type=click.Choice(["linf", "l2"]), help="Of attacks and training [default: linf].")
@click.option(
    "--combiner",
    type=click.Choice(["native", "avg", "max", "vote"]),
    help="Replace the defences' inference rule at evaluation.",
)
@click.option("--epochs", type=int, help="Training epochs [default: the method's recipe, or the data set's].")
@click.option("--train-eps", help="Training radius, or uniform(0.01,0.05), or eps for one training per attack radius.")
@click.option("--attack-seed", type=click.IntRange(0, 2**63 - 1), help="Of the attacks' random numbers [default: 0].")
@click.option("--precision", type=click.Choice(["fp32", "bf16"]), help="Of training [default: fp32].")
@click.option(
    "--search",
    type=click.Choice(["fp32", "bf16", "bf16+fp32"]),
    help="Of the attack's search; successes are judged in fp32 [default: fp32].",
)
@_run_options
def bench(
    config: dict[str, Any],
    method: str | None,
    attack: str | None,
    eps: str | None,
    seed: str | None,
    **given: Any,
) -> None:
    """Train what is missing, attack it, print the table."""
    options = RunOptions.take(given)
    protocol = load_protocol("default")
    if method is not None:
        protocol = with_methods(protocol, method)
    if attack is not None:
        protocol = with_attacks(protocol, attack)
    if eps is not None:
        given["eps"] = tuple(split_list(eps))
    protocol = _overlay(protocol, given, seed)
    if config:
        protocol = dataclasses.replace(
            protocol,
            recipe=layered(protocol.recipe, config),
            recipes=without(protocol.recipes, config),
            method_recipes=without(protocol.method_recipes, config),
        )
    _go(protocol, "bench", None, options)


@cli.command()
@click.argument("protocol")
@_run_options
def run(protocol: str, config: dict[str, Any], seed: str | None, **given: Any) -> None:
    """Run a whole PROTOCOL: a name from `ensdef list protocols`, or a TOML file."""
    options = RunOptions.take(given)
    loaded = load_protocol(protocol)
    asked = _overlay(loaded, given, seed)
    # records of a protocol that was changed on the command line do not carry its id
    protocol_id = asked.id if asked == loaded else None
    _go(asked, asked.name, protocol_id, options)


def _overlay(protocol: Protocol, given: dict[str, Any], seed: str | None) -> Protocol:
    changes = {key: value for key, value in given.items() if value is not None}
    if seed is not None:
        numbers = [fraction(part, "seed") for part in split_list(seed)]
        if any(number.denominator != 1 or not 0 <= number < 2**63 for number in numbers):
            raise UsageError(f"seed is {seed}; expected whole numbers from 0 to 2^63 - 1")
        changes["seeds"] = tuple(int(number) for number in numbers)
    return dataclasses.replace(protocol, **changes)


def _go(protocol: Protocol, table: str, protocol_id: str | None, options: RunOptions) -> None:
    from ensdef.registry import load_plugin

    for plugin in options.plugin:
        load_plugin(plugin)
    from ensdef.parallel import check_devices
    from ensdef.progress import ConsoleProgress
    from ensdef.runner import Run, check_writable, preflight, run_cells

    results, health = options.results, options.health
    where = options.resolve_device()
    if options.executor == "local":
        check_devices(options.devices, where)
    check_writable(results)
    cells, _ = plan(protocol)
    if options.dry_run:
        _print_plan(cells, where, options)
        return
    preflight(cells, results, health, options.devices)
    progress = ConsoleProgress()
    run = Run(results, where, options.batch_size, protocol_id, health, options.devices)
    with contextlib.redirect_stdout(sys.stderr):  # plug-ins and Ray print where they like; stdout is for the results
        records = run_cells(cells, run, progress, options.make_executor(progress))
    _report(records, protocol, table, results, options.as_json)
    if any(record.error for record in records):
        sys.exit(1)


def _report(records: list[Record], protocol: Protocol, table: str, results: Path, as_json: bool) -> None:
    from ensdef.tables import Manifests, markdown, write_table

    # a bench adds to what was benched before; a protocol's table is the protocol's cells and no others
    Manifests(results).write(table, protocol.title if table != "bench" else "Bench", records, extend=table == "bench")
    paths = write_table(table, results, results / "tables")
    click.echo(markdown(records, results), err=as_json)
    click.echo(f"tables: {', '.join(map(str, paths))}; records: {results / 'records'}", err=as_json)
    if as_json:
        click.echo(json.dumps([record.summary() for record in records], indent=1))


def _print_plan(cells: list[Cell], where: str, options: RunOptions) -> None:
    from ensdef.batch_size import ON_CPU
    from ensdef.evaluation import resolve_device
    from ensdef.planner import estimate
    from ensdef.planner.text import as_json as json_of
    from ensdef.planner.text import cell_lines, summary_lines

    # until here a run does the same, so that it will take as long to get here
    startup = time.process_time()
    made = estimate(
        cells,
        options.results,
        device=resolve_device(where),  # probes run here, whatever the executor
        batch_size=options.batch_size or ON_CPU,
        health=options.health,
        startup=startup,
    )
    for line in (*cell_lines(made), "", *summary_lines(made, where)):
        click.echo(line, err=options.as_json)
    if options.as_json:
        click.echo(json.dumps(json_of(made), indent=1))

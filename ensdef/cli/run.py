"""``ensdef bench`` and ``ensdef run``."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sys
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ensdef.cli import cli
from ensdef.cli.options import RunOptions, run_options
from ensdef.errors import UsageError
from ensdef.notation import fraction, split_list
from ensdef.papers.paper_table import PaperTable
from ensdef.papers.parsing import is_paper_table, paper_table_of
from ensdef.protocol import Protocol, grid_of, layered, load_protocol, with_attacks, with_methods, without
from ensdef.protocol_file import read_protocol_file

if TYPE_CHECKING:
    from ensdef.manifests import Kind
    from ensdef.measure_spec import MeasureSpec
    from ensdef.measurement import Measurement
    from ensdef.records import Record
    from ensdef.specs import Cell


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
@run_options
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
@click.option(
    "--scale", metavar="NAME", help="smoke, mini or paper, where the protocol has them [default: the smallest]."
)
@run_options
def run(protocol: str, scale: str | None, config: dict[str, Any], seed: str | None, **given: Any) -> None:
    """Run a whole PROTOCOL: a name from `ensdef list protocols`, or a TOML file."""
    options = RunOptions.take(given)
    file = read_protocol_file(protocol)
    if is_paper_table(file):
        table = paper_table_of(file, scale)
        base = _overlay(table.base, given, seed)
        _replicate(dataclasses.replace(table, base=base, changes=_changes(table.base, base)), options)
        return
    loaded = grid_of(file, scale)
    asked = _overlay(loaded, given, seed)
    # records of a protocol that was changed on the command line do not carry its id
    _go(asked, asked.table, None if _changes(loaded, asked) else asked.id, options)


def _changes(loaded: Protocol, asked: Protocol) -> tuple[str, ...]:
    """What the command line changed of a protocol, in sentences; where the data lie is no change."""
    fields = [item.name for item in dataclasses.fields(Protocol) if item.name != "data_dir"]
    return tuple(
        f"Changed on the command line: {name} = {getattr(asked, name)}."
        for name in fields
        if getattr(asked, name) != getattr(loaded, name)
    )


def _overlay(protocol: Protocol, given: dict[str, Any], seed: str | None) -> Protocol:
    changes = {key: value for key, value in given.items() if value is not None}
    if seed is not None:
        numbers = [fraction(part, "seed") for part in split_list(seed)]
        if any(number.denominator != 1 or not 0 <= number < 2**63 for number in numbers):
            raise UsageError(f"seed is {seed}; expected whole numbers from 0 to 2^63 - 1")
        changes["seeds"] = tuple(int(number) for number in numbers)
    return dataclasses.replace(protocol, **changes)


def _go(protocol: Protocol, table: str, protocol_id: str | None, options: RunOptions) -> None:
    """Plan, run and report a grid."""
    _prepare(options)
    if protocol.measures:
        _measures(protocol, table, protocol_id, options)
        return
    from ensdef.cells import plan

    cells, _ = plan(protocol)
    records = _run(cells, protocol_id, options)
    if records is None:
        return
    _report(records, protocol, protocol_id, table, options.results, options.as_json)
    if any(record.error for record in records):
        sys.exit(1)


def _replicate(table: PaperTable, options: RunOptions) -> None:
    """Plan, run, measure and report a paper's table."""
    from ensdef.claims import one_at_a_time
    from ensdef.measuring import check_measurable
    from ensdef.papers.replication import plan_table, write_manifest
    from ensdef.tables import write_table

    _prepare(options)
    replication = plan_table(table)
    check_measurable(replication.measurements)
    records = _run(replication.cells, table.id, options)
    if records is None:
        _print_measurements(replication.measurements, options)
        return
    measurements = _measure(replication.measurements, table.id, options)
    with one_at_a_time(options.results, "tables", partial(click.echo, err=True)):
        write_manifest(replication, options.results, records, measurements)
        paths = write_table(table.table, options.results, options.results / "tables")
    _show(paths, options)
    if options.as_json:
        summaries = [record.summary() for record in records] + [one.summary() for one in measurements]
        click.echo(json.dumps(summaries, indent=1))
    if any(record.error for record in records) or any(one.error for one in measurements):
        sys.exit(1)


def _measures(protocol: Protocol, table: str, protocol_id: str | None, options: RunOptions) -> None:
    """Plan, make and report measurements."""
    from ensdef.claims import one_at_a_time
    from ensdef.manifests import Manifests
    from ensdef.measuring import check_measurable, plan_measurements
    from ensdef.tables import write_table

    specs = plan_measurements(protocol, protocol.measures)
    if options.dry_run:
        _print_measurements(specs, options)
        if options.as_json:
            click.echo(json.dumps([{"key": spec.key, "measurement": spec.label} for spec in specs], indent=1))
        return
    check_measurable(specs)
    made = _measure(specs, protocol_id, options)
    with one_at_a_time(options.results, "tables", partial(click.echo, err=True)):
        Manifests(options.results).write_measurements(table, protocol.title, made)
        paths = write_table(table, options.results, options.results / "tables")
    _show(paths, options)
    if options.as_json:
        click.echo(json.dumps([one.summary() for one in made], indent=1))
    if failed := [one for one in made if one.error]:
        for one in failed:
            click.echo(f"failed: {one.call} of {one.label}: {one.error}", err=True)
        sys.exit(1)


def _print_measurements(specs: list[MeasureSpec], options: RunOptions) -> None:
    """What a run would measure, and on what it would have to be trained for that."""
    from ensdef.jobs import is_trained
    from ensdef.measuring import find_measurement

    run = options.run(None)
    for spec in specs:
        done = find_measurement(spec, run) is not None
        missing = not done and spec.training is not None and not is_trained(spec.training, options.results)
        state = "done" if done else "to train and measure" if missing else "to measure"
        click.echo(f"{state:20} {spec.label}", err=options.as_json)


def _show(paths: list[Path], options: RunOptions) -> None:
    """The table as Markdown, and where it and its siblings lie."""
    markdown = next(path for path in paths if path.suffix == ".md")
    click.echo(markdown.read_text(encoding="utf-8"), err=options.as_json)
    click.echo(f"tables: {', '.join(map(str, paths))}", err=options.as_json)


def _prepare(options: RunOptions) -> None:
    """Load plug-ins, and refuse devices and folders that cannot be used."""
    from ensdef.parallel import check_devices
    from ensdef.registry import load_plugin
    from ensdef.runner import check_writable

    for plugin in options.plugin:
        load_plugin(plugin)
    if options.executor == "local":
        check_devices(options.devices, options.resolve_device())
    check_writable(options.results)


def _run(cells: list[Cell], protocol_id: str | None, options: RunOptions) -> list[Record] | None:
    """The cells' records; None after a dry run, which prints what there is to do."""
    from ensdef.progress import ConsoleProgress
    from ensdef.runner import preflight, run_cells

    if options.dry_run:
        _print_plan(cells, options.resolve_device(), options)
        return None
    preflight(cells, options.results, options.health, options.devices)
    with contextlib.redirect_stdout(sys.stderr):  # plug-ins and Ray print where they like; stdout is for the results
        progress = ConsoleProgress()
        return run_cells(cells, options.run(protocol_id), progress, options.make_executor(progress))


def _measure(specs: list[MeasureSpec], protocol_id: str | None, options: RunOptions) -> list[Measurement]:
    from ensdef.measuring import measure_all
    from ensdef.progress import ConsoleProgress

    with contextlib.redirect_stdout(sys.stderr):
        return measure_all(specs, options.run(protocol_id), ConsoleProgress())


def _report(
    records: list[Record], protocol: Protocol, protocol_id: str | None, table: str, results: Path, as_json: bool
) -> None:
    from ensdef.claims import one_at_a_time
    from ensdef.manifests import Manifests
    from ensdef.tables import build_table, markdown, write_table

    with one_at_a_time(results, "tables", partial(click.echo, err=True)):
        # a bench adds to what was benched before; a protocol's table is the protocol's cells and no others
        title = protocol.title if table != "bench" else "Bench"
        kind = _kind(protocol, protocol_id, records)
        Manifests(results).write(
            table, title, records, extend=table == "bench", kind=kind, tell=partial(click.echo, err=True)
        )
        paths = write_table(table, results, results / "tables")
        text = build_table(table, results)[f"{table}.md"] if kind == "leaderboard" else markdown(records, results)
    click.echo(text, err=as_json)
    click.echo(f"tables: {', '.join(map(str, paths))}; records: {results / 'records'}", err=as_json)
    if as_json:
        click.echo(json.dumps([record.summary() for record in records], indent=1))


def _kind(protocol: Protocol, protocol_id: str | None, records: list[Record]) -> Kind:
    """What is made of the records: no leaderboard where a changed protocol met records of another."""
    from ensdef.leaderboard import protocols

    if protocol.kind == "leaderboard" and protocol_id is None and any(map(protocols, records)):
        click.echo(
            f"a grid in place of the leaderboard: {protocol.name} was changed on the command line, and some records "
            "are those of a protocol; give the changed run a --results folder of its own",
            err=True,
        )
        return "grid"
    return protocol.kind


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

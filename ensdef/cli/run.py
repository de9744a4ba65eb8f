"""``ensdef bench`` and ``ensdef run``."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ensdef.cli import cli
from ensdef.cli.options import RunOptions, run_options
from ensdef.errors import UsageError
from ensdef.notation import fraction, split_list
from ensdef.protocol import Protocol, layered, load_protocol, plan, with_attacks, with_methods, without

if TYPE_CHECKING:
    from ensdef.records import Record
    from ensdef.specs import Cell
    from ensdef.tables import Kind


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
@run_options
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
        records = run_cells(cells, run, progress, options.make_executor())
    _report(records, protocol, protocol_id, table, results, options.as_json)
    if any(record.error for record in records):
        sys.exit(1)


def _report(
    records: list[Record], protocol: Protocol, protocol_id: str | None, table: str, results: Path, as_json: bool
) -> None:
    from ensdef.claims import one_at_a_time
    from ensdef.tables import Manifests, build_table, markdown, write_table

    with one_at_a_time(results, "tables"):
        # a bench adds to what was benched before; a protocol's table is the protocol's cells and no others
        title = protocol.title if table != "bench" else "Bench"
        kind = _kind(protocol, protocol_id, records)
        Manifests(results).write(table, title, records, extend=table == "bench", kind=kind)
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

"""Options of ``ensdef bench`` and ``ensdef run`` that say how cells are run, not which."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ensdef.bounded import TOML, parse_toml, read_text
from ensdef.errors import UsageError

if TYPE_CHECKING:
    from ensdef.evidence import Keep
    from ensdef.executor import Executor
    from ensdef.health.catalogue import Tier
    from ensdef.progress import Progress
    from ensdef.runner import Run


def _config(ctx: click.Context, parameter: click.Parameter, value: str | None) -> dict[str, Any]:
    """``--config``: a TOML file of option names; the command line wins. A ``[train]`` table overrides the recipe."""
    if value is None:
        return {}
    try:
        content = parse_toml(read_text(Path(value), TOML))
    except UsageError as error:
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
        "--evidence",
        type=click.Choice(["all", "none"]),
        default="all",
        show_default=True,
        help="Keep the adversarial examples of new records of up to 1,000 images, for `ensdef verify`.",
    ),
    click.option(
        "--executor",
        type=click.Choice(["local", "ray"]),
        default="local",
        show_default=True,
        help="Where cells run: one after the other here, or as Ray tasks.",
    ),
    click.option(
        "--isolate",
        type=click.Choice(["auto", "always", "never"]),
        default="auto",
        show_default=True,
        help="Run cells in a process beside the command's, so that one that crashes or hangs costs no other; auto: "
        "where plug-ins of others take part.",
    ),
    click.option(
        "--stall",
        type=click.FloatRange(min=0, min_open=True),
        metavar="SECONDS",
        help="In a process of its own, a cell without progress for so long has failed [default: 3600].",
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
        help="GPUs that a Ray task takes [default: 1 with --device cuda, else 0; with --device auto, 0 means the CPU].",
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


def run_options(command: Callable[..., None]) -> Callable[..., None]:
    """Add the options to a command; :meth:`RunOptions.take` takes what was given for them."""
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
    evidence: Keep
    executor: str
    isolate: str
    stall: float | None
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
            if options.isolate == "always" and options.devices > 1:
                raise UsageError(
                    f"--isolate is always and --devices is {options.devices}, which gives each training processes of "
                    "its own; leave one of the two out"
                )
        elif options.isolate == "always" or options.stall is not None:
            raise UsageError("--isolate and --stall are for --executor local; Ray's tasks are processes of their own")
        elif options.devices > 1:
            raise UsageError(
                f"--devices is {options.devices}, which shares each training among the devices of this machine; with "
                "--executor ray several trainings run at once instead, each on one device: leave --devices out"
            )
        return options

    def make_executor(self, progress: Progress) -> Executor | None:
        """Where the cells run; None: in this process.

        Raises:
            UsageError: Ray is not installed, does not answer, or lacks what a cell asks for.
        """
        if self.executor == "local":
            return self._isolated(progress)
        from ensdef.ray_executor import RayExecutor

        gpus = self.gpus_per_cell if self.gpus_per_cell is not None else float(self.device == "cuda")
        return RayExecutor(self.results, self.ray_address, self.cpus_per_cell or 1.0, gpus)

    def _isolated(self, progress: Progress) -> Executor | None:
        from ensdef.executor import STALL, IsolatedExecutor
        from ensdef.registry import loaded_plugins, others_loaded

        foreign = (self.plugin or others_loaded()) and self.devices == 1  # several devices are processes already
        if self.isolate == "never" or (self.isolate == "auto" and not foreign):
            return None
        return IsolatedExecutor(self.results, progress, loaded_plugins(), self.stall or STALL)

    def run(self, protocol_id: str | None) -> Run:
        """How cells and measurements are run, their records carrying this protocol id."""
        from ensdef.runner import Run

        device = self.resolve_device()
        return Run(self.results, device, self.batch_size, protocol_id, self.health, self.devices, self.evidence)

    def resolve_device(self) -> str:
        """The device of the cells; with Ray, that of the workers, which this process may not see."""
        if self.executor == "ray":
            return "cuda" if self.device == "cuda" or (self.gpus_per_cell and self.device == "auto") else "cpu"
        from ensdef.evaluation import resolve_device

        return resolve_device(self.device)

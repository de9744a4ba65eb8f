"""Jobs as Ray tasks, on this machine or a cluster. A worker gets values and bytes and gives the same back.

A worker has a scratch folder in place of the results folder: the checkpoints it needs are sent along, and what it
writes is sent back. So nodes need the package, the plug-ins and the data sets, but not the results folder. Where they
do see it (one machine, a shared file system), images crafted on surrogates are kept there for the next job.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ensdef.checkpoints import SPEC, WEIGHTS, checkpoint_folder
from ensdef.errors import CheckpointError, UsageError
from ensdef.jobs import Job, Result, attempt, describe
from ensdef.progress import Progress
from ensdef.registry import loaded_plugins
from ensdef.worker import settle

#: Seconds until a cluster that does not answer is given up.
PATIENCE = 10.0
#: How often a job is begun again when its worker or node died.
RETRIES = 3
#: Seconds that jobs wait for a node that can run them, when the last one is gone.
NODE_PATIENCE = 600.0
#: Jobs in hand for each that can run, so that no worker waits for the driver.
AHEAD = 2

_SETS = "adversarial_sets"


class RayExecutor:
    """Sends jobs to Ray; plug-ins loaded here are loaded there.

    Args:
        results: the driver's results folder.
        address: of a running cluster, ``host:port``, ``ray://host:port`` or ``auto``; None: a cluster of this machine,
            which ends with the executor.
        cpus, gpus: what a job takes of its node; it uses as many threads as it has cores.
    Raises:
        UsageError: Ray is not installed, the cluster does not answer, or no node can give a job what it takes.
    """

    silent = True

    def __init__(
        self,
        results: Path,
        address: str | None = None,
        cpus: float = 1.0,
        gpus: float = 0.0,
    ) -> None:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        # what Ray announces as its coming default, and otherwise warns about
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        try:
            import ray
        except ImportError as error:
            raise UsageError("--executor ray needs Ray; install it with `pip install ensdef[ray]`") from error
        self.results = results
        self.plugins = loaded_plugins()
        self._ray: Any = ray
        self._connect(address)
        self._wanted = {"CPU": cpus, "GPU": gpus}
        try:
            self._check_room(address)
        except UsageError:
            ray.shutdown()
            raise
        self._task = ray.remote(num_cpus=cpus, num_gpus=gpus, max_retries=RETRIES)(perform_in_scratch)
        self._threads = max(1, int(cpus))
        self._jobs: dict[Any, Job] = {}
        self._refused: list[tuple[Job, Result]] = []
        self._token = results / _SETS / f".{uuid.uuid4().hex}.driver"
        self._token.parent.mkdir(parents=True, exist_ok=True)
        self._token.touch()

    def _connect(self, address: str | None) -> None:
        if address is not None and address != "auto":
            _probe(address)
        try:
            options = {"log_to_driver": False, "logging_level": "error"}
            if address is None:
                options["include_dashboard"] = False
            self._ray.init(address=address or "local", **options)
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise UsageError(f"no Ray cluster at {address or 'this machine'}: {error}") from error

    def _nodes(self) -> list[dict[str, float]]:
        return [node["Resources"] for node in self._ray.nodes() if node["Alive"]]

    def _fits(self) -> bool:
        """Whether some node of the cluster has all that a job takes."""
        return any(all(node.get(kind, 0) >= count for kind, count in self._wanted.items()) for node in self._nodes())

    def _check_room(self, address: str | None) -> None:
        if not self._fits():
            nodes = self._nodes()
            largest = {kind: max((node.get(kind, 0) for node in nodes), default=0) for kind in self._wanted}
            raise UsageError(
                f"a cell asks for {self._wanted['CPU']:g} CPU cores and {self._wanted['GPU']:g} GPUs, but no node of "
                f"the Ray cluster at {address or 'this machine'} has both (the largest: {largest['CPU']:g} cores, "
                f"{largest['GPU']:g} GPUs); lower --cpus-per-cell or --gpus-per-cell"
            )

    @property
    def has_room(self) -> bool:
        there = self._ray.cluster_resources()
        slots = min(int(there.get(kind, 0) // count) for kind, count in self._wanted.items() if count)
        return len(self._jobs) < AHEAD * max(slots, 1)

    def submit(self, job: Job) -> None:
        sent = {}
        try:
            for spec in job.needs:
                for name in (WEIGHTS, SPEC):
                    path = checkpoint_folder(self.results, spec) / name
                    sent[str(path.relative_to(self.results))] = path.read_bytes()
        except OSError as error:  # another command set it aside this moment
            self._refused.append((job, Result(refused=CheckpointError(f"{path} cannot be read ({error})"))))
            return
        reference = self._task.options(name=job.label).remote(
            self.plugins, pickle.dumps(job), sent, str(self._token.resolve()), os.getcwd(), self._threads
        )
        self._jobs[reference] = job

    def next(self) -> tuple[Job, Result]:
        if self._refused:
            return self._refused.pop()
        alone_since: float | None = None
        while True:
            ready, _ = self._ray.wait(list(self._jobs), num_returns=1, timeout=PATIENCE)
            if ready:
                return self._jobs.pop(ready[0]), self._result(ready[0])
            if self._fits():
                alone_since = None
                continue
            alone_since = alone_since or time.monotonic()
            if time.monotonic() - alone_since > NODE_PATIENCE:
                reference, job = self._jobs.popitem()
                self._ray.cancel(reference, force=True)
                return job, Result(error=f"for {NODE_PATIENCE:g} s no node of the Ray cluster could run it")

    def _result(self, reference: Any) -> Result:
        failures = self._ray.exceptions
        try:
            result: Result = pickle.loads(self._ray.get(reference))
        except failures.RayTaskError as error:  # before or after the job itself, which catches its own
            return Result(error=describe(error.cause))
        except failures.RayError as error:
            told = (str(error).strip().splitlines() or [""])[0]
            return Result(error=f"Ray gave up after {RETRIES} more tries: {type(error).__name__}: {told}")
        return result

    def close(self) -> None:
        for reference in self._jobs:
            self._ray.cancel(reference, force=True)
        self._jobs.clear()
        self._token.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # only if nothing was crafted
            self._token.parent.rmdir()
        self._ray.shutdown()


def perform_in_scratch(
    plugins: Sequence[str], packed: bytes, sent: dict[str, bytes], token: str, folder: str, threads: int
) -> bytes:
    """What a worker does: one job in a folder of its own; a pickled :class:`Result` with the files it wrote.

    Args:
        packed: the pickled job; plug-ins are loaded before it is opened.
        sent: files of the results folder that the job needs, by path inside it.
        token: a file beside the adversarial sets of the driver; where it is seen, they are shared.
        folder: where the driver runs, from which a data set's folder may be named.
    """
    settle(plugins, folder, threads)
    job: Job = pickle.loads(packed)
    with tempfile.TemporaryDirectory(prefix="ensdef-") as name:
        scratch = Path(name)
        for path, content in sent.items():
            (scratch / path).parent.mkdir(parents=True, exist_ok=True)
            (scratch / path).write_bytes(content)
        if Path(token).is_file():
            (scratch / _SETS).symlink_to(Path(token).parent, target_is_directory=True)
        result = attempt(job, scratch, Progress())
        written = {
            str(file.relative_to(scratch)): file.read_bytes()
            for file in scratch.rglob("*")  # does not go into links
            if file.is_file() and str(file.relative_to(scratch)) not in sent and ".claims" not in file.parts
        }
    error = result.error
    if result.refused is not None:  # what one node lacks must not end the work of the others
        error = f"on {socket.gethostname()}: {result.refused}"
    return pickle.dumps(Result(result.record, error, files=written))


def _probe(address: str) -> None:
    """Refuse an address at which no cluster answers; Ray itself would wait for minutes.

    Raises:
        UsageError: see above.
    """
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdigit():
        raise UsageError(f"--ray-address is {address!r}; expected host:port, ray://host:port or auto")
    try:
        socket.create_connection((host, int(port)), timeout=PATIENCE).close()
        if not address.startswith("ray://"):
            check = [sys.executable, "-m", "ray.scripts.scripts", "health-check", "--address", address]
            subprocess.run(check, check=True, capture_output=True, timeout=2 * PATIENCE)
    except (OSError, subprocess.SubprocessError) as error:
        why = error if isinstance(error, OSError) else "something else listens there"
        raise UsageError(
            f"no Ray cluster answers at {address} ({why}); start one with `ray start --head`, which prints its "
            "address, or leave --ray-address out to use this machine"
        ) from error

"""Where cells run: the driver's order of work, drivers that share a folder, and Ray with workers and nodes that die."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from ensdef.attack_spec import AttackSpec
from ensdef.claims import Claims
from ensdef.cli import cli, run  # noqa: F401 - run adds its commands
from ensdef.errors import UsageError
from ensdef.executor import LocalExecutor
from ensdef.jobs import CellJob, Job, Result, TrainJob, attempt
from ensdef.loading import attacked_subset, find_data
from ensdef.progress import Progress
from ensdef.runner import Run, find_record, run_cells
from ensdef.specs import Cell, Setting, TrainSpec

SMALL = ("--samples", "20", "--limit", "100", "--epochs", "1", "--members", "2", "--device", "cpu")


def cell(method: str = "nat", attack: str = "fgsm", seed: int = 0, **hyper: Any) -> Cell:
    """A cell that takes less than a second."""
    data, spec = find_data("digits", limit=64)
    setting = Setting(
        spec, "small_resnet[width=4]", 2, "linf", "0.2", recipe={"epochs": 1, "batch_size": 32}, seed=seed
    )
    test, _ = attacked_subset(data, 20)
    parameters = {"steps": 2} if attack == "pgd" else {}
    return Cell(
        TrainSpec.create(method, hyper, setting),
        AttackSpec.create(attack, parameters, "linf", "0.2"),
        len(test),
        test.checksum(),
    )


class Recording:
    """An executor with ``room`` for some jobs, which performs them only when it is asked for the next result."""

    silent = True

    def __init__(self, results: Path, room: int, reverse: bool = False) -> None:
        self.results, self.room, self.reverse = results, room, reverse
        self.waiting: list[Job] = []
        self.given: list[str] = []
        self.closed = False

    @property
    def has_room(self) -> bool:
        return len(self.waiting) < self.room

    def submit(self, job: Job) -> None:
        assert self.has_room
        self.given.append(job.label)
        self.waiting.append(job)

    def next(self) -> tuple[Job, Result]:
        job = self.waiting.pop(-1 if self.reverse else 0)
        return job, attempt(job, self.results, Progress())

    def close(self) -> None:
        self.closed = True


def told(record: Any) -> dict[str, Any]:
    """What a record says, but for when, how fast and in how much memory."""
    body = json.loads(record.to_json())
    body["provenance"].pop("date")
    for name in ("seconds", "peak_memory_mb"):
        body["provenance"].get("training", {}).pop(name, None)
    return {name: value for name, value in body.items() if name not in ("seconds", "checkpoint", "sha256")}


# --- the driver -----------------------------------------------------------------------------------


def test_one_after_the_other_a_training_is_followed_by_its_attacks(tmp_path: Path) -> None:
    executor = Recording(tmp_path, room=1)
    run_cells([cell(), cell(attack="pgd"), cell(seed=1)], Run(tmp_path), executor=executor)
    assert [label.partition(" ")[0] for label in executor.given] == ["train", "nat", "nat", "train", "nat"]
    assert executor.closed


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("room", [2, 10])
def test_neither_room_nor_order_changes_a_record(room: int, reverse: bool, tmp_path: Path) -> None:
    cells = [cell(), cell(attack="pgd"), cell("igat", base="nat"), cell(seed=1)]
    plain = run_cells(cells, Run(tmp_path / "one"))
    wide = run_cells(cells, Run(tmp_path / "two"), executor=Recording(tmp_path / "two", room, reverse))
    assert [told(record) for record in wide] == [told(record) for record in plain]


def test_what_does_not_depend_on_each_other_is_handed_out_at_once(tmp_path: Path) -> None:
    executor = Recording(tmp_path, room=10)
    run_cells([cell(), cell(seed=1)], Run(tmp_path), executor=executor)
    assert [label.partition(" ")[0] for label in executor.given] == ["train", "train", "nat", "nat"]


def test_a_cell_that_is_asked_for_twice_is_done_once(tmp_path: Path) -> None:
    executor = Recording(tmp_path, room=10)
    one, other = run_cells([cell(), cell()], Run(tmp_path), executor=executor)
    assert one == other
    assert len(executor.given) == 2


def test_a_failed_training_fails_its_cells_and_stops_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    perform = TrainJob.perform

    def breaking(self: TrainJob, where: Path, progress: Progress) -> None:
        if self.spec.setting.seed == 1:
            raise RuntimeError("it broke")
        perform(self, where, progress)

    monkeypatch.setattr(TrainJob, "perform", breaking)
    records = run_cells(
        [cell(seed=1), cell(attack="pgd", seed=1), cell()], Run(tmp_path), executor=Recording(tmp_path, 10)
    )
    assert [record.error for record in records] == ["it broke", "it broke", None]


def test_a_failed_prerequisite_fails_what_is_built_on_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    perform = TrainJob.perform

    def breaking(self: TrainJob, where: Path, progress: Progress) -> None:
        if self.spec.method == "nat":
            raise RuntimeError("the base broke")
        perform(self, where, progress)

    monkeypatch.setattr(TrainJob, "perform", breaking)
    executor = Recording(tmp_path, 10)
    records = run_cells([cell("igat", base="nat"), cell("adv_en")], Run(tmp_path), executor=executor)
    assert [record.error for record in records] == ["the base broke", None]
    assert not [label for label in executor.given if "igat" in label], "not even begun"


def test_what_failed_here_and_was_done_elsewhere_is_taken_from_there(tmp_path: Path) -> None:
    class Overtaken(Recording):
        """Another driver trains it after this one has failed to."""

        def next(self) -> tuple[Job, Result]:
            job = self.waiting.pop(0)
            result = attempt(job, self.results, Progress())
            return job, Result(error="no memory just then") if isinstance(job, TrainJob) else result

    (record,) = run_cells([cell()], Run(tmp_path), executor=Overtaken(tmp_path, 10))
    assert record.error is None


def test_a_cell_that_failed_on_a_gpu_elsewhere_is_recorded_where_there_is_none(tmp_path: Path) -> None:
    class Lost(Recording):
        def next(self) -> tuple[Job, Result]:
            return self.waiting.pop(0), Result(error="the node died")

    (record,) = run_cells([cell()], Run(tmp_path, device="cuda"), executor=Lost(tmp_path, 10))
    assert record.error == "the node died"
    if not torch.cuda.is_available():
        assert record.provenance["device_name"] == "unknown"


# --- several drivers ------------------------------------------------------------------------------


@pytest.mark.parametrize("code", ["ENOLCK", "ENOSYS", "EOPNOTSUPP"])
def test_where_locks_do_not_work_a_driver_says_so_once_and_goes_on(
    code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import errno
    import fcntl

    def refuse(*args: Any) -> None:
        raise OSError(getattr(errno, code), "no locks here")

    told: list[str] = []
    progress = Progress()
    progress.message = told.append  # type: ignore[method-assign]
    monkeypatch.setattr(fcntl, "flock", refuse)
    records = run_cells([cell(), cell(attack="pgd")], Run(tmp_path), progress)
    assert [record.error for record in records] == [None, None]
    assert sum("locks do not work" in text and "leases alone" in text for text in told) == 1


def test_a_driver_that_waits_for_others_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = Claims(tmp_path)
    assert other.take(cell().training.key)
    monkeypatch.setattr("ensdef.runner.POLL", 0.01)

    told: list[str] = []

    def free(text: str) -> None:
        told.append(text)
        other.release_all()

    progress = Progress()
    progress.message = free  # type: ignore[method-assign]
    (record,) = run_cells([cell()], Run(tmp_path), progress)
    assert record.error is None
    assert "at work on all that is left (1 cells)" in told[0]
    assert sum("at work on all" in text for text in told) == 1


def test_drivers_on_one_folder_share_the_work_and_repeat_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    performed: list[str] = []
    one_at_a_time = threading.Lock()  # drivers are processes: what is global in one, trainings may change for a while
    for kind in (TrainJob, CellJob):
        perform: Callable[..., Any] = kind.perform

        def noted(self: Any, where: Path, progress: Progress, perform: Callable[..., Any] = perform) -> Any:
            performed.append(self.label)
            with one_at_a_time:
                return perform(self, where, progress)

        monkeypatch.setattr(kind, "perform", noted)
    monkeypatch.setattr("ensdef.runner.POLL", 0.05)
    cells = [cell(attack=attack, seed=seed) for seed in range(3) for attack in ("fgsm", "pgd")]
    found: dict[int, list[Any]] = {}

    def drive(number: int) -> None:
        found[number] = run_cells(cells, Run(tmp_path), executor=LocalExecutor(tmp_path, Progress()))

    threads = [threading.Thread(target=drive, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(performed) == len(set(performed)) == 3 + 6
    assert [told(record) for record in found[0]] == [told(record) for record in found[1]]
    assert [told(record) for record in found[0]] == [told(record) for record in found[2]]


#: Notes in a file every training and every attack that is begun.
NOTING = '''
"""Throw-away defence (A. Author; nowhere, 2020)."""

import pathlib
import sys

import ensdef
from ensdef.losses import member_cross_entropy

LOG = pathlib.Path(__file__).with_suffix(".log")


def note(text):
    with LOG.open("a") as file:
        file.write(text + "\\n")


@ensdef.register_defense("noting")
class Noting(ensdef.EnsembleDefense):
    """Plain cross-entropy."""

    def warm_start(self, prerequisites):
        import torch
        note(f"train {torch.initial_seed()}")

    def loss(self, batch, progress):
        return {"ce": member_cross_entropy(self.member_logits(batch.x), batch.y).mean(dim=1).sum()}
'''


def test_what_a_killed_driver_leaves_is_done_by_the_others_and_what_it_did_is_not_repeated(tmp_path: Path) -> None:
    plugin = tmp_path / "noting.py"
    plugin.write_text(NOTING)
    words = ["--plugin", os.fspath(plugin), "--method", "noting", "--attack", "fgsm,bim", "--seed", "0,1,2,3", *SMALL]
    words += ["--isolate", "never"]  # so that what is killed is what was at work; see test_isolation for the other way
    command = [sys.executable, "-m", "ensdef", "bench", *words, "--results", os.fspath(tmp_path / "r"), "--json"]
    first = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    second = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_for(lambda: any(tmp_path.glob("r/checkpoints/*/spec.json")), 60)
    first.kill()
    first.wait()
    out, err = second.communicate(timeout=120)
    assert second.returncode == 0, err
    assert [record["error"] for record in json.loads(out)] == [None] * 8
    trainings = (tmp_path / "noting.log").read_text().split("\n")[:-1]
    assert set(trainings) == {f"train {seed}" for seed in range(4)}
    assert len(trainings) <= 4 + 1, "at most what the killed one was at"


# --- Ray ------------------------------------------------------------------------------------------

ray = pytest.importorskip("ray", reason="Ray is an extra: pip install ensdef[ray]")

#: Tells where it trains and waits to be killed, the first time; trains the second time.
PLUGIN = '''
"""Throw-away defence (A. Author; nowhere, 2020)."""

import os
import pathlib
import time

import ensdef
from ensdef.losses import member_cross_entropy

HERE = pathlib.Path(__file__).parent


@ensdef.register_defense("victim")
class Victim(ensdef.EnsembleDefense):
    """Plain cross-entropy, and a first training that never ends."""

    def begin_epoch(self, epoch, rng):
        try:
            (HERE / "begun").touch(exist_ok=False)
        except FileExistsError:
            return
        (HERE / "pid").write_text(str(os.getpid()))
        time.sleep(300)

    def loss(self, batch, progress):
        return {"ce": member_cross_entropy(self.member_logits(batch.x), batch.y).mean(dim=1).sum()}


@ensdef.register_attack("deadly")
class Deadly(ensdef.IterativeAttack):
    """Takes its process along."""

    steps = 1

    def step(self, target, x_adv, y, state, threat, rng):
        os._exit(1)
'''


def wait_for(condition: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.1)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """A Ray cluster of one node with two cores, which the commands below connect to."""
    with contextlib.ExitStack() as stack:
        yield start(stack, 2)


def start(stack: contextlib.ExitStack, cores: int) -> Any:
    from ray.cluster_utils import Cluster

    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": cores, "include_dashboard": False})
    stack.callback(cluster.shutdown)
    return cluster


def bench(cluster: Any, *words: str | Path, results: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "ensdef", "bench", *SMALL, *map(str, words), "--results", str(results), "--json"]
    if cluster is not None:
        command += ["--executor", "ray", "--ray-address", cluster.address]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def finished(process: subprocess.Popen[str], code: int = 0) -> list[dict[str, Any]]:
    out, err = process.communicate(timeout=240)
    assert process.returncode == code, err
    return json.loads(out)  # type: ignore[no-any-return]


@pytest.mark.slow
def test_results_equal_the_local_ones_but_for_times(cluster: Any, tmp_path: Path) -> None:
    words = ("--method", "nat,dverge", "--attack", "pgd[steps=3],transfer[steps=2]")
    there = finished(bench(cluster, *words, results=tmp_path / "ray"))
    here = finished(bench(None, *words, results=tmp_path / "local"))
    for record, other in zip(there, here, strict=True):
        for one in (record, other):
            one["provenance"].pop("date")
            one.pop("seconds")
            for name in ("seconds", "peak_memory_mb"):
                one["provenance"]["training"].pop(name)
            for name in ("path", "checkpoint"):
                one[name] = Path(one[name]).relative_to(tmp_path / ("ray" if one is record else "local"))
        assert record == other
    files = [
        {str(path.relative_to(tmp_path / side)): path.read_bytes() for path in (tmp_path / side).rglob("*.safetensors")}
        for side in ("ray", "local")
    ]
    assert files[0] == files[1], "weights, adversarial sets and evidence, byte for byte"
    assert {Path(name).parts[0] for name in files[0]} == {"checkpoints", "adversarial_sets", "evidence"}


@pytest.mark.slow
def test_a_worker_killed_while_it_trains_costs_a_retry(cluster: Any, tmp_path: Path) -> None:
    plugin = tmp_path / "victim.py"
    plugin.write_text(PLUGIN)
    process = bench(cluster, "--plugin", plugin, "--method", "victim,nat", "--attack", "fgsm", results=tmp_path / "r")
    wait_for((tmp_path / "pid").exists, 120)
    os.kill(int((tmp_path / "pid").read_text()), signal.SIGKILL)
    records = finished(process)
    assert [(record["method"], record["error"]) for record in records] == [("victim", None), ("nat", None)]


@pytest.mark.slow
def test_a_cell_that_kills_every_worker_is_recorded_as_failed_and_the_others_finish(
    cluster: Any, tmp_path: Path
) -> None:
    plugin = tmp_path / "victim.py"
    plugin.write_text(PLUGIN)
    words = ("--plugin", plugin, "--method", "nat", "--attack", "deadly,fgsm", "--epochs", "6", "--limit", "300")
    process = bench(cluster, *words, results=tmp_path / "r")
    failed, fine = finished(process, code=1)
    assert "Ray gave up" in failed["error"]
    assert fine["error"] is None
    stored = json.loads(Path(failed["path"]).read_text())
    assert stored["error"] == failed["error"]


@pytest.mark.slow
def test_a_node_that_dies_loses_nothing(tmp_path: Path) -> None:
    plugin = tmp_path / "victim.py"
    plugin.write_text(PLUGIN)
    with contextlib.ExitStack() as stack:
        cluster = start(stack, 0)
        doomed = cluster.add_node(num_cpus=1)
        process = bench(
            cluster, "--plugin", plugin, "--method", "nat,victim", "--attack", "fgsm", results=tmp_path / "r"
        )
        wait_for((tmp_path / "pid").exists, 120)
        cluster.add_node(num_cpus=1)
        cluster.remove_node(doomed, allow_graceful=False)
        records = finished(process)
    assert [(record["method"], record["error"]) for record in records] == [("nat", None), ("victim", None)]


@pytest.mark.slow
def test_what_goes_wrong_on_a_node_is_told_as_it_is(cluster: Any, tmp_path: Path) -> None:
    plugin = tmp_path / "noting.py"
    plugin.write_text(NOTING + "\nif 'default_worker' in sys.argv[0]: raise OSError('no such disk')\n")
    words = ("--plugin", plugin, "--method", "noting", "--attack", "fgsm")
    (failed,) = finished(bench(cluster, *words, results=tmp_path / "r"), code=1)
    assert "OSError: no such disk" in failed["error"]
    assert "\x1b" not in failed["error"]


@pytest.mark.slow
def test_when_no_node_is_left_that_could_run_a_cell_it_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ensdef.ray_executor import RayExecutor

    monkeypatch.setattr("ensdef.ray_executor.PATIENCE", 0.5)
    monkeypatch.setattr("ensdef.ray_executor.NODE_PATIENCE", 1.0)
    with contextlib.ExitStack() as stack:
        cluster = start(stack, 0)
        node = cluster.add_node(num_cpus=1)
        executor = RayExecutor(tmp_path, cluster.address)
        cluster.remove_node(node, allow_graceful=False)
        (record,) = run_cells([cell()], Run(tmp_path), executor=executor)
    assert "no node of the Ray cluster could run it" in (record.error or "")


@pytest.mark.slow
@pytest.mark.parametrize(("option", "what"), [("--gpus-per-cell", "GPUs"), ("--cpus-per-cell", "cores")])
def test_more_than_a_node_has_is_refused(cluster: Any, option: str, what: str, tmp_path: Path) -> None:
    process = bench(cluster, "--method", "nat", "--attack", "fgsm", option, "64", results=tmp_path)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 2
    assert f"64 {what}" in err.replace("CPU cores", "cores")
    assert option in err
    assert not list(tmp_path.glob("records"))


def test_a_cluster_that_does_not_answer_is_refused_at_once(tmp_path: Path) -> None:
    import socket

    from ensdef.ray_executor import RayExecutor

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    began = time.monotonic()
    with pytest.raises(UsageError, match=f"no Ray cluster answers at 127.0.0.1:{port}.*ray start --head"):
        RayExecutor(tmp_path, address=f"127.0.0.1:{port}")
    assert time.monotonic() - began < 30


def test_an_address_where_something_else_listens_is_refused_soon(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import socket

    from ensdef.ray_executor import RayExecutor

    monkeypatch.setattr("ensdef.ray_executor.PATIENCE", 2.0)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        with pytest.raises(UsageError, match="something else listens there"):
            RayExecutor(tmp_path, address=f"127.0.0.1:{silent.getsockname()[1]}")


@pytest.mark.parametrize("address", ["nonsense", "host:", ":123", "ray://host"])
def test_an_address_that_is_none_is_refused(address: str, tmp_path: Path) -> None:
    from ensdef.ray_executor import RayExecutor

    with pytest.raises(UsageError, match="expected host:port"):
        RayExecutor(tmp_path, address=address)


def test_without_ray_the_message_says_how_to_install_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ensdef.ray_executor import RayExecutor

    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UsageError, match=r"pip install ensdef\[ray\]"):
        RayExecutor(tmp_path)


@pytest.mark.parametrize("option", ["--ray-address", "--cpus-per-cell", "--gpus-per-cell"])
def test_options_of_ray_are_refused_without_it(option: str, tmp_path: Path) -> None:
    result = CliRunner().invoke(cli, ["bench", option, "1", "--results", str(tmp_path)])
    assert result.exit_code == 2
    assert f"{option} is for --executor ray" in result.output


def test_several_devices_are_for_one_machine(tmp_path: Path) -> None:
    result = CliRunner().invoke(cli, ["bench", "--executor", "ray", "--devices", "2", "--results", str(tmp_path)])
    assert result.exit_code == 2
    assert "leave --devices out" in result.output


def test_jobs_travel_as_bytes() -> None:
    import pickle

    for job in (CellJob(cell(), Run(Path("r"))), TrainJob(cell("igat", base="nat").training, Run(Path("r")))):
        again = pickle.loads(pickle.dumps(job))
        assert (again.key, again.label, again.needs) == (job.key, job.label, job.needs)


def test_the_records_are_where_the_next_run_finds_them(tmp_path: Path) -> None:
    executor = Recording(tmp_path, room=10)
    run_cells([cell()], Run(tmp_path), executor=executor)
    assert find_record(cell(), tmp_path) is not None
    again = Recording(tmp_path, room=10)
    run_cells([cell()], Run(tmp_path), executor=again)
    assert again.given == []

"""A cell that was killed goes on from its journal, gives the record that it would have given, and repeats nothing.

That every built-in attack does is a clause of its contract (``ensdef check``); here is what the clause does not see.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from toys_journal import Told
from zoo import Mean, convolutional, images

from ensdef.attack import IterativeAttack, State, WholeAttack
from ensdef.attack_spec import AttackSpec
from ensdef.errors import DataError
from ensdef.harness import Outcome, attack_model
from ensdef.health.catalogue import Tier
from ensdef.jobs import Run
from ensdef.journal import Journal, Snapshot
from ensdef.loading import attacked_subset, find_data
from ensdef.records import Record
from ensdef.registry import ATTACKS
from ensdef.rng import KeyedRandom
from ensdef.runner import ensure_trained, find_record, run_cells
from ensdef.specs import Cell, Setting, TrainSpec
from ensdef.target import Target
from ensdef.testing import Stopped, StoppingJournal, stopped_and_resumed
from ensdef.threat import Threat

COUNT, BATCH = 40, 16


@dataclass(frozen=True)
class Job:
    """An attack on two small networks, at a radius where half of the images fall."""

    attack: str
    params: dict[str, Any]
    norm: str = "linf"
    eps: float = 0.06
    search: str = "fp32"

    def run(
        self, journal: Journal | None = None, batch_size: int = BATCH, health: Tier = "basic", **more: Any
    ) -> Outcome:
        x, y = images(COUNT)
        spec = AttackSpec.create(self.attack, self.params, self.norm, self.eps, search=self.search)
        model = Mean([convolutional(True, seed) for seed in (0, 1)])
        return attack_model(model, x, y, spec, batch_size=batch_size, health=health, journal=journal, **more)


JOBS = {
    "runs": Job("pgd", {"steps": 6, "restarts": 3}),
    "runs judged at their end": Job("pgd", {"steps": 6, "restarts": 2, "success": "last"}),
    "runs with a memory": Job("mim", {"steps": 6}),
    "two precisions": Job("pgd", {"steps": 4}, search="bf16+fp32"),
    "looking ahead": Job("square", {"queries": 40}, eps=0.1),
    "a shortest perturbation": Job("deepfool", {"steps": 8}),
    "many parts": Job("suite", {"attacks": ("fgsm", "mim[steps=3]", "pgd[steps=4]", "cw[steps=3]")}),
}


def same(one: Outcome, other: Outcome) -> None:
    """Everything that a record tells, but for seconds."""
    for item in dataclasses.fields(Outcome):
        mine, theirs = getattr(one, item.name), getattr(other, item.name)
        if isinstance(mine, Tensor):
            assert torch.equal(mine, theirs), item.name
        elif item.name != "seconds":
            assert mine == theirs, item.name


@pytest.mark.parametrize("job", JOBS.values(), ids=JOBS)
def test_a_cell_that_is_stopped_gives_the_same_record(job: Job) -> None:
    alone = job.run()
    assert 0 < int(alone.robust.sum()) < int(alone.clean.sum()), "some images should fall and some should not"
    for moments in (1, 7):
        same(stopped_and_resumed(job.run, moments), alone)


def test_a_cell_that_is_stopped_at_every_moment_gives_the_same_record(tmp_path: Path) -> None:
    job, path, stops = JOBS["runs"], tmp_path / "cell", 0
    while True:
        try:
            outcome = job.run(StoppingJournal(path, 1))
            break
        except Stopped:
            stops += 1
    assert stops > 20
    same(outcome, job.run())


def test_a_cell_may_go_on_in_smaller_batches(tmp_path: Path) -> None:
    job = JOBS["runs"]
    alone = job.run(health="off")
    with pytest.raises(Stopped):
        job.run(StoppingJournal(tmp_path / "cell", 9), batch_size=64, health="off")
    again = job.run(StoppingJournal(tmp_path / "cell"), batch_size=16, health="off")
    assert torch.equal(again.robust, alone.robust)
    torch.testing.assert_close(again.x_adv, alone.x_adv, atol=1e-4, rtol=0)
    assert (again.forwards, again.backwards) == (alone.forwards, alone.backwards)


def test_seconds_of_all_processes_add_up(tmp_path: Path) -> None:
    job, path = JOBS["runs"], tmp_path / "cell"
    with pytest.raises(Stopped):
        job.run(StoppingJournal(path, 3))
    journal = StoppingJournal(path)
    kept = journal.read()
    assert kept is not None
    kept.values["seconds"] += 100.0
    journal.keep(lambda: kept)
    assert 100.0 < job.run(StoppingJournal(path)).seconds < 130.0


# --- nothing twice --------------------------------------------------------------------------------


@dataclass(frozen=True)
class CountingParams:
    steps: int = 4
    restarts: int = 3


class Counting(IterativeAttack):
    """Random steps that note every (image, run, step) they take."""

    Params = CountingParams
    taken: ClassVar[Counter[tuple[int, int, int]]] = Counter()

    def step(
        self, target: Target, x_adv: Tensor, y: Tensor, state: State, threat: Threat, rng: KeyedRandom
    ) -> tuple[Tensor, State]:
        # padding repeats the last row
        self.taken.update({*zip(rng.ids.tolist(), rng.run.tolist(), rng.step.tolist(), strict=True)})
        return x_adv + threat.eps * rng.signs(*x_adv.shape[1:]), state


class CountingWhole(WholeAttack):
    """Notes every image it is given, batch by batch, and warns once a batch."""

    batch_size = 12
    given: ClassVar[list[list[int]]] = []

    def perturb(self, target: Target, x: Tensor, y: Tensor, threat: Threat, rng: KeyedRandom) -> Tensor:
        self.given.append(rng.ids.tolist())
        self.warnings.append(f"batch {len(self.given)}")
        return x + threat.eps * rng.signs(*x.shape[1:])


@pytest.fixture
def counting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ATTACKS._registered, "toy_counting", Counting)
    monkeypatch.setitem(ATTACKS._registered, "toy_whole", CountingWhole)
    Counting.taken.clear()
    CountingWhole.given.clear()


@pytest.mark.usefixtures("counting")
@pytest.mark.parametrize("moments", [1, 3, 8])
def test_no_step_of_a_batch_that_was_kept_is_taken_again(moments: int) -> None:
    stopped_and_resumed(Job("toy_counting", {}).run, moments)
    assert set(Counting.taken.values()) == {1}
    assert len({run for _, run, _ in Counting.taken}) == 3, "all runs were made"


@pytest.mark.usefixtures("counting")
@pytest.mark.parametrize("moments", [1, 2, 3])
def test_a_whole_attack_is_given_no_batch_twice_and_the_same_batches(moments: int) -> None:
    job = Job("toy_whole", {})
    alone = job.run()
    batches = list(CountingWhole.given)
    assert [len(batch) for batch in batches][:3] == [12, 12, 12]
    CountingWhole.given.clear()
    same(stopped_and_resumed(job.run, moments), alone)
    assert CountingWhole.given == batches


@pytest.mark.usefixtures("counting")
def test_warnings_of_the_batches_before_are_kept() -> None:
    found = stopped_and_resumed(Job("toy_whole", {}).run, 2).findings
    told = " ".join(str(finding) for finding in found)
    assert all(f"batch {number}" in told for number in (1, 2, 3))


def test_clean_images_are_judged_once(tmp_path: Path) -> None:
    class Odd(nn.Module):
        """Right on no clean image once a cell was stopped: an answer that must not be asked for again."""

        stopped = False

        def __init__(self) -> None:
            super().__init__()
            self.model = convolutional(True)

        def forward(self, x: Tensor) -> Tensor:
            scores: Tensor = self.model(x)
            clean = images(COUNT)[0]
            known = (x.flatten(1)[:, None] == clean.flatten(1)[None]).all(dim=2).any(dim=1)
            return torch.where(known[:, None] & Odd.stopped, -scores, scores)

    x, y = images(COUNT)
    spec = AttackSpec.create("pgd", {"steps": 4}, "linf", 0.06)
    alone = attack_model(Odd(), x, y, spec, batch_size=BATCH, health="off")
    with pytest.raises(Stopped):
        attack_model(Odd(), x, y, spec, batch_size=BATCH, health="off", journal=StoppingJournal(tmp_path / "cell", 2))
    Odd.stopped = True
    journal = StoppingJournal(tmp_path / "cell")
    again = attack_model(Odd(), x, y, spec, batch_size=BATCH, health="off", journal=journal)
    assert torch.equal(again.clean, alone.clean)


# --- in a results folder --------------------------------------------------------------------------


def cell() -> Cell:
    """Of a training of a second, attacked in three runs."""
    data, spec = find_data("digits", limit=64)
    recipe = {"epochs": 1, "batch_size": 32}
    training = TrainSpec.create("nat", {}, Setting(spec, "small_resnet[width=4]", 2, "linf", "0.2", recipe=recipe))
    test, _ = attacked_subset(data, 20)
    attack = AttackSpec.create("pgd", {"steps": 4, "restarts": 3}, "linf", "0.02")
    return Cell(training, attack, len(test), test.checksum())


def told(record: Record) -> dict[str, Any]:
    return {name: value for name, value in record.summary().items() if name not in ("seconds", "provenance")}


@pytest.mark.parametrize("end", [KeyboardInterrupt, ZeroDivisionError])
def test_a_command_that_ends_in_the_middle_of_a_cell_leaves_its_state_and_the_next_one_takes_it_up(
    end: type[BaseException], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    one, run = cell(), Run(Path("results"))
    ensure_trained(one.training, run)
    keep = Journal.keep
    monkeypatch.setattr(Journal, "due", True)

    def keep_and_end(self: Journal, snapshot: Any) -> bool:
        keep(self, snapshot)
        if self.written == 5:
            raise end("now")
        return True

    path = Journal.path_of(run.results, one.key)
    with monkeypatch.context() as ending:
        ending.setattr(Journal, "keep", keep_and_end)
        if end is KeyboardInterrupt:
            with pytest.raises(KeyboardInterrupt) as interrupted:
                run_cells([one], run)
            assert "0 of 1 cells are done" in interrupted.value.__notes__[0]
        else:
            (failed,) = run_cells([one], run)
            assert failed.error == "ZeroDivisionError: now"
    assert path.is_file()
    assert find_record(one, run.results) is None, "what failed is not done"
    progress = Told()
    (again,) = run_cells([one], run, progress)
    assert any(line.endswith("goes on where it was stopped") for line in progress.lines)
    assert not path.exists(), "the record is there"
    Path(str(again.path)).unlink()
    (alone,) = run_cells([one], run)
    assert told(again) == told(alone)


# --- what a state may be --------------------------------------------------------------------------


def test_a_state_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    journal = StoppingJournal(tmp_path / "cell")
    journal.keep(lambda: Snapshot({"scores": torch.zeros(COUNT, 4), "x_adv": torch.zeros(3)}, {}))
    with pytest.raises(DataError, match=r"cell does not fit.*delete it"):
        JOBS["runs"].run(StoppingJournal(tmp_path / "cell"))


def test_in_memory_nothing_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Journal, "due", True)
    JOBS["runs"].run()
    assert not list(tmp_path.rglob("*"))

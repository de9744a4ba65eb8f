"""The parts of an attack in their order, all of them once in every search precision, and how far that has come."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from torch import Tensor

from ensdef import session_state
from ensdef.attack import Attack, CompositeAttack
from ensdef.journal import Snapshot
from ensdef.progress import Progress
from ensdef.search import UnderWay
from ensdef.session import Session
from ensdef.target import Target, Traits


class Stages:
    """The whole search of a cell.

    Args:
        attack: one that consists of parts, or is its only part.
        traits: of the model.
        session: what becomes of the images; nothing was attacked yet.
        scores: of the clean images, (N, C).
        target_of: the model prepared for attack in a search precision.
        began: when work on the cell began, by the monotonic clock.
    """

    def __init__(
        self,
        attack: Attack,
        traits: Traits,
        session: Session,
        scores: Tensor,
        target_of: Callable[[str], Target],
        began: float,
    ) -> None:
        spec = session.spec
        self.attack = attack
        self.session = session
        self.scores = scores
        self.target_of = target_of
        self.began = began
        self.parts: Sequence[tuple[str, Attack]] = (
            attack.parts(traits) if isinstance(attack, CompositeAttack) else [(spec.call, attack)]
        )
        modes = ["bf16", "fp32"] if spec.search == "bf16+fp32" else [spec.search]
        self.stages = [(mode, index) for mode in modes for index in range(len(self.parts))]
        #: stages that are over, and what the next one has in hand if it is not at its beginning
        self.done = 0
        self.begun: UnderWay | None = None
        #: seconds of processes that were at it before this one
        self.earlier = 0.0
        self._clean_passes = session.judge.passes.forwards

    @property
    def seconds(self) -> float:
        """Spent on the cell until now, by all processes that were at it."""
        return self.earlier + time.monotonic() - self.began

    @property
    def forwards(self) -> int:
        """Member passes of the search and of the judgement, without those over the clean images."""
        return self.session.forwards + self.session.judge.passes.forwards - self._clean_passes

    @property
    def warnings(self) -> list[str]:
        """What the attack and its parts warned of, each text once."""
        return list(dict.fromkeys(text for one in self._warning() for text in one))

    @property
    def broken_by(self) -> dict[str, int]:
        """How many images each part of a composite attack fooled that no part before it had."""
        if not isinstance(self.attack, CompositeAttack):
            return {}
        counts = self.session.broken_by[self.session.fooled].bincount(minlength=len(self.parts))
        return {name: int(count) for (name, _), count in zip(self.parts, counts.cpu(), strict=True)}

    def run(self, clean: Tensor, progress: Progress) -> None:
        """What is left of it, on the images that are right when they are clean, (N,) bool."""
        session = self.session
        while self.done < len(self.stages):
            mode, index = self.stages[self.done]
            name, part = self.parts[index]
            note = f" ({mode})" if len(self.stages) > len(self.parts) else ""
            alive = (clean & ~session.fooled).nonzero().squeeze(1)
            begun, self.begun = self.begun, None
            if begun is not None or len(alive):
                session.run(part, self.target_of(mode), alive, progress, name + note, index, begun)
            self.done += 1
            session.moment()

    def snapshot(self) -> Snapshot:
        """The state of the cell; at a moment of the session."""
        kept = session_state.snapshot(self.session)
        kept.tensors["scores"] = self.scores
        kept.values |= {
            "done": self.done,
            "judge": self.session.judge.passes.forwards - self._clean_passes,
            "warnings": [list(texts) for texts in self._warning()],
            "seconds": self.seconds,
        }
        return kept

    def restore(self, kept: Snapshot) -> None:
        """Go on where another process left the cell.

        Raises:
            KeyError, ValueError, RuntimeError: the state is not one of this cell.
        """
        values = kept.values
        self.begun = session_state.restore(self.session, kept)
        self.session.judge.passes.forwards = self._clean_passes + values["judge"]
        for mine, told in zip(self._warning(), values["warnings"], strict=True):
            mine[:] = told
        self.done, self.earlier = values["done"], values["seconds"]

    def _warning(self) -> list[list[str]]:
        """The lists of the attack and of its parts; some may be one and the same."""
        return [getattr(one, "warnings", []) for one in (self.attack, *(part for _, part in self.parts))]

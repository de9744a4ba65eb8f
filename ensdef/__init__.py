"""ensdef: a pluggable benchmark suite for ensemble defences against adversarial examples.

The public surface, resolved on first use, so that commands which only read files never load torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ensdef._version import __version__

if TYPE_CHECKING:
    from ensdef.attack import Attack, CompositeAttack, IterativeAttack, State, WholeAttack, register_attack
    from ensdef.build import create_defense
    from ensdef.checkpoints import load_checkpoint
    from ensdef.defense import Batch, EnsembleDefense, register_defense
    from ensdef.evaluation import evaluate
    from ensdef.recipe import InnerAttack, Recipe
    from ensdef.records import Record
    from ensdef.target import Target
    from ensdef.threat import Threat

_HOME = {
    "Attack": "attack",
    "IterativeAttack": "attack",
    "State": "attack",
    "CompositeAttack": "attack",
    "WholeAttack": "attack",
    "register_attack": "attack",
    "create_defense": "build",
    "load_checkpoint": "checkpoints",
    "Batch": "defense",
    "EnsembleDefense": "defense",
    "register_defense": "defense",
    "evaluate": "evaluation",
    "InnerAttack": "recipe",
    "Recipe": "recipe",
    "Record": "records",
    "Target": "target",
    "Threat": "threat",
}

__all__ = [
    "Attack",
    "Batch",
    "CompositeAttack",
    "EnsembleDefense",
    "InnerAttack",
    "IterativeAttack",
    "Recipe",
    "Record",
    "State",
    "Target",
    "Threat",
    "WholeAttack",
    "__version__",
    "create_defense",
    "evaluate",
    "list_attacks",
    "list_datasets",
    "list_methods",
    "load_checkpoint",
    "register_attack",
    "register_defense",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'ensdef' has no attribute {name!r}")
    value = getattr(import_module(f"ensdef.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__


def list_methods() -> list[str]:
    """Names of all defences: built in, registered, and installed by other distributions."""
    from ensdef.registry import METHODS

    return METHODS.names()


def list_attacks() -> list[str]:
    """Names of all attacks."""
    from ensdef.registry import ATTACKS

    return ATTACKS.names()


def list_datasets() -> list[str]:
    """Names of all data sets."""
    from ensdef.registry import DATASETS

    return DATASETS.names()

"""What a run will take, before it begins: short probes of the real work on this machine, and multiplication."""

from ensdef.planner.plan import Plan, PlannedCell, PlannedTraining
from ensdef.planner.probing import estimate, missing_trainings

__all__ = ["Plan", "PlannedCell", "PlannedTraining", "estimate", "missing_trainings"]

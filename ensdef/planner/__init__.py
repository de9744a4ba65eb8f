"""What a run will take, before it begins: short probes of the real work on this machine, and multiplication."""

from ensdef.planner.plan import Plan, PlannedCell, PlannedTraining, estimate

__all__ = ["Plan", "PlannedCell", "PlannedTraining", "estimate"]

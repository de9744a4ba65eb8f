"""What a protocol trains: its data, and a training for every row, seed and radius."""

from __future__ import annotations

from ensdef.loading import attacked_subset, find_data
from ensdef.notation import parse_call
from ensdef.protocol import MethodRow, Protocol, layered, without
from ensdef.registry import DATASETS
from ensdef.specs import Setting, TrainSpec


class Trainings:
    """The trainings of a protocol whose names are known to exist.

    Attributes:
        data: all of it; ``samples`` test images with this ``subset_checksum`` are evaluated.
    Raises:
        DataError: the data cannot be read, or are fewer than asked for.
    """

    def __init__(self, protocol: Protocol) -> None:
        self.protocol = protocol
        self.source = DATASETS.get(protocol.dataset)
        self.data, self.data_spec = find_data(protocol.dataset, protocol.data_dir, protocol.image_size, protocol.limit)
        test, _ = attacked_subset(self.data, protocol.samples)
        self.samples, self.subset_checksum = len(test), test.checksum()
        self.recipe = layered(protocol.recipe, protocol.recipes.get(protocol.dataset, {}))
        self.method_recipes = protocol.method_recipes
        if protocol.epochs is not None:
            self.recipe["epochs"] = protocol.epochs
            self.method_recipes = without(self.method_recipes, {"epochs": protocol.epochs})

    def of(self, row: MethodRow, seed: int, norm: str, eps: str) -> TrainSpec:
        """The training of a defence that is evaluated at this radius.

        Raises:
            UsageError: a hyper-parameter, architecture or radius cannot be.
        """
        protocol = self.protocol
        train_eps = self.source.eps[protocol.norm] if protocol.train_eps is None else protocol.train_eps
        arch = protocol.arch if row.arch is None else row.arch
        setting = Setting(
            self.data_spec,
            self.source.architecture if arch is None else arch,
            protocol.members if row.members is None else row.members,
            norm if train_eps == "eps" else protocol.norm,
            eps if train_eps == "eps" else train_eps,
            self.recipe,
            protocol.precision,
            seed,
            self.method_recipes,
        )
        return TrainSpec.create(*parse_call(row.call), setting)

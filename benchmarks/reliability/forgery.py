"""A copy of an honest results folder in a forger's hands. He repairs every checksum that anybody can compute."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from bundles import Honest
from safetensors.torch import load, load_file, save, save_file
from torch import Tensor

from ensdef.checkpoints import SPEC, WEIGHTS, description_checksum, load_checkpoint, training_spec
from ensdef.keys import canonical, checksum_of
from ensdef.metrics import binomial_stderr, fraction_of
from ensdef.record_cell import cell_of
from ensdef.records import CHECKSUM, Record, write_text
from ensdef.weights import weights_hash


class Forgery:
    """One record with its evidence and checkpoint, to be changed in memory or on disk and then written.

    Attributes:
        body: the record's JSON.
        tensors, told: the evidence's tensors and what its header tells.
        recounts, seals: whether accuracies and checksums are made to fit what the record says.
    """

    def __init__(self, honest: Honest, folder: Path) -> None:
        self.results = Path(shutil.copytree(honest.results, folder / "results"))
        self.data_dir = honest.data_dir
        self.folder = folder
        self.path = self.results / honest.record.relative_to(honest.results)
        self.sibling = self.results / honest.sibling.relative_to(honest.results)
        self.stranger = self.results / honest.stranger.relative_to(honest.results)
        self.body: dict[str, Any] = json.loads(self.path.read_text(encoding="utf-8"))
        self.evidence = self.results / self.body["evidence"]["file"]
        self.tensors, self.told = opened(self.evidence)
        self.recounts = self.seals = True

    def write(self) -> None:
        """Put the forged evidence and record in place of the honest ones."""
        if self.evidence.is_file() and self.tensors:
            content = save(self.tensors, metadata={"points": canonical(self.told)})
            if content != self.evidence.read_bytes():
                self.replace_evidence(content)
        if self.recounts:
            self._recount()
        if self.seals:
            self.body[CHECKSUM] = checksum_of(self.body, CHECKSUM)
        write_text(self.path, json.dumps(self.body))

    def replace_evidence(self, content: bytes) -> None:
        """Other bytes in the place of the evidence, with their checksum in the record."""
        self.tensors = {}
        checksum = hashlib.sha256(content).hexdigest()
        self.evidence.unlink()
        self.evidence = self.path_of_evidence(self.body["key"], checksum)
        self.evidence.write_bytes(content)
        self.body["evidence"] |= {"sha256": checksum, "file": str(self.evidence.relative_to(self.results))}

    def _recount(self) -> None:
        outcomes, n = self.body["outcomes"], len(self.body["outcomes"]["ids"])
        robust = fraction_of(outcomes["robust"])
        told = {"n": n, "clean_accuracy": fraction_of(outcomes["clean"]), "robust_accuracy": robust}
        self.body |= {**told, "stderr": binomial_stderr(robust, n)}

    def repair_key(self) -> None:
        """Give record, file names and evidence the key that follows from what the record says now."""
        record = Record(**{name: self.body[name] for name in self.body if name not in ("format", CHECKSUM)})
        self.take_key(cell_of(record, training_spec(self.checkpoint)).key)

    def take_key(self, key: str) -> None:
        """Call the record, its file and its evidence by another key."""
        self.path.unlink()
        self.path = self.path.with_name(f"{self.body['attack']}-{key[:16]}.json")
        self.evidence = self.evidence.rename(self.path_of_evidence(key, self.body["evidence"]["sha256"]))
        self.body["key"] = self.told["key"] = key
        self.body["evidence"]["file"] = str(self.evidence.relative_to(self.results))

    def path_of_evidence(self, key: str, checksum: str) -> Path:
        return self.evidence.with_name(f"{self.body['attack']}-{key[:16]}-{checksum[:16]}.safetensors")

    @property
    def checkpoint(self) -> Path:
        return self.results / "checkpoints" / Path(self.body["checkpoint"]).name

    def change_weights(self, change: Callable[[dict[str, Tensor]], None], repair: bool = False) -> None:
        """Change the weights on disk, and, if asked, the record's hash of them."""
        weights = load_file(self.checkpoint / WEIGHTS)
        change(weights)
        save_file(weights, self.checkpoint / WEIGHTS)
        self.seal_checkpoint()
        if repair:
            self.body["evidence"]["weights"] = weights_hash(load_checkpoint(self.checkpoint))

    def change_spec(self, change: Callable[[dict[str, Any]], None]) -> None:
        """Change what the checkpoint says of itself."""
        path = self.checkpoint / SPEC
        content = json.loads(path.read_text(encoding="utf-8"))
        change(content)
        content["sha256"] = description_checksum(content)
        path.write_text(json.dumps(content), encoding="utf-8")

    def seal_checkpoint(self) -> None:
        """Have the checkpoint's description tell the checksum of the weights that lie beside it."""
        checksum = hashlib.sha256((self.checkpoint / WEIGHTS).read_bytes()).hexdigest()
        self.change_spec(lambda description: description.update(weights_sha256=checksum))

    def own_data(self) -> Path:
        """A copy of the image folder that may be changed."""
        assert self.data_dir is not None
        self.data_dir = Path(shutil.copytree(self.data_dir, self.folder / "photos"))
        return self.data_dir

    def images(self, clean: int, robust: int) -> list[int]:
        """Positions in the outcomes of images with these verdicts; at least one."""
        outcomes = self.body["outcomes"]
        verdicts = list(zip(outcomes["clean"], outcomes["robust"], strict=True))
        found = [position for position, verdict in enumerate(verdicts) if verdict == (clean, robust)]
        assert found, f"no image with clean={clean} robust={robust}: the honest record is too simple"
        return found

    def id_of(self, position: int) -> int:
        return int(self.body["outcomes"]["ids"][position])

    def drop_point(self, image: int) -> Tensor:
        """Take an image's point out of the evidence; returns it, in steps or values, (1, ...)."""
        for name in ("delta_int8", "delta_int16", "point_float32"):
            keep = self.tensors[f"{name}_ids"] != image
            if not bool(keep.all()):
                taken = self.tensors[name][~keep]
                self.tensors[name] = self.tensors[name][keep].contiguous()
                self.tensors[f"{name}_ids"] = self.tensors[f"{name}_ids"][keep].contiguous()
                return taken
        raise AssertionError(f"image {image} has no point")

    def add_point(self, name: str, image: int, point: Tensor) -> None:
        """Store a point, (1, ...), of an image."""
        self.tensors[name] = torch.cat([self.tensors[name], point.to(self.tensors[name].dtype)])
        self.tensors[f"{name}_ids"] = torch.cat([self.tensors[f"{name}_ids"], torch.tensor([image])])

    def steps_of(self, position: int) -> tuple[int, Tensor]:
        """Take out a stored point that is kept in steps; its image and the steps, (1, ...), int16."""
        image = self.id_of(position)
        steps = self.drop_point(image)
        assert not steps.is_floating_point(), f"image {image} is kept in float32"
        return image, steps.to(torch.int16)

    def clean_image(self, image: int) -> Tensor:
        """An image of the test set, (1, ...), float32."""
        from ensdef.loading import find_data

        data, _ = find_data(self.body["dataset"], str(self.data_dir), None)
        return data.test.x(torch.tensor([image]))


def opened(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors of a safetensors file, and what its header tells."""
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    return load(content), json.loads(json.loads(content[8 : 8 + length])["__metadata__"]["points"])

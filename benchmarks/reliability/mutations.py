"""Ways to tamper with a record, its evidence, its weights and its images, each with the reason that must be found.

Every one is made by somebody who repairs all that can be repaired: accuracies, checksums, names of files, and, where
the name says so, keys and hashes.
"""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from forgery import Forgery, opened
from PIL import Image
from torch import Tensor

from ensdef.checkpoints import SPEC, WEIGHTS

#: How verification ends: a contradiction was found, or something it takes is missing.
REFUTED, MISSING = "not verified", "not verifiable"


@dataclass(frozen=True)
class Mutation:
    """One way to tamper.

    Args:
        reason: what verification must find, part of a line.
        status: how it must end.
    """

    name: str
    reason: str
    apply: Callable[[Forgery], None]
    status: str = REFUTED


MUTATIONS: list[Mutation] = []


def mutation(name: str, reason: str, status: str = REFUTED) -> Callable[[Callable[[Forgery], None]], None]:
    def add(apply: Callable[[Forgery], None]) -> None:
        MUTATIONS.append(Mutation(name, reason, apply, status))

    return add


def edit(name: str, reason: str, status: str = REFUTED, **changes: Any) -> None:
    """Edited fields of the record; ``a__b`` is field b of a."""

    def apply(forged: Forgery) -> None:
        for path, value in changes.items():
            *above, last = path.split("__")
            place = forged.body
            for part in above:
                place = place[part]
            place[last] = copy.deepcopy(value)

    MUTATIONS.append(Mutation(name, reason, apply, status))


# numbers


@mutation("robust accuracy edited", "robust_accuracy 1.0 over n=60 contradicts the outcomes")
def _(forged: Forgery) -> None:
    forged.body["robust_accuracy"] = 1.0
    forged.recounts = False


@mutation("time edited, checksum left", "edited since it was written")
def _(forged: Forgery) -> None:
    forged.body["seconds"] = 0.001
    forged.seals = False


@mutation("flags removed, checksum removed", "has no sha256")
def _(forged: Forgery) -> None:
    forged.body["flags"] = []
    del forged.body["sha256"]
    forged.seals = False


@mutation("a fooled image counted as robust", "robust in the record, but the stored point fools")
def _(forged: Forgery) -> None:
    forged.body["outcomes"]["robust"][forged.images(1, 0)[0]] = 1


@mutation("all fooled images counted as robust", "robust in the record, but the stored point fools")
def _(forged: Forgery) -> None:
    forged.body["outcomes"]["robust"] = list(forged.body["outcomes"]["clean"])


@mutation("a robust image counted as fooled", "fooled in the record, but the stored point does not fool")
def _(forged: Forgery) -> None:
    forged.body["outcomes"]["robust"][forged.images(1, 1)[0]] = 0


@mutation("a fooled image counted as wrong from the start", "not among those that were right")
def _(forged: Forgery) -> None:
    forged.body["outcomes"]["clean"][forged.images(1, 0)[0]] = 0


@mutation("a fooled image counted as wrong, its point removed", "wrong in the record, but right on the clean image")
def _(forged: Forgery) -> None:
    position = forged.images(1, 0)[0]
    forged.body["outcomes"]["clean"][position] = 0
    forged.drop_point(forged.id_of(position))


@mutation("clean accuracy raised, without points", "right on the clean image, but without a stored point")
def _(forged: Forgery) -> None:
    for position in forged.images(0, 0):
        forged.body["outcomes"]["clean"][position] = 1


@mutation("clean accuracy raised, with clean images as points", "right in the record, but wrong on the clean image")
def _(forged: Forgery) -> None:
    for position in forged.images(0, 0):
        forged.body["outcomes"]["clean"][position] = forged.body["outcomes"]["robust"][position] = 1
        forged.add_point("delta_int8", forged.id_of(position), torch.zeros_like(forged.tensors["delta_int8"][:1]))


# images


@mutation("a fooled image left out, n lowered", "not among the first 59 of the permuted test set")
def _(forged: Forgery) -> None:
    position = forged.images(1, 0)[0]
    forged.drop_point(forged.id_of(position))
    for values in forged.body["outcomes"].values():
        del values[position]


@mutation("the last image left out, n lowered", "the checksum of its images is another")
def _(forged: Forgery) -> None:
    if forged.body["outcomes"]["clean"][-1]:
        forged.drop_point(forged.id_of(-1))
    for values in forged.body["outcomes"].values():
        del values[-1]


@mutation("n edited", "over n=6000 contradicts the outcomes")
def _(forged: Forgery) -> None:
    forged.body["n"] = 6000
    forged.recounts = False


@mutation("more images than there are", "n is 61")
def _(forged: Forgery) -> None:
    for name, value in (("ids", 60), ("clean", 1), ("robust", 1)):
        forged.body["outcomes"][name].append(value)
    forged.add_point("delta_int8", 60, torch.zeros_like(forged.tensors["delta_int8"][:1]))


@mutation("an image counted twice", "which have other ids, or one twice")
def _(forged: Forgery) -> None:
    good, bad = forged.images(1, 1)[0], forged.images(1, 0)[0]
    forged.drop_point(forged.id_of(bad))
    for values in forged.body["outcomes"].values():
        values[bad] = values[good]


@mutation("ids permuted", "in another order")
def _(forged: Forgery) -> None:
    forged.body["outcomes"]["ids"].reverse()


@mutation("an image of another set", "not among the first 60 of the permuted test set: image 7000")
def _(forged: Forgery) -> None:
    position = forged.images(1, 1)[0]
    _, steps = forged.steps_of(position)
    forged.body["outcomes"]["ids"][position] = 7000
    forged.add_point("delta_int16", 7000, steps)


@mutation("labels swapped in the data set", "the test set of imagefolder here is not the one that was attacked")
def _(forged: Forgery) -> None:
    test = forged.own_data() / "test"
    one, other = (sorted((test / label).iterdir())[0] for label in ("0", "1"))
    one.rename(test / "1" / one.name)
    other.rename(test / "0" / other.name)


@mutation("a pixel changed in a test image", "the test set of imagefolder here is not the one that was attacked")
def _(forged: Forgery) -> None:
    path = sorted((forged.own_data() / "test").rglob("*.png"))[0]
    with Image.open(path) as image:
        pixels = image.convert("RGB")
    pixels.putpixel((0, 0), (1, 0, 0))
    pixels.save(path)


@mutation("the data set is gone", "the data set cannot be read", MISSING)
def _(forged: Forgery) -> None:
    forged.data_dir = forged.folder / "nowhere"


# what was attacked, and how

edit("eps lowered", "does not follow from", eps="1/255", eps_value=1 / 255)
edit("eps raised", "does not follow from", eps="32/255", eps_value=32 / 255)
edit("eps_value alone edited", "eps_value is", eps_value=8 / 255)
edit("norm edited", "does not follow from", norm="l2")
edit("norm removed", "norm is None", norm=None, eps=None, eps_value=None)
edit("success edited", "success=last", success="last")
edit("combiner edited", "does not follow from", combiner="max")
edit("combiner unknown", "unknown combiner", combiner="median")
edit("attack steps edited", "does not follow from", attack_params__steps=500, attack_label="pgd[steps=500]")
edit("attack label edited", "attack_label is", attack_label="pgd[steps=500]")
edit("attack parameter of another attack", "pgd has no parameter 'queries'", attack_params__queries=5)
edit("attack seed edited", "does not follow from", provenance__attack_seed=7)
edit("search edited", "does not follow from", provenance__search="bf16")
edit("members edited", "members is 20", members=20)
edit("architecture edited", "architecture is 'resnet20'", architecture="resnet20")
edit("hyper-parameters edited", "hyper is", hyper={"reduction": "mean"})
edit("defence relabelled", "label is 'igat'", label="igat")
edit("method edited", "method is 'adv'", method="adv")
edit("training seed edited", "train_seed is 5", train_seed=5)
edit("training radius claimed", "training.eps is", training__eps="32/255")
edit("training key edited", "training.key is", training__key="ab" * 32)
edit("recipe edited", "training.recipe is", training__recipe={})
edit("subset checksum edited", "the checksum of its images is another", provenance__subset_checksum="0" * 16)
edit("data set edited", "dataset is 'digits'", dataset="digits")


@mutation("attack edited", "does not follow from")
def _(forged: Forgery) -> None:
    forged.body |= {"attack": "bim", "attack_params": {}, "attack_label": "bim"}
    forged.take_key(forged.body["key"])


@mutation("eps lowered, key repaired", "outside the ball of linf 1/255")
def _(forged: Forgery) -> None:
    forged.body |= {"eps": "1/255", "eps_value": 1 / 255}
    forged.repair_key()


@mutation("norm edited, key repaired", "outside the ball of l2")
def _(forged: Forgery) -> None:
    forged.body["norm"] = "l2"
    forged.repair_key()


@mutation("key edited", "does not follow from")
def _(forged: Forgery) -> None:
    forged.take_key("0123456789abcdef" * 4)


# records in the place of others


@mutation("another attack's record in this place", "the file is named after another cell")
def _(forged: Forgery) -> None:
    forged.body = json.loads(forged.sibling.read_text(encoding="utf-8"))
    forged.tensors = {}


@mutation("another training's record in this place", "the file is named after another cell")
def _(forged: Forgery) -> None:
    forged.body = json.loads(forged.stranger.read_text(encoding="utf-8"))
    forged.tensors = {}


@mutation("another training's record, of this checkpoint", "training.key is")
def _(forged: Forgery) -> None:
    checkpoint = forged.body["checkpoint"]
    forged.path, forged.tensors = forged.stranger, {}
    forged.body = {**json.loads(forged.stranger.read_text(encoding="utf-8")), "checkpoint": checkpoint}


@mutation("record among those of another method", "the file lies among others")
def _(forged: Forgery) -> None:
    folder = forged.path.parent.with_name("igat")
    folder.mkdir()
    forged.path = forged.path.rename(folder / forged.path.name)


# weights


def _stronger(weights: dict[str, Tensor]) -> None:
    for name, value in weights.items():
        if value.is_floating_point():
            weights[name] = value + 0.3 * torch.randn(value.shape, generator=torch.Generator().manual_seed(0))


def _nudged(weights: dict[str, Tensor]) -> None:
    name = next(name for name, value in weights.items() if value.is_floating_point())
    weights[name].view(-1)[0] += 1e-6


@mutation("one weight nudged", "are not those that were attacked")
def _(forged: Forgery) -> None:
    forged.change_weights(_nudged)


@mutation("other weights, their hash repaired", "on the clean image")
def _(forged: Forgery) -> None:
    forged.change_weights(_stronger, repair=True)


@mutation("weights of another seed", "are not those that were attacked")
def _(forged: Forgery) -> None:
    stranger = json.loads(forged.stranger.read_text(encoding="utf-8"))
    other = forged.results / "checkpoints" / Path(stranger["checkpoint"]).name
    shutil.copy(other / WEIGHTS, forged.checkpoint / WEIGHTS)
    forged.seal_checkpoint()


@mutation("checkpoint of another seed", "does not follow from")
def _(forged: Forgery) -> None:
    stranger = json.loads(forged.stranger.read_text(encoding="utf-8"))
    other = forged.results / "checkpoints" / Path(stranger["checkpoint"]).name
    shutil.copytree(other, forged.checkpoint, dirs_exist_ok=True)


@mutation("checkpoint says another seed", "does not follow from what it describes")
def _(forged: Forgery) -> None:
    forged.change_spec(lambda spec: spec["setting"].update(seed=9))


@mutation("checkpoint says another number of members", "describes one model and the training of another")
def _(forged: Forgery) -> None:
    forged.change_spec(lambda spec: spec["setting"].update(members=5))


@mutation("weights truncated", "truncated or no safetensors file")
def _(forged: Forgery) -> None:
    path = forged.checkpoint / WEIGHTS
    path.write_bytes(path.read_bytes()[:-100])


@mutation("weights a pickle", "is a pickle")
def _(forged: Forgery) -> None:
    torch.save({}, forged.checkpoint / WEIGHTS)


@mutation("checkpoint missing", "is not there", MISSING)
def _(forged: Forgery) -> None:
    shutil.rmtree(forged.checkpoint)


@mutation("checkpoint without a description", f"{SPEC} is missing")
def _(forged: Forgery) -> None:
    (forged.checkpoint / SPEC).unlink()


edit("checkpoint elsewhere", "is not there", MISSING, checkpoint="/etc/passwd")
edit("checkpoint above", f"{SPEC} is missing", checkpoint="checkpoints/..")


# points


@mutation("a point 1e-4 too far away", "outside the ball of linf 16/255")
def _(forged: Forgery) -> None:
    image, _ = forged.steps_of(forged.images(1, 0)[0])
    x = forged.clean_image(image)
    point = x + (16 / 255 + 1e-4) * torch.where(x > 0.5, -1.0, 1.0)
    forged.add_point("point_float32", image, point)


@mutation("a point one step too far away", "outside the ball of linf 16/255")
def _(forged: Forgery) -> None:
    image, _ = forged.steps_of(forged.images(1, 0)[0])
    x = forged.clean_image(image)
    forged.add_point("delta_int8", image, torch.where(x > 0.5, -17, 17))


@mutation("all points doubled", "outside the ball of linf 16/255")
def _(forged: Forgery) -> None:
    forged.tensors["delta_int8"] *= 2


@mutation("a pixel 1e-4 above 1", "outside the box [0, 1]")
def _(forged: Forgery) -> None:
    image, steps = forged.steps_of(forged.images(1, 0)[0])
    point = (forged.clean_image(image) + steps / 255).clamp(0, 1)
    point.view(-1)[int(forged.clean_image(image).argmax())] = 1 + 1e-4
    forged.add_point("point_float32", image, point)


@mutation("a pixel one step below 0", "outside the box [0, 1]")
def _(forged: Forgery) -> None:
    image, steps = forged.steps_of(forged.images(1, 0)[0])
    steps.view(-1)[int(forged.clean_image(image).argmin())] = -1
    forged.add_point("delta_int8", image, steps)


@mutation("NaN in a point", "not finite")
def _(forged: Forgery) -> None:
    image, steps = forged.steps_of(forged.images(1, 0)[0])
    point = forged.clean_image(image) + steps / 255
    point.view(-1)[3] = float("nan")
    forged.add_point("point_float32", image, point)


@mutation("a fooling point replaced by the clean image", "fooled in the record, but the stored point does not fool")
def _(forged: Forgery) -> None:
    image, steps = forged.steps_of(forged.images(1, 0)[0])
    forged.add_point("delta_int8", image, torch.zeros_like(steps))


@mutation("points of two images swapped", "outside the b")
def _(forged: Forgery) -> None:
    ids = forged.tensors["delta_int8_ids"]
    ids[:2] = ids[:2].flip(0)
    x = [forged.clean_image(int(image)) for image in ids[:2]]
    forged.tensors["delta_int8"][:2] = torch.cat([x[1] - x[0], x[0] - x[1]]).mul(127).to(torch.int8)


@mutation("a point left out", "right on the clean image, but without a stored point")
def _(forged: Forgery) -> None:
    forged.drop_point(forged.id_of(forged.images(1, 0)[0]))


@mutation("points of further images", "not among those that were right: image 7000")
def _(forged: Forgery) -> None:
    forged.add_point("delta_int8", 7000, torch.zeros_like(forged.tensors["delta_int8"][:1]))


@mutation("a second point of an image", "twice")
def _(forged: Forgery) -> None:
    image = forged.id_of(forged.images(1, 0)[0])
    forged.add_point("point_float32", image, forged.clean_image(image))


# the evidence's file


@mutation("steps of another type", "has delta_int8 of torch.int32")
def _(forged: Forgery) -> None:
    forged.tensors["delta_int8"] = forged.tensors["delta_int8"].to(torch.int32)


@mutation("points of another shape", "has delta_int8 of")
def _(forged: Forgery) -> None:
    forged.tensors["delta_int8"] = forged.tensors["delta_int8"].flatten(1)


@mutation("ids of another type", "has delta_int8_ids of torch.float32")
def _(forged: Forgery) -> None:
    forged.tensors["delta_int8_ids"] = forged.tensors["delta_int8_ids"].float()


@mutation("steps of another size", "is of another format")
def _(forged: Forgery) -> None:
    forged.told["levels"] = 127


@mutation("a tensor left out", "holds delta_int16")
def _(forged: Forgery) -> None:
    del forged.tensors["delta_int8"]


@mutation("evidence truncated", "was altered")
def _(forged: Forgery) -> None:
    forged.tensors = {}
    forged.evidence.write_bytes(forged.evidence.read_bytes()[:-10])


@mutation("evidence truncated, checksum repaired", "truncated or no file of points")
def _(forged: Forgery) -> None:
    forged.replace_evidence(forged.evidence.read_bytes()[:-10])


@mutation("evidence a pickle, checksum repaired", "truncated or no file of points")
def _(forged: Forgery) -> None:
    place = forged.folder / "pickle"
    torch.save(forged.tensors, place)
    forged.replace_evidence(place.read_bytes())


@mutation("evidence of enormous size", "at most")
def _(forged: Forgery) -> None:
    forged.replace_evidence(forged.evidence.read_bytes() + bytes(1 << 20))


@mutation("evidence missing", "is missing", MISSING)
def _(forged: Forgery) -> None:
    forged.tensors = {}
    forged.evidence.unlink()


@mutation("evidence of another attack", "is of another cell")
def _(forged: Forgery) -> None:
    sibling = json.loads(forged.sibling.read_text(encoding="utf-8"))
    forged.tensors, forged.told = opened(forged.results / sibling["evidence"]["file"])


@mutation("evidence of other weights, called by this cell's key", "stored point")
def _(forged: Forgery) -> None:
    stranger = json.loads(forged.stranger.read_text(encoding="utf-8"))
    forged.tensors, _ = opened(forged.results / stranger["evidence"]["file"])


@mutation("evidence a link to elsewhere", "leads out of the results folder")
def _(forged: Forgery) -> None:
    forged.tensors = {}
    forged.evidence.rename(forged.folder / "elsewhere.safetensors")
    forged.evidence.symlink_to(forged.folder / "elsewhere.safetensors")


edit("evidence's name leads out", "its evidence is said to be another file", evidence__file="../../../../etc/passwd")
edit("evidence's name absolute", "its evidence is said to be another file", evidence__file="/etc/passwd")
edit("evidence denied", "no evidence: lost", MISSING, evidence={"none": "lost"})
edit("evidence not mentioned", "no evidence", MISSING, evidence={})
edit("hash of the inputs edited", "evidence is of other images", evidence__inputs="0" * 64)
edit("hash of the labels edited", "evidence is of other labels", evidence__labels="0" * 64)
edit("hash of the weights edited", "are not those that were attacked", evidence__weights="0" * 64)
edit("hash of the code edited", "the source of its attack is not the one here", MISSING, evidence__code__attack="0")

"""What is attacked in every table: one adversarially trained ensemble, and test images of its data set.

The stored ensemble is what ``ensdef bench`` trains (``adv_en``, three members) and keeps under ``.cache/``: on the
digits within a minute, or, given a folder of CIFAR-10 images, 3 x ResNet-8 for 6 epochs on 2,000 of them. Any other
checkpoint can be named instead.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

import ensdef
from ensdef.data import DataSource
from ensdef.loading import attacked_subset, find_data
from ensdef.registry import DATASETS

CACHE = Path(__file__).parent / ".cache"
#: What the stored ensemble is trained by, beside the defaults of ``ensdef bench``.
RECIPES: dict[str, tuple[str, ...]] = {
    "digits": (),
    "imagefolder": ("--arch", "resnet8", "--epochs", "6", "--limit", "2000"),
}
#: Radius in linf; data sets not named here: 0.03.
EPS = {"digits": "0.2"}
#: Seconds.
WARM_UP = 5.0


@dataclass(frozen=True)
class Subject:
    """A model and the images it is attacked on.

    Args:
        name: for the table's first line.
        model: images in [0, 1] -> (B, C) log-scores.
        x, y: images (N, C, H, W) and labels (N,).
        ids: keys of the random numbers, (N,).
        eps: radius by norm, as a user writes it.
    """

    name: str
    model: nn.Module
    x: Tensor
    y: Tensor
    ids: Tensor
    eps: dict[str, str]

    def __len__(self) -> int:
        return len(self.x)

    def __str__(self) -> str:
        right = int(self.clean.sum())
        return f"{self.name}, {len(self)} images, {right} right, eps {self.eps['linf']} (l2: {self.eps['l2']})"

    @property
    def clean(self) -> Tensor:
        """Whether the model is right on each image, (N,) bool."""
        return right(self.model, self.x, self.y)

    @property
    def members(self) -> int:
        """Networks that one pass of the model runs."""
        return len(self.model.members) if isinstance(self.model, ensdef.EnsembleDefense) else 1

    def first(self, count: int) -> Subject:
        """The first ``count`` images; all, if there are fewer."""
        return dataclasses.replace(self, x=self.x[:count], y=self.y[:count], ids=self.ids[:count])

    def floor(self, eps: str = "1e-6") -> Subject:
        """The images that the model has right, at a radius so small that none of them falls."""
        keep = self.clean
        radii = dict.fromkeys(self.eps, eps)
        return dataclasses.replace(self, x=self.x[keep], y=self.y[keep], ids=self.ids[keep], eps=radii)

    def warm_up(self, seconds: float = WARM_UP) -> None:
        """Run the model for a while: a fresh process is two to three times slower at first."""
        began = time.perf_counter()
        while time.perf_counter() - began < seconds:
            point = self.x[:128].clone().requires_grad_()
            torch.autograd.grad(self.model(point).sum(), point)


def right(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Whether the untouched module is right, (N,) bool."""
    with torch.no_grad():
        return torch.cat([model(part).argmax(dim=1) for part in x.split(250)]) == y


def add_arguments(parser: argparse.ArgumentParser, samples: int | None = None) -> None:
    """The options that choose a subject; ``samples``: the default number of images, None: no such option."""
    parser.add_argument("--checkpoint", help="folder of a trained defence (default: the stored ensemble)")
    parser.add_argument("--data-dir", help="folder of images, train/<class>/ and test/<class>/ (default: the digits)")
    parser.add_argument("--dataset", help="default: imagefolder with --data-dir, digits without")
    parser.add_argument("--eps", help="radius in linf (default: 0.2 on digits, 0.03 elsewhere)")
    if samples is not None:
        parser.add_argument("--samples", type=int, default=samples)


def chosen(options: argparse.Namespace, samples: int | None = None) -> Subject:
    """The subject that the options name; it has as many of the ``samples`` images as its test set does."""
    dataset = options.dataset or ("imagefolder" if options.data_dir else "digits")
    checkpoint = options.checkpoint or stored(dataset, options.data_dir)
    data, _ = find_data(dataset, options.data_dir)
    test, ids = attacked_subset(data, min(samples or options.samples, len(data.test)))
    model = ensdef.load_checkpoint(checkpoint)
    source: type[DataSource] = DATASETS.get(dataset)
    name = f"{model.spec.method_call}, {model.spec.members} x {model.spec.architecture_call}, {dataset}"
    eps = {"linf": options.eps or EPS.get(dataset, "0.03"), "l2": source.eps["l2"]}
    return Subject(name, model, test.x(), test.labels, ids, eps)


def stored(dataset: str, data_dir: str | None) -> str:
    """Checkpoint of the stored ensemble on this data, trained by ``ensdef bench`` the first time."""
    recipe = RECIPES.get(dataset, RECIPES["imagefolder"])
    command = [sys.executable, "-m", "ensdef", "bench", "--method", "adv_en", "--attack", "fgsm", "--dataset", dataset]
    command += [*recipe, *(["--data-dir", data_dir] if data_dir else []), "--results", str(CACHE), "--json"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:  # it has said why
        sys.exit(done.returncode)
    return str(json.loads(done.stdout)[0]["checkpoint"])

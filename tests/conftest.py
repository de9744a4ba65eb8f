"""One thread for every test and every process a test starts: tiny tensors, and runs side by side do not fight."""

import os
from collections.abc import Iterator

os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = "1"

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def the_same_global_randomness() -> Iterator[None]:
    """Networks that a test builds by hand have the same weights in whatever order the tests run."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield

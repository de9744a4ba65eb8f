"""The content key of a model's weights."""

from __future__ import annotations

import hashlib

from torch import nn, uint8

from ensdef.codehash import code_hash
from ensdef.defense import EnsembleDefense
from ensdef.keys import content_key


def weights_hash(model: nn.Module) -> str:
    """Content key of a state dict: names, shapes and values."""
    tensors = {
        name: hashlib.sha256(tensor.detach().cpu().contiguous().view(-1).view(uint8).numpy().tobytes()).hexdigest()
        if tensor.numel()
        else ""
        for name, tensor in model.state_dict().items()
    }
    spec = model.spec if isinstance(model, EnsembleDefense) else None
    built = [] if spec is None else [spec.method, spec.hyper, code_hash(type(model))]
    return content_key([type(model).__qualname__, built, tensors])

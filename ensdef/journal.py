"""The state of unfinished work, kept while it goes on: a killed training or cell goes on from there.

A journal is one file of the results folder, ``.journals/<key>.journal``: a line with the SHA-256 of everything behind
it, a line of JSON (whose state it is, and values), and a safetensors file. It may be deleted at any time; the work then
starts over.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from ensdef.errors import DataError
from ensdef.records import write_bytes
from ensdef.set_aside import set_aside

#: Seconds of work before a state is written, and between two of them, at least.
WAIT = 1.0
#: Part of the time that may go into writing.
SHARE = 0.01


@dataclass
class Snapshot:
    """A state: tensors by name, which come back on the CPU in the memory layout they had, and JSON values."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    values: dict[str, Any] = field(default_factory=dict)

    def under(self, prefix: str) -> dict[str, Tensor]:
        """The tensors whose names begin with ``prefix``, without it."""
        return {name.removeprefix(prefix): value for name, value in self.tensors.items() if name.startswith(prefix)}


class Journal:
    """Where one piece of work keeps its state.

    Args:
        path: its file.
        work: JSON values that say whose state it is (key, device, weights it starts from); a state of anything else,
            of another version of the engine or of PyTorch is not taken up.
        tell: is told in a line what could not be used or written.
        wait: see :data:`WAIT`.
        share: see :data:`SHARE`.
        clock: seconds that only go forward.
    """

    #: seconds that the latest write of this process took: what the first write of the next journal may be expected to
    usual: ClassVar[float] = 0.0

    def __init__(
        self,
        path: Path,
        work: Mapping[str, Any],
        tell: Callable[[str], None] = lambda text: None,
        *,
        wait: float = WAIT,
        share: float = SHARE,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.path = path
        self.work = {**work, "engine": engine_hash(), "torch": torch.__version__}
        self.tell = tell
        self.wait, self.share, self.clock = wait, share, clock
        #: states written by this process, and the seconds that took, collecting them included
        self.written, self.seconds = 0, 0.0
        self._began = self._ended = clock()
        self._works = True

    @staticmethod
    def path_of(results: Path, key: str) -> Path:
        """Where a results folder keeps the state of a training or a cell."""
        return results / ".journals" / f"{key[:16]}.journal"

    @property
    def due(self) -> bool:
        """Whether another state, as costly as the last, stays within the share of the time: since that, and in all."""
        now = self.clock()
        rested = now - self._ended >= max(self.wait, self.usual / self.share)
        return self._works and rested and now - self._began >= (self.seconds + self.usual) / self.share

    def keep(self, snapshot: Callable[[], Snapshot]) -> bool:
        """Write the state in place of the one before, if it is time to; whether it was written.

        A folder that takes no file (a full disk) ends the journal, not the work.
        """
        if not self.due:
            return False
        began = self.clock()
        try:
            write_bytes(self.path, _packed(self.work, snapshot()))
        except OSError as error:
            self._works = False
            self.tell(f"{self.path} cannot be written ({error.strerror}): if this is stopped, it starts over")
            return False
        self._ended = self.clock()
        Journal.usual = self._ended - began
        self.seconds += self.usual
        self.written += 1
        return True

    def read(self) -> Snapshot | None:
        """The state that was kept; None: there is none, or what is there is damaged or of other work, and set aside."""
        if not self.path.exists():
            return None
        try:
            if not self.path.is_file():  # a named pipe would be waited for
                raise ValueError("no regular file")
            work, snapshot = unpacked(self.path.read_bytes())
        except (ValueError, TypeError, KeyError, AttributeError, RuntimeError, SafetensorError) as error:
            set_aside(self.path, f"damaged ({error})", self.tell)
            return None
        if work != self.work:
            names = sorted({*work, *self.work})
            differ = ", ".join(name for name in names if work.get(name) != self.work.get(name))
            set_aside(self.path, f"it is the state of other work (other {differ})", self.tell)
            return None
        return snapshot

    @contextmanager
    def taking_up(self) -> Iterator[None]:
        """While a state is taken up; one that does not fit, although its checksum is right, is refused.

        Raises:
            DataError: see above.
        """
        try:
            yield
        except (KeyError, IndexError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            why = " ".join(str(error).split())[:200]
            raise DataError(
                f"{self.path} does not fit the work that it says it is of ({type(error).__name__}: {why}); delete it "
                "to have the work started over"
            ) from error

    def remove(self) -> None:
        """Forget the state: the work's result is in the folder."""
        self.path.unlink(missing_ok=True)


@cache
def engine_hash() -> str:
    """First 16 hex digits of the SHA-256 over the engine's modules: they decide what a state means."""
    digest = hashlib.sha256()
    for folder in (Path(__file__).parent, Path(__file__).parent / "health"):
        for path in sorted(folder.glob("*.py")):
            digest.update(path.name.encode() + b"\n" + path.read_bytes())
    return digest.hexdigest()[:16]


def _packed(work: Mapping[str, Any], snapshot: Snapshot) -> bytes:
    # copies: tensors that share memory are refused by safetensors
    copies = {name: tensor.detach().to("cpu", copy=True) for name, tensor in snapshot.tensors.items()}
    strides = {name: tensor.stride() for name, tensor in copies.items() if not _is_plain(tensor)}
    head = json.dumps({"work": work, "values": snapshot.values, "strides": strides}).encode()
    rest = head + b"\n" + save({name: tensor.contiguous() for name, tensor in copies.items()})
    return hashlib.sha256(rest).hexdigest().encode() + b"\n" + rest


def unpacked(content: bytes) -> tuple[dict[str, Any], Snapshot]:
    """Whose state a journal's file holds, and the state.

    Raises:
        ValueError, TypeError, KeyError, AttributeError, SafetensorError: it is damaged.
    """
    checksum, _, rest = content.partition(b"\n")
    if hashlib.sha256(rest).hexdigest().encode() != checksum:
        raise ValueError("its checksum is not that of its content")
    head, _, body = rest.partition(b"\n")
    told, tensors = json.loads(head), load(body)
    for name, stride in told["strides"].items():
        tensors[name] = _laid_out(tensors[name], stride)
    return dict(told["work"]), Snapshot(tensors, dict(told["values"]))


def _is_plain(tensor: Tensor) -> bool:
    """Whether strides are those of a tensor that is read back; those of sides of length 1 choose kernels too."""
    return tensor.stride() == torch.empty(tensor.shape, device="meta").stride()


def _laid_out(tensor: Tensor, stride: list[int]) -> Tensor:
    """The same values with these strides."""
    reach = sum((side - 1) * step for side, step in zip(tensor.shape, stride, strict=True)) + 1
    if tensor.numel() and (reach != tensor.numel() or min(stride, default=1) < 0):
        raise ValueError("strides leave gaps or overlap")
    return torch.empty_strided(tensor.shape, stride, dtype=tensor.dtype).copy_(tensor)

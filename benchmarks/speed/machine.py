"""The machine that a table belongs to: its processor, what it computes fast, and how fast that is at best."""

from __future__ import annotations

import os
import time
from pathlib import Path

import torch

#: Side of the matrices that measure the peak; large enough to be bound by arithmetic, small enough for a second.
SIDE, ROUNDS = 2048, 7
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def processor(facts: str | None = None) -> tuple[str, bool]:
    """Name of the processor, and whether it multiplies in bf16 (avx512_bf16 or AMX).

    Args:
        facts: what Linux tells of it; None: read ``/proc/cpuinfo``. Without such a file: unnamed, no bf16.
    """
    if facts is None:
        file = Path("/proc/cpuinfo")
        facts = file.read_text(encoding="utf-8") if file.is_file() else ""
    said: dict[str, str] = {}
    for line in facts.splitlines():
        key, _, value = line.partition(":")
        said.setdefault(key.strip(), value.strip())
    return said.get("model name", "unnamed CPU"), bool({"avx512_bf16", "amx_bf16"} & set(said.get("flags", "").split()))


def multiplies_bf16() -> bool:
    """Whether ``--search bf16`` is worth measuring here; elsewhere tables say n/a."""
    return processor()[1]


def machine() -> str:
    """One line for the top of a table."""
    name, bf16 = processor()
    return (
        f"{name}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, bf16 instructions "
        f"{'yes' if bf16 else 'no'}, torch {torch.__version__}"
    )


def peak_flops(precision: str) -> float:
    """Floating-point operations a second of the fastest of a few large matrix products."""
    a, b = (torch.rand(SIDE, SIDE).to(DTYPES[precision]) for _ in range(2))
    fastest = float("inf")
    for _ in range(ROUNDS):
        began = time.perf_counter()
        a @ b
        fastest = min(fastest, time.perf_counter() - began)
    return 2 * SIDE**3 / fastest

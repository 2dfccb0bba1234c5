"""The machine that models run on here."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import onnxruntime as ort


def machine_name() -> str:
    """What times are measured on: the processor and its cores, and onnxruntime's version."""
    cpu = processor().get("model name") or platform.processor() or platform.machine()
    return f"{cpu}, {os.cpu_count()} cores, onnxruntime {ort.__version__}, 1 thread"


def has_vnni() -> bool | None:
    """True if this processor multiplies codes in VNNI instructions, whose sums cannot saturate; None if it does not say."""
    flags = processor().get("flags")
    return None if flags is None else bool({"avx512_vnni", "avx_vnni"} & set(flags.split()))


def processor() -> dict[str, str]:
    """What Linux reports about the last processor; empty elsewhere."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return {}
    return {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}

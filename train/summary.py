"""summary.json: what a run says of itself beside its numbers. Written when it starts, and whole when it ends."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import resource
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from jpeft.errors import JpeftError

SUMMARY = "summary.json"


def write(folder: Path, facts: Mapping[str, Any]) -> None:
    """Writes `facts` to the run's folder, all or nothing. Raises JpeftError if it cannot be written."""
    path = folder / SUMMARY
    beside = path.with_name(path.name + ".new")
    try:
        beside.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
        beside.replace(path)
    except OSError as error:
        raise JpeftError(f"output.folder: {path} cannot be written: {error.strerror or error}") from None


def machine() -> dict[str, Any]:
    """The devices that JAX computes on, and the versions of what matters."""
    devices = jax.devices()
    return {
        "devices": {"kind": devices[0].device_kind, "platform": devices[0].platform, "count": len(devices)},
        "versions": {
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in ("jax", "flax", "optax", "jpeft")},
        },
    }


def memory() -> dict[str, int]:
    """The most bytes held so far: process, and device where its backend counts them."""
    # Linux counts kibibytes, macOS bytes.
    unit = 1 if sys.platform == "darwin" else 1024
    found = {"process": unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss}
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    peaks = [one["peak_bytes_in_use"] for one in stats if "peak_bytes_in_use" in one]
    return {**found, "device": max(peaks)} if peaks else found

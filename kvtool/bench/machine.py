"""The machine a figure was taken on, and what is known of machines it was not taken on."""

import platform
import shutil
import subprocess
import sys
from typing import Any

import torch

# memory bandwidth in bytes per second, from the vendors' data sheets
CARDS = {
    "H200": 4.8e12,
    "H100 SXM": 3.35e12,
    "A100 80GB": 2.04e12,
    "RTX 4090": 1.008e12,
    "L40S": 0.864e12,
    "MI300X": 5.3e12,
}


def machine(device: torch.device) -> dict[str, Any]:
    """Card, driver, clocks, versions and command: all that a figure depends on."""
    facts: dict[str, Any] = {
        "device": _processor() if device.type == "cpu" else torch.cuda.get_device_name(device),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "command": " ".join(["kvtool", *sys.argv[1:]]),
    }
    if device.type == "cuda":
        facts |= {"cuda": torch.version.cuda, **_nvidia_smi(device)}
    return facts


def _processor() -> str:
    try:
        lines = open("/proc/cpuinfo").read().splitlines()  # noqa: SIM115
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _version(name: str) -> str | None:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _nvidia_smi(device: torch.device) -> dict[str, str]:
    fields = ["driver_version", "clocks.sm", "clocks.mem", "clocks.max.sm", "power.limit"]
    program = shutil.which("nvidia-smi")
    if program is None:
        return {}
    index = str(device.index or 0)
    query = [program, f"--query-gpu={','.join(fields)}", "--format=csv,noheader", "-i", index]
    done = subprocess.run(query, capture_output=True, text=True, check=False)
    values = [value.strip() for value in done.stdout.split(",")]
    return dict(zip(fields, values, strict=True)) if len(values) == len(fields) else {}

"""What the device can do: bf16 arithmetic, compiled kernels, peak speed."""

from __future__ import annotations

import os
import sysconfig
import time
from pathlib import Path

import torch
from composer.core import Precision
from composer.utils import dist
from torch._inductor.cpp_builder import get_cpp_compiler
from torch._inductor.exc import InvalidCxxCompiler
from torch.utils._triton import has_triton

from vlm_composer.config.model import Dtype

CONTROL_GROUP = Path("/sys/fs/cgroup")


def has_native_bf16(device: str) -> bool:
    """Whether the device multiplies bf16 matrices in hardware.

    Args:
        device: "cpu" or "gpu". A CPU needs AVX512-BF16 or AMX; one without is ten times
            slower in bf16 than in fp32, one without any AVX512 seventy-five times.
    """
    if device == "gpu":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def choose_device(wanted: str | None) -> str:
    """Return "gpu" or "cpu".

    Args:
        wanted: One of them, or None for the GPU where there is one.

    Raises:
        ValueError: A GPU is asked for and there is none.
    """
    if wanted == "gpu" and not torch.cuda.is_available():
        raise ValueError(
            "device: gpu, but torch sees no CUDA device; set device: cpu or leave it out"
        )
    return wanted or ("gpu" if torch.cuda.is_available() else "cpu")


def storage_dtype(dtype: Dtype, device: str) -> torch.dtype:
    """Return the dtype that a frozen tower is stored in; "auto" as `has_native_bf16` says."""
    bf16 = dtype == "bf16" or (dtype == "auto" and has_native_bf16(device))
    return torch.bfloat16 if bf16 else torch.float32


def device_memory(device: str) -> tuple[float, str]:
    """Return the bytes that a rank's device has in all, and what it is called.

    Args:
        device: "gpu" for this rank's; "cpu" for this rank's share of the machine's memory, or of
            the control group's that it runs in.
    """
    if device == "gpu":
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        return float(properties.total_memory), properties.name
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    ranks = dist.get_local_world_size()
    name = "this machine's" if ranks == 1 else f"1/{ranks} of this machine's"
    return min(memory, container_limit()) / ranks, name


def container_limit(group: Path = CONTROL_GROUP) -> float:
    """Bytes that a container may take (cgroup v2); infinite where there is no limit."""
    limit = group / "memory.max"
    text = limit.read_text().strip() if limit.is_file() else "max"
    return float("inf") if text == "max" else float(text)


def compile_obstacle(device: str) -> str | None:
    """What keeps torch from compiling for a device, "cpu" or "gpu"; None where it can."""
    if device == "gpu":
        return None if has_triton() else "torch finds no Triton"
    if not Path(sysconfig.get_path("include"), "Python.h").is_file():
        return "Python's headers (Python.h) are not installed"
    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        return "torch finds no C++ compiler"
    return None


def fusing_obstacle(device: str, dtype: torch.dtype) -> str | None:
    """What keeps oneDNN from fusing linear layers of a dtype with what follows; None if nothing."""
    if device == "gpu":
        return "it is for a CPU"
    if dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return "oneDNN takes no bf16 on this CPU, which has neither AVX512 nor AVX-NE-CONVERT"
    return None


def choose_precision(precision: str, device: str) -> tuple[Precision, torch.dtype | None]:
    """Return Composer's precision and the dtype of the model's own autocast.

    Composer 0.32.1 refuses `amp_bf16` on a CPU, where the model then runs under torch's CPU
    autocast.

    Args:
        precision: "fp32", "amp_bf16" or "auto".
        device: "cpu" or "gpu".
    """
    if precision == "auto":
        precision = "amp_bf16" if has_native_bf16(device) else "fp32"
    if precision == "amp_bf16" and device == "cpu":
        return Precision.FP32, torch.bfloat16
    return Precision(precision), None


def measure_peak_flops(dtype: torch.dtype, size: int = 1024, repeats: int = 10) -> float:
    """Measure the FLOP/s of a square matrix product on the CPU, the best of `repeats`.

    Args:
        dtype: Of both matrices.
        size: Rows and columns.
        repeats: Products timed, after one that is not.
    """
    left, right = torch.randn(size, size, dtype=dtype), torch.randn(size, size, dtype=dtype)
    best = float("inf")
    for _ in range(repeats + 1):
        start = time.perf_counter()
        torch.nn.functional.linear(left, right)
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best

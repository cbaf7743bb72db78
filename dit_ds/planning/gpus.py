"""GPUs by name: peak FLOP/s, memory size, bandwidth and multiprocessors, from the vendors' data sheets."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch

from dit_ds.errors import UserError
from dit_ds.files import GIB

# Dense TFLOP/s (half of the figure where a data sheet gives sparse ones): bf16, fp16, tf32, fp32; None: no such rate.
# On GeForce, 16-bit products are summed in fp32, as PyTorch does. A plain name is the SXM module where there is one.
PEAKS: dict[str, tuple[float | None, ...]] = {
    "V100": (None, 125, None, 15.7),
    "V100 PCIe": (None, 112, None, 14),
    "T4": (None, 65, None, 8.1),
    "A100": (312, 312, 156, 19.5),
    "A30": (165, 165, 82, 10.3),
    "A10": (125, 125, 62.5, 31.2),
    "A40": (149.7, 149.7, 74.8, 37.4),
    "RTX A6000": (154.8, 154.8, 77.4, 38.7),
    "H100": (989.4, 989.4, 494.7, 66.9),
    "H100 PCIe": (756, 756, 378, 51),
    "H100 NVL": (835.5, 835.5, 417.5, 60),
    "GH200": (989.4, 989.4, 494.7, 66.9),
    "H200": (989.4, 989.4, 494.7, 66.9),
    "H200 NVL": (835.5, 835.5, 417.5, 60),
    "B200": (2250, 2250, 1125, 75),
    "GB200": (2500, 2500, 1250, 80),
    "L4": (121, 121, 60, 30.3),
    "L40": (181, 181, 90.5, 90.5),
    "L40S": (362, 362, 183, 91.6),
    "RTX 6000 Ada": (364.2, 364.2, 182.1, 91.1),
    "RTX 3090": (71, 71, 35.6, 35.6),
    "RTX 4090": (165.2, 165.2, 82.6, 82.6),
    "RTX 5090": (209.5, 209.5, 104.8, 104.8),
}


# GiB that CUDA reports as total, without the driver's share, rounded down. A100 is the variant of 80 GB, V100 that of
# 16; a size within the name ("A100-SXM4-40GB") takes precedence, see `memory_gib`.
MEMORY_GIB: dict[str, float] = {
    "V100": 15.7, "V100 PCIe": 15.7, "T4": 14.5, "A100": 79.1, "A30": 23.5, "A10": 22.0, "A40": 44.4,
    "RTX A6000": 47.4, "H100": 79.1, "H100 PCIe": 79.1, "H100 NVL": 93.0, "GH200": 94.5, "H200": 139.7,
    "H200 NVL": 139.7, "B200": 178.0, "GB200": 184.0, "L4": 22.0, "L40": 44.4, "L40S": 44.4, "RTX 6000 Ada": 47.4,
    "RTX 3090": 23.5, "RTX 4090": 23.5, "RTX 5090": 31.3,
}  # fmt: skip


# GB/s of the GPU's memory, from the data sheets.
BANDWIDTH: dict[str, float] = {
    "V100": 900, "V100 PCIe": 900, "T4": 300, "A100": 2039, "A30": 933, "A10": 600, "A40": 696, "RTX A6000": 768,
    "H100": 3350, "H100 PCIe": 2000, "H100 NVL": 3900, "GH200": 4000, "H200": 4800, "H200 NVL": 4800, "B200": 8000,
    "GB200": 8000, "L4": 300, "L40": 864, "L40S": 864, "RTX 6000 Ada": 960, "RTX 3090": 936, "RTX 4090": 1008,
    "RTX 5090": 1792,
}  # fmt: skip


@dataclass(frozen=True)
class GpuLimits:
    """What CUDA's kernels look at when they choose how many blocks to launch.

    Attributes:
        multiprocessors: of the GPU, those that are enabled.
        threads_per_multiprocessor: the most that one holds at a time.
        capability: compute capability, (major, minor).
        warp_size: threads.
        threads_per_block: the most of one block.
    """

    multiprocessors: int
    threads_per_multiprocessor: int
    capability: tuple[int, int]
    warp_size: int = 32
    threads_per_block: int = 1024

    @property
    def architecture(self) -> int:
        """The compute capability as one number: 90."""
        return 10 * self.capability[0] + self.capability[1]


_VOLTA, _TURING, _AMPERE, _AMPERE_GRAPHICS = (2048, (7, 0)), (1024, (7, 5)), (2048, (8, 0)), (1536, (8, 6))
_ADA, _HOPPER, _BLACKWELL, _BLACKWELL_GRAPHICS = (1536, (8, 9)), (2048, (9, 0)), (2048, (10, 0)), (1536, (12, 0))
# The same names as in `PEAKS`.
LIMITS: dict[str, GpuLimits] = {
    "V100": GpuLimits(80, *_VOLTA),
    "V100 PCIe": GpuLimits(80, *_VOLTA),
    "T4": GpuLimits(40, *_TURING),
    "A100": GpuLimits(108, *_AMPERE),
    "A30": GpuLimits(56, *_AMPERE),
    "A10": GpuLimits(72, *_AMPERE_GRAPHICS),
    "A40": GpuLimits(84, *_AMPERE_GRAPHICS),
    "RTX A6000": GpuLimits(84, *_AMPERE_GRAPHICS),
    "H100": GpuLimits(132, *_HOPPER),
    "H100 PCIe": GpuLimits(114, *_HOPPER),
    "H100 NVL": GpuLimits(132, *_HOPPER),
    "GH200": GpuLimits(132, *_HOPPER),
    "H200": GpuLimits(132, *_HOPPER),
    "H200 NVL": GpuLimits(132, *_HOPPER),
    "B200": GpuLimits(148, *_BLACKWELL),
    "GB200": GpuLimits(152, *_BLACKWELL),
    "L4": GpuLimits(58, *_ADA),
    "L40": GpuLimits(142, *_ADA),
    "L40S": GpuLimits(142, *_ADA),
    "RTX 6000 Ada": GpuLimits(142, *_ADA),
    "RTX 3090": GpuLimits(82, *_AMPERE_GRAPHICS),
    "RTX 4090": GpuLimits(128, *_ADA),
    "RTX 5090": GpuLimits(170, *_BLACKWELL_GRAPHICS),
}


def limits_of(device_name: str) -> GpuLimits:
    """Multiprocessors, their threads and the compute capability of a GPU.

    Args:
        device_name: as `torch.cuda.get_device_name` gives it, or short, as "H100 PCIe".
    Raises:
        UserError: the GPU is not known; the message lists those that are.
    """
    name = known_gpu(device_name)
    if name is None:
        raise UserError(f"GPU '{device_name}' is not known: choose one of {', '.join(PEAKS)}")
    return LIMITS[name]


def memory_gib(device_name: str) -> float | None:
    """GiB of a GPU's memory; None if the name is not known. A size within the name takes precedence over the table."""
    name = known_gpu(device_name)
    if name is None:
        return None
    size = re.search(r"(\d+) ?GB\b", device_name, re.IGNORECASE)
    if size and not 0.9 < float(size[1]) / MEMORY_GIB[name] < 1.1:
        return 0.985 * float(size[1])  # a variant of another size, with the usual share for the driver
    return MEMORY_GIB[name]


def memory_of(device_name: str) -> float:
    """Bytes of a GPU's memory.

    Raises:
        UserError: the GPU is not known; the message lists those that are.
    """
    found = memory_gib(device_name)
    if found is None:
        raise UserError(
            f"GPU '{device_name}' is not known: choose one of {', '.join(PEAKS)}, or say --gpu-memory 80GiB"
        )
    return found * GIB


def peak_flops(device_name: str, dtype: torch.dtype) -> float | None:
    """Dense FLOP/s of a GPU's data sheet; None if the name or its rate in that type is not known.

    Args:
        device_name: as `torch.cuda.get_device_name` gives it, or short, as "H100 PCIe".
        dtype: bf16, fp16 or fp32; the last with TF32 if `torch.get_float32_matmul_precision` allows it.
    """
    name = known_gpu(device_name)
    if name is None:
        return None
    tf32 = torch.get_float32_matmul_precision() != "highest" and PEAKS[name][2] is not None
    column = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2 if tf32 else 3}.get(dtype)
    rate = None if column is None else PEAKS[name][column]
    return None if rate is None else rate * 1e12


def require_peak(device_name: str, dtype: torch.dtype) -> float:
    """As `peak_flops`, for a GPU that must be known.

    Raises:
        UserError: it is not, or it does not compute in that type; the message lists those that are known.
    """
    peak = peak_flops(device_name, dtype)
    if peak is None:
        what = f"GPU '{device_name}' is not known"
        if known_gpu(device_name):
            what = f"{known_gpu(device_name)} has no rate in {str(dtype).removeprefix('torch.')}"
        raise UserError(f"{what}: choose one of {', '.join(PEAKS)}")
    return peak


def known_gpu(device_name: str) -> str | None:
    """The most specific key of `PEAKS` whose words the name contains; None for MIG slices and laptop GPUs."""
    words = _words(device_name)
    if words & {"mig", "laptop"}:
        return None
    found = [name for name in PEAKS if _words(name) <= words]
    return max(found, key=lambda name: len(_words(name)), default=None)


def _words(name: str) -> set[str]:
    return set(re.findall(r"[a-z0-9]+", name.lower())) - {"rtx", "nvidia"}


_UNITS = {
    "": GIB,
    "g": 10**9,
    "gb": 10**9,
    "gib": GIB,
    "m": 10**6,
    "mb": 10**6,
    "mib": 2**20,
    "tb": 10**12,
    "tib": 2**40,
}


_MOST_BYTES = 2**60


def parse_memory(text: str) -> float:
    """Bytes of `80GiB`, `80GB`, `81559MiB` or `80` (GiB).

    Raises:
        UserError: the text is not a positive size.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?) *([a-zA-Z]*)", text.strip())
    size = float(found[1]) * _UNITS.get(found[2].lower(), 0) if found else 0.0
    if not 0 < size <= _MOST_BYTES:
        raise UserError(f"'{text[:60]}' is no amount of memory: write it as 80GiB, 80GB or 81559MiB")
    return size

"""PyTorch's settings of CUDA's caching allocator: what PYTORCH_CUDA_ALLOC_CONF says, as far as it changes memory.

Rules as in c10/core/AllocatorConfig.cpp of torch 2.13.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass, fields
from typing import Any

from dit_ds.errors import UserError

MIB = 1 << 20
MIN_BLOCK = 512  # bytes: every size is a multiple of it
INTERVALS = 16  # of roundup_power2_divisions: from 1 MiB (and below) by powers of two to 32 GiB (and above)

# set by `train` and `memory measure` unless the user set others: freed blocks of any size serve others, so that little
# more is reserved than allocated
TRAIN_SETTINGS = "expandable_segments:True"

# options that change speed or host memory, not what the GPU's allocator holds
_NO_EFFECT = {
    "backend", "pinned_use_cuda_host_register", "pinned_num_register_threads", "pinned_use_background_threads",
    "pinned_reserve_segment_size_mb", "pinned_max_round_threshold_mb", "pinned_max_cached_size_mb",
    "release_lock_on_cudamalloc", "graph_capture_record_stream_reuse", "throw_on_cudamalloc_oom",
}  # fmt: skip


_VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")


def use_train_settings(environ: MutableMapping[str, str]) -> None:
    """Set the allocator up for training, unless the user did. Before torch's first CUDA call, which reads it."""
    if not any(name in environ for name in _VARIABLES):
        environ[_VARIABLES[0]] = TRAIN_SETTINGS


def described(environ: Mapping[str, str]) -> str:
    """What the environment says about the allocator, for a log."""
    said = [f"{name}={environ[name]}" for name in _VARIABLES if name in environ]
    return f"CUDA's caching allocator: {', '.join(said) or 'default settings'}"


@dataclass(frozen=True)
class AllocatorSettings:
    """Settings of the caching allocator. Sizes are bytes.

    Attributes:
        expandable_segments: segments grow page by page within a reserved range of addresses.
        max_split_size: blocks of this size or more are not split; None for no limit.
        max_non_split_rounding: such a block serves requests that are less than this smaller.
        large_segment_size: the segment for requests over 1 MiB and under 10 MiB, and the page of large expandable ones.
        garbage_collection_threshold: share of the allowed memory from which unused segments are released; 0 for never.
            Has no effect unless `memory_fraction` is set, as in PyTorch.
        roundup_power2_divisions: into how many steps each power of two is divided, by interval; 0 or 1 for steps of 512
            bytes.
        memory_fraction: share of the GPU that the process may take (torch.cuda.set_per_process_memory_fraction).
    """

    expandable_segments: bool = False
    max_split_size: int | None = None
    max_non_split_rounding: int = 20 * MIB
    large_segment_size: int = 20 * MIB
    garbage_collection_threshold: float = 0.0
    roundup_power2_divisions: tuple[int, ...] = (0,) * INTERVALS
    memory_fraction: float | None = None

    @classmethod
    def parse(cls, text: str) -> AllocatorSettings:
        """Read PYTORCH_CUDA_ALLOC_CONF's format, as `expandable_segments:True,max_split_size_mb:128`.

        Raises:
            UserError: an unknown option, or a value that PyTorch would refuse.
        """
        values: dict[str, Any] = {}
        rest = re.sub(r"\s", "", text)
        while rest:
            found = re.match(r"([A-Za-z0-9_]+):(\[[^\]]*\]|[^,\[\]]+)(?:,|$)", rest)
            if not found:
                raise UserError(f"allocator settings: '{rest[:60]}' is not OPTION:VALUE, as expandable_segments:True")
            values |= _value(*found.groups())
            rest = rest[found.end() :]
        settings = cls(**values)
        for name in ("max_split_size", "max_non_split_rounding"):
            if name in values and values[name] < settings.large_segment_size:
                least = settings.large_segment_size // MIB
                raise UserError(f"allocator settings: {name}_mb:{values[name] // MIB} is too small: at least {least}")
        return settings

    def __str__(self) -> str:
        """As `parse` reads it; empty for the defaults."""
        default, said = AllocatorSettings(), []
        for field in fields(self):
            value = getattr(self, field.name)
            if value == getattr(default, field.name):
                continue
            if field.name == "roundup_power2_divisions":
                said.append(f"{field.name}:{_divisions_text(value)}")
            elif field.name in _IN_MIB.values():
                said.append(f"{field.name}_mb:{value // MIB}")
            elif field.name == "memory_fraction":
                said.append(f"per_process_memory_fraction:{value}")
            else:
                said.append(f"{field.name}:{value}")
        return ",".join(said)

    def rounded(self, size: int) -> int:
        """The bytes of the block that a request takes."""
        if size < MIN_BLOCK:
            return MIN_BLOCK
        divisions = self.roundup_power2_divisions[min(max(size.bit_length() - 21, 0), INTERVALS - 1)]
        if divisions <= 1 or size <= MIN_BLOCK * divisions:
            return -(-size // MIN_BLOCK) * MIN_BLOCK
        step = (1 << (size.bit_length() - 1)) // divisions
        return -(-size // step) * step


_IN_MIB = {
    "max_split_size_mb": "max_split_size",
    "max_non_split_rounding_mb": "max_non_split_rounding",
    "large_segment_size_mb": "large_segment_size",
}
_KNOWN = {"expandable_segments", "garbage_collection_threshold", "roundup_power2_divisions",
          "per_process_memory_fraction", *_IN_MIB, *_NO_EFFECT}  # fmt: skip


def _value(option: str, text: str) -> dict[str, Any]:
    """One option as `AllocatorSettings` has it."""
    if option not in _KNOWN:
        near = difflib.get_close_matches(option, _KNOWN, 1)
        hint = f": did you mean {near[0]}?" if near else f": known are {', '.join(sorted(_KNOWN - _NO_EFFECT))}"
        raise UserError(f"allocator settings: unknown option {option}{hint}")
    if option in _NO_EFFECT:
        if option == "backend" and text != "native":
            raise UserError(
                f"allocator settings: backend:{text} is CUDA's own allocator; only backend:native is modelled"
            )
        return {}
    if option == "expandable_segments":
        if text not in ("True", "False"):
            raise UserError(f"allocator settings: expandable_segments:{text} is neither True nor False")
        return {option: text == "True"}
    if option in _IN_MIB:
        size = _whole(option, text)
        if option == "large_segment_size_mb" and size <= 1:
            raise UserError(f"allocator settings: {option}:{text} is too small: at least 2")
        return {_IN_MIB[option]: size * MIB}
    if option == "roundup_power2_divisions":
        return {option: _divisions(text)}
    try:
        share = float(text)
    except ValueError:
        share = -1.0
    if not 0 < share < 1 and not (share == 1 and option == "per_process_memory_fraction"):
        raise UserError(f"allocator settings: {option}:{text} is not a share between 0 and 1")
    return {"memory_fraction" if option == "per_process_memory_fraction" else option: share}


def _whole(option: str, text: str) -> int:
    if not re.fullmatch(r"[0-9]{1,12}", text):
        raise UserError(f"allocator settings: {option}:{text} is not a whole number")
    return int(text)


def _divisions(text: str) -> tuple[int, ...]:
    """roundup_power2_divisions by interval: a number for all, or [256:1,512:2,>:8] by sizes in MiB.

    The first interval of the list also stands for all smaller sizes; `>` for all above the one before it.
    """
    option = "roundup_power2_divisions"
    if not text.startswith("["):
        return (_power_of_two(option, text),) * INTERVALS
    divisions, last, first = [0] * INTERVALS, -1, True
    for item in text[1:-1].split(","):
        size, colon, count = item.partition(":")
        number = _power_of_two(option, count) if colon else 0
        if not colon:
            raise UserError(f"allocator settings: {option}: '{item}' is not MIB:DIVISIONS")
        if size == ">":
            divisions[last + 1 :] = [number] * (INTERVALS - last - 1)
            continue
        last = min(_power_of_two(option, size, least=1).bit_length() - 1, INTERVALS - 1)
        if first:
            divisions[:last] = [number] * last
        divisions[last], first = number, False
    return tuple(divisions)


def _power_of_two(option: str, text: str, least: int = 0) -> int:
    number = _whole(option, text)
    if number & (number - 1) or number < least:
        raise UserError(f"allocator settings: {option}: {text} is not a power of two")
    return number


def _divisions_text(divisions: tuple[int, ...]) -> str:
    if len(set(divisions)) == 1:
        return str(divisions[0])
    return "[" + ",".join(f"{1 << i}:{n}" for i, n in enumerate(divisions)) + "]"

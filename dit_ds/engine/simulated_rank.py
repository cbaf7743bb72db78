"""What is replaced in DeepSpeed where it runs as one rank of a simulated cluster, see `planning.memory.fake_cluster`."""

from __future__ import annotations

import importlib
from typing import Any, Protocol

import torch

from dit_ds.engine.engine import import_deepspeed

# Comparisons between ranks, in each module of deepspeed.runtime.zero that calls them by a global name
_COMPARISONS = {
    "utils": ("assert_ints_same_as_other_ranks", "assert_lst_len_same_as_other_ranks"),
    "partition_parameters": ("assert_ints_same_as_other_ranks",),
    "partitioned_param_coordinator": ("assert_ints_same_as_other_ranks",),
    "stage3": ("assert_ints_same_as_other_ranks",),
}


class SimulatedStreams(Protocol):
    """Streams of a simulated GPU, as an accelerator of DeepSpeed offers them."""

    def make(self, *_: Any, **__: Any) -> Any:
        """A new stream."""

    def event(self, *_: Any, **__: Any) -> Any:
        """A new event."""

    def current(self, device: Any = None) -> Any:
        """The stream of the operators that run now."""

    def default(self, device: Any = None) -> Any:
        """The default stream."""

    def on(self, stream: Any) -> Any:
        """A context in which operators run on a stream."""

    def synchronize(self, device: Any = None) -> None:
        """Wait for all streams."""

    def empty_cache(self) -> None:
        """Give unused segments back."""


def replacements(device: torch.device, streams: SimulatedStreams) -> dict[Any, dict[str, Any]]:
    """Attributes of DeepSpeed's objects and modules to replace, with their new values, by owner.

    The accelerator answers with `device`, and ranks are not compared, as there is no other one.

    Args:
        device: of the simulated rank, with an index.
        streams: of that device.
    """
    import_deepspeed()
    from deepspeed.accelerator import get_accelerator

    accelerator = {
        "device_name": lambda index=None: device.type if index is None else f"{device.type}:{index}",
        "current_device_name": lambda: str(device),
        "current_device": lambda: device.index,
        "on_accelerator": lambda tensor: tensor.device == device,
        # as on CUDA, operators run behind the host's back, on several streams
        "is_synchronized_device": lambda: False,
        "resolves_data_dependency": lambda: False,
        "handles_memory_backpressure": lambda: False,
        "stream": streams.on,
        "current_stream": streams.current,
        "default_stream": streams.default,
        "synchronize": streams.synchronize,
        "empty_cache": streams.empty_cache,
    }
    properties = {"Stream": property(lambda _: streams.make), "Event": property(lambda _: streams.event)}
    replaced: dict[Any, dict[str, Any]] = {get_accelerator(): accelerator, type(get_accelerator()): properties}
    for name, comparisons in _COMPARISONS.items():
        module = importlib.import_module(f"deepspeed.runtime.zero.{name}")
        replaced[module] = {comparison: lambda *_, **__: None for comparison in comparisons}
    return replaced

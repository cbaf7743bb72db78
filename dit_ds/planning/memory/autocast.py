"""Autocast of the fake GPU: the operators before which it casts tensors, and its cache of weights, as those on CUDA.

The lists are those of ATen's AutocastCUDA (aten/src/ATen/autocast_mode.h of PyTorch 2.13). An operator on none of them
takes its tensors as they come; one that is made of others casts where they do.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

# Those that take all their tensors in the autocast type
LOW_PRECISION = (
    "_convolution", "_convolution.deprecated", "_scaled_dot_product_flash_attention", "_thnn_fused_gru_cell",
    "_thnn_fused_lstm_cell", "addbmm", "addmm", "addmv", "addr", "baddbmm", "bmm", "chain_matmul", "conv1d", "conv2d",
    "conv3d", "conv_tbc", "conv_transpose1d", "conv_transpose2d.input", "conv_transpose3d.input", "convolution",
    "cudnn_convolution", "cudnn_convolution_transpose", "einsum", "gru_cell", "linalg_multi_dot", "linalg_vecdot",
    "linear", "lstm_cell", "matmul", "mm", "mv", "prelu", "rnn_relu_cell", "rnn_tanh_cell",
    "scaled_dot_product_attention",
)  # fmt: skip
# Those that take them in fp32
FP32 = (
    "_upsample_bicubic2d_aa", "_upsample_bilinear2d_aa", "_upsample_nearest_exact1d", "_upsample_nearest_exact2d",
    "_upsample_nearest_exact3d", "acos", "asin", "binary_cross_entropy_with_logits", "cdist", "cosh",
    "cosine_embedding_loss", "cosine_similarity", "dist", "erfinv", "exp", "expm1", "frobenius_norm.dim", "group_norm",
    "hinge_embedding_loss", "huber_loss", "kl_div", "l1_loss", "layer_norm", "log", "log10", "log1p", "log2",
    "logsumexp", "margin_ranking_loss", "mse_loss", "multi_margin_loss", "multilabel_margin_loss", "native_layer_norm",
    "nll_loss", "nll_loss2d", "nuclear_norm", "nuclear_norm.dim", "pdist", "poisson_nll_loss", "pow.Scalar",
    "pow.Tensor_Scalar", "pow.Tensor_Tensor", "reciprocal", "renorm", "rms_norm", "rsqrt", "sinh", "smooth_l1_loss",
    "soft_margin_loss", "softplus", "tan", "triplet_margin_loss", "upsample_bicubic2d", "upsample_bilinear2d",
    "upsample_linear1d", "upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d", "upsample_trilinear3d",
)  # fmt: skip
# Those that take them as they come, and are asked for an output in fp32 unless the caller names a type
FP32_OUTPUT = (
    "cumprod", "cumsum", "linalg_matrix_norm", "linalg_matrix_norm.str_ord", "linalg_vector_norm", "log_softmax.int",
    "prod", "prod.dim_int", "softmax.int", "sum", "sum.dim_IntList",
)  # fmt: skip
# The same by another overload, the one that has an output type
FP32_OVERLOAD = {"norm.Scalar": "norm.ScalarOpt_dtype", "norm.ScalarOpt_dim": "norm.ScalarOpt_dim_dtype"}
# Those that take them in fp32 if one of them is, else in the autocast type
WIDEST = (
    "addcdiv", "addcmul", "atan2", "bilinear", "cross", "dot", "grid_sampler", "index_put", "scatter_add", "tensordot",
    "vdot",
)  # fmt: skip
# Those that are refused
BANNED = ("binary_cross_entropy",)

_KERNELS = torch.library.Library("aten", "IMPL", "AutocastPrivateUse1")
_OTHERS = torch.library.Library("_", "IMPL", "AutocastPrivateUse1")

# Softmaxes that CUDA computes from fp16 to fp32 without a copy of their input, where others convert it first
_FROM_HALF = {"softmax.int": "_softmax", "log_softmax.int": "_log_softmax"}

Kernel = Callable[..., Any]


class Autocast:
    """Autocast of one device type, and the weights that it has cast.

    A cast of an fp32 leaf that requires a gradient to the autocast type is kept until `clear`, for later operators, as
    autocast keeps it on any device, but not where `torch.autocast` was told to cache nothing or in inference mode.

    Args:
        device: the type's name, as in `torch.autocast`; one that PyTorch dispatches as PrivateUse1.
    """

    def __init__(self, device: str):
        self._device = device
        self._casts: dict[int, tuple[weakref.ref[Tensor], Tensor]] = {}  # by the id of the weight
        self._without_weight: list[Tensor] = []  # casts of weights that are gone: they, too, stay until `clear`
        self._key = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastPrivateUse1)  # type: ignore[attr-defined]

    def register(self) -> None:
        """Have PyTorch call this before the operators on the lists, as far as it has such a cast on CUDA. Once a process."""
        _OTHERS.fallback(torch.library.fallthrough_kernel)
        kernels: tuple[tuple[Iterable[str], Callable[[str], Kernel]], ...] = (
            (LOW_PRECISION, self._low_precision), (FP32, self._fp32), (FP32_OUTPUT, self._fp32_output),
            (FP32_OVERLOAD, self._fp32_overload), (WIDEST, self._widest), (BANNED, self._banned),
        )  # fmt: skip
        for names, kernel in kernels:
            for name in names:
                if torch._C._dispatch_has_kernel_for_dispatch_key(f"aten::{name}", "AutocastCUDA"):
                    _KERNELS.impl(name, self._below(kernel(name)))

    def clear(self) -> None:
        """Forget the weights that were cast."""
        self._casts.clear()
        self._without_weight.clear()

    def lowered(self, *args: Any) -> list[Any]:
        """The arguments as an operator of LOW_PRECISION gets them; unchanged where autocast is off."""
        if not any(map(self._eligible, args)) or not torch.is_autocast_enabled(self._device):
            return list(args)
        with torch._C._ExcludeDispatchKeyGuard(self._key):
            return self._cast_all(args, {}, self._type())[0]

    # --- kernels: an operator's name to what runs in its place

    def _below(self, kernel: Kernel) -> Kernel:
        """The kernel, with the operators that it calls not cast again."""

        def run(*args: Any, **kwargs: Any) -> Any:
            with torch._C._ExcludeDispatchKeyGuard(self._key):
                return kernel(*args, **kwargs)

        return run

    def _low_precision(self, name: str) -> Kernel:
        operator = _overload(name)

        def run(*args: Any, **kwargs: Any) -> Any:
            args_, kwargs_ = self._cast_all(args, kwargs, self._type())
            return operator(*args_, **kwargs_)

        return run

    def _fp32(self, name: str) -> Kernel:
        operator = _overload(name)

        def run(*args: Any, **kwargs: Any) -> Any:
            args_, kwargs_ = self._cast_all(args, kwargs, torch.float32)
            return operator(*args_, **kwargs_)

        return run

    def _fp32_output(self, name: str) -> Kernel:
        operator, from_half = _overload(name), _overload(_FROM_HALF[name]) if name in _FROM_HALF else None
        names = [a.name for a in operator._schema.arguments]

        def run(*args: Any, **kwargs: Any) -> Any:
            given = dict(zip(names, args)) | kwargs
            x: Tensor = given["self"]
            if self._eligible(x) and given.get("dtype") is None:
                given["dtype"] = torch.float32
            if from_half and (x.dtype, given.get("dtype")) == (torch.float16, torch.float32):
                return from_half(x, given["dim"], True)
            return operator(**given)

        return run

    def _fp32_overload(self, name: str) -> Kernel:
        arguments, with_type = _overload(name)._schema.arguments, _overload(FP32_OVERLOAD[name])

        def run(*args: Any, **kwargs: Any) -> Any:
            given = dict(zip((a.name for a in arguments), args)) | kwargs
            x, others = given["self"], [given.get(a.name, a.default_value) for a in arguments[1:]]
            return with_type(x, *others, dtype=torch.float32 if self._eligible(x) else x.dtype)

        return run

    def _widest(self, name: str) -> Kernel:
        operator = _overload(name)

        def run(*args: Any, **kwargs: Any) -> Any:
            args_, kwargs_ = self._cast_all(args, kwargs, self._widest_type((*args, *kwargs.values())))
            return operator(*args_, **kwargs_)

        return run

    def _banned(self, name: str) -> Kernel:
        def run(*args: Any, **kwargs: Any) -> Any:
            raise RuntimeError(
                f"{name} is unsafe to autocast: use torch.nn.functional.binary_cross_entropy_with_logits on what goes into "
                "the sigmoid before it"
            )

        return run

    # --- casts

    def _type(self) -> torch.dtype:
        return torch.get_autocast_dtype(self._device)

    def _eligible(self, x: Any) -> bool:
        """Whether autocast may cast it: a tensor of floating point on this device, but not of doubles."""
        if not isinstance(x, Tensor) or x.device.type != self._device:
            return False
        return x.is_floating_point() and x.dtype != torch.float64

    def _widest_type(self, args: Iterable[Any]) -> torch.dtype:
        """fp32 if one of the tensors is, else the autocast type.

        Raises:
            RuntimeError: a tensor before the first in fp32 is of a third type.
        """
        low = self._type()
        for x in filter(self._eligible, args):
            if x.dtype == torch.float32:
                return torch.float32
            if x.dtype != low:
                raise RuntimeError(f"autocast to {low} can't tell whether it or {x.dtype} is the wider type")
        return low

    def _cast_all(self, args: tuple, kwargs: dict[str, Any], dtype: torch.dtype) -> tuple[list[Any], dict[str, Any]]:
        """Casts from the last argument to the first, which is the order in which PyTorch's builds for Linux allocate."""
        cast_kwargs = {name: self._cast(kwargs[name], dtype) for name in reversed(kwargs)}
        return [self._cast(a, dtype) for a in reversed(args)][::-1], cast_kwargs

    def _cast(self, x: Any, dtype: torch.dtype) -> Any:
        if isinstance(x, (list, tuple)):
            return [self._cast(y, dtype) for y in x]
        if not self._eligible(x) or x.dtype == dtype:
            return x
        if not self._kept(x):
            return x.to(dtype)
        if id(x) in self._casts:
            weight, cast = self._casts[id(x)]
            if weight() is x:
                return cast
            self._without_weight.append(cast)
        with torch.enable_grad():  # a later operator may need the gradient that this one doesn't
            cast = x.to(dtype)
        self._casts[id(x)] = weakref.ref(x), cast
        return cast

    def _kept(self, x: Tensor) -> bool:
        """Whether autocast keeps casts of a tensor; one of fp32 is only ever cast to the autocast type."""
        weight = x.dtype == torch.float32 and x.requires_grad and x.is_leaf and not x._is_view()
        return weight and torch.is_autocast_cache_enabled() and not torch.is_inference_mode_enabled()


def _overload(name: str) -> torch._ops.OpOverload:
    packet, _, overload = name.partition(".")
    return getattr(getattr(torch.ops.aten, packet), overload or "default")

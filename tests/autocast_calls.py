"""A call of each operator on autocast's lists: its arguments, tensors by their shapes, those by name in a last dictionary."""

from __future__ import annotations

from typing import Any


class Floats(tuple):
    """The shape of a tensor of floating point."""

    def __new__(cls, *sizes: int):
        return super().__new__(cls, sizes)


class Ints(Floats):
    """The shape of a tensor of integers."""


X, M, V, B = Floats(2, 3, 4), Floats(3, 3), Floats(3), Floats(2, 3, 3)
CELL = (Floats(12, 3), Floats(12, 3), Floats(12), Floats(12))  # an LSTM's weights and biases

_CONVOLUTION = ([1], [0], [1])
CALLS: dict[str, tuple[Any, ...]] = {
    "_convolution": (X, Floats(5, 3, 2), Floats(5), *_CONVOLUTION, False, [0], 1, False, False, True, True),
    "_convolution.deprecated": (X, Floats(5, 3, 2), Floats(5), *_CONVOLUTION, False, [0], 1, False, False, True),
    "_scaled_dot_product_flash_attention": (Floats(2, 2, 8, 16),) * 3,
    "_thnn_fused_gru_cell": (Floats(2, 9), Floats(2, 9), Floats(2, 3), Floats(9), Floats(9)),
    "_thnn_fused_lstm_cell": (Floats(2, 12), Floats(2, 12), Floats(2, 3), Floats(12), Floats(12)),
    "addbmm": (M, B, B),
    "addmm": (V, M, M),
    "addmv": (V, M, V),
    "addr": (M, V, V),
    "baddbmm": (B, B, B),
    "bmm": (B, B),
    "chain_matmul": ([M, M, M],),
    "conv1d": (X, Floats(5, 3, 2), Floats(5)),
    "conv2d": (Floats(2, 3, 4, 4), Floats(5, 3, 2, 2), Floats(5)),
    "conv3d": (Floats(2, 3, 4, 4, 4), Floats(5, 3, 2, 2, 2), Floats(5)),
    "conv_tbc": (X, Floats(2, 4, 5), Floats(5)),
    "conv_transpose1d": (X, Floats(3, 5, 2), Floats(5)),
    "conv_transpose2d.input": (Floats(2, 3, 4, 4), Floats(3, 5, 2, 2), Floats(5)),
    "conv_transpose3d.input": (Floats(2, 3, 4, 4, 4), Floats(3, 5, 2, 2, 2), Floats(5)),
    "convolution": (X, Floats(5, 3, 2), Floats(5), *_CONVOLUTION, False, [0], 1),
    "cudnn_convolution": (Floats(2, 3, 4, 4), Floats(5, 3, 2, 2), [0, 0], [1, 1], [1, 1], 1, False, False, True),
    "cudnn_convolution_transpose": (
        Floats(2, 3, 4, 4), Floats(3, 5, 2, 2), [0, 0], [0, 0], [1, 1], [1, 1], 1, False, False, True
    ),
    "einsum": ("ij,jk,kl->il", [M, M, M]),
    "gru_cell": (Floats(2, 3), Floats(2, 3), Floats(9, 3), Floats(9, 3), Floats(9), Floats(9)),
    "linalg_multi_dot": ([M, M, M],),
    "linalg_vecdot": (M, M),
    "linear": (X, Floats(5, 4), Floats(5)),
    "lstm_cell": (Floats(2, 3), [Floats(2, 3), Floats(2, 3)], *CELL),
    "matmul": (X, Floats(4, 5)),
    "mm": (M, M),
    "mv": (M, V),
    "prelu": (X, Floats(1)),
    "rnn_relu_cell": (Floats(2, 3), Floats(2, 3), M, M, V, V),
    "rnn_tanh_cell": (Floats(2, 3), Floats(2, 3), M, M, V, V),
    "scaled_dot_product_attention": (Floats(2, 2, 8, 16),) * 3,
    # in fp32
    "binary_cross_entropy_with_logits": (X, X, X),
    "cdist": (M, M),
    "cosine_embedding_loss": (M, M, V),
    "cosine_similarity": (M, M),
    "frobenius_norm.dim": (M, [1]),
    "group_norm": (Floats(2, 4, 3), 2, Floats(4), Floats(4)),
    "hinge_embedding_loss": (M, M),
    "layer_norm": (X, [4], Floats(4), Floats(4)),
    "logsumexp": (M, [1]),
    "margin_ranking_loss": (V, V, V),
    "multi_margin_loss": (M, Ints(3)),
    "multilabel_margin_loss": (M, Ints(3, 3)),
    "native_layer_norm": (X, [4], Floats(4), Floats(4), 1e-5),
    "nll_loss": (M, Ints(3), V),
    "nll_loss2d": (Floats(2, 3, 4, 4), Ints(2, 4, 4), V),
    "nuclear_norm": (M,),
    "nuclear_norm.dim": (M, [0, 1]),
    "poisson_nll_loss": (M, M, True, False, 1e-8, 1),
    "pow.Scalar": (2.0, M),
    "pow.Tensor_Scalar": (M, 2.0),
    "pow.Tensor_Tensor": (M, M),
    "renorm": (M, 2, 0, 1.0),
    "rms_norm": (X, [4], Floats(4)),
    "triplet_margin_loss": (M, M, M),
    "_upsample_bicubic2d_aa": (Floats(2, 3, 4, 4), [8, 8], False),
    "_upsample_bilinear2d_aa": (Floats(2, 3, 4, 4), [8, 8], False),
    "_upsample_nearest_exact1d": (X, [8]),
    "_upsample_nearest_exact2d": (Floats(2, 3, 4, 4), [8, 8]),
    "_upsample_nearest_exact3d": (Floats(2, 3, 4, 4, 4), [8, 8, 8]),
    "upsample_bicubic2d": (Floats(2, 3, 4, 4), [8, 8], False),
    "upsample_bilinear2d": (Floats(2, 3, 4, 4), [8, 8], False),
    "upsample_linear1d": (X, [8], False),
    "upsample_nearest1d": (X, [8]),
    "upsample_nearest2d": (Floats(2, 3, 4, 4), [8, 8]),
    "upsample_nearest3d": (Floats(2, 3, 4, 4, 4), [8, 8, 8]),
    "upsample_trilinear3d": (Floats(2, 3, 4, 4, 4), [8, 8, 8], False),
    # with an output in fp32
    "cumprod": (M, 0),
    "cumsum": (M, 0),
    "linalg_matrix_norm": (M, 2),
    "linalg_matrix_norm.str_ord": (M,),
    "linalg_vector_norm": (M,),
    "log_softmax.int": (M, 1),
    "norm.Scalar": (M,),
    "norm.ScalarOpt_dim": (M, 2, [1]),
    "prod": (M,),
    "prod.dim_int": (M, 1),
    "softmax.int": (M, 1),
    "sum": (M,),
    "sum.dim_IntList": (M, [1]),
    # in the widest type
    "addcdiv": (M, M, M, {"value": 2}),
    "addcmul": (M, M, M),
    "atan2": (M, M),
    "bilinear": (M, M, Floats(5, 3, 3), Floats(5)),
    "cross": (M, M),
    "dot": (V, V),
    "grid_sampler": (Floats(2, 3, 4, 4), Floats(2, 4, 4, 2), 0, 0, False),
    "index_put": (M, [Ints(2)], Floats(2, 3), True),
    "scatter_add": (M, 0, Ints(3, 3), M),
    "tensordot": (M, M, [1], [0]),
    "vdot": (V, V),
    "binary_cross_entropy": (M, M),
}  # fmt: skip
for _name in ("acos", "asin", "cosh", "erfinv", "exp", "expm1", "log", "log10", "log1p", "log2", "reciprocal", "rsqrt",
              "sinh", "softplus", "tan", "pdist"):  # fmt: skip
    CALLS[_name] = (M,)
for _name in ("dist", "huber_loss", "kl_div", "l1_loss", "mse_loss", "smooth_l1_loss", "soft_margin_loss"):
    CALLS[_name] = (M, M)

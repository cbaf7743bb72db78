"""Swin whose stages read text: the backbone of LAVT and ReLA.

Swin's layers are those of `transformers`; the loop over them is ours, as a pixel-word attention module (PWAM) stands
between a stage's layers and its patch merging. Source: Yang et al., LAVT, CVPR 2022, section 3.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dit_ds.errors import UserError
from dit_ds.models import authors
from dit_ds.models.checkpoint_file import load_by_name
from dit_ds.models.segmenter import Segmenter
from dit_ds.models.swin_sizes import SIZES


class PWAM(nn.Module):
    """Pixel-word attention module: text features for each visual token (LAVT, section 3.1).

    With x (B, C, N) the visual tokens and l (B, text_dim, T) the text:
        q = IN(W_q x),  k = (W_k l) m,  v = (W_v l) m        m = 0 at padding, else 1
        a = softmax(q^T k / sqrt(C) + 1e4 m - 1e4)           over the text tokens
        r = GELU(W_r (GELU(W_x x) * IN(W_o (v a^T))))        IN: instance norm over the visual tokens, without weights
    """

    def __init__(self, dim: int, text_dim: int):
        super().__init__()
        self.vis = nn.Sequential(nn.Conv1d(dim, dim, 1), nn.GELU())
        self.q = nn.Sequential(nn.Conv1d(dim, dim, 1), nn.InstanceNorm1d(dim))
        self.k, self.v = nn.Conv1d(text_dim, dim, 1), nn.Conv1d(text_dim, dim, 1)
        self.out = nn.Sequential(nn.Conv1d(dim, dim, 1), nn.InstanceNorm1d(dim))
        self.mix = nn.Sequential(nn.Conv1d(dim, dim, 1), nn.GELU())

    def forward(self, x: Tensor, text: Tensor, text_mask: Tensor) -> Tensor:
        """(B, N, C), (B, T, text_dim) and (B, T) bool to (B, N, C)."""
        x, text = x.transpose(1, 2), text.transpose(1, 2)
        m = text_mask[:, None].to(x.dtype)  # (B, 1, T)
        q, k, v = self.q(x), self.k(text) * m, self.v(text) * m  # (B, C, N), (B, C, T) twice
        logits = q.transpose(1, 2) @ k * x.shape[1] ** -0.5 + (1e4 * m - 1e4)  # (B, N, T)
        lang = self.out(v @ logits.softmax(-1).transpose(1, 2))  # (B, C, N)
        return self.mix(self.vis(x) * lang).transpose(1, 2)


class Gate(nn.Sequential):
    """The share of the PWAM's output that the next stage gets: (B, N, C) to (B, N, C) in (-1, 1)."""

    def __init__(self, dim: int):
        super().__init__(nn.Linear(dim, dim, bias=False), nn.ReLU(), nn.Linear(dim, dim, bias=False), nn.Tanh())


class TextSwin(nn.Module):
    """Swin with a PWAM behind each stage's layers: the next stage gets x + gate(r) r, and r is the stage's output.

    Args:
        size: a key of `SIZES`.
        image_size: side of the square input, in pixels.
        text_dim: width of the text features.
        gates: stages that have a gate; the last one's is never reached by a gradient.
        attention: eager or sdpa, of the windows.
    """

    def __init__(self, size: str, image_size: int, text_dim: int, gates: int, attention: str):
        super().__init__()
        from transformers import SwinConfig, SwinModel

        s = SIZES[size]
        config = SwinConfig(image_size=image_size, embed_dim=s.embed_dim, depths=s.depths, num_heads=s.num_heads,
                            window_size=s.window_size, drop_path_rate=s.drop_path)  # fmt: skip
        config._attn_implementation = attention
        swin = SwinModel(config, add_pooling_layer=False)
        self.embeddings = swin.embeddings
        self.stages: Any = swin.encoder.layers  # `nn.ModuleList` does not say what its modules are
        for layer in self._layers():  # Swin drops both branches of a layer, `transformers` the attention only
            layer.mlp = nn.Sequential(layer.mlp, layer.drop_path)
        self.pwams = nn.ModuleList(PWAM(c, text_dim) for c in s.dims)
        self.gates = nn.ModuleList(Gate(c) for c in s.dims[:gates])
        self.norms = nn.ModuleList(nn.LayerNorm(c) for c in s.dims)
        self._recompute = False

    def _layers(self) -> Iterator[Any]:
        for stage in self.stages:
            yield from stage.blocks

    def checkpoint_activations(self, policy: str) -> None:
        """none, or block: each of Swin's layers is recomputed in backward, from its input.

        Raises:
            ValueError: another policy.
        """
        if policy not in ("none", "block"):
            raise ValueError(f"{policy!r} is not none or block")
        self._recompute = policy == "block"

    def compile_blocks(self) -> None:
        """Compile the forward of each of Swin's layers with torch.compile, at its first call."""
        for layer in self._layers():
            layer.forward = torch.compile(layer.forward)

    def forward(self, image: Tensor, text: Tensor, text_mask: Tensor) -> list[Tensor]:
        """Encode.

        Args:
            image: (B, 3, S, S) normalised.
            text, text_mask: (B, T, text_dim) and (B, T) bool, False at padding.
        Returns:
            Of each stage (B, C, h, w): 1/4, 1/8, 1/16 and 1/32 of the side.
        """
        x, grid = self.embeddings(image)  # (B, N, C)
        out = []
        for i, (stage, pwam, norm) in enumerate(zip(self.stages, self.pwams, self.norms)):
            for block in stage.blocks:
                x = self._layer(block, x, grid)
            r = pwam(x, text, text_mask)
            out.append(rearrange(norm(r), "b (h w) c -> b c h w", h=grid[0]))
            if stage.downsample is not None:
                x = stage.downsample(x + self.gates[i](r) * r, grid)
                grid = tuple((n + 1) // 2 for n in grid)
        return out

    def _layer(self, block: nn.Module, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """One of Swin's layers, its windows shifted on a grid of one window, too, as in the originals' Swin. By default
        `transformers` does not shift there, and cuts windows down to a smaller grid."""
        if self._recompute and torch.is_grad_enabled():
            return checkpoint(block, x, grid, always_partition=True, use_reentrant=False)[0]
        return block(x, grid, always_partition=True)[0]

    def load_pretrained(self, path: str | Path) -> dict[str, list[str]]:
        """Load Swin's own parameters from a folder that `transformers` saved, of an image classifier, too.

        Returns:
            `loaded`, `missing` (of Swin's parameters) and `unexpected` tensor names.
        Raises:
            UserError: no such folder, or one of another size.
        """
        from transformers import SwinModel

        if not (Path(path) / "config.json").exists():
            raise UserError(f"model.checkpoint {path} is no folder with a Swin of transformers: download one, as "
                            "microsoft/swin-base-patch4-window12-384-in22k")  # fmt: skip
        try:
            read: Any = SwinModel.from_pretrained(path, add_pooling_layer=False, output_loading_info=True)
            loaded, info = read[0].state_dict(), read[1]
        except (OSError, ValueError, RuntimeError) as e:
            raise UserError(f"model.checkpoint {path} can't be loaded ({str(e).splitlines()[0]})") from None
        absent = {_our_name(n) for n in info["missing_keys"]}  # which transformers fills with random numbers
        state = {_our_name(n): x for n, x in loaded.items()}
        mine = {n: x for n, x in self.state_dict().items() if n.startswith(("embeddings.", "stages."))}
        if lacking := sorted(absent & mine.keys()):
            raise UserError(
                f"model.checkpoint {path} lacks {len(lacking)} of the Swin's {len(mine)} tensors ({lacking[0]}, ..): "
                "save it whole"
            )
        for name in sorted(state.keys() & mine.keys()):
            if state[name].shape != mine[name].shape:
                have, want = tuple(state[name].shape), tuple(mine[name].shape)
                raise UserError(f"{path} is of another size: {name} is {have}, the model's {want}: give one that fits")
        if not state.keys() & mine.keys():
            raise UserError(f"{path} holds no parameter of a Swin")
        self.load_state_dict({n: state[n] for n in state.keys() & mine.keys()}, strict=False)
        return {
            "loaded": sorted(state.keys() & mine.keys()),
            "missing": sorted(mine.keys() - state.keys()),
            "unexpected": sorted(state.keys() - mine.keys()),
        }


class SwinSegmenter(Segmenter):
    """What LAVT and ReLA have in common: all that is asked of the image encoder, asked of their `backbone`."""

    backbone: TextSwin

    def checkpoint_activations(self, policy: str) -> None:
        """See `TextSwin.checkpoint_activations`."""
        self.backbone.checkpoint_activations(policy)

    def compile_blocks(self) -> None:
        """See `TextSwin.compile_blocks`."""
        self.backbone.compile_blocks()

    def load_pretrained(self, path: str | Path) -> dict[str, list[str]]:
        """See `TextSwin.load_pretrained`; of the authors' checkpoint of this network, and of what `dit-ds export` wrote, all
        parameters."""
        if Path(path).is_file():
            return authors.load(self, path, None) or load_by_name(self, path)
        return self.backbone.load_pretrained(path)


def _our_name(name: str) -> str:
    return name.replace("encoder.layers.", "stages.").replace(".mlp.", ".mlp.0.")

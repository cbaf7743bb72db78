"""LAVT and ReLA, as `authors_networks`."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from authors_networks import LAYERS, State, layer_norm, lin, linear, norm, read_words
from torch import Tensor

SWINS = {  # width, depths, heads, window, LAVT's decoder; ReLA's width, heads, FFN, pixel decoder's FFN and layers, layers
    "swin_t_tiny": (32, (1, 1, 2, 1), (1, 2, 2, 4), 2, 32, 32, 4, 64, 64, 1, 3),
    "swin_b": (128, (2, 2, 18, 2), (4, 8, 16, 32), 12, 512, 256, 8, 2048, 1024, 6, 9),
}


def swin_shapes(size: str, text: int, gates: int) -> dict[str, tuple[int, ...]]:
    d, depths, heads, window = SWINS[size][:4]
    shapes = {"backbone.patch_embed.proj.weight": (d, 3, 4, 4), "backbone.patch_embed.proj.bias": (d,)} | norm(
        "backbone.patch_embed.norm", d
    )
    for i, depth in enumerate(depths):
        c, layer = d * 2**i, f"backbone.layers.{i}."
        for j in range(depth):
            b = f"{layer}blocks.{j}."
            shapes |= norm(f"{b}norm1", c) | linear(f"{b}attn.qkv", c, 3 * c) | linear(f"{b}attn.proj", c, c)
            shapes |= {f"{b}attn.relative_position_bias_table": ((2 * window - 1) ** 2, heads[i]),
                       f"{b}attn.relative_position_index": (window**2, window**2)}  # fmt: skip
            shapes |= norm(f"{b}norm2", c) | linear(f"{b}mlp.fc1", c, 4 * c) | linear(f"{b}mlp.fc2", 4 * c, c)
        f = f"{layer}fusion."
        for name, inputs in (("vis_project", c), ("image_lang_att.f_key", text), ("image_lang_att.f_query", c),
                             ("image_lang_att.f_value", text), ("image_lang_att.W", c), ("project_mm", c)):  # fmt: skip
            shapes |= {f"{f}{name}.0.weight": (c, inputs, 1), f"{f}{name}.0.bias": (c,)}
        if i < gates:
            shapes |= {f"{layer}res_gate.{k}.weight": (c, c) for k in (0, 2)}
        if i < 3:
            shapes |= {f"{layer}downsample.reduction.weight": (2 * c, 4 * c)} | norm(f"{layer}downsample.norm", 4 * c)
        shapes |= norm(f"backbone.norm{i}", c)
    return shapes


def swin_block(w: State, b: str, x: Tensor, side: int, window: int, shift: int, heads: int) -> Tensor:
    """(B, side^2, C): windows of a grid that zeros pad to whole ones, moved by `shift`, with none across an edge."""
    whole = -(-side // window) * window
    y = F.pad(layer_norm(w, f"{b}norm1", x).unflatten(1, (side, side)), (0, 0, 0, whole - side, 0, whole - side))
    rows, columns = (t.flatten() for t in torch.meshgrid(torch.arange(whole), torch.arange(whole), indexing="ij"))
    moved = [(t - shift) % whole for t in (rows, columns)]
    label = torch.stack([*(m // window for m in moved), *(t < shift for t in (rows, columns))], 1)
    together = (label[:, None] == label).all(2)
    offset = [m[:, None] - m + window - 1 for m in moved]
    index = (offset[0] * (2 * window - 1) + offset[1]).clamp(0, (2 * window - 1) ** 2 - 1)
    bias = w[f"{b}attn.relative_position_bias_table"][index].permute(2, 0, 1)
    q, k, v = lin(w, f"{b}attn.qkv", y.flatten(1, 2)).unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
    logits = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5 + bias).masked_fill(~together, -math.inf)
    out = lin(w, f"{b}attn.proj", (logits.softmax(-1) @ v).transpose(1, 2).flatten(2))
    x = x + out.unflatten(1, (whole, whole))[:, :side, :side].flatten(1, 2)
    return x + lin(w, f"{b}mlp.fc2", F.gelu(lin(w, f"{b}mlp.fc1", layer_norm(w, f"{b}norm2", x))))


def pwam(w: State, f: str, x: Tensor, text: Tensor, mask: Tensor) -> Tensor:
    def conv(name: str, y: Tensor) -> Tensor:
        return y @ w[f"{f}{name}.0.weight"][..., 0].T + w[f"{f}{name}.0.bias"]

    def instance(y: Tensor) -> Tensor:
        return (y - y.mean(1, keepdim=True)) / (y.var(1, unbiased=False, keepdim=True) + 1e-5).sqrt()

    m = mask.to(x.dtype)
    q = instance(conv("image_lang_att.f_query", x))
    k, v = (conv(f"image_lang_att.f_{n}", text) * m[..., None] for n in ("key", "value"))
    a = (q @ k.transpose(1, 2) * x.shape[-1] ** -0.5 + 1e4 * m[:, None] - 1e4).softmax(-1)
    said = instance(conv("image_lang_att.W", a @ v))
    return F.gelu(conv("project_mm", F.gelu(conv("vis_project", x)) * said))


def text_swin(w: State, size: str, image: Tensor, text: Tensor, mask: Tensor) -> list[Tensor]:
    _, depths, heads, window = SWINS[size][:4]
    x = F.conv2d(image, w["backbone.patch_embed.proj.weight"], w["backbone.patch_embed.proj.bias"], stride=4)
    side = x.shape[-1]
    x = layer_norm(w, "backbone.patch_embed.norm", x.flatten(2).transpose(1, 2))
    out = []
    for i, depth in enumerate(depths):
        layer = f"backbone.layers.{i}."
        for j in range(depth):
            x = swin_block(w, f"{layer}blocks.{j}.", x, side, window, (j % 2) * (window // 2), heads[i])
        r = pwam(w, f"{layer}fusion.", x, text, mask)
        out.append(layer_norm(w, f"backbone.norm{i}", r).transpose(1, 2).unflatten(2, (side, side)))
        if i < 3:
            x = x + torch.tanh(lin(w, f"{layer}res_gate.2", lin(w, f"{layer}res_gate.0", r).relu())) * r
            grid = x.unflatten(1, (side, side))
            grid = F.pad(grid, (0, 0, 0, side % 2, 0, side % 2))
            four = [grid[:, a::2, b::2] for b in (0, 1) for a in (0, 1)]
            side = (side + 1) // 2
            x = lin(
                w,
                f"{layer}downsample.reduction",
                layer_norm(w, f"{layer}downsample.norm", torch.cat(four, -1).flatten(1, 2)),
            )
    return out


def lavt_shapes(size: str, text: int) -> dict[str, tuple[int, ...]]:
    d, width = SWINS[size][0], SWINS[size][4]
    shapes, below = swin_shapes(size, text, gates=4), 8 * d
    for stage, skip in ((4, 4 * d), (3, 2 * d), (2, d)):
        for n, inputs in ((1, below + skip), (2, width)):
            shapes[f"classifier.conv{n}_{stage}.weight"] = (width, inputs, 3, 3)
            bn = f"classifier.bn{n}_{stage}"
            shapes |= norm(bn, width) | {
                f"{bn}.running_mean": (width,),
                f"{bn}.running_var": (width,),
                f"{bn}.num_batches_tracked": (),
            }
        below = width
    return shapes | {"classifier.conv1_1.weight": (2, width, 1, 1), "classifier.conv1_1.bias": (2,)}


@torch.no_grad()
def lavt(w: State, size: str, image: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
    """With BERT under `text_encoder.`: (B, S/4, S/4), the target's logit less the background's."""
    w = {n: x.double() if x.is_floating_point() else x for n, x in w.items()}
    stages = text_swin(w, size, image, read_words(w, "text_encoder.", tokens, mask, LAYERS), mask)
    x = stages[3]
    for stage in (4, 3, 2):
        x = F.interpolate(x, stages[stage - 2].shape[-2:], mode="bilinear", align_corners=True)
        x = torch.cat([x, stages[stage - 2]], 1)
        for n in (1, 2):
            bn = f"classifier.bn{n}_{stage}."
            x = F.conv2d(x, w[f"classifier.conv{n}_{stage}.weight"], padding=1)
            x = F.batch_norm(x, w[f"{bn}running_mean"], w[f"{bn}running_var"], w[f"{bn}weight"], w[f"{bn}bias"]).relu()
    x = F.conv2d(x, w["classifier.conv1_1.weight"], w["classifier.conv1_1.bias"])
    return x[:, 1] - x[:, 0]


def rela_shapes(size: str, text: int) -> dict[str, tuple[int, ...]]:
    swin_dim, (d, heads, ffn, pixel_ffn, pixel_layers, layers) = SWINS[size][0], SWINS[size][5:]
    shapes = swin_shapes(size, text, gates=3)
    p, q = "sem_seg_head.pixel_decoder.", "sem_seg_head.predictor."
    for i, c in enumerate((8, 4, 2)):
        shapes |= {f"{p}input_proj.{i}.0.weight": (d, c * swin_dim, 1, 1), f"{p}input_proj.{i}.0.bias": (d,)} | norm(
            f"{p}input_proj.{i}.1", d
        )
    shapes[f"{p}transformer.level_embed"] = (3, d)
    for i in range(pixel_layers):
        e = f"{p}transformer.encoder.layers.{i}."
        shapes |= linear(f"{e}self_attn.sampling_offsets", d, heads * 24) | linear(
            f"{e}self_attn.attention_weights", d, heads * 12
        )
        shapes |= (
            linear(f"{e}self_attn.value_proj", d, d) | linear(f"{e}self_attn.output_proj", d, d) | norm(f"{e}norm1", d)
        )
        shapes |= linear(f"{e}linear1", d, pixel_ffn) | linear(f"{e}linear2", pixel_ffn, d) | norm(f"{e}norm2", d)
    shapes |= {f"{p}mask_features.weight": (d, d, 1, 1), f"{p}mask_features.bias": (d,), f"{p}adapter_1.weight": (d, swin_dim, 1, 1),
               f"{p}layer_1.weight": (d, d, 3, 3)} | norm(f"{p}adapter_1.norm", d) | norm(f"{p}layer_1.norm", d)  # fmt: skip

    def attention(name: str) -> dict[str, tuple[int, ...]]:
        return {f"{name}.in_proj_weight": (3 * d, d), f"{name}.in_proj_bias": (3 * d,)} | linear(
            f"{name}.out_proj", d, d
        )

    for i in range(layers):
        for kind, name in (("RLA_vision", "self_attn"), ("RIA_layers", "multihead_attn")):
            shapes |= attention(f"{q}{kind}.{i}.{name}") | norm(f"{q}{kind}.{i}.norm", d)
        f = f"{q}transformer_ffn_layers.{i}."
        shapes |= linear(f"{f}linear1", d, ffn) | linear(f"{f}linear2", ffn, d) | norm(f"{f}norm", d)
    shapes |= attention(f"{q}RLA_lang_att.multihead_attn") | norm(f"{q}RLA_lang_att.norm", d)
    shapes |= {f"{q}lang_weight": (), f"{q}lang_proj.weight": (d, text), f"{q}query_feat.weight": (100, d),
               f"{q}query_embed.weight": (100, d), f"{q}level_embed.weight": (3, d)} | norm(f"{q}decoder_norm", d)  # fmt: skip
    for i, last in enumerate((d, d, d)):
        shapes |= linear(f"{q}mask_embed.layers.{i}", d, last)
    for i, last in enumerate((d, 2)):
        shapes |= linear(f"{q}nt_embed.layers.{i}", d, last)
    return shapes | linear(f"{q}minimap_embed", d, 2)


def sine(h: int, w: int, d: int) -> Tensor:
    """(h * w, d): Mask2Former's."""
    waves = 10000 ** (2 * (torch.arange(d // 2, dtype=torch.double) // 2) / (d // 2))

    def side(n: int) -> Tensor:
        angles = (torch.arange(1, n + 1, dtype=torch.double) / (n + 1e-6) * 2 * math.pi)[:, None] / waves
        return torch.stack([angles[:, 0::2].sin(), angles[:, 1::2].cos()], -1).flatten(1)

    return torch.cat([side(h)[:, None].expand(h, w, -1), side(w)[None].expand(h, w, -1)], -1).flatten(0, 1)


def group(w: State, name: str, x: Tensor) -> Tensor:
    return F.group_norm(x, 32, w[f"{name}.weight"], w[f"{name}.bias"])


def deformable(w: State, name: str, query: Tensor, src: Tensor, shapes: list[tuple[int, int]], heads: int) -> Tensor:
    b, n, d = src.shape
    value = lin(w, f"{name}.value_proj", src).unflatten(-1, (heads, d // heads))
    offsets = lin(w, f"{name}.sampling_offsets", query).unflatten(-1, (heads, 3, 4, 2))
    weights = lin(w, f"{name}.attention_weights", query).unflatten(-1, (heads, 12)).softmax(-1).unflatten(-1, (3, 4))
    places = [
        torch.stack([((torch.arange(h * ww) % ww) + 0.5) / ww, ((torch.arange(h * ww) // ww) + 0.5) / h], -1)
        for h, ww in shapes
    ]
    reference = torch.cat(places).double()  # (N, 2), x and y
    out, start = torch.zeros(b, n, heads, d // heads, dtype=src.dtype), 0
    for level, (h, ww) in enumerate(shapes):
        v = value[:, start : start + h * ww].permute(0, 2, 3, 1).reshape(b * heads, d // heads, h, ww)
        start += h * ww
        at = reference[None, :, None, None] + offsets[:, :, :, level] / torch.tensor([ww, h])  # (B, N, heads, 4, 2)
        grid = (2 * at - 1).transpose(1, 2).flatten(0, 1)
        read = F.grid_sample(v, grid, mode="bilinear", padding_mode="zeros", align_corners=False)  # (B heads, d, N, 4)
        read = read.unflatten(0, (b, heads)).permute(0, 3, 1, 4, 2)  # (B, N, heads, 4, d)
        out = out + (read * weights[:, :, :, level, :, None]).sum(3)
    return lin(w, f"{name}.output_proj", out.flatten(2))


def pixel_decoder(w: State, stages: list[Tensor], d: int, heads: int, layers: int) -> tuple[list[Tensor], Tensor]:
    p = "sem_seg_head.pixel_decoder."
    src, pos, shapes = [], [], []
    for i, x in enumerate(stages[:0:-1]):
        x = group(
            w, f"{p}input_proj.{i}.1", F.conv2d(x, w[f"{p}input_proj.{i}.0.weight"], w[f"{p}input_proj.{i}.0.bias"])
        )
        shapes.append((x.shape[2], x.shape[3]))
        src.append(x.flatten(2).transpose(1, 2))
        pos.append(sine(*shapes[-1], d) + w[f"{p}transformer.level_embed"][i])
    x, position = torch.cat(src, 1), torch.cat(pos)
    for i in range(layers):
        e = f"{p}transformer.encoder.layers.{i}."
        x = layer_norm(w, f"{e}norm1", x + deformable(w, f"{e}self_attn", x + position, x, shapes, heads))
        x = layer_norm(w, f"{e}norm2", x + lin(w, f"{e}linear2", lin(w, f"{e}linear1", x).relu()))
    levels = [y.transpose(1, 2).unflatten(2, s) for y, s in zip(x.split([h * v for h, v in shapes], 1), shapes)]
    fine = group(w, f"{p}adapter_1.norm", F.conv2d(stages[0], w[f"{p}adapter_1.weight"]))
    fine = fine + F.interpolate(levels[2], fine.shape[-2:], mode="bilinear", align_corners=False)
    fine = group(w, f"{p}layer_1.norm", F.conv2d(fine, w[f"{p}layer_1.weight"], padding=1)).relu()
    return levels, F.conv2d(fine, w[f"{p}mask_features.weight"], w[f"{p}mask_features.bias"])


def mha(w: State, name: str, heads: int, q: Tensor, k: Tensor, v: Tensor, closed: Tensor | None = None) -> Tensor:
    w_in, b_in = w[f"{name}.in_proj_weight"].chunk(3), w[f"{name}.in_proj_bias"].chunk(3)
    q, k, v = (F.linear(x, a, b).unflatten(-1, (heads, -1)).transpose(1, 2) for x, a, b in zip((q, k, v), w_in, b_in))
    logits = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    if closed is not None:
        logits = logits.masked_fill(closed[:, None], -math.inf)
    return lin(w, f"{name}.out_proj", (logits.softmax(-1) @ v).transpose(1, 2).flatten(2))


@torch.no_grad()
def rela(w: State, size: str, image: Tensor, tokens: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """(B, S/4, S/4), the target's logit less the background's, and (B,) bool: that there is no target."""
    d, heads, _, _, pixel_layers, layers = SWINS[size][5:]
    w = {n: x.double() if x.is_floating_point() else x for n, x in w.items()}
    text = read_words(w, "text_encoder.", tokens, mask, LAYERS)
    levels, features = pixel_decoder(w, text_swin(w, size, image, text, mask), d, heads, pixel_layers)
    p = "sem_seg_head.predictor."

    def embedded(x: Tensor) -> Tensor:
        for i in range(3):
            x = lin(w, f"{p}mask_embed.layers.{i}", x if i == 0 else x.relu())
        return x

    x, place = w[f"{p}query_feat.weight"].expand(len(image), -1, -1), w[f"{p}query_embed.weight"]
    for i in range(layers):
        level = levels[i % 3]
        masks = torch.einsum("bqd,bdhw->bqhw", embedded(layer_norm(w, f"{p}decoder_norm", x)), features)
        closed = F.interpolate(masks, level.shape[-2:], mode="bilinear", align_corners=False).flatten(2).sigmoid() < 0.5
        closed = closed & ~closed.all(-1, keepdim=True)
        visual = level.flatten(2).transpose(1, 2) + w[f"{p}level_embed.weight"][i % 3]
        said = mha(
            w,
            f"{p}RIA_layers.{i}.multihead_attn",
            heads,
            x + place,
            visual + sine(*level.shape[-2:], d),
            visual,
            closed,
        )
        x = layer_norm(w, f"{p}RIA_layers.{i}.norm", x + said)
        if i == 0:
            words = lin(w, f"{p}lang_proj", text)
            said = layer_norm(
                w, f"{p}RLA_lang_att.norm", x + mha(w, f"{p}RLA_lang_att.multihead_attn", heads, x, words, words)
            )
            x = x + said * w[f"{p}lang_weight"].sigmoid() * 0.1
        x = layer_norm(
            w, f"{p}RLA_vision.{i}.norm", x + mha(w, f"{p}RLA_vision.{i}.self_attn", heads, x + place, x + place, x)
        )
        f = f"{p}transformer_ffn_layers.{i}."
        x = layer_norm(w, f"{f}norm", x + lin(w, f"{f}linear2", lin(w, f"{f}linear1", x).relu()))
    x = layer_norm(w, f"{p}decoder_norm", x)
    target = torch.einsum("bqa,bqd,bdhw->bahw", lin(w, f"{p}minimap_embed", x), embedded(x), features)
    none = lin(w, f"{p}nt_embed.layers.1", lin(w, f"{p}nt_embed.layers.0", x).relu()).mean(1)
    return target[:, 1] - target[:, 0], none[:, 1] > none[:, 0]

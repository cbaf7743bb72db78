"""The authors' networks on the names in their checkpoints, written out over PyTorch, BERT of `transformers` and SAM's own
modules; and made-up checkpoints of them. Nothing here is the package's."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

State = dict[str, Tensor]
WORDS, HIDDEN, LAYERS = 300, 512, 3  # of BERT: its vocabulary, its FFN's width, its layers
TOKENS = 20


def draw(shapes: dict[str, tuple[int, ...]], seed: int = 0) -> State:
    """Random weights, at the scales of trained ones."""
    g = torch.Generator().manual_seed(seed)
    out = {}
    for name, shape in shapes.items():
        x = torch.randn(shape, generator=g)
        if "running_var" in name:
            x = x.square() + 0.5
        elif "num_batches" in name:
            x = torch.tensor(7)
        elif "position_index" in name:
            x = torch.zeros(shape, dtype=torch.long)
        elif len(shape) > 1:
            fan = math.prod(shape[1:]) if "embed" not in name and "tokens" not in name else 25
            x = x / math.sqrt(fan)
        elif name.endswith("weight"):
            x = 1 + 0.1 * x
        else:
            x = 0.1 * x
        out[name] = x
    return out


def linear(name: str, inputs: int, outputs: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}


def norm(name: str, dim: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (dim,), f"{name}.bias": (dim,)}


def of(w: State, prefix: str) -> State:
    return {n.removeprefix(prefix): x for n, x in w.items() if n.startswith(prefix)}


def lin(w: State, name: str, x: Tensor) -> Tensor:
    return F.linear(x, w[f"{name}.weight"], w.get(f"{name}.bias"))


def layer_norm(w: State, name: str, x: Tensor, eps: float = 1e-5) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], eps)


def bert(dim: int, layers: int, pooler: bool = False):
    from transformers import BertConfig, BertModel

    heads = max(1, dim // 64)
    config = BertConfig(vocab_size=WORDS, hidden_size=dim, num_hidden_layers=layers, num_attention_heads=heads,
                        intermediate_size=HIDDEN, max_position_embeddings=32)  # fmt: skip
    return BertModel(config, add_pooling_layer=pooler)


def bert_shapes(prefix: str, dim: int, pooler: bool) -> dict[str, tuple[int, ...]]:
    return {f"{prefix}{n}": tuple(x.shape) for n, x in bert(dim, LAYERS, pooler).state_dict().items()}


def read_words(w: State, prefix: str, tokens: Tensor, mask: Tensor, layers: int) -> Tensor:
    names = of(w, prefix)
    model = bert(names["embeddings.word_embeddings.weight"].shape[1], layers).double().eval()
    model.load_state_dict({n: x for n, x in names.items() if n in model.state_dict()})
    with torch.no_grad():
        return model(tokens, attention_mask=mask).last_hidden_state


# --- DIT --------------------------------------------------------------------------------------------------------------


def sam(dim: int, depth: int, heads: int, out: int, decoder_layers: int, decoder_mlp: int, globals_: tuple[int, ...]):
    from segment_anything.modeling import ImageEncoderViT, MaskDecoder, PromptEncoder, TwoWayTransformer

    vit = ImageEncoderViT(
        img_size=1024, patch_size=16, embed_dim=dim, depth=depth, num_heads=heads, out_chans=out, use_rel_pos=True,
        window_size=14, global_attn_indexes=globals_,
    )  # fmt: skip
    prompts = PromptEncoder(out, (64, 64), (1024, 1024), mask_in_chans=16)
    transformer = TwoWayTransformer(decoder_layers, out, num_heads=8, mlp_dim=decoder_mlp)
    return vit, prompts, MaskDecoder(transformer_dim=out, transformer=transformer)


SIZES = {  # width, depth, heads, SAM's prompt width, the mask decoder's FFN, layers that attend globally
    "vit_t": (128, 4, 4, 64, 256, (1, 3)),
    "vit_b": (768, 12, 12, 256, 2048, (2, 5, 8, 11)),
    "vit_h": (1280, 32, 16, 256, 2048, (7, 15, 23, 31)),
}


def dit_shapes(size: str, scheme: str, decoder_layers: int = 2, static: bool = False, text: int | None = None):
    d, depth, heads, out, mlp, globals_ = SIZES[size]
    text = text or d  # BERT's 768 is as wide as ViT-B
    with torch.device("meta"):
        vit, prompts, decoder = sam(d, depth, heads, out, decoder_layers, mlp, globals_)
    shapes = {}
    for prefix, part in (("visual_encoder", vit), ("prompt_encoder", prompts), ("mask_decoder", decoder)):
        shapes |= {f"{prefix}.{n}": tuple(x.shape) for n, x in part.state_dict().items()}
    v = "visual_encoder."
    if text != d:
        shapes |= linear(f"{v}prob_text", text, d)
    if static:
        shapes[f"{v}tokens"] = (depth - (scheme == "end_to_end"), TOKENS, d)
        shapes |= linear(f"{v}probs", d, d) if scheme == "end_to_end" else {}
    elif scheme not in ("default", "cross_attention_ffn"):
        for i in range(depth):
            shapes |= linear(f"{v}probs.{i}", d, d)
    for i in range({"cross_attention": depth - 1, "cross_attention_ffn": depth}.get(scheme, 0)):
        a = f"{v}cross.{i}." + ("mhatt." if scheme == "cross_attention_ffn" else "")
        for x in "vkq":
            shapes |= linear(f"{a}linear_{x}", d, 512)
        shapes |= linear(f"{a}linear_merge", 512, d) | norm(f"{v}ln.{i}", d)
        if scheme == "cross_attention_ffn":
            c = f"{v}cross.{i}."
            shapes |= linear(f"{c}ffn.mlp.fc.linear", d, 2048) | linear(f"{c}ffn.mlp.linear", 2048, d)
            shapes |= norm(f"{c}norm1", d) | norm(f"{c}norm2", d)
    shapes |= bert_shapes("lang_encoder.bert.", text, pooler=True) | linear("text_proj", text, out)
    if scheme == "default":
        return shapes
    a = "self_attention."  # made, and used by nothing
    shapes |= {
        "query_embeddings": (1, 4, text),
        f"{a}in_proj_weight": (3 * text, text),
        f"{a}in_proj_bias": (3 * text,),
    }
    return shapes | linear(f"{a}out_proj", text, text)


def unbiased_norm(w: State, name: str, x: Tensor) -> Tensor:
    mean, std = x.mean(-1, keepdim=True), x.std(-1, keepdim=True)
    return w[f"{name}.weight"] * (x - mean) / (std + 1e-6) + w[f"{name}.bias"]


def eight_heads(w: State, name: str, x: Tensor, keys: Tensor) -> Tensor:
    q, k, v = (
        lin(w, f"{name}linear_{n}", y).unflatten(-1, (8, 64)).transpose(1, 2)
        for n, y in (("q", x), ("k", keys), ("v", keys))
    )
    out = (q @ k.transpose(-1, -2) / 8).softmax(-1) @ v
    return lin(w, f"{name}linear_merge", out.transpose(1, 2).flatten(2))


def words_of_layer(w: State, scheme: str, i: int, text: Tensor, left: Tensor | None, image: Tensor) -> Tensor:
    if scheme == "cross_attention_ffn":
        c = f"cross.{i}."
        q1 = unbiased_norm(w, f"{c}norm1", text + eight_heads(w, f"{c}mhatt.", text, image))
        q2 = unbiased_norm(
            w, f"{c}norm2", q1 + lin(w, f"{c}ffn.mlp.linear", lin(w, f"{c}ffn.mlp.fc.linear", q1).relu())
        )
        return unbiased_norm(w, f"ln.{i}", text + q2)
    static = w.get("tokens")
    if scheme == "layer_wise":
        return lin(w, f"probs.{i}", text) if static is None else text + static[i]
    if scheme == "end_to_end":
        if i == 0:
            return lin(w, "probs.0" if static is None else "probs", text)
        return lin(w, f"probs.{i}", left) if static is None else left + static[i - 1]
    own = lin(w, f"probs.{i}", text)
    return own if i == 0 else unbiased_norm(w, f"ln.{i - 1}", own + eight_heads(w, f"cross.{i - 1}.", text, left))


def vit_block(w: State, b: str, x: Tensor, t: int, side: int, heads: int) -> Tensor:
    """SAM's layer over t text tokens and side^2 visual ones, which alone have positions."""
    n, d = side * side, x.shape[-1] // heads
    q, k, v = (
        lin(w, f"{b}attn.qkv", layer_norm(w, f"{b}norm1", x, 1e-6)).unflatten(-1, (3, heads, d)).permute(2, 0, 3, 1, 4)
    )
    logits = q @ k.transpose(-1, -2) / d**0.5
    tables = [F.interpolate(w[f"{b}attn.rel_pos_{a}"].T[None], size=2 * side - 1, mode="linear")[0].T for a in "hw"]
    at = torch.arange(n)
    for table, place in zip(tables, (at // side, at % side)):
        bias = table[place[:, None] - place + side - 1]  # (n, n, d)
        logits[:, :, t:, t:] += torch.einsum("bhnd,nmd->bhnm", q[:, :, t:], bias)
    x = x + lin(w, f"{b}attn.proj", (logits.softmax(-1) @ v).transpose(1, 2).flatten(2))
    return x + lin(w, f"{b}mlp.lin2", F.gelu(lin(w, f"{b}mlp.lin1", layer_norm(w, f"{b}norm2", x, 1e-6))))


@torch.no_grad()
def dit(w: State, size: str, scheme: str, image: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
    """(B, 3, S, S) normalised, (B, T) and (B, T) to (B, S/4, S/4) logits."""
    _, depth, heads, out, mlp, globals_ = SIZES[size]
    w = {n: x.double() if x.is_floating_point() else x for n, x in w.items()}
    v = of(w, "visual_encoder.")
    text = raw = read_words(w, "lang_encoder.bert.", tokens, mask, layers=1)
    if "prob_text.weight" in v:
        text = lin(v, "prob_text", text)
    x = F.conv2d(image, v["patch_embed.proj.weight"], v["patch_embed.proj.bias"], stride=16)
    side = x.shape[-1]
    x = x + F.interpolate(v["pos_embed"].permute(0, 3, 1, 2), (side, side), mode="bicubic", align_corners=False)
    x, left, t = x.flatten(2).transpose(1, 2), None, 0 if scheme == "default" else text.shape[1]
    for i in range(depth):
        if t:
            x = torch.cat([words_of_layer(v, scheme, i, text, left, x), x], 1)
        x = vit_block(v, f"blocks.{i}.", x, t, side, heads)
        left, x = x[:, :t], x[:, t:]
    vit, _, decoder = sam(
        SIZES[size][0],
        0,
        heads,
        out,
        1 + max(int(n.split(".")[3]) for n in w if n.startswith("mask_decoder.transformer.layers.")),
        mlp,
        (),
    )
    vit.neck.double().load_state_dict(of(v, "neck."))
    decoder.double().load_state_dict(of(w, "mask_decoder."))
    x = vit.neck(x.transpose(1, 2).unflatten(2, (side, side)))
    place = (torch.arange(side, dtype=torch.double) + 0.5) / side * 2 - 1
    xy = torch.stack([place.expand(side, side), place[:, None].expand(side, side)], -1)
    angles = 2 * math.pi * (xy @ w["prompt_encoder.pe_layer.positional_encoding_gaussian_matrix"])
    positions = torch.cat([angles.sin(), angles.cos()], -1).permute(2, 0, 1)[None]
    dense = w["prompt_encoder.no_mask_embed.weight"].view(1, -1, 1, 1).expand(1, -1, side, side)
    words = lin(w, "text_proj", raw)
    masks = [decoder.predict_masks(x[b : b + 1], positions, words[b : b + 1], dense)[0][:, 0] for b in range(len(x))]
    return torch.cat(masks)

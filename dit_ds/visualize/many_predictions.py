"""Many pictures segmented into a folder: as COCO results, masks or drawn over the pictures."""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from dit_ds.checkpointing.weights import weights_digest, with_data_root
from dit_ds.data.build import build_eval_dataset
from dit_ds.data.expressions import normalise_expression
from dit_ds.data.loading.tokenize import make_token_check
from dit_ds.data.picture_texts import PictureTexts, read_picture_texts
from dit_ds.data.progress import progress_bar
from dit_ds.distributed import share_cores
from dit_ds.evaluation.coco_results import CATEGORIES, coco_result
from dit_ds.evaluation.inference import check_kind
from dit_ds.evaluation.many.folder import ResultsFolder
from dit_ds.evaluation.many.loop import Answer, predict_pictures
from dit_ds.evaluation.many.pictures import Cut
from dit_ds.evaluation.many.sources import FileSource, Source, SplitSource
from dit_ds.evaluation.predictor import Predictor
from dit_ds.files import atomic_write, write_json
from dit_ds.models.text_encoder import load_tokenizer
from dit_ds.visualize.drawing import overlay_with_text, save_picture

FORMATS = ("coco", "masks", "overlay")
_WRITERS = 8  # threads that encode and write a batch's files; mostly they wait for the disk
_MOST_NAMED = 5  # bad pictures, on stderr; all are in left_out.txt
_JPEG_SIDE = 65_000  # pixels; a JPEG can have few more
_log = logging.getLogger("dit_ds")


@dataclass(frozen=True)
class ManyPictures:
    """What is asked of `predict_many`.

    Attributes:
        images, texts, text: as for `read_picture_texts`; or
        split: of the run's set in shards, every expression of it, and `data_root`, where they are, if not where the run
            read them.
        form: one of `FORMATS`.
        cut: how pictures are cut.
        batch_size, workers, threshold: as for `predict_pictures` and `Predictor`; by default the run's.
    """

    images: str | None = None
    texts: str | None = None
    text: str | None = None
    split: str | None = None
    data_root: str | None = None
    form: str = "coco"
    cut: Cut = Cut()
    batch_size: int | None = None
    workers: int | None = None
    threshold: float | None = None


def predict_many(path: str, out: str, asked: ManyPictures) -> dict[str, Any]:
    """`dit-ds predict` of many pictures. Stopped and called again it goes on, and answers nothing twice.

    Args:
        path: as for `load_model`.
        out: folder to write to.
    Returns:
        `out`, `results`: the file that has them all, `pictures`, `expressions`, `before`: how many were there already,
        `seconds` that the others took, `left_out`: pictures that can't be read, what of the texts was not used, `warnings`.
    Raises:
        UserError: a request that can't be met.
    """
    wanted = None if asked.images is None else read_picture_texts(asked.images, asked.texts, asked.text)
    predictor = Predictor.load(path, threshold=asked.threshold)
    check_kind(predictor.config, "text")
    source: Source
    if wanted is not None:
        source = FileSource(wanted)
    else:
        config = with_data_root(path, predictor.config, asked.data_root)
        source = SplitSource(build_eval_dataset(config, str(asked.split), kind="text"))
    request: dict[str, Any] = {"format": asked.form, "threshold": predictor.postprocess.threshold}
    request |= predictor.config.data.model_dump(include={"image_size", "resize", "tokens"})
    request |= {"mask_rule": predictor.postprocess.rule}
    request |= {"tile": asked.cut.tile, "overlap": asked.cut.overlap} if asked.cut.tile else {}
    folder = ResultsFolder(out, request | {"weights": weights_digest(predictor.model)} | source.request)
    start = time.perf_counter()
    _answer(predictor, source, asked, folder)
    left_out = _finish(folder, asked.form)
    seconds = time.perf_counter() - start
    results = str(folder.path / ("results.json" if asked.form == "coco" else "results.jsonl"))
    result = {"out": out, "results": results, "pictures": len(source.counts), "expressions": int(source.counts.sum())}
    result |= {"before": folder.done, "seconds": round(seconds, 2), "left_out": left_out}
    warnings = [] if wanted is None else _text_warnings(predictor, wanted)
    if asked.cut.tile and predictor.postprocess.rule != "probability":
        warnings.append("masks of tiles are thresholded probabilities, other than eval.mask_rule of the run says")
    return result | ({} if wanted is None else wanted.counts) | {"warnings": warnings}


def _answer(predictor: Predictor, source: Source, asked: ManyPictures, folder: ResultsFolder) -> None:
    """Answer what the folder does not have yet."""
    config, total, done = predictor.config, int(source.counts.sum()), folder.done
    workers = config.data.workers if asked.workers is None else asked.workers
    _log.info(f"PyTorch's threads: {share_cores(1, workers)}")
    record = _RECORDS[asked.form](folder.path, source)
    how = {"batch_size": asked.batch_size or config.eval.batch_size, "workers": workers}
    bar = progress_bar(desc="predict", total=total, initial=done, unit="expression", mininterval=1)
    written: Iterator[dict[str, Any]] = iter(())  # the former batch's records, made while the model has the next one
    with bar, ThreadPoolExecutor(_WRITERS) as pool:
        for answers in predict_pictures(predictor, source, asked.cut, **how, done=done) if done < total else ():
            written, former = pool.map(record, itertools.count(done + 1), answers), written
            done += len(answers)
            bar.update(folder.append(list(former)))
        bar.update(folder.append(list(written)))


_Record = Callable[[int, Answer], dict[str, Any]]


def _coco(folder: Path, source: Source) -> _Record:
    def record(number: int, a: Answer) -> dict[str, Any]:
        if a.error is not None:
            return a.expression | {"error": a.error}
        return coco_result(a.expression, *a.found, a.no_target, a.vetoed)

    return record


def _with_file(folder: Path, source: Source, save: Callable[[str, Answer], str]) -> _Record:
    """A record that names a file, which `save` writes: its name, without an ending, begins with the expression's number."""

    def record(number: int, a: Answer) -> dict[str, Any]:
        if a.error is not None:
            return a.expression | {"error": a.error}
        file = save(f"{number:06d}_{Path(a.expression['image']).stem[:50]}", a)
        covered = {"covered": round(float(a.found.mask.mean()), 4), "score": a.found.score}
        return a.expression | {"file": file} | covered | ({} if a.no_target is None else {"no_target": a.no_target})

    return record


def _masks(folder: Path, source: Source) -> _Record:
    def save(name: str, a: Answer) -> str:
        file = f"masks/{name}.png"
        save_picture(Image.fromarray(a.found.mask.astype(np.uint8) * 255), folder / file)
        return file

    return _with_file(folder, source, save)


def _overlays(folder: Path, source: Source) -> _Record:
    last: dict[int, np.ndarray] = {}  # the picture that was read last, for its other expressions
    lock = threading.Lock()

    def save(name: str, a: Answer) -> str:
        with lock:
            if a.picture not in last:
                last.clear()
                last[a.picture] = source.pixels(a.picture)
            pixels = last[a.picture]
        file = f"overlays/{name}.{'jpg' if max(pixels.shape) < _JPEG_SIDE else 'png'}"
        save_picture(overlay_with_text(pixels, a.found.mask, a.expression["text"]), folder / file, quality=95)
        return file

    return _with_file(folder, source, save)


_RECORDS: dict[str, Callable[[Path, Source], _Record]] = {"coco": _coco, "masks": _masks, "overlay": _overlays}


def _finish(folder: ResultsFolder, form: str) -> int:
    """Write what is made of all lines; the number of pictures that could not be read."""
    errors: dict[str, str] = {}
    images: dict[int, dict[str, Any]] = {}

    def good() -> Iterator[dict[str, Any]]:
        for record in folder.records():
            if "error" in record:
                errors[record["image"]] = record["error"]
                continue
            if form == "coco":
                height, width = record["segmentation"]["size"]
                about = {"file_name": record["image"], "height": height, "width": width}
                images[record["image_id"]] = {"id": record["image_id"]} | about
            yield record

    if form == "coco":
        folder.write_list("results.json", good())
        write_json(
            folder.path / "images.json",
            {"images": list(images.values()), "categories": CATEGORIES, "annotations": []},
        )
    else:
        for _ in good():
            pass
    folder.close()
    if errors:
        with atomic_write(folder.path / "left_out.txt") as f:
            f.write("".join(f"{e}\n" for e in errors.values()).encode(errors="replace"))
        for line in list(errors.values())[:_MOST_NAMED]:
            _log.warning(f"warning: left out: {line}")
    return len(errors)


def _text_warnings(predictor: Predictor, wanted: PictureTexts) -> list[str]:
    """How many texts the model can't read as they are."""
    config = predictor.config
    check = make_token_check(load_tokenizer(config.text.tokenizer or config.text.name), config.data.tokens)
    found = [check(normalise_expression(w.text)) for texts in wanted.texts for w in texts]
    cut, unknown = sum(f.cut for f in found), sum(f.mostly_unknown for f in found)
    lines = (
        [f"{cut} of {len(found)} texts are longer than data.tokens {config.data.tokens}: their ends are not read"]
        if cut
        else []
    )
    return lines + ([f"of {unknown} of {len(found)} texts the model knows few words"] if unknown else [])

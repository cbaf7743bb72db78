"""The commands that predict: `predict`, one picture or many, and `eval`, which scores predictions."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from dit_ds.cli.arguments import Coordinates, from_one, probability, whole
from dit_ds.cli.output import command, key_lines, report, report_and_warn
from dit_ds.errors import UserError

_ONE = ("point", "box")  # options of one picture, and of many
_MANY = ("texts", "format", "batch_size", "workers", "tile", "overlap", "skip_bad", "data_root")
# options that a file of results leaves nothing to say to
_OF_A_MODEL = ("prompt", "batch_size", "workers", "threshold", "image_size", "shuffle_text", "write_masks")


def add(commands: Any) -> None:
    """Add `eval` and `predict` to the parser's commands."""
    _add_eval(commands)
    _add_predict(commands)


def _add_eval(commands: Any) -> None:
    p = command(
        commands,
        "eval",
        _eval,
        "evaluate a run's best checkpoint, or a given one, on one split; or a file of anyone's predictions",
    )
    p.add_argument(
        "run_or_checkpoint",
        nargs="?",
        help="a run's folder or one of its checkpoints/step_*; or a YAML file: its model.checkpoint, not tuned",
    )
    p.add_argument("--split", default="val", help="val, testA, testB, test, ... (default val)")
    p.add_argument(
        "--prompt",
        choices=["text", "point", "box"],
        help="what says which object is meant; points and boxes are made of the ground truth (default: text, if the run "
        "was trained on it)",
    )
    p.add_argument("--data-root", help="where the shards are, if they moved since training")
    p.add_argument("--batch-size", type=from_one, help="expressions at once on a rank (default: the run's)")
    p.add_argument("--workers", type=whole(0, 1024), help="loader processes a rank (default: the run's)")
    p.add_argument(
        "--threshold", type=probability, help="a pixel is in above this probability (default: the run's, 0.35)"
    )
    p.add_argument(
        "--image-size", type=whole(16, 8192), help="side of the square input, in pixels (default: the run's)"
    )
    p.add_argument("--shuffle-text", action="store_true", help="control: give each image another image's expressions")
    p.add_argument("--write-masks", metavar="DIR", help="write each predicted mask as DIR/IMAGE_EXPRESSION.png")
    p.add_argument(
        "--predictions",
        metavar="FILE",
        help="score this list of COCO results instead of a model, as `dit-ds predict --split` writes it; expressions are "
        "found by ref_id and sent_id, by sent_id, or by image_id and text",
    )
    p.add_argument("--dataset", help="with --predictions: the set (default: the run's, or refcoco)")
    p.add_argument("--split-by", help="with --predictions: its way of splitting (default: the run's, or unc)")
    p.add_argument(
        "--allow-missing", action="store_true", help="with --predictions: an expression without one has an empty mask"
    )


def _add_predict(commands: Any) -> None:
    p = command(commands, "predict", _predict, "segment what words, points or a box mean: in one picture, or in many")
    p.add_argument("checkpoint", help="a run's folder or one of its checkpoints/step_*")
    p.add_argument("--image", help="the picture")
    p.add_argument(
        "--images", metavar="FOLDER|LIST", help="many: a folder, or a text file with a picture's path a line"
    )
    p.add_argument("--split", help="many: every expression of this split of the run's set: val, testA, ...")
    p.add_argument("--text", help="the words, as 'the left star'; with --images for every picture")
    p.add_argument(
        "--texts",
        metavar="FILE",
        help='with --images: a .jsonl file of {"image": "a.jpg", "text": "the left star"}, or a .csv file of image,text; '
        "images by their paths below FOLDER, or as LIST has them; a sent_id is kept",
    )
    p.add_argument(
        "--point",
        metavar="X,Y",
        type=Coordinates("X,Y"),
        action="append",
        default=[],
        help="a point on the object, in pixels of the picture as viewers show it; may be repeated",
    )
    p.add_argument("--box", metavar="X0,Y0,X1,Y1", type=Coordinates("X0,Y0,X1,Y1"), help="a box around the object")
    p.add_argument(
        "--out",
        required=True,
        help="picture to write: the picture beside the prediction; of many, a folder: the same command goes on where it "
        "was stopped",
    )
    p.add_argument(
        "--format",
        choices=["coco", "masks", "overlay"],
        help="of many: COCO results with RLE, which pycocotools and `dit-ds eval --predictions` read (default); a PNG of "
        "0 and 255 each; or the picture with the mask and the words",
    )
    p.add_argument(
        "--threshold", type=probability, help="a pixel is in above this probability (default: the run's, 0.35)"
    )
    p.add_argument(
        "--batch-size", type=from_one, help="of many: expressions at once (default: the run's eval.batch_size)"
    )
    p.add_argument("--workers", type=whole(0, 1024), help="of many: processes that read pictures (default: the run's)")
    p.add_argument(
        "--tile",
        type=whole(32, 65536),
        metavar="PIXELS",
        help="of many: cut larger pictures into tiles of this side, for small objects; words of place, as 'left', then "
        "mean a tile's left",
    )
    p.add_argument(
        "--overlap", type=whole(0, 32768), metavar="PIXELS", help="of tiles beside each other, at least (default 128)"
    )
    p.add_argument(
        "--skip-bad", action="store_true", help="of many: leave out pictures that can't be read, and name them"
    )
    p.add_argument("--data-root", help="with --split: where the shards are, if they moved since training")


def _options(args: argparse.Namespace, names: tuple[str, ...]) -> str | None:
    """The first of these options that was given, as it is written."""
    given = [n for n in names if getattr(args, n) not in (None, False, [])]
    return "--" + given[0].replace("_", "-") if given else None


def _eval(args: argparse.Namespace) -> int:
    if args.predictions is not None:
        return _score(args)
    if args.run_or_checkpoint is None:
        raise UserError("a run or checkpoint is required, or --predictions FILE: see 'dit-ds eval --help'")
    if option := _options(args, ("dataset", "split_by", "allow_missing")):
        raise UserError(f"{option} is for --predictions FILE: leave it out")
    from dit_ds.evaluation.evaluate import evaluate_checkpoint

    result = evaluate_checkpoint(
        args.run_or_checkpoint,
        args.split,
        data_root=args.data_root,
        batch_size=args.batch_size,
        workers=args.workers,
        shuffle_text=args.shuffle_text,
        threshold=args.threshold,
        predictions=args.write_masks,
        prompt=args.prompt,
        image_size=args.image_size,
    )
    report(args, result, lambda: [*key_lines(result), *_sheet_line(args)])
    return 0


def _sheet_line(args: argparse.Namespace) -> list[str]:
    """How to look at what was evaluated; not of a model that was not trained by us, which a YAML file names."""
    if Path(args.run_or_checkpoint).suffix in (".yaml", ".yml"):
        return []
    shards = f" --data-root {args.data_root}" if args.data_root else ""
    return [f"next: dit-ds sheet {args.run_or_checkpoint} --split {args.split}{shards} --out sheet.png"]


def _score(args: argparse.Namespace) -> int:
    if option := _options(args, _OF_A_MODEL):
        raise UserError(f"{option} is about a model's predictions, and --predictions are made already: leave it out")
    from dit_ds.evaluation.evaluate import evaluate_results

    report(
        args,
        evaluate_results(
            args.predictions,
            args.split,
            path=args.run_or_checkpoint,
            data_root=args.data_root,
            dataset=args.dataset,
            split_by=args.split_by,
            allow_missing=args.allow_missing,
        ),
    )
    return 0


def _predict(args: argparse.Namespace) -> int:
    sources = [n for n in ("image", "images", "split") if getattr(args, n) is not None]
    if len(sources) != 1:
        raise UserError(
            "give one of --image PICTURE, --images FOLDER|LIST and --split SPLIT: see 'dit-ds predict --help'"
        )
    if sources == ["image"]:
        return _predict_one(args)
    unused = _ONE + (("data_root",) if sources == ["images"] else ("text", "texts"))
    if option := _options(args, unused):
        raise UserError(f"{option} does not go with --{sources[0]}: leave it out")
    if args.text is not None and args.texts is not None:
        raise UserError("--text is for every picture, --texts for each its own: give one of them")
    if args.overlap is not None and args.tile is None:
        raise UserError("--overlap is of tiles: give --tile, too")
    overlap = 128 if args.overlap is None else args.overlap
    if args.tile is not None and 2 * overlap > args.tile:
        raise UserError(f"--overlap {overlap} is more than half of --tile {args.tile}: give --overlap {args.tile // 8}")
    from dit_ds.visualize.many_predictions import Cut, ManyPictures, predict_many

    asked = ManyPictures(
        images=args.images,
        texts=args.texts,
        text=args.text,
        split=args.split,
        data_root=args.data_root,
        form=args.format or "coco",
        cut=Cut(args.tile, overlap, args.skip_bad),
        batch_size=args.batch_size,
        workers=args.workers,
        threshold=args.threshold,
    )
    result = predict_many(args.checkpoint, args.out, asked)
    report_and_warn(args, result, lambda: _many_lines(args, result))
    return 0


def _many_lines(args: argparse.Namespace, result: dict[str, Any]) -> list[str]:
    said = f"{result['expressions']} expressions of {result['pictures']} pictures in {result['seconds']:.0f} s"
    said += f", {result['before']} of them by a former call" if result["before"] else ""
    said += f", {result['left_out']} left out" if result["left_out"] else ""
    told = {"warnings", "results", "out", "expressions", "pictures", "seconds", "before", "left_out"}
    shown = {k: v for k, v in result.items() if k not in told}
    following = "COCO(images.json).loadRes(results.json) of pycocotools reads it"
    if args.format in ("masks", "overlay"):
        following = f"it names a file in {args.out} for each expression"
    elif args.split is not None:
        following = f"dit-ds eval {args.checkpoint} --predictions {result['results']} --split {args.split} scores it"
    return [said, *(f"{k}: {v}" for k, v in shown.items()), f"wrote {result['results']}: {following}"]


def _predict_one(args: argparse.Namespace) -> int:
    if option := _options(args, _MANY):
        raise UserError(f"{option} is for many pictures: give --images, or leave it out")
    from dit_ds.visualize.prediction import predict_image

    result = predict_image(
        args.checkpoint,
        args.image,
        args.out,
        text=args.text,
        points=args.point,
        box=args.box,
        threshold=args.threshold,
    )
    report_and_warn(args, result)
    return 0

"""Commands that make, shard and check datasets."""

from __future__ import annotations

import argparse
from typing import Any

from dit_ds.cli.arguments import ShardCounts, processes, seed, whole
from dit_ds.cli.output import command, given_folder, optional_config, report
from dit_ds.data.progress import write_line


def add(commands: Any) -> None:
    """Add `data` to the parser's commands."""
    data = commands.add_parser("data", help="make, shard and check datasets")
    data.set_defaults(group=data)
    data_commands = data.add_subparsers(metavar="COMMAND")
    p = command(data_commands, "sample", _data_sample, "write the embedded sample set as a REFER tree")
    p.add_argument("folder", nargs="?", help="where refcoco/ and images/train2014/ go")
    p.add_argument("--out", metavar="FOLDER", help="the same")
    p.add_argument("--images", type=whole(1, 10_000_000), default=2000, help="pictures to draw (default 2000)")
    p.add_argument("--seed", type=seed, default=0, help="another seed gives another set (default 0)")
    p.add_argument("--processes", type=processes, help="worker processes (default: one a core)")

    _add_shard(data_commands)
    p = command(
        data_commands,
        "verify",
        _data_verify,
        "check a set: manifest, every shard's bytes and members, pictures, masks, refs, ids, splits, published counts",
    )
    _add_config(p)

    p = command(data_commands, "stats", _data_stats, "what is in a split: words, refs, mask and image sizes, pictures")
    _add_config(p)
    p.add_argument("--split", default="train", help="train, val, testA, ... (default train)")
    p.add_argument("--sheet", metavar="PNG", help="also draw random expressions with their masks, as a .png or .pdf")
    p.add_argument("--seed", type=seed, default=0, help="of the sheet: another seed draws others (default 0)")


def _add_config(p: argparse.ArgumentParser) -> None:
    """Arguments of `verify` and `stats`."""
    p.add_argument("folder", help="as data_shards/refcoco/unc")
    p.add_argument(
        "--config",
        help="count what a run with this configuration loses of expressions and masks, with overrides as in train "
        "(default: with the default settings)",
    )
    p.add_argument("--processes", type=processes, help="worker processes (default: one a core)")
    p.set_defaults(takes_overrides=True)


def _add_shard(data_commands: Any) -> None:
    p = command(
        data_commands, "shard", _data_shard, "annotations to WebDataset tars and a manifest; run again to go on"
    )
    source = p.add_mutually_exclusive_group(required=True)
    source.add_argument("--refer-root", help="folder with DATASET/refs(SPLITBY).p and DATASET/instances.json")
    source.add_argument("--coco", help="a COCO file with expressions: a set of your own, see docs/own-data.md")
    source.add_argument("--parquet", help="folder with the parquet files of jxu124/refcoco, refcocoplus or refcocog")
    p.add_argument("--images", required=True, help="folder with the images, COCO's train2014")
    p.add_argument(
        "--dataset",
        default="refcoco",
        help="refcoco, refcoco+, refcocog, refclef, grefcoco, or a name of yours; several, separated by commas, are "
        "combined to train on, without the images of any val or test split (default refcoco)",
    )
    p.add_argument("--split-by", help="unc, google, umd, ... (default umd for refcocog, own with --coco, else unc)")
    p.add_argument("--out", default="data_shards", help="shards go to OUT/DATASET/SPLIT_BY (default data_shards)")
    p.add_argument(
        "--shards", type=ShardCounts(), help="shards a split, as train=256,val=8 (default: 50 to 100 images each)"
    )
    p.add_argument(
        "--skip-bad", action="store_true", help="leave out what can't be used, counted and named, instead of stopping"
    )
    p.add_argument(
        "--legacy-overlap",
        action="store_true",
        help="pixels where polygons of one annotation overlap become background, as LAVT and LISA read them",
    )
    p.add_argument(
        "--corners",
        choices=("xy", "xyv"),
        default="xy",
        help="what a polygon's corner is: x, y, or x, y and COCO's visibility, which is not used (default xy)",
    )
    p.add_argument(
        "--exif",
        choices=["turn", "ignore"],
        help="what annotations mean of pictures with an EXIF orientation where width and height don't tell: the picture "
        "as viewers turn it, or as stored",
    )
    p.add_argument(
        "--convert",
        choices=["jpeg"],
        help="encode pictures of other kinds as JPEG (quality 95); by default PNG, WebP, TIFF and BMP stay as they are",
    )
    p.add_argument("--overwrite", action="store_true", help="replace a finished set made from other files or options")
    p.add_argument("--processes", type=processes, help="worker processes (default: one a core)")


def _data_sample(args: argparse.Namespace) -> int:
    from dit_ds.data.sample_set.write import write_sample_set

    folder = given_folder(args)
    result = write_sample_set(folder, args.images, args.seed, args.processes)
    report(args, result, lambda: [
        ", ".join(f"{n:,} {what}" for what, n in result.items()) + f" written to {folder}",
        f"next: dit-ds data shard --refer-root {folder} --images {folder}/images/train2014 --out data_shards",
    ])  # fmt: skip
    return 0


def _totals(manifest: dict[str, Any]) -> dict[str, Any]:
    keys = ("images", "refs", "sentences", "no_target", "overlapping", "dropped")
    splits = manifest["splits"].items()
    totals = {name: {k: s[k] for k in keys} | {"shards": len(s["shards"])} | _pictures(s) for name, s in splits}
    return totals | ({"leakage": manifest["leakage"]} if "leakage" in manifest else {})


def _pictures(split: dict[str, Any]) -> dict[str, Any]:
    """Numbers of the pictures that were not taken in as they were, or are no JPEGs."""
    notes = split.get("pictures", {})
    counted = {k: len(v) if k in ("turned", "ignored") else v for k, v in notes.items()}
    return {"pictures": counted} if counted else {}


def _data_shard(args: argparse.Namespace) -> int:
    from dit_ds.data.shards.image import picture_lines
    from dit_ds.data.shards.write import shard_refer

    manifest = shard_refer(
        args.refer_root,
        args.images,
        args.dataset,
        args.split_by,
        args.out,
        shards=args.shards,
        processes=args.processes,
        skip_bad=args.skip_bad,
        overwrite=args.overwrite,
        legacy_overlap=args.legacy_overlap,
        with_visibility=args.corners == "xyv",
        coco=args.coco,
        parquet=args.parquet,
        exif=args.exif,
        convert=args.convert,
    )
    for line in picture_lines(manifest):
        write_line(line)
    report(args, _totals(manifest), lambda: _shard_lines(manifest, args.out))
    return 0


def _shard_lines(manifest: dict[str, Any], out: str) -> list[str]:
    """What was sharded, for people: a sentence a split, what was left out, where it is and what comes next."""
    lines, folder = [], f"{out}/{manifest['dataset']}/{manifest['split_by']}"
    for name, split in manifest["splits"].items():
        counts = ", ".join(f"{split[k]:,} {k}" for k in ("images", "refs", "sentences"))
        notes = [f"{split['no_target']:,} refs without a target"] if split["no_target"] else []
        notes += [f"{split['overlapping']:,} refs with overlapping polygons"] if split["overlapping"] else []
        kinds = split.get("pictures", {}).get("kinds", {})
        notes += ["pictures: " + ", ".join(f"{n:,} {kind}" for kind, n in kinds.items())] if kinds else []
        lines.append(f"{name}: {counts} in {len(split['shards']):,} shards" + "".join(f"; {note}" for note in notes))
        if dropped := {k: n for k, n in split["dropped"].items() if n}:
            left = ", ".join(f"{n:,} {k}" for k, n in dropped.items())
            lines.append(f"{name}: left out {left}, each named in {folder}/left_out.txt")
    for dataset, lost in manifest.get("leakage", {}).items():
        left = ", ".join(f"{n:,} {k}" for k, n in lost.items())
        lines.append(f"train: without {left} of {dataset} whose pictures are in a val or test split")
    return [*lines, f"written to {folder}; next: dit-ds data verify {folder}"]


def _data_verify(args: argparse.Namespace) -> int:
    from dit_ds.data.shards import verify

    config = optional_config(args)
    found = verify.verify_shards(args.folder, args.processes)
    if found["ok"]:  # else samples may not be readable
        from dit_ds.data.input_check import add_losses

        add_losses(found, args.folder, config, args.processes)
    report(args, found, lambda: verify.format_report(found))
    return 0 if found["ok"] else 1


def _data_stats(args: argparse.Namespace) -> int:
    from dit_ds.data import stats

    config = optional_config(args)
    if args.sheet:
        from dit_ds.visualize.drawing import picture_format
        from dit_ds.visualize.figures import draw_sheet

        picture_format(args.sheet)  # refused before anything is read
    found = stats.split_stats(args.folder, args.split, args.processes, config)
    if args.sheet:
        draw_sheet(args.folder, args.split, args.sheet, args.seed)
    report(args, found, lambda: stats.format_report(found))
    return 0

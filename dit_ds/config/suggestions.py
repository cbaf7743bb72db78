"""What someone meant by a key or a value that does not exist."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping

# what other frameworks call it: our key
_ELSEWHERE = {
    "train.lr": "learning_rate base_lr init_lr max_lr peak_lr base_learning_rate",
    "train.batch_size": "train_batch_size global_batch_size total_batch_size bs samples_per_batch",
    "deepspeed.override.train_micro_batch_size_per_gpu": "per_device_train_batch_size per_gpu_train_batch_size "
    "micro_batch_size micro_batch batch_size_per_gpu train_micro_batch_size_per_gpu",
    "eval.batch_size": "per_device_eval_batch_size eval_batch_size val_batch_size test_batch_size",
    "train.epochs": "num_epochs n_epochs max_epochs num_train_epochs epoch total_epochs",
    "train.max_steps": "steps num_steps max_iter max_iters iterations num_iters total_steps train_steps num_train_steps",
    "train.weight_decay": "wd decay_weight l2",
    "train.warmup_epochs": "warmup warmup_steps num_warmup_steps warmup_ratio warmup_iters warmup_num_steps",
    "train.gradient_clipping": "max_grad_norm grad_clip clip_grad gradient_clip_val clip_max_norm clip_grad_norm "
    "grad_clip_norm clipping",
    "train.schedule": "scheduler lr_scheduler lr_schedule lr_scheduler_type lr_policy sched",
    "train.betas": "adam_beta1 adam_beta2 beta1 beta2 adam_betas",
    "train.eps": "adam_epsilon adam_eps epsilon",
    "train.layer_decay": "layerwise_lr_decay layer_wise_lr_decay llrd lr_layer_decay layer_decay_rate",
    "train.lr_scale.image_encoder": "backbone_lr lr_backbone backbone_multiplier vision_lr encoder_lr",
    "train.lr_scale.text_encoder": "text_lr lr_text_encoder text_encoder_lr lr_bert bert_lr",
    "train.ema_decay": "ema model_ema use_ema ema_momentum",
    "train.activation_checkpointing": "gradient_checkpointing checkpoint_activations grad_checkpointing use_checkpoint",
    "train.compile": "torch_compile use_compile",
    "data.workers": "num_workers n_workers dataloader_num_workers workers_per_gpu num_data_workers",
    "data.image_size": "img_size input_size resolution image_resolution crop_size",
    "data.tokens": "max_length max_tokens max_len max_query_len max_seq_length num_tokens context_length",
    "data.root": "data_root data_dir data_path dataset_root dataset_dir dataset_path",
    "data.dataset": "dataset_name",
    "data.split_by": "splitby",
    "data.train_split": "train_set split",
    "data.val_split": "val_set eval_split validation_split",
    "model.size": "backbone arch architecture model_type model_size vit encoder",
    "model.checkpoint": "pretrained pretrained_weights pretrain weights ckpt sam_checkpoint init_checkpoint load_from",
    "text.name": "bert text_encoder text_model lang_model ck_bert language_model bert_model text_encoder_name",
    "text.tokenizer": "bert_tokenizer tokenizer_name",
    "deepspeed.precision": "bf16 fp16 fp32 amp mixed_precision dtype use_amp half",
    "deepspeed.config": "deepspeed_config ds_config zero zero_stage stage deepspeed_config_file",
    "run_dir": "output_dir out_dir work_dir save_dir log_dir exp_dir output_folder logdir output workdir out folder",
    "seed": "random_seed manual_seed rng_seed",
    "checkpoint.every_steps": "save_steps save_every checkpoint_every save_freq save_interval checkpoint_interval",
    "checkpoint.keep": "save_total_limit keep_last max_checkpoints save_top_k",
    "eval.every_epochs": "eval_steps eval_every eval_freq eval_interval val_interval evaluation_strategy",
    "log.every_steps": "logging_steps log_interval log_every print_freq log_freq log_every_n_steps steps_per_print",
}
_ACCUMULATION = "it follows from train.batch_size, the number of ranks and the micro-batch"
_OPTIMIZER = "set train.optimizer, train.lr, train.betas, train.eps and train.weight_decay"
# what has no key of its own: what to do instead
_INSTEAD = {
    **dict.fromkeys("gradient_accumulation_steps grad_accum grad_accum_steps accumulate_grad_batches accum_iter "
                    "accumulation_steps".split(), _ACCUMULATION),
    **dict.fromkeys("optimizer optim optimizer_type optimizer_name".split(), _OPTIMIZER),
    "resume": "give train --resume, which goes on from the run's newest checkpoint",
    "resume_from_checkpoint": "give train --resume, which goes on from the run's newest checkpoint",
}  # fmt: skip
# the same for options of commands, and for the commands
_OPTIONS = {
    "out": "output output_dir out_dir output_folder outdir save_dir dest destination folder save result",
    "text": "prompt expression sentence query caption words phrase",
    "texts": "prompts expressions sentences queries captions",
    "image": "img picture input file photo",
    "images": "image_dir img_dir image_folder pictures image_root coco_images",
    "refer_root": "refer data_root root dataset_root annotations refer_dir",
    "data_root": "data data_dir root dataset_root shards_dir data_path",
    "split": "subset set split_name",
    "config": "cfg yaml config_file conf",
    "processes": "num_workers workers jobs n_jobs num_processes nproc",
    "workers": "num_workers processes",
    "batch_size": "bs micro_batch_size eval_batch_size",
    "threshold": "thresh thr conf_threshold mask_threshold",
    "gpu_memory": "memory vram gpu_mem",
    "gpus": "num_gpus n_gpus nproc_per_node gpus_per_node",
    "gpus_per_node": "gpus num_gpus nproc_per_node",
    "nodes": "num_nodes n_nodes nnodes",
    "runs": "run_dir output_dir out_dir work_dir",
    "write_masks": "save_masks masks_dir output out_dir",
    "json": "as_json",
}
_COMMANDS = {
    "eval": "evaluate test validate val evaluation score",
    "predict": "infer inference segment demo_image prediction",
    "train": "fit finetune fine_tune training run",
    "init": "new start create quickstart",
    "demo": "example quick_start try",
    "data": "dataset shard prepare preprocess",
    "app": "serve gui web ui gradio",
    "report": "html dashboard",
    "experiments": "experiment reproduce tables sweep submit",
    "memory": "mem plan estimate vram",
    "doctor": "check diagnose env info",
    "status": "ps monitor watch",
    "sample": "samples synthetic make",
    "verify": "validate check test",
    "stats": "statistics info describe",
}
_HOME = {name: key for key, names in _ELSEWHERE.items() for name in names.split()}


def did_you_mean(text: str, options: Iterable[str], cutoff: float = 0.6) -> str:
    """`: did you mean 'X'?`, with the option that is spelt most alike; empty where none is."""
    near = difflib.get_close_matches(text, list(options), 1, cutoff=cutoff)
    return f": did you mean '{near[0]}'?" if near else ""


def key_meant(unknown: str, keys: Iterable[str], elsewhere: Mapping[str, str] = _HOME) -> str | None:
    """The key that `unknown`, dotted, most likely stands for: under its usual name in other frameworks, in another section,
    or spelt a little differently; None where nothing is near.

    Args:
        keys: those that exist, dotted, and the sections.
        elsewhere: names in other frameworks, and the keys here.
    """
    keys = list(keys)
    section, _, last = unknown.lower().replace("-", "_").rpartition(".")
    siblings = {k.rpartition(".")[2]: k for k in keys if section and k.rpartition(".")[0] == section}
    namesakes = [k for k in keys if k.rpartition(".")[2] == last]
    near_name = difflib.get_close_matches(last, siblings, 1, cutoff=0.75)
    if near_name:
        return siblings[near_name[0]]
    if last in elsewhere:
        return elsewhere[last]
    if namesakes:  # of several, the first in the order of the schema
        return namesakes[0]
    if near := difflib.get_close_matches(last, list(elsewhere), 1, cutoff=0.87):
        return elsewhere[near[0]]
    near = difflib.get_close_matches(unknown, keys, 1, cutoff=0.75)
    return near[0] if near else None


def option_meant(unknown: str, options: Iterable[str]) -> str | None:
    """The option of a command that `unknown` most likely stands for, with its dashes; None where none is near.

    Args:
        unknown: as it was typed, `--output_dir` or `--output_dir=x`.
        options: those that the command has, as `--out`.
    """
    return _meant(
        unknown.partition("=")[0].lstrip("-"), {o.lstrip("-").replace("-", "_"): o for o in options}, _OPTIONS
    )


def command_meant(unknown: str, commands: Iterable[str]) -> str | None:
    """The command that `unknown` most likely stands for; None where none is near."""
    return _meant(unknown, {c.replace("-", "_"): c for c in commands}, _COMMANDS)


def _meant(unknown: str, named: Mapping[str, str], elsewhere: Mapping[str, str]) -> str | None:
    """Of the values of `named`, by name, the one that is meant."""
    others = {other: name for name, names in elsewhere.items() if name in named for other in names.split()}
    meant = key_meant(unknown, named, {name: name for name in named} | others)
    return None if meant is None else named[meant]


def unknown_key(key: str, keys: Iterable[str], value: object = None) -> str:
    """The message on a key that does not exist, with what to do instead.

    Args:
        keys: those that exist, dotted, and the sections.
        value: the key's; of an unknown section the first key in it is looked at.
    """
    keys = list(keys)
    if isinstance(value, dict) and value and not did_you_mean(key, keys):
        key, value = f"{key}.{next(iter(value))}", None
    last = key.rpartition(".")[2].lower().replace("-", "_")
    if last in _INSTEAD:
        return f"unknown key '{key}': {_INSTEAD[last]}"
    meant = key_meant(key, keys)
    if meant == key:
        section, _, name = key.rpartition(".")
        return f"unknown key '{key}': in YAML write {section}: {{{name}: ..}}"
    return f"unknown key '{key}': " + (f"did you mean '{meant}'?" if meant else "see 'dit-ds train --help'")

"""What we use of other libraries that they don't promise to keep: each name exists, with the signature that we rely on.

`CALLS`, `OPERATORS`, `ATTRIBUTES` and `NAMES` list them. A private name that `dit_ds/` uses and none of them lists is an
error, as is one that is listed and no longer used.
"""

from __future__ import annotations

import ast
import functools
import importlib
import inspect
import os
import re
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from conftest import ROOT

os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("LOCAL_SIZE", "1")

import torch

import dit_ds.torchvision_stub  # noqa: F401

# What is called, with the parameters we give: positional ones in their order, after * those by name
CALLS = {
    "torch._subclasses.fake_tensor.FakeTensorMode": "* allow_non_fake_inputs",
    "torch._subclasses.fake_tensor.FakeTensorMode.may_turn_const": "self t",
    "torch._tensor._rebuild_from_type_v2": "func new_type args state",
    "torch._utils._rebuild_parameter": "data requires_grad backward_hooks",
    "torch._utils._rebuild_parameter_with_state": "data requires_grad backward_hooks state",
    "torch._utils._rebuild_tensor": "storage storage_offset size stride",
    "torch._utils._rebuild_tensor_v2": "storage storage_offset size stride requires_grad backward_hooks",
    "torch.cuda.memory._record_memory_history": "* enabled max_entries",
    "torch.cuda.memory._snapshot": "",
    "torch.nn.Module._apply": "self fn recurse",
    "torch.nn.modules.module.register_module_forward_hook": "hook * always_call",
    "torch.nn.modules.module.register_module_forward_pre_hook": "hook",
    "torch.multiprocessing.reductions.StorageWeakRef": "storage",
    "torch.storage.UntypedStorage._new_shared": "size",
    "torch.utils._python_dispatch.TorchDispatchMode.__torch_dispatch__": "self func types args kwargs",
    "torch.utils._pytree.tree_leaves": "tree",
    "torch.utils.backend_registration._setup_privateuseone_for_python_backend": "rename backend_module",
    "torch.utils.checkpoint.create_selective_checkpoint_contexts": "policy_fn_or_list",
    "torch.utils.data.dataloader._MultiProcessingDataLoaderIter._shutdown_workers": "self",
    "torch.utils.flop_counter.FlopCounterMode": "* display custom_mapping",
    "deepspeed.accelerator.cpu_accelerator.CPU_Accelerator.current_device": "self",
    "deepspeed.accelerator.cpu_accelerator.CPU_Accelerator.current_device_name": "self",
    "deepspeed.accelerator.cpu_accelerator.CPU_Accelerator.device_name": "self device_index",
    "deepspeed.accelerator.cpu_accelerator.CPU_Accelerator.on_accelerator": "self tensor",
    "deepspeed.runtime.engine.DeepSpeedEngine.get_data_types": "self",
    "deepspeed.runtime.engine.DeepSpeedEngine.zero_cpu_offload": "self",
    "deepspeed.runtime.zero.stage3.DeepSpeedZeroOptimizer_Stage3._get_param_partition_rank": "self param",
    "deepspeed.runtime.zero.stage3.DeepSpeedZeroOptimizer_Stage3.get_param_id": "self param",
    "deepspeed.utils.safe_get_local_fp32_param": "param",
    "transformers.modeling_utils.PreTrainedModel._from_config": "config",
    "transformers.models.mask2former.modeling_mask2former.Mask2FormerPixelDecoder": "config feature_channels",
    "transformers.models.mask2former.modeling_mask2former.Mask2FormerPixelDecoder.forward": "self features",
    "transformers.models.mask2former.modeling_mask2former.Mask2FormerPreTrainedModel._init_weights": "self module",
    "transformers.models.swin.modeling_swin.SwinEmbeddings.forward": "self pixel_values",
    "transformers.models.swin.modeling_swin.SwinLayer.forward": "self hidden_states input_dimensions",
    "transformers.models.swin.modeling_swin.SwinPatchMerging.forward": "self input_feature input_dimensions",
    "segment_anything.modeling.prompt_encoder.PositionEmbeddingRandom": "num_pos_feats",
    "segment_anything.modeling.prompt_encoder.PositionEmbeddingRandom.forward_with_coords": (
        "self coords_input image_size"
    ),
    "flash_attn.cute.interface._flash_attn_bwd": "q k v out dout * lse softmax_scale",
    "flash_attn.cute.interface._flash_attn_fwd": "q k v * softmax_scale return_lse",
    "xformers.ops.fmha.memory_efficient_attention_backward": "grad output lse query key value * scale op",
    "xformers.ops.fmha.memory_efficient_attention_forward_requires_grad": "query key value * scale op",
}

_EFFICIENT = "query key value attn_bias compute_log_sumexp dropout_p is_causal * scale"
_CUDNN_STATE = "philox_seed philox_offset attn_bias cum_seq_q cum_seq_k max_q max_k dropout_p is_causal"
# torch.ops.aten's: all arguments, and the first results
OPERATORS = {
    "_foreach_copy_": "self src non_blocking ->",
    "_foreach_lerp_.Scalar": "self tensors1 weight ->",
    "_local_scalar_dense": "self -> ",
    "_log_softmax": "self dim half_to_float ->",
    "_scaled_dot_product_cudnn_attention": (
        "query key value attn_bias compute_log_sumexp dropout_p is_causal return_debug_mask * scale -> output logsumexp"
    ),
    "_scaled_dot_product_cudnn_attention_backward": (
        f"grad_out query key value out logsumexp {_CUDNN_STATE} * scale -> Tensor Tensor Tensor"
    ),
    "_scaled_dot_product_efficient_attention": f"{_EFFICIENT} -> output log_sumexp",
    "_scaled_dot_product_efficient_attention_backward": (
        "grad_out_ query key value attn_bias out logsumexp philox_seed philox_offset dropout_p grad_input_mask is_causal"
        " * scale -> Tensor Tensor Tensor"
    ),
    "_scaled_dot_product_flash_attention": (
        "query key value dropout_p is_causal return_debug_mask * scale -> output logsumexp"
    ),
    "_scaled_dot_product_flash_attention_backward": (
        "grad_out query key value out logsumexp cum_seq_q cum_seq_k max_q max_k dropout_p is_causal philox_seed"
        " philox_offset * scale -> grad_query grad_key grad_value"
    ),
    "_scaled_dot_product_flash_attention_for_cpu": (
        "query key value dropout_p is_causal * attn_mask scale -> output logsumexp"
    ),
    "_scaled_dot_product_flash_attention_for_cpu_backward": (
        "grad_out query key value out logsumexp dropout_p is_causal * attn_mask scale -> grad_query grad_key grad_value"
    ),
    "_softmax": "self dim half_to_float ->",
}

# Attributes that a class has, or that the source of a class, function or module sets
ATTRIBUTES = {
    "torch._ops.OpOverload": "_schema",
    "torch.nn.Module": "_buffers _parameters",
    "torch.storage.UntypedStorage": "_cdata",
    "torch.utils.data.dataloader._MultiProcessingDataLoaderIter": "_shutdown _worker_pids_set _workers",
    "deepspeed.runtime.bf16_optimizer.BF16_Optimizer": "fp32_groups_flat_partition fp32_groups_gradients",
    "deepspeed.runtime.engine.DeepSpeedEngine": (
        "basic_optimizer global_samples global_steps micro_steps monitor optimizer skipped_steps"
    ),
    "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler": "cur_hysteresis cur_iter cur_scale last_overflow_iter",
    "deepspeed.runtime.fp16.loss_scaler.LossScaleConfig": "cur_iter cur_scale last_overflow_iter",
    "deepspeed.runtime.fp16.unfused_optimizer.FP16_UnfusedOptimizer": "fp16_groups fp32_groups loss_scale_config",
    "deepspeed.runtime.zero.partition_parameters": "ds_numel ds_shape ds_tensor",
    "deepspeed.runtime.zero.stage3.DeepSpeedZeroOptimizer_Stage3": (
        "averaged_gradients fp32_partitioned_groups_flat grad_partitions_flat_buffer grad_position loss_scaler"
        " _DeepSpeedZeroOptimizer_Stage3__param_id_to_grad_partition"
    ),
    "deepspeed.runtime.zero.stage_1_and_2.DeepSpeedZeroOptimizer": (
        "accumulated_grads_in_cpu averaged_gradients loss_scaler single_partition_of_fp32_groups"
        " temp_grad_buffer_for_cpu_offload"
    ),
    "deepspeed.utils.mixed_precision_linkage.link_hp_params": "_hp_mapping",
    "deepspeed.utils.tensor_fragment.fragment_address": "numel start",
    "deepspeed.utils.tensor_fragment.tensor_fragment": "hp_fragment_address lp_fragment_address param_group_index",
    "transformers.PretrainedConfig": "_attn_implementation",
    "transformers.models.mask2former.modeling_mask2former.Mask2FormerPixelDecoder": "level_embed position_embedding",
    "transformers.models.mask2former.modeling_mask2former.Mask2FormerPixelDecoderOutput": (
        "mask_features multi_scale_features"
    ),
    "transformers.models.swin.modeling_swin.SwinEncoder": "layers",
    "transformers.models.swin.modeling_swin.SwinLayer": "drop_path mlp",
    "transformers.models.swin.modeling_swin.SwinModel": "embeddings encoder",
    "transformers.models.swin.modeling_swin.SwinStage": "blocks downsample",
    "segment_anything.modeling.prompt_encoder.PositionEmbeddingRandom": "positional_encoding_gaussian_matrix",
    "segment_anything.modeling.prompt_encoder.PromptEncoder": (
        "input_image_size no_mask_embed not_a_point_embed pe_layer point_embeddings"
    ),
}

# What has no signature of interest: classes for `isinstance`, functions that are replaced by ones that take anything
NAMES = (
    "torch.Tensor._is_view",
    "torch.Tensor._use_count",
    "torch._C.DispatchKey.AutocastPrivateUse1",
    "torch._C.DispatchKeySet",
    "torch._C._ExcludeDispatchKeyGuard",
    "torch._C._current_graph_task_id",
    "torch._C._dispatch_has_kernel_for_dispatch_key",
    "torch._C._storage_Use_Count",
    "torch._compile",
    "torch._dynamo.eval_frame",
    "torch._foreach_copy_",
    "torch._foreach_lerp_",
    "torch._ops.OpOverload",
    "torch._subclasses.fake_tensor.FakeTensor",
    "torch.nn.modules.batchnorm._BatchNorm",
    "torch.ops.aten._convolution",
    "torch.ops.aten._thnn_fused_gru_cell",
    "torch.ops.aten._thnn_fused_lstm_cell",
    "torch.ops.aten._upsample_bicubic2d_aa",
    "torch.ops.aten._upsample_bilinear2d_aa",
    "torch.ops.aten._upsample_nearest_exact1d",
    "torch.ops.aten._upsample_nearest_exact2d",
    "torch.ops.aten._upsample_nearest_exact3d",
    "torch.testing._internal.distributed.fake_pg.FakeStore",
    "torch.utils.backend_registration._DummyBackendModule",
    "torch.utils.data._utils.signal_handling._remove_worker_pids",
    "deepspeed.ops.__compatible_ops__",
    "deepspeed.runtime.zero.partition_parameters.assert_ints_same_as_other_ranks",
    "deepspeed.runtime.zero.partitioned_param_coordinator.assert_ints_same_as_other_ranks",
    "deepspeed.runtime.zero.stage3.assert_ints_same_as_other_ranks",
    "deepspeed.runtime.zero.utils.assert_ints_same_as_other_ranks",
    "deepspeed.runtime.zero.utils.assert_lst_len_same_as_other_ranks",
    "flash_attn_interface._flash_attn_backward",
    "flash_attn_interface._flash_attn_forward",
    "xformers.ops.fmha.cutlass.BwOp",
    "xformers.ops.fmha.cutlass.FwOp",
)

# documented in spite of their names, or no names at all
_NOT_PRIVATE = {"_asdict", "_exit", "_getframe", "_replace", "_plus"}


@functools.cache
def resolve(name: str) -> Any:
    """The object of a dotted name."""
    parts = name.split(".")
    for n in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:n]))
        except ModuleNotFoundError:
            continue
        for part in parts[n:]:
            found = getattr(found, part)
        return found
    raise ModuleNotFoundError(name)


def installed(name: str) -> None:
    """Skip the test where one of the libraries that need not be there is missing."""
    for library in ("xformers", "flash_attn.cute", "flash_attn_interface"):
        if name.startswith(library + "."):
            pytest.importorskip(library)


@pytest.mark.parametrize("name", CALLS)
def test_what_we_call_takes_what_we_give(name):
    installed(name)
    signature = inspect.signature(resolve(name))
    given, _, by_name = CALLS[name].partition("*")
    assert list(signature.parameters)[: len(given.split())] == given.split()
    signature.bind(*given.split(), **dict.fromkeys(by_name.split()))  # all others have defaults


@pytest.mark.parametrize("name", OPERATORS)
def test_operators_have_the_schema_we_use(name):
    packet, _, overload = name.partition(".")
    schema = getattr(getattr(torch.ops.aten, packet), overload or "default")._schema
    arguments, _, results = OPERATORS[name].partition("->")
    positional = " ".join(a.name for a in schema.arguments if not a.kwarg_only)
    by_name = " ".join(a.name for a in schema.arguments if a.kwarg_only)
    assert f"{positional} * {by_name}".removesuffix(" * ") == arguments.strip()
    of = [r.name or str(r.type) for r in schema.returns]
    assert of[: len(results.split())] == results.split()


@functools.cache
def tree_of(module: str) -> ast.Module:
    return ast.parse(inspect.getsource(sys.modules[module]))


@functools.cache
def attributes_set(owner: Any) -> set[str]:
    """The attributes that the source of a module, function or class sets or registers as buffers."""
    tree: ast.AST = tree_of(owner.__name__ if inspect.ismodule(owner) else owner.__module__)
    if not inspect.ismodule(owner):
        tree = next(n for n in ast.walk(tree) if getattr(n, "name", None) == owner.__name__)
    nodes = list(ast.walk(tree))
    buffers = (n for n in nodes if isinstance(n, ast.Call) and getattr(n.func, "attr", "") == "register_buffer")
    found = {n.args[0].value for n in buffers if isinstance(n.args[0], ast.Constant)}
    return found | {n.attr for n in nodes if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Store)}


def has(owner: Any, name: str) -> bool:
    """Whether it has the attribute, or its source, or that of a base, sets it."""
    if not isinstance(owner, type):
        return name in attributes_set(owner)
    name = name.removeprefix(f"_{owner.__name__}")  # a class's own __name, as others see it
    if hasattr(owner, name) or name in getattr(owner, "__dataclass_fields__", ()):
        return True
    return any(name in attributes_set(c) for c in owner.__mro__ if c is not object)


@pytest.mark.parametrize("owner", ATTRIBUTES)
def test_attributes_are_where_we_look(owner):
    assert [name for name in ATTRIBUTES[owner].split() if not has(resolve(owner), name)] == []


@pytest.mark.parametrize("name", NAMES)
def test_names_exist(name):
    installed(name)
    assert resolve(name) is not None


def test_a_name_that_is_gone_is_noticed(monkeypatch):
    """The checks above can fail."""
    engine = resolve("deepspeed.runtime.zero.stage3.DeepSpeedZeroOptimizer_Stage3")
    assert not has(engine, "grad_positions") and not has(engine, "_DeepSpeedZeroOptimizer_Stage3__param_id_to_grad")
    with pytest.raises(AttributeError):
        resolve("torch.nn.Module._applied")
    monkeypatch.setitem(CALLS, "torch.utils._pytree.tree_leaves", "is_leaf tree")
    with pytest.raises(AssertionError):
        test_what_we_call_takes_what_we_give("torch.utils._pytree.tree_leaves")
    monkeypatch.setitem(OPERATORS, "_local_scalar_dense", "self other -> ")
    with pytest.raises(AssertionError):
        test_operators_have_the_schema_we_use("_local_scalar_dense")


# --- the tables are complete


def private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name.strip("_") != "" and name not in _NOT_PRIVATE


@functools.cache
def trees() -> dict[str, ast.Module]:
    return {str(f.relative_to(ROOT)): ast.parse(f.read_text()) for f in sorted((ROOT / "dit_ds").rglob("*.py"))}


def ours() -> set[str]:
    """Names that dit_ds defines: functions, classes, variables, parameters, attributes of `self`."""
    found = set()
    for n in (n for tree in trees().values() for n in ast.walk(tree)):
        if isinstance(n, (ast.FunctionDef, ast.ClassDef)):
            found.add(n.name)
        elif isinstance(n, ast.arg):
            found.add(n.arg)
        elif isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store):
            found.add(n.id)
        elif isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Store):
            if isinstance(n.value, ast.Name) and n.value.id == "self":
                found.add(n.attr)
    return found


def names(node: ast.AST) -> Iterator[str]:
    """Names of others that a node may use: attributes, imports, and strings, by which attributes are looked up."""
    if isinstance(node, ast.Attribute):
        yield node.attr
    elif isinstance(node, ast.Import):
        yield from (part for alias in node.names for part in alias.name.split("."))
    elif isinstance(node, ast.ImportFrom) and not (node.module or "").startswith("dit_ds"):
        yield from ((node.module or "").split("."))
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.Constant) and isinstance(node.value, str) and re.fullmatch(r"_\w+", node.value):
        yield node.value


def nodes(tree: ast.AST) -> Iterator[ast.AST]:
    """All of a tree, but for the texts between an f-string's values: no name stands there whole."""
    pieces = {id(piece) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for piece in node.values}
    return (node for node in ast.walk(tree) if not (isinstance(node, ast.Constant) and id(node) in pieces))


IN_PICKLES = {"_codecs", "_reconstruct", "_frombuffer"}  # of a file format: read, never looked up in a package


def looked_up_at_import() -> set[str]:
    """Operators by which memory kernels' rules are listed: without one of them nothing of `planning` can be imported."""
    from dit_ds.planning.memory.kernels import reductions, workspaces

    listed = (*workspaces._RULES, *workspaces._PRODUCTS, *reductions._OPERATORS)
    return {f._schema.name.partition("::")[2] for f in listed}


def test_every_private_name_is_listed():
    listed = {part for name in (*CALLS, *ATTRIBUTES, *NAMES, *OPERATORS) for part in name.split(".")}
    listed |= {name for words in ATTRIBUTES.values() for name in words.split()}
    known = listed | ours() | IN_PICKLES | looked_up_at_import()
    missing = {
        f"{file}:{node.lineno} {name}"
        for file, tree in trees().items()
        for node in nodes(tree)
        for name in names(node)
        if private(name) and name not in known
    }
    assert missing == set()


def test_every_listed_name_is_used():
    used = {word for file in trees() for word in re.findall(r"\w+", (ROOT / file).read_text())}
    listed = {name.rpartition(".")[2] for name in (*CALLS, *NAMES)} | {name.split(".")[0] for name in OPERATORS}
    listed |= {name for words in ATTRIBUTES.values() for name in words.split()}
    assert listed - used == set()

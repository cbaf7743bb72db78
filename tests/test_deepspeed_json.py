"""Our reading of DeepSpeed's JSON is DeepSpeed's own, or it is refused in one line."""

from __future__ import annotations

import copy
import importlib.util
import json
import sys
from typing import Any

import pytest
from conftest import ROOT, dit_ds, refused
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from dit_ds.config.load import validate
from dit_ds.engine import deepspeed_schema
from dit_ds.engine.deepspeed_json import DeepSpeedJson, deepspeed_config, read_deepspeed_json
from dit_ds.engine.import_deepspeed import import_deepspeed
from dit_ds.errors import UserError


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tmp_path_factory.mktemp("ds") / "ds.json"


def read(path, given: Any, **deepspeed: Any) -> dict[str, Any]:
    path.write_text(given if isinstance(given, str) else json.dumps(given))
    return read_deepspeed_json(validate({"deepspeed": {"config": str(path), **deepspeed}}))


def deepspeeds(given: dict[str, Any]) -> Any:
    """What DeepSpeed reads from a JSON."""
    import_deepspeed()
    from deepspeed.runtime.config import DeepSpeedConfig

    return DeepSpeedConfig(copy.deepcopy(given))


TYPES = {"torch.bfloat16": "bf16", "torch.float16": "fp16", "torch.float32": "fp32", "None": None}


def assert_one_reading(given: dict[str, Any], ours: dict[str, Any]) -> None:
    """The typed view is what DeepSpeed reads from the JSON as it was given; so is what goes to DeepSpeed."""
    view, theirs, again = (
        DeepSpeedJson(ours),
        deepspeeds({"train_micro_batch_size_per_gpu": 1} | given),
        deepspeeds(ours),
    )
    assert view.stage == theirs.zero_optimization_stage
    for key in ("offload_optimizer", "offload_param"):
        offload = getattr(theirs.zero_config, key)
        assert getattr(view, key) == (offload is not None and offload.device != "none")
    precision = "bf16" if theirs.bfloat16_config.enabled else "fp16" if theirs.float16_config.enabled else "fp32"
    assert view.precision == precision
    assert view.grad_accum_dtype == (theirs.grad_accum_dtype or precision)
    assert view.communication_data_type == (TYPES[str(theirs.communication_data_type)] or precision)
    assert view.micro_batch == theirs.train_micro_batch_size_per_gpu
    for section in ("zero_config", "bfloat16_config", "float16_config", "monitor_config", "comms_config"):
        assert repr(vars(getattr(theirs, section))) == repr(vars(getattr(again, section))), section
    single = ("prescale_gradients", "gradient_predivide_factor", "disable_allgather", "wall_clock_breakdown", "log_level",
              "dump_state", "memory_breakdown", "torch_autocast_enabled", "torch_autocast_dtype", "timers_config")  # fmt: skip
    for name in single:
        assert getattr(theirs, name) == getattr(again, name), name
    assert all(json.loads(json.dumps(value)) == value for value in ours.values())


def keys_in_use() -> list[tuple[str, ...]]:
    """Paths of all keys that our schema and DeepSpeed's models have."""
    found = [(key,) for key in deepspeed_schema._Json.model_fields]
    for section, model in deepspeed_schema._deepspeeds_models().items():
        found += [(section, name) for f, info in model.model_fields.items() for name in {f, info.alias or f}]
    for part in ("offload_optimizer", "offload_param"):
        found += [("zero_optimization", part, key) for key in ("device", "pin_memory", "nvme_path", "ratio", "devise")]
    found += [("data_types", key) for key in ("grad_accum_dtype", "param_dtype", "keep_in_fp32_modules")]
    return found + [("torch_autocast", "enabled"), ("torch_autocast", "dtype"), ("timers", "throughput", "enabled")]


KEYS = keys_in_use()
REFUSED = [(key,) for key in (*deepspeed_schema._SET_BY_RUN, *deepspeed_schema._NOT_USED)]
WORDS = [
    "auto",
    "Auto",
    "true",
    "false",
    "no",
    "yes",
    "on",
    "off",
    "none",
    "cpu",
    "nvme",
    "bf16",
    "fp32",
    "BF16",
    "2",
    "",
]
SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 5), st.sampled_from([2**70, 500_000_000, -1, 0.5, 1e8, 5e8, 1.5]),
    st.floats(), st.sampled_from(WORDS), st.text(max_size=5),
)  # fmt: skip
LIKELY = st.sampled_from([True, False, "no", "true", "off", 0, 1, 2, 3, "1", 5e7, None, "cpu", "none", "fp32", "bf16"])
VALUES = st.recursive(SCALARS, lambda x: st.lists(x, max_size=2) | st.dictionaries(st.sampled_from(WORDS), x, max_size=2), max_leaves=4)  # fmt: skip


@st.composite
def jsons(draw: st.DrawFn) -> dict[str, Any]:
    """A JSON of a few keys, right, misspelt or in the wrong place, with likely and unlikely values."""
    made: dict[str, Any] = draw(st.sampled_from([{}, {"zero_optimization": {"stage": 2}}, {"bf16": {"enabled": True}}, {
        "zero_optimization": {"stage": 3, "offload_param": {"device": "cpu"}}}]))  # fmt: skip
    made = copy.deepcopy(made)
    key = st.sampled_from([*KEYS, *KEYS, *KEYS, *REFUSED])
    for keys in draw(st.lists(key, max_size=3)):
        if draw(st.integers(0, 11)) == 0:  # one letter less, or more
            at = draw(st.integers(0, len(keys) - 1))
            spelt = keys[at][:-1] if draw(st.booleans()) else f"{keys[at]}s"
            keys = (*keys[:at], spelt, *keys[at + 1 :])
        part = made
        for key in keys[:-1]:
            if not isinstance(part.get(key), dict):
                part[key] = {}
            part = part[key]
        part[keys[-1]] = draw(LIKELY if draw(st.integers(0, 3)) else VALUES)
    return made


@settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck))
@given(given=jsons())
@example(given={"bf16": {"enabled": "no"}})
@example(given={"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "none"}}})
@example(given={"zero_optimization": {"stage": "3", "overlap_comm": None, "stage3_prefetch_bucket_size": 5e7}})
@example(given={"zero_optimization": {"stage": 3, "prefetch_bucket_size": 5}})
@example(given={"bf16": {"enabled": "true"}, "data_types": {"grad_accum_dtype": None}})
def test_what_is_not_refused_is_read_as_deepspeed_reads_it(path, given):
    try:
        ours = read(path, given)
    except UserError as e:
        assert "\n" not in str(e).strip() and str(path) in str(e) and len(str(e)) < 600, e
        return
    given = {k: v for k, v in given.items() if k not in deepspeed_schema._SET_BY_RUN}  # those were "auto"
    assert_one_reading(given, ours)


def test_the_files_that_come_with_dit_ds_go_on_as_they_are(path):
    for file in sorted((ROOT / "configs/deepspeed").glob("*.json")):
        given = json.loads(file.read_text())
        ours = read(path, given)
        assert {key: ours[key] for key in given} == given
        assert_one_reading(given, ours)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"zero_optimisation": {"stage": 2}}, "unknown key 'zero_optimisation': did you mean 'zero_optimization'?"),
        ({"zero_optimization": {"satge": 2}}, "unknown key 'zero_optimization.satge': did you mean 'stage'?"),
        ({"zero_optimization": {"offload_optimizer": {"devise": "cpu"}}}, "did you mean 'device'?"),
        ({"zero_optimization": {"prefetch_bucket": 5}}, "did you mean 'stage3_prefetch_bucket_size'?"),
        ({"wandb": {"enabled": True, "projct": "x"}}, "did you mean 'project'?"),
        ({"bf16": {"enabled": "auto"}}, "bf16.enabled is 'auto'"),
        ({"zero_optimization": {"reduce_bucket_size": "auto"}}, "reduce_bucket_size is 'auto'"),
        ({"bf16": None}, "bf16 is None"),
        ({"bf16": [1]}, "bf16 is [1]"),
        ({"amp": {"enabled": True}}, "sets 'amp', which is not used here: set bf16 or fp16"),
        ({"activation_checkpointing": {}}, "set train.activation_checkpointing"),
        ({"prescale_gradients": "no"}, "prescale_gradients is 'no'"),
        ({"gradient_allreduce_op": "sum"}, "gradient_allreduce_op is 'sum'"),
        ({"train_micro_batch_size_per_gpu": True}, "train_micro_batch_size_per_gpu is True"),
        ({"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}}, "no effect at stage 2"),
        ({"zero_optimization": {"cpu_offload": True}}, "deprecated: set offload_optimizer instead"),
        ({"zero_optimization": {"stage": 2, "compute_grad_norm": False}}, "compute_grad_norm is False"),
        ({"bf16": {"enabled": True, "bf16_optimizer_states": True}}, "DeepSpeed refuses it"),
        ('{"bf16": {"enabled": true}, "bf16": {"enabled": false}}', "'bf16' stands twice"),
        ("[]", "must hold keys and values"),
        ("[" * 100_000, "nested too deeply"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(path, given, says):
    with pytest.raises(UserError) as error:
        read(path, given)
    assert says in str(error.value) and "\n" not in str(error.value)


def test_auto_is_what_the_run_sets_and_a_switch_is_before_it(path):
    """As in the JSON files of Hugging Face's Trainer."""
    given = {"train_batch_size": "auto", "gradient_accumulation_steps": "auto", "gradient_clipping": "auto"}
    assert not set(given) & set(read(path, given | {"train_micro_batch_size_per_gpu": 2}))
    both = {"bf16": {"enabled": "auto"}, "fp16": {"enabled": "auto"}}
    assert DeepSpeedJson(read(path, both, precision="bf16")).precision == "bf16"
    path.write_text(json.dumps(given))
    assert deepspeed_config(validate({"deepspeed": {"config": str(path)}}), 2)["train_batch_size"] == 64


def test_every_key_that_deepspeed_reads_is_known():
    """A release of DeepSpeed with a new key at the top level is noticed here, instead of it being refused as unknown."""

    class Recorder(dict):
        asked: set[str] = set()

        def get(self, key, default=None):
            self.asked.add(key)
            return default

        def __contains__(self, key):
            self.asked.add(key)
            return False

        def keys(self):
            return self

        def __copy__(self):
            return self

    import_deepspeed()
    from deepspeed.runtime.config import DeepSpeedConfig

    given = Recorder()
    with pytest.raises(AssertionError, match="train_batch_size"):  # it is not there
        DeepSpeedConfig(given)
    known = {*deepspeed_schema._Json.model_fields, *deepspeed_schema._SET_BY_RUN, *deepspeed_schema._NOT_USED}
    assert len(given.asked) > 40 and given.asked - known == set()


def test_a_monitor_that_fails_is_one_line(world, tmp_path, monkeypatch):
    """As W&B does without an account."""
    from torch import nn

    from dit_ds.engine.engine import initialize

    lines = ["class UsageError(Exception): pass", "def init(**_):", "    raise UsageError('no API key:\\n log in')"]
    (tmp_path / "wandb.py").write_text("\n".join(lines))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    config = validate({"deepspeed": {"override": {"wandb": {"enabled": True}}}})
    with pytest.raises(UserError, match="no API key"):
        initialize(nn.Linear(2, 2), config, world, monitors=True)
    monkeypatch.delitem(sys.modules, "wandb", raising=False)


@pytest.mark.skipif(importlib.util.find_spec("wandb") is not None, reason="wandb is installed")
def test_a_monitor_that_is_not_installed_is_one_line(config_file):
    monitor = ["--deepspeed.override.wandb", '{"enabled": true, "project": "x"}']
    said = refused(dit_ds("train", "--config", config_file, *monitor, check=None))
    assert "enables wandb: install wandb" in said


def test_what_only_an_engine_can_refuse_is_one_line(world):
    from torch import nn

    from dit_ds.engine.engine import initialize

    config = validate({"deepspeed": {"override": {"zero_optimization": {"zenflow": {"topk_ratio": 0.1}}}}})
    with pytest.raises(UserError, match="DeepSpeed refuses zero2 here: .*offload"):
        initialize(nn.Linear(2, 2), config, world)
    # a plan, or a check, opens no run at a monitor's
    monitored = validate({"deepspeed": {"override": {"wandb": {"enabled": True}, "csv_monitor": {"enabled": True}}}})
    assert not initialize(nn.Linear(2, 2), monitored, world).monitor.enabled

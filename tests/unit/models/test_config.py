"""What config.json says, what of it is honoured, and what is refused by name."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import skynet.models
from skynet.errors import ModelError, UnsupportedArchitecture
from skynet.models.config import SUPPORTED, read_lean, read_spec

EMBEDDED = Path(skynet.models.__file__).parent / "embedded" / "config.json"


def llama(**fields: Any) -> dict[str, Any]:
    return {
        "model_type": "llama",
        "vocab_size": 100,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
    } | fields


def test_the_embedded_model_is_read() -> None:
    spec = read_spec(json.loads(EMBEDDED.read_text()), "float32")
    assert (spec.model_type, spec.is_tied, spec.dtype) == ("qwen3", True, "float32")
    assert spec.num_layers >= 6
    assert (spec.num_heads, spec.num_kv_heads) == (8, 4)


def test_an_unknown_architecture_is_refused_with_the_list_of_those_that_run() -> None:
    with pytest.raises(UnsupportedArchitecture, match=r"'mamba'.*gpt2, llama, mistral, qwen2, qwen3, qwen3_moe"):
        read_spec({"model_type": "mamba"})
    assert SUPPORTED == ("gpt2", "llama", "mistral", "qwen2", "qwen3", "qwen3_moe")


def test_a_config_without_a_model_type_is_refused() -> None:
    with pytest.raises(UnsupportedArchitecture, match="model type None"):
        read_spec({})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("quantization_config", {"bits": 4}),
        ("logit_scale", 0.5),
        ("pretraining_tp", 2),
        ("partial_rotary_factor", 0.5),
        ("sliding_window", 128),
        ("hidden_act", "xielu"),
        ("rope_parameters", {"rope_type": "longrope", "rope_theta": 1e4}),
        ("rope_parameters", {"full_attention": {"rope_type": "default"}}),
        ("rope_scaling", {"type": "su", "factor": 2.0}),
    ],
)
def test_a_setting_that_llama_layers_dont_honour_is_refused_by_name(field: str, value: object) -> None:
    name = "rope_parameters" if field == "rope_scaling" else field
    with pytest.raises(UnsupportedArchitecture, match=name):
        read_spec(llama(**{field: value}))


@pytest.mark.parametrize(
    "fields",
    [
        {"attention_dropout": 0.1, "torch_dtype": "bfloat16", "initializer_range": 0.1, "_name_or_path": "x"},
        {"quantization_config": None, "pretraining_tp": 1, "use_cache": False, "some_future_switch": False},
    ],
)
def test_a_setting_without_effect_on_the_answer_is_let_pass(fields: dict[str, Any]) -> None:
    assert read_spec(llama(**fields)) == read_spec(llama())


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("hidden_size", "64"),
        ("hidden_size", -1),
        ("hidden_size", None),
        ("num_hidden_layers", True),
        ("num_hidden_layers", 2**40),
        ("num_key_value_heads", 3),
        ("tie_word_embeddings", "yes"),
        ("rms_norm_eps", float("nan")),
        ("rope_parameters", [1]),
        ("rope_theta", -5),
        ("max_position_embeddings", 0),
    ],
)
def test_a_field_of_the_wrong_type_or_out_of_bounds_is_named(field: str, value: object) -> None:
    with pytest.raises(ModelError, match=r"heads|" + field):
        read_spec(llama(**{field: value}))


def test_both_spellings_of_rope_mean_the_same() -> None:
    old = llama(rope_theta=5e5, rope_scaling={"type": "linear", "factor": 2.0})
    new = llama(rope_parameters={"rope_type": "linear", "rope_theta": 5e5, "factor": 2.0})
    assert read_lean(old) == read_lean(new)
    assert read_lean(llama(rope_theta=5e5)).rope.theta == 5e5
    assert read_lean(llama()).rope.theta == 10000.0


def test_qwen_windows_follow_layer_types_else_max_window_layers() -> None:
    shape = {**llama(num_key_value_heads=8), "model_type": "qwen2", "sliding_window": 16}
    assert read_lean(shape).windows == (None,) * 4
    used = {**shape, "use_sliding_window": True, "max_window_layers": 3}
    assert read_lean(used).windows == (None, None, None, 16)
    types = ["sliding_attention", "full_attention"] * 2
    assert read_lean({**used, "layer_types": types}).windows == (16, None, 16, None)
    with pytest.raises(UnsupportedArchitecture, match="layer_types"):
        read_spec({**shape, "layer_types": types})


def test_a_mistral_without_the_field_has_its_types_default_window() -> None:
    shape = {**llama(), "model_type": "mistral"}
    assert read_lean(shape).windows == (4096,) * 4
    assert read_lean({**shape, "sliding_window": None}).windows == (None,) * 4


def test_expert_layers_follow_step_and_exceptions() -> None:
    shape = {**llama(), "model_type": "qwen3_moe", "moe_intermediate_size": 32, "num_experts": 8}
    assert read_spec(shape).moe_layers == (0, 1, 2, 3)
    assert read_spec({**shape, "decoder_sparse_step": 2, "mlp_only_layers": [3]}).moe_layers == (1,)
    assert read_spec({**shape, "num_local_experts": 6}).num_experts == 6


def test_reading_a_config_imports_neither_torch_nor_transformers() -> None:
    code = (
        "import json, sys; from skynet.models.config import read_spec;"
        f"read_spec(json.load(open({str(EMBEDDED)!r})));"
        "sys.exit(bool({'torch', 'transformers', 'numpy'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0

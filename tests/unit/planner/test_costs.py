"""Bytes of every share, against transformers' own parameters."""

from __future__ import annotations

import random
from typing import Any

import pytest

from skynet.models.costs import TensorSplit, model_costs
from skynet.models.spec import ModelSpec
from skynet.models.split import split_group, whole_share
from skynet.protocol.plan import LayerSpan

from .inventory import held_bytes_by_inventory, ranges, stage_tensors
from .swarms import small_spec

_COMMON = {
    "vocab_size": 1000,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
}
_MOE = {"moe_intermediate_size": 48, "num_experts": 4, "num_experts_per_tok": 2, "mlp_only_layers": [1]}
_GPT2 = {"vocab_size": 1000, "n_embd": 64, "n_layer": 4, "n_head": 8, "n_positions": 128}


def spec_of(model_type: str, is_tied: bool) -> ModelSpec:
    is_gpt2, is_moe = model_type == "gpt2", model_type == "qwen3_moe"
    return ModelSpec(
        model_type=model_type,
        num_layers=4,
        hidden_size=64,
        num_heads=8,
        num_kv_heads=8 if is_gpt2 else 2,
        head_size=8 if is_gpt2 or model_type == "qwen2" else 16,
        intermediate_size=256 if is_gpt2 else 96,
        vocab_size=1000,
        max_positions=128,
        is_tied=is_tied,
        gated_mlp=not is_gpt2,
        num_experts=4 if is_moe else 0,
        experts_per_token=2 if is_moe else 0,
        expert_intermediate_size=48 if is_moe else 0,
        moe_layers=(0, 2, 3) if is_moe else (),
        learned_positions=is_gpt2,
        qkv_bias=model_type == "qwen2",
    )


@pytest.mark.parametrize("is_tied", [False, True])
@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2", "qwen3", "qwen3_moe", "gpt2"])
def test_a_whole_model_weighs_what_transformers_holds(model_type: str, is_tied: bool) -> None:
    import torch
    import transformers

    of_type: dict[str, dict[str, Any]] = {"gpt2": _GPT2, "qwen3_moe": _COMMON | _MOE}
    fields = of_type.get(model_type, _COMMON)
    if model_type == "qwen2":  # its head size follows from the hidden size
        fields = {k: v for k, v in fields.items() if k != "head_dim"}
    config = transformers.AutoConfig.for_model(model_type, tie_word_embeddings=is_tied, **fields)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    parameters = {name: tuple(p.shape) for name, p in model.named_parameters()}
    spec = spec_of(model_type, is_tied)
    costs = model_costs(spec)
    total = sum(p.numel() * p.element_size() for p in model.parameters())
    assert costs.weight_bytes(LayerSpan(0, 4), whole_share(spec)) == total
    mine = {tensor.name: tensor.shape for tensor in stage_tensors(spec, LayerSpan(0, 4))}
    if model_type != "qwen3_moe":  # transformers fuses experts in memory; checkpoints name them one by one
        assert mine == parameters
    else:
        assert {n: s for n, s in mine.items() if ".experts." not in n} == {
            n: s for n, s in parameters.items() if ".experts." not in n
        }


@pytest.mark.parametrize("seed", range(40))
def test_bytes_of_a_share_equal_its_tensors_sliced_one_by_one(seed: int) -> None:
    rng = random.Random(seed)
    spec = spec_of("gpt2", rng.random() < 0.5) if seed % 5 == 0 else small_spec(rng)
    costs = model_costs(spec)
    start = rng.randrange(spec.num_layers)
    layers = LayerSpan(start, rng.randint(start + 1, spec.num_layers))
    for share in split_group(spec, [rng.uniform(0.1, 5) for _ in range(rng.randint(1, 4))]):
        assert costs.weight_bytes(layers, share) == held_bytes_by_inventory(spec, layers, share)


def test_a_tied_table_is_counted_by_first_and_last_stage_but_once_where_they_are_one() -> None:
    spec = spec_of("llama", True)
    costs, share = model_costs(spec), whole_share(spec)
    together = costs.weight_bytes(LayerSpan(0, 4), share)
    apart = costs.weight_bytes(LayerSpan(0, 2), share) + costs.weight_bytes(LayerSpan(2, 4), share)
    assert apart - together == spec.vocab_size * spec.hidden_size * 2


def test_fused_qkv_gives_each_rank_a_range_in_each_third() -> None:
    spec = spec_of("gpt2", True)
    tensor = next(t for t in stage_tensors(spec, LayerSpan(0, 1)) if t.name.endswith("c_attn.weight"))
    share = split_group(spec, [1, 1])[1]
    assert tensor == TensorSplit("transformer.h.0.attn.c_attn.weight", (64, 192), "heads", 1, 8, blocks=3)
    assert [(r.start, r.end) for r in ranges(tensor, share.heads)] == [(32, 64), (96, 128), (160, 192)]


def test_kv_bytes_follow_the_kv_heads_held() -> None:
    spec = spec_of("llama", False)
    costs = model_costs(spec)
    halves = [costs.kv_bytes_per_token(4, share) for share in split_group(spec, [1, 1])]
    assert halves == [2 * 4 * 1 * 16 * 2] * 2
    assert costs.kv_bytes_per_token(4, whole_share(spec)) == sum(halves)


def test_operations_are_two_per_weight_used() -> None:
    spec = spec_of("qwen3_moe", False)
    costs, share = model_costs(spec), whole_share(spec)
    attention, mlp = costs.layer_flops(share, True)
    assert attention == 2 * 64 * 16 * (8 + 2 + 2 + 8)
    assert mlp == 2 * 2 * (3 * 48 * 64)  # two of four experts
    assert costs.layer_read_bytes(share, True, 1)[1] == 2 * 2 * (3 * 48 * 64)
    assert costs.layer_read_bytes(share, True, 512)[1] == pytest.approx(2 * 4 * (3 * 48 * 64))

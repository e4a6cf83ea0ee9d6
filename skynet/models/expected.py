"""Which tensors a checkpoint must have, by name and shape: an incomplete one is refused before anything loads."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from skynet.errors import WeightError
from skynet.models.config import LeanConfig, read_lean, read_spec
from skynet.models.manifest import Manifest
from skynet.models.spec import ModelSpec

Shape = tuple[int, ...]


def check_complete(manifest: Manifest, config: Mapping[str, object]) -> None:
    """Raises WeightError naming the first tensor that is missing or has another shape than config.json says."""
    prefix = "transformer." if any(t.name == "transformer.wte.weight" for t in manifest.tensors) else ""
    for name, shape in expected_tensors(config, prefix):
        tensor = manifest.tensor(name)
        if tensor.shape != shape:
            raise WeightError(
                f"{tensor.file}: tensor {name} has shape {list(tensor.shape)}, config.json makes it {list(shape)}; "
                "weights and config.json aren't of one model: save or fetch both again"
            )


def expected_tensors(config: Mapping[str, object], gpt2_prefix: str = "transformer.") -> Iterator[tuple[str, Shape]]:
    """Names and full shapes, as the stages' loaders ask for them. GPT-2's first checkpoints have no prefix."""
    spec = read_spec(config)
    if spec.model_type == "gpt2":
        yield from _gpt2(spec, gpt2_prefix)
        return
    yield "model.embed_tokens.weight", (spec.vocab_size, spec.hidden_size)
    for index in range(spec.num_layers):
        yield from _lean_layer(spec, read_lean(config), index)
    yield "model.norm.weight", (spec.hidden_size,)
    if not spec.is_tied:
        yield "lm_head.weight", (spec.vocab_size, spec.hidden_size)


def _lean_layer(spec: ModelSpec, lean: LeanConfig, index: int) -> Iterator[tuple[str, Shape]]:
    hidden, layer = spec.hidden_size, f"model.layers.{index}."
    yield layer + "input_layernorm.weight", (hidden,)
    yield layer + "post_attention_layernorm.weight", (hidden,)
    attention = layer + "self_attn."
    for letter, heads in (("q", spec.num_heads), ("k", spec.num_kv_heads), ("v", spec.num_kv_heads)):
        yield from _linear(f"{attention}{letter}_proj", (heads * spec.head_size, hidden), lean.qkv_bias)
    yield from _linear(attention + "o_proj", (hidden, spec.num_heads * spec.head_size), lean.o_bias)
    if lean.qk_norm:
        yield attention + "q_norm.weight", (spec.head_size,)
        yield attention + "k_norm.weight", (spec.head_size,)
    if index not in spec.moe_layers:
        yield from _mlp(layer + "mlp.", hidden, spec.intermediate_size, lean.mlp_bias)
        return
    yield layer + "mlp.gate.weight", (spec.num_experts, hidden)
    for expert in range(spec.num_experts):
        yield from _mlp(f"{layer}mlp.experts.{expert}.", hidden, spec.expert_intermediate_size, False)


def _mlp(prefix: str, hidden: int, width: int, has_bias: bool) -> Iterator[tuple[str, Shape]]:
    yield from _linear(prefix + "gate_proj", (width, hidden), has_bias)
    yield from _linear(prefix + "up_proj", (width, hidden), has_bias)
    yield from _linear(prefix + "down_proj", (hidden, width), has_bias)


def _linear(name: str, shape: tuple[int, int], has_bias: bool) -> Iterator[tuple[str, Shape]]:
    yield name + ".weight", shape
    if has_bias:
        yield name + ".bias", shape[:1]


def _gpt2(spec: ModelSpec, prefix: str) -> Iterator[tuple[str, Shape]]:
    hidden, width = spec.hidden_size, spec.intermediate_size
    yield prefix + "wte.weight", (spec.vocab_size, hidden)
    yield prefix + "wpe.weight", (spec.max_positions, hidden)
    for index in range(spec.num_layers):
        layer = f"{prefix}h.{index}."
        matrices = (
            ("attn.c_attn", (hidden, 3 * hidden)),
            ("attn.c_proj", (hidden, hidden)),
            ("mlp.c_fc", (hidden, width)),
            ("mlp.c_proj", (width, hidden)),
        )
        for name, shape in matrices:  # Conv1D keeps [in, out]
            yield f"{layer}{name}.weight", shape
            yield f"{layer}{name}.bias", shape[1:]
        for norm in ("ln_1", "ln_2"):
            yield f"{layer}{norm}.weight", (hidden,)
            yield f"{layer}{norm}.bias", (hidden,)
    yield prefix + "ln_f.weight", (hidden,)
    yield prefix + "ln_f.bias", (hidden,)
    if not spec.is_tied:
        yield "lm_head.weight", (spec.vocab_size, hidden)

"""What a model's parts weigh: the tensors of each layer, how they split, and from these bytes and operations.

The inventory is the single source: bytes are exactly linear in the units a rank holds of each part, so `PartCosts`
(bytes per query head, per KV head, per MLP column, ...) is derived from it once and is exact for every share.
Replicated tensors (norms, the router, biases added after a sum) are held by every rank of the group.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from skynet.models.spec import DTYPE_BYTES, ModelSpec
from skynet.protocol.plan import LayerSpan, RankShare

Part = Literal["heads", "kv_heads", "mlp", "expert_mlp", "vocab"]


@dataclass(frozen=True, slots=True)
class TensorSplit:
    """One tensor as a checkpoint names it, and how a group shares it.

    Along `dim` it consists of `blocks` equal parts one after another (GPT-2's fused QKV: 3), and each block of
    `unit` elements per head (or column, or row) of `part`. `part` None: every rank holds all of it.
    """

    name: str
    shape: tuple[int, ...]
    part: Part | None = None
    dim: int = 0
    unit: int = 1
    blocks: int = 1

    @property
    def num_elements(self) -> int:
        """Of the whole tensor."""
        return math.prod(self.shape)


def _is_gpt2(spec: ModelSpec) -> bool:
    return spec.model_type == "gpt2"


def layer_tensors(spec: ModelSpec, layer: int) -> tuple[TensorSplit, ...]:
    """Every tensor of one layer."""
    if _is_gpt2(spec):
        return _gpt2_layer(spec, f"transformer.h.{layer}.")
    prefix = f"model.layers.{layer}."
    norms = (
        TensorSplit(prefix + "input_layernorm.weight", (spec.hidden_size,)),
        TensorSplit(prefix + "post_attention_layernorm.weight", (spec.hidden_size,)),
    )
    mlp = _experts(spec, prefix + "mlp.") if layer in spec.moe_layers else _dense_mlp(spec, prefix + "mlp.")
    return norms + _attention(spec, prefix + "self_attn.") + mlp


def _attention(spec: ModelSpec, prefix: str) -> tuple[TensorSplit, ...]:
    hidden, size = spec.hidden_size, spec.head_size
    parts: tuple[tuple[str, Part, int], ...] = (
        ("q_proj", "heads", spec.num_heads),
        ("k_proj", "kv_heads", spec.num_kv_heads),
        ("v_proj", "kv_heads", spec.num_kv_heads),
    )
    tensors = [TensorSplit(f"{prefix}{n}.weight", (num * size, hidden), part, 0, size) for n, part, num in parts]
    if spec.qkv_bias:
        tensors += [TensorSplit(f"{prefix}{n}.bias", (num * size,), part, 0, size) for n, part, num in parts]
    if spec.model_type in ("qwen3", "qwen3_moe"):
        tensors += [TensorSplit(f"{prefix}{n}.weight", (size,)) for n in ("q_norm", "k_norm")]
    tensors.append(TensorSplit(prefix + "o_proj.weight", (hidden, spec.num_heads * size), "heads", 1, size))
    if spec.o_bias:
        tensors.append(TensorSplit(prefix + "o_proj.bias", (hidden,)))
    return tuple(tensors)


def _dense_mlp(spec: ModelSpec, prefix: str) -> tuple[TensorSplit, ...]:
    columns, hidden = spec.intermediate_size, spec.hidden_size
    inputs = ("gate_proj", "up_proj") if spec.gated_mlp else ("up_proj",)
    biases = [TensorSplit(f"{prefix}{name}.bias", (columns,), "mlp", 0) for name in inputs] if spec.mlp_bias else []
    if spec.mlp_bias:
        biases.append(TensorSplit(prefix + "down_proj.bias", (hidden,)))
    return (
        *(TensorSplit(f"{prefix}{name}.weight", (columns, hidden), "mlp", 0) for name in inputs),
        TensorSplit(prefix + "down_proj.weight", (hidden, columns), "mlp", 1),
        *biases,
    )


def _experts(spec: ModelSpec, prefix: str) -> tuple[TensorSplit, ...]:
    columns, hidden = spec.expert_intermediate_size, spec.hidden_size
    tensors = [TensorSplit(prefix + "gate.weight", (spec.num_experts, hidden))]
    for expert in range(spec.num_experts):
        at = f"{prefix}experts.{expert}."
        tensors += [
            TensorSplit(f"{at}{n}.weight", (columns, hidden), "expert_mlp", 0) for n in ("gate_proj", "up_proj")
        ]
        tensors.append(TensorSplit(f"{at}down_proj.weight", (hidden, columns), "expert_mlp", 1))
    return tuple(tensors)


def _gpt2_layer(spec: ModelSpec, prefix: str) -> tuple[TensorSplit, ...]:
    hidden, size, width, columns = (
        spec.hidden_size,
        spec.head_size,
        spec.num_heads * spec.head_size,
        spec.intermediate_size,
    )
    norms = [TensorSplit(f"{prefix}{n}.{kind}", (hidden,)) for n in ("ln_1", "ln_2") for kind in ("weight", "bias")]
    return (
        *norms,
        TensorSplit(prefix + "attn.c_attn.weight", (hidden, 3 * width), "heads", 1, size, blocks=3),
        TensorSplit(prefix + "attn.c_attn.bias", (3 * width,), "heads", 0, size, blocks=3),
        TensorSplit(prefix + "attn.c_proj.weight", (width, hidden), "heads", 0, size),
        TensorSplit(prefix + "attn.c_proj.bias", (hidden,)),
        TensorSplit(prefix + "mlp.c_fc.weight", (hidden, columns), "mlp", 1),
        TensorSplit(prefix + "mlp.c_fc.bias", (columns,), "mlp", 0),
        TensorSplit(prefix + "mlp.c_proj.weight", (columns, hidden), "mlp", 0),
        TensorSplit(prefix + "mlp.c_proj.bias", (hidden,)),
    )


def embedding_tensors(spec: ModelSpec) -> tuple[TensorSplit, ...]:
    """What the first stage holds apart from layers."""
    rows = (spec.vocab_size, spec.hidden_size)
    if not _is_gpt2(spec):
        return (TensorSplit("model.embed_tokens.weight", rows, "vocab"),)
    table = TensorSplit("transformer.wte.weight", rows, "vocab")
    if not spec.learned_positions:
        return (table,)
    return (table, TensorSplit("transformer.wpe.weight", (spec.max_positions, spec.hidden_size)))


def head_tensors(spec: ModelSpec) -> tuple[TensorSplit, ...]:
    """What the last stage holds apart from layers. With a tied head this names the embedding a second time."""
    rows, hidden = (spec.vocab_size, spec.hidden_size), (spec.hidden_size,)
    if _is_gpt2(spec):
        head = "transformer.wte.weight" if spec.is_tied else "lm_head.weight"
        norm = (TensorSplit("transformer.ln_f.weight", hidden), TensorSplit("transformer.ln_f.bias", hidden))
        return (*norm, TensorSplit(head, rows, "vocab"))
    head = "model.embed_tokens.weight" if spec.is_tied else "lm_head.weight"
    return (TensorSplit("model.norm.weight", hidden), TensorSplit(head, rows, "vocab"))


@dataclass(frozen=True, slots=True)
class PartCosts:
    """Bytes per unit held of each part, and `fixed` bytes that every rank holds."""

    fixed: int = 0
    heads: int = 0
    kv_heads: int = 0
    mlp: int = 0
    expert_mlp: int = 0
    vocab: int = 0

    def bytes_of(self, share: RankShare, kv_heads: int) -> int:
        """Bytes that `share` holds, which includes `kv_heads` KV heads."""
        heads, mlp = len(share.heads) * self.heads, len(share.mlp) * self.mlp
        rest = len(share.expert_mlp) * self.expert_mlp + len(share.vocab) * self.vocab
        return self.fixed + heads + kv_heads * self.kv_heads + mlp + rest

    @staticmethod
    def of(tensors: tuple[TensorSplit, ...], element_bytes: int) -> PartCosts:
        """Sum an inventory; exact, since each tensor has the same number of elements per unit of its part."""
        sums: dict[str, int] = {}
        for tensor in tensors:
            size = tensor.num_elements * element_bytes
            if tensor.part is None:
                sums["fixed"] = sums.get("fixed", 0) + size
            elif size:
                units = tensor.shape[tensor.dim] // (tensor.unit * tensor.blocks)
                sums[tensor.part] = sums.get(tensor.part, 0) + size // units
        return PartCosts(**sums)


@dataclass(frozen=True, slots=True)
class ModelCosts:
    """A model's costs by part. All bytes are in the model's dtype."""

    spec: ModelSpec
    dense: PartCosts  # one layer with a dense MLP
    moe: PartCosts  # one layer with a mixture of experts
    embedding: PartCosts
    head: PartCosts
    tied: PartCosts  # what embedding and head have in common: counted once where one stage is first and last
    moe_before: tuple[int, ...]  # moe_before[i]: mixture layers among layers [0, i)

    def layer(self, is_moe: bool) -> PartCosts:
        return self.moe if is_moe else self.dense

    def count(self, start: int, end: int) -> tuple[int, int]:
        """Dense and mixture layers in [start, end)."""
        moe = self.moe_before[end] - self.moe_before[start]
        return end - start - moe, moe

    def weight_bytes(self, layers: LayerSpan, share: RankShare) -> int:
        """Bytes of weights that a rank with this share of this span holds, to the byte."""
        kv_heads = len(share.kv_heads(self.spec.group_size))
        dense, moe = self.count(layers.start, layers.end)
        total = dense * self.dense.bytes_of(share, kv_heads) + moe * self.moe.bytes_of(share, kv_heads)
        is_first, is_last = layers.start == 0, layers.end == self.spec.num_layers
        total += self.embedding.bytes_of(share, 0) if is_first else 0
        total += self.head.bytes_of(share, 0) if is_last else 0
        return total - (self.tied.bytes_of(share, 0) if is_first and is_last else 0)

    def kv_bytes_per_token(self, num_layers: int, share: RankShare) -> int:
        """Bytes of keys and values that a rank keeps for one position, in `num_layers` layers."""
        kv_heads = len(share.kv_heads(self.spec.group_size))
        return 2 * num_layers * kv_heads * self.spec.head_size * DTYPE_BYTES[self.spec.dtype]

    def layer_flops(self, share: RankShare, is_moe: bool) -> tuple[float, float]:
        """Operations per token of (attention matrices, MLP matrices): two per weight used."""
        costs, element = self.layer(is_moe), DTYPE_BYTES[self.spec.dtype]
        kv_heads = len(share.kv_heads(self.spec.group_size))
        attention = len(share.heads) * costs.heads + kv_heads * costs.kv_heads
        used = self.spec.experts_per_token / self.spec.num_experts if is_moe and self.spec.num_experts else 0.0
        mlp = len(share.mlp) * costs.mlp + len(share.expert_mlp) * costs.expert_mlp * used
        return 2 * attention / element, 2 * mlp / element

    def layer_read_bytes(self, share: RankShare, is_moe: bool, num_tokens: int) -> tuple[float, float]:
        """Weight bytes read by one step of `num_tokens` tokens: (attention, MLP). Of experts, those expected in use."""
        costs = self.layer(is_moe)
        kv_heads = len(share.kv_heads(self.spec.group_size))
        attention = len(share.heads) * costs.heads + kv_heads * costs.kv_heads
        experts = self.spec.num_experts
        used = self.experts_used(num_tokens) / experts if is_moe and experts else 0.0
        return attention, len(share.mlp) * costs.mlp + len(share.expert_mlp) * costs.expert_mlp * used

    def experts_used(self, num_tokens: int) -> float:
        """How many different experts of a layer so many tokens are expected to choose."""
        experts = self.spec.num_experts
        return experts * (1 - (1 - self.spec.experts_per_token / experts) ** num_tokens) if experts else 0.0


@lru_cache(maxsize=32)
def model_costs(spec: ModelSpec) -> ModelCosts:
    """Costs of a model, from its inventory."""
    element = DTYPE_BYTES[spec.dtype]
    is_moe = [layer in set(spec.moe_layers) for layer in range(spec.num_layers)]
    moe_before = [0]
    for flag in is_moe:
        moe_before.append(moe_before[-1] + flag)

    def of_kind(flag: bool) -> PartCosts:
        return PartCosts.of(layer_tensors(spec, is_moe.index(flag)), element) if flag in is_moe else PartCosts()

    embedding, head = embedding_tensors(spec), head_tensors(spec)
    names = {tensor.name for tensor in embedding}
    return ModelCosts(
        spec=spec,
        dense=of_kind(False),
        moe=of_kind(True),
        embedding=PartCosts.of(embedding, element),
        head=PartCosts.of(head, element),
        tied=PartCosts.of(tuple(t for t in head if t.name in names), element),
        moe_before=tuple(moe_before),
    )

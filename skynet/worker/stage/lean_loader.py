"""Builds the lean layers of one rank from a checkpoint: which slices, fused how."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from skynet.models.config import LeanConfig
from skynet.models.spec import ModelSpec
from skynet.protocol.plan import RankShare, Span
from skynet.worker.stage.adapters import AdapterTable
from skynet.worker.stage.attention import PagedAttention, head_runs
from skynet.worker.stage.experts import ExpertMlp, Router
from skynet.worker.stage.heap import return_freed_memory
from skynet.worker.stage.lean import (
    ACTIVATIONS,
    AttentionWeights,
    Empty,
    GatedMlp,
    LeanAttention,
    LeanLayer,
    Mlp,
)
from skynet.worker.stage.matrix import Matrix, make_matrix
from skynet.worker.stage.norm import RmsNorm
from skynet.worker.stage.reader import ShardReader


class Rank(NamedTuple):
    """Whose share is loaded."""

    number: int
    share: RankShare


class LeanLoader:
    """Loads layers by number."""

    def __init__(
        self, spec: ModelSpec, config: LeanConfig, rank: Rank, reader: ShardReader, adapters: AdapterTable
    ) -> None:
        self._spec = spec
        self._config = config
        self._rank = rank
        self._reader = reader
        self._adapters = adapters

    def layer(self, index: int) -> LeanLayer:
        """Layer `index` of the whole model."""
        prefix = f"model.layers.{index}."
        input_norm = self._norm(prefix + "input_layernorm.weight")
        attention = self._attention(index, prefix + "self_attn.")
        post_attention_norm = self._norm(prefix + "post_attention_layernorm.weight")
        is_moe = index in self._spec.moe_layers
        mlp = self._experts(prefix + "mlp.") if is_moe else self._mlp(index, prefix + "mlp.")
        return_freed_memory()
        return LeanLayer(input_norm, attention, post_attention_norm, mlp)

    def final_norm(self) -> RmsNorm:
        """The norm before the LM head."""
        return self._norm("model.norm.weight")

    def _norm(self, name: str) -> RmsNorm:
        return RmsNorm(self._reader.whole(name, (self._spec.hidden_size,)), self._config.norm_eps)

    def _attention(self, index: int, prefix: str) -> LeanAttention | Empty:
        spec, heads = self._spec, self._rank.share.heads
        kv_heads = self._rank.share.kv_heads(spec.group_size)
        o_bias = self._bias_once(prefix + "o_proj.bias") if self._config.o_bias else None
        if not len(heads):
            return Empty(o_bias)
        rows = (scaled(heads, spec.head_size), scaled(kv_heads, spec.head_size), scaled(kv_heads, spec.head_size))
        counts = (spec.num_heads, spec.num_kv_heads, spec.num_kv_heads)
        named = [
            (prefix + f"{p}_proj", count * spec.head_size, span)
            for p, count, span in zip("qkv", counts, rows, strict=True)
        ]
        qkv = self._reader.stacked([(n + ".weight", (full, spec.hidden_size), [span]) for n, full, span in named])
        bias = None
        if self._config.qkv_bias:
            bias = self._reader.stacked([(n + ".bias", (full,), [span]) for n, full, span in named])
        o_shape = (spec.hidden_size, spec.num_heads * spec.head_size)
        o = self._reader.slices(prefix + "o_proj.weight", o_shape, 1, [rows[0]])
        weights = AttentionWeights(
            num_heads=len(heads),
            num_kv_heads=len(kv_heads),
            head_size=spec.head_size,
            qkv=make_matrix(qkv, bias),
            o=make_matrix(o, o_bias),
            qk_norm=self._qk_norm(prefix, len(heads), len(kv_heads)) if self._config.qk_norm else None,
        )
        attend = PagedAttention(head_runs(heads, spec.group_size), spec.head_size**-0.5, self._config.windows[index])
        return LeanAttention(index, weights, attend, self._adapters)

    def _qk_norm(self, prefix: str, num_heads: int, num_kv_heads: int) -> RmsNorm:
        q, k = (self._reader.whole(prefix + f"{p}_norm.weight", (self._spec.head_size,)) for p in "qk")
        return RmsNorm(torch.cat((q.expand(num_heads, -1), k.expand(num_kv_heads, -1))), self._config.norm_eps)

    def _mlp(self, index: int, prefix: str) -> Mlp:
        columns = self._rank.share.mlp
        bias = self._config.mlp_bias
        down_bias = self._bias_once(prefix + "down_proj.bias") if bias else None
        if not len(columns):
            return Empty(down_bias)
        width, hidden = self._spec.intermediate_size, self._spec.hidden_size
        names = [prefix + "gate_proj", prefix + "up_proj"]
        gate_up = self._reader.stacked([(name + ".weight", (width, hidden), [columns]) for name in names])
        gate_up_bias = self._reader.stacked([(name + ".bias", (width,), [columns]) for name in names]) if bias else None
        down = self._reader.slices(prefix + "down_proj.weight", (hidden, width), 1, [columns])
        activation = ACTIVATIONS[self._config.activation]
        return GatedMlp(
            index, make_matrix(gate_up, gate_up_bias), make_matrix(down, down_bias), activation, self._adapters
        )

    def _experts(self, prefix: str) -> Mlp:
        spec = self._spec
        router_weight: Matrix | None = None
        if self._rank.number == 0:
            shape = (spec.num_experts, spec.hidden_size)
            router_weight = make_matrix(self._reader.whole(prefix + "gate.weight", shape))
        router = Router(router_weight, spec.experts_per_token, self._config.norm_topk_prob)
        columns = self._rank.share.expert_mlp
        numbers = range(spec.num_experts) if len(columns) else range(0)
        pairs = [self._expert(f"{prefix}experts.{number}.", columns) for number in numbers]
        activation = ACTIVATIONS[self._config.activation]
        return ExpertMlp(router, [gate_up for gate_up, _ in pairs], [down for _, down in pairs], activation)

    def _expert(self, prefix: str, columns: Span) -> tuple[Matrix, Matrix]:
        width, hidden = self._spec.expert_intermediate_size, self._spec.hidden_size
        names = [prefix + "gate_proj.weight", prefix + "up_proj.weight"]
        gate_up = self._reader.stacked([(name, (width, hidden), [columns]) for name in names])
        down = self._reader.slices(prefix + "down_proj.weight", (hidden, width), 1, [columns])
        return make_matrix(gate_up), make_matrix(down)

    def _bias_once(self, name: str) -> Tensor | None:
        """The bias of a row-parallel matrix: rank 0 adds it, so that the sum has it once."""
        if self._rank.number != 0:
            return None
        return self._reader.whole(name, (self._spec.hidden_size,))


def scaled(span: Span, factor: int) -> Span:
    """Heads to rows."""
    return Span(span.start * factor, span.end * factor)

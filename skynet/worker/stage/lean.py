"""One decoder layer of our own for the Llama family: Llama, Mistral, Qwen2, Qwen3 and their mixtures of experts.

Imports nothing of transformers. A layer holds one rank's share; where a row-parallel matrix ends, the ranks sum.
"""

# T tokens of the step, D hidden size; of this rank: H query heads, h KV heads, m MLP columns; K head size

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Final, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from skynet.protocol.plan import Span
from skynet.worker.collectives import Collective, copy_to_ranks, no_part, sum_over_ranks
from skynet.worker.stage.adapters import AdapterTable, ColumnRange
from skynet.worker.stage.attention import PagedAttention
from skynet.worker.stage.batch import StepBatch
from skynet.worker.stage.matrix import Matrix
from skynet.worker.stage.norm import RmsNorm
from skynet.worker.stage.rope import Rotation, swap_halves

ACTIVATIONS: Final[dict[str, Callable[[Tensor], Tensor]]] = {
    "silu": F.silu,
    "swish": F.silu,
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_new": partial(F.gelu, approximate="tanh"),
    "gelu_fast": partial(F.gelu, approximate="tanh"),
    "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh"),
}


class Mlp(Protocol):
    """A layer's second half."""

    nbytes: int

    def __call__(self, x: Tensor, batch: StepBatch, group: Collective) -> Tensor:
        """x: [T, D], normed -> this rank's part of the sum, [T, D]."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionWeights:
    """What a rank with heads holds of a layer's attention."""

    num_heads: int
    num_kv_heads: int
    head_size: int
    qkv: Matrix  # [(H + 2h) K, D]
    o: Matrix  # [D, H K]
    qk_norm: RmsNorm | None  # weights [H + h, K]


class LeanAttention:
    """Self-attention with rotary positions."""

    def __init__(self, layer: int, weights: AttentionWeights, attend: PagedAttention, adapters: AdapterTable) -> None:
        self._layer = layer
        self._weights = weights
        self._attend = attend
        self._adapters = adapters
        self.nbytes = weights.qkv.nbytes + weights.o.nbytes
        q, kv = weights.num_heads * weights.head_size, weights.num_kv_heads * weights.head_size
        self._columns = (
            ColumnRange("q", Span(0, q)),
            ColumnRange("k", Span(q, q + kv)),
            ColumnRange("v", Span(q + kv, q + 2 * kv)),
        )

    def __call__(self, x: Tensor, cache: Tensor, batch: StepBatch, rotation: Rotation) -> Tensor:
        """x: [T, D], normed; cache: [2, h, slots, K], changed -> this rank's part of the sum, [T, D]."""
        weights = self._weights
        flat = weights.qkv(x)
        if batch.adapter_rows:
            for projection, span in self._columns:
                self._adapters.add(flat[:, span.start : span.end], x, self._layer, projection, batch)
        heads, kv_heads = weights.num_heads, weights.num_kv_heads
        qkv = flat.view(-1, heads + 2 * kv_heads, weights.head_size)  # [T, H + 2h, K]
        rotated = qkv.narrow(1, 0, heads + kv_heads)
        qk = rotated if weights.qk_norm is None else weights.qk_norm(rotated)
        if torch.is_grad_enabled():
            turned = torch.addcmul(qk * rotation.cos, swap_halves(qk), rotation.sin)
            qkv = torch.cat((turned, qkv.narrow(1, heads + kv_heads, kv_heads)), 1)
        else:
            torch.addcmul(qk * rotation.cos, swap_halves(qk), rotation.sin, out=rotated)
        key_value = qkv.narrow(1, heads, 2 * kv_heads).view(-1, 2, kv_heads, weights.head_size)
        context = self._attend(qkv.narrow(1, 0, heads), key_value, cache, batch)  # [T, H K]
        out = weights.o(context)
        if batch.adapter_rows:
            self._adapters.add(out, context, self._layer, "o", batch)
        return out


class GatedMlp:
    """down(activation(gate(x)) * up(x)), gate and up in one matrix."""

    def __init__(
        self, layer: int, gate_up: Matrix, down: Matrix, activation: Callable[[Tensor], Tensor], adapters: AdapterTable
    ) -> None:
        self._layer = layer
        self._gate_up = gate_up  # [2m, D]
        self._down = down  # [D, m]
        self._activation = activation
        self._adapters = adapters
        self.nbytes = gate_up.nbytes + down.nbytes
        width = gate_up.rows // 2
        self._columns = (ColumnRange("gate", Span(0, width)), ColumnRange("up", Span(width, 2 * width)))

    def __call__(self, x: Tensor, batch: StepBatch, group: Collective) -> Tensor:
        """See Mlp."""
        gate_up = self._gate_up(x)  # [T, 2m]
        if batch.adapter_rows:
            for projection, span in self._columns:
                self._adapters.add(gate_up[:, span.start : span.end], x, self._layer, projection, batch)
        gate, up = gate_up.chunk(2, -1)
        inner = times(self._activation(gate), up)  # [T, m]
        out = self._down(inner)
        if batch.adapter_rows:
            self._adapters.add(out, inner, self._layer, "down", batch)
        return out


def times(activated: Tensor, up: Tensor) -> Tensor:
    """The product; overwrites `activated`, unless its gradient needs it."""
    return activated * up if torch.is_grad_enabled() else activated.mul_(up)


class Empty:
    """The MLP or attention of a rank that holds none of it: a bias, if this rank is the one to add it, or zeros."""

    def __init__(self, bias: Tensor | None = None) -> None:
        self._bias = bias
        self.nbytes = 0 if bias is None else bias.nbytes

    def __call__(self, x: Tensor, batch: StepBatch, group: Collective) -> Tensor:
        """See Mlp."""
        zeros = no_part(x)
        return zeros if self._bias is None else zeros.add_(self._bias)


class LeanLayer:
    """Norm, attention, sum; norm, MLP, sum."""

    def __init__(
        self, input_norm: RmsNorm, attention: LeanAttention | Empty, post_attention_norm: RmsNorm, mlp: Mlp
    ) -> None:
        self._input_norm = input_norm
        self._attention = attention
        self._post_attention_norm = post_attention_norm
        self._mlp = mlp
        self.nbytes = attention.nbytes + mlp.nbytes

    def __call__(self, x: Tensor, cache: Tensor, batch: StepBatch, rotation: Rotation, group: Collective) -> Tensor:
        """x: [T, D], equal on all ranks -> the same, after this layer."""
        normed = copy_to_ranks(self._input_norm(x), group)
        if isinstance(self._attention, Empty):
            out = self._attention(normed, batch, group)
        else:
            out = self._attention(normed, cache, batch, rotation)
        x = x + sum_over_ranks(out, group)
        normed = copy_to_ranks(self._post_attention_norm(x), group)
        return x + sum_over_ranks(self._mlp(normed, batch, group), group)

"""GPT-2 on transformers' own blocks: their norms, residuals and attention scaling, our projections, split and cache.

The only module that imports transformers' modelling code. Each projection (Conv1D) becomes one of ours that holds this
rank's share; attention goes to the paged cache through transformers' attention interface.
"""

# T tokens of the step, D hidden size, H heads of this rank, K head size

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GPT2Config
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.gpt2.modeling_gpt2 import GPT2Block

from skynet.errors import UnsupportedArchitecture
from skynet.models.spec import ModelSpec
from skynet.protocol.plan import RankShare, Span, StageAssignment
from skynet.worker.collectives import Collective, SoloGroup, sum_over_ranks
from skynet.worker.stage.attention import PagedAttention, head_runs
from skynet.worker.stage.batch import StepBatch
from skynet.worker.stage.heap import return_freed_memory
from skynet.worker.stage.kv_cache import KvCache
from skynet.worker.stage.matrix import Matrix, make_matrix
from skynet.worker.stage.reader import ShardReader
from skynet.worker.stage.vocab import VocabEmbedding

_ATTENTION_NAME = "skynet_paged"


class _Ranks:
    """The group that a step's sums go to; set before each step, read by every row-parallel projection."""

    def __init__(self) -> None:
        self.group: Collective = SoloGroup()


class _Projection(nn.Module):
    """This rank's share of a Conv1D; with `ranks`, a row-parallel one, whose outputs are summed."""

    def __init__(self, matrix: Matrix, ranks: _Ranks | None = None) -> None:
        super().__init__()
        self.matrix = matrix
        self._ranks = ranks

    def forward(self, x: Tensor) -> Tensor:
        """x: [1, T, in] -> [1, T, out]."""
        y = self.matrix(x[0].contiguous())
        return (y if self._ranks is None else sum_over_ranks(y, self._ranks.group))[None]


class _NoHeads(nn.Module):
    """Attention of a rank without heads: it takes part in the sum with nothing, or with the bias alone."""

    def __init__(self, bias: Tensor | None, ranks: _Ranks) -> None:
        super().__init__()
        self._bias = bias
        self._ranks = ranks

    def forward(self, hidden: Tensor, **_: Any) -> tuple[Tensor, None]:
        """hidden: [1, T, D] -> the sum over the other ranks."""
        part = torch.zeros_like(hidden) if self._bias is None else self._bias.expand_as(hidden).clone()
        return sum_over_ranks(part[0], self._ranks.group)[None], None


def _attend(
    module: nn.Module,
    query: Tensor,  # [1, H, T, K], as key and value
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    runs: tuple[Any, ...],
    cache: Tensor,
    batch: StepBatch,
    **_: Any,
) -> tuple[Tensor, None]:
    """Transformers' attention interface, served from the paged cache -> [1, T, H, K]."""
    key_value = torch.stack((key[0], value[0])).permute(2, 0, 1, 3)  # [T, 2, H, K]
    context = PagedAttention(runs, scaling)(query[0].transpose(0, 1).contiguous(), key_value, cache, batch)
    return context.view(1, query.shape[2], query.shape[1], query.shape[3]), None


ALL_ATTENTION_FUNCTIONS.register(_ATTENTION_NAME, _attend)


class Gpt2Body:
    """GPT-2's blocks as a stage's body."""

    def __init__(
        self,
        blocks: Sequence[nn.Module],
        ranks: _Ranks,
        share: RankShare,
        embedding: VocabEmbedding | None,
        positions: Tensor | None,  # first stage: [max_positions, D]
        norm: nn.LayerNorm | None,  # last stage
        nbytes: int,
    ) -> None:
        self._blocks = blocks
        self._ranks = ranks
        self._runs = head_runs(share.heads, 1)
        self._embedding = embedding
        self._positions = positions
        self._norm = norm
        self.nbytes = nbytes

    def embed(self, batch: StepBatch, group: Collective) -> Tensor:
        """See Body."""
        assert self._embedding is not None
        assert self._positions is not None
        return self._embedding(batch.token_ids, group) + self._positions[batch.positions]

    def run(self, hidden: Tensor, cache: KvCache, batch: StepBatch, group: Collective) -> Tensor:
        """See Body."""
        if torch.is_grad_enabled():
            raise UnsupportedArchitecture("gpt2: its layers aren't trained; run them without gradients")
        self._ranks.group = group
        x = hidden[None]
        for index, block in enumerate(self._blocks):
            x = block(x, None, None, runs=self._runs, cache=cache.layer(index), batch=batch)
        return x[0]

    def final_norm(self, hidden: Tensor) -> Tensor:
        """See Body."""
        assert self._norm is not None
        normed: Tensor = self._norm(hidden)
        return normed


def load_gpt2(
    config: Mapping[str, object],
    spec: ModelSpec,
    assignment: StageAssignment,
    reader: ShardReader,
    embedding: VocabEmbedding | None,
) -> Gpt2Body:
    """This rank's share of the assignment's blocks. Raises like `load_stage`."""
    return _Loader(config, spec, assignment, reader).body(embedding)


class _Loader:
    def __init__(
        self, config: Mapping[str, object], spec: ModelSpec, assignment: StageAssignment, reader: ShardReader
    ) -> None:
        self._config = GPT2Config.from_dict(dict(config))
        self._config._attn_implementation = _ATTENTION_NAME
        self._spec = spec
        self._assignment = assignment
        self._share = assignment.share
        self._reader = reader
        self._prefix = "transformer." if reader.has("transformer.wte.weight") else ""  # the first checkpoints have none
        self._ranks = _Ranks()
        self._nbytes = 0

    def body(self, embedding: VocabEmbedding | None) -> Gpt2Body:
        spec, layers = self._spec, self._assignment.layers
        positions = None
        if self._assignment.is_first:
            positions = self._reader.whole(self._prefix + "wpe.weight", (spec.max_positions, spec.hidden_size))
            self._nbytes += positions.nbytes
        blocks = [self._block(index) for index in range(layers.start, layers.end)]
        norm = self._norm(self._prefix + "ln_f.") if self._assignment.is_last else None
        return Gpt2Body(blocks, self._ranks, self._share, embedding, positions, norm, self._nbytes)

    def _block(self, index: int) -> nn.Module:
        with torch.device("meta"):  # every parameter is replaced below
            block: Any = GPT2Block(self._config, layer_idx=index)  # type: ignore[no-untyped-call]
        name = f"{self._prefix}h.{index}."
        block.ln_1, block.ln_2 = self._norm(name + "ln_1."), self._norm(name + "ln_2.")
        self._fill_attention(block, name + "attn.")
        width, hidden = self._spec.intermediate_size, self._spec.hidden_size
        block.mlp.c_fc = self._columns(name + "mlp.c_fc.", (hidden, width), [self._share.mlp])
        block.mlp.c_proj = self._rows(name + "mlp.c_proj.", (width, hidden), self._share.mlp)
        return_freed_memory()
        made: nn.Module = block.eval()
        return made

    def _fill_attention(self, block: Any, name: str) -> None:
        spec, heads = self._spec, self._share.heads
        hidden = spec.hidden_size
        if not len(heads):
            block.attn = _NoHeads(self._bias_once(name + "c_proj.bias"), self._ranks)
            return
        start, end = heads.start * spec.head_size, heads.end * spec.head_size
        thirds = [Span(start + i * hidden, end + i * hidden) for i in range(3)]  # queries, keys, values
        block.attn.c_attn = self._columns(name + "c_attn.", (hidden, 3 * hidden), thirds)
        block.attn.c_proj = self._rows(name + "c_proj.", (hidden, hidden), Span(start, end))
        block.attn.num_heads, block.attn.split_size = len(heads), end - start

    def _columns(self, name: str, shape: tuple[int, int], spans: Sequence[Span]) -> _Projection:
        weight = self._reader.slices(name + "weight", shape, 1, spans)
        bias = self._reader.slices(name + "bias", shape[1:], 0, spans)
        return self._projection(weight, bias, None)

    def _rows(self, name: str, shape: tuple[int, int], span: Span) -> _Projection:
        weight = self._reader.slices(name + "weight", shape, 0, [span])
        return self._projection(weight, self._bias_once(name + "bias"), self._ranks)

    def _projection(self, weight: Tensor, bias: Tensor | None, ranks: _Ranks | None) -> _Projection:
        matrix = make_matrix(weight.T.contiguous(), bias)  # Conv1D keeps [in, out]
        self._nbytes += matrix.nbytes
        return _Projection(matrix, ranks)

    def _bias_once(self, name: str) -> Tensor | None:
        if self._assignment.rank != 0:
            return None
        return self._reader.whole(name, (self._spec.hidden_size,))

    def _norm(self, name: str) -> nn.LayerNorm:
        size = self._spec.hidden_size
        norm = nn.LayerNorm(size, eps=self._config.layer_norm_epsilon, device="meta")
        norm.weight = nn.Parameter(self._reader.whole(name + "weight", (size,)), requires_grad=False)
        norm.bias = nn.Parameter(self._reader.whole(name + "bias", (size,)), requires_grad=False)
        return norm.eval()

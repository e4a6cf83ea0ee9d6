"""From a model's config and one rank's assignment to a stage that runs."""

from __future__ import annotations

import logging
from collections.abc import Mapping

import torch
from torch import Tensor

from skynet.errors import ModelError
from skynet.models.config import read_lean, read_spec
from skynet.models.spec import ModelSpec
from skynet.models.tensors import TensorSource
from skynet.protocol.plan import Dtype, Span, StageAssignment
from skynet.worker.collectives import Collective
from skynet.worker.stage.adapters import AdapterTable
from skynet.worker.stage.batch import StepBatch, StepLimits
from skynet.worker.stage.candidates import MAX_VOCAB
from skynet.worker.stage.kv_cache import KvCache
from skynet.worker.stage.lean import LeanLayer
from skynet.worker.stage.lean_loader import LeanLoader, Rank
from skynet.worker.stage.matrix import Matrix, PlainMatrix, make_matrix
from skynet.worker.stage.norm import RmsNorm
from skynet.worker.stage.reader import Progress, ShardReader
from skynet.worker.stage.rope import Rope
from skynet.worker.stage.stage import Body, Stage
from skynet.worker.stage.vocab import VocabEmbedding

logger = logging.getLogger(__name__)

TORCH_DTYPES: Mapping[Dtype, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


def load_stage(
    config: Mapping[str, object],
    assignment: StageAssignment,
    source: TensorSource,
    device: torch.device,
    progress: Progress | None = None,
) -> Stage:
    """Reads this rank's slices of `source` and builds its stage on `device`.

    `config` is the parsed config.json. `progress` is called with the bytes read so far. Peak memory: the shard, its KV
    cache and one tensor. Raises UnsupportedArchitecture, ModelError or WeightError.
    """
    spec = read_spec(config, assignment.dtype)
    _check_assignment(spec, assignment)
    dtype = TORCH_DTYPES[assignment.dtype]
    reader = ShardReader(source, dtype, device, progress)
    adapters = AdapterTable()
    with torch.no_grad():  # not inference mode: its tensors could never take part in training
        names = _names(spec, reader)
        embedding = _embedding(spec, names, assignment, reader)
        body = _body(config, spec, assignment, reader, embedding, adapters)
        head = _head(spec, names, assignment, reader, embedding)
        cache = _cache(spec, assignment, dtype, device)
    is_shared = embedding is not None and head is not None and spec.is_tied
    head_bytes = 0 if head is None or is_shared else head.nbytes
    embedding_bytes = 0 if embedding is None else embedding.weight.nbytes
    stage = Stage(
        assignment=assignment,
        limits=StepLimits(
            vocab_size=spec.vocab_size,
            max_positions=spec.max_positions,
            num_blocks=assignment.num_blocks,
            block_size=assignment.block_size,
        ),
        hidden_size=spec.hidden_size,
        body=body,
        head=head,
        cache=cache,
        adapters=adapters,
        dtype=dtype,
        device=device,
        weight_bytes=body.nbytes + head_bytes + embedding_bytes,
    )
    logger.info(
        "stage loaded model_type=%s layers=%d-%d rank=%d weight_bytes=%d kv_bytes=%d",
        spec.model_type,
        assignment.layers.start,
        assignment.layers.end - 1,
        assignment.rank,
        stage.weight_bytes,
        stage.kv_bytes,
    )
    return stage


class LeanBody:
    """Lean layers as a stage's body."""

    def __init__(
        self, layers: list[LeanLayer], rope: Rope, embedding: VocabEmbedding | None, norm: RmsNorm | None
    ) -> None:
        self._layers = layers
        self._rope = rope
        self._embedding = embedding
        self._norm = norm
        self.nbytes = sum(layer.nbytes for layer in layers)

    def embed(self, batch: StepBatch, group: Collective) -> Tensor:
        """See Body."""
        assert self._embedding is not None
        return self._embedding(batch.token_ids, group)

    def run(self, hidden: Tensor, cache: KvCache, batch: StepBatch, group: Collective) -> Tensor:
        """See Body."""
        if torch.is_grad_enabled() and not hidden.requires_grad:
            hidden = hidden.detach().requires_grad_()  # on every rank, or their backward passes would differ
        rotation = self._rope.rotation(batch.positions)
        for index, layer in enumerate(self._layers):
            hidden = layer(hidden, cache.layer(index), batch, rotation, group)
        return hidden

    def final_norm(self, hidden: Tensor) -> Tensor:
        """See Body."""
        assert self._norm is not None
        return self._norm(hidden)


class _Names:
    """What checkpoints of an architecture call the tensors outside its layers."""

    def __init__(self, embedding: str, head: str) -> None:
        self.embedding = embedding
        self.head = head


def _names(spec: ModelSpec, reader: ShardReader) -> _Names:
    if spec.model_type == "gpt2":
        prefix = "transformer." if reader.has("transformer.wte.weight") else ""  # the first checkpoints have none
        return _Names(prefix + "wte.weight", "lm_head.weight")
    return _Names("model.embed_tokens.weight", "lm_head.weight")


def _body(
    config: Mapping[str, object],
    spec: ModelSpec,
    assignment: StageAssignment,
    reader: ShardReader,
    embedding: VocabEmbedding | None,
    adapters: AdapterTable,
) -> Body:
    if spec.model_type == "gpt2":
        from skynet.worker.stage.gpt2 import load_gpt2  # transformers' modelling code, for those who need it

        return load_gpt2(config, spec, assignment, reader, embedding)
    lean = read_lean(config)
    loader = LeanLoader(spec, lean, Rank(assignment.rank, assignment.share), reader, adapters)
    layers = [loader.layer(index) for index in range(assignment.layers.start, assignment.layers.end)]
    rope = Rope(lean.rope, spec.head_size, reader.dtype, reader.device)
    return LeanBody(layers, rope, embedding, loader.final_norm() if assignment.is_last else None)


def _embedding(
    spec: ModelSpec, names: _Names, assignment: StageAssignment, reader: ShardReader
) -> VocabEmbedding | None:
    if not assignment.is_first:
        return None
    return VocabEmbedding(_vocab_rows(spec, names.embedding, assignment.share.vocab, reader), assignment.share.vocab)


def _head(
    spec: ModelSpec, names: _Names, assignment: StageAssignment, reader: ShardReader, embedding: VocabEmbedding | None
) -> Matrix | None:
    if not assignment.is_last or not len(assignment.share.vocab):
        return None
    if spec.is_tied and embedding is not None:
        return PlainMatrix(embedding.weight)  # one copy serves both
    name = names.embedding if spec.is_tied else names.head
    return make_matrix(_vocab_rows(spec, name, assignment.share.vocab, reader))


def _vocab_rows(spec: ModelSpec, name: str, vocab: Span, reader: ShardReader) -> Tensor:
    return reader.slices(name, (spec.vocab_size, spec.hidden_size), 0, [vocab])


def _cache(spec: ModelSpec, assignment: StageAssignment, dtype: torch.dtype, device: torch.device) -> KvCache:
    return KvCache(
        num_layers=len(assignment.layers),
        num_kv_heads=len(assignment.share.kv_heads(spec.group_size)),
        head_size=spec.head_size,
        num_blocks=assignment.num_blocks,
        block_size=assignment.block_size,
        dtype=dtype,
        device=device,
    )


def _check_assignment(spec: ModelSpec, assignment: StageAssignment) -> None:
    share = assignment.share
    bounds = (
        ("layers", assignment.layers.end, spec.num_layers),
        ("heads", share.heads.end, spec.num_heads),
        ("mlp columns", share.mlp.end, spec.intermediate_size),
        ("expert columns", share.expert_mlp.end, spec.expert_intermediate_size),
        ("vocabulary rows", share.vocab.end, spec.vocab_size),
    )
    for what, end, limit in bounds:
        if end > limit:
            raise ModelError(f"the plan names {what} up to {end}, the model has {limit}: plan and model don't match")
    if assignment.num_layers != spec.num_layers:
        raise ModelError(f"the plan is for {assignment.num_layers} layers, config.json has {spec.num_layers}")
    if spec.vocab_size > MAX_VOCAB:
        raise ModelError(f"vocabularies above {MAX_VOCAB} aren't supported, this one has {spec.vocab_size}")

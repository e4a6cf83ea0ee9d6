"""What one rank reads of a checkpoint, known before anything is read: what to fetch, and how much that is. No torch."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from typing import Final

from skynet.models.config import read_spec
from skynet.models.expected import expected_tensors
from skynet.models.spec import ModelSpec
from skynet.models.store.reads import TensorRead
from skynet.protocol.plan import Span, StageAssignment

_LAYER: Final = re.compile(r"(?:model\.layers|(?:transformer\.)?h)\.(\d+)\.(.*)")
_EXPERT: Final = re.compile(r"mlp\.experts\.\d+\.")


def shard_reads(
    config: Mapping[str, object], assignment: StageAssignment, names: Collection[str]
) -> Iterator[TensorRead]:
    """What `load_stage` reads for this assignment, about in its order; `names` are the checkpoint's tensors.

    Reads of nothing are left out. Raises UnsupportedArchitecture or ModelError.
    """
    spec = read_spec(config, assignment.dtype)
    cuts = _Gpt2Cuts(spec, assignment) if spec.model_type == "gpt2" else _LeanCuts(spec, assignment)
    prefix = "transformer." if "transformer.wte.weight" in names else ""
    for name, shape in expected_tensors(config, prefix):
        in_layer = _LAYER.fullmatch(name)
        if in_layer is None:
            read = cuts.outside_layers(name)
        elif assignment.layers.start <= int(in_layer[1]) < assignment.layers.end:
            read = cuts.in_layer(name, _EXPERT.sub("expert.", in_layer[2]), shape)
        else:
            continue
        if read is not None and (read.dim is None or any(map(len, read.spans))):
            yield read


class _Cuts:
    """How the tensors of one rank are cut. None: it doesn't read that one."""

    def __init__(self, spec: ModelSpec, assignment: StageAssignment) -> None:
        self._spec, self._assignment, self._share = spec, assignment, assignment.share

    def outside_layers(self, name: str) -> TensorRead | None:
        """Embeddings, final norm, head."""
        first, last = self._assignment.is_first, self._assignment.is_last
        rows = TensorRead(name, 0, (self._share.vocab,))
        if name.endswith(("embed_tokens.weight", "wte.weight")):
            return rows if first or (last and self._spec.is_tied) else None
        if name == "lm_head.weight":
            return rows if last else None
        if name.endswith("wpe.weight"):
            return TensorRead(name) if first else None
        return TensorRead(name) if last else None

    def in_layer(self, name: str, part: str, shape: tuple[int, ...]) -> TensorRead | None:
        """A tensor of a layer; `part` is its name within the layer."""
        raise NotImplementedError

    def _once(self, name: str) -> TensorRead | None:
        """What rank 0 alone needs: it adds the bias to the ranks' sum, and chooses the experts."""
        return TensorRead(name) if self._assignment.rank == 0 else None

    def _heads(self, heads: Span, offset: int = 0) -> Span:
        size = self._spec.head_size
        return Span(offset + heads.start * size, offset + heads.end * size)


class _LeanCuts(_Cuts):
    """The Llama family: matrices are [out, in]."""

    def in_layer(self, name: str, part: str, shape: tuple[int, ...]) -> TensorRead | None:
        share = self._share
        matrix, _, kind = part.rpartition(".")
        match matrix.rpartition(".")[2]:
            case "q_proj":
                return TensorRead(name, 0, (self._heads(share.heads),))
            case "k_proj" | "v_proj":
                return TensorRead(name, 0, (self._heads(share.kv_heads(self._spec.group_size)),))
            case "o_proj":
                return self._once(name) if kind == "bias" else TensorRead(name, 1, (self._heads(share.heads),))
            case "q_norm" | "k_norm":
                return TensorRead(name) if len(share.heads) else None
            case "gate_proj" | "up_proj" | "down_proj" as projection:
                columns = share.expert_mlp if part.startswith("expert.") else share.mlp
                if projection != "down_proj":
                    return TensorRead(name, 0, (columns,))
                return self._once(name) if kind == "bias" else TensorRead(name, 1, (columns,))
            case "gate":
                return self._once(name)
        return TensorRead(name)  # the layer's norms


class _Gpt2Cuts(_Cuts):
    """GPT-2: Conv1D keeps [in, out], and queries, keys and values are one matrix."""

    def in_layer(self, name: str, part: str, shape: tuple[int, ...]) -> TensorRead | None:
        share, hidden = self._share, self._spec.hidden_size
        last_dim = len(shape) - 1
        match part.rpartition("."):
            case ("attn.c_attn", _, _):
                return TensorRead(name, last_dim, tuple(self._heads(share.heads, i * hidden) for i in range(3)))
            case ("mlp.c_fc", _, _):
                return TensorRead(name, last_dim, (share.mlp,))
            case ("attn.c_proj" | "mlp.c_proj", _, "bias"):
                return self._once(name)
            case ("attn.c_proj", _, _):
                return TensorRead(name, 0, (self._heads(share.heads),))
            case ("mlp.c_proj", _, _):
                return TensorRead(name, 0, (share.mlp,))
        return TensorRead(name)  # the block's norms

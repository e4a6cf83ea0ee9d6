"""A stage's tensors one by one, and what a share holds of each: the slow way to count bytes, for comparison."""

from __future__ import annotations

from skynet.models.costs import Part, TensorSplit, embedding_tensors, head_tensors, layer_tensors
from skynet.models.spec import DTYPE_BYTES, ModelSpec
from skynet.protocol.plan import LayerSpan, RankShare, Span


def stage_tensors(spec: ModelSpec, layers: LayerSpan) -> tuple[TensorSplit, ...]:
    """Every tensor of a stage, each once: its layers, the embedding if it is the first, the head if it is the last."""
    found = {t.name: t for layer in range(layers.start, layers.end) for t in layer_tensors(spec, layer)}
    if layers.start == 0:
        found |= {t.name: t for t in embedding_tensors(spec)}
    if layers.end == spec.num_layers:
        found |= {t.name: t for t in head_tensors(spec)}
    return tuple(found.values())


def held_units(spec: ModelSpec, share: RankShare, part: Part) -> Span:
    """Which units of `part` a share holds."""
    return share.kv_heads(spec.group_size) if part == "kv_heads" else getattr(share, part)


def ranges(tensor: TensorSplit, held: Span) -> tuple[Span, ...]:
    """Index ranges along the tensor's `dim` that belong to the units `held` of its part; one per block."""
    block = tensor.shape[tensor.dim] // tensor.blocks
    return tuple(
        Span(b * block + held.start * tensor.unit, b * block + held.end * tensor.unit) for b in range(tensor.blocks)
    )


def held_bytes_by_inventory(spec: ModelSpec, layers: LayerSpan, share: RankShare) -> int:
    """Bytes counted tensor by tensor and range by range, as a loader would slice them."""
    total = 0
    for tensor in stage_tensors(spec, layers):
        elements = tensor.num_elements
        if tensor.part is not None:
            held = ranges(tensor, held_units(spec, share, tensor.part))
            elements = elements // tensor.shape[tensor.dim] * sum(map(len, held))
        total += elements * DTYPE_BYTES[spec.dtype]
    return total

"""Every architecture in every layout against transformers on the same checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from skynet.models.tensors import DirectorySource
from skynet.protocol.plan import Span
from skynet.testing.loopback import LoopbackGroup
from skynet.worker.collectives import Collective
from tests.oracle.checkpoints import MAIN, VARIANTS, Checkpoint
from tests.oracle.scenario import measure

TOLERANCE = 1e-4
Named = Callable[[str], Checkpoint]

GROUPS: dict[int, Sequence[float]] = {1: (1.0,), 2: (1.0, 1.0), 3: (5.0, 2.0, 4.0), 4: (4.0, 3.0, 2.0, 3.0)}


def layout(ranks: int, stages: int) -> list[Sequence[float]]:
    return [GROUPS[ranks]] * stages


@pytest.mark.parametrize("stages", [1, 2, 3])
@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
@pytest.mark.parametrize("name", MAIN)
def test_every_layout_gives_the_logits_and_tokens_of_transformers(
    checkpoint_named: Named, name: str, ranks: int, stages: int
) -> None:
    result = measure(checkpoint_named(name), layout(ranks, stages))
    assert result.distance <= TOLERANCE
    assert result.tokens_agree


@pytest.mark.parametrize("name", VARIANTS)
def test_every_setting_has_the_effect_it_has_in_transformers(checkpoint_named: Named, name: str) -> None:
    for weights in ([(1.0,)], [(2.0, 1.0), (1.0, 1.0, 1.0)]):
        result = measure(checkpoint_named(name), weights)
        assert result.distance <= TOLERANCE
        assert result.tokens_agree


@pytest.mark.parametrize("name", MAIN)
@pytest.mark.parametrize(
    "weights",
    [[(9.0, 1.0)], [(1.0, 0.0, 2.0)], [(0.0, 1.0)], [(1.0,), (1.0, 2.0, 1.0, 1.0), (1.0, 1.0)]],
    ids=["9-1", "empty-middle", "empty-first", "mixed-widths"],
)
def test_uneven_and_empty_shares_give_the_same_logits(
    checkpoint_named: Named, name: str, weights: list[tuple[float, ...]]
) -> None:
    result = measure(checkpoint_named(name), weights)
    assert result.distance <= TOLERANCE
    assert result.tokens_agree


class SwappedHeads:
    """A checkpoint with two query heads of one layer exchanged."""

    def __init__(self, source: DirectorySource, name: str, dim: int, head_size: int) -> None:
        self._source, self._name, self._dim, self._head_size = source, name, dim, head_size

    def names(self) -> frozenset[str]:
        return self._source.names()

    def shape(self, name: str) -> tuple[int, ...]:
        return self._source.shape(name)

    def read(self, name: str, dim: int | None = None, spans: Sequence[Span] = ()) -> Tensor:
        if name != self._name or dim is None:
            return self._source.read(name, dim, spans)
        whole = self._source.read(name).movedim(self._dim, 0).clone()
        k = self._head_size
        whole[: 2 * k] = torch.cat((whole[k : 2 * k], whole[:k]))
        whole = whole.movedim(0, self._dim)
        return torch.cat([whole.narrow(dim, span.start, len(span)) for span in spans], dim)


@pytest.mark.parametrize("name", MAIN)
def test_two_exchanged_heads_are_noticed(checkpoint_named: Named, name: str) -> None:
    checkpoint = checkpoint_named(name)
    tensor, dim = ("transformer.h.1.attn.c_attn.weight", 1) if name == "gpt2" else (
        "model.layers.1.self_attn.q_proj.weight",
        0,
    )  # fmt: skip
    head_size = {"gpt2": 8, "mistral": 24, "qwen2": 8}.get(name, 16)
    source = SwappedHeads(DirectorySource(checkpoint.path), tensor, dim, head_size)
    assert measure(checkpoint, layout(2, 1), source=source).distance > 100 * TOLERANCE


class ForgetfulGroup:
    """A group of which one rank leaves out the others' part of one exchange in each step."""

    def __init__(self, group: LoopbackGroup, forgotten: int) -> None:
        self._group, self._forgotten, self._calls = group, forgotten, 0
        self.rank, self.size = group.rank, group.size

    def all_reduce(self, x: Tensor) -> Tensor:
        self._calls += 1
        own = x.clone()
        total = self._group.all_reduce(x)
        return own if self._calls == self._forgotten else total

    def gather(self, x: Tensor, root: int = 0) -> list[Tensor] | None:
        return self._group.gather(x, root)

    def broadcast(self, x: Tensor | None, root: int = 0, *, like: Tensor) -> Tensor:
        return self._group.broadcast(x, root, like=like)


@pytest.mark.parametrize("name", MAIN)
def test_one_dropped_exchange_is_noticed(checkpoint_named: Named, name: str) -> None:
    def wrap(_: int, group: LoopbackGroup) -> Collective:
        return ForgetfulGroup(group, forgotten=4)  # the embedding's is the first, then two per layer

    assert measure(checkpoint_named(name), layout(2, 1), wrap=wrap).distance > 100 * TOLERANCE


@pytest.mark.parametrize("name", MAIN)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_sixteen_bit_layouts_stay_near_the_float32_logits(checkpoint_named: Named, name: str, dtype: str) -> None:
    result = measure(checkpoint_named(name), layout(2, 2), dtype=dtype)  # type: ignore[arg-type]
    assert result.mean_distance <= (0.02 if dtype == "bfloat16" else 0.005)


@pytest.mark.parametrize(
    ("name", "field", "value"),
    [
        ("llama", "rms_norm_eps", 1e-6),
        ("llama", "rope_parameters", {"rope_type": "default", "rope_theta": 500.0}),
        ("llama", "rope_parameters", {**MAIN["llama"]["rope_parameters"], "low_freq_factor": 2.0}),
        ("mistral", "sliding_window", None),
        ("mistral", "sliding_window", 8),
        ("mistral", "hidden_act", "silu"),
        ("qwen2", "sliding_window", 7),
        ("qwen2", "layer_types", ["sliding_attention"] * 3 + ["full_attention"]),
        ("qwen3", "layer_types", None),
        ("qwen3", "rope_parameters", {**MAIN["qwen3"]["rope_parameters"], "factor": 2.0}),
        ("qwen3_moe", "norm_topk_prob", False),
        ("qwen3_moe", "num_experts_per_tok", 3),
        ("qwen3_moe", "sliding_window", 10),
        ("gpt2", "layer_norm_epsilon", 1e-5),
        ("gpt2", "scale_attn_by_inverse_layer_idx", False),
    ],
)
def test_these_checkpoints_would_show_a_setting_that_is_ignored(
    checkpoint_named: Named, name: str, field: str, value: object
) -> None:
    checkpoint = checkpoint_named(name)
    altered = replace(checkpoint, config={**checkpoint.config, field: value})
    assert measure(altered, layout(1, 1)).distance > 10 * TOLERANCE

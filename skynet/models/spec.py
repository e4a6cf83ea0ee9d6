"""A model's shape, read from its `config.json`: all that planning and splitting need, without torch.

Filled by `skynet.models.config.read_spec`, which refuses architectures and settings that we don't run.
"""

from __future__ import annotations

from dataclasses import dataclass

from skynet.protocol.plan import Dtype

DTYPE_BYTES: dict[Dtype, int] = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """Dimensions of a decoder-only transformer. Sizes are counts of elements, not bytes."""

    model_type: str  # config.json's `model_type`: llama, mistral, qwen2, qwen3, qwen3_moe, gpt2
    num_layers: int
    hidden_size: int
    num_heads: int  # query heads
    num_kv_heads: int  # divides num_heads
    head_size: int
    intermediate_size: int  # of a dense MLP
    vocab_size: int
    max_positions: int  # longest sequence, in tokens
    dtype: Dtype = "bfloat16"  # how weights, activations and KV are held while running
    is_tied: bool = False  # LM head shares the embedding: held by first and last stage
    gated_mlp: bool = True  # gate, up and down matrices; False: up and down only (GPT-2)
    num_experts: int = 0  # 0: no mixture of experts
    experts_per_token: int = 0
    expert_intermediate_size: int = 0
    moe_layers: tuple[int, ...] = ()  # layers whose MLP is a mixture of experts
    learned_positions: bool = False  # GPT-2: a [max_positions, hidden] table on the first stage
    qkv_bias: bool = False  # beside the matrices: one number per row (GPT-2 has them all and doesn't need to say so)
    o_bias: bool = False
    mlp_bias: bool = False  # of a dense MLP

    def __post_init__(self) -> None:
        for name in (
            "num_layers",
            "hidden_size",
            "num_heads",
            "num_kv_heads",
            "head_size",
            "vocab_size",
            "max_positions",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"{self.num_heads} query heads can't share {self.num_kv_heads} KV heads evenly")

    @property
    def group_size(self) -> int:
        """Query heads that share one KV head."""
        return self.num_heads // self.num_kv_heads

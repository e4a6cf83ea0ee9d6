"""Small checkpoints whose weights make every head and every setting matter, and what transformers makes of them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

_SMALL: Mapping[str, Any] = {
    "vocab_size": 131,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
    "initializer_range": 0.2,
}
_MIXED = ["full_attention", "sliding_attention", "full_attention", "sliding_attention"]
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
_YARN = {"rope_type": "yarn", "rope_theta": 100.0, "factor": 4.0, "original_max_position_embeddings": 32}

# One per architecture for the matrix of layouts, with as many settings away from their defaults as it has.
MAIN: Mapping[str, Mapping[str, Any]] = {
    "llama": {
        **_SMALL,
        "attention_bias": True,
        "mlp_bias": True,
        "rms_norm_eps": 1e-3,
        "rope_parameters": _LLAMA3,
        "tie_word_embeddings": True,
    },
    "mistral": {**_SMALL, "sliding_window": 7, "head_dim": 24, "hidden_act": "gelu"},
    "qwen2": {
        **{name: value for name, value in _SMALL.items() if name != "head_dim"},
        "use_sliding_window": True,
        "sliding_window": 6,
        "max_window_layers": 2,
    },
    "qwen3": {
        **_SMALL,
        "attention_bias": True,
        "use_sliding_window": True,
        "sliding_window": 5,
        "layer_types": _MIXED,
        "rope_parameters": _YARN,
        "tie_word_embeddings": True,
    },
    "qwen3_moe": {
        **_SMALL,
        "num_experts": 6,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 40,
        "mlp_only_layers": [1],
        "norm_topk_prob": True,
        "use_sliding_window": True,
        "sliding_window": 9,
    },
    "gpt2": {
        "vocab_size": 131,
        "n_positions": 128,
        "n_embd": 64,
        "n_layer": 4,
        "n_head": 8,
        "n_inner": 80,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 2,
        "initializer_range": 0.2,
        "layer_norm_epsilon": 1e-3,
        "scale_attn_by_inverse_layer_idx": True,
    },
}
# The other value of each setting, on fewer layouts.
VARIANTS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "llama-plain": ("llama", {**_SMALL, "head_dim": None}),
    "llama-linear-rope": (
        "llama",
        {**_SMALL, "rope_parameters": {"rope_type": "linear", "rope_theta": 50.0, "factor": 3.0}},
    ),
    "llama-dynamic-rope": (
        "llama",
        {**_SMALL, "rope_parameters": {"rope_type": "dynamic", "rope_theta": 50.0, "factor": 3.0}},
    ),
    "llama-gelu-tanh": ("llama", {**_SMALL, "hidden_act": "gelu_pytorch_tanh", "num_key_value_heads": 8}),
    "llama-relu-multi-query": ("llama", {**_SMALL, "hidden_act": "relu", "num_key_value_heads": 1}),
    "mistral-no-window": ("mistral", {**_SMALL, "sliding_window": None, "rope_parameters": _YARN | {"beta_fast": 16}}),
    "qwen2-layer-types": (
        "qwen2",
        {**_SMALL, "use_sliding_window": True, "sliding_window": 4, "layer_types": _MIXED, "tie_word_embeddings": True},
    ),
    "qwen2-full": ("qwen2", {**_SMALL, "rope_parameters": _YARN | {"truncate": False, "attention_factor": 1.3}}),
    "qwen3-plain": ("qwen3", dict(_SMALL)),
    "qwen3_moe-sparse-step": (
        "qwen3_moe",
        {
            **_SMALL,
            "num_experts": 4,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 24,
            "decoder_sparse_step": 2,
            "attention_bias": True,
        },
    ),
    "gpt2-untied": (
        "gpt2",
        {
            **MAIN["gpt2"],
            "tie_word_embeddings": False,
            "scale_attn_weights": False,
            "scale_attn_by_inverse_layer_idx": False,
            "activation_function": "relu",
            "n_inner": None,
            "initializer_range": 0.1,
        },
    ),
}


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A saved model and transformers' answer to token ids."""

    path: Path
    config: Mapping[str, object]
    model: Any

    @torch.inference_mode()
    def logits(self, token_ids: Sequence[int]) -> Tensor:
        """[len(token_ids), vocabulary] float32."""
        result: Tensor = self.model(torch.tensor([token_ids])).logits[0].float()
        return result


def make_checkpoint(path: Path, model_type: str, settings: Mapping[str, Any]) -> Checkpoint:
    """Saves a random model; biases and norms, which start out as zeros and ones, are made to matter too."""
    torch.manual_seed(7)
    config = transformers.AutoConfig.for_model(model_type, **settings)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".bias"):
                parameter.normal_(0, 0.3)
            elif parameter.dim() == 1:
                parameter.normal_(1, 0.3)
    model.save_pretrained(path)
    return Checkpoint(path, json.loads((path / "config.json").read_text()), model)

"""The config.json of popular checkpoints on the hub is accepted, and describes as many parameters as they have."""

from __future__ import annotations

import math
from typing import Any

import pytest

from skynet.models.config import read_spec
from skynet.models.expected import expected_tensors

LLAMA = {
    "architectures": ["LlamaForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "hidden_act": "silu",
    "initializer_range": 0.02, "model_type": "llama", "pretraining_tp": 1, "rms_norm_eps": 1e-05,
    "torch_dtype": "bfloat16", "use_cache": True,
}  # fmt: skip
SMOLLM2 = LLAMA | {
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2, "is_llama_config": True, "max_position_embeddings": 8192,
    "rope_interleaved": False, "rope_scaling": None, "tie_word_embeddings": True, "vocab_size": 49152,
    "transformers_version": "4.42.3",
}  # fmt: skip
LLAMA3_ROPE = {
    "high_freq_factor": 4.0, "low_freq_factor": 1.0, "original_max_position_embeddings": 8192, "rope_type": "llama3",
}  # fmt: skip
LLAMA3 = LLAMA | {
    "bos_token_id": 128000, "eos_token_id": [128001, 128008, 128009], "max_position_embeddings": 131072,
    "mlp_bias": False, "num_key_value_heads": 8, "rope_theta": 500000.0, "vocab_size": 128256,
}  # fmt: skip
LLAMA32_1B = LLAMA3 | {
    "head_dim": 64, "hidden_size": 2048, "intermediate_size": 8192, "num_attention_heads": 32, "num_hidden_layers": 16,
    "rope_scaling": LLAMA3_ROPE | {"factor": 32.0}, "tie_word_embeddings": True,
}  # fmt: skip
MISTRAL = {
    "architectures": ["MistralForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 1, "eos_token_id": 2,
    "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 14336,
    "max_position_embeddings": 32768, "model_type": "mistral", "num_attention_heads": 32, "num_hidden_layers": 32,
    "num_key_value_heads": 8, "rms_norm_eps": 1e-05, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
    "use_cache": True, "vocab_size": 32000,
}  # fmt: skip
QWEN = {
    "attention_dropout": 0.0, "bos_token_id": 151643, "eos_token_id": 151645, "hidden_act": "silu",
    "initializer_range": 0.02, "rms_norm_eps": 1e-06, "torch_dtype": "bfloat16", "use_cache": True,
    "use_sliding_window": False, "vocab_size": 151936,
}  # fmt: skip
QWEN2 = QWEN | {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"}
QWEN3 = QWEN | {
    "attention_bias": False, "head_dim": 128, "max_position_embeddings": 40960, "rope_scaling": None,
    "rope_theta": 1000000, "sliding_window": None,
}  # fmt: skip
GPT2 = {
    "activation_function": "gelu_new", "architectures": ["GPT2LMHeadModel"], "attn_pdrop": 0.1, "bos_token_id": 50256,
    "embd_pdrop": 0.1, "eos_token_id": 50256, "initializer_range": 0.02, "layer_norm_epsilon": 1e-05,
    "model_type": "gpt2", "n_ctx": 1024, "n_positions": 1024, "resid_pdrop": 0.1, "summary_activation": None,
    "summary_first_dropout": 0.1, "summary_proj_to_labels": True, "summary_type": "cls_index", "summary_use_proj": True,
    "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}}, "vocab_size": 50257,
}  # fmt: skip

CHECKPOINTS: dict[str, tuple[dict[str, Any], int]] = {  # config.json and the number of parameters
    "HuggingFaceTB/SmolLM2-135M-Instruct": (SMOLLM2 | {
        "hidden_size": 576, "initializer_range": 0.041666666666666664, "intermediate_size": 1536,
        "num_attention_heads": 9, "num_hidden_layers": 30, "num_key_value_heads": 3, "rope_theta": 100000,
        "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16", "fp16": "float16"}},
    }, 134_515_008),
    "HuggingFaceTB/SmolLM2-1.7B-Instruct": (SMOLLM2 | {
        "hidden_size": 2048, "intermediate_size": 8192, "num_attention_heads": 32, "num_hidden_layers": 24,
        "num_key_value_heads": 32, "rope_theta": 130000, "neftune_noise_alpha": 5,
        "transformers.js_config": {"dtype": "q4", "kv_cache_dtype": {"q4f16": "float16"}},
    }, 1_711_376_384),
    "TinyLlama/TinyLlama-1.1B-Chat-v1.0": (LLAMA | {
        "bos_token_id": 1, "eos_token_id": 2, "hidden_size": 2048, "intermediate_size": 5632,
        "max_position_embeddings": 2048, "num_attention_heads": 32, "num_hidden_layers": 22, "num_key_value_heads": 4,
        "rope_scaling": None, "rope_theta": 10000.0, "tie_word_embeddings": False, "vocab_size": 32000,
    }, 1_100_048_384),
    "meta-llama/Llama-3.2-1B-Instruct": (LLAMA32_1B, 1_235_814_400),
    "unsloth/Llama-3.2-1B-Instruct": (LLAMA32_1B | {
        "pad_token_id": 128004, "unsloth_fixed": True, "unsloth_version": "2024.9",
    }, 1_235_814_400),
    "deepseek-ai/DeepSeek-R1-Distill-Llama-8B": (LLAMA3 | {
        "eos_token_id": 128001, "hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32,
        "num_hidden_layers": 32, "rope_scaling": LLAMA3_ROPE | {"factor": 8.0}, "tie_word_embeddings": False,
    }, 8_030_261_248),
    "mistralai/Mistral-7B-v0.1": (MISTRAL | {"rope_theta": 10000.0, "sliding_window": 4096}, 7_241_732_096),
    "mistralai/Mistral-7B-Instruct-v0.2": (MISTRAL | {"rope_theta": 1000000.0, "sliding_window": None}, 7_241_732_096),
    "mistralai/Mistral-7B-Instruct-v0.3": (MISTRAL | {
        "rope_theta": 1000000.0, "sliding_window": None, "vocab_size": 32768,
    }, 7_248_023_552),
    "Qwen/Qwen2.5-0.5B-Instruct": (QWEN2 | {
        "hidden_size": 896, "intermediate_size": 4864, "max_position_embeddings": 32768, "max_window_layers": 21,
        "num_attention_heads": 14, "num_hidden_layers": 24, "num_key_value_heads": 2, "rope_theta": 1000000.0,
        "sliding_window": 32768, "tie_word_embeddings": True,
    }, 494_032_768),
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B": (QWEN2 | {
        "eos_token_id": 151643, "hidden_size": 1536, "intermediate_size": 8960, "max_position_embeddings": 131072,
        "max_window_layers": 21, "num_attention_heads": 12, "num_hidden_layers": 28, "num_key_value_heads": 2,
        "rope_theta": 10000, "sliding_window": 4096, "tie_word_embeddings": False, "use_mrope": False,
    }, 1_777_088_000),
    "Qwen/Qwen3-0.6B": (QWEN3 | {
        "architectures": ["Qwen3ForCausalLM"], "hidden_size": 1024, "intermediate_size": 3072, "max_window_layers": 28,
        "model_type": "qwen3", "num_attention_heads": 16, "num_hidden_layers": 28, "num_key_value_heads": 8,
        "tie_word_embeddings": True,
    }, 596_049_920),
    "Qwen/Qwen3-30B-A3B": (QWEN3 | {
        "architectures": ["Qwen3MoeForCausalLM"], "decoder_sparse_step": 1, "hidden_size": 2048,
        "intermediate_size": 6144, "max_window_layers": 48, "mlp_only_layers": [], "model_type": "qwen3_moe",
        "moe_intermediate_size": 768, "norm_topk_prob": True, "num_attention_heads": 32, "num_experts": 128,
        "num_experts_per_tok": 8, "num_hidden_layers": 48, "num_key_value_heads": 4, "output_router_logits": False,
        "router_aux_loss_coef": 0.001, "tie_word_embeddings": False,
    }, 30_532_122_624),
    "openai-community/gpt2": (GPT2 | {"n_embd": 768, "n_head": 12, "n_layer": 12}, 124_439_808),
    "openai-community/gpt2-medium": (GPT2 | {
        "n_embd": 1024, "n_head": 16, "n_layer": 24, "n_special": 0, "predict_special_tokens": True,
    }, 354_823_168),
    "openai-community/gpt2-xl": (GPT2 | {
        "n_embd": 1600, "n_head": 25, "n_layer": 48, "output_past": True,
    }, 1_557_611_200),
    "distilbert/distilgpt2": (GPT2 | {
        "_num_labels": 1, "id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}, "n_embd": 768, "n_head": 12,
        "n_layer": 6,
    }, 81_912_576),
}  # fmt: skip


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_the_config_of_a_popular_checkpoint_describes_its_parameters(name: str) -> None:
    config, num_parameters = CHECKPOINTS[name]
    read_spec(config)
    assert sum(math.prod(shape) for _, shape in expected_tensors(config)) == num_parameters

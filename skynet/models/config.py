"""From a model's `config.json` to what planning (`ModelSpec`) and the layers (`LeanConfig`) need to know.

A setting that changes results is honoured or refused by name; nothing is ignored in the hope that it doesn't matter.
Imports neither torch nor transformers: the coordinator calls this before anything loads.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Literal, NamedTuple, cast, get_args

from skynet.errors import ModelError, UnsupportedArchitecture
from skynet.models.spec import ModelSpec
from skynet.protocol.plan import Dtype

Config = Mapping[str, object]
RopeKind = Literal["default", "linear", "llama3", "yarn"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeConfig:
    """Rotary position embedding. Fields after `factor` matter to the kinds named beside them."""

    theta: float
    kind: RopeKind = "default"
    factor: float = 1.0  # linear, llama3, yarn
    original_max_positions: int = 0  # llama3, yarn
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    attention_factor: float | None = None  # yarn: None derives it from the factor
    mscale: float | None = None  # yarn
    mscale_all_dim: float | None = None  # yarn
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn
    truncate: bool = True  # yarn


@dataclass(frozen=True, slots=True, kw_only=True)
class LeanConfig:
    """What a lean layer is beside its dimensions."""

    norm_eps: float
    rope: RopeConfig
    activation: str
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool
    windows: tuple[int | None, ...]  # per layer: positions that a token sees, itself included; None: all before it
    norm_topk_prob: bool = False  # the chosen experts' weights are scaled to sum to 1


# What a missing field means, per model_type, where it isn't the same for all.
_DEFAULTS: Final[Mapping[str, Config]] = {
    "llama": {"max_position_embeddings": 2048},
    "mistral": {"num_key_value_heads": 8, "sliding_window": 4096, "max_position_embeddings": 131072},
    "qwen2": {"num_key_value_heads": 32, "max_position_embeddings": 32768, "sliding_window": 4096},
    "qwen3": {
        "num_key_value_heads": 32,
        "head_dim": 128,
        "max_position_embeddings": 32768,
        "sliding_window": 4096,
    },
    "qwen3_moe": {
        "num_key_value_heads": 4,
        "max_position_embeddings": 32768,
        "sliding_window": 4096,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 768,
    },
    "gpt2": {
        "vocab_size": 50257,
        "n_positions": 1024,
        "n_embd": 768,
        "n_layer": 12,
        "n_head": 12,
        "tie_word_embeddings": True,
    },
}
SUPPORTED: Final = tuple(sorted(_DEFAULTS))
LEAN: Final = frozenset(SUPPORTED) - {"gpt2"}
ACTIVATIONS: Final = frozenset({"silu", "swish", "gelu", "gelu_new", "gelu_fast", "gelu_pytorch_tanh", "relu"})

_DIMENSIONS: Final = frozenset(
    {"vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"}
    | {"num_key_value_heads", "head_dim", "max_position_embeddings", "tie_word_embeddings", "hidden_act"}
    | {"rms_norm_eps", "rope_theta", "rope_parameters", "rope_scaling", "original_max_position_embeddings"}
)
_SLIDING: Final = frozenset({"sliding_window", "use_sliding_window", "max_window_layers", "layer_types"})
_HONOURED: Final[Mapping[str, frozenset[str]]] = {
    "llama": _DIMENSIONS | {"attention_bias", "mlp_bias"},
    "mistral": _DIMENSIONS | {"sliding_window", "layer_types"},
    "qwen2": _DIMENSIONS | _SLIDING,
    "qwen3": _DIMENSIONS | _SLIDING | {"attention_bias"},
    "qwen3_moe": _DIMENSIONS
    | {"sliding_window", "use_sliding_window", "max_window_layers", "attention_bias", "norm_topk_prob"}
    | {"num_experts", "num_local_experts", "num_experts_per_tok", "moe_intermediate_size"}
    | {"decoder_sparse_step", "mlp_only_layers"},
    "gpt2": frozenset(
        {"vocab_size", "n_positions", "n_ctx", "n_embd", "n_layer", "n_head", "n_inner", "activation_function"}
        | {"layer_norm_epsilon", "scale_attn_weights", "scale_attn_by_inverse_layer_idx", "tie_word_embeddings"}
    ),
}
# Fields that change nothing about the logits of one forward pass: training, bookkeeping, generation defaults.
_WITHOUT_EFFECT: Final = frozenset(
    {"architectures", "model_type", "transformers_version", "torch_dtype", "dtype", "use_cache", "initializer_range"}
    | {"bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "unk_token_id", "decoder_start_token_id"}
    | {"attention_dropout", "attn_pdrop", "embd_pdrop", "resid_pdrop", "hidden_dropout", "dropout"}
    | {"router_aux_loss_coef", "output_router_logits", "output_attentions", "output_hidden_states", "return_dict"}
    | {"gradient_checkpointing", "id2label", "label2id", "num_labels", "problem_type", "task_specific_params"}
    | {"name_or_path", "tokenizer_class", "prefix", "finetuning_task", "chunk_size_feed_forward", "torchscript"}
    | {"max_length", "min_length", "do_sample", "num_beams", "temperature", "top_k", "top_p", "repetition_penalty"}
    | {"summary_type", "summary_use_proj", "summary_activation", "summary_proj_to_labels", "summary_first_dropout"}
    | {"reorder_and_upcast_attn"}  # GPT-2: where 16-bit scores are rounded; ours never round them to float16
    | {"is_encoder_decoder", "is_decoder", "model_max_length", "max_sequence_length", "use_bfloat16", "output_past"}
    | {"diversity_penalty", "length_penalty", "typical_p", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size"}
    | {"num_beam_groups", "num_return_sequences", "predict_special_tokens", "neftune_noise_alpha"}
    | {"is_llama_config", "transformers.js_config", "unsloth_fixed", "unsloth_version"}  # who made or converted it
)
_ROPE_FIELDS: Final = frozenset(
    {"rope_type", "type", "rope_theta", "factor", "original_max_position_embeddings", "partial_rotary_factor"}
    | {"low_freq_factor", "high_freq_factor"}
    | {"attention_factor", "mscale", "mscale_all_dim", "beta_fast", "beta_slow", "truncate"}
)
_ONLY_AS: Final[Config] = {"pretraining_tp": 1, "partial_rotary_factor": 1.0, "rope_interleaved": False, "n_special": 0}


def read_spec(config: Config, dtype: Dtype = "bfloat16") -> ModelSpec:
    """The dimensions that `config` (a parsed config.json) describes, to be run in `dtype`.

    Raises UnsupportedArchitecture, naming the model type or field that we don't run, or ModelError for a field of the
    wrong type or out of bounds.
    """
    reader = _Reader(config)
    reader.refuse_unknown()
    try:
        spec = _gpt2_spec(reader, dtype) if reader.model_type == "gpt2" else _lean_spec(reader, dtype)
    except ModelError:
        raise
    except ValueError as exc:
        raise ModelError(f"config.json: {exc}; get the model's original file again") from exc
    if reader.model_type in LEAN:
        read_lean(config)
    return spec


def read_lean(config: Config) -> LeanConfig:
    """The settings of a lean layer. Raises like `read_spec`."""
    reader = _Reader(config)
    reader.refuse_unknown()
    kind = reader.model_type
    if kind not in LEAN:
        raise UnsupportedArchitecture(f"{kind} doesn't run on lean layers; those that do: {', '.join(sorted(LEAN))}")
    biases = _biases(reader)
    return LeanConfig(
        norm_eps=reader.number("rms_norm_eps", 1e-6),
        rope=_rope(reader),
        activation=reader.activation("hidden_act", "silu"),
        qkv_bias=biases.qkv,
        o_bias=biases.o,
        mlp_bias=biases.mlp,
        qk_norm=kind in ("qwen3", "qwen3_moe"),
        windows=_windows(reader),
        norm_topk_prob=kind == "qwen3_moe" and reader.flag("norm_topk_prob"),
    )


class _Biases(NamedTuple):
    """Which matrices of a lean layer have one."""

    qkv: bool
    o: bool
    mlp: bool


def _biases(reader: _Reader) -> _Biases:
    kind = reader.model_type
    attention = kind in ("llama", "qwen3", "qwen3_moe") and reader.flag("attention_bias")
    return _Biases(kind == "qwen2" or attention, attention, kind == "llama" and reader.flag("mlp_bias"))


class _Reader:
    """Typed access to a config.json whose content is anybody's."""

    def __init__(self, config: Config) -> None:
        kind = config.get("model_type")
        if kind not in _DEFAULTS:
            raise UnsupportedArchitecture(f"model type {kind!r} isn't supported; supported are: {', '.join(SUPPORTED)}")
        self.model_type: str = str(kind)
        self._config = config
        self._defaults = _DEFAULTS[self.model_type]

    def refuse_unknown(self) -> None:
        known = _HONOURED[self.model_type] | _WITHOUT_EFFECT
        for name, value in self._config.items():
            if name in known or name.startswith("_") or value is None or value is False or value in ([], {}, ""):
                continue
            if name not in _ONLY_AS or value != _ONLY_AS[name]:
                raise UnsupportedArchitecture(
                    f"{self.model_type}: config.json sets {name} to {str(value)[:80]}, which isn't supported"
                )

    def get(self, name: str, default: object = None) -> object:
        """The field, else the model type's own default, else `default`. An explicit null stays None."""
        if name in self._config:
            return self._config[name]
        return self._defaults.get(name, default)

    def size(self, name: str, default: int | None = None) -> int:
        """A positive integer."""
        value = self.get(name)
        value = default if value is None else value
        if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 2**31:
            raise ModelError(f"config.json: {name} must be a positive integer, got {value!r}")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        """A positive, finite number."""
        value = self.get(name, default)
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value < 1e18:
            raise ModelError(f"config.json: {name} must be a positive number, got {value!r}")
        return float(value)

    def flag(self, name: str, default: bool = False) -> bool:
        value = self.get(name, default)
        if value is not None and not isinstance(value, bool):
            raise ModelError(f"config.json: {name} must be true or false, got {value!r}")
        return bool(value)

    def activation(self, name: str, default: str) -> str:
        value = self.get(name, default)
        if value not in ACTIVATIONS:
            raise UnsupportedArchitecture(
                f"{self.model_type}: {name} {value!r} isn't supported; supported are: {', '.join(sorted(ACTIVATIONS))}"
            )
        return str(value)

    def names(self, name: str, length: int) -> tuple[str, ...] | None:
        value = self.get(name)
        if value is None:
            return None
        if not isinstance(value, (list, tuple)) or len(value) != length or not all(isinstance(v, str) for v in value):
            raise ModelError(f"config.json: {name} must list {length} names, got {str(value)[:80]}")
        return tuple(value)

    def numbers(self, name: str) -> tuple[int, ...]:
        value = self.get(name)
        if value is None:
            return ()
        if not isinstance(value, (list, tuple)) or not all(isinstance(v, int) for v in value):
            raise ModelError(f"config.json: {name} must list integers, got {str(value)[:80]}")
        return tuple(value)


def _lean_spec(reader: _Reader, dtype: Dtype) -> ModelSpec:
    num_heads = reader.size("num_attention_heads")
    hidden_size = reader.size("hidden_size")
    num_layers = reader.size("num_hidden_layers")
    moe = _moe_layers(reader, num_layers) if reader.model_type == "qwen3_moe" else ()
    biases = _biases(reader)
    return ModelSpec(
        model_type=reader.model_type,
        num_layers=num_layers,
        hidden_size=hidden_size,
        num_heads=num_heads,
        num_kv_heads=reader.size("num_key_value_heads", num_heads),
        head_size=reader.size("head_dim", hidden_size // num_heads),
        intermediate_size=reader.size("intermediate_size"),
        vocab_size=reader.size("vocab_size"),
        max_positions=reader.size("max_position_embeddings"),
        dtype=dtype,
        is_tied=reader.flag("tie_word_embeddings"),
        num_experts=_num_experts(reader) if moe else 0,
        experts_per_token=reader.size("num_experts_per_tok") if moe else 0,
        expert_intermediate_size=reader.size("moe_intermediate_size") if moe else 0,
        moe_layers=moe,
        qkv_bias=biases.qkv,
        o_bias=biases.o,
        mlp_bias=biases.mlp,
    )


def _gpt2_spec(reader: _Reader, dtype: Dtype) -> ModelSpec:
    num_heads, hidden_size = reader.size("n_head"), reader.size("n_embd")
    if hidden_size % num_heads:
        raise ModelError(f"config.json: n_embd {hidden_size} isn't a multiple of n_head {num_heads}")
    reader.activation("activation_function", "gelu_new")
    return ModelSpec(
        model_type="gpt2",
        num_layers=reader.size("n_layer"),
        hidden_size=hidden_size,
        num_heads=num_heads,
        num_kv_heads=num_heads,
        head_size=hidden_size // num_heads,
        intermediate_size=reader.size("n_inner", 4 * hidden_size),
        vocab_size=reader.size("vocab_size"),
        max_positions=reader.size("n_positions"),
        dtype=dtype,
        is_tied=reader.flag("tie_word_embeddings"),
        gated_mlp=False,
        learned_positions=True,
    )


def _num_experts(reader: _Reader) -> int:
    return reader.size("num_local_experts" if reader.get("num_local_experts") is not None else "num_experts")


def _moe_layers(reader: _Reader, num_layers: int) -> tuple[int, ...]:
    dense, every = set(reader.numbers("mlp_only_layers")), reader.size("decoder_sparse_step", 1)
    return tuple(i for i in range(num_layers) if i not in dense and (i + 1) % every == 0)


def _windows(reader: _Reader) -> tuple[int | None, ...]:
    """How far each layer looks back, as the model type's own rules have it."""
    kind, count = reader.model_type, reader.size("num_hidden_layers")
    uses = kind == "mistral" or (kind in ("qwen2", "qwen3", "qwen3_moe") and reader.flag("use_sliding_window"))
    window = reader.size("sliding_window") if uses and reader.get("sliding_window") is not None else None
    types = reader.names("layer_types", count) if kind in ("mistral", "qwen2", "qwen3") else None
    if types is None:
        first = reader.get("max_window_layers", 28) if kind in ("qwen2", "qwen3") else 0
        if not isinstance(first, int) or first < 0:
            raise ModelError(f"config.json: max_window_layers must be a whole number, got {first!r}")
        types = tuple("sliding_attention" if window and i >= first else "full_attention" for i in range(count))
    unknown = set(types) - {"full_attention", "sliding_attention"}
    mixed = kind == "mistral" and window is not None and "full_attention" in types
    if unknown or mixed or (window is None and "sliding_attention" in types):
        raise UnsupportedArchitecture(
            f"{kind}: layer_types {sorted(set(types))} with a window of {window} isn't supported"
        )
    return tuple(window if name == "sliding_attention" else None for name in types)


def _rope(reader: _Reader) -> RopeConfig:
    """Both spellings: transformers 5's `rope_parameters` and the older `rope_theta` with `rope_scaling`."""
    given = reader.get("rope_scaling") or reader.get("rope_parameters") or {}
    if not isinstance(given, Mapping):
        raise ModelError(f"config.json: rope_parameters must be an object, got {str(given)[:80]}")
    kind = given.get("rope_type", given.get("type", "default"))
    kind = "default" if kind == "dynamic" else kind  # differs beyond max_positions only, where we don't go
    unknown = [name for name, value in given.items() if name not in _ROPE_FIELDS and value not in (None, False)]
    if kind not in get_args(RopeKind) or unknown or given.get("partial_rotary_factor", 1.0) != 1.0:
        raise UnsupportedArchitecture(
            f"{reader.model_type}: rope_parameters {str(dict(given))[:120]} isn't supported; "
            "supported rope types are: default, dynamic, linear, llama3, yarn"
        )
    theta = given["rope_theta"] if given.get("rope_theta") is not None else reader.get("rope_theta", 10000.0)
    top_level = reader.get("original_max_position_embeddings")
    original = top_level or given.get("original_max_position_embeddings") or reader.size("max_position_embeddings")
    factor = given.get("factor")
    if factor is None:
        factor = reader.size("max_position_embeddings") / _positive("original_max_position_embeddings", original)
    return RopeConfig(
        theta=_positive("rope_theta", theta),
        kind=cast(RopeKind, kind),
        factor=_positive("factor", factor) if kind != "default" else 1.0,
        original_max_positions=int(_positive("original_max_position_embeddings", original)),
        low_freq_factor=_positive("low_freq_factor", given.get("low_freq_factor", 1.0)),
        high_freq_factor=_positive("high_freq_factor", given.get("high_freq_factor", 4.0)),
        attention_factor=_optional("attention_factor", given.get("attention_factor")),
        mscale=_optional("mscale", given.get("mscale")),
        mscale_all_dim=_optional("mscale_all_dim", given.get("mscale_all_dim")),
        beta_fast=_positive("beta_fast", given.get("beta_fast") or 32),
        beta_slow=_positive("beta_slow", given.get("beta_slow") or 1),
        truncate=bool(given.get("truncate", True)),
    )


def _positive(name: str, value: object) -> float:
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value < 1e18:
        raise ModelError(f"config.json: {name} must be a positive number, got {value!r}")
    return float(value)


def _optional(name: str, value: object) -> float | None:
    return None if value is None else _positive(name, value)

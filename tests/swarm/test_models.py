"""Checkpoints in Hugging Face layout, served from a directory by real processes; and directories that aren't right."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from skynet.client.swarm import Completion
from skynet.coordinator.served import open_model
from skynet.errors import ModelError
from skynet.models.embedded import EMBEDDED_DIR

from .conftest import Oracle, Serve, User, skynet_environment

VOCABULARY = 2048  # of the embedded model, whose tokenizer these borrow
SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("2x1", SMALL),
    "mistral": ("1x2", {**SMALL, "sliding_window": 5, "head_dim": 24}),
    "qwen2": ("3x1", {**SMALL, "tie_word_embeddings": True}),
    "qwen3": ("2x2", {**SMALL, "head_dim": 16}),
    "qwen3_moe": (
        "2x1",
        {**SMALL, "head_dim": 16, "num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 40},
    ),
    "gpt2": (
        "2x2",
        {
            "vocab_size": VOCABULARY, "n_positions": 128, "n_embd": 64, "n_layer": 4, "n_head": 8,
            "initializer_range": 0.2, "bos_token_id": 0, "eos_token_id": 0,
        },
    ),
}  # fmt: skip
PROMPT = "Once upon a time there was a lamp"
NUM_TOKENS = 16


def save_checkpoint(directory: Path, model_type: str, settings: dict[str, Any]) -> None:
    """Random weights of this architecture, and the embedded model's tokenizer."""
    import torch
    import transformers

    torch.manual_seed(11)
    config = transformers.AutoConfig.for_model(model_type, **settings)
    factory: Any = transformers.AutoModelForCausalLM
    model = factory.from_config(config, dtype=torch.float32)
    model.save_pretrained(directory)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(EMBEDDED_DIR / name, directory)


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_every_architecture_answers_like_one_process(model_type: str, serve: Serve, tmp_path: Path) -> None:
    layout, settings = ARCHITECTURES[model_type]
    directory = tmp_path / model_type
    save_checkpoint(directory, model_type, settings)
    oracle = Oracle(directory)
    swarm = serve(model=str(directory), layout=layout)
    facts = swarm.status()
    assert facts["model"]["type"] == model_type
    assert facts["replicas"][0]["layout"] == layout
    stream = swarm.complete(Completion(prompt=PROMPT, max_tokens=NUM_TOKENS, ignore_eos=True))
    assert stream.token_ids == oracle.answer_ids(oracle.encode(PROMPT), NUM_TOKENS)


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def cut_header(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:40])


def without_a_tensor(file: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(file)
    del tensors["model.layers.2.mlp.up_proj.weight"]
    save_file(tensors, file)


def other_config(**changes: object) -> Callable[[Path], None]:
    def change(file: Path) -> None:
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return change


SUPPORTED = ("llama", "mistral", "qwen2", "qwen3", "qwen3_moe", "gpt2")
BROKEN: dict[str, tuple[str, Callable[[Path], object], tuple[str, ...]]] = {
    "no config": ("config.json", Path.unlink, ("config.json", "there is no such file")),
    "config isn't JSON": ("config.json", lambda f: f.write_text('{"model_type": '), ("config.json", "fetch it again")),
    "config isn't an object": ("config.json", lambda f: f.write_text("[]"), ("config.json", "expected an object")),
    "other architecture": ("config.json", other_config(model_type="bert"), ("bert", *SUPPORTED)),
    "no heads": ("config.json", other_config(num_attention_heads=0), ("num_attention_heads",)),
    "no weights": ("model.safetensors", Path.unlink, ("safetensors",)),
    "weights cut off": ("model.safetensors", truncate, ("model.safetensors", "again")),
    "header cut off": ("model.safetensors", cut_header, ("model.safetensors", "again")),
    "missing tensor": ("model.safetensors", without_a_tensor, ("model.layers.2.mlp.up_proj.weight",)),
    "no tokenizer": ("tokenizer.json", Path.unlink, ("tokenizer.json",)),
    "tokenizer isn't JSON": ("tokenizer.json", lambda f: f.write_text("?"), ("tokenizer.json",)),
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("model")
    save_checkpoint(directory, "llama", SMALL)
    return directory


@pytest.mark.parametrize("fault", BROKEN)
def test_a_broken_model_is_refused_by_file_and_fix(fault: str, checkpoint: Path, tmp_path: Path) -> None:
    name, damage, told = BROKEN[fault]
    directory = tmp_path / "model"
    shutil.copytree(checkpoint, directory)
    damage(directory / name)
    with pytest.raises(ModelError) as refused:
        open_model(str(directory), None, tmp_path / "cache", None)
    for word in told:
        assert word in str(refused.value)


@pytest.mark.parametrize("fault", ["other architecture", "weights cut off"])
def test_a_coordinator_refuses_a_broken_model_before_anything_loads(
    fault: str, checkpoint: Path, tmp_path: Path
) -> None:
    name, damage, told = BROKEN[fault]
    directory = tmp_path / "model"
    shutil.copytree(checkpoint, directory)
    damage(directory / name)
    owner = User(skynet_environment(tmp_path / "home"))
    done = owner.run("coordinator", "--no-mdns", "--port", "0", "--model", str(directory))
    assert done.returncode == ModelError.exit_code == 2, done.stderr
    assert done.stderr.startswith("error: ")
    assert "coordinator ready" not in done.stderr
    for word in told:
        assert word in done.stderr


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (("--dtype", "int3"), "--dtype int3"),
        (("--layout", "1x99"), "99"),
        (("--context", "0"), "--context"),
        (("--context", "100000"), "--context 100000: the model takes at most 2048 tokens"),
        (("--name", "x" * 65), "--name"),
        (("--name", ""), "--name"),
        (("--lease-s", "0.01"), "--lease-s"),
        (("--admission", "anyone"), "--admission anyone"),
        (("--port", "70000"), "--port"),
        (("--bind", "203.0.113.7"), "203.0.113.7"),
        (("--log-level", "loud"), "--log-level"),
    ],
)
def test_a_coordinator_refuses_wrong_options_by_name(options: tuple[str, ...], named: str, tmp_path: Path) -> None:
    done = User(skynet_environment(tmp_path)).run("coordinator", "--no-mdns", "--port", "0", *options)
    assert done.returncode == 2, done.stderr
    assert named in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("options", "code", "named"),
    [
        (("--device", "tpu"), 2, "tpu"),
        (("--device", "cpu", "--gpu", "0"), 2, "--gpu"),
        (("--memory", "lots"), 2, "lots"),
        (("--memory", "1KiB"), 2, "--memory"),
        (("--threads", "0"), 2, "--threads"),
        (("--threads", "100000"), 2, "--threads"),
        (("--device", "cpu:3"), 2, "--device cpu:3"),
        (("--gpu", "99"), 2, "--gpu"),
        (("--coordinator", "http://127.0.0.1:9"), 2, "http://127.0.0.1:9"),
        (("--name", "a/b"), 2, "--name"),
        (("--coordinator", "127.0.0.1:9"), 4, "127.0.0.1 port 9"),
    ],
)
def test_a_worker_refuses_wrong_options_by_name(
    options: tuple[str, ...], code: int, named: str, tmp_path: Path
) -> None:
    done = User(skynet_environment(tmp_path, "127.0.0.1:9")).run("worker", *options)
    assert done.returncode == code, done.stderr
    assert named in done.stderr
    assert "Traceback" not in done.stderr

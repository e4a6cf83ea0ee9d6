"""The model that ships with the package, in a mixed layout."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import transformers

import skynet.models
from skynet.models.tensors import DirectorySource
from skynet.testing.replica import LoopbackReplica, assignments
from tests.oracle.checkpoints import Checkpoint
from tests.oracle.scenario import expected_logits, run_scenario

DIRECTORY = Path(skynet.models.__file__).parent / "embedded"


def test_the_embedded_model_gives_transformers_logits_and_tokens_in_a_mixed_layout() -> None:
    config = json.loads((DIRECTORY / "config.json").read_text())
    layout = assignments(config, [(1.0, 1.0), (1.0,), (3.0, 2.0, 1.0)])
    sequences, logits = run_scenario(LoopbackReplica(config, DirectorySource(DIRECTORY), layout))
    model = transformers.AutoModelForCausalLM.from_pretrained(DIRECTORY, dtype=torch.float32).eval()
    expected = expected_logits(Checkpoint(DIRECTORY, config, model), sequences)
    assert (logits - expected).abs().max() <= 1e-4 * expected.abs().max().clamp(min=1)
    assert torch.equal(logits.argmax(-1), expected.argmax(-1))

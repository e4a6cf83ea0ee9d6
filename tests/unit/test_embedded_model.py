"""The model that ships in the package: small, whole, splittable, and better than chance at its own kind of text."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

DIRECTORY = Path(__file__).parents[2] / "skynet" / "models" / "embedded"
MAX_BYTES = 10_000_000
PROMPT = "Once upon a time"
# Written by the generator from a seed that training never used.
HELD_OUT = """\
Once upon a time, there lived an honest beekeeper called Paul. He lived in a busy town beside a wide river with \
Ravi, a gentle clockmaker. Paul and Ravi did everything together.

That spring Mrs Park, the carpenter, fell ill. She lay in bed, as white as the pillow, and could not eat. The \
doctor shook her head. "There is only one thing that helps," she said. "It is a purple flower that grows at the \
clock tower. But nobody has gone there for years." Paul was already putting on his boots.

The way led along the river bank. People hurried past with bags and umbrellas. Paul did not stop to look. He \
thought only of the bed, and of the hot hand that had held his. When it became dark, he lit a lantern and went \
on. Once he fell and hurt his knee.

The plant grew in a high place, where only birds could go. Paul looked up and swallowed. Then he put one hand in \
a crack, and then one foot, and began to climb. "Do not look down," he said softly. Halfway up a stone broke \
under his foot, but he held on. At the top he closed his hand around the purple leaves.

Paul ran the last part of the way. They made tea, and Paul held the cup. One spoon, and then another. All night \
he sat beside the bed, and when the sun came up, the fever was gone. "You look terrible," said the voice from \
the pillow. "You should see yourself," said Paul, and he had never been so glad.

Later Paul planted some of the seeds in the garden, so that everyone could have some. The next spring there was \
a whole bed of purple flowers beside the door.

From that day on, Paul and Ravi went to the market square every week. And whenever somebody asked Paul if he had \
been afraid, he smiled and said: "I only did what anyone would do."
"""


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(DIRECTORY)


@pytest.fixture(scope="module")
def model() -> Any:  # transformers types what it generates with as what no model is
    return AutoModelForCausalLM.from_pretrained(DIRECTORY, dtype=torch.float32).eval()


def continuation(model: Any, tokenizer: PreTrainedTokenizerBase, num_tokens: int) -> str:
    prompt = tokenizer(PROMPT, return_tensors="pt")
    tokens: Any = model.generate(**prompt, max_new_tokens=num_tokens, do_sample=False, temperature=None, top_p=None)
    return str(tokenizer.decode(tokens[0]))


def test_everything_that_ships_fits_in_ten_megabytes() -> None:
    assert sum(path.stat().st_size for path in DIRECTORY.iterdir() if path.is_file()) <= MAX_BYTES


def test_weights_are_bf16_under_the_standard_names() -> None:
    with safe_open(DIRECTORY / "model.safetensors", framework="pt") as weights:
        names = set(weights.keys())
        assert {weights.get_slice(name).get_dtype() for name in names} == {"BF16"}
    assert {"model.embed_tokens.weight", "model.norm.weight", "model.layers.5.self_attn.k_proj.weight"} <= names
    assert "lm_head.weight" not in names  # tied to the embedding


def test_config_can_be_split_by_tensors_and_by_layers() -> None:
    config = json.loads((DIRECTORY / "config.json").read_text())
    assert config["architectures"] == ["Qwen3ForCausalLM"]
    assert config["num_hidden_layers"] >= 6
    assert all(config["num_hidden_layers"] % stages == 0 for stages in (1, 2, 3))
    for ranks in (1, 2, 4):
        assert config["num_key_value_heads"] % ranks == 0
        assert config["num_attention_heads"] % ranks == 0
        assert config["intermediate_size"] % ranks == 0
        assert config["vocab_size"] % ranks == 0
    assert config["max_position_embeddings"] >= 2048
    assert config["tie_word_embeddings"] is True


@pytest.mark.parametrize("text", ["Once upon a time, there was 1 fox.", " tabs\tand\nlines ", "Grüße, 世界 🦊", ""])
def test_any_text_survives_the_tokenizer(text: str) -> None:
    tokenizer = Tokenizer.from_file(str(DIRECTORY / "tokenizer.json"))
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_tokenizer_knows_its_special_tokens(tokenizer: PreTrainedTokenizerBase) -> None:
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    assert tokenizer.convert_tokens_to_ids(special) == [0, 1, 2]
    assert tokenizer.eos_token_id == 0
    assert len(tokenizer) == 2048
    assert json.loads((DIRECTORY / "generation_config.json").read_text())["eos_token_id"] == [0, 2]


def test_chat_template_renders_turns_and_the_start_of_an_answer(tokenizer: PreTrainedTokenizerBase) -> None:
    messages = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hello!"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == (
        "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHello!<|im_end|>\n<|im_start|>assistant\n"
    )


def test_greedy_story_is_made_of_words_and_is_the_same_each_time(
    model: Any, tokenizer: PreTrainedTokenizerBase
) -> None:
    story = continuation(model, tokenizer, 60)
    assert story == continuation(model, tokenizer, 60)
    known = {token.removeprefix("Ġ").lower() for token in tokenizer.get_vocab()}
    words = [word.strip('.,:;!?"').removesuffix("'s").lower() for word in story.split()[:-1]]
    assert len(words) > 30
    assert sum(word in known for word in words) >= 0.95 * len(words)


def test_chat_answers_and_ends_its_turn(model: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    question = [{"role": "user", "content": "What is the capital of France?"}]
    prompt: Any = tokenizer.apply_chat_template(
        question, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    tokens: Any = model.generate(**prompt, max_new_tokens=20, do_sample=False, temperature=None, top_p=None)
    assert tokenizer.decode(tokens[0, prompt["input_ids"].shape[1] :]) == "The capital of France is Paris.<|im_end|>"


def test_perplexity_is_far_below_the_best_unigram(model: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    tokens = tokenizer(HELD_OUT, return_tensors="pt")["input_ids"]
    with torch.inference_mode():
        logits = model(input_ids=tokens[:, :-1]).logits
    perplexity = F.cross_entropy(logits[0], tokens[0, 1:]).exp().item()
    counts = Counter(tokens[0].tolist())  # a unigram that has seen this very text, the hardest to beat
    total = counts.total()
    unigram = math.exp(-sum(n / total * math.log(n / total) for n in counts.values()))
    assert perplexity < unigram / 20

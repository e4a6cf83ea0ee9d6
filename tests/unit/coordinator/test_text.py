"""Streaming text: no half characters, no leaked stop strings, and the same text however it is rebuilt."""

from __future__ import annotations

import json
import subprocess
import sys
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from skynet.coordinator.text import MAX_HELD_TOKENS, IncrementalDetokenizer, StopMatcher, TextModel
from skynet.errors import ConfigError, ModelError

EMBEDDED = Path(__file__).parents[3] / "skynet" / "models" / "embedded"
WORDS = ["once upon a time the quick brown fox", "don't jump, over; the lazy dog!", "señor año 東京 東西 😀😃 π≈3.14"]


@cache
def embedded() -> TextModel:
    return TextModel(EMBEDDED)


@cache
def byte_level() -> Tokenizer:
    """GPT-2's and Qwen's kind."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(WORDS * 5, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet))
    return tokenizer


@cache
def byte_fallback() -> Tokenizer:
    """Llama 2's and Mistral's kind: words carry their space in front, rare characters are spelled in bytes."""
    pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"abcdefghijklmnopqrstuvwxyz,."]
    merges = [("t", "h"), ("th", "e"), ("▁", "the"), ("▁", "a"), ("a", "n"), ("an", "d"), ("▁", "and")]
    pieces += [left + right for left, right in merges]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


KINDS = pytest.mark.parametrize("kind", [byte_level, byte_fallback], ids=["byte-level", "byte-fallback"])


def stream(tokenizer: Tokenizer, ids: list[int], context: list[int] | None = None) -> list[str]:
    detokenizer = IncrementalDetokenizer(tokenizer, frozenset(), context or [])
    return [*(detokenizer.push(i) for i in ids), detokenizer.close()]


@KINDS
@settings(max_examples=150, deadline=None)
@given(text=st.text(max_size=40), split=st.integers(0, 60))
def test_streamed_text_equals_decoding_all_at_once(kind: object, text: str, split: int) -> None:
    tokenizer = kind()  # type: ignore[operator]
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    full = tokenizer.decode(ids)
    pieces = stream(tokenizer, ids)
    assert "".join(pieces) == full
    if "\N{REPLACEMENT CHARACTER}" not in full:
        assert "\N{REPLACEMENT CHARACTER}" not in "".join(pieces), "a character was shown by halves"
    before = tokenizer.decode(ids[:split])
    if full.startswith(before) and not before.endswith("\N{REPLACEMENT CHARACTER}"):
        assert before + "".join(stream(tokenizer, ids[split:], ids[:split])) == full, "the prompt isn't repeated"


@settings(max_examples=150, deadline=None)
@given(ids=st.lists(st.integers(0, 399), max_size=MAX_HELD_TOKENS - 1))
def test_token_ids_that_form_no_text_stream_as_they_decode(ids: list[int]) -> None:
    assert "".join(stream(byte_level(), ids)) == byte_level().decode(ids, skip_special_tokens=False)


def test_a_word_after_the_prompt_keeps_its_leading_space() -> None:
    tokenizer = byte_fallback()
    prompt, answer = tokenizer.encode("and").ids, tokenizer.encode("the and").ids
    assert "".join(stream(tokenizer, answer, prompt)) == " the and"
    assert "".join(stream(tokenizer, answer)) == "the and"


def test_a_character_is_shown_whole_with_its_last_byte() -> None:
    ids = byte_level().encode("a€").ids
    assert [piece for piece in stream(byte_level(), ids) if piece] == ["a", "€"]
    assert "".join(stream(byte_level(), ids[:-1])) == "a\N{REPLACEMENT CHARACTER}"


def test_endless_half_characters_are_held_back_up_to_a_bound() -> None:
    first_byte = byte_level().encode("€").ids[0]
    detokenizer = IncrementalDetokenizer(byte_level(), frozenset())
    shown = ["" if not detokenizer.push(first_byte) else "shown" for _ in range(MAX_HELD_TOKENS + 1)]
    assert shown.index("shown") == MAX_HELD_TOKENS - 1
    assert len(detokenizer._window) <= 2 * MAX_HELD_TOKENS


def test_special_tokens_and_unknown_ids_make_no_text() -> None:
    model = embedded()
    ids = [*model.encode("Once"), 1, *model.encode(" upon"), 2, 999_999]
    answer = model.answer()
    assert "".join([*(answer.push(i) for i in ids), answer.close()]) == "Once upon" == model.decode(ids)


# -- stop strings

texts = st.text(alphabet="abc\n€", max_size=30)
stops = st.lists(st.text(alphabet="abc\n€", min_size=1, max_size=5), max_size=4)


def cut(text: str, stop: list[str]) -> str:
    """The rule, spelled out: cut where the first stop string to be complete begins; of several, the longest."""
    for end in range(len(text) + 1):
        starts = [end - len(s) for s in stop if text[:end].endswith(s)]
        if starts:
            return text[: min(starts)]
    return text


@settings(max_examples=300, deadline=None)
@given(text=texts, stop=stops, cuts=st.lists(st.integers(0, 30), max_size=8))
def test_stop_strings_never_leak_however_the_text_arrives(text: str, stop: list[str], cuts: list[int]) -> None:
    matcher = StopMatcher(stop)
    edges = sorted({0, len(text), *(c for c in cuts if c < len(text))})
    shown = ""
    expected = cut(text, stop)
    for start, end in pairwise(edges):
        shown += matcher.push(text[start:end])
        assert expected.startswith(shown), "shown text is never taken back"
        if not matcher.is_stopped:
            held = text[len(shown) : end]
            assert not held or any(s.startswith(held) for s in stop), "only what may begin a stop string is held back"
    assert matcher.is_stopped == (cut(text, stop) != text or any(text.endswith(s) for s in stop))
    assert shown + matcher.close() == expected
    assert matcher.close() == ""


@settings(max_examples=100, deadline=None)
@given(text=st.text(alphabet="ab cté😀", max_size=20), stop=stops, at=st.integers(0, 40))
def test_an_answer_rebuilt_from_its_ids_goes_on_where_it_was(text: str, stop: list[str], at: int) -> None:
    model = embedded()
    ids = model.encode(text)
    first, second = model.answer(stop), model.answer(stop)
    shown = "".join(first.push(i) for i in ids[:at])
    assert "".join(second.push(i) for i in ids[:at]) == shown
    assert [first.push(i) for i in ids[at:]] == [second.push(i) for i in ids[at:]]
    assert first.is_stopped == second.is_stopped
    assert first.close() == second.close()


def test_a_stop_string_across_tokens_ends_the_answer() -> None:
    model = embedded()
    answer = model.answer(["time,"])
    shown = "".join(answer.push(i) for i in model.encode("Once upon a time, there was"))
    assert answer.is_stopped
    assert shown + answer.close() == "Once upon a "
    assert answer.push(model.encode("x")[0]) == ""


# -- the model's files


def write_model(directory: Path, **config: object) -> Path:
    byte_level().save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory


def test_prompts_are_encoded_as_transformers_does() -> None:
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(EMBEDDED)
    for text in [*WORDS, "Once upon a time", "<|im_start|>x", " \n\n "]:
        assert embedded().encode(text) == theirs(text)["input_ids"]


TEMPLATES = [
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    "{{ bos_token }}{% set ns = namespace(n=0) %}\n"
    "  {% for m in messages %}\n    {% if loop.index0 > 5 %}{% break %}{% endif %}\n"
    "[{{ m.role | upper }}] {{ m['content'] | trim | tojson }}{% set ns.n = ns.n + 1 %}\n"
    "  {% generation %}{{ ns.n }}{% endgeneration %}\n{% endfor %}{{ eos_token }}{{ tools is none }}{{ unk_token }}",
    "{{ messages | tojson(indent=2) }}{{ dict(a=1).a }}{{ messages[0].content is string }}",
]


@pytest.mark.parametrize("template", TEMPLATES, ids=["chatml", "loops", "json"])
def test_chat_templates_render_as_in_transformers(template: str, tmp_path: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    chat: list[dict[str, Any]] = [
        {"role": "user", "content": " <b>señor</b> & 'x' "},
        {"role": "assistant", "content": "ja", "name": None},
    ]
    directory = write_model(tmp_path, bos_token="<s>", eos_token={"content": "</s>"}, chat_template=template)
    theirs: Any = PreTrainedTokenizerFast(tokenizer_object=byte_level(), bos_token="<s>", eos_token="</s>")
    for prompt in (True, False):
        expected = theirs.apply_chat_template(
            chat, chat_template=template, tokenize=False, add_generation_prompt=prompt
        )
        assert TextModel(directory).render_chat(chat, add_generation_prompt=prompt) == expected


def test_the_embedded_models_chat_equals_transformers_token_for_token() -> None:
    from transformers import AutoTokenizer

    chat = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hello there"}]
    theirs = AutoTokenizer.from_pretrained(EMBEDDED)
    expected = theirs.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    assert embedded().encode_chat(chat) == expected


def test_a_template_file_comes_before_the_config(tmp_path: Path) -> None:
    write_model(tmp_path, chat_template="config")
    (tmp_path / "chat_template.jinja").write_text("file")
    assert TextModel(tmp_path).render_chat([{"role": "user", "content": "x"}]) == "file"


def test_a_named_default_template_is_used(tmp_path: Path) -> None:
    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "plain"}]
    write_model(tmp_path, chat_template=named)
    assert TextModel(tmp_path).render_chat([{"role": "user", "content": "x"}]) == "plain"


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{% set ns = namespace(_x=1) %}", "_x"),
        ("{{ ''.__class__.__base__.__subclasses__() }}", "unsafe"),
        ("{% for i in range(10**9) %}{% endfor %}", "[Rr]ange"),
        ("{{ 1 / 0 }}", "division by zero"),
    ],
)
def test_what_a_template_may_not_do_is_refused_in_words(template: str, reason: str, tmp_path: Path) -> None:
    write_model(tmp_path, chat_template=template)
    with pytest.raises(ConfigError, match=reason):
        TextModel(tmp_path).render_chat([{"role": "user", "content": "x"}])


def test_a_model_without_a_template_says_so(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no chat template; send a plain prompt"):
        TextModel(write_model(tmp_path)).render_chat([{"role": "user", "content": "x"}])
    with pytest.raises(ConfigError, match="conversation is empty"):
        TextModel(tmp_path).render_chat([])


def test_a_template_that_does_not_compile_names_its_file(tmp_path: Path) -> None:
    write_model(tmp_path, chat_template="{% for %}")
    with pytest.raises(ModelError, match=r"tokenizer_config.json: the chat template doesn't compile"):
        TextModel(tmp_path).render_chat([{"role": "user", "content": "x"}])


@pytest.mark.parametrize(
    ("files", "eos"),
    [
        ({"generation_config.json": {"eos_token_id": [3, 5]}, "config.json": {"eos_token_id": 7}}, {3, 5}),
        ({"generation_config.json": {}, "config.json": {"eos_token_id": 7}}, {7}),
        ({}, {0}),
    ],
    ids=["generation config first", "then the config", "then the tokenizer"],
)
def test_end_of_text_tokens_come_from_the_most_specific_file(
    files: dict[str, object], eos: set[int], tmp_path: Path
) -> None:
    tokenizer = byte_level()
    write_model(tmp_path, eos_token=tokenizer.id_to_token(0))
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content))
    assert TextModel(tmp_path).eos_ids == eos


def test_an_end_of_text_token_never_shows_even_if_the_tokenizer_calls_it_ordinary(tmp_path: Path) -> None:
    tokenizer = byte_level()
    end = tokenizer.encode("x").ids[0]
    write_model(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": end}))
    assert TextModel(tmp_path).answer().push(end) == ""


def test_broken_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"tokenizer.json: there is no such file"):
        TextModel(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ModelError, match=r"tokenizer.json: isn't a tokenizer"):
        TextModel(tmp_path)
    write_model(tmp_path)
    (tmp_path / "config.json").write_text('{"eos_token_id": "two"}')
    with pytest.raises(ModelError, match=r"config.json: eos_token_id is 'two'"):
        TextModel(tmp_path)
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(ModelError, match=r"config.json: holds list, expected an object"):
        TextModel(tmp_path)


def test_special_tokens_of_a_tokenizer_are_hidden(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_str(byte_level().to_str())
    tokenizer.add_special_tokens([AddedToken("<|end|>", special=True)])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    model = TextModel(tmp_path)
    assert model.decode(model.encode("a<|end|>b")) == "ab"


def test_text_needs_neither_torch_nor_transformers() -> None:
    code = (
        "import sys; from pathlib import Path; from skynet.coordinator.text import TextModel;"
        f"TextModel(Path({str(EMBEDDED)!r})).encode('x');"
        "sys.exit(any(name in sys.modules for name in ('torch', 'transformers')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0


def test_a_stop_token_ends_the_answer_and_its_text_is_not_shown() -> None:
    model = embedded()
    ids = model.encode("Once upon a time there was")
    stop = ids[-2]
    text = model.answer(("time there were",), stop_ids=(stop,))
    shown = ""
    for count, token_id in enumerate(ids, 1):
        assert text.is_stopped == (stop in ids[: count - 1])
        shown += text.push(token_id)
    shown += text.close()
    assert shown == model.decode(ids[: ids.index(stop)])
    assert text.close() == ""


def test_tokens_by_themselves_have_a_text() -> None:
    model = embedded()
    assert "".join(model.token_text(i) for i in model.encode("upon a time")[-2:]).strip().endswith("time")
    assert model.token_text(2**20) == ""

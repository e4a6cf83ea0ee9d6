"""A model's chat template: Jinja2 that came with the checkpoint, so it runs in a sandbox, as in transformers."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, Final, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from skynet.errors import ConfigError, ModelError

MAX_TEMPLATE_BYTES: Final = 1 << 20
TOKEN_NAMES: Final = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class ChatTemplate:
    """One compiled template."""

    def __init__(self, source: str, name: str) -> None:
        """`name` is what errors call it. Raises ModelError if it isn't a template."""
        self._name = name
        try:
            self._template = _environment().from_string(source)
        except (jinja2.TemplateError, RecursionError) as exc:
            raise ModelError(f"{name}: the chat template doesn't compile ({exc}); fetch it again") from exc

    @classmethod
    def read(cls, directory: Path, tokenizer_config: Mapping[str, object]) -> ChatTemplate:
        """The template of a model's directory: its own file, or the field in tokenizer_config.json."""
        path = directory / "chat_template.jinja"
        if path.is_file():
            if path.stat().st_size > MAX_TEMPLATE_BYTES:
                raise ModelError(f"{path}: has {path.stat().st_size} bytes, at most {MAX_TEMPLATE_BYTES} are allowed")
            try:
                return cls(path.read_text(encoding="utf-8"), str(path))
            except (OSError, UnicodeDecodeError) as exc:
                raise ModelError(f"{path}: unreadable ({exc}); fetch it again") from exc
        path = directory / "tokenizer_config.json"
        source = tokenizer_config.get("chat_template")
        if isinstance(source, list):  # several, by name
            named = {entry.get("name"): entry.get("template") for entry in source if isinstance(entry, dict)}
            source = named.get("default")
        if not isinstance(source, str):
            raise ModelError(f"{path}: the model has no chat template; send a plain prompt, or use a chat model")
        return cls(source, str(path))

    def render(
        self,
        messages: Sequence[Mapping[str, object]],
        variables: Mapping[str, object],
        *,
        add_generation_prompt: bool = True,
    ) -> str:
        """The conversation as text. Raises ConfigError if the template refuses it."""
        plain = [{key: value for key, value in message.items() if value is not None} for message in messages]
        fields = {"tools": None, "documents": None, **variables}
        try:
            return self._template.render(messages=plain, add_generation_prompt=add_generation_prompt, **fields)
        except Exception as exc:  # a template is a program: it can raise anything
            raise ConfigError(f"{self._name}: the chat template refuses this conversation: {exc}") from exc


def special_tokens(directory: Path, tokenizer_config: Mapping[str, object]) -> dict[str, str]:
    """The model's special tokens by role, as templates name them: bos_token, eos_token, ..."""
    sources = [tokenizer_config]
    try:
        older = json.loads((directory / "special_tokens_map.json").read_text(encoding="utf-8"))
        sources += [older] if isinstance(older, dict) else []
    except (OSError, ValueError, RecursionError):
        pass  # newer checkpoints don't have that file
    found: dict[str, str] = {}
    for source in sources:
        for name in TOKEN_NAMES:
            value = source.get(name)
            content = value.get("content") if isinstance(value, Mapping) else value
            if isinstance(content, str):
                found.setdefault(name, content)
    return found


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _tojson(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own escapes HTML, which models weren't trained on."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


class _Generation(Extension):
    """`{% generation %}` marks what the model said, for training; here it is transparent."""

    tags = {"generation"}  # noqa: RUF012  the base class declares it so

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body).set_lineno(line)  # what is set inside stays inside


class _Dict:
    """What templates see as `dict`: it makes dicts and offers nothing else to climb on."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, keys: Iterable[Any], value: Any = None) -> dict[Any, Any]:
        return dict.fromkeys(keys, value)


class _Namespace(jinja2.utils.Namespace):
    """Refuses names that begin with an underscore, which lead into Python's internals."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # so that templates may have an attribute called self
        values = dict(*args[1:], **kwargs)
        for name in values:
            _check_name(name)
        jinja2.utils.Namespace.__init__(args[0], values)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace attribute can't be called {name!r}; rename it")


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    environment.globals["dict"] = _Dict()
    environment.globals["namespace"] = _Namespace
    return environment

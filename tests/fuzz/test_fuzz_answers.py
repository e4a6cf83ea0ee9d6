"""A coordinator that answers anything: commands end with an error of ours, never with a traceback."""

from __future__ import annotations

import asyncio
import contextlib
import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from skynet.cli.tables import render_status  # type: ignore  # its directory is called cli

import skynet.errors
from skynet.client.admin import command
from skynet.client.answered import as_error, body_of
from skynet.client.planning import plan_for
from skynet.client.swarm import ClientConfig
from skynet.errors import MalformedMessage, SkyNetError
from skynet.protocol.admin_socket import LENGTH, read_frame, socket_path
from skynet.protocol.codec import encode
from skynet.protocol.ids import RequestId
from skynet.protocol.messages import Answer, Failed, ListNodes

REQUEST = RequestId("r")
OURS = [name for name, kind in vars(skynet.errors).items() if isinstance(kind, type) and issubclass(kind, Exception)]
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
FEW = settings(max_examples=200, deadline=None, database=None, derandomize=True)
STATUS: dict[str, Any] = {
    "name": "s", "fingerprint": "f", "epoch": "1.1", "shortage": None, "num_requests": 0, "num_queued": 0,
    "model": {"name": "m", "type": "t", "num_layers": 2, "dtype": "d"},
    "workers": [
        {"id": f"{node}.cpu", "device": "cpu", "device_name": "c", "threads": 1, "layers": "0-1", "share": "rank 1/1",
         "weight_bytes": 1, "kv_bytes": 1, "memory_bytes": 1, "link_ms": None, "tokens_per_s": 0.0, "state": "serving"}
        for node in ("abcd1", "abcd2")
    ],
    "replicas": [{"epoch": "1.1", "layout": "1x1", "phase": "serving", "num_sequences": 0,
                  "predicted_decode_tokens_per_s": 1.0}],
}  # fmt: skip


@pytest.mark.parametrize("name", [*OURS, "ValueError", "annotations", "", "foreign_text"])
def test_any_name_of_an_error_becomes_one_of_ours_with_its_text(name: str) -> None:
    found = as_error(Failed(request_id=REQUEST, error=name, text="it is so"))
    assert isinstance(found, SkyNetError)
    assert "it is so" in str(found)


@FEW
@given(st.text() | JSON.map(json.dumps) | st.sampled_from(["[" * 50_000, "1" * 5000, '"\\ud800"', "NaN"]))
def test_an_answer_that_isnt_an_object_is_malformed(body: str) -> None:
    with contextlib.suppress(MalformedMessage):
        assert isinstance(body_of(Answer(request_id=REQUEST, body=body)), dict)


@FEW
@given(st.data())
def test_a_status_with_anything_in_it_is_shown_or_malformed(data: st.DataObject) -> None:
    facts = json.loads(json.dumps(STATUS))
    where: Any = facts
    while isinstance(where, (dict, list)) and where:  # somewhere in it
        key = data.draw(st.sampled_from(sorted(where) if isinstance(where, dict) else range(len(where))))
        if data.draw(st.booleans()):
            where[key] = data.draw(JSON)
            break
        where = where[key]
    with contextlib.suppress(MalformedMessage):
        assert isinstance(render_status(facts), str)


@FEW
@given(
    st.dictionaries(
        st.sampled_from(["workers", "links", "model", "dtype", "spec", "objective", "layout", "min_context_tokens"]),
        JSON,
        max_size=3,
    )
)
def test_profiles_with_anything_in_them_give_a_plan_or_an_error_of_ours(profiles: dict[str, Any]) -> None:
    with contextlib.suppress(SkyNetError):
        plan_for(
            "embedded", None, profiles, objective=None, layout=None, dtype=None, as_json=True, cache_dir=Path("/"),
            hub_endpoint=None,
        )  # fmt: skip


@FEW
@given(
    st.binary(max_size=64)
    | st.binary(max_size=64).map(lambda data: LENGTH.pack(len(data)) + data)
    | JSON.map(lambda fact: bytes(encode(Answer(request_id=REQUEST, body=json.dumps(fact)))[0])).map(
        lambda data: LENGTH.pack(len(data)) + data
    )
)
def test_whatever_the_owners_socket_answers_ends_the_command(answer: bytes) -> None:
    async def main() -> None:
        async def visit(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await read_frame(reader)
            writer.write(answer)
            writer.close()

        with tempfile.TemporaryDirectory() as directory:
            async with await asyncio.start_unix_server(visit, str(socket_path(Path(directory)))):
                with contextlib.suppress(SkyNetError):
                    said = await command(ListNodes(request_id=REQUEST), ClientConfig(config_dir=Path(directory)))
                    assert isinstance(said, dict)

    asyncio.run(main())

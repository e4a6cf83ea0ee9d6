"""Described swarms: what is read, and how mistakes are named."""

from __future__ import annotations

from pathlib import Path

import pytest

from skynet.coordinator.planner import read_workers
from skynet.errors import ConfigError

EXAMPLE = Path(__file__).parents[3] / "docs" / "examples" / "workers.yaml"
GOOD = "workers:\n  a: {memory: 1 GiB, bandwidth: 10 GB/s, compute: 1 TFLOPS}\n"


def test_the_example_describes_five_workers_and_all_their_links() -> None:
    workers, links = read_workers(EXAMPLE)
    assert sorted(workers) == ["desktop", "gpu-box", "laptop-0", "laptop-1", "laptop-2"]
    assert workers["desktop"].weight_bytes_per_s == {"bfloat16": 38e9, "float32": 40e9}  # type: ignore[index]
    assert workers["gpu-box"].memory_bytes == 8 << 30  # type: ignore[index]
    by_ends = {(link.a, link.b): link for link in links}
    assert len(by_ends) == 10
    assert by_ends["desktop", "gpu-box"].round_trip_s == pytest.approx(0.00015)  # type: ignore[index]
    assert all(link.a < link.b for link in links)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "empty"),
        ("workers: [", "isn't YAML"),
        ("- a", ":1: file: expected fields"),
        ("links: []", "`workers` is missing"),
        ("workers: {}", "none described"),
        ("workers:\n  a: 5\n", ":2: worker a: expected fields"),
        ("workers:\n  a: {memory: 1 GiB, bandwidth: 1 GB/s}\n", ":2: worker a: field `compute` is missing"),
        (GOOD.replace("1 GiB", "1"), ":2: worker a.memory: expected a number and a unit"),
        (GOOD.replace("1 GiB", "-1 GiB"), "worker a.memory: expected a number"),
        (GOOD.replace("1 GiB", "0 GiB"), "worker a.memory: expected more than zero"),
        (GOOD.replace("1 GiB", "1e999 GiB"), "worker a.memory"),
        (GOOD.replace("memory", "ram"), ":2: worker a: unknown field 'ram'"),
        (GOOD.replace("10 GB/s", "{int4: 1 GB/s}"), "unknown field 'int4'"),
        (GOOD.replace("10 GB/s", "1e200 GB/s"), ":2: worker a: rates must be positive and finite"),
        (GOOD + "  a: {memory: 1 GiB}\n", ":3: workers: field a appears twice"),
        (GOOD.replace("}", ", count: 0}"), "worker a.count: expected a whole number from 1"),
        (GOOD.replace("}", ", count: 99999}"), "worker a.count"),
        (GOOD + "links: 3\n", ":3: links: expected a list"),
        (GOOD + "links:\n  - {between: [a]}\n", ":4: link 1: field `round_trip` is missing"),
        (GOOD + "links:\n  - {between: [a], round_trip: 1 ms, bandwidth: 1 MB/s}\n", "joins at least two"),
        (GOOD + "links:\n  - {between: [a, b], round_trip: 1 ms, bandwidth: 1 MB/s}\n", "no worker is called 'b'"),
    ],
)
def test_a_mistake_is_named_with_its_line_and_field(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "workers.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        read_workers(path)
    assert str(path) in str(caught.value)
    assert message in str(caught.value)


def test_a_file_that_isnt_there_or_isnt_text_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="can't be read"):
        read_workers(tmp_path / "nowhere.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00\x01")
    with pytest.raises(ConfigError, match="can't be read"):
        read_workers(tmp_path / "binary.yaml")
    (tmp_path / "deep.yaml").write_text("[" * 1200)
    with pytest.raises(ConfigError, match="isn't YAML"):
        read_workers(tmp_path / "deep.yaml")

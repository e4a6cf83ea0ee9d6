"""A described swarm: workers and links from a YAML file, for `skynet plan --workers file.yaml`.

Every mistake is reported with the file, the line and the field. docs/examples/workers.yaml shows all fields.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Final, NoReturn, TypeVar

import yaml

from skynet.errors import ConfigError
from skynet.protocol.ids import WorkerId
from skynet.protocol.profile import LinkProfile, WorkerProfile

T = TypeVar("T")

_MAX_FILE_BYTES: Final = 16 << 20
_MAX_WORKERS: Final = 10_000
_DTYPES: Final = ("float32", "bfloat16", "float16")
_BYTES: Final = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}
_SECONDS: Final = {"s": 1.0, "ms": 1e-3, "us": 1e-6}
_FLOPS: Final = {"GFLOPS": 1e9, "TFLOPS": 1e12}
_WORKER_FIELDS: Final = ("memory", "bandwidth", "compute", "overhead", "host", "device", "threads", "count")
_LINK_FIELDS: Final = ("between", "round_trip", "bandwidth")


class _Reader:
    """Reads one file's nodes; keeps its name for messages."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def fail(self, node: yaml.Node, text: str) -> NoReturn:
        raise ConfigError(f"{self.path}:{node.start_mark.line + 1}: {text}")

    def mapping(self, node: yaml.Node, what: str, known: tuple[str, ...] | None = None) -> dict[str, yaml.Node]:
        """A mapping's values by key; refuses keys that are doubled or not `known`."""
        if not isinstance(node, yaml.MappingNode):
            self.fail(node, f"{what}: expected fields of the form `name: value`, got {_shape(node)}")
        found: dict[str, yaml.Node] = {}
        for key, value in node.value:
            name = key.value if isinstance(key, yaml.ScalarNode) else ""
            if not name or name in found:
                self.fail(key, f"{what}: {'field ' + name + ' appears twice' if name else 'a field without a name'}")
            if known is not None and name not in known:
                self.fail(key, f"{what}: unknown field {name!r}; known are {', '.join(known)}")
            found[name] = value
        return found

    def items(self, node: yaml.Node, what: str) -> list[yaml.Node]:
        if not isinstance(node, yaml.SequenceNode):
            self.fail(node, f"{what}: expected a list, got {_shape(node)}")
        return list(node.value)

    def text(self, node: yaml.Node, what: str) -> str:
        if not isinstance(node, yaml.ScalarNode) or not node.value:
            self.fail(node, f"{what}: expected text, got {_shape(node)}")
        return str(node.value)

    def count(self, node: yaml.Node, what: str, upper: int) -> int:
        text = self.text(node, what)
        if not re.fullmatch(r"\d{1,9}", text) or not 1 <= int(text) <= upper:
            self.fail(node, f"{what}: expected a whole number from 1 to {upper}, got {text!r}")
        return int(text)

    def quantity(self, node: yaml.Node, what: str, units: dict[str, float] | dict[str, int], example: str) -> float:
        """A positive number with one of `units`, like "8 GiB"."""
        text = self.text(node, what)
        match = re.fullmatch(r"(\d+(?:\.\d+)?(?:e[+-]?\d+)?)\s*([A-Za-z]+)(?:/s)?", text)
        if match is None or match[2] not in units:
            self.fail(node, f"{what}: expected a number and a unit ({', '.join(units)}) like {example!r}, got {text!r}")
        value = float(match[1]) * units[match[2]]
        if not 0 < value < math.inf:
            self.fail(node, f"{what}: expected more than zero, got {text!r}")
        return value

    def checked(self, node: yaml.Node, what: str, make: Callable[[], T]) -> T:
        """Whatever a profile itself refuses."""
        try:
            return make()
        except ConfigError:
            raise
        except ValueError as exc:
            self.fail(node, f"{what}: {exc}")


def _shape(node: yaml.Node) -> str:
    if isinstance(node, yaml.MappingNode):
        return "a mapping"
    if isinstance(node, yaml.SequenceNode):
        return "a list"
    return repr(node.value[:80]) if node.value else "nothing"


def read_workers(path: Path | str) -> tuple[dict[WorkerId, WorkerProfile], list[LinkProfile]]:
    """Read a described swarm. Raises ConfigError that names file, line and field."""
    path = Path(path)
    reader = _Reader(path)
    try:
        if path.stat().st_size > _MAX_FILE_BYTES:
            raise ConfigError(f"{path}: larger than {_MAX_FILE_BYTES >> 20} MiB; describe groups of workers by `count`")
        root = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    except (OSError, UnicodeDecodeError) as exc:
        raise ConfigError(f"{path}: can't be read: {exc}") from exc
    except (yaml.YAMLError, RecursionError) as exc:
        raise ConfigError(f"{path}: isn't YAML: {exc}") from exc
    if root is None:
        raise ConfigError(f"{path}: empty; expected `workers:` and, if known, `links:`")
    top = reader.mapping(root, "file", ("workers", "links"))
    if "workers" not in top:
        reader.fail(root, "file: field `workers` is missing")
    workers: dict[WorkerId, WorkerProfile] = {}
    counted: dict[str, list[WorkerId]] = {}
    for name, node in reader.mapping(top["workers"], "workers").items():
        counted[name] = _add_workers(reader, workers, name, node)
    if not workers:
        reader.fail(top["workers"], "workers: none described")
    links: dict[tuple[WorkerId, WorkerId], LinkProfile] = {}
    for index, node in enumerate(reader.items(top["links"], "links") if "links" in top else []):
        _add_links(reader, links, counted, f"link {index + 1}", node)
    return workers, list(links.values())


def _add_workers(reader: _Reader, workers: dict[WorkerId, WorkerProfile], name: str, node: yaml.Node) -> list[WorkerId]:
    what = f"worker {name}"
    fields = reader.mapping(node, what, _WORKER_FIELDS)
    for needed in ("memory", "bandwidth", "compute"):
        if needed not in fields:
            reader.fail(node, f"{what}: field `{needed}` is missing")
    count = reader.count(fields["count"], f"{what}.count", _MAX_WORKERS) if "count" in fields else 1
    profile = reader.checked(
        node,
        what,
        lambda: WorkerProfile(
            device=reader.text(fields["device"], f"{what}.device") if "device" in fields else "cpu",
            device_name="described",
            threads=reader.count(fields["threads"], f"{what}.threads", 4096) if "threads" in fields else 1,
            memory_bytes=int(reader.quantity(fields["memory"], f"{what}.memory", _BYTES, "8 GiB")),
            weight_bytes_per_s=_rates(reader, fields["bandwidth"], f"{what}.bandwidth", _BYTES, "20 GB/s"),
            matmul_flops_per_s=_rates(reader, fields["compute"], f"{what}.compute", _FLOPS, "2 TFLOPS"),
            layer_overhead_s=reader.quantity(fields["overhead"], f"{what}.overhead", _SECONDS, "200 us")
            if "overhead" in fields
            else 0.0005,
            host_id=reader.text(fields["host"], f"{what}.host") if "host" in fields else "",
        ),
    )
    ids = [WorkerId(name)] if "count" not in fields else [WorkerId(f"{name}-{i}") for i in range(count)]
    for worker_id in ids:
        if worker_id in workers:
            reader.fail(node, f"{what}: the name {worker_id} is used twice")
        workers[worker_id] = profile
    if len(workers) > _MAX_WORKERS:
        reader.fail(node, f"{what}: more than {_MAX_WORKERS} workers described")
    return ids


def _rates(
    reader: _Reader, node: yaml.Node, what: str, units: dict[str, float] | dict[str, int], example: str
) -> dict[str, float]:
    """One rate for all dtypes, or one per dtype."""
    if isinstance(node, yaml.MappingNode):
        fields = reader.mapping(node, what, _DTYPES)
        if not fields:
            reader.fail(node, f"{what}: no dtype given; known are {', '.join(_DTYPES)}")
        return {dtype: reader.quantity(value, f"{what}.{dtype}", units, example) for dtype, value in fields.items()}
    return dict.fromkeys(_DTYPES, reader.quantity(node, what, units, example))


def _add_links(
    reader: _Reader,
    links: dict[tuple[WorkerId, WorkerId], LinkProfile],
    counted: dict[str, list[WorkerId]],
    what: str,
    node: yaml.Node,
) -> None:
    """One entry joins every two of the workers it names; a later entry for the same two replaces an earlier one."""
    fields = reader.mapping(node, what, _LINK_FIELDS)
    for needed in _LINK_FIELDS:
        if needed not in fields:
            reader.fail(node, f"{what}: field `{needed}` is missing")
    round_trip_s = reader.quantity(fields["round_trip"], f"{what}.round_trip", _SECONDS, "0.2 ms")
    bandwidth = reader.quantity(fields["bandwidth"], f"{what}.bandwidth", _BYTES, "110 MB/s")
    ends: set[WorkerId] = set()
    for item in reader.items(fields["between"], f"{what}.between"):
        name = reader.text(item, f"{what}.between")
        found = counted.get(name) or ([WorkerId(name)] if WorkerId(name) in set().union(*counted.values()) else None)
        if found is None:
            reader.fail(item, f"{what}.between: no worker is called {name!r}")
        ends.update(found)
    if len(ends) < 2:
        reader.fail(fields["between"], f"{what}.between: a link joins at least two workers")
    if len(ends) > 1000:
        reader.fail(fields["between"], f"{what}.between: {len(ends)} workers in one entry; at most 1000")
    for a, b in itertools.combinations(sorted(ends), 2):
        make = partial(LinkProfile, a=a, b=b, round_trip_s=round_trip_s, bandwidth_bytes_per_s=bandwidth)
        links[a, b] = reader.checked(node, what, make)

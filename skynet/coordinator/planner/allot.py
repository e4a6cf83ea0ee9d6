"""Which group gets which layers: dynamic programming over groups in pipeline order.

best[i] is the least cost of giving layers [0, i) to the groups seen so far; a group may be left out. Costs inside a
stage are sums over its layers, so the inner minimum is a sliding window, and an option takes time proportional to the
number of layers.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

INFINITY = float("inf")


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """One way in which a group could run a stage of a model with L layers: costs, and what fits its memory."""

    prefix: Sequence[float]  # [L + 1]; layers [s, i) cost prefix[i] - prefix[s]
    low: Sequence[int]  # [L + 1], ascending; layers [s, i) fit for s >= low[i]
    first_end: int  # as the first stage of several, layers [0, i) fit for i <= first_end
    last_start: int  # as the last stage of several, layers [s, L) fit for s >= last_start
    fits_whole: bool  # as the only stage
    first_cost: float  # besides layers: embedding
    last_cost: float  # LM head
    whole_cost: float  # both


class Allotted(NamedTuple):
    """Layers [start, end) for the group at `position`, run by its option `option`."""

    position: int
    option: int
    start: int
    end: int


_Choices = list[tuple[int, int] | None]  # [L + 1]; of the stage that ends there: its start, its option


def allot(columns: Sequence[Sequence[Option]], entry: Sequence[float], may_skip: bool = True) -> list[Allotted] | None:
    """The cheapest allotment of all layers to groups in this order, or None if they don't fit.

    `columns[g]` are group g's options; `entry[g]` is paid if g isn't the first stage. The cost is the sum over stages.
    Without `may_skip` every group gets a layer.
    """
    if not columns:
        return None
    best = [0.0] + [INFINITY] * (len(columns[0][0].prefix) - 1)
    choices = []
    for position, (options, entry_cost) in enumerate(zip(columns, entry, strict=True)):
        new = best.copy() if may_skip else [INFINITY] * len(best)
        chosen: _Choices = [None] * len(best)
        for index, option in enumerate(options):
            if may_skip or position == 0:
                _begin(new, chosen, option, index)
            _extend(best, new, chosen, option, index, entry_cost)
        choices.append(chosen)
        best = new
    return None if best[-1] == INFINITY else _trace(choices)


def allot_evenly(options: Sequence[Option]) -> list[Allotted] | None:
    """The allotment whose dearest stage costs least; every group, of one option each, gets a layer. None: no room."""
    best = [0.0] + [INFINITY] * (len(options[0].prefix) - 1)
    choices = []
    for position, option in enumerate(options):
        new = [INFINITY] * len(best)
        chosen: _Choices = [None] * len(best)
        if position == 0:
            _begin(new, chosen, option, 0)
        _extend_evenly(best, new, chosen, option)
        choices.append(chosen)
        best = new
    return None if best[-1] == INFINITY else _trace(choices)


def _trace(choices: list[_Choices]) -> list[Allotted]:
    found, end = [], len(choices[0]) - 1
    for position in range(len(choices) - 1, -1, -1):
        choice = choices[position][end]
        if choice is not None:
            start, option = choice
            found.append(Allotted(position, option, start, end))
            end = start
    return found[::-1]


def _begin(new: list[float], chosen: _Choices, option: Option, index: int) -> None:
    """The group as the first stage, or the only one."""
    prefix = option.prefix
    num_layers = len(prefix) - 1
    for i in range(1, min(option.first_end, num_layers - 1) + 1):
        if (cost := prefix[i] + option.first_cost) < new[i]:
            new[i], chosen[i] = cost, (0, index)
    if option.fits_whole and (cost := prefix[num_layers] + option.whole_cost) < new[num_layers]:
        new[num_layers], chosen[num_layers] = cost, (0, index)


def _extend(best: list[float], new: list[float], chosen: _Choices, option: Option, index: int, entry: float) -> None:
    """The group as a middle or the last stage."""
    prefix, low = option.prefix, option.low
    num_layers = len(prefix) - 1
    window: deque[tuple[float, int]] = deque()  # ascending (best[s] - prefix[s], s)
    for i in range(2, num_layers):
        s = i - 1
        if best[s] < INFINITY:
            gap = best[s] - prefix[s]
            while window and window[-1][0] > gap:
                window.pop()
            window.append((gap, s))
        while window and window[0][1] < low[i]:
            window.popleft()
        if window and (cost := window[0][0] + prefix[i] + entry) < new[i]:
            new[i], chosen[i] = cost, (window[0][1], index)
    total = prefix[num_layers]
    for s in range(max(1, option.last_start), num_layers):
        if (cost := best[s] - prefix[s] + total + option.last_cost + entry) < new[num_layers]:
            new[num_layers], chosen[num_layers] = cost, (s, index)


def _extend_evenly(best: list[float], new: list[float], chosen: _Choices, option: Option) -> None:
    """The same where the dearest stage counts."""
    prefix, low = option.prefix, option.low
    num_layers = len(prefix) - 1
    for i in range(2, num_layers + 1):
        is_last = i == num_layers
        own = prefix[i] + (option.last_cost if is_last else 0.0)
        for s in range(i - 1, max(1, option.last_start if is_last else low[i]) - 1, -1):
            if own - prefix[s] >= new[i]:  # and it only grows as s falls
                break
            if (cost := max(best[s], own - prefix[s])) < new[i]:
                new[i], chosen[i] = cost, (s, 0)

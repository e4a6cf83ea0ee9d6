"""Which group gets which layers: dynamic programming over groups in pipeline order.

best[i] is the least cost of giving layers [0, i) to the groups seen so far; a group may be left out. Costs inside a
stage are sums over its layers, so the inner minimum is a sliding window (sum of stages) or a crossing point (slowest
stage), and a column takes time proportional to the number of layers.
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


_Choice = tuple[int, int]  # start of the stage, option


def allot(
    columns: Sequence[Sequence[Option]], entry: Sequence[float], slowest_stage: bool, may_skip: bool = True
) -> list[Allotted] | None:
    """The cheapest allotment of all layers to groups in this order, or None if they don't fit.

    `columns[g]` are group g's options; `entry[g]` is paid if g isn't the first stage. The cost is the sum over stages,
    or with `slowest_stage` the largest (and `entry` doesn't count). Without `may_skip` every group gets a layer.
    """
    if not columns:
        return None
    num_layers = len(columns[0][0].prefix) - 1
    best = [0.0] + [INFINITY] * num_layers
    choices: list[list[_Choice | None]] = []
    for position, (options, entry_cost) in enumerate(zip(columns, entry, strict=True)):
        new = best.copy() if may_skip else [INFINITY] * (num_layers + 1)
        chosen: list[_Choice | None] = [None] * (num_layers + 1)
        for index, option in enumerate(options):
            if may_skip or position == 0:
                _begin(new, chosen, option, index)
            if slowest_stage:
                middle = _middle_slowest if may_skip else _middle_slowest_all
                middle(best, new, chosen, option, index)
                _end_slowest(best, new, chosen, option, index)
            else:
                _extend_sum(best, new, chosen, option, index, entry_cost)
        choices.append(chosen)
        best = new
    if best[num_layers] == INFINITY:
        return None
    return _trace(choices, num_layers)


def _trace(choices: list[list[_Choice | None]], end: int) -> list[Allotted]:
    found = []
    for position in range(len(choices) - 1, -1, -1):
        choice = choices[position][end]
        if choice is not None:
            start, option = choice
            found.append(Allotted(position, option, start, end))
            end = start
    return found[::-1]


def _begin(new: list[float], chosen: list[_Choice | None], option: Option, index: int) -> None:
    """The group as the first stage, or the only one."""
    prefix = option.prefix
    num_layers = len(prefix) - 1
    for i in range(1, min(option.first_end, num_layers - 1) + 1):
        if (cost := prefix[i] + option.first_cost) < new[i]:
            new[i], chosen[i] = cost, (0, index)
    if option.fits_whole and (cost := prefix[num_layers] + option.whole_cost) < new[num_layers]:
        new[num_layers], chosen[num_layers] = cost, (0, index)


def _extend_sum(
    best: list[float], new: list[float], chosen: list[_Choice | None], option: Option, index: int, entry: float
) -> None:
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


def _middle_slowest(
    best: list[float], new: list[float], chosen: list[_Choice | None], option: Option, index: int
) -> None:
    """The group as a middle stage. best[s] grows with s (dropping a layer costs nothing, dropping a group neither) and
    the stage's own cost falls, so their maximum is least next to where they cross."""
    prefix, low = option.prefix, option.low
    crossing = 1
    for i in range(2, len(prefix) - 1):
        lowest, upto = max(1, low[i]), prefix[i]
        if best[lowest] == INFINITY:
            break
        crossing = max(crossing, lowest)
        while crossing < i - 1 and best[crossing] < upto - prefix[crossing]:
            crossing += 1
        before, own = best[crossing], upto - prefix[crossing]
        if (cost := before if before > own else own) < new[i]:
            new[i], chosen[i] = cost, (crossing, index)
        if crossing > lowest and (cost := upto - prefix[crossing - 1]) < new[i] and best[crossing - 1] <= cost:
            new[i], chosen[i] = cost, (crossing - 1, index)


def _middle_slowest_all(
    best: list[float], new: list[float], chosen: list[_Choice | None], option: Option, index: int
) -> None:
    """The same where best[s] needn't grow with s, since every group must have a layer."""
    prefix, low = option.prefix, option.low
    for i in range(2, len(prefix) - 1):
        for s in range(i - 1, max(1, low[i]) - 1, -1):
            own = prefix[i] - prefix[s]
            if own >= new[i]:  # and it only grows as s falls
                break
            if (cost := max(best[s], own)) < new[i]:
                new[i], chosen[i] = cost, (s, index)


def _end_slowest(best: list[float], new: list[float], chosen: list[_Choice | None], option: Option, index: int) -> None:
    """The group as the last stage."""
    prefix = option.prefix
    num_layers = len(prefix) - 1
    total = prefix[num_layers] + option.last_cost
    for s in range(max(1, option.last_start), num_layers):
        before, own = best[s], total - prefix[s]
        if (cost := before if before > own else own) < new[num_layers]:
            new[num_layers], chosen[num_layers] = cost, (s, index)

"""Rotary position embedding: frequencies for each kind of scaling, and the rotation of one step."""

# T tokens of the step, H heads, K head size

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from skynet.models.config import RopeConfig


class Rotation(NamedTuple):
    """One step's angles, shared by all layers: x * cos + swap_halves(x) * sin."""

    cos: Tensor  # [T, 1, K], model dtype
    sin: Tensor  # [T, 1, K], the first half negated


class Rope:
    """A model's frequencies on its device."""

    def __init__(self, config: RopeConfig, head_size: int, dtype: torch.dtype, device: torch.device) -> None:
        frequencies, self._scale = rope_frequencies(config, head_size)
        self._frequencies = frequencies.to(device)
        self._dtype = dtype

    def rotation(self, positions: Tensor) -> Rotation:
        """positions: [T] int64."""
        angles = positions[:, None].float() * self._frequencies  # [T, K/2] float32
        cos, sin = angles.cos().mul_(self._scale), angles.sin().mul_(self._scale)
        return Rotation(
            torch.cat((cos, cos), -1).to(self._dtype).unsqueeze_(1),
            torch.cat((-sin, sin), -1).to(self._dtype).unsqueeze_(1),
        )


def swap_halves(x: Tensor) -> Tensor:
    """x: [..., K] with its halves exchanged; a new tensor."""
    return torch.roll(x, x.shape[-1] // 2, -1)


def rope_frequencies(config: RopeConfig, head_size: int) -> tuple[Tensor, float]:
    """Inverse frequencies [K/2] in float32, and what cos and sin are multiplied by."""
    inverse = 1.0 / config.theta ** (torch.arange(0, head_size, 2, dtype=torch.float32) / head_size)
    match config.kind:
        case "default":
            return inverse, 1.0
        case "linear":
            return inverse / config.factor, 1.0
        case "llama3":
            return _llama3(config, inverse), 1.0
        case "yarn":
            return _yarn(config, inverse, head_size), _yarn_attention_factor(config)


def _llama3(config: RopeConfig, inverse: Tensor) -> Tensor:
    """Long wavelengths are stretched by the factor, short ones kept, those between interpolated."""
    wavelength = 2 * math.pi / inverse
    longest = config.original_max_positions / config.low_freq_factor
    shortest = config.original_max_positions / config.high_freq_factor
    spread = config.high_freq_factor - config.low_freq_factor
    keep = (config.original_max_positions / wavelength - config.low_freq_factor) / spread
    between = (1 - keep) * inverse / config.factor + keep * inverse
    stretched = torch.where(wavelength > longest, inverse / config.factor, inverse)
    return torch.where((wavelength >= shortest) & (wavelength <= longest), between, stretched)


def _yarn(config: RopeConfig, inverse: Tensor, head_size: int) -> Tensor:
    """arXiv 2309.00071, section 3.2: a ramp between interpolated and untouched frequencies."""

    def dimension(rotations: float) -> float:
        turns = config.original_max_positions / (rotations * 2 * math.pi)
        return head_size * math.log(turns) / (2 * math.log(config.theta))

    low, high = dimension(config.beta_fast), dimension(config.beta_slow)
    if config.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_size - 1)
    high = high + 0.001 if low == high else high
    ramp = ((torch.arange(head_size // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    return inverse / config.factor * ramp + inverse * (1 - ramp)


def _yarn_attention_factor(config: RopeConfig) -> float:
    def scale(mscale: float) -> float:
        return 1.0 if config.factor <= 1 else 0.1 * mscale * math.log(config.factor) + 1.0

    if config.attention_factor is not None:
        return config.attention_factor
    if config.mscale and config.mscale_all_dim:
        return scale(config.mscale) / scale(config.mscale_all_dim)
    return scale(1.0)

"""RMS norm, in the form that is fastest for the number of rows."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


class RmsNorm:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension. Weights of several rows norm each row by its own.

    `F.rms_norm` is fused on CUDA; on the CPU it is a chain of ops through float32 copies (measured in
    docs/decisions/0021), so one row goes through `layer_norm`'s fused kernel as [x, -x], whose mean is 0 and whose
    variance is mean(x^2), and many rows scale in place.
    """

    def __init__(self, weight: Tensor, eps: float) -> None:
        self._weight = weight  # [n], or [H, n] for x of [T, H, n]
        self._size = weight.shape[-1]
        self._eps = eps
        self._is_fused = weight.device.type != "cpu"
        self._twice = torch.cat((weight, weight)) if weight.dim() == 1 else None

    def __call__(self, x: Tensor) -> Tensor:
        """x: [T, n] or [T, H, n] -> the same shape, contiguous."""
        if self._is_fused or (torch.is_grad_enabled() and x.requires_grad):
            return F.rms_norm(x, (self._size,), None, self._eps) * self._weight
        if x.shape[0] == 1:
            mirrored = F.layer_norm(torch.cat((x, -x), -1), (2 * self._size,), self._twice, None, self._eps)
            normed = mirrored.narrow(-1, 0, self._size)
            return normed * self._weight if self._twice is None else normed
        length = torch.linalg.vector_norm(x, 2, -1, True, dtype=torch.float32)
        scale = length.square_().mul_(1 / self._size).add_(self._eps).rsqrt_()  # [T, (H,) 1]
        return torch.mul(x, scale, out=torch.empty_like(x, memory_format=torch.contiguous_format)).mul_(self._weight)

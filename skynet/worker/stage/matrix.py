"""A weight matrix in the layout that its device multiplies fastest.

On x86 CPUs with oneDNN the weights are reordered once, at load: from row-major weights a decode step's matrix-vector
product reaches less than half of the memory bandwidth that it reaches from blocked ones (docs/decisions/0020).
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

_BATCH_HINT = 64  # rows for which oneDNN chooses its blocks; measured good from 1 to 512


class Matrix(Protocol):
    """y = x W^T + b."""

    rows: int  # output features
    nbytes: int

    def __call__(self, x: Tensor) -> Tensor:
        """x: [T, columns], contiguous, in the matrix's dtype and on its device -> [T, rows], a new tensor."""


class PlainMatrix:
    """Row-major weights."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self._weight = weight
        self._bias = bias
        self.rows = weight.shape[0]
        self.nbytes = weight.nbytes + (0 if bias is None else bias.nbytes)

    def __call__(self, x: Tensor) -> Tensor:
        """The product."""
        return F.linear(x, self._weight, self._bias)


class PackedMatrix:
    """oneDNN's blocked weights; the row-major ones are let go.

    Gradients pass to x. Each backward pass reorders the weights back and lets the copy go: one matrix at a time.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight, _BATCH_HINT)
        self._bias = bias
        self._multiply = torch.ops.mkldnn._linear_pointwise.default
        self.rows = weight.shape[0]
        self.nbytes = weight.nbytes + (0 if bias is None else bias.nbytes)

    def __call__(self, x: Tensor) -> Tensor:
        """The product."""
        if torch.is_grad_enabled():
            product: Tensor = _PackedProduct.apply(x, self)  # type: ignore[no-untyped-call]
            return product
        return self.multiply(x)

    def row_major(self) -> Tensor:
        """A copy of the weights as they were, [rows, columns]."""
        weight: Tensor = self._weight.to_dense()
        return weight

    def multiply(self, x: Tensor) -> Tensor:
        """The product, without gradients."""
        result: Tensor = self._multiply(x, self._weight, self._bias, "none", [], "")
        return result


class _PackedProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, matrix: PackedMatrix) -> Tensor:
        ctx.matrix = matrix
        return matrix.multiply(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0] @ ctx.matrix.row_major(), None


def make_matrix(weight: Tensor, bias: Tensor | None = None) -> Matrix:
    """`weight`: [rows, columns] on its device. Packs it where that pays."""
    if can_pack(weight):
        return PackedMatrix(weight, bias)
    return PlainMatrix(weight, bias)


def can_pack(weight: Tensor) -> bool:
    """Whether oneDNN has a fast blocked form for this device, dtype and size."""
    if weight.device.type != "cpu" or weight.numel() == 0 or not torch._C._has_mkldnn:
        return False
    if weight.dtype == torch.float32:
        return True
    if weight.dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return weight.dtype == torch.float16 and bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())

"""matmul_gelu: the two GEMMs of the frozen FFN that stand beside GELU, with GELU in their epilogue.

    forward     u = x W1^T + b1,  a = gelu(u)                               (T, F) each
    backward    [da | dH'] = dY [W2 | B],  du = da gelu'(u)                 [du | dH'] (T, F + R)

a is computed from the rounded u, which the backward pass reads, and du from the fp32 da.

The grid is persistent, two programs for each multiprocessor: while one is in its epilogue, the other keeps the tensor
cores busy. Tiles of BM tokens by BN columns cross tasks, since these GEMMs know none. Programs run through eight rows
of tiles column by column, so that their tokens stay in the L2. The epilogue works on halves of a tile, which need fewer
registers and less shared memory. Operands are tensor descriptors (TMA) where the GPU has them and rows begin at
multiples of 16 bytes, else pointers. Warp specialisation is not used: Triton compiles it only with descriptors that the
kernel makes, which take an allocation for each launch.
Bytes: T (d es + 2 F es), backward T (D es + F es + (F + R) es); weights from the L2. FLOPs: 2 T d F; 2 T D (F + R).
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from kernels.gating import Pool
from kernels.gelu import gelu_backward_reference, gelu_derivative, gelu_reference, gelu_value
from kernels.tiles import has_descriptors, multiprocessors, tile


def matmul_gelu_reference(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """(u, a)."""
    u = torch.nn.functional.linear(x, weight, bias)
    return u, gelu_reference(u)


def matmul_gelu_backward_reference(dy: Tensor, weight: Tensor, u: Tensor) -> Tensor:
    """[du | dH']."""
    grad, hidden = dy @ weight, u.shape[1]
    return torch.cat([gelu_backward_reference(u, grad[:, :hidden]), grad[:, hidden:]], 1)


@triton.jit
def _block(row, column, rows, columns, stride, BM: tl.constexpr, BN: tl.constexpr):
    """(offsets, mask) of a block at (row, column) in a matrix of (rows, columns)."""
    down, across = row + tl.arange(0, BM)[:, None], column + tl.arange(0, BN)[None, :]
    return down.to(tl.int64) * stride + across, (down < rows) & (across < columns)


@triton.jit
def _load(matrix, row, column, rows, columns, stride, BM: tl.constexpr, BN: tl.constexpr):
    """A block of ``matrix``, a pointer or a descriptor of such blocks; 0 beyond the ends."""
    if isinstance(matrix, tl.tensor_descriptor):
        block = matrix.load([row, column])
    else:
        offsets, mask = _block(row, column, rows, columns, stride, BM, BN)
        block = tl.load(matrix + offsets, mask, 0.0)
    return block


@triton.jit
def _store(matrix, value, row, column, rows, columns, stride):
    if isinstance(matrix, tl.tensor_descriptor):
        matrix.store([row, column], value)
    else:
        offsets, mask = _block(row, column, rows, columns, stride, value.shape[0], value.shape[1])
        tl.store(matrix + offsets, value, mask)


@triton.jit
def _finish(total, bias, u, result, row, column, T, F, WIDTH, result_stride, BACKWARD: tl.constexpr):
    """Store half a tile: u and gelu(u), or the gradients, past the columns of u as they are."""
    dtype: tl.constexpr = bias.dtype.element_ty
    exact: tl.constexpr = dtype.is_fp32()
    across = column + tl.arange(0, total.shape[1])[None, :]
    if BACKWARD:
        value = _load(u, row, column, T, F, F, total.shape[0], total.shape[1]).to(tl.float32)
        total *= tl.where(across < F, gelu_derivative(value, exact), 1.0)
    else:
        total += tl.load(bias + across, across < F, 0.0).to(tl.float32)
        rounded = total.to(dtype)
        _store(u, rounded, row, column, T, F, F)
        total = gelu_value(rounded.to(tl.float32), exact)
    _store(result, total.to(dtype), row, column, T, WIDTH, result_stride)


@triton.jit
def matmul_gelu_kernel(
    x, weight, bias, u, result, x_stride, weight_stride, result_stride, T, K, WIDTH, F,
    BACKWARD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr = 8,
):  # fmt: skip
    rows, columns = tl.cdiv(T, BM), tl.cdiv(WIDTH, BN)
    for index in range(tl.program_id(0), rows * columns, tl.num_programs(0)):
        group, place = index // (GROUP * columns), index % (GROUP * columns)
        height = tl.minimum(rows - group * GROUP, GROUP)
        row, column = (group * GROUP + place % height) * BM, place // height * BN
        total = tl.zeros((BM, BN), tl.float32)
        for start in range(0, K, BK):
            tokens = _load(x, row, start, T, K, x_stride, BM, BK)
            if BACKWARD:
                weights = _load(weight, start, column, K, WIDTH, weight_stride, BK, BN)
            else:
                weights = _load(weight, column, start, WIDTH, K, weight_stride, BN, BK).T
            total = tl.dot(tokens, weights, total, input_precision="ieee")
        left, right = tl.split(tl.permute(tl.reshape(total, (BM, 2, BN // 2)), (0, 2, 1)))
        _finish(left, bias, u, result, row, column, T, F, WIDTH, result_stride, BACKWARD)
        _finish(right, bias, u, result, row, column + BN // 2, T, F, WIDTH, result_stride, BACKWARD)


def matmul_gelu(x: Tensor, weight: Tensor, bias: Tensor, a: Tensor, pool: Pool) -> Tensor:
    """u (T, F) of x (T, d), weight (F, d) and bias (F,); gelu(u) is written into ``a`` (T, F).

    All have one type; x, weight and ``a`` have any row strides.
    """
    u = x.new_empty(len(x), len(weight))
    _launch(x, weight, bias, u, a, pool)
    return u


def matmul_gelu_backward(dy: Tensor, weight: Tensor, u: Tensor, grad: Tensor, pool: Pool) -> None:
    """Write [du | dH'] into ``grad`` (T, F + R) from dy (T, D), weight (D, F + R) and u (T, F), which is contiguous.

    All have one type; dy, weight and ``grad`` have any row strides.
    """
    _launch(dy, weight, None, u, grad, pool)


def _launch(x: Tensor, weight: Tensor, bias: Tensor | None, u: Tensor, result: Tensor, pool: Pool) -> None:
    sizes, backward = tile("matmul_gelu", x.device, x.dtype, pool), bias is None
    bm, bn, bk = sizes["BM"], sizes["BN"], sizes["BK"]
    tiles = math.ceil(len(x) / bm) * math.ceil(result.shape[1] / bn)
    blocks = (bm, bk), (bk, bn) if backward else (bn, bk), (bm, bn // 2), (bm, bn // 2)
    matrices = _described((x, weight, u, result), blocks)
    matmul_gelu_kernel[(min(tiles, 2 * multiprocessors(x.device)),)](
        *matrices[:2], x if bias is None else bias, *matrices[2:],  # x stands for the bias, of which the type is read
        x.stride(0), weight.stride(0), result.stride(0), *x.shape, result.shape[1], u.shape[1],
        BACKWARD=backward, **sizes,
    )  # fmt: skip


def _described(matrices: tuple[Tensor, ...], blocks: tuple) -> tuple[Tensor | TensorDescriptor, ...]:
    """Descriptors of the matrices, or these themselves if rows of one overlap or begin at no multiple of 16 bytes."""
    for matrix in matrices:
        start = (matrix.stride(0) * matrix.element_size() | matrix.data_ptr()) % 16
        if start or matrix.numel() == 0 or matrix.stride(0) < matrix.shape[1] or not has_descriptors(matrix.device):
            return matrices
    return tuple(map(TensorDescriptor.from_tensor, matrices, blocks))

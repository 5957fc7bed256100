"""Functions that kernels call: selection, gates, products with an fp32 operand.

Tiles are BM tokens by NP columns (see Pool), fp32, in registers. A padded column is never selected and has gate 0.
"""

import triton
import triton.language as tl


@triton.jit
def sort_keys(z):
    """int32 numbers that are ordered like the fp32 z, NaN above all; to be inverted by the same exclusive or."""
    bits = tl.where(z != z, 0x7FFFFFFF, z.to(tl.int32, bitcast=True))
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def select(z, sparse, k):
    """True at the k largest of the first ``sparse`` columns of z (BM, NP); of equal logits the lowest index wins.

    NaN counts as the largest, as in torch.sort: it is selected, so that the token's gates become NaN. Each round is one
    reduction over 64-bit keys: the logit above, the column below, so that no two are equal.
    """
    columns = tl.broadcast_to(tl.arange(0, z.shape[1])[None, :], z.shape)
    keys = sort_keys(tl.where(z == 0, 0.0, z))  # -0 equals 0
    order = (keys.to(tl.int64) << 32) | (0x7FFFFFFF - columns).to(tl.int64)
    order = tl.where(columns < sparse, order, -9223372036854775807)
    left = order  # a column that was taken becomes the lowest number
    kth = tl.max(left, 1)[:, None]
    for _ in range(1, k):
        left = tl.where(left == kth, -9223372036854775807, left)
        kth = tl.max(left, 1)[:, None]
    return order >= kth


@triton.jit
def mark(z, selected):
    """z with the selection in the lowest bit of its sort keys, so that the backward pass need not select again.

    A logit moves by at most one unit in the last place and the order stays. Infinities stay as they are.
    """
    keys = (sort_keys(tl.where(z == 0, 0.0, z)) & -2) | selected.to(tl.int32)
    marked = (keys ^ ((keys >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
    return tl.where(tl.abs(z) == float("inf"), z, marked)


@triton.jit
def marks(z):
    """The selection in the logits of :func:`mark`. Infinite ones count as selected; the gate of -inf is 0 anyway."""
    bits = z.to(tl.int32, bitcast=True)
    return (((bits ^ (bits >> 31)) & 1) != 0) | (z == float("inf"))


@triton.jit
def softmax(z, keep):
    """Softmax over the columns where ``keep``; 0 in the others."""
    largest = tl.max(tl.where(keep, z, float("-inf")), 1)[:, None]
    e = tl.where(keep, tl.exp(z - largest), 0.0)
    return e / tl.sum(e, 1)[:, None]


@triton.jit
def gates(z, m, N: tl.constexpr, SHARED: tl.constexpr, GATING: tl.constexpr):
    """(g, p), both (BM, NP): the gates under the selection m and the softmax over all router columns."""
    columns = tl.broadcast_to(tl.arange(0, z.shape[1])[None, :], z.shape)
    if GATING == "naive-shared":  # a shared expert has no logit; its gate is 1
        p = softmax(z, columns < N - SHARED)
        g = tl.where(columns < N - SHARED, p * m.to(tl.float32), (columns < N).to(tl.float32))
    else:
        p = softmax(z, columns < N)
        if GATING == "topk":
            g = p * m.to(tl.float32)
        else:
            g = softmax(z, m | ((columns >= N - SHARED) & (columns < N)))
    return g, p


@triton.jit
def gates_backward(z, g, dg, c, C: tl.constexpr, GATING: tl.constexpr):
    """dz (BM, NP) from the gradients of the gates, dg (BM, NP), and of the mean probabilities, c (1, NP) per token.

    An expert that was not selected has g = 0, so that the selection itself is not needed.
    """
    columns = tl.broadcast_to(tl.arange(0, z.shape[1])[None, :], z.shape)
    through = tl.where(columns < C, g * dg, 0.0)
    passed = tl.sum(through, 1)[:, None]
    p = softmax(z, columns < C)
    weight = p
    if GATING == "ase" or GATING == "topk-renorm":
        weight = g
    return through - weight * passed + p * (c - tl.sum(p * c, 1)[:, None])


@triton.jit
def per_rank(g, RANK: tl.constexpr):
    """(BM, NP) -> (BM, NP * RANK): every gate repeated for each row of its expert."""
    deep = tl.broadcast_to(tl.expand_dims(g, 2), (g.shape[0], g.shape[1], RANK))
    return tl.reshape(deep, (g.shape[0], g.shape[1] * RANK))


@triton.jit
def power_of_two(value):
    """The power of two at or under a positive ``value``, between 2^-100 and 2^100."""
    exponent = (value.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
    return tl.minimum(tl.maximum(exponent, 2.0**-100), 2.0**100)


@triton.jit
def dot_exact(a, b, acc, scale):
    """The new (acc, scale) of ``acc * scale + a b``, for an fp32 b. Beside an fp16 ``a``, b is divided by the scale and
    split into two fp16 parts, exact to 2^-17. The scale is a power of two that grows with the largest b, so that small
    values are kept."""
    if a.dtype == tl.float32:
        acc = tl.dot(a, b, acc, input_precision="ieee")
    else:
        larger = tl.maximum(scale, power_of_two(tl.max(tl.abs(b))))
        b = b * (1.0 / larger)
        high = b.to(a.dtype)
        acc = tl.dot(a, high, acc * (scale / larger))  # one accumulator: a second one would be spilled
        acc = tl.dot(a, (b - high.to(tl.float32)).to(a.dtype), acc)
        scale = larger
    return acc, scale


@triton.jit
def block_of_task(offsets, length, block, TASKS: tl.constexpr, BM):
    """(task, first row, end row, tokens of the task) of a block of BM rows. Blocks are numbered task by task and never
    span two tasks; past the last block no row lies before the end row."""
    task, first, end, tokens = 0, 0, 0, 1
    for t in tl.static_range(TASKS):
        begin, stop = tl.load(offsets + t) * length, tl.load(offsets + t + 1) * length
        blocks = tl.cdiv(stop - begin, BM)
        here = (block >= 0) & (block < blocks)
        task, tokens = tl.where(here, t, task), tl.where(here, stop - begin, tokens)
        first, end = tl.where(here, begin + block * BM, first), tl.where(here, stop, end)
        block -= blocks
    return task, first, end, tokens


@triton.jit
def rows_of_block(first, end, BM: tl.constexpr):
    """(rows (BM, 1) int64, mask (BM, 1)) of the rows from ``first`` on."""
    rows = first + tl.arange(0, BM)
    return rows.to(tl.int64)[:, None], (rows < end)[:, None]

"""fp32 products on tensor cores, whose operands are rounded to TF32: each is its TF32 part and the rest.

Within 2**-22 of each term; what two rests make is left out or not, as suits. A product of full fp32
on the FMA pipes, which ``input_precision="ieee"`` asks for, takes a tile several times as long.
"""

import triton
import triton.language as tl


@triton.jit
def _split(x):
    """The nearest number with 10 bits of mantissa, and the rest; of NaN the rest is NaN."""
    high = ((x.to(tl.int32, bitcast=True) + 0x1000) & -0x2000).to(tl.float32, bitcast=True)
    return high, x - high


@triton.jit
def product(a, b):
    """``a @ b``, [M, N]; M is less than N, and at most 32: of more, products stay in flight."""
    a_high, a_low = _split(a)
    b_high, b_low = _split(b)
    low = tl.dot(a_low, b_high, input_precision="tf32")
    low = tl.dot(a_high, b_low, low, input_precision="tf32")
    return tl.dot(a_high, b_high, low, input_precision="tf32")


@triton.jit
def product_of_rows(x, y):
    """``x @ y.T`` of as many rows, [W, W], as one product of twice as many: parts are rows too.

    They are where the tensor cores leave what belongs together in one thread: 8 rows apart, and
    next to each other.
    """
    W: tl.constexpr = x.shape[0]
    K: tl.constexpr = x.shape[1]
    high, low = _split(x)
    rows = tl.permute(tl.reshape(tl.join(high, low), (W // 8, 8, K, 2)), (0, 3, 1, 2))
    high, low = _split(y)
    columns = tl.permute(tl.join(high, low), (0, 2, 1))
    both = tl.dot(
        tl.reshape(rows, (2 * W, K)),
        tl.trans(tl.reshape(columns, (2 * W, K))),
        input_precision="tf32",
    )
    both = tl.sum(tl.reshape(both, (W // 8, 2, 8, W, 2)), axis=4)
    return tl.reshape(tl.sum(both, axis=1), (W, W))

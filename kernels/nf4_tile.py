"""Decoding NF4 in registers: what the fused matmuls and the dequantisation share.

A tile is 16 words of 32 bits a row: 128 weights, two quantisation blocks. Two words of a thread,
2t and 2t + 1, decode to 16 weights of one block, which are the tensor cores' register fragments, so
that weights never pass through shared memory.

- ``exact``: a block has only 16 distinct values, so a thread multiplies the 16 codes by the absmax,
  rounds the products once, splits them into byte planes, and looks weights up with byte permutes.
  The weights are bitsandbytes', bit for bit, at 4.6 instructions each.
- ``fast``: the codes are rounded first, looked up, and multiplied by the rounded absmax: 3.2
  instructions, two more roundings.

Tiled bytes (``tli_engine.reference.nf4_linear.tile``) are laid out so that columns come in order. In
bitsandbytes' own order the columns of a decoded tile are permuted, see ``column_to_k``.
"""

import struct

import triton
import triton.language as tl

CODES = [
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
]
_REGISTERS = "{ .reg .b32 s, b, n, p, l, h, q, z; .reg .f32 x, y;"


def _look_up(low: list[str], high: list[str], finish: str) -> list[str]:
    """PTX: the nibbles of words $8 and $9 to eight pairs, from the byte planes of a table of 16."""
    # bits 0-2 of a nibble choose among 8 bytes, bit 3 between the halves of the table
    planes = [
        f"prmt.b32 n, {plane[0]}, {plane[1]}, s; prmt.b32 p, {plane[2]}, {plane[3]}, s; "
        f"prmt.b32 {out}, n, p, b;"
        for plane, out in ((low, "l"), (high, "h"))
    ]
    lines = []
    for word in range(2):
        lines.append(f"and.b32 s, ${8 + word}, 0x77777777; shr.u32 b, ${8 + word}, 1;")
        lines.append("lop3.b32 b, b, 0x44444444, 0x32103210, 0xEA;")
        for half in range(2):
            first = 4 * word + 2 * half
            # the high nibble of a byte is the first weight
            lines += [*planes, "prmt.b32 n, l, h, 0x4051; prmt.b32 p, l, h, 0x6273;"]
            lines += [finish.format(out=f"${first}", pair="n")]
            lines += [finish.format(out=f"${first + 1}", pair="p")]
            if half == 0:
                lines.append("shr.u32 s, s, 16; shr.u32 b, b, 16;")
    return lines


def _exact_asm(pair: str) -> str:
    """PTX: words $8, $9 and the absmax $10 of their block to eight pairs of weights, $0 to $7."""
    literal = [f"0f{struct.unpack('<I', struct.pack('<f', code))[0]:08X}" for code in CODES]
    names = [f"{plane}{i}" for plane in "rlh" for i in range(8 if plane == "r" else 4)]
    lines = [_REGISTERS, f".reg .b32 {', '.join(names)};"]
    for i in range(8):
        lines.append(
            f"mul.rn.f32 x, $10, {literal[2 * i]}; mul.rn.f32 y, $10, {literal[2 * i + 1]};"
        )
        lines.append(f"cvt.rn.{pair}.f32 r{i}, y, x;")
    for i in range(4):
        lines.append(f"prmt.b32 l{i}, r{2 * i}, r{2 * i + 1}, 0x6420;")
        lines.append(f"prmt.b32 h{i}, r{2 * i}, r{2 * i + 1}, 0x7531;")
    planes = [f"l{i}" for i in range(4)], [f"h{i}" for i in range(4)]
    return "\n".join([*lines, *_look_up(planes[0], planes[1], "mov.b32 {out}, {pair};"), "}"])


def _fast_asm(pair: str) -> str:
    """The same from a table of rounded codes, byte planes in $12, $14, ... $26."""
    # sm_80 multiplies pairs of bf16 by an FMA only; -0 as the addend changes no product
    lines = [_REGISTERS, f"cvt.rn.{pair}.f32 q, $10, $10; mov.b32 z, 0x80008000;"]
    planes = [[f"${12 + 2 * i}" for i in range(4 * p, 4 * p + 4)] for p in range(2)]
    finish = f"fma.rn.{pair} {{out}}, {{pair}}, q, z;"
    return "\n".join([*lines, *_look_up(planes[0], planes[1], finish), "}"])


_EXACT_BF16 = tl.constexpr(_exact_asm("bf16x2"))
_EXACT_FP16 = tl.constexpr(_exact_asm("f16x2"))
_FAST_BF16 = tl.constexpr(_fast_asm("bf16x2"))
_FAST_FP16 = tl.constexpr(_fast_asm("f16x2"))
# early clobber: the first word's weights are written before the second word is read
_EXACT_CONSTRAINTS = tl.constexpr(",".join(["=&r"] * 8 + ["r"] * 4))
_FAST_CONSTRAINTS = tl.constexpr(",".join(["=&r"] * 8 + ["r"] * 20))
_EIGHT_BF16 = tl.constexpr((tl.bfloat16,) * 8)
_EIGHT_FP16 = tl.constexpr((tl.float16,) * 8)


@triton.jit
def column_to_k(column):
    """Offset in a row's 128 weights of a column of a tile decoded from bitsandbytes' own order."""
    k = (column // 64) * 64 + ((column % 8) // 2) * 16 + ((column % 64) // 8) * 2 + column % 2
    return tl.max_contiguous(tl.multiple_of(k, 2), 2)


@triton.jit
def code_of(q):
    """NF4 code of an index, fp32, by comparisons; the interpreter runs no inline assembly."""
    a = tl.where(q == 0, -1.0, tl.where(q == 1, -0.6961928009986877, -0.5250730514526367))
    a = tl.where(q == 3, -0.39491748809814453, a)
    b = tl.where(q == 4, -0.28444138169288635, tl.where(q == 5, -0.18477343022823334, 0.0))
    b = tl.where(q == 6, -0.09105003625154495, b)
    c = tl.where(q == 8, 0.07958029955625534, tl.where(q == 9, 0.16093020141124725, 0.0))
    c = tl.where(q == 10, 0.24611230194568634, tl.where(q == 11, 0.33791524171829224, c))
    d = tl.where(q == 12, 0.44070982933044434, tl.where(q == 13, 0.5626170039176941, 1.0))
    d = tl.where(q == 14, 0.7229568362236023, d)
    return tl.where(q < 8, tl.where(q < 4, a, b), tl.where(q < 12, c, d))


@triton.jit
def round_to(x, dtype: tl.constexpr, PORTABLE: tl.constexpr):
    """Round fp32 to nearest even; the interpreter (Triton 3.6) would truncate to bf16."""
    if PORTABLE and dtype == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
        # inf stays, and so does NaN, which adding could turn into a number
        return tl.where(x - x == 0.0, rounded, bits).to(tl.float32, bitcast=True).to(dtype)
    return x.to(dtype)


@triton.jit
def _pair(
    word, scale, byte: tl.constexpr, R: tl.constexpr, dtype: tl.constexpr, FAST: tl.constexpr
):
    """Weights of one byte of each word, [R, 8] to [R, 16]."""
    code = tl.join(code_of((word >> (8 * byte + 4)) & 15), code_of((word >> (8 * byte)) & 15))
    code = tl.reshape(code, (R, 16))
    if FAST:
        code = round_to(code, dtype, True).to(tl.float32)
        scale = round_to(scale, dtype, True).to(tl.float32)
    return round_to(code * scale, dtype, True)


@triton.jit
def load_table(table_ptr):
    """Byte planes of the rounded codes, for ``fast``: eight [1, 1] words.

    Immediates would be moved to registers again in every step. A [1, 1] load is broadcast; a
    splat of a scalar would send the decoded tile through shared memory (Triton 3.6).
    """
    ptr = table_ptr + tl.zeros((1, 1), tl.int32)
    t0, t1, t2, t3 = tl.load(ptr), tl.load(ptr + 1), tl.load(ptr + 2), tl.load(ptr + 3)
    t4, t5, t6, t7 = tl.load(ptr + 4), tl.load(ptr + 5), tl.load(ptr + 6), tl.load(ptr + 7)
    return t0, t1, t2, t3, t4, t5, t6, t7


@triton.jit
def decode_pairs(
    word, scale, t, R: tl.constexpr, dtype: tl.constexpr, FAST: tl.constexpr, PORTABLE: tl.constexpr
):
    """Words and absmax, [R, 16], to the 16 weights of each two words, [R, 8, 2, 2, 2, 2].

    The dimensions are the two words, the two weights of a byte, and the byte's three bits, low first.
    """
    if PORTABLE:
        even, odd = tl.split(tl.reshape(word, (R, 8, 2)))
        p0, p1 = _pair(even, scale, 0, R, dtype, FAST), _pair(even, scale, 1, R, dtype, FAST)
        p2, p3 = _pair(even, scale, 2, R, dtype, FAST), _pair(even, scale, 3, R, dtype, FAST)
        p4, p5 = _pair(odd, scale, 0, R, dtype, FAST), _pair(odd, scale, 1, R, dtype, FAST)
        p6, p7 = _pair(odd, scale, 2, R, dtype, FAST), _pair(odd, scale, 3, R, dtype, FAST)
    # pack=2 hands the assembly two neighbouring words, and takes back two neighbouring weights
    elif FAST and dtype == tl.bfloat16:
        args = [word, scale, t[0], t[1], t[2], t[3], t[4], t[5], t[6], t[7]]
        p0, p1, p2, p3, p4, p5, p6, p7 = tl.inline_asm_elementwise(
            _FAST_BF16, _FAST_CONSTRAINTS, args, dtype=_EIGHT_BF16, is_pure=True, pack=2
        )
    elif FAST:
        args = [word, scale, t[0], t[1], t[2], t[3], t[4], t[5], t[6], t[7]]
        p0, p1, p2, p3, p4, p5, p6, p7 = tl.inline_asm_elementwise(
            _FAST_FP16, _FAST_CONSTRAINTS, args, dtype=_EIGHT_FP16, is_pure=True, pack=2
        )
    elif dtype == tl.bfloat16:
        p0, p1, p2, p3, p4, p5, p6, p7 = tl.inline_asm_elementwise(
            _EXACT_BF16, _EXACT_CONSTRAINTS, [word, scale], dtype=_EIGHT_BF16, is_pure=True, pack=2
        )
    else:
        p0, p1, p2, p3, p4, p5, p6, p7 = tl.inline_asm_elementwise(
            _EXACT_FP16, _EXACT_CONSTRAINTS, [word, scale], dtype=_EIGHT_FP16, is_pure=True, pack=2
        )
    low = tl.join(tl.join(p0, p1), tl.join(p2, p3))
    high = tl.join(tl.join(p4, p5), tl.join(p6, p7))
    return tl.reshape(tl.join(low, high), (R, 8, 2, 2, 2, 2))


@triton.jit
def decode_tile(
    word, scale, t, R: tl.constexpr, dtype: tl.constexpr, FAST: tl.constexpr, PORTABLE: tl.constexpr
):
    """Weights of a tile, [R, 128], in the order of the tensor cores' fragments."""
    pairs = decode_pairs(word, scale, t, R, dtype, FAST, PORTABLE)
    # a block's columns: byte, thread, weight; a thread's words are neighbours
    tile = tl.reshape(pairs, (R, 2, 4, 2, 2, 2, 2))
    return tl.reshape(tl.permute(tile, (0, 1, 6, 5, 4, 2, 3)), (R, 128))


@triton.jit
def load_scale(absmax_ptr, row, tile, keep, N, K, R: tl.constexpr, TILED: tl.constexpr):
    """Absmax of each word of a tile, [R, 16]: two blocks a row.

    A [R, 2] load and a broadcast let Triton keep the decoded tile in registers; ``tl.where`` over
    two [R] loads sends it through shared memory (seen in 3.6).
    """
    row = row.to(tl.int64)
    block = (row + tile * N) * 2 if TILED else row * (K // 64) + 2 * tile
    offs = block[:, None] + tl.arange(0, 2)[None, :]
    scale = tl.load(absmax_ptr + offs, mask=keep[:, None], other=0.0)
    return tl.reshape(tl.broadcast_to(scale[:, :, None], (R, 2, 8)), (R, 16))


@triton.jit
def word_offsets(row, tile, N, K, TILED: tl.constexpr):
    """Offsets of a tile's words, [R, 16]; int64, since a head of 152064 x 16384 passes 2**31."""
    row = row.to(tl.int64)
    start = (row + tile * N) * 16 if TILED else row * (K // 8) + tile * 16
    return start[:, None] + tl.arange(0, 16)[None, :]


@triton.jit
def dot(a, b, acc, PORTABLE: tl.constexpr):
    """Accumulate in fp32; the interpreter (Triton 3.6) would multiply bf16's raw bits."""
    if PORTABLE:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    return tl.dot(a, b, acc)

"""Loss of pooled words' cosines, and its gradient for the pooled vectors, both in the forward.

Up to 64 pairs are two launches. The first pools each tile's words on load, so that no pooled vector
is waited for, and ends with the cosines. In the second, each program recomputes the whole loss from
them, which is 16 KiB from the L2 cache, and multiplies its own columns of the pooled vectors by the
gradient: nothing is exchanged between programs. More pairs are taken by cuBLAS in chunks of rows.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from tli_engine.kernels.cosine_similarity import TileBuffers, block_for, finish_tile, squares
from tli_engine.kernels.overlap import follow, overlap
from tli_engine.kernels.pooled_alignment_loss_many import pooled_alignment_loss_many
from tli_engine.kernels.segment_mean import with_dense_rows

# pairs whose whole loss each program recomputes in registers
_MOST_PAIRS = 64
# rows of each word whose loads are under way at once; columns of a program of the gradient
UNROLL = 4
COLUMNS = 32


@triton.jit
def _pool_tile(
    hidden_ptr, weight_ptr, offsets_ptr, pooled_ptr, first, offs, offs_k, N, H, stride, writes,
    UNROLL: tl.constexpr,
):  # fmt: skip
    """Means of words ``first + offs``, some columns, [W, K]; kept if ``writes``."""
    keep = offs < N
    word = first + offs
    start = tl.load(offsets_ptr + word, mask=keep, other=0)
    length = tl.load(offsets_ptr + word + 1, mask=keep, other=0) - start
    keep_k = (offs_k < H)[None, :]
    acc = tl.zeros((offs.shape[0], offs_k.shape[0]), tl.float32)
    total = tl.zeros((offs.shape[0],), tl.float32)
    for turn in tl.range(0, tl.max(length), UNROLL):
        for i in tl.static_range(UNROLL):
            here = turn + i < length
            row = start + turn + i
            w = tl.load(weight_ptr + row, mask=here, other=0.0).to(tl.float32)
            x_ptrs = hidden_ptr + row[:, None] * stride + offs_k[None, :]
            x = tl.load(x_ptrs, mask=here[:, None] & keep_k, other=0.0).to(tl.float32)
            # not the product alone: a row left out may be infinite
            acc += tl.where(w[:, None] != 0, x * w[:, None], 0.0)
            total += w
    mean = acc / tl.where(total == 0, 1.0, total)[:, None]
    pooled_ptrs = pooled_ptr + word[:, None] * H + offs_k[None, :]
    tl.store(pooled_ptrs, mean, mask=keep[:, None] & keep_k & writes)
    return mean


@triton.jit(do_not_specialize=["N"])
def _pooled_cosine_kernel(
    hidden_ptr,
    weight_ptr,
    offsets_ptr,
    pooled_ptr,
    cos_ptr,
    norm_ptr,
    part_ptr,
    square_ptr,
    lock_ptr,
    N,
    H,
    stride_ht,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLIT: tl.constexpr,
    UNROLL: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    follow(OVERLAP)
    tiles = tl.cdiv(N, BLOCK)
    tile_n, tile_m = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    part = tl.program_id(1)
    steps = tl.cdiv(H, BLOCK_K)
    offs_n = tile_n * BLOCK + tl.arange(0, BLOCK)
    offs_m = tile_m * BLOCK + tl.arange(0, BLOCK)
    dot = tl.zeros((BLOCK, BLOCK), tl.float32)
    xx = tl.zeros((BLOCK,), tl.float32)
    yy = tl.zeros((BLOCK,), tl.float32)
    for step in tl.range(part * steps // SPLIT, (part + 1) * steps // SPLIT):
        offs_k = step * BLOCK_K + tl.arange(0, BLOCK_K)
        x = _pool_tile(
            hidden_ptr, weight_ptr, offsets_ptr, pooled_ptr, 0, offs_n, offs_k, N, H, stride_ht,
            tile_m == 0, UNROLL,
        )  # fmt: skip
        y = _pool_tile(
            hidden_ptr, weight_ptr, offsets_ptr, pooled_ptr, N, offs_m, offs_k, N, H, stride_ht,
            tile_n == 0, UNROLL,
        )  # fmt: skip
        xx += squares(x)
        yy += squares(y)
        dot = tl.dot(x, tl.trans(y), dot, input_precision="ieee")
    finish_tile(
        dot, xx, yy, cos_ptr, norm_ptr, norm_ptr + N, part_ptr, square_ptr, lock_ptr,
        tile_n, tile_m, tiles, part, N, N, BLOCK, SPLIT,
    )  # fmt: skip


@triton.jit
def _one_way(
    cos, negative, true, margin, inv_temperature, AXIS: tl.constexpr, INFONCE: tl.constexpr,
    SEMIHARD: tl.constexpr,
):  # fmt: skip
    """Sum of the losses along one axis, and its gradient for the cosines, [B, B]."""
    positive = tl.sum(tl.where(true, cos, 0.0), axis=AXIS, keep_dims=True)
    if INFONCE:
        logits = tl.where(negative | true, cos * inv_temperature, float("-inf"))
        top = tl.max(logits, axis=AXIS, keep_dims=True)
        share = tl.exp(logits - top)
        total = tl.sum(share, axis=AXIS, keep_dims=True)
        loss = tl.log(total) + (top - positive * inv_temperature)
        dcos = (share / total - tl.where(true, 1.0, 0.0)) * inv_temperature
    else:
        candidate = negative
        if SEMIHARD:
            gap = positive - cos
            candidate = negative & (gap > 0) & (gap < margin)
        hardest = tl.max(tl.where(candidate, cos, float("-inf")), axis=AXIS, keep_dims=True)
        value = margin + hardest - positive
        # not a maximum, which would turn NaN into a loss of zero
        loss = tl.where(value <= 0, 0.0, value)
        tied = candidate & (cos == hardest)
        ties = tl.sum(tied.to(tl.float32), axis=AXIS, keep_dims=True)
        share = tl.where(tied, 1.0 / tl.maximum(ties, 1.0), 0.0) - tl.where(true, 1.0, 0.0)
        dcos = tl.where(value > 0, share, 0.0)
    return tl.sum(loss), dcos


@triton.jit(do_not_specialize=["N"])
def _pooled_gradient_kernel(
    pooled_ptr,
    cos_ptr,
    norm_ptr,
    groups_ptr,
    loss_ptr,
    true_ptr,
    wrong_ptr,
    dpooled_ptr,
    N,
    H,
    margin,
    inv_temperature,
    B: tl.constexpr,
    BLOCK_K: tl.constexpr,
    INFONCE: tl.constexpr,
    SEMIHARD: tl.constexpr,
    TWO_WAY: tl.constexpr,
    GROUPED: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    follow(OVERLAP)
    # the side whose gradient this is, along axis 0; the other is along axis 1. Both in one program
    # take more registers than there are
    side = tl.program_id(1)
    own = tl.arange(0, B)
    inside = own < N
    row, column = own[:, None], own[None, :]
    keep = inside[:, None] & inside[None, :]
    offs = tl.where(side == 0, row * N + column, column * N + row)
    cos = tl.load(cos_ptr + offs, mask=keep, other=0.0)
    true = row == column
    negative = keep & (row != column)
    if GROUPED:
        for language in tl.static_range(2):
            group = tl.load(groups_ptr + language * N + own, mask=inside, other=0)
            negative &= group[:, None] != group[None, :]
    if TWO_WAY:
        forth, d_forth = _one_way(
            cos, negative, true, margin, inv_temperature, 1, INFONCE, SEMIHARD
        )
        back, d_back = _one_way(cos, negative, true, margin, inv_temperature, 0, INFONCE, SEMIHARD)
        loss = (forth + back) * 0.5
        dcos = (d_forth + d_back) * 0.5
    elif side == 0:
        loss, dcos = _one_way(cos, negative, true, margin, inv_temperature, 1, INFONCE, SEMIHARD)
    else:
        loss, dcos = _one_way(cos, negative, true, margin, inv_temperature, 0, INFONCE, SEMIHARD)
    dcos /= N
    if (tl.program_id(0) == 0) & (side == 0):
        tl.store(loss_ptr, loss / N)
        tl.store(true_ptr, tl.sum(tl.where(true, cos, 0.0)) / N)
        wrong = tl.sum(tl.where(negative, cos, 0.0))
        tl.store(wrong_ptr, wrong / tl.sum(negative.to(tl.float32)))
    my_norm = tl.load(norm_ptr + side * N + own, mask=inside, other=1.0)[:, None]
    other_norm = tl.load(norm_ptr + (1 - side) * N + own, mask=inside, other=1.0)
    radial = tl.sum(dcos * cos, axis=1, keep_dims=True)
    offs_k = (tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K))[None, :]
    keep_k = inside[:, None] & (offs_k < H)
    mine = tl.load(pooled_ptr + (side * N + row) * H + offs_k, mask=keep_k, other=0.0)
    other = tl.load(pooled_ptr + ((1 - side) * N + row) * H + offs_k, mask=keep_k, other=0.0)
    acc = tl.dot(dcos / other_norm[None, :], other, input_precision="ieee")
    dpooled = (acc - radial * (mine / my_norm)) / my_norm
    tl.store(dpooled_ptr + (side * N + row) * H + offs_k, dpooled, mask=keep_k)


def pooled_tile(block: int, dtype: torch.dtype) -> tuple[int, int]:
    """Columns and warps of a program that pools ``block`` words of each side, none of them spilled."""
    return (64, 4) if block == 16 else (128 if dtype.itemsize == 2 else 64, 8)


def gradient_warps(N: int) -> int:
    """Warps of a program that holds the losses of so many pairs."""
    return 8 if N > 32 else 4


def _pooled_cosine(
    hidden: Tensor, weight: Tensor, offsets: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return pooled vectors, ``[2 N, H]``, cosines, ``[N, N]``, and norms, ``[2 N]``."""
    words, H = offsets.shape[0] - 1, hidden.shape[1]
    N = words // 2
    hidden = with_dense_rows(hidden)
    pooled = torch.empty(words, H, dtype=torch.float32, device=hidden.device)
    cos, norm = pooled.new_empty(N, N), pooled.new_empty(words)
    block_k, warps = pooled_tile(block_for(N, N), hidden.dtype)
    shared = TileBuffers(N, N, H, block_k, hidden.device)
    _pooled_cosine_kernel[(shared.tiles, shared.split)](
        hidden,
        weight.contiguous(),
        offsets.contiguous(),
        pooled,
        cos,
        norm,
        shared.parts,
        shared.squares,
        shared.locks,
        N,
        H,
        hidden.stride(0),
        **shared.constants,
        UNROLL=UNROLL,
        num_warps=warps,
        **overlap(hidden.device),
    )
    return pooled, cos, norm


def _few(
    hidden: Tensor,
    weight: Tensor,
    offsets: Tensor,
    groups: Tensor | None,
    margin: float,
    inv_temperature: float,
    flags: dict[str, bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    pooled, cos, norm = _pooled_cosine(hidden, weight, offsets)
    N, H = len(cos), hidden.shape[1]
    loss, true, wrong = (pooled.new_empty(()) for _ in range(3))
    dpooled = torch.empty_like(pooled)
    _pooled_gradient_kernel[(triton.cdiv(H, COLUMNS), 2)](
        pooled,
        cos,
        norm,
        offsets if groups is None else groups.contiguous(),
        loss,
        true,
        wrong,
        dpooled,
        N,
        H,
        margin,
        inv_temperature,
        B=max(16, triton.next_power_of_2(N)),
        BLOCK_K=COLUMNS,
        **flags,
        num_warps=gradient_warps(N),
        **overlap(hidden.device),
    )
    return loss, true, wrong, dpooled


def pooled_alignment_loss(
    hidden: Tensor,
    weight: Tensor,
    offsets: Tensor,
    groups: Tensor | None,
    loss: str,
    margin: float,
    temperature: float,
    two_way: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Launch; the arguments are those of ``tli_engine::pooled_alignment_loss``, checked."""
    flags = {
        "INFONCE": loss == "infonce",
        "SEMIHARD": loss == "triplet-semihard",
        "TWO_WAY": two_way,
        "GROUPED": groups is not None,
    }
    few = (offsets.shape[0] - 1) // 2 <= _MOST_PAIRS
    compute = _few if few else pooled_alignment_loss_many
    return compute(hidden, weight, offsets, groups, margin, 1 / temperature, flags)

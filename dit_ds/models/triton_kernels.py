"""The Triton kernels of `attention_triton`: image queries over [text; image] keys, relative positions added tile by tile.

Importing this module needs triton. Arguments of all kernels, contiguous (log-sum-exp and delta in fp32):
    qkv: (B, N, 3, heads, d), N = H*W. text: (B, T, 2, heads, d), keys and values. mask: (B, T), 0 at padding.
    rel_h: (H, B, W, heads, H), what a query adds to the logits of the keys in each row of the grid; its first and third
        dimension are the query's place. rel_w: (W, B, H, heads, W), ... in each column.
    out, grad: (B, N, heads, d). lse, delta: (B, heads, N), the log-sum-exp of a row; grad . out of a query.
    batch: B. words: T.

Where a tile goes beyond the queries or keys that there are, the last one is read in their place, and not written.

Constants: a program has BM queries; a tile of keys is R rows of the grid, each padded to WP >= W columns: of rel_h it
needs R columns, of rel_w the same for every tile. d is split into D0 + D1 columns, powers of two (80 is 64 + 16), D1 may
be 0. BT: text keys of a tile. UPCAST: products in fp32 (the interpreter has none of bf16). The softmax is in base 2.
Sums have one order, there are no atomics: the same bits each time.
"""

from __future__ import annotations

import triton
import triton.language as tl

_LOG2E = tl.constexpr(1.4426950408889634)
_LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _load(x, rows, STRIDE: tl.constexpr, FIRST: tl.constexpr, WIDTH: tl.constexpr, D: tl.constexpr,
          UPCAST: tl.constexpr):  # fmt: skip
    """(rows, WIDTH) from column FIRST of a matrix of D columns, 0 beyond it."""
    column = FIRST + tl.arange(0, WIDTH)
    at = x + rows[:, None] * STRIDE + column[None, :]
    if FIRST + WIDTH > D:
        tile = tl.load(at, mask=(column < D)[None, :], other=0.0)
    else:
        tile = tl.load(at)
    return tile.to(tl.float32) if UPCAST else tile


@triton.jit
def _pair(x, rows, STRIDE: tl.constexpr, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, UPCAST: tl.constexpr):
    """(rows, D0) and (rows, D1); where D1 is 0 the second is not used."""
    first = _load(x, rows, STRIDE, 0, D0, D, UPCAST)
    return first, _load(x, rows, STRIDE, D0, D1, D, UPCAST) if D1 > 0 else first


@triton.jit
def _store_pair(x, tile0, tile1, rows, ok, STRIDE: tl.constexpr, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr):
    _store(x, tile0, rows, ok, STRIDE, 0, D0, D)
    if D1 > 0:
        _store(x, tile1, rows, ok, STRIDE, D0, D1, D)


@triton.jit
def _store(x, tile, rows, ok, STRIDE: tl.constexpr, FIRST: tl.constexpr, WIDTH: tl.constexpr, D: tl.constexpr):
    column = FIRST + tl.arange(0, WIDTH)
    at = x + rows[:, None] * STRIDE + column[None, :]
    tl.store(at, tile.to(x.dtype.element_ty), mask=ok[:, None] & (column < D)[None, :])


@triton.jit
def _product(a0, a1, b0, b1, D1: tl.constexpr, PRECISION: tl.constexpr):
    """a b^T over both parts of the columns."""
    product = tl.dot(a0, tl.trans(b0), input_precision=PRECISION)
    if D1 > 0:
        product = tl.dot(a1, tl.trans(b1), product, input_precision=PRECISION)
    return product


@triton.jit
def _add_product(acc0, acc1, a, b0, b1, D1: tl.constexpr, PRECISION: tl.constexpr):
    """acc + a b of both parts; a is rounded to the type of b."""
    acc0 = tl.dot(a.to(b0.dtype), b0, acc0, input_precision=PRECISION)
    if D1 > 0:
        acc1 = tl.dot(a.to(b0.dtype), b1, acc1, input_precision=PRECISION)
    return acc0, acc1


@triton.jit
def _places(query, sample, head, batch, H: tl.constexpr, W: tl.constexpr, HEADS: tl.constexpr):
    """Where the queries' rows begin in rel_h and in rel_w."""
    i, j = query // W, query % W
    return (((i * batch + sample) * W + j) * HEADS + head) * H, (((j * batch + sample) * H + i) * HEADS + head) * W


@triton.jit
def _along(x, KEYS_FIRST: tl.constexpr):
    """Of queries: (BM,) to (BM, 1); or where keys come first, (1, BM)."""
    return x[None, :] if KEYS_FIRST else x[:, None]


@triton.jit
def _columns(rel, row, key_row, R: tl.constexpr, H: tl.constexpr, KEYS_FIRST: tl.constexpr):
    """Columns row .. row+R-1 of rel_h, each to the keys of its row of the grid: (BM, R*WP), or (BM, 1) if R is 1.

    -inf at keys below the grid.
    """
    wide = _along(tl.load(rel + row).to(tl.float32), KEYS_FIRST)
    for r in tl.static_range(1, R):
        if H % R == 0:
            more = tl.load(rel + row + r).to(tl.float32)
        else:
            more = tl.load(rel + tl.minimum(row + r, H - 1)).to(tl.float32)
            more = tl.where(tl.zeros_like(more) + (row + r) < H, more, -float("inf"))
        wide = tl.where(_along(key_row == r, not KEYS_FIRST), _along(more, KEYS_FIRST), wide)
    return wide * _LOG2E


@triton.jit
def _row_of_w(rel, key_column, W: tl.constexpr, WP: tl.constexpr, KEYS_FIRST: tl.constexpr):
    """rel_w to the keys of a tile: (BM, R*WP); -inf at keys beside the grid."""
    column = key_column if W == WP else tl.minimum(key_column, W - 1)
    w = tl.load(_along(rel, KEYS_FIRST) + _along(column, not KEYS_FIRST)).to(tl.float32)
    if W != WP:
        w = tl.where(_along(key_column < W, not KEYS_FIRST), w, -float("inf"))
    return w * _LOG2E


@triton.jit
def _keys_of(row, key_row, key_column, H: tl.constexpr, W: tl.constexpr, WP: tl.constexpr, R: tl.constexpr):
    """The keys of R rows of the grid. Beside and below it there is none: another is read, whose logit is -inf."""
    key = (row + key_row) * W + key_column
    if W == WP and H % R == 0:
        return key
    else:
        return tl.minimum(key, H * W - 1)


@triton.jit
def _softmax_step(s, v0, v1, top, total, acc0, acc1, D1: tl.constexpr, PRECISION: tl.constexpr):
    """The online softmax: logits s (BM, keys) of further keys, their values, and what was summed up to here."""
    new = tl.maximum(top, tl.max(s, 1))
    old = tl.exp2(top - new)
    p = tl.exp2(s - new[:, None])
    total = total * old + tl.sum(p, 1)
    if D1 > 0:
        acc1 = acc1 * old[:, None]
    acc0, acc1 = _add_product(acc0 * old[:, None], acc1, p, v0, v1, D1, PRECISION)
    return new, total, acc0, acc1


@triton.jit
def _text(text, mask, sample, first, words, head, HEADS: tl.constexpr, D: tl.constexpr, D0: tl.constexpr,
          D1: tl.constexpr, BT: tl.constexpr, MASK: tl.constexpr, UPCAST: tl.constexpr):  # fmt: skip
    """BT text tokens from `first` on: which of them are attended to, (BT,), both parts of the keys and of the values."""
    y = text + sample.to(tl.int64) * words * (2 * HEADS * D) + head * D
    there = first + tl.arange(0, BT) < words
    key = tl.minimum(first + tl.arange(0, BT), words - 1)
    k0, k1 = _pair(y, key, 2 * HEADS * D, D, D0, D1, UPCAST)
    v0, v1 = _pair(y + HEADS * D, key, 2 * HEADS * D, D, D0, D1, UPCAST)
    if MASK:
        there = there & (tl.load(mask + sample * words + key) != 0)
    return there, k0, k1, v0, v1


@triton.jit
def forward_kernel(qkv, rel_h, rel_w, text, mask, out, lse, batch, words,
                   H: tl.constexpr, W: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr, D0: tl.constexpr,
                   D1: tl.constexpr, BM: tl.constexpr, R: tl.constexpr, WP: tl.constexpr, BT: tl.constexpr,
                   TEXT: tl.constexpr, MASK: tl.constexpr, PRECISION: tl.constexpr,
                   UPCAST: tl.constexpr):  # fmt: skip
    """Output and log-sum-exp of BM queries of a head; grid (N / BM, B heads)."""
    N: tl.constexpr = H * W
    ROW: tl.constexpr = 3 * HEADS * D
    SCALE: tl.constexpr = D**-0.5 * 1.4426950408889634
    sample, head = tl.program_id(1) // HEADS, tl.program_id(1) % HEADS
    query = tl.program_id(0) * BM + tl.arange(0, BM)
    ok, query = query < N, tl.minimum(query, N - 1)
    x = qkv + sample.to(tl.int64) * N * ROW + head * D
    q0, q1 = _pair(x, query, ROW, D, D0, D1, UPCAST)
    key_row, key_column = tl.arange(0, R * WP) // WP, tl.arange(0, R * WP) % WP
    place_h, place_w = _places(query, sample, head, batch, H, W, HEADS)
    w = _row_of_w(rel_w + place_w, key_column, W, WP, False)
    top, total = tl.full([BM], -float("inf"), tl.float32), tl.zeros([BM], tl.float32)
    acc0, acc1 = tl.zeros([BM, D0], tl.float32), tl.zeros([BM, D1 if D1 > 0 else 1], tl.float32)
    for row in range(0, H, R):
        key = _keys_of(row, key_row, key_column, H, W, WP, R)
        k0, k1 = _pair(x + HEADS * D, key, ROW, D, D0, D1, UPCAST)
        s = _product(q0, q1, k0, k1, D1, PRECISION) * SCALE + (w + _columns(rel_h + place_h, row, key_row, R, H, False))
        v0, v1 = _pair(x + 2 * HEADS * D, key, ROW, D, D0, D1, UPCAST)
        top, total, acc0, acc1 = _softmax_step(s, v0, v1, top, total, acc0, acc1, D1, PRECISION)
    if TEXT:  # last, so that no row's maximum is -inf where all text is padding
        for first in range(0, words, BT):
            there, k0, k1, v0, v1 = _text(text, mask, sample, first, words, head, HEADS, D, D0, D1, BT, MASK, UPCAST)
            s = tl.where(there[None, :], _product(q0, q1, k0, k1, D1, PRECISION) * SCALE, -float("inf"))
            top, total, acc0, acc1 = _softmax_step(s, v0, v1, top, total, acc0, acc1, D1, PRECISION)
    tl.store(lse + tl.program_id(1).to(tl.int64) * N + query, (top + tl.log2(total)) * _LN2, mask=ok)
    o = out + sample.to(tl.int64) * N * (HEADS * D) + head * D
    _store_pair(o, acc0 / total[:, None], acc1 / total[:, None], query, ok, HEADS * D, D, D0, D1)


@triton.jit
def queries_kernel(qkv, rel_h, rel_w, text, mask, out, lse, grad, delta, grad_qkv, grad_rel_h, grad_rel_w, batch, words,
                   H: tl.constexpr, W: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr, D0: tl.constexpr,
                   D1: tl.constexpr, BM: tl.constexpr, R: tl.constexpr, WP: tl.constexpr, BT: tl.constexpr,
                   TEXT: tl.constexpr, MASK: tl.constexpr, PRECISION: tl.constexpr,
                   UPCAST: tl.constexpr):  # fmt: skip
    """Gradients of BM queries of a head and of their rows of rel_h and rel_w; writes delta. Grid (N / BM, B heads)."""
    N: tl.constexpr = H * W
    ROW: tl.constexpr = 3 * HEADS * D
    SCALE: tl.constexpr = D**-0.5 * 1.4426950408889634
    sample, head = tl.program_id(1) // HEADS, tl.program_id(1) % HEADS
    query = tl.program_id(0) * BM + tl.arange(0, BM)
    ok, query = query < N, tl.minimum(query, N - 1)
    x, y = qkv + sample.to(tl.int64) * N * ROW + head * D, sample.to(tl.int64) * N * (HEADS * D) + head * D
    q0, q1 = _pair(x, query, ROW, D, D0, D1, UPCAST)
    g0, g1 = _pair(grad + y, query, HEADS * D, D, D0, D1, UPCAST)
    o0, o1 = _pair(out + y, query, HEADS * D, D, D0, D1, True)
    inner = tl.sum(g0.to(tl.float32) * o0, 1)
    if D1 > 0:
        inner += tl.sum(g1.to(tl.float32) * o1, 1)
    row_of_all = tl.program_id(1).to(tl.int64) * N + query
    tl.store(delta + row_of_all, inner, mask=ok)
    less = tl.load(lse + row_of_all) * _LOG2E
    key_row, key_column = tl.arange(0, R * WP) // WP, tl.arange(0, R * WP) % WP
    place_h, place_w = _places(query, sample, head, batch, H, W, HEADS)
    w = _row_of_w(rel_w + place_w, key_column, W, WP, False) - less[:, None]
    acc0, acc1 = tl.zeros([BM, D0], tl.float32), tl.zeros([BM, D1 if D1 > 0 else 1], tl.float32)
    acc_w = tl.zeros([BM, R * WP], tl.float32)
    for row in range(0, H, R):
        key = _keys_of(row, key_row, key_column, H, W, WP, R)
        k0, k1 = _pair(x + HEADS * D, key, ROW, D, D0, D1, UPCAST)
        v0, v1 = _pair(x + 2 * HEADS * D, key, ROW, D, D0, D1, UPCAST)
        s = _product(q0, q1, k0, k1, D1, PRECISION) * SCALE + (w + _columns(rel_h + place_h, row, key_row, R, H, False))
        ds = tl.exp2(s) * (_product(g0, g1, v0, v1, D1, PRECISION) - inner[:, None])
        acc_w += ds
        for r in tl.static_range(R):
            column = tl.sum(ds, 1) if R == 1 else tl.sum(tl.where((key_row == r)[None, :], ds, 0.0), 1)
            at = grad_rel_h + place_h + row + r
            tl.store(at, column.to(grad_rel_h.dtype.element_ty), mask=row + r < tl.where(ok, H, 0))
        acc0, acc1 = _add_product(acc0, acc1, ds, k0, k1, D1, PRECISION)
    if TEXT:
        for first in range(0, words, BT):
            there, k0, k1, v0, v1 = _text(text, mask, sample, first, words, head, HEADS, D, D0, D1, BT, MASK, UPCAST)
            p = tl.exp2(_product(q0, q1, k0, k1, D1, PRECISION) * SCALE - less[:, None])
            ds = tl.where(there[None, :], p, 0.0) * (_product(g0, g1, v0, v1, D1, PRECISION) - inner[:, None])
            acc0, acc1 = _add_product(acc0, acc1, ds, k0, k1, D1, PRECISION)
    dx = grad_qkv + sample.to(tl.int64) * N * ROW + head * D
    _store_pair(dx, acc0 * D**-0.5, acc1 * D**-0.5, query, ok, ROW, D, D0, D1)
    _store(grad_rel_w, tl.sum(tl.reshape(acc_w, [BM, R, WP]), 1), place_w, ok, 1, 0, WP, W)


@triton.jit
def keys_kernel(qkv, rel_h, rel_w, text, mask, lse, grad, delta, grad_keys, batch, words,
                H: tl.constexpr, W: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr, D0: tl.constexpr,
                D1: tl.constexpr, BM: tl.constexpr, R: tl.constexpr, WP: tl.constexpr, BT: tl.constexpr,
                TEXT: tl.constexpr, MASK: tl.constexpr, PRECISION: tl.constexpr,
                UPCAST: tl.constexpr):  # fmt: skip
    """Gradients of a tile of keys and values of a head, BM queries at a time.

    Grid (H / R, B heads), grad_keys of the shape of qkv; with TEXT of the text's, grid (T / BT, B heads).
    """
    N: tl.constexpr = H * W
    ROW: tl.constexpr = 3 * HEADS * D
    KEY_ROW: tl.constexpr = 2 * HEADS * D if TEXT else ROW
    TILE: tl.constexpr = BT if TEXT else R * WP
    SCALE: tl.constexpr = D**-0.5 * 1.4426950408889634
    sample, head = tl.program_id(1) // HEADS, tl.program_id(1) % HEADS
    x, g = qkv + sample.to(tl.int64) * N * ROW + head * D, grad + sample.to(tl.int64) * N * (HEADS * D) + head * D
    row, row_of_all = tl.program_id(0) * R, tl.program_id(1).to(tl.int64) * N
    key_row, key_column = tl.arange(0, TILE) // WP, tl.arange(0, TILE) % WP
    if TEXT:
        key = tl.program_id(0) * BT + tl.arange(0, BT)
        there, dy = key < words, grad_keys + sample.to(tl.int64) * words * KEY_ROW + head * D
        seen, k0, k1, v0, v1 = _text(
            text, mask, sample, tl.program_id(0) * BT, words, head, HEADS, D, D0, D1, BT, MASK, UPCAST
        )
    else:
        key, there = _keys_of(row, key_row, key_column, H, W, WP, R), (row + key_row < H) & (key_column < W)
        dy, seen = grad_keys + sample.to(tl.int64) * N * ROW + (HEADS + head) * D, there
        k0, k1 = _pair(x + HEADS * D, key, KEY_ROW, D, D0, D1, UPCAST)
        v0, v1 = _pair(x + 2 * HEADS * D, key, KEY_ROW, D, D0, D1, UPCAST)
    dk0, dk1 = tl.zeros([TILE, D0], tl.float32), tl.zeros([TILE, D1 if D1 > 0 else 1], tl.float32)
    dv0, dv1 = tl.zeros([TILE, D0], tl.float32), tl.zeros([TILE, D1 if D1 > 0 else 1], tl.float32)
    for first in range(0, N, BM):
        query = first + tl.arange(0, BM)
        ok, query = query < N, tl.minimum(query, N - 1)
        q0, q1 = _pair(x, query, ROW, D, D0, D1, UPCAST)
        g0, g1 = _pair(g, query, HEADS * D, D, D0, D1, UPCAST)
        less = tl.load(lse + row_of_all + query) * _LOG2E
        if N % BM != 0:  # a query that is none attends to nothing
            less = tl.where(ok, less, float("inf"))
        inner = tl.load(delta + row_of_all + query)
        s = _product(k0, k1, q0, q1, D1, PRECISION) * SCALE - less[None, :]  # (keys, BM)
        if not TEXT:
            place_h, place_w = _places(query, sample, head, batch, H, W, HEADS)
            s += _row_of_w(rel_w + place_w, key_column, W, WP, True)
            s += _columns(rel_h + place_h, row, key_row, R, H, True)
        p = tl.exp2(s) if not TEXT else tl.where(seen[:, None], tl.exp2(s), 0.0)
        dv0, dv1 = _add_product(dv0, dv1, p, g0, g1, D1, PRECISION)
        ds = p * (_product(v0, v1, g0, g1, D1, PRECISION) - inner[None, :])
        dk0, dk1 = _add_product(dk0, dk1, ds, q0, q1, D1, PRECISION)
    _store_pair(dy, dk0 * D**-0.5, dk1 * D**-0.5, key, there, KEY_ROW, D, D0, D1)
    _store_pair(dy + HEADS * D, dv0, dv1, key, there, KEY_ROW, D, D0, D1)

"""A call's memory, settings and build as the row kernels take them; a tile in and out; the label of a row."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import triton
import triton.language as tl

from distill.kernels.terms import IGNORED_LABEL

LOWEST = tl.constexpr(-3.4028234663852886e38)  # no finite logit lies below
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
IGNORED = tl.constexpr(IGNORED_LABEL)
NUM_SUMS = tl.constexpr(
    8
)  # floats kept of a row, 32 bytes: loss, soft, soft_ce, hard, is it correct, does it count
BF16_TO_FP32 = tl.constexpr("shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;")


class Rows(NamedTuple):
    """Memory of a call. Strides and width are in units of `How.align` columns, so that the compiler sees them aligned."""

    student: Any  # [N, width]
    student_stride: Any
    teacher: Any  # [N, >= vocab_size] or None
    teacher_stride: Any
    grad: Any  # [N, width] or None
    grad_stride: Any
    labels: Any  # int64 [N] or None
    weights: Any  # float32 [N] or None
    sums: Any  # float32 [N, NUM_SUMS]
    vocab_size: Any  # in columns
    width: Any


class Settings(NamedTuple):
    """`Terms` as the kernels use them."""

    student_scale: Any  # log2(e) / temperature
    teacher_scale: Any
    soft_factor: Any
    soft_slope: Any  # soft_factor / student temperature
    hard_weight: Any
    beta: Any


@dataclass(frozen=True)
class How:
    """What a kernel is compiled for."""

    kind: str
    soft: bool  # has a weight; a term without one may be infinite and is kept out of loss and gradient
    hard: bool
    hard_apart: bool  # there are labels, and the student's temperature is not theirs
    align: (
        int  # a power of 2 that divides the strides, the width and what a pointer is aligned to, in columns
    )
    whole: bool  # align divides vocab_size
    padded: bool  # there are columns beyond the vocabulary
    block: int  # columns of a tile
    ptx: bool  # inline assembly can be used: an NVIDIA GPU


class Label(NamedTuple):
    """A row's label as seen from some columns."""

    logit: Any  # -inf if it is not among them
    earlier: Any  # the largest logit before it


@triton.jit
def start(base, stride, row, how: tl.constexpr):
    """First element of a row; N * V may pass 2^31."""
    return base + row.to(tl.int64) * stride * how.align


@triton.jit
def load(base, stride, row, columns, vocab_size, how: tl.constexpr, EVICT: tl.constexpr):
    """Logits in their own dtype, -inf beyond the vocabulary. What lies between it and the next multiple of align is
    read too, else 16 bytes could not be loaded at once."""
    readable = columns < tl.cdiv(vocab_size, how.align) * how.align
    at = start(base, stride, row, how) + columns
    x = tl.load(at, mask=readable, other=float("-inf"), eviction_policy=EVICT)
    if not how.whole:
        x = tl.where(columns < vocab_size, x, tl.full(x.shape, float("-inf"), tl.float32).to(x.dtype))
    return x


@triton.jit
def load_both(rows, row, columns, how: tl.constexpr, EVICT: tl.constexpr):
    s = load(rows.student, rows.student_stride, row, columns, rows.vocab_size, how, EVICT)
    return s, load(rows.teacher, rows.teacher_stride, row, columns, rows.vocab_size, how, EVICT)


@triton.jit
def float32(raw, how: tl.constexpr):
    """The logits as float32, anew for every phase. The compiler can not see through the assembly, so between phases it
    keeps the packed registers as they were loaded and not the float32 copies, which would spill."""
    if how.ptx and raw.dtype == tl.bfloat16:
        x = tl.inline_asm_elementwise(BF16_TO_FP32, "=r,=r,r", [raw], tl.float32, is_pure=False, pack=2)
    elif how.ptx:
        pack: tl.constexpr = 32 // raw.dtype.primitive_bitwidth
        same = tl.inline_asm_elementwise(
            "mov.b32 $0, $1;", "=r,r", [raw], raw.dtype, is_pure=False, pack=pack
        )
        x = same.to(tl.float32)
    else:
        x = raw.to(tl.float32)
    return x


@triton.jit
def fast_log2(x, how: tl.constexpr):
    """Within 2^-22 for x in 1/2 .. 2, relatively outside; tl.log2 is some twenty instructions."""
    if how.ptx:
        y = tl.inline_asm_elementwise(
            "lg2.approx.ftz.f32 $0, $1;", "=r,r", [x], tl.float32, is_pure=True, pack=1
        )
    else:
        y = tl.log2(x)
    return y


@triton.jit
def product(x, factor, how: tl.constexpr):
    """x times a number, rounded: no compiler may fuse it with what comes after. The difference of two such products is
    exactly 0 where both are the same."""
    if how.ptx:
        y = tl.inline_asm_elementwise(
            "mul.rn.f32 $0, $1, $2;", "=r,r,r", [x, factor], tl.float32, is_pure=True, pack=1
        )
    else:
        y = x * factor
    return y


@triton.jit
def shift_of(peak, scale):
    """A whole number near the log2 of the largest exp(x / temperature): differences of shifts are exact, and so is
    what they scale by. Not below the lowest finite number, or a tile of nothing but -inf would hold NaN."""
    return tl.maximum(tl.floor(peak * scale), LOWEST)


@triton.jit
def log2_exp(x, peak, scale):
    """log2 of exp(x / temperature) / 2^shift in one rounding; scale is log2(e) / temperature."""
    return tl.fma(x, scale, -shift_of(peak, scale))


@triton.jit
def max_of_two(a, b):
    """Both maxima by one reduction: each costs barriers, and its operand stays in registers until the last.
    Of nothing but -inf the lowest finite number."""
    a, b = tl.split(tl.max(tl.join(a, b), axis=0))
    return tl.maximum(a, LOWEST), tl.maximum(b, LOWEST)


@triton.jit
def sum_of_two(a, b):
    return tl.split(tl.sum(tl.join(a, b), axis=0))


@triton.jit
def sum_of_four(a, b, c, d):
    ab, cd = tl.split(tl.sum(tl.join(tl.join(a, b), tl.join(c, d)), axis=0))
    sum_a, sum_b = tl.split(ab)
    sum_c, sum_d = tl.split(cd)
    return sum_a, sum_b, sum_c, sum_d


@triton.jit
def store_grad(rows, row, columns, grad, how: tl.constexpr):
    if how.padded:
        grad = tl.where(columns < rows.vocab_size, grad, 0.0)
    at = start(rows.grad, rows.grad_stride, row, how) + columns
    tl.store(at, grad.to(rows.grad.dtype.element_ty), mask=columns < rows.width * how.align)


@triton.jit
def clear_grad(rows, row, how: tl.constexpr):
    for tile in range(tl.cdiv(rows.width * how.align, how.block)):
        columns = tile * how.block + tl.arange(0, how.block)
        store_grad(rows, row, columns, (columns * 0).to(tl.float32), how)


@triton.jit
def clear_sums(rows, row):
    """A row that does not count."""
    tl.store(rows.sums + row.to(tl.int64) * NUM_SUMS + tl.arange(0, NUM_SUMS), 0.0)


@triton.jit
def row_label(rows, row):
    """0 without labels: every row counts."""
    label = row * 0
    if rows.labels is not None:
        wide = tl.load(rows.labels + row)
        label = tl.where(wide == IGNORED, IGNORED, in_32_bits(wide))
    return label


@triton.jit
def in_32_bits(index):
    """An index as int32; what does not fit there, which is no class, becomes the largest, which is none either."""
    fits = (index >= -2147483648) & (index <= 2147483647)
    return tl.where(fits, index, 2147483647).to(tl.int32)


@triton.jit
def row_weight(rows, row):
    weight = 1.0
    if rows.weights is not None:
        weight = tl.load(rows.weights + row)
    return weight


@triton.jit
def find_label(rows, row, raw, first, label, peak, how: tl.constexpr):
    """The label as a tile from column `first` with this peak sees it. Its logit is read from memory: call this before
    a gradient is written there. A label that is no class is nowhere, so that its cross-entropy is infinite."""
    earlier = tl.where(label < first + how.block, float("-inf"), peak)
    logit = tl.full((), float("-inf"), tl.float32)
    if (label >= first) & (label < tl.minimum(first + how.block, rows.vocab_size)):
        logit = tl.load(start(rows.student, rows.student_stride, row, how) + label).to(tl.float32)
        is_earlier = tl.arange(0, how.block) < label - first
        earlier = tl.max(tl.where(is_earlier, float32(raw, how), float("-inf")))
    return Label(logit, earlier)


@triton.jit
def hard_term(label, peak, mass):
    """Cross-entropy with the label in nats, and whether the label is the first of the largest logits."""
    hard = (tl.log2(mass) - log2_exp(label.logit, peak, LOG2E)) * LN2
    return hard, ((label.logit >= peak) & (label.earlier < label.logit)).to(tl.float32)


@triton.jit
def store_sums(rows, row, soft, soft_ce, hard, correct, weight, settings, how: tl.constexpr):
    loss = 0.0
    if how.soft:
        loss += settings.soft_factor * soft
    if how.hard:
        loss += settings.hard_weight * hard
    out = rows.sums + row.to(tl.int64) * NUM_SUMS
    tl.store(out, tl.where(weight == 0, 0.0, weight * loss))
    tl.store(out + 1, soft)
    tl.store(out + 2, soft_ce)
    tl.store(out + 3, hard)
    tl.store(out + 4, correct)
    tl.store(out + 5, 1.0)

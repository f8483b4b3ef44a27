"""One program a row that walks over it in tiles: once for the sums, once for what needs them, once for the gradient.

Portable, any vocabulary. Each walk turns round at the end of the one before it, where the last tiles are still in cache.
A row that fits one tile is read once and kept in registers.
"""

from __future__ import annotations

import triton
import triton.language as tl

from distill.kernels.gpu.dense import (
    Mixed,
    checked,
    joined,
    soft_terms,
    tile_grad,
    tile_mixed,
    tile_stats,
)
from distill.kernels.gpu.rows import (
    IGNORED,
    Label,
    clear_grad,
    clear_sums,
    find_label,
    float32,
    hard_term,
    load_both,
    max_of_two,
    row_label,
    row_weight,
    store_grad,
    store_sums,
)


@triton.jit
def loop_kernel(rows, settings, how: tl.constexpr, ONE_TILE: tl.constexpr):
    row = tl.program_id(0)
    label, weight = row_label(rows, row), row_weight(rows, row)
    if label == IGNORED:
        clear_sums(rows, row)
        if rows.grad is not None:
            clear_grad(rows, row, how)
        return
    columns = tl.arange(0, how.block)
    raw_s, raw_t = load_both(rows, row, columns, how, "evict_last")
    stats, found = _tile_stats(rows, row, raw_s, raw_t, 0, label, settings, how)
    if not ONE_TILE:
        stats, found = _other_stats(rows, row, label, stats, found, settings, how)
    mixed = Mixed(0.0, 0.0)
    if how.kind == "jsd" or how.kind == "tvd":
        mixed = tile_mixed(float32(raw_s, how), float32(raw_t, how), stats, settings, how)
        if not ONE_TILE:
            mixed = _other_mixed(rows, row, mixed, stats, settings, how)
        mixed = checked(mixed, stats)
    hard, correct = 0.0, 0.0
    if rows.labels is not None:
        hard, correct = hard_term(found, stats.student_peak, stats.hard_mass)
    soft, soft_ce = soft_terms(stats, mixed, settings, how)
    store_sums(rows, row, soft, soft_ce, hard, correct, weight, settings, how)
    if rows.grad is not None:
        if weight == 0:
            clear_grad(rows, row, how)
        else:
            tl.debug_barrier()  # all threads have read the label's logit, over which the gradient may be written
            if ONE_TILE:
                s, t = float32(raw_s, how), float32(raw_t, how)
                store_grad(
                    rows, row, columns, tile_grad(s, t, 0, label, stats, mixed, weight, settings, how), how
                )
            else:
                _grads(rows, row, label, stats, mixed, weight, settings, how)


@triton.jit
def _tile_stats(rows, row, raw_s, raw_t, first, label, settings, how: tl.constexpr):
    student_peak, teacher_peak = max_of_two(raw_s.to(tl.float32), raw_t.to(tl.float32))
    found = Label(student_peak, student_peak)
    if rows.labels is not None:
        found = find_label(rows, row, raw_s, first, label, student_peak, how)
    s, t = float32(raw_s, how), float32(raw_t, how)
    return tile_stats(s, t, student_peak, teacher_peak, settings, how), found


@triton.jit
def _other_stats(rows, row, label, stats, found, settings, how: tl.constexpr):
    for first in range(how.block, rows.vocab_size, how.block):
        raw_s, raw_t = load_both(rows, row, first + tl.arange(0, how.block), how, "evict_last")
        more, here = _tile_stats(rows, row, raw_s, raw_t, first, label, settings, how)
        stats = joined(stats, more, settings, how)
        found = Label(tl.maximum(found.logit, here.logit), tl.maximum(found.earlier, here.earlier))
    return stats, found


@triton.jit
def _other_mixed(rows, row, mixed, stats, settings, how: tl.constexpr):
    last = (tl.cdiv(rows.vocab_size, how.block) - 1) * how.block
    for done in range(0, last, how.block):
        raw_s, raw_t = load_both(rows, row, last - done + tl.arange(0, how.block), how, "evict_last")
        more = tile_mixed(float32(raw_s, how), float32(raw_t, how), stats, settings, how)
        mixed = Mixed(mixed.by_student + more.by_student, mixed.other + more.other)
    return mixed


@triton.jit
def _grads(rows, row, label, stats, mixed, weight, settings, how: tl.constexpr):
    last = (tl.cdiv(rows.width * how.align, how.block) - 1) * how.block
    for done in range(0, last + 1, how.block):
        first = last - done
        if how.kind == "jsd" or how.kind == "tvd":
            first = done
        columns = first + tl.arange(0, how.block)
        raw_s, raw_t = load_both(rows, row, columns, how, "evict_first")
        s, t = float32(raw_s, how), float32(raw_t, how)
        grad = tile_grad(s, t, first, label, stats, mixed, weight, settings, how)
        store_grad(rows, row, columns, grad, how)

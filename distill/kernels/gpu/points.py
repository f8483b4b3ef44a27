"""A teacher that is a few points, or none: labels alone, the teacher's arg-max, stored sparse targets.

One program a row; the gradient is p times a number of the row, put right at the points once it is stored. A row that
fits one tile is read once and kept in registers. With a tail the mass of all other classes is summed without the points:
1 less theirs would cancel.

For entries of probabilities q_k, Q = sum q_k, tail t and the student's mass outside of them st = 1 - sum p_k:
    T d D / d s_i = p_i (Q + t - t / st), and p_k (Q + t) - q_k at a point.
The arg-max b is one entry: its divergence is a function f(p_b), d D / d s_i = -f'(p_b) p_b (p_i - [i = b]), so that the
gradient is that of an entry of probability -f'(p_b) p_b.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from distill.kernels.gpu.rows import (
    IGNORED,
    LN2,
    LOG2E,
    LOWEST,
    Label,
    clear_grad,
    clear_sums,
    find_label,
    float32,
    hard_term,
    in_32_bits,
    load,
    log2_exp,
    row_label,
    row_weight,
    shift_of,
    start,
    store_grad,
    store_sums,
)


class Points(NamedTuple):
    """Sparse targets in memory, all None for other teachers."""

    ids: Any  # int64 [N, K]
    probs: Any  # float32 [N, K]
    tail: Any  # float32 [N] or None
    count: Any  # K


class Entries(NamedTuple):
    """The points of a row, vectors."""

    ids: Any
    probs: Any
    is_real: Any  # no padding
    logits: Any  # the student's; NaN for an id that is no class


class Mass(NamedTuple):
    """Sums over some of the student's columns, as in `dense`."""

    peak: Any
    soft: Any
    hard: Any


class Outcome(NamedTuple):
    """Of the divergence of a row: its value, and what makes the gradient."""

    soft: Any  # nats
    soft_ce: Any  # nats
    probs: Any  # of the entries, as the gradient has them
    at_points: Any  # multiplies p at a point, before its probability is taken off
    elsewhere: Any  # multiplies 2^y, relative to the peak of the others


@triton.jit
def points_kernel(
    rows,
    settings,
    points,
    how: tl.constexpr,
    TARGET: tl.constexpr,  # "labels", "argmax" or "sparse"
    POINTS: tl.constexpr,  # K rounded up to a power of 2
    ONE_TILE: tl.constexpr,
):
    row = tl.program_id(0)
    label, weight = row_label(rows, row), row_weight(rows, row)
    if label == IGNORED:
        clear_sums(rows, row)
        if rows.grad is not None:
            clear_grad(rows, row, how)
        return
    raw = _load_tile(rows, row, 0, how)
    entries, tail = _load_points(rows, row, points, how, TARGET, POINTS)
    others, found = _tile_mass(rows, row, raw, 0, label, entries, tail, settings, how)
    if not ONE_TILE:
        for first in range(how.block, rows.vocab_size, how.block):
            raw = _load_tile(rows, row, first, how)
            mass, here = _tile_mass(rows, row, raw, first, label, entries, tail, settings, how)
            others = _joined(others, mass, settings, how)
            found = Label(tl.maximum(found.logit, here.logit), tl.maximum(found.earlier, here.earlier))
    total = others
    if tail is not None:
        total = _joined(others, _points_mass(entries, settings, how), settings, how)
    hard, correct = 0.0, 0.0
    if rows.labels is not None:
        hard, correct = hard_term(found, total.peak, total.hard)
    outcome = _outcome(entries, tail, others, total, settings, how, TARGET)
    store_sums(rows, row, outcome.soft, outcome.soft_ce, hard, correct, weight, settings, how)
    if rows.grad is not None:
        if weight == 0:
            clear_grad(rows, row, how)
        else:
            tl.debug_barrier()  # all threads have read the logits of label and points: the gradient may be over them
            if ONE_TILE:
                _store_tile(rows, row, raw, 0, others, total, outcome, weight, settings, how)
            else:
                last = (tl.cdiv(rows.width * how.align, how.block) - 1) * how.block
                for done in range(0, last + 1, how.block):
                    raw = _load_tile(rows, row, last - done, how)
                    _store_tile(rows, row, raw, last - done, others, total, outcome, weight, settings, how)
            if how.hard:
                tl.debug_barrier()  # what is put right has been stored
                _store_label(rows, row, label, found.logit, others, total, outcome, weight, settings, how)
            if how.soft and TARGET != "labels":
                tl.debug_barrier()
                _store_points(rows, row, entries, label, total, outcome, weight, settings, how)


@triton.jit
def _load_tile(rows, row, first, how: tl.constexpr):
    columns = first + tl.arange(0, how.block)
    return load(rows.student, rows.student_stride, row, columns, rows.vocab_size, how, "evict_last")


@triton.jit
def _load_points(rows, row, points, how: tl.constexpr, TARGET: tl.constexpr, POINTS: tl.constexpr):
    """The entries and the tail, None if there is none. Without a teacher one entry of padding."""
    lane = tl.arange(0, POINTS)
    ids, probs, tail = lane, (lane * 0).to(tl.float32), None
    if TARGET == "argmax":
        best, is_sound = _arg_max(rows, row, how)
        ids, probs = lane * 0 + best, probs + tl.where(is_sound, 1.0, float("nan"))
    if TARGET == "sparse":
        at = row.to(tl.int64) * points.count + lane
        ids = in_32_bits(tl.load(points.ids + at, mask=lane < points.count, other=0))
        probs = tl.load(points.probs + at, mask=lane < points.count, other=0.0)
        if points.tail is not None:
            tail = tl.load(points.tail + row)
    is_real = probs != 0
    is_class = (ids >= 0) & (ids < rows.vocab_size)
    at = start(rows.student, rows.student_stride, row, how) + ids
    logits = tl.load(at, mask=is_real & is_class, other=float("-inf")).to(tl.float32)
    logits = tl.where(is_real & (is_class == 0), float("nan"), logits)
    return Entries(ids, probs, is_real & is_class, logits), tail


@triton.jit
def _arg_max(rows, row, how: tl.constexpr):
    """The first of the teacher's largest logits, and whether it is finite; NaN counts as the largest."""
    best, index = tl.full((), float("-inf"), tl.float32), row * 0
    for first in range(0, rows.vocab_size, how.block):
        columns = first + tl.arange(0, how.block)
        t = load(rows.teacher, rows.teacher_stride, row, columns, rows.vocab_size, how, "evict_first").to(
            tl.float32
        )
        t = tl.where(t != t, float("inf"), t)
        here = tl.max(t)
        if here > best:
            best, index = here, tl.min(tl.where(t == here, columns, 0x7FFFFFFF))
    return index, tl.abs(best) < float("inf")


@triton.jit
def _tile_mass(rows, row, raw, first, label, entries, tail, settings, how: tl.constexpr):
    """The mass of a tile, without the points if there is a tail, and what it knows of the label."""
    peak = tl.maximum(tl.max(raw.to(tl.float32)), LOWEST)
    found = Label(peak, peak)
    if rows.labels is not None:
        found = find_label(rows, row, raw, first, label, peak, how)
    s = float32(raw, how)
    if tail is not None:
        is_here = entries.is_real & (entries.ids >= first) & (entries.ids < first + how.block)
        is_point = tl.histogram(tl.where(is_here, entries.ids - first, 0), how.block, mask=is_here) > 0
        s = tl.where(is_point, float("-inf"), s)
        peak = tl.maximum(tl.max(s), LOWEST)
    return _mass(s, peak, settings, how), found


@triton.jit
def _mass(s, peak, settings, how: tl.constexpr):
    soft = tl.sum(tl.exp2(log2_exp(s, peak, settings.student_scale)))
    hard = soft
    if how.hard_apart:
        hard = tl.sum(tl.exp2(log2_exp(s, peak, LOG2E)))
    return Mass(peak, soft, hard)


@triton.jit
def _points_mass(entries, settings, how: tl.constexpr):
    return _mass(entries.logits, tl.maximum(tl.max(entries.logits), LOWEST), settings, how)


@triton.jit
def _moved(mass, peak, settings, how: tl.constexpr):
    scale = settings.student_scale
    soft = mass.soft * tl.exp2(shift_of(mass.peak, scale) - shift_of(peak, scale))
    hard = soft
    if how.hard_apart:
        hard = mass.hard * tl.exp2(shift_of(mass.peak, LOG2E) - shift_of(peak, LOG2E))
    return Mass(peak, soft, hard)


@triton.jit
def _joined(a, b, settings, how: tl.constexpr):
    peak = tl.maximum(a.peak, b.peak)
    a, b = _moved(a, peak, settings, how), _moved(b, peak, settings, how)
    return Mass(peak, a.soft + b.soft, a.hard + b.hard)


@triton.jit
def _outcome(entries, tail, others, total, settings, how: tl.constexpr, TARGET: tl.constexpr):
    log_p = log2_exp(entries.logits, total.peak, settings.student_scale) - tl.log2(total.soft)
    probs, soft, soft_ce = entries.probs, 0.0, 0.0
    if TARGET == "argmax":
        soft, probs = _of_best(entries.probs, log_p, settings, how)
        soft, soft_ce = tl.sum(soft), tl.sum(-log_p * entries.probs) * LN2
    if TARGET == "sparse":
        log_p = tl.where(entries.probs == 0, 0.0, log_p)
        log_q = tl.log2(tl.where(entries.probs == 0, 1.0, entries.probs))
        soft = tl.sum(entries.probs * (log_q - log_p)) * LN2
        soft_ce = -tl.sum(entries.probs * log_p) * LN2
    known = tl.sum(probs)
    elsewhere = known / total.soft
    if tail is not None:
        shift = shift_of(others.peak, settings.student_scale) - shift_of(total.peak, settings.student_scale)
        log_rest = tl.log2(others.soft) + shift - tl.log2(total.soft)
        log_tail = tl.log2(tl.where(tail == 0, 1.0, tail))
        soft += tail * tl.where(tail == 0, 0.0, log_tail - log_rest) * LN2
        soft_ce -= tail * tl.where(tail == 0, 0.0, log_rest) * LN2
        known += tail
        elsewhere = (known * tl.exp2(log_rest) - tail) / others.soft
        elsewhere = tl.where(others.soft == 0, 0.0, elsewhere)  # no class is left to have a gradient
    return Outcome(soft, soft_ce, probs, known, elsewhere)


@triton.jit
def _of_best(one, log_p, settings, how: tl.constexpr):
    """f(p_b) in nats and -f'(p_b) p_b; `one` is NaN for a teacher that has no arg-max."""
    p = tl.exp2(log_p)
    if how.kind == "forward_kl":
        soft, slope = -log_p * LN2, one
    elif how.kind == "tvd":
        soft, slope = 1 - p, p
    else:
        rest = 1 - settings.beta
        log_m, log_rest = tl.log2(settings.beta + rest * p), tl.log2(one * rest)
        to_m = p * tl.where(p == 0, 0.0, log_p - log_m)
        soft = (rest * (to_m - (1 - p) * log_rest) - settings.beta * log_m) * LN2
        slope = -rest * (to_m + p * log_rest) * LN2
    return soft * one, slope * one


@triton.jit
def _grad(s, others, total, outcome, weight, settings, how: tl.constexpr):
    """The gradient where there is neither label nor point."""
    grad = s * 0.0
    if how.soft:
        slope = weight * settings.soft_slope * outcome.elsewhere
        grad = tl.exp2(log2_exp(s, others.peak, settings.student_scale)) * slope
    if how.hard:
        scale = (
            LOG2E if how.hard_apart else settings.student_scale
        )  # equal ones, but then the exps are made once
        grad += tl.exp2(log2_exp(s, total.peak, scale)) * (weight * settings.hard_weight / total.hard)
    return grad


@triton.jit
def _store_tile(rows, row, raw, first, others, total, outcome, weight, settings, how: tl.constexpr):
    grad = _grad(float32(raw, how), others, total, outcome, weight, settings, how)
    store_grad(rows, row, first + tl.arange(0, how.block), grad, how)


@triton.jit
def _store_label(rows, row, label, logit, others, total, outcome, weight, settings, how: tl.constexpr):
    grad = _grad(logit, others, total, outcome, weight, settings, how) - weight * settings.hard_weight
    is_class = (label >= 0) & (label < rows.vocab_size)
    at = start(rows.grad, rows.grad_stride, row, how) + label
    tl.store(at, grad.to(rows.grad.dtype.element_ty), mask=is_class)


@triton.jit
def _store_points(rows, row, entries, label, total, outcome, weight, settings, how: tl.constexpr):
    p = tl.exp2(log2_exp(entries.logits, total.peak, settings.student_scale)) / total.soft
    grad = (p * outcome.at_points - outcome.probs) * (weight * settings.soft_slope)
    if how.hard:
        p = tl.exp2(log2_exp(entries.logits, total.peak, LOG2E)) / total.hard
        grad += (p - (entries.ids == label).to(tl.float32)) * (weight * settings.hard_weight)
    at = start(rows.grad, rows.grad_stride, row, how) + entries.ids
    tl.store(at, grad.to(rows.grad.dtype.element_ty), mask=entries.is_real)

"""Divergence of two whole rows: a tile's sums, how the sums of parts join, the value, the gradient.

All is to base 2, since exp2 and log2 are what the hardware has, and relative to the largest logit seen: with y = x *
log2(e) / temperature - shift, mass = sum 2^y and log2 p = y - log2 mass. A part of nothing but -inf has mass 0; a row
whose mass is 0 or NaN makes its loss NaN by itself. Where a probability is 0 its term is 0, even if a logit is -inf.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from distill.kernels.gpu.rows import (
    LN2,
    LOG2E,
    fast_log2,
    log2_exp,
    product,
    shift_of,
    sum_of_four,
    sum_of_two,
)

FAR = tl.constexpr(-1000.0)  # stands for the log2 of 0: far enough to be 0 again, and 0 times it is 0


class Stats(NamedTuple):
    """Sums over some columns of a row; scalars, or vectors of several parts."""

    student_peak: Any
    student_mass: Any
    teacher_peak: Any
    teacher_mass: Any
    gap: Any  # forward KL: sum of 2^yt (yt - ys); reverse KL: sum of 2^ys (ys - yt)
    cross: Any  # sum of 2^yt ys
    hard_mass: Any  # student_mass at temperature 1


class Mixed(NamedTuple):
    """Sums that need both masses first. JSD: log2 ratios to the mixture; TVD: the difference and its sign."""

    by_student: Any  # expectation of log2 (p / m) or of sign(p - q) under p
    other: Any  # expectation of log2 (q / m) under q, or sum of |p - q|


@triton.jit
def tile_stats(s, t, student_peak, teacher_peak, settings, how: tl.constexpr):
    ys = log2_exp(s, student_peak, settings.student_scale)
    yt = log2_exp(t, teacher_peak, settings.teacher_scale)
    es, et = tl.exp2(ys), tl.exp2(yt)
    cross = et * tl.where(et == 0, 0.0, ys)  # chosen before the product, which then joins the sum as one FMA
    gap = tl.zeros_like(es)
    if how.kind == "forward_kl":
        gap = et * tl.where(et == 0, 0.0, yt - ys)
    elif how.kind == "reverse_kl":
        gap = es * tl.where(es == 0, 0.0, ys - yt)
    student_mass, teacher_mass, gap, cross = sum_of_four(es, et, gap, cross)
    hard_mass = student_mass
    if how.hard_apart:
        hard_mass = tl.sum(tl.exp2(log2_exp(s, student_peak, LOG2E)))
    return Stats(student_peak, student_mass, teacher_peak, teacher_mass, gap, cross, hard_mass)


@triton.jit
def _moved_sum(total, mass, factor, shift):
    """Sum of e * y for e * factor and y + shift; 0 where the mass is lost on the way, as a term of probability 0."""
    return tl.where(mass * factor == 0, 0.0, factor * (total + mass * shift))


@triton.jit
def moved(stats, student_peak, teacher_peak, settings, how: tl.constexpr):
    """The same sums relative to higher peaks."""
    ds = shift_of(stats.student_peak, settings.student_scale) - shift_of(student_peak, settings.student_scale)
    dt = shift_of(stats.teacher_peak, settings.teacher_scale) - shift_of(teacher_peak, settings.teacher_scale)
    fs, ft = tl.exp2(ds), tl.exp2(dt)
    student_mass = stats.student_mass * fs
    gap = stats.gap
    if how.kind == "forward_kl":
        gap = _moved_sum(gap, stats.teacher_mass, ft, dt - ds)
    elif how.kind == "reverse_kl":
        gap = _moved_sum(gap, stats.student_mass, fs, ds - dt)
    cross = _moved_sum(stats.cross, stats.teacher_mass, ft, ds)
    hard_mass = student_mass
    if how.hard_apart:
        hard_mass = stats.hard_mass * tl.exp2(
            shift_of(stats.student_peak, LOG2E) - shift_of(student_peak, LOG2E)
        )
    return Stats(student_peak, student_mass, teacher_peak, stats.teacher_mass * ft, gap, cross, hard_mass)


@triton.jit
def joined(a, b, settings, how: tl.constexpr):
    """Sums over the columns of two parts."""
    student_peak = tl.maximum(a.student_peak, b.student_peak)
    teacher_peak = tl.maximum(a.teacher_peak, b.teacher_peak)
    a = moved(a, student_peak, teacher_peak, settings, how)
    b = moved(b, student_peak, teacher_peak, settings, how)
    student_mass, teacher_mass = a.student_mass + b.student_mass, a.teacher_mass + b.teacher_mass
    sums = (a.gap + b.gap, a.cross + b.cross, a.hard_mass + b.hard_mass)
    return Stats(student_peak, student_mass, teacher_peak, teacher_mass, sums[0], sums[1], sums[2])


@triton.jit
def all_joined(parts, settings, how: tl.constexpr):
    """The same for vectors of parts, in a fixed order."""
    student_peak, teacher_peak = tl.max(parts.student_peak), tl.max(parts.teacher_peak)
    parts = moved(parts, student_peak, teacher_peak, settings, how)
    student_mass, teacher_mass = tl.sum(parts.student_mass), tl.sum(parts.teacher_mass)
    gap, cross, hard_mass = tl.sum(parts.gap), tl.sum(parts.cross), tl.sum(parts.hard_mass)
    return Stats(student_peak, student_mass, teacher_peak, teacher_mass, gap, cross, hard_mass)


@triton.jit
def _probs(x, peak, mass, scale, how: tl.constexpr):
    """Probabilities and their logs."""
    y = log2_exp(x, peak, scale)
    return product(tl.exp2(y), 1.0 / mass, how), y - tl.log2(mass)


@triton.jit
def _sign(x):
    return tl.where(x > 0, 1.0, tl.where(x < 0, -1.0, 0.0))


@triton.jit
def _mixture(s, t, stats, settings, how: tl.constexpr):
    """p, log2(p / m), q, log2(q / m) with m = beta q + (1 - beta) p. Seen from the larger of p and q the mixture lies
    between that one's weight and 1, where the fast log2 is exact to 2^-22."""
    log_p = log2_exp(s, stats.student_peak, settings.student_scale) - tl.log2(stats.student_mass)
    log_q = log2_exp(t, stats.teacher_peak, settings.teacher_scale) - tl.log2(stats.teacher_mass)
    log_p, log_q = tl.maximum(log_p, FAR), tl.maximum(log_q, FAR)
    apart = log_p - log_q
    weight = tl.where(apart > 0, 1 - settings.beta, settings.beta)
    mixture = weight + (1 - weight) * tl.exp2(-tl.abs(apart))
    log_mixture = fast_log2(mixture, how)
    p_to_m, q_to_m = tl.minimum(apart, 0.0) - log_mixture, tl.minimum(-apart, 0.0) - log_mixture
    return tl.exp2(log_p), p_to_m, tl.exp2(log_q), q_to_m


@triton.jit
def tile_mixed(s, t, stats, settings, how: tl.constexpr):
    """JSD and TVD alone: a tile's sums that need the masses of the whole row."""
    if how.kind == "tvd":
        p, _ = _probs(s, stats.student_peak, stats.student_mass, settings.student_scale, how)
        q, _ = _probs(t, stats.teacher_peak, stats.teacher_mass, settings.teacher_scale, how)
        by_student, other = sum_of_two(p * _sign(p - q), tl.abs(p - q))
    else:
        p, p_to_m, q, q_to_m = _mixture(s, t, stats, settings, how)
        by_student, other = sum_of_two(p * p_to_m, q * q_to_m)
    return Mixed(by_student, other)


@triton.jit
def checked(mixed, stats):
    """The same sums, NaN if one side is no distribution, which clamped logs would hide."""
    is_sound = (stats.student_mass > 0) & (stats.teacher_mass > 0)
    return Mixed(
        tl.where(is_sound, mixed.by_student, float("nan")), tl.where(is_sound, mixed.other, float("nan"))
    )


@triton.jit
def soft_terms(stats, mixed, settings, how: tl.constexpr):
    """Divergence and soft cross-entropy of a row, in nats."""
    log_student, log_teacher = tl.log2(stats.student_mass), tl.log2(stats.teacher_mass)
    if how.kind == "forward_kl":
        soft = (stats.gap / stats.teacher_mass + log_student - log_teacher) * LN2
    elif how.kind == "reverse_kl":
        soft = (stats.gap / stats.student_mass + log_teacher - log_student) * LN2
    elif how.kind == "jsd":
        soft = (settings.beta * mixed.other + (1 - settings.beta) * mixed.by_student) * LN2
    else:
        soft = mixed.other / 2
    return soft, (log_student - stats.cross / stats.teacher_mass) * LN2


@triton.jit
def _soft_grad(s, t, stats, mixed, slope, settings, how: tl.constexpr):
    """slope * d divergence / d (student logit / temperature)."""
    p, log_p = _probs(s, stats.student_peak, stats.student_mass, settings.student_scale, how)
    q, log_q = _probs(t, stats.teacher_peak, stats.teacher_mass, settings.teacher_scale, how)
    if how.kind == "forward_kl":  # the slope goes into the masses, which saves a product
        es = tl.exp2(log2_exp(s, stats.student_peak, settings.student_scale))
        et = tl.exp2(log2_exp(t, stats.teacher_peak, settings.teacher_scale))
        grad = product(es, slope / stats.student_mass, how) - product(et, slope / stats.teacher_mass, how)
    elif how.kind == "reverse_kl":
        mean = stats.gap / stats.student_mass + tl.log2(stats.teacher_mass) - tl.log2(stats.student_mass)
        grad = p * tl.where(p == 0, 0.0, log_p - log_q - mean) * (slope * LN2)
    elif how.kind == "jsd":
        p, p_to_m, _, _ = _mixture(s, t, stats, settings, how)
        grad = p * (p_to_m - mixed.by_student) * ((1 - settings.beta) * LN2 * slope)
    else:
        grad = p * (_sign(p - q) - mixed.by_student) * (0.5 * slope)
    return grad


@triton.jit
def tile_grad(s, t, first, label, stats, mixed, weight, settings, how: tl.constexpr):
    """d loss / d student logits of the tile that begins at column `first`."""
    grad = tl.zeros_like(s)
    if how.soft:
        grad = _soft_grad(s, t, stats, mixed, weight * settings.soft_slope, settings, how)
    if how.hard:
        scale = (
            LOG2E if how.hard_apart else settings.student_scale
        )  # equal ones, but then the exps are made once
        slope = weight * settings.hard_weight
        grad += tl.exp2(log2_exp(s, stats.student_peak, scale)) * (slope / stats.hard_mass)
        if (label >= first) & (label < first + how.block):
            grad = tl.where(tl.arange(0, how.block) == label - first, grad - slope, grad)
    return grad

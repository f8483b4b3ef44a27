"""A row shared by several programs, each of which reads its columns of both logits once and keeps them in registers.

Each program sums over its part and lays the sums into `parts`; when all programs of the row have, each joins them
in the same order and writes the gradient of its part. Waiting is for the fused launch alone. Launched once a phase
(PHASE "stats", for JSD and TVD "mixed", then "grad") the same code needs no waiting, but reads the logits again.

What the fused launch relies on:
- Visibility. A program's stores to `parts` come before a barrier of its threads, then one thread adds to the row's
  flag with release at device scope; the thread that sees the count full has acquire at device scope, then
  a barrier. By causality order of the PTX memory model every thread then sees all parts; they are stored and loaded
  past L1 all the same.
- Progress. Nothing is awaited before the own part has arrived, so a row only stalls while some of its programs are
  not running yet. Programs start in the order of their ids (undocumented, but single-pass scans of NVIDIA's
  own libraries stand on it), and those of a row are neighbours. Take the unfinished row with the smallest ids: every
  running program that can not finish belongs to it or to a later row. If one of its programs has not started, no later
  row has, so only the row's own programs hold places, fewer than SPLITS: there is room for the next. It is
  enough that the device holds SPLITS programs at once; `plan` asks for several times that, which leaves room for the
  same kernel in other streams.
- Flags start at 0, zeroed by the call that uses them on its own stream: no state is shared between
  calls, streams or replays of a CUDA graph, no epoch can wrap, and a call that died leaves nothing behind.
- Nobody writes what another still reads: a program reads and writes its own columns only, also in place.
"""

from __future__ import annotations

import triton
import triton.language as tl

from distill.kernels.gpu.dense import (
    Mixed,
    Stats,
    all_joined,
    checked,
    soft_terms,
    tile_grad,
    tile_mixed,
    tile_stats,
)
from distill.kernels.gpu.rows import (
    IGNORED,
    LOWEST,
    Label,
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

NUM_PARTS = tl.constexpr(16)  # floats kept of a part: 64 bytes, so that no two programs write to one sector


@triton.jit
def split_kernel(
    rows,
    settings,
    parts,  # float32 [N, SPLITS, NUM_PARTS]
    flags,  # int32 [N], zeros
    how: tl.constexpr,
    SPLITS: tl.constexpr,
    PHASE: tl.constexpr,  # "all", or one of "stats", "mixed", "grad"
):
    row, part = tl.program_id(0) // SPLITS, tl.program_id(0) % SPLITS
    columns = part * how.block + tl.arange(0, how.block)
    label = row_label(rows, row)
    if label == IGNORED:
        _skip(rows, row, part, columns, how)
        return
    raw_s, raw_t = load_both(rows, row, columns, how, "evict_first")
    parts += row.to(tl.int64) * SPLITS * NUM_PARTS
    mine = parts + part * NUM_PARTS
    if PHASE == "all" or PHASE == "stats":
        student_peak, teacher_peak = max_of_two(raw_s.to(tl.float32), raw_t.to(tl.float32))
        if rows.labels is not None:
            found = find_label(rows, row, raw_s, part * how.block, label, student_peak, how)
            _store_pair(mine + 7, found.logit, found.earlier)
        s, t = float32(raw_s, how), float32(raw_t, how)
        _store_stats(mine, tile_stats(s, t, student_peak, teacher_peak, settings, how))
    if PHASE == "all":
        _wait_for_all(flags + row, SPLITS)
    if PHASE != "stats":
        stats = all_joined(_load_stats(parts, SPLITS), settings, how)
        if (how.kind == "jsd" or how.kind == "tvd") and PHASE != "grad":
            mixed = tile_mixed(float32(raw_s, how), float32(raw_t, how), stats, settings, how)
            _store_pair(mine + 9, mixed.by_student, mixed.other)
            if PHASE == "all":
                _wait_for_all(flags + row, 2 * SPLITS)
        if PHASE != "mixed":
            mixed = _load_mixed(parts, stats, how, SPLITS)
            weight = row_weight(rows, row)
            if part == 0:
                _finish(rows, row, parts, stats, mixed, weight, settings, how, SPLITS)
            if rows.grad is not None:
                grad = (columns * 0).to(rows.grad.dtype.element_ty)
                if weight != 0:
                    s, t = float32(raw_s, how), float32(raw_t, how)
                    exact = tile_grad(s, t, part * how.block, label, stats, mixed, weight, settings, how)
                    grad = exact.to(grad.dtype)
                store_grad(rows, row, columns, grad, how)


@triton.jit
def _skip(rows, row, part, columns, how: tl.constexpr):
    """A row that does not count, whatever it holds."""
    if rows.grad is not None:
        store_grad(rows, row, columns, (columns * 0).to(tl.float32), how)
    if part == 0:
        clear_sums(rows, row)


@triton.jit
def _finish(rows, row, parts, stats, mixed, weight, settings, how: tl.constexpr, SPLITS: tl.constexpr):
    hard, correct = 0.0, 0.0
    if rows.labels is not None:
        logits, earlier = _load_pair(parts + 7, SPLITS, float("-inf"))
        label = Label(tl.max(logits), tl.max(earlier))
        hard, correct = hard_term(label, stats.student_peak, stats.hard_mass)
    soft, soft_ce = soft_terms(stats, mixed, settings, how)
    store_sums(rows, row, soft, soft_ce, hard, correct, weight, settings, how)


@triton.jit
def _wait_for_all(flag, count):
    """Returns when `count` programs have come by; see the module's docstring for what it relies on."""
    tl.debug_barrier()  # what other threads stored comes before the release of the one that adds
    arrived = tl.atomic_add(flag, 1, sem="acq_rel", scope="gpu") + 1
    while arrived < count:
        arrived = tl.atomic_add(flag, 0, sem="acquire", scope="gpu")
    tl.debug_barrier()


@triton.jit
def _store_pair(at, first, second):
    tl.store(at, first, cache_modifier=".cg")
    tl.store(at + 1, second, cache_modifier=".cg")


@triton.jit
def _store_stats(at, stats):
    _store_pair(at, stats.student_peak, stats.student_mass)
    _store_pair(at + 2, stats.teacher_peak, stats.teacher_mass)
    _store_pair(at + 4, stats.gap, stats.cross)
    tl.store(at + 6, stats.hard_mass, cache_modifier=".cg")


@triton.jit
def _load_one(at, SPLITS: tl.constexpr, other):
    """One float of every part; `other` fills up to a power of 2."""
    part = tl.arange(0, triton.next_power_of_2(SPLITS))
    return tl.load(at + part * NUM_PARTS, mask=part < SPLITS, other=other, cache_modifier=".cg")


@triton.jit
def _load_pair(at, SPLITS: tl.constexpr, other):
    return _load_one(at, SPLITS, other), _load_one(at + 1, SPLITS, other)


@triton.jit
def _load_stats(parts, SPLITS: tl.constexpr):
    student_peak, student_mass = _load_one(parts, SPLITS, LOWEST), _load_one(parts + 1, SPLITS, 0.0)
    teacher_peak, teacher_mass = _load_one(parts + 2, SPLITS, LOWEST), _load_one(parts + 3, SPLITS, 0.0)
    gap, cross = _load_pair(parts + 4, SPLITS, 0.0)
    hard_mass = _load_one(parts + 6, SPLITS, 0.0)
    return Stats(student_peak, student_mass, teacher_peak, teacher_mass, gap, cross, hard_mass)


@triton.jit
def _load_mixed(parts, stats, how: tl.constexpr, SPLITS: tl.constexpr):
    mixed = Mixed(0.0, 0.0)
    if how.kind == "jsd" or how.kind == "tvd":
        by_student, other = _load_pair(parts + 9, SPLITS, 0.0)
        mixed = checked(Mixed(tl.sum(by_student), tl.sum(other)), stats)
    return mixed

"""Schedules are pure: every kind at each of its boundaries, ramps, learning rates, a trajectory's rule."""

from __future__ import annotations

import json
import math
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distill.config import OptimConfig, ScheduleConfig
from distill.schedule import (
    Schedule,
    follow_student,
    is_saturated,
    is_trajectory_step,
    learning_rate,
    make_schedule,
    ramp_at,
    schedule_from_json,
    steepest_checkpoint,
)

EVERY_100 = [0, *range(100, 1001, 100)]
LOG_SPACED = [1, 2, 4, 8, 16, 32, 64, 128]
BATCH = 8


def schedule(
    steps: int, available: list[int] = EVERY_100, losses: dict[int, float] | None = None, **keys: Any
) -> Schedule:
    return make_schedule(ScheduleConfig(**keys), available, losses or {}, steps, BATCH)


def by_step(s: Schedule) -> list[int]:
    """The teacher's step of every student step."""
    return [s.checkpoint_at(consumed) for consumed in range(0, s.total_samples, s.batch_size)]


# fmt: off
# (settings, student steps, [(first student step, teacher step), ...], ends on the final teacher)
TABLE = {
    "one-shot is the final checkpoint": ({"kind": "one_shot"}, 10, [(0, 1000)], True),
    "one-shot of a chosen one": ({"kind": "one_shot", "checkpoints": [300]}, 10, [(0, 300)], False),
    "equal, all checkpoints": ({"kind": "equal"}, 20, [(2 * i, 100 * (i + 1)) for i in range(10)], True),
    "equal, two stages": ({"kind": "equal", "num_stages": 2}, 10, [(0, 500), (5, 1000)], True),
    "equal, marks between checkpoints": ({"kind": "equal", "num_stages": 3}, 9,
        [(0, 400), (3, 700), (6, 1000)], True),
    "equal, budget not a multiple": ({"kind": "equal", "num_stages": 4}, 10,
        [(0, 300), (2, 500), (5, 800), (7, 1000)], True),
    "equal, one step each": (
        {"kind": "equal", "checkpoints": [100, 200, 300]}, 3, [(0, 100), (1, 200), (2, 300)], False),
    "equal, unsorted choice": ({"kind": "equal", "checkpoints": [900, 200]}, 4, [(0, 200), (2, 900)], False),
    "N stages of T": ({"kind": "n_t", "num_stages": 2, "stage_steps": 3}, 10, [(0, 500), (3, 1000)], True),
    "N stages of T, last begins on the last step": ({"kind": "n_t", "num_stages": 2, "stage_steps": 9}, 10,
        [(0, 500), (9, 1000)], True),
    "two shots": (
        {"kind": "two_shot", "checkpoints": [200], "early_share": 0.3}, 10, [(0, 200), (3, 1000)], True),
    "two shots, both chosen": (
        {"kind": "two_shot", "checkpoints": [900, 200], "early_share": 0.5}, 10, [(0, 900), (5, 200)], False),
    "two shots, no early step": ({"kind": "two_shot", "checkpoints": [200], "early_share": 0.04}, 10,
        [(0, 1000)], True),
    "explicit": (
        {"kind": "explicit", "stages": [[0, 700], [1, 100], [9, 1000]]}, 10,
        [(0, 700), (1, 100), (9, 1000)], True),
    "speed 100": ({"kind": "speed", "speed": 100}, 12, [(i, 100 * (i + 1)) for i in range(10)], True),
    "speed 100, short run": ({"kind": "speed", "speed": 100}, 3, [(0, 100), (1, 200), (2, 300)], False),
    "speed 50": ({"kind": "speed", "speed": 50}, 6, [(0, 100), (2, 200), (4, 300)], False),
    "speed 250 skips": ({"kind": "speed", "speed": 250}, 9, [(0, 300), (1, 500), (2, 800), (3, 1000)], True),
    "speed past the end": ({"kind": "speed", "speed": 5000}, 9, [(0, 1000)], True),
}
# fmt: on


@pytest.mark.parametrize("name", TABLE)
def test_every_kind_changes_teacher_exactly_at_its_boundaries(name: str) -> None:
    keys, steps, plan, ends_on_final = TABLE[name]
    s = schedule(steps, **keys)
    assert [(stage.first_sample, stage.checkpoint) for stage in s.stages] == [
        (first * BATCH, c) for first, c in plan
    ]
    assert s.ends_on_final is ends_on_final
    for i, ((first, checkpoint), following) in enumerate(zip(plan, [*plan[1:], None], strict=True)):
        assert s.checkpoint_at(first * BATCH) == checkpoint
        assert s.upcoming(first * BATCH) == [c for _, c in plan[i + 1 :]]
        if following:  # the last sample before the boundary, and the boundary itself
            assert s.checkpoint_at(following[0] * BATCH - 1) == checkpoint
            assert s.checkpoint_at(following[0] * BATCH) == following[1]
    assert s.checkpoint_at(steps * BATCH - 1) == plan[-1][1]


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_stages_lie_on_whole_steps_of_any_batch(batch_size: int) -> None:
    s = make_schedule(ScheduleConfig(kind="equal", num_stages=3), EVERY_100, {}, 10, batch_size)
    assert [stage.first_sample for stage in s.stages] == [0, 3 * batch_size, 6 * batch_size]


def test_step_0_of_a_teacher_never_teaches() -> None:
    assert 0 not in by_step(schedule(100, kind="equal"))
    with pytest.raises(ValueError, match=r"no checkpoint after step 0 .*\[0\]"):
        schedule(10, [0])


@given(
    st.lists(st.integers(1, 200), min_size=1, unique=True),
    st.sampled_from(["0.1", "0.3", "0.7", "1", "1.1", "1.5", "2.3", "3", "16"]),
    st.integers(1, 60),
)
def test_speed_takes_the_first_checkpoint_at_or_ahead_of_the_students_step(
    checkpoints: list[int], speed: str, steps: int
) -> None:
    exact = Fraction(speed)
    ahead = [
        [c for c in sorted(checkpoints) if c >= exact * (s + 1)] or [max(checkpoints)] for s in range(steps)
    ]
    assert by_step(schedule(steps, checkpoints, kind="speed", speed=float(speed))) == [
        choice[0] for choice in ahead
    ]


def test_speed_whose_quotient_floats_round_down_keeps_its_step() -> None:
    assert 33 / 1.1 < 30  # teacher step 33 is that of student step 29 (the 30th), to the last digit
    assert by_step(schedule(31, [33, 40], kind="speed", speed=1.1)) == [33] * 30 + [40]


@given(st.integers(1, 30), st.integers(30, 400))
def test_equal_stages_differ_by_one_step_at_most(num_stages: int, steps: int) -> None:
    s = schedule(steps, list(range(1, 31)), kind="equal", num_stages=num_stages)
    bounds = [stage.first_sample // BATCH for stage in s.stages] + [steps]
    lengths = [b - a for a, b in zip(bounds, bounds[1:], strict=False)]
    assert len(lengths) == num_stages
    assert max(lengths) - min(lengths) <= 1


@given(st.lists(st.integers(1, 3000), min_size=1, max_size=30, unique=True), st.integers(1, 12))
def test_number_of_stages_is_what_was_asked_for_or_refused(checkpoints: list[int], num_stages: int) -> None:
    try:
        s = schedule(100, checkpoints, kind="equal", num_stages=num_stages)
    except ValueError as error:
        assert f"schedule.num_stages={num_stages}" in str(error)
    else:
        assert len(s.stages) == num_stages


def test_ten_stages_of_a_log_spaced_trajectory_are_equally_spaced() -> None:
    available = [25, 50, *range(100, 2001, 100)]
    stages = schedule(1000, available, kind="equal", num_stages=10).stages
    assert [stage.checkpoint for stage in stages] == list(range(200, 2001, 200))


@pytest.mark.parametrize(
    ("checkpoints", "num_stages", "marks", "chosen"),
    [
        ([100, 200, 1000], 2, "[500.0, 1000.0]", "[1000]"),
        ([1, 2, 4, 8, 1000], 4, "[250.0, 500.0, 750.0, 1000.0]", "[1000]"),
    ],
)
def test_marks_that_fall_on_too_few_checkpoints_are_refused(
    checkpoints: list[int], num_stages: int, marks: str, chosen: str
) -> None:
    with pytest.raises(ValueError) as refusal:
        schedule(10, checkpoints, kind="equal", num_stages=num_stages)
    said = (
        f"marks {marks} fall on only 1 of the checkpoints {checkpoints}, {chosen}: name {num_stages} of them"
    )
    assert said in str(refusal.value)


def test_one_stage_is_the_one_shot_schedule() -> None:
    assert schedule(10, kind="equal", num_stages=1) == schedule(10, kind="one_shot")


def test_two_shot_picks_the_checkpoint_in_the_phase_transition() -> None:
    # drops per doubling: 2: 0.1, 4: 0.1, 8: 2.0, 16: 0.3
    losses = {0: 9.0, 1: 5.0, 2: 4.9, 4: 4.8, 8: 2.8, 16: 2.5}
    assert steepest_checkpoint(losses) == 8
    s = schedule(10, LOG_SPACED, losses, kind="two_shot", early_share=0.5)
    assert by_step(s) == [8] * 5 + [128] * 5


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (
            {"kind": "explicit", "stages": [[0, 320]]},
            r"step 320, which the trajectory lacks; the nearest are \[300, 400\]",
        ),
        ({"kind": "one_shot", "checkpoints": [5000]}, r"step 5000, .* nearest are \[900, 1000\]"),
        ({"kind": "explicit", "stages": [[1, 100]]}, r"must start at step 0"),
        (
            {"kind": "explicit", "stages": [[0, 100], [5, 200], [5, 300]]},
            r"rise strictly, got first steps \[0, 5, 5\]",
        ),
        (
            {"kind": "explicit", "stages": [[0, 100], [10, 200]]},
            r"starts at step 10, after the budget of 10 steps",
        ),
        ({"kind": "n_t", "num_stages": 2, "stage_steps": 10}, r"starts at step 10, after the budget"),
        (
            {"kind": "two_shot", "checkpoints": [100], "early_share": 1.0},
            r"starts at step 10, after the budget",
        ),
        ({"kind": "equal", "num_stages": 11}, r"num_stages=11 but only 10 checkpoints"),
        ({"kind": "two_shot"}, r"no validation losses to pick it by"),
    ],
)
def test_schedule_that_the_trajectory_or_the_budget_does_not_allow_is_refused(
    keys: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        schedule(10, **keys)


def test_more_stages_than_steps_is_refused() -> None:
    with pytest.raises(ValueError, match="equal has .* stages for .* steps: set schedule.num_stages"):
        schedule(5, kind="equal")


def test_table_says_whether_it_ends_on_the_final_teacher() -> None:
    good, bad = schedule(10, kind="equal", num_stages=2).table(), schedule(3, kind="speed", speed=100).table()
    assert "ends on the final teacher: yes (final: step 1000)" in good
    assert "ends on the final teacher: NO (final: step 1000)" in bad
    rows = [line.split() for line in good.splitlines()[1:-1]]
    assert rows == [["0", "0", "-", "4", "500", "50.0%"], ["1", "5", "-", "9", "1000", "50.0%"]]


def test_json_of_a_schedule_holds_its_stages_in_samples() -> None:
    stored = json.loads(schedule(10, kind="equal", num_stages=2).to_json())
    assert stored == {
        "total_samples": 80,
        "batch_size": 8,
        "final_checkpoint": 1000,
        "unsettled": 0,
        "stages": [[0, 500], [40, 1000]],
    }


# ------------------------------------------------------------------------------------------------ saturation

WAITS = ScheduleConfig(kind="saturation", num_stages=3, patience=2, min_gain=0.1)


def walk(config: ScheduleConfig, accuracies: list[float], decided: Schedule | None = None) -> Schedule:
    """The schedule after validations of these accuracies, one every second step, from `decided` if resumed."""
    s, gained = decided or make_schedule(config, EVERY_100, {}, 20, BATCH), []
    for i, accuracy in enumerate(accuracies, start=1):
        s, gained = follow_student(s, config, 2 * BATCH * i, gained, accuracy)
    return s


def stages_of(s: Schedule) -> list[tuple[int, int]]:
    """(first student step, teacher step) of each stage."""
    return [(stage.first_sample // BATCH, stage.checkpoint) for stage in s.stages]


def test_an_adaptive_schedule_starts_with_its_first_checkpoint_and_prefetches_the_next() -> None:
    s = walk(WAITS, [])
    assert (stages_of(s), s.waiting) == ([(0, 400)], (700, 1000))
    assert s.upcoming(0)[0] == s.upcoming(99 * BATCH)[0] == 700
    assert "each when the student stops gaining: 700, 1000" in s.table()


def test_the_next_checkpoint_teaches_once_patience_validations_gained_less_than_asked() -> None:
    assert stages_of(walk(WAITS, [0.1, 0.3, 0.5])) == [(0, 400)]
    assert stages_of(walk(WAITS, [0.1, 0.3, 0.3])) == [(0, 400)]
    assert stages_of(walk(WAITS, [0.3, 0.3, 0.35])) == [(0, 400), (6, 700)]
    # The validation that decides is the first of the new stage, whose gain is counted afresh.
    assert stages_of(walk(WAITS, [0.3, 0.3, 0.35, 0.46, 0.5, 0.5])) == [(0, 400), (6, 700), (12, 1000)]
    assert stages_of(walk(WAITS, [0.3] * 9)) == [(0, 400), (6, 700), (10, 1000)]


@pytest.mark.parametrize(
    ("accuracies", "saturated"),
    [([0.5], False), ([0.5, 0.5], False), ([0.5, 0.5, 0.5], True), ([0.5, 0.625, 0.5], False), ([0.5, 0.25, 0.25], True)],
)  # fmt: skip
def test_a_gain_is_counted_against_the_best_before(accuracies: list[float], saturated: bool) -> None:
    assert is_saturated(accuracies, patience=2, min_gain=0.125) is saturated


def test_a_student_that_never_stops_gaining_stays_no_longer_than_stage_steps() -> None:
    limited = ScheduleConfig(kind="saturation", num_stages=3, stage_steps=6, min_gain=0.01)
    assert stages_of(walk(limited, [i / 10 for i in range(10)])) == [(0, 400), (6, 700), (12, 1000)]


def test_nothing_is_decided_at_the_end_of_the_budget() -> None:
    assert stages_of(walk(WAITS, [0.9] * 2 + [0.1] * 8))[-1][0] < 20
    late = [i / 10 for i in range(8)] + [0.7, 0.7]  # saturated at step 20 of 20
    assert stages_of(walk(WAITS, late)) == [(0, 400)]


@given(st.lists(st.integers(0, 10), min_size=1, max_size=9))
def test_a_resumed_run_repeats_the_decisions_on_record(tenths: list[int]) -> None:
    accuracies = [t / 10 for t in tenths]
    whole = walk(WAITS, accuracies)
    recorded = schedule_from_json(whole.to_json())
    assert recorded == whole
    assert walk(WAITS, accuracies, decided=recorded) == whole
    # Even where other hardware rounds a validation differently: what is on record stands.
    assert (
        walk(WAITS, [1 - a for a in accuracies], decided=recorded).stages[: len(whole.stages)] == whole.stages
    )


def test_an_adaptive_schedule_names_a_waiting_checkpoint_that_the_trajectory_lacks() -> None:
    with pytest.raises(ValueError, match="teacher step 250, which the trajectory lacks"):
        schedule(10, kind="saturation", checkpoints=[100, 250])


# ------------------------------------------------------------------------------------------------ scalars


@pytest.mark.parametrize(
    ("share", "value"),
    [(0.0, 2.0), (0.1, 2.0), (0.2, 2.0), (0.3, 1.5), (0.4, 1.0), (0.5, 5.0), (0.75, 6.0), (1.0, 7.0)],
)
def test_ramp_is_linear_between_its_points_and_flat_outside(share: float, value: float) -> None:
    ramp = [[0.2, 2.0], [0.4, 1.0], [0.5, 1.0], [0.5, 5.0], [1.0, 7.0]]  # two points at one share: a jump
    assert ramp_at(ramp, share) == pytest.approx(value)


def test_number_is_a_flat_ramp() -> None:
    assert [ramp_at(3.5, share) for share in (0, 0.5, 1)] == [3.5] * 3
    assert ramp_at([[0.5, 2.0]], 0.1) == ramp_at([[0.5, 2.0]], 0.9) == 2.0


def rates(steps: int, **keys: Any) -> list[float]:
    return [learning_rate(OptimConfig(lr=1.0, **keys), step, steps) for step in range(steps)]


def test_warm_up_rises_in_equal_parts_to_the_peak_and_never_starts_at_zero() -> None:
    assert rates(20, warmup_share=0.2, decay="constant") == [0.25, 0.5, 0.75, *[1.0] * 17]


def test_no_warm_up_starts_at_the_peak() -> None:
    assert rates(4, warmup_share=0.0, decay="constant") == [1.0] * 4


def test_cosine_falls_from_the_peak_to_the_final_share() -> None:
    values = rates(104, warmup_share=4 / 104, final_lr_share=0.1)
    assert values[4] == 1.0
    assert values[54] == pytest.approx(0.55)  # half way
    assert values[-1] == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * 0.99)))
    assert all(a >= b for a, b in zip(values[4:], values[5:], strict=False))


def test_wsd_is_flat_then_linear_and_never_reaches_zero_inside_the_run() -> None:
    assert rates(10, warmup_share=0.1, decay="wsd", decay_share=0.4) == pytest.approx(
        [1.0] * 7 + [0.75, 0.5, 0.25]
    )
    assert rates(10, warmup_share=0.1, decay="wsd", decay_share=0.4, final_lr_share=0.2)[-1] == pytest.approx(
        0.4
    )


def test_learning_rate_is_positive_in_every_step_of_any_length() -> None:
    for steps in range(1, 40):
        for decay in ("cosine", "wsd", "constant"):
            assert min(rates(steps, decay=decay, warmup_share=0.3)) > 0


@pytest.mark.parametrize(
    ("every", "first", "left"),
    [
        (0, 0, []),
        (10, 0, [10, 20, 30, 40]),
        (10, 1, [1, 2, 4, 8, 10, 20, 30, 40]),
        (10, 3, [3, 6, 10, 20, 30, 40]),
        (16, 1, [1, 2, 4, 8, 16, 32]),
        (10, 10, [10, 20, 30, 40]),
        (7, 5, [5, 7, 14, 21, 28, 35]),
    ],
)
def test_trajectory_starts_log_spaced_then_goes_on_in_equal_steps(
    every: int, first: int, left: list[int]
) -> None:
    assert [step for step in range(41) if is_trajectory_step(step, every, first)] == left

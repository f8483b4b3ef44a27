"""What a study found, in figures: a table of the arms, and each claim of the paper with its statistic."""

from __future__ import annotations

import math
from statistics import median
from typing import Any

from distill.experiments.arms import mean_and_spread, paired_t
from distill.experiments.parity.arms import SOLVED, Picks, arm_name
from distill.experiments.parity.runs import Arm, Curve
from distill.experiments.parity.settings import Settings

# Times the teacher's own steps within which hard labels and one-shot must not arrive; R1: about 9000.
LABELS_FAIL = 1.5
Correlations = list[dict[int, dict[str, Any]]]


def table(arms: list[Arm], curves: dict[str, Curve], teachers: Curve) -> str:
    """Markdown: steps to 95 % and final accuracy of every seed."""
    lines = [
        f"| | temperature | steps to {SOLVED:.0%}, a seed each | accuracy at the end | mean ± sd |",
        "|---" * 5 + "|",
    ]
    rows: list[tuple[str, float | None, Curve]] = [("teacher (its own run)", None, teachers)]
    rows += [(arm.title, arm.temperature, curves[arm.name]) for arm in arms]
    for title, temperature, curve in rows:
        reached = ", ".join("—" if step is None else str(step) for step in curve.steps_to(SOLVED))
        last = curve.accuracy[-1]
        mean, spread = mean_and_spread(last)
        temper = "" if temperature is None else f"{temperature:g}"
        accuracies = ", ".join(f"{a:.3f}" for a in last)
        lines.append(f"| {title} | {temper} | {reached} | {accuracies} | {mean:.3f} ± {spread:.3f} |")
    return "\n".join(lines)


def correlations_table(settings: Settings, picks: list[Picks], correlations: Correlations) -> str:
    """Markdown: mean |correlation| inside / off the support, the mean over seeds, at the checkpoints that teach."""
    degrees = range(1, settings.k)
    lines = ["| teacher's checkpoint | " + " | ".join(f"degree {m}, in / off" for m in degrees) + " |"]
    lines.append("|---" * (len(degrees) + 1) + "|")
    for name in ("before", "inside", "after", "final"):
        at = [_at(name, pick, by_step) for pick, by_step in zip(picks, correlations, strict=True)]
        cells = []
        for m in degrees:
            inside, _ = mean_and_spread([found["inside"][m] for found in at])
            outside, _ = mean_and_spread([found["outside"][m] for found in at])
            cells.append(f"{inside:.4f} / {outside:.4f}")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _at(name: str, picks: Picks, by_step: dict[int, dict[str, Any]]) -> dict[str, Any]:
    return by_step[max(by_step) if name == "final" else getattr(picks, name)]


def claims(
    settings: Settings,
    picks: list[Picks],
    curves: dict[str, Curve],
    teachers: Curve,
    correlations: Correlations,
) -> list[dict[str, Any]]:
    """Each claim of the paper at the coldest temperature: what was found, its statistic, whether it holds."""
    cold = min(settings.temperatures)
    names = ("one_shot", "progressive", "before", "inside", "after")
    arm = {"hard": curves["hard"], **{name: curves[arm_name(name, cold)] for name in names}}
    steps = {name: [_steps(step) for step in curve.steps_to(SOLVED)] for name, curve in arm.items()}
    own = [_steps(step) for step in teachers.steps_to(SOLVED)]
    ratios = [student / teacher for student, teacher in zip(steps["progressive"], own, strict=True)]
    saved = [teacher - student for student, teacher in zip(steps["inside"], own, strict=True)]
    same = arm["one_shot"] == arm["hard"]
    return [
        _claim(
            f"one-shot at temperature {cold:g} is the run on hard labels, to the bit, at every validation",
            "the same" if same else "different",
            same,
        ),
        _claim(
            "progressive: steps to 95 % over the teacher's own, median at most 1.4 (paper: about 1.0)",
            f"{median(ratios):.2f} of {_list(ratios, '.2f')}",
            median(ratios) <= 1.4,
            _t([ratio - 1 for ratio in ratios]),
        ),
        _claim(
            "2-shot inside the transition is done before the teacher itself, every seed",
            f"steps saved: {_list(saved, '.0f')}",
            min(saved) > 0,
            _t(saved),
        ),
        *[_fails_early(name, steps[name], own) for name in ("hard", "one_shot")],
        *[_later_than_inside(name, steps[name], steps["inside"]) for name in ("before", "after")],
        *_correlation_claims(settings, picks, correlations),
    ]


def _fails_early(name: str, steps: list[float], own: list[float]) -> dict[str, Any]:
    done = sum(step <= LABELS_FAIL * teacher for step, teacher in zip(steps, own, strict=True))
    claim = f"{name}: no seed at 95 % within {LABELS_FAIL} x its teacher's own steps"
    return _claim(claim, f"{done} of {len(steps)}", not done)


def _later_than_inside(name: str, steps: list[float], inside: list[float]) -> dict[str, Any]:
    later = [a - b if a != b else 0.0 for a, b in zip(steps, inside, strict=True)]
    done = sum(math.isfinite(step) for step in steps)
    found = f"{done} of {len(steps)} seeds at 95 %; steps later: {_list(later, '.0f')}"
    return _claim(
        f"2-shot {name} the transition fails, or is later than inside, every seed", found, min(later) > 0
    )


def _correlation_claims(
    settings: Settings, picks: list[Picks], correlations: Correlations
) -> list[dict[str, Any]]:
    if settings.k in (1, settings.d):
        return []  # no lower degree, or nothing off the support
    ratios = {
        name: [
            [at["inside"][m] / at["outside"][m] for m in range(1, settings.k)]
            for at in (_at(name, pick, by_step) for pick, by_step in zip(picks, correlations, strict=True))
        ]
        for name in ("inside", "final")
    }
    found = []
    for title, ratio_of in (
        ("degree-1 correlation", lambda by_degree: by_degree[0]),
        ("correlation of the degree that leaks most", max),
    ):
        inside, final = ([ratio_of(by_degree) for by_degree in ratios[name]] for name in ("inside", "final"))
        found += [
            _claim(
                f"{title} inside the transition: in support at least 3 x off support, every seed",
                _list(inside, ".1f"),
                min(inside) >= 3,
                _t([ratio - 1 for ratio in inside]),
            ),
            _claim(
                f"{title} of the final teacher: at most 2 x off support, every seed",
                _list(final, ".1f"),
                max(final) <= 2,
                _t([ratio - 1 for ratio in final]),
            ),
        ]
    return found


def _steps(step: int | None) -> float:
    return math.inf if step is None else float(step)


def _list(values: list[float], form: str) -> str:
    return ", ".join("never" if math.isinf(v) else format(v, form) for v in values)


def _t(differences: list[float]) -> str:
    """Student's t of the differences' mean against 0, where all are finite."""
    if len(differences) < 2 or any(math.isinf(d) for d in differences):
        return ""
    return f"t = {paired_t(differences):.1f}, {len(differences) - 1} df"


def _claim(claim: str, found: str, holds: bool, statistic: str = "") -> dict[str, Any]:
    return {"claim": claim, "found": found, "statistic": statistic, "holds": bool(holds)}


def claims_table(found: list[dict[str, Any]]) -> str:
    lines = ["| claim | found | statistic | holds |", "|---" * 4 + "|"]
    return "\n".join(
        lines
        + [
            f"| {c['claim']} | {c['found']} | {c['statistic']} | {'yes' if c['holds'] else 'NO'} |"
            for c in found
        ]
    )

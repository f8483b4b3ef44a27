"""Why distillation helps, at a size of seconds: students at their optimum, variance down, a teacher's error stays."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from distill.experiments.bayes_teacher import LABELS, Setting, draw, fit, main, quality, risk, study

SMALL = Setting(d=5, sizes=[25, 200], repeats=20, test_samples=4000)


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    return study(SMALL)


def mean_log_loss(found: dict[str, Any], num: int, name: str) -> float:
    return float(np.mean(found["students"][str(num)][name]["log_loss"]))


def test_bayes_logits_are_the_log_odds_of_the_two_densities() -> None:
    x, labels, logits = draw(Setting(d=3, norm_of_v=1.5), 50_000, np.random.default_rng(0))
    v = torch.tensor([1.5, 0.0, 0.0], dtype=torch.float64)
    log_odds = ((x + v).square().sum(1) - (x - v).square().sum(1)) / 2
    torch.testing.assert_close(logits, log_odds)
    by_labels, by_bayes = (risk(logits, p).mean().item() for p in (labels.double(), logits.sigmoid()))
    assert by_labels == pytest.approx(by_bayes, abs=0.01)


def test_student_of_a_linear_teacher_without_penalty_becomes_the_teacher() -> None:
    x, labels, bayes = (t[None] for t in draw(Setting(d=4), 60, np.random.default_rng(1)))
    weights = fit(x, labels, 3 * bayes + 0.5, l2=1e-12)
    torch.testing.assert_close(weights[0], torch.tensor([6.0, 0, 0, 0, 0.5]).double(), atol=1e-5, rtol=0)


def test_student_of_labels_is_where_the_gradient_vanishes_even_if_they_can_be_separated() -> None:
    x = torch.tensor([[[-2.0], [-1.0], [1.0], [2.0]]]).double()
    labels = torch.tensor([[0, 0, 1, 1]])
    weight, offset = fit(x, labels, None, l2=1e-3)[0]
    residual = (x[0, :, 0] * weight + offset).sigmoid() - labels[0]
    assert (residual @ x[0, :, 0] / 4 + 1e-3 * weight).abs() < 1e-9
    assert residual.sum().abs() < 1e-9


def test_quality_of_known_probabilities() -> None:
    logits = torch.tensor([0.8, 0.8, 0.8, 0.8, 0.3]).double().logit()
    q = quality(logits, torch.tensor([1, 1, 1, 0, 0]))
    assert q["log_loss"] == pytest.approx(-(3 * math.log(0.8) + math.log(0.2) + math.log(0.7)) / 5)
    assert q["brier"] == pytest.approx(2 * (3 * 0.04 + 0.64 + 0.09) / 5)
    assert q["ece"] == pytest.approx((abs(4 * 0.8 - 3) + abs(0.7 - 1)) / 5)
    assert q["error"] == pytest.approx(0.2)


def test_bayes_probabilities_beat_labels_most_where_samples_are_few(found: dict[str, Any]) -> None:
    gain = {
        num: mean_log_loss(found, num, LABELS) - mean_log_loss(found, num, "Bayes") for num in SMALL.sizes
    }
    assert gain[25] > gain[200] > 0


def test_soft_labels_lower_the_variance_of_the_risk_and_a_wrong_teachers_bias_stays(
    found: dict[str, Any],
) -> None:
    for num in SMALL.sizes:
        risks = found["risks"][str(num)]
        assert risks["Bayes"]["variance"] < 0.5 * risks[LABELS]["variance"]
        assert risks["Bayes"]["squared_bias"] < 0.1 * risks["over-confident (logit x 3)"]["squared_bias"]
    many = found["risks"]["200"]["biased (logit + 1.5)"]
    assert many["squared_bias"] > 10 * many["variance"]


def test_calibration_error_costs_log_loss_and_not_ranking(found: dict[str, Any]) -> None:
    over, bayes = found["teachers"]["over-confident (logit x 3)"], found["teachers"]["Bayes"]
    assert over["error"] == bayes["error"]
    assert over["log_loss"] > bayes["log_loss"] + 0.1
    assert over["ece"] > 5 * bayes["ece"]


def test_the_command_ends_in_tables_figures_and_a_picture(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--out", str(tmp_path / "b"), "--repeats", "2"]) == 0
    assert "| 1600 |" in capsys.readouterr().out
    assert json.loads((tmp_path / "b" / "results.json").read_text())["setting"]["repeats"] == 2
    assert (tmp_path / "b" / "curves.png").stat().st_size > 10_000
    with pytest.raises(SystemExit):
        main(["--repeats", "1"])
    assert "--repeats must be at least 2" in capsys.readouterr().err

"""Which checkpoint teaches best: information where it is known, complexity in closed form, the picks, the command."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import pytest
import torch

from distill.__main__ import main
from distill.probes.selectors import CLASSES, complexity, information_about, picks

N = 1024


def tokens(seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 8, (N,), generator=torch.Generator().manual_seed(seed))


def test_hidden_states_that_spell_a_token_tell_its_whole_entropy_and_noise_tells_nothing() -> None:
    draw = torch.Generator().manual_seed(1)
    spelled = torch.nn.functional.one_hot(tokens(), 8).double()
    noise = torch.randn(N, 8, generator=draw, dtype=torch.float64)
    assert information_about(spelled, tokens()) == pytest.approx(math.log(8), abs=0.15)
    assert information_about(noise, tokens()) < 0.02


def test_half_a_token_is_half_its_information() -> None:
    parity = (tokens() % 2)[:, None].double()
    assert information_about(parity, tokens()) == pytest.approx(math.log(2), abs=0.05)


def test_rare_tokens_share_a_class() -> None:
    ranks = tokens() + CLASSES  # all of them rare
    assert information_about(torch.nn.functional.one_hot(tokens(), 8).double(), ranks) < 0.01


def test_complexity_is_the_norm_of_the_least_squares_fit_to_what_the_teacher_adds() -> None:
    draw = torch.Generator().manual_seed(2)
    features = torch.randn(6, 9, generator=draw, dtype=torch.float64)
    residual = torch.randn(6, 4, generator=draw, dtype=torch.float64)
    weights = torch.linalg.pinv(features) @ residual  # of all W with H W = R that of least norm
    expected = math.sqrt(float(weights.square().sum()) / 6)
    assert complexity(residual, torch.linalg.inv(features @ features.T)) == pytest.approx(expected, rel=1e-9)


def test_each_selector_picks_by_its_own_figures() -> None:
    rows = [
        {"step": 1, "information_input": 1.0, "information_label": 0.1, "complexity": 0.1, "accuracy": 0.1},
        {"step": 2, "information_input": 0.9, "information_label": 0.9, "complexity": 0.3, "accuracy": 0.5},
        {"step": 3, "information_input": 0.2, "information_label": 1.2, "complexity": 0.9, "accuracy": 0.6},
    ]
    found = picks(rows)
    assert {name: step for name, (step, _) in found.items()} == {"information": 2, "complexity": 2}
    rows[1]["complexity"] = 1.5
    assert picks(rows)["complexity"][0] == 1


def test_the_command_tells_both_picks_and_binds_them_to_the_student(
    teacher_run: Path, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    def probe(*more: str) -> int:
        monkeypatch.setattr(
            sys, "argv",
            ["distill", "probe", str(teacher_run / "trajectory"), f"data.shards={shards}", "log.eval_samples=8",
             "model.overrides={hidden_size: 16, num_attention_heads: 2, num_hidden_layers: 1, intermediate_size: 32}",
             *more, "--out", str(tmp_path), "--ngrams", "2", "--sequences", "4", "--places", "1", "--steps", "4", "24",
             "--select"],
        )  # fmt: skip
        return main()

    assert probe() == 0
    shown = capsys.readouterr().out
    assert "| step | about a token read | about the label | sum | complexity |" in shown
    assert "most for information: step" in shown and "most for complexity: step" in shown
    rows = json.loads((tmp_path / "probe.json").read_text())["checkpoints"]
    assert [row["step"] for row in rows] == [4, 24] and all(row["complexity"] > 0 for row in rows)
    assert probe("seed=3") == 2
    assert "its student is" in capsys.readouterr().err

"""The map of schedules: fair arms, teachers where their names say, differences paired by seed, the whole in small."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import ROOT

from distill.config import fields_of
from distill.config_reader import load_config
from distill.experiments.schedule_map import CONFIGS, Cell, arms, cell_table, parse

LOSSES = {25: 6.5, 50: 6.0, 100: 5.9, 200: 5.9, 300: 5.0, 600: 4.8, 1000: 4.4, 2000: 4.2}
CELL = Cell(1000, 1.0, 16)


def test_the_arms_of_a_cell_differ_in_the_schedule_alone() -> None:
    leaves = [
        {
            key: value
            for key, _, value in fields_of(
                load_config(
                    [CONFIGS / "map_student.yaml"],
                    ["run_dir=r", "data.shards=s", *CELL.settings(), *arm.settings],
                )
            )
        }
        for arm in arms(Path("t"), LOSSES, CELL.budget).values()
    ]
    for key, value in leaves[0].items():
        assert all(leaf[key] == value for leaf in leaves) or key.startswith("schedule."), key


def test_a_cell_sets_budget_temperature_and_width() -> None:
    config = load_config(
        [CONFIGS / "map_student.yaml"],
        ["run_dir=r", "data.shards=s", "teacher.trajectory=t", *Cell(300, 0.0, 8).settings()],
    )
    assert (config.steps, config.objective.temperature, config.log.eval_every) == (300, 0.0, 30)
    assert config.model.overrides["hidden_size"] == 8 and config.model.overrides["intermediate_size"] == 16


def test_early_teachers_stand_before_inside_and_after_the_steepest_fall() -> None:
    known = arms(Path("t"), LOSSES, 1000)
    assert "schedule.checkpoints=[300,2000]" in known["inside_10"].settings
    assert "schedule.checkpoints=[50,2000]" in known["before_10"].settings
    assert "schedule.checkpoints=[1000,2000]" in known["after_10"].settings
    assert "schedule.early_share=0.05" in known["inside_5"].settings
    assert "schedule.stage_steps=20" in known["short"].settings


def test_an_arm_is_compared_with_one_shot_seed_by_seed() -> None:
    found = {
        "one_shot": [{"accuracy": a, "accuracy_half": a / 2, "hard": 5.0} for a in (0.10, 0.20, 0.30)],
        "equal": [{"accuracy": a, "accuracy_half": a / 2, "hard": 4.9} for a in (0.12, 0.21, 0.33)],
    }
    text = cell_table(CELL, found, {"one_shot": "one-shot", "equal": "10 equal stages"})
    assert "| one-shot | 10.00, 20.00, 30.00 | 20.00 |" in text
    assert (
        "| 10 equal stages | 12.00, 21.00, 33.00 | 22.00 | +2.00, +1.00, +3.00 | +2.00 ± 1.00 (3.5) | +1.00 | -0.100"
        in text
    )


def test_an_unknown_arm_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(["--arms", "insid_10"])
    assert "invalid choice: 'insid_10'" in capsys.readouterr().err


@pytest.mark.slow
def test_the_map_goes_from_shards_to_table_and_picture_and_a_second_command_adds_a_cell(
    shards: Path, tmp_path: Path
) -> None:
    (tmp_path / "shards").symlink_to(shards)
    quick = [
        "steps=20",
        "batch_size=8",
        "log.eval_samples=8",
        "save.trajectory_every=5",
        "save.trajectory_first=0",
    ]

    def command(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "distill.experiments.schedule_map", *quick, "--out", str(tmp_path), *arguments],
            capture_output=True, text=True, check=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        )  # fmt: skip

    first = command("--budgets", "10", "--seeds", "0", "--arms", "inside_20")
    assert "**10 steps, temperature 1, width 16**" in first.stdout
    both = command("--budgets", "10", "--temperatures", "0", "1", "--seeds", "0", "--arms", "inside_20")
    assert both.stdout.count("| one-shot (final teacher) |") == 2
    assert both.stdout.count("$ python") == 2  # temperature 0 alone was still to be trained
    assert set(json.loads((tmp_path / "map.json").read_text())["cells"]) == {"b10_t0_w16", "b10_t1_w16"}
    assert (tmp_path / "map.png").stat().st_size > 10_000

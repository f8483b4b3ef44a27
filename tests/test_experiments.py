"""The demo study: fair arms, and the whole of it from fetched text to table and picture, resumable."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from distill.config import fields_of, to_yaml
from distill.config_reader import load_config
from distill.experiments.arms import mean_and_spread, paired_t, steps_to, table, train_arm
from distill.experiments.wiki_books import CONFIGS, arms
from distill.run_folder import RunFolderError
from distill.schedule import is_trajectory_step, make_schedule

ROOT = Path(__file__).parent.parent
TINY = tuple(
    f"model.overrides.{k}" for k in ("hidden_size=16", "num_attention_heads=2", "intermediate_size=32")
)
QUICK = (
    "steps=20",
    "save.trajectory_every=2",
    "save.trajectory_first=0",
    "batch_size=8",
    "save.every=10",
    "log.every=2",
    "log.eval_every=10",
    "log.eval_samples=16",
    *TINY,
)


def test_the_arms_differ_in_teacher_objective_and_schedule_alone() -> None:
    configs = [
        load_config([CONFIGS / "demo_student.yaml"], ["run_dir=r", "data.shards=s", *arm.settings])
        for arm in arms(Path("t"))
    ]
    for key, _, value in fields_of(configs[0]):
        differs = any(dict((k, v) for k, _, v in fields_of(c))[key] != value for c in configs)
        assert not differs or key.split(".")[0] in ("teacher", "schedule", "objective"), key


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda p: p.stem)
def test_every_shipped_config_loads(path: Path) -> None:
    teacher = [] if "teacher" in path.stem else ["teacher.trajectory=t"]
    load_config([path], ["run_dir=r", "data.shards=s", *teacher])


@pytest.mark.parametrize(
    ("budget", "steps"), [((), 24_000), (("bert_60k",), 60_000), (("bert_120k",), 120_000)]
)
def test_the_papers_students_learn_from_every_8000th_checkpoint(budget: tuple[str, ...], steps: int) -> None:
    teacher = load_config([CONFIGS / "bert_teacher.yaml"], ["run_dir=r", "data.shards=s"])
    every, first = teacher.save.trajectory_every, teacher.save.trajectory_first
    left = [step for step in range(1, teacher.steps + 1) if is_trajectory_step(step, every, first)]
    files = [CONFIGS / f"{name}.yaml" for name in ("bert_student", *budget, "bert_progressive")]
    config = load_config(files, ["run_dir=r", "data.shards=s", "teacher.trajectory=t"])
    schedule = make_schedule(config.schedule, left, {}, config.steps, config.batch_size)
    assert [stage.checkpoint for stage in schedule.stages] == list(range(8000, 120_001, 8000))
    assert config.steps == steps


def test_a_finished_run_of_other_settings_is_not_taken_for_the_one_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = ["data.shards=s", "teacher.trajectory=t", "schedule.kind=one_shot"]
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    config = load_config([CONFIGS / "demo_student.yaml"], [f"run_dir={run_dir}", *asked])
    (run_dir / "config.yaml").write_text(to_yaml(config))
    (run_dir / "result.json").write_text('{"hard": 4.0}')
    (run_dir / "metrics.jsonl").write_text('{"kind": "train", "seconds": 90.0}\n')
    monkeypatch.setattr("distill.experiments.arms.run_command", None)  # nothing is left to run
    assert train_arm(run_dir, CONFIGS / "demo_student.yaml", asked) == {"hard": 4.0, "minutes": 1.5}
    with pytest.raises(RunFolderError, match="optim.lr: 0.012 -> 0.5"):
        train_arm(run_dir, CONFIGS / "demo_student.yaml", [*asked, "optim.lr=0.5"])


def write_curve(folder: Path, losses: dict[int, float]) -> Path:
    folder.mkdir()
    rows = [{"kind": "validation", "step": step, "hard": loss} for step, loss in losses.items()]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_steps_to_a_loss_are_linear_between_validations_and_infinite_if_never_reached(tmp_path: Path) -> None:
    run = write_curve(tmp_path / "run", {100: 5.0, 200: 4.0, 300: 3.0})
    assert steps_to(run, 5.0) == 100
    assert steps_to(run, 3.5) == 250
    assert steps_to(run, 2.9) == math.inf


def test_the_table_shows_spread_over_seeds_and_what_was_not_reached() -> None:
    results = {
        "a": [{"hard": 1.0, "steps": 10.0}, {"hard": 3.0, "steps": math.inf}],
        "b": [{"hard": 2.0}, {"hard": 2.0}],
    }
    lines = table(results, {"a": "A", "b": "B"}, {"hard": "loss", "steps": "steps"}).splitlines()
    assert lines[2:] == ["| A | 2.000 ± 1.414 | reached by 1 of 2 |", "| B | 2.000 ± 0.000 |  |"]
    assert mean_and_spread([5.0]) == (5.0, 0.0)


def test_t_of_paired_differences_is_students() -> None:
    assert paired_t([2.0, 0.3, -0.7]) == pytest.approx(0.6767, abs=1e-4)  # mean .5333, sd 1.3650, n 3
    assert paired_t([1.0, 1.0]) == math.inf
    assert paired_t([0.0, 0.0]) == 0.0


@pytest.fixture(scope="module")
def demo_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study folder whose text is the one that `make demo` fetched, if it did."""
    folder = tmp_path_factory.mktemp("demo") / "study"
    folder.mkdir()
    (ROOT / "work" / "demo" / "text").mkdir(parents=True, exist_ok=True)
    (folder / "text").symlink_to(ROOT / "work" / "demo" / "text")
    return folder


def start_study(folder: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "distill.experiments.wiki_books", "--out", str(folder), *QUICK]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )


def test_the_demo_goes_from_text_to_table_and_picture_over_a_ctrl_c_and_a_finished_one_prints_at_once(
    demo_folder: Path,
) -> None:
    study = start_study(demo_folder)
    while not (demo_folder / "runs" / "one_shot_seed0" / "metrics.jsonl").exists():
        assert study.poll() is None, study.communicate()
        time.sleep(0.1)
    study.send_signal(signal.SIGTERM)
    study.communicate()
    assert study.returncode == 143 or (demo_folder / "runs" / "one_shot_seed0" / "result.json").exists()

    output, errors = start_study(demo_folder).communicate()
    assert "| progressive |" in output, errors[-3000:]
    assert (demo_folder / "curves.png").stat().st_size > 10_000
    results = json.loads((demo_folder / "results.json").read_text())
    assert [len(results[arm]) for arm in ("teacher", "hard", "one_shot", "progressive")] == [1, 1, 1, 1]

    again, _ = start_study(demo_folder).communicate()
    assert "$ python" not in again
    assert again == output[output.index("\n| | ") :]


@pytest.mark.slow
def test_make_demo_in_a_clean_clone_ends_in_its_table_and_picture(tmp_path: Path) -> None:
    clone = tmp_path / "clone"
    subprocess.run(["git", "clone", "-q", str(ROOT), str(clone)], check=True)
    demo = subprocess.run(["make", "demo"], cwd=clone, capture_output=True, text=True)
    assert "| progressive |" in demo.stdout, demo.stderr[-3000:]
    assert (clone / "work" / "demo" / "curves.png").exists()
    again = subprocess.run(["make", "demo"], cwd=clone, capture_output=True, text=True)
    assert again.stdout.endswith(demo.stdout[demo.stdout.index("\n| | ") :])

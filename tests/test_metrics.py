"""Numbers that are reported are code: means, rows after a kill, the terminal's line, clocks."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch

from distill.kernels import divergence
from distill.metrics import (
    SUMS,
    Log,
    Stopwatch,
    Sums,
    keep_rows_until,
    means,
    peak_flops,
    read_rows,
    terminal_line,
)

pytestmark = pytest.mark.filterwarnings("ignore")  # of tensorboard, about numpy
CPU = torch.device("cpu")


def test_means_are_per_counted_token_and_nothing_counted_is_zero() -> None:
    sums = {"loss": 8.0, "soft": 4.0, "soft_ce": 6.0, "hard": 10.0, "num_correct": 1.0, "num_rows": 4.0}
    assert means(sums) == {"loss": 2.0, "soft": 1.0, "soft_ce": 1.5, "hard": 2.5, "accuracy": 0.25}
    assert set(means(dict.fromkeys(SUMS, 0.0)).values()) == {0.0}


def test_sums_add_up_over_micro_batches_and_start_where_a_saved_window_stood() -> None:
    logits = torch.randn(6, 9, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(6)
    whole, parts = Sums(CPU), Sums(CPU)
    whole.add(divergence(logits, logits + 1, labels, hard_weight=1.0))
    parts.add(divergence(logits[:2], logits[:2] + 1, labels[:2], hard_weight=1.0))
    parts = Sums(CPU, parts.read())
    parts.add(divergence(logits[2:], logits[2:] + 1, labels[2:], hard_weight=1.0))
    assert parts.read() == pytest.approx(whole.read(), rel=1e-6, abs=1e-6)
    assert whole.read()["num_rows"] == 6


def write(path: Path, steps: list[int], tail: str = "") -> None:
    path.write_text("".join(f'{{"kind": "train", "step": {s}}}\n' for s in steps) + tail)


@pytest.mark.parametrize(("step", "kept"), [(0, []), (3, [1, 2, 3]), (9, [1, 2, 3, 4])])
def test_rows_that_will_come_again_are_dropped(step: int, kept: list[int], tmp_path: Path) -> None:
    write(tmp_path / "m.jsonl", [1, 2, 3, 4], tail='{"kind": "tr')
    keep_rows_until(tmp_path / "m.jsonl", step)
    assert [row["step"] for row in read_rows(tmp_path / "m.jsonl")] == kept
    assert "tr" not in (tmp_path / "m.jsonl").read_text().replace("train", "")
    assert [p.name for p in tmp_path.iterdir()] == ["m.jsonl"]


def test_rows_of_a_run_that_starts_are_none(tmp_path: Path) -> None:
    keep_rows_until(tmp_path / "m.jsonl", 5)
    assert not (tmp_path / "m.jsonl").exists()


def test_rows_are_read_by_kind(tmp_path: Path) -> None:
    (tmp_path / "m.jsonl").write_text('{"kind": "train", "step": 1}\n{"kind": "validation", "step": 1}\n')
    assert [row["kind"] for row in read_rows(tmp_path / "m.jsonl", "validation")] == ["validation"]


def test_only_the_main_rank_writes(tmp_path: Path) -> None:
    silent = Log(tmp_path, 0, 10, is_main=False)
    silent.row("train", 1, {"loss": 1.0})
    silent.advance()
    silent.flush()
    silent.close()
    assert not list(tmp_path.iterdir())
    speaking = Log(tmp_path, 0, 10, is_main=True)
    speaking.row("train", 1, {"loss": 1.0})
    speaking.close()
    assert read_rows(tmp_path / "metrics.jsonl") == [{"kind": "train", "step": 1, "loss": 1.0}]


def test_terminal_line_is_one_line_of_what_is_there() -> None:
    values = {"loss": 1.25, "hard": 2.5, "accuracy": 0.25, "lr": 1e-3, "teacher_step": 40, "mfu": 0.5}
    line = terminal_line("train", 7, {**values, "teacher_share": 0.333, "stall_seconds": 1.26})
    assert line == (
        "train step 7  loss 1.250  labels 2.500  top-1 0.250  lr 1.0e-03  teacher 40  mfu 50.0%"
        "  teaching 33%  stall 1.3 s"
    )
    assert terminal_line("validation", 7, {"hard": 2.5}) == "validation step 7  labels 2.500"


def test_stopwatch_counts_the_time_inside_and_starts_anew_when_read() -> None:
    watch = Stopwatch(CPU)
    start = time.perf_counter()
    for _ in range(2):
        with watch:
            time.sleep(0.02)
    whole = time.perf_counter() - start
    assert 0.04 <= watch.take() <= whole
    assert watch.take() == 0


def test_peak_is_a_positive_number_where_the_device_is_unknown() -> None:
    assert peak_flops(CPU, torch.float32) > 1e6

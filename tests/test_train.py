"""The loop: what it refuses, when it stops, that it learns, and a pinned trace of its losses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny import (
    LENGTH,
    SIZES,
    TOKENIZER,
    VOCABULARY,
    assert_same_run,
    config,
    distill,
    rows,
    settings,
    text,
    write_text_shards,
)
from watch import Watch

import distill.train as loop
from distill import evaluate
from distill.build import layout
from distill.config import ObjectiveConfig
from distill.distributed import World
from distill.metrics import CLOCK, read_rows
from distill.models import ARCHITECTURES

GOLDEN = Path(__file__).parent / "golden" / "losses.json"


@pytest.mark.parametrize("task", ["mlm", "clm"])
def test_losses_follow_the_pinned_trace(task: str, shards: Path, tmp_path: Path) -> None:
    """1e-4 relative: other CPUs add in other orders. To renew it on purpose, write `found` to the file."""
    changes = {"data__task": task, "data__isolate_documents": task == "clm", "steps": 20, "log__every": 2}
    distill(["train", *settings(shards, tmp_path / "run", **changes, optim__lr=1e-2)], tmp_path).ok()
    found = {kind: [r["hard"] for r in rows(tmp_path / "run", kind)] for kind in ("train", "validation")}
    assert found == {k: pytest.approx(v, rel=1e-4) for k, v in json.loads(GOLDEN.read_text())[task].items()}


@pytest.mark.parametrize("architecture", [a for names in ARCHITECTURES.values() for a in names])
def test_every_architecture_learns(architecture: str, shards: Path, tmp_path: Path) -> None:
    task = next(task for task, names in ARCHITECTURES.items() if architecture in names)
    changes = {"data__task": task, "model__architecture": architecture, "data__isolate_documents": True}
    changes |= {"steps": 30, "optim__lr": 1e-2, "log__every": 5, "log__eval_every": 100, "save__every": 100}
    distill(["train", *settings(shards, tmp_path / "run", **changes)], tmp_path).ok()
    losses = [row["hard"] for row in rows(tmp_path / "run", "train")]
    assert losses[-1] < losses[0] - 0.1


def test_same_seed_same_run_other_seed_another(shards: Path, tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        distill(["train", *settings(shards, tmp_path / name, seed=seed, steps=4)], tmp_path).ok()
    assert_same_run(tmp_path / "a", tmp_path / "b")
    assert rows(tmp_path / "a") != rows(tmp_path / "c")


def test_rows_come_when_they_are_due_and_say_all_keys(
    shards: Path, teacher_run: Path, tmp_path: Path
) -> None:
    trajectory = str(teacher_run / "trajectory")
    distill(
        ["train", *settings(shards, tmp_path / "run", teacher__trajectory=trajectory, steps=7)], tmp_path
    ).ok()
    assert [r["step"] for r in rows(tmp_path / "run", "train")] == [3, 6]
    assert [r["step"] for r in rows(tmp_path / "run", "validation")] == [6, 7]
    train, validation = (
        read_rows(tmp_path / "run" / "metrics.jsonl", kind)[0] for kind in ("train", "validation")
    )
    assert set(train) == {
        "kind", "step", "samples", "loss", "soft", "soft_ce", "hard", "accuracy", "grad_norm", "lr", "teacher_step",
        "temperature", "weight_forward_kl", *CLOCK,
    }  # fmt: skip
    assert set(validation) == {"kind", "step", "hard", "accuracy", "perplexity"}
    assert train["samples"] == 24
    assert all(train[key] >= 0 for key in CLOCK)
    assert 0 <= train["teacher_share"] <= 1
    assert (
        0 < train["mfu"] < train["mfu_with_teacher"] < 1.34 * train["mfu"]
    )  # its forward, of a model as large
    assert 0 < train["swap_seconds"] <= train["stall_seconds"]
    assert (train["slowest_rank"], train["slowest_over_mean"]) == (0, 1.0)  # of one
    assert list((tmp_path / "run" / "tensorboard").iterdir())


@pytest.mark.filterwarnings("ignore")  # of DeepSpeed and torch, about each other
@pytest.mark.skipif(torch.cuda.is_available(), reason="replaces the clock of a CPU")
def test_seconds_of_a_row_are_those_of_its_steps_without_validations_and_saves(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]

    def lasting(seconds: float, function: Any) -> Any:
        def slow(*args: Any, **kwargs: Any) -> Any:
            now[0] += seconds
            return function(*args, **kwargs)

        return slow

    monkeypatch.setattr("distill.metrics.time", SimpleNamespace(perf_counter=lambda: now[0]))
    monkeypatch.setattr("distill.accounting.peak_flops", lambda *_: 1e9)
    monkeypatch.setattr(loop, "train_step", lasting(2, loop.train_step))
    monkeypatch.setattr(loop, "validate", lasting(1000, loop.validate))
    for name in ("save", "save_to_trajectory", "export"):
        monkeypatch.setattr(loop.checkpoint, name, lasting(1000, getattr(loop.checkpoint, name)))
    changes = {"save__every": 2, "log__eval_every": 2, "save__trajectory_every": 2, "steps": 6}
    loop.train(config(shards, tmp_path / "run", **changes))
    found = read_rows(tmp_path / "run" / "metrics.jsonl", "train")
    assert [row["seconds"] for row in found] == [6.0, 6.0]
    assert found[1]["tokens_per_second"] == pytest.approx(3 * 8 * LENGTH / 6.0, rel=0.1)


@pytest.mark.filterwarnings("ignore")  # of DeepSpeed and torch, about each other
def test_row_tells_the_slowest_rank_the_node_that_read_most_and_the_fullest(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own: list[list[float]] = []

    def of_four_ranks(values: list[float], world: World) -> list[list[float]]:
        own.append(values)
        return [[1.0, 0.0, 5.0], [3.0, 2e6, 4.0], [1.0, 1e6, 4.0], [1.0, 0.0, 4.0]]

    monkeypatch.setattr("distill.accounting.gather_from_ranks", of_four_ranks)
    loop.train(config(shards, tmp_path / "run", steps=3))
    (row,) = read_rows(tmp_path / "run" / "metrics.jsonl", "train")
    assert (row["slowest_rank"], row["slowest_over_mean"]) == (1, 2.0)
    assert (row["storage_mb_per_node"], row["memory_peak_gib"]) == (2.0, 5.0)
    assert row["mfu_with_teacher"] == row["mfu"]
    ((seconds, num_bytes, gib),) = own
    assert 0 < seconds < row["seconds"]
    assert num_bytes == 0
    assert 0.1 < gib < 64  # of this process


@pytest.mark.filterwarnings("ignore")  # of DeepSpeed and torch, about each other
def test_validation_takes_the_kernel_and_the_rows_at_once_of_the_config(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken, plain = [], evaluate.hard_labels

    def watched(config: ObjectiveConfig, vocab_size: int) -> Any:
        taken.append((config.kernel, config.chunk_rows))
        return plain(config, vocab_size)

    monkeypatch.setattr(evaluate, "hard_labels", watched)
    changes = {"objective__kernel": "reference", "objective__chunk_rows": 7}
    loop.train(config(shards, tmp_path / "run", **changes, steps=1))
    assert set(taken) == {("reference", 7)}


@pytest.mark.filterwarnings("ignore")  # of DeepSpeed and torch, about each other
@pytest.mark.parametrize(("task", "architecture"), [("mlm", "bert"), ("clm", "llama")])
def test_logits_of_all_rows_are_made_neither_in_training_nor_in_validation(
    task: str,
    architecture: str,
    shards: Path,
    teacher_run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("distill.accounting.peak_flops", lambda *_: 1e9)  # multiplies large matrices
    changes = {"data__task": task, "model__architecture": architecture, "data__mask_rate": 0.5, "steps": 2}
    if task == "mlm":
        changes["teacher__trajectory"] = str(teacher_run / "trajectory")
    one_chunk = 40
    for chunk_rows, most in ((one_chunk, one_chunk), (1000, 8 * LENGTH)):
        run = config(shards, tmp_path / str(chunk_rows), **changes, objective__chunk_rows=chunk_rows)
        with Watch(VOCABULARY) as watch:
            loop.train(run)
        assert one_chunk <= watch.most_rows <= most
    assert watch.most_rows > 2 * one_chunk  # there were more rows than a chunk has


# ------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("ranks", "batch", "micro", "expected"),
    [(1, 8, 0, (8, 1)), (1, 8, 2, (2, 4)), (2, 8, 0, (4, 1)), (4, 8, 1, (1, 2))],
)
def test_batch_is_laid_out_over_ranks(ranks: int, batch: int, micro: int, expected: tuple[int, int]) -> None:
    run = config(Path("s"), Path("r"), batch_size=batch, micro_batch_size=micro)
    assert layout(run, World(0, ranks, 0, torch.device("cpu"))) == expected


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "a batch that does not divide": (
        {"micro_batch_size": 3},
        "batch_size 8 must be 1 rank(s) x micro_batch_size 3 x a whole number",
    ),
    "a micro-batch beyond the batch": ({"micro_batch_size": 16}, "micro_batch_size 16 x a whole number"),
    "sequences longer than positions": (
        {"model__overrides": {**SIZES["bert"], "max_position_embeddings": LENGTH - 1}},
        "max_position_embeddings is 31, but the shards hold sequences of 32 tokens",
    ),
    "a model with fewer logits than tokens": (
        {"model__overrides": {**SIZES["bert"], "vocab_size": 100}},
        "the model has 100 logits, the shards' tokenizer 128 tokens",
    ),
    "an unknown architecture": ({"model__architecture": "bert", "data__task": "clm"}, "does not serve task clm"),
    "a typo in the model's keys": (
        {"model__overrides": {"num_layers": 3, "hiden_size": 32}},
        "no key of BertConfig",
    ),
    "weights to start from that are not there": ({"model__init_from": "/nowhere"}, "/nowhere can't be loaded"),
    "a trajectory that is not there": (
        {"teacher__trajectory": "/nowhere"},
        "/nowhere/manifest.json does not exist",
    ),
    "shards that are not there": ({"data__shards": "/nowhere"}, "/nowhere/index.json is missing"),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_run_that_can_not_be_is_refused_and_leaves_nothing(what: str, shards: Path, tmp_path: Path) -> None:
    changes, said = REFUSED[what]
    ended = distill(["train", *settings(shards, tmp_path / "run", **changes)], tmp_path)
    assert ended.code == 2, ended.output
    assert said in ended.output
    assert "Traceback" not in ended.output
    left = {p.name for p in (tmp_path / "run").rglob("*")}
    assert left <= {"run.lock"}


def test_shards_without_held_out_documents_are_refused(tmp_path: Path) -> None:
    def split(number: int, seed: int) -> Any:
        return text(number + 1, seed)[:number]

    empty = write_text_shards(tmp_path / "shards", validation=0, make=split)
    ended = distill(["train", *settings(empty, tmp_path / "run", steps=2)], tmp_path)
    assert ended.code == 2, ended.output
    assert "no held-out documents: run `python -m data_prep documents` with a larger" in ended.output
    assert "Traceback" not in ended.output


def test_settings_may_be_mended_after_a_refusal(shards: Path, tmp_path: Path) -> None:
    bad = {"model__overrides": {**SIZES["bert"], "vocab_size": 100}}
    assert distill(["train", *settings(shards, tmp_path / "run", **bad, steps=2)], tmp_path).code == 2
    distill(["train", *settings(shards, tmp_path / "run", steps=2)], tmp_path).ok()


def test_damaged_shards_stop_the_run_and_whole_ones_let_it_go_on(shards: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(shards, tmp_path / "copy"))
    good = (copy / "train-00002.tar").read_bytes()
    arguments = ["train", *settings(copy, tmp_path / "run", data__shuffle_window=1, steps=40)]
    for damage, said in (
        (lambda p: p.write_bytes(good[:5000] + b"\x00\x01" + good[5002:]), "has sha256"),
        (lambda p: p.write_bytes(good[:-512]), "bytes, "),
        (lambda p: p.unlink(), "is missing"),
    ):
        damage(copy / "train-00002.tar")
        ended = distill(arguments, tmp_path)
        assert ended.code == 2, ended.output
        assert "train-00002.tar" in ended.output and said in ended.output
        assert "Traceback" not in ended.output
        assert [p.parent.name for p in (tmp_path / "run").glob("checkpoints/*/state.json")][-1:] != []
    (copy / "train-00002.tar").write_bytes(good)
    distill(arguments, tmp_path).ok()
    distill(["train", *settings(shards, tmp_path / "calm", data__shuffle_window=1, steps=40)], tmp_path).ok()
    assert_same_run(tmp_path / "run", tmp_path / "calm")


@pytest.mark.parametrize("workers", [0, 2])
def test_damage_is_named_from_reader_processes_too(workers: int, shards: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(shards, tmp_path / "copy"))
    (copy / "train-00000.tar").write_bytes(b"")
    ended = distill(["train", *settings(copy, tmp_path / "run", data__num_workers=workers)], tmp_path)
    assert ended.code == 2, ended.output
    assert "train-00000.tar has 0 bytes" in ended.output


# ------------------------------------------------------------------------------------------------ divergence


@pytest.mark.parametrize(
    "due", ["log__every", "save__every", "log__eval_every", "steps", "save__trajectory_every"]
)
def test_loss_that_is_not_finite_stops_the_run_before_anything_is_saved(
    due: str, shards: Path, tmp_path: Path
) -> None:
    """Whatever comes first after it: a row, a checkpoint, a validation, the end or a trajectory checkpoint."""
    never = {"log__every": 1000, "save__every": 1000, "log__eval_every": 1000, "steps": 1000}
    changes: dict[str, Any] = {
        **never,
        due: 8,
        "optim__lr": 1e30,
        "optim__clip": 0.0,
        "optim__warmup_share": 0.0,
    }
    ended = distill(["train", *settings(shards, tmp_path / "run", **changes)], tmp_path)
    assert ended.code == 2, ended.output
    assert "lower optim.lr (1e+30) or lengthen the warm-up" in ended.output
    assert not list((tmp_path / "run").glob("checkpoints/*"))
    assert not list((tmp_path / "run").glob("trajectory/step*"))
    assert not (tmp_path / "run" / "result.json").exists()
    text_of_rows = tmp_path / "run" / "metrics.jsonl"
    assert not text_of_rows.exists() or "NaN" not in text_of_rows.read_text()


def test_batches_without_a_counted_token_change_nothing_and_end_nothing(tmp_path: Path) -> None:
    """All padding, or no maskable word: there is nothing to learn, and nothing to divide by."""

    def nothing(number: int, seed: int) -> Any:
        return text(number, seed) * 0 + TOKENIZER.pad_id

    empty = write_text_shards(tmp_path / "shards", make=nothing)
    distill(["train", *settings(empty, tmp_path / "run", steps=3, log__every=1)], tmp_path).ok()
    assert [(r["loss"], r["grad_norm"]) for r in rows(tmp_path / "run", "train")] == [(0.0, 0.0)] * 3

"""A teacher that streams says what the checkpoint says, to the bit, whatever happens on the way; or nothing."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from storage import FAULTS, Seaweed, fault_proxy
from tiny import (
    LENGTH,
    SIZES,
    TOKENIZER,
    VOCABULARY,
    Ended,
    Kill,
    Started,
    assert_same_run,
    config,
    rank_environs,
    rows,
    settings,
)

import distill.build
from distill.config import Config
from distill.data import Batch
from distill.distributed import start
from distill.models import DTYPES, Inputs, Rows, build_model, counted_rows
from distill.pretrained import load_model
from distill.teacher import Teacher
from distill.train import train
from distill.trajectory import store as store_module
from distill.trajectory.audit.verdicts import refuse_bad_steps
from distill.trajectory.cache import Cache
from distill.trajectory.fetch import Fetcher
from distill.trajectory.index import index_trajectory
from distill.trajectory.manifest import BadTrajectory, Manifest, load_manifest
from distill.trajectory.nodes import Nodes
from distill.trajectory.publish import publish
from distill.trajectory.store import StoreError, open_store
from distill.trajectory.weights import find_tensors

pytestmark = pytest.mark.filterwarnings("ignore")  # of DeepSpeed and torch, about each other

INPUTS = Inputs(torch.arange(2 * LENGTH).view(2, LENGTH) % VOCABULARY, None, None)
ROWS = torch.arange(LENGTH)


def teacher_of(trajectory: str | Path, cache: Path | str = "", **changes: Any) -> Teacher:
    changes = {"teacher__trajectory": str(trajectory), "teacher__cache": str(cache), **changes}
    settings = config(Path("shards"), Path("run"), **changes)
    return Teacher(load_manifest(trajectory), settings, TOKENIZER, LENGTH, start())


def logits(said: Rows) -> torch.Tensor:
    with torch.no_grad():
        return said.head(said.hidden_ND)


def logits_of(folder: Path, task: str = "mlm", dtype: str = "fp32") -> torch.Tensor:
    """What transformers makes of a checkpoint."""
    with torch.no_grad():
        return logits(counted_rows(load_model(task, folder, DTYPES[dtype], LENGTH).eval(), INPUTS, ROWS))


@pytest.fixture(scope="module")
def there(seaweed: Seaweed, teacher_run: Path) -> Iterator[str]:
    """URL of the teacher's trajectory on the S3 server."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in seaweed.environ.items():
            patch.setenv(name, value)
        yield publish(teacher_run / "trajectory", "s3://teacher/streamed").url


# ------------------------------------------------------------------------------------------------ weights


@pytest.mark.parametrize("architecture", SIZES)
def test_swapped_in_weights_are_those_that_transformers_loads(architecture: str, tmp_path: Path) -> None:
    """Sharded or not, stored as fp32 or fp16, taught from as fp32 or bf16, whole or as ZeRO 3 holds them."""
    task = "mlm" if "bert" in architecture else "clm"
    for step in (1, 2):
        model = build_model(
            task,
            architecture,
            {**SIZES[architecture], "initializer_range": 0.3},
            vocab_size=VOCABULARY,
            sequence_length=LENGTH,
            special_ids={"pad_token_id": 0},
            seed=step,
        )
        if step == 2:
            model = model.half()
        model.save_pretrained(tmp_path / f"step_{step}", max_shard_size="40KB" if step == 2 else "5GB")
    assert (tmp_path / "step_2" / "model.safetensors.index.json").exists()
    index_trajectory(tmp_path)
    for dtype in ("fp32", "bf16"):
        for zero_stage in (0, 3):
            keys = {"data__task": task, "model__architecture": architecture, "teacher__dtype": dtype}
            teacher = teacher_of(tmp_path, **keys, teacher__zero_stage=zero_stage)
            for step in (1, 2, 1):
                teacher.use(step, [3 - step])
                expected = logits_of(tmp_path / f"step_{step}", task, dtype)
                assert torch.equal(logits(teacher.rows(INPUTS, ROWS)), expected)
            teacher.close()


def rewrite(folder: Path, change: Any) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, {"format": "pt"})


def reconfigure(folder: Path, **keys: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **keys}))


BIAS = "cls.predictions.bias"
UNUSABLE = {
    "lacks a weight": (lambda f: rewrite(f, lambda t: t.pop(BIAS)), "lacks the weights cls.predictions.bias"),
    "another shape": (
        lambda f: rewrite(f, lambda t: t.update({BIAS: torch.zeros(3)})),
        r"cls.predictions.bias is \[3\] in the weights and \[128\] in the model",
    ),
    "not finite": (
        lambda f: rewrite(f, lambda t: t[BIAS].__setitem__(7, float("nan"))),
        "cls.predictions.bias holds values that are not finite",
    ),
    "another config": (
        lambda f: reconfigure(f, layer_norm_eps=1e-3),
        "config.json has another layer_norm_eps than the checkpoint that taught first: 0.001, not 1e-12",
    ),
}


@pytest.mark.parametrize("zero_stage", [0, 3])
@pytest.mark.parametrize("what", UNUSABLE)
def test_checkpoint_that_the_model_can_not_hold_is_refused_and_the_last_one_stays(
    what: str, zero_stage: int, teacher_run: Path, tmp_path: Path
) -> None:
    spoil, said = UNUSABLE[what]
    for step in ("step_00000004", "step_00000008"):
        shutil.copytree(teacher_run / "trajectory" / step, tmp_path / step)
    spoil(tmp_path / "step_00000008")
    manifest = index_trajectory(tmp_path)
    manifest.tokenizer_sha256 = None  # the tests' tokenizer is known by another name
    manifest.write()
    teacher = teacher_of(tmp_path, teacher__zero_stage=zero_stage)
    teacher.use(4, [8])
    before = logits(teacher.rows(INPUTS, ROWS))
    with pytest.raises(BadTrajectory, match=f"teacher step 8: .*{said}"):
        teacher.use(8)
    assert torch.equal(logits(teacher.rows(INPUTS, ROWS)), before)
    teacher.close()


# ------------------------------------------------------------------------------------------------ runs

STAGES = {"schedule__kind": "explicit", "schedule__stages": [[0, 2], [3, 8], [5, 4], [7, 24]], "steps": 9}


class InMemory:
    """The reference: all checkpoints of the trajectory as transformers loads them, none fetched, none overwritten."""

    swap_seconds, bytes_read, work = 0.0, 0, None

    def __init__(self, manifest: Manifest, config: Config, *_: Any) -> None:
        self.models = {
            step: load_model(
                config.data.task, Path(manifest.url) / c.location, DTYPES[config.teacher.dtype], LENGTH
            ).eval()
            for step, c in manifest.checkpoints.items()
        }

    def follow(self, schedule: Any, consumed: int) -> float:
        self.model = self.models[schedule.checkpoint_at(consumed)]
        return 0.0

    def await_next(self, schedule: Any, consumed: int) -> bool:
        return True

    @torch.no_grad()
    def signal(self, batch: Batch) -> Rows:
        return counted_rows(self.model, batch.inputs, batch.rows_N)

    def close(self) -> None: ...


class TeachFromMemory:
    """What a started process does first."""

    def arm(self) -> None:
        distill.build.Teacher = InMemory  # type: ignore[misc]


def run_ranks(
    arguments: list[str], folder: Path, size: int, environ: dict[str, str], patch: Any = None
) -> list[str]:
    """Run `distill ARGUMENTS` on ranks that each have a disk of their own, $DISK. Returns what they wrote."""
    return [ended.ok().output for ended in ranks_ended(arguments, folder, size, environ, patch)]


def ranks_ended(
    arguments: list[str], folder: Path, size: int, environ: dict[str, str], patch: Any = None
) -> list[Ended]:
    folder.mkdir()
    started = []
    for rank, own in enumerate(rank_environs(size)):
        own = {**environ, **own, "DISK": str(folder / f"disk{rank}")}
        started.append(Started(arguments, folder / f"output{rank}", own, patch))
    return [each.wait() for each in started]


def student(shards: Path, run_dir: Path, trajectory: str | Path, **changes: Any) -> list[str]:
    keys = {"teacher__trajectory": str(trajectory), "log__every": 1, **STAGES, **changes}
    return settings(shards, run_dir, **keys)


@pytest.fixture(scope="module")
def from_memory(shards: Path, teacher_run: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """The same student taught from memory, by number of ranks."""
    folder, runs = tmp_path_factory.mktemp("memory"), {}
    for size in (1, 2):
        runs[size] = folder / f"run{size}"
        arguments = ["train", *student(shards, runs[size], teacher_run / "trajectory")]
        run_ranks(arguments, folder / f"ranks{size}", size, {}, TeachFromMemory())
    return runs


@pytest.mark.dist
@pytest.mark.parametrize("zero_stage", [0, 3])
@pytest.mark.parametrize("size", [1, 2])
def test_run_that_streams_from_storage_is_the_run_with_all_teachers_in_memory_to_the_bit(
    size: int, zero_stage: int, there: str, seaweed: Seaweed, shards: Path, from_memory: dict[int, Path],
    tmp_path: Path,
) -> None:  # fmt: skip
    keys = {"teacher__zero_stage": zero_stage, "teacher__cache": "$DISK"}
    arguments = ["train", *student(shards, tmp_path / "run", there, **keys)]
    said = run_ranks(arguments, tmp_path / "ranks", size, seaweed.environ)
    assert_same_run(tmp_path / "run", from_memory[size])
    assert [row["teacher_step"] for row in rows(tmp_path / "run", "train")] == [2] * 3 + [8] * 2 + [4] * 2 + [
        24
    ] * 2
    for output in said:
        assert output.count("MB fetched") == 4
    for disk in (tmp_path / "ranks").glob("disk*"):
        assert len(list(disk.iterdir())) == 4


@pytest.mark.dist
def test_every_byte_leaves_storage_once_for_four_nodes(
    there: str, seaweed: Seaweed, shards: Path, tmp_path: Path
) -> None:
    keys = {"schedule__kind": "one_shot", "schedule__stages": [], "steps": 1, "teacher__cache": "$DISK"}
    arguments = ["train", *student(shards, tmp_path / "run", there, **keys)]
    said = run_ranks(arguments, tmp_path / "ranks", 4, seaweed.environ)
    figures = [
        re.search(r"step 24: ([\d.]+) MB fetched in .* s, ([\d.]+) MB of it", output) for output in said
    ]
    whole, own = float(figures[0][1]), [float(f[2]) for f in figures if f]
    assert len(own) == 4
    assert sum(own) == pytest.approx(whole, rel=0.05)
    assert max(own) < 0.3 * whole


FETCHES = {  # where the signal comes: the step after which the run leaves
    "the first teacher": (Kill("distill.trajectory.fetch:Transfer._read", 1, number=signal.SIGTERM), 0),
    "the next, beside a step": (Kill("distill.engine:Engine.backward", 1, number=signal.SIGTERM), 1),
    "the next, waited for": (
        Kill("distill.trajectory.stream:CheckpointStream.is_ready", 1, number=signal.SIGTERM),
        3,
    ),
}


@pytest.mark.dist
@pytest.mark.parametrize("size", [1, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize("what", FETCHES)
def test_run_told_to_stop_while_it_fetches_gives_the_fetch_up_saves_and_goes_on_to_the_same_bits(
    what: str,
    size: int,
    there: str,
    seaweed: Seaweed,
    shards: Path,
    from_memory: dict[int, Path],
    tmp_path: Path,
) -> None:
    kill, step = FETCHES[what]
    arguments = ["train", *student(shards, tmp_path / "run", there, teacher__cache="$DISK")]
    with fault_proxy(seaweed.address, {"latency": 1.0}, latency=0.5) as slow:
        stopped = ranks_ended(arguments, tmp_path / "stopped", size, slow.environ, kill)
    for ended in stopped:
        assert ended.code == 143, ended.output
        assert f"stopped by signal 15 after step {step};" in ended.output
    saved = [p.name for p in (tmp_path / "run" / "checkpoints").glob("step_*")]
    assert saved == [f"step_{step:08d}"] * (step > 0)
    for disk in (tmp_path / "stopped").glob("disk*"):
        assert [p.name[:13] for p in disk.iterdir()] == ["step_00000002"] * (step > 0)
    run_ranks(arguments, tmp_path / "ranks", size, seaweed.environ)
    assert_same_run(tmp_path / "run", from_memory[size])


def test_local_trajectory_is_read_where_it_lies(
    shards: Path,
    teacher_run: Path,
    from_memory: dict[int, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    changes = {"teacher__trajectory": str(teacher_run / "trajectory"), "log__every": 1, **STAGES}
    train(config(shards, tmp_path / "run", **changes))
    assert_same_run(tmp_path / "run", from_memory[1])
    assert not (tmp_path / "cache").exists()


# ------------------------------------------------------------------------------------------------ cache and storage


def fetcher_of(where: str | Manifest, cache: Path, budget: int = 0) -> Fetcher:
    manifest = load_manifest(where) if isinstance(where, str) else where
    return Fetcher(manifest, Nodes(start(), "here"), Cache(cache, budget), in_place=False)


def entry(cache: Path) -> Path:
    (found,) = cache.iterdir()
    return found


def test_second_use_of_an_entry_reads_nothing_from_storage(there: str, tmp_path: Path) -> None:
    with fetcher_of(there, tmp_path).at_hand(8):
        pass
    again = fetcher_of(there, tmp_path)
    before = again.manifest.store.bytes_read
    with again.at_hand(8) as folder:
        assert (folder / "model.safetensors").stat().st_size > 1000
    assert again.manifest.store.bytes_read == before


def flip_a_byte(path: Path) -> None:
    spoilt = bytearray(path.read_bytes())
    spoilt[len(spoilt) // 2] ^= 1
    path.write_bytes(spoilt)


def test_entry_that_was_changed_on_disk_is_fetched_again(
    there: str, teacher_run: Path, tmp_path: Path
) -> None:
    with fetcher_of(there, tmp_path).at_hand(8):
        pass
    flip_a_byte(entry(tmp_path) / "model.safetensors")
    with fetcher_of(there, tmp_path).at_hand(8) as folder:
        original = teacher_run / "trajectory" / "step_00000008" / "model.safetensors"
        assert (folder / "model.safetensors").read_bytes() == original.read_bytes()


def test_entry_that_another_process_damaged_and_holds_is_not_used(there: str, tmp_path: Path) -> None:
    with fetcher_of(there, tmp_path).at_hand(8):
        pass
    damaged = entry(tmp_path)
    flip_a_byte(damaged / "model.safetensors")
    holds = (
        "import sys, time; from pathlib import Path; from distill.trajectory.cache import Cache\n"
        "held = Cache(Path(sys.argv[1])).hold(sys.argv[2]); print('holds', flush=True); time.sleep(100)"
    )
    command = [sys.executable, "-c", holds, str(tmp_path), damaged.name]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout and other.stdout.readline() == "holds\n"
        said = f"model.safetensors has sha256 .* other processes use it: end them, and remove {damaged}"
        with pytest.raises(BadTrajectory, match=said), fetcher_of(there, tmp_path).at_hand(8):
            pass
        other.kill()
    with fetcher_of(there, tmp_path).at_hand(8):  # and when it has gone, it is fetched again
        pass
    assert entry(tmp_path) == damaged


def test_weights_without_a_hash_teach_nobody(
    teacher_run: Path, shards: Path, bucket: str, seaweed: Seaweed, tmp_path: Path
) -> None:
    """Nothing would tell them from others of the same size. The command that the refusal names hashes what is needed."""
    publish(teacher_run / "trajectory", bucket)
    open_store(bucket).write("manifest.json", b"{}")
    manifest = index_trajectory(bucket)
    assert not manifest.checkpoints[8].is_hashed
    said = rf"no sha256 of the weights of teacher steps \[8, 24\].*: `distill trajectory index {bucket} --full --steps 8,24`"
    with pytest.raises(BadTrajectory, match=said):
        refuse_bad_steps(manifest, [8, 24])
    with pytest.raises(BadTrajectory, match="has no sha256"), fetcher_of(manifest, tmp_path).at_hand(8):
        pass
    hashed = index_trajectory(bucket, full=True, steps=[8, 24])
    refuse_bad_steps(hashed, [8, 24])
    assert [step for step, c in hashed.checkpoints.items() if c.is_hashed] == [8, 24]
    with pytest.raises(ValueError, match=r"has no steps \[9\]; it has \[2, 4, 8, 16, 24\]"):
        index_trajectory(bucket, full=True, steps=[8, 9])


@pytest.mark.parametrize("content", ["{}", "[]", '{"weight_map": {"a": "../other/model.safetensors"}}'])
def test_index_of_weights_that_is_none_or_leads_elsewhere_is_refused(content: str, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(BadTrajectory, match="is no index of weights|does not lie beside it"):
        find_tensors(tmp_path)


def test_file_that_is_damaged_in_storage_is_refused_and_leaves_nothing(
    teacher_run: Path, bucket: str, tmp_path: Path
) -> None:
    shutil.copytree(teacher_run / "trajectory", tmp_path / "source")
    publish(tmp_path / "source", bucket)
    damaged = tmp_path / "source" / "step_00000008" / "model.safetensors"
    flip_a_byte(damaged)
    fetcher = fetcher_of(bucket, tmp_path / "cache")
    fetcher.manifest.store.upload(damaged, "step_00000008/model.safetensors")
    said = "teacher step 8: .*model.safetensors does not have the sha256 .* in 3 fetches: .* upload it again"
    with pytest.raises(BadTrajectory, match=said), fetcher.at_hand(8):
        pass
    assert list((tmp_path / "cache").iterdir()) == []


def test_cache_too_small_for_a_teacher_says_so(there: str, tmp_path: Path) -> None:
    with (
        pytest.raises(OSError, match=r"raise teacher\.cache_gb"),
        fetcher_of(there, tmp_path, 1000).at_hand(8),
    ):
        pass


def test_run_that_leaves_gives_up_what_it_fetches_ahead(
    there: str, seaweed: Seaweed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with fault_proxy(seaweed.address, {"latency": 1.0}, latency=0.3) as proxy:
        for name, value in proxy.environ.items():
            monkeypatch.setenv(name, value)
        teacher = teacher_of(there, tmp_path)
        teacher.use(2, [8])
        teacher.close()
        for thread in threading.enumerate():
            if thread.name.startswith("next-teacher"):
                thread.join(20)
                assert not thread.is_alive()
        assert [p.name[:13] for p in tmp_path.iterdir()] == ["step_00000002"]


# ------------------------------------------------------------------------------------------------ faults


def digest(teacher: Teacher) -> str:
    assert teacher.model is not None
    hashed = hashlib.sha256()
    for name, tensor in sorted(teacher.model.state_dict().items()):
        hashed.update(name.encode() + tensor.contiguous().numpy().tobytes())
    return hashed.hexdigest()


def swap_among_faults(
    there: str, seaweed: Seaweed, folder: Path, patch: pytest.MonkeyPatch, least: int
) -> None:
    """Swap to and fro until that many answers were spoilt, with room for one checkpoint on the disk.

    Each swap ends in the right weights, or in a clear error with the weights before; the disk has whole entries only.
    """
    for name in ("FIRST_PAUSE", "LONGEST_PAUSE"):
        patch.setattr(store_module, name, 0.002)
    manifest = load_manifest(there)
    truth = {}
    right = teacher_of(there, folder / "right")
    for step in manifest.checkpoints:
        right.use(step)
        truth[step] = digest(right)
    right.close()
    budget = 1.5 * max(c.num_bytes for c in manifest.checkpoints.values()) / 1e9
    rates = {fault: 0.07 for fault in FAULTS}
    with fault_proxy(seaweed.address, rates, seed=3, latency=0.001) as proxy:
        for name, value in proxy.environ.items():
            patch.setenv(name, value)
        proxy.paused = True
        teacher = teacher_of(there, folder / "cache", teacher__cache_gb=budget)
        teacher.use(2)
        proxy.paused = False
        swaps, errors, now, steps = 0, 0, 2, list(manifest.checkpoints)
        while proxy.injected.total() < least:
            step = steps[swaps % len(steps)]
            try:
                teacher.use(step)
                now = step
            except (BadTrajectory, StoreError) as error:
                errors += 1
                assert re.search(r"damaged|replaced|attempts|truncated|can't be reached", str(error)), error
                teacher._stream._pending = None  # a run would end here
            assert digest(teacher) == truth[now]
            swaps += 1
        teacher.close()
    print(f"{swaps} swaps, {errors} refused, {dict(proxy.injected)}")
    assert swaps > 2 * errors
    assert set(proxy.injected) == set(FAULTS) - {"stale"}  # nothing is ever replaced here
    for found in (folder / "cache").iterdir():
        assert found.name.startswith("step_")
        step = int(found.name[5:13])
        for name, (size, sha) in manifest.checkpoints[step].files.items():
            content = (found / name).read_bytes()
            assert (len(content), hashlib.sha256(content).hexdigest()) == (size, sha)


def test_swaps_among_a_hundred_faults_never_load_a_wrong_weight(
    there: str, seaweed: Seaweed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    swap_among_faults(there, seaweed, tmp_path, monkeypatch, 100)


@pytest.mark.slow
def test_swaps_among_a_thousand_faults_never_load_a_wrong_weight(
    there: str, seaweed: Seaweed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    swap_among_faults(there, seaweed, tmp_path, monkeypatch, 1000)

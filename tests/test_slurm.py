"""The batch scripts on a real SLURM cluster: whatever the scheduler or a node does, the run ends with the same bits."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from slurm_cluster import Cluster, Job, Unavailable, cluster, read, wait_for
from tiny import ROOT, assert_same_run, rows, settings

from distill.targets.header import load_header
from distill.targets.writer import finished
from tests.corpora import multistream, page
from tests.shard_folders import TOPICS

pytestmark = pytest.mark.dist
STEPS = 100
STUDENT: dict[str, Any] = {
    "steps": STEPS,
    "log__every": 1,  # so that a test sees how far a run is
    "log__eval_every": STEPS,
    "save__every": 30,
    "objective__weights": {"forward_kl": 1.0, "hard": 0.5},
    "schedule__kind": "explicit",
    "schedule__stages": [[0, 2], [35, 8], [70, 24]],
}


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Three nodes; runs take two of them."""
    if not (ROOT / ".venv" / "bin" / "activate").exists():
        pytest.skip("slurm/env.sh activates .venv, which is not there: make venv")
    try:
        with cluster(tmp_path_factory.mktemp("slurm"), 3) as started:
            started.environ |= {"DISTILL_HOME": str(ROOT), "OMP_NUM_THREADS": "1"}
            yield started
    except Unavailable as reason:
        pytest.skip(f"no SLURM cluster on this machine: {reason}")


@pytest.fixture(scope="module")
def arguments(shards: Path, teacher_run: Path) -> Callable[..., list[str]]:
    """Settings of the student whose run is in the given folder."""

    def of(run_dir: Path, **changes: Any) -> list[str]:
        trajectory = str(teacher_run / "trajectory")
        return settings(shards, run_dir, teacher__trajectory=trajectory, **{**STUDENT, **changes})

    return of


Submit = Callable[..., Job]


@pytest.fixture
def submit(slurm: Cluster, arguments: Callable[..., list[str]], tmp_path: Path) -> Iterator[Submit]:
    """`sbatch slurm/train.sbatch` on two nodes, for the run in tmp_path/run. What is left of the jobs is cancelled."""
    yield lambda *options, **changes: slurm.submit(
        "--nodes=2",
        *options,
        str(ROOT / "slurm/train.sbatch"),
        *arguments(tmp_path / "run", **changes),
        folder=tmp_path,
    )
    slurm.command("scancel", "--user=root")
    wait_for(lambda: not slurm.command("squeue", "--noheader"), "an empty queue")


@pytest.fixture(scope="module")
def calm(
    slurm: Cluster, arguments: Callable[..., list[str]], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Folder of the run that nobody disturbed, with its log."""
    folder = tmp_path_factory.mktemp("calm")
    job = slurm.submit(
        "--nodes=2", str(ROOT / "slurm/train.sbatch"), *arguments(folder / "run"), folder=folder
    )
    slurm.wait(job, "COMPLETED")
    job.log.rename(folder / "log")
    return folder


def is_at(run_dir: Path, step: int) -> Callable[[], bool]:
    return lambda: (
        (run_dir / "metrics.jsonl").exists()
        and rows(run_dir)[-1:] != []
        and rows(run_dir)[-1]["step"] >= step
    )


def logs_in(folder: Path) -> str:
    return "\n".join(map(read, sorted(folder.glob("*.log"))))


def rank_pid(job: Job, rank: int) -> int | None:
    """The process of a rank, as this machine numbers it; not srun's, which has rank 0's variables from its batch script."""
    wanted = {f"SLURM_JOB_ID={job.number}".encode(), f"SLURM_PROCID={rank}".encode()}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            in_job = wanted <= set((process / "environ").read_bytes().split(b"\0"))
            command = (process / "cmdline").read_bytes().split(b"\0")
            if in_job and b"python" in command[0] and b"train" in command:
                return int(process.name)
        except OSError:  # it has ended
            continue
    return None


def strike(job: Job, rank: int, number: int) -> None:
    pid = rank_pid(job, rank)
    assert pid, f"rank {rank} is not there\n{read(job.log)}"  # 0 would be this process and its group
    os.kill(pid, number)


def test_two_nodes_distil_and_the_log_says_command_versions_and_nodes(calm: Path) -> None:
    log = read(calm / "log")
    assert rows(calm / "run", "train")[-1]["step"] == STEPS
    for said in (
        "start 1, 2 node(s) n[1-2]: distill train run_dir=",
        "torch 2.",
        "deepspeed ",
        "0: train step",
        "commit ",
    ):
        assert said in log


@pytest.mark.slow
def test_submitted_with_one_task_a_node_every_node_has_several_ranks(
    slurm: Cluster, submit: Submit, tmp_path: Path
) -> None:
    slurm.wait(submit("--export=ALL,RANKS_PER_NODE=2", steps=4, schedule__stages=[[0, 2]]), "COMPLETED")
    (saved,) = (tmp_path / "run" / "checkpoints").glob("step_*/state.json")
    assert json.loads(saved.read_text())["world_size"] == 4


def test_preempted_by_usr1_it_saves_goes_back_into_the_queue_and_ends_with_the_same_bits(
    slurm: Cluster, submit: Submit, calm: Path, tmp_path: Path
) -> None:
    job = submit()
    wait_for(is_at(tmp_path / "run", 40), "step 40", lambda: read(job.log))
    slurm.command("scancel", "--batch", "--signal=USR1", str(job.number))
    slurm.wait(job, "COMPLETED")
    assert slurm.restarts(job) == 1
    assert "stopped by signal 10 after step" in read(job.log)
    assert_same_run(tmp_path / "run", calm / "run")


@pytest.mark.slow
def test_job_of_higher_priority_takes_the_nodes_and_gives_them_back(
    slurm: Cluster, submit: Submit, calm: Path, tmp_path: Path
) -> None:
    job = submit()
    wait_for(is_at(tmp_path / "run", 20), "step 20", lambda: read(job.log))
    urgent = slurm.submit("--partition=high", "--nodes=3", "--exclusive", "--wrap=sleep 1", folder=tmp_path)
    slurm.wait(urgent, "COMPLETED")
    slurm.wait(job, "COMPLETED")
    assert slurm.restarts(job) == 1
    assert_same_run(tmp_path / "run", calm / "run")


@pytest.mark.slow
@pytest.mark.parametrize("node", ["n1", "n2"])
def test_node_whose_power_is_cut_is_replaced_and_the_run_ends_with_the_same_bits(
    node: str, slurm: Cluster, submit: Submit, calm: Path, tmp_path: Path
) -> None:
    job = submit("--nodelist=n[1-2]")
    wait_for(is_at(tmp_path / "run", 40), "step 40", lambda: read(job.log))
    slurm.kill_node(node)
    wait_for(lambda: slurm.node_state(node).startswith("DOWN"), f"{node} DOWN")
    slurm.start_node(node)
    slurm.wait(job, "COMPLETED")
    assert slurm.restarts(job) == 1
    assert "goes on from step 30" in read(job.log)
    assert_same_run(tmp_path / "run", calm / "run")
    wait_for(lambda: slurm.node_state(node) == "IDLE", f"{node} back")


@pytest.mark.slow
def test_cancelled_run_is_saved_and_stays_away_until_it_is_submitted_again(
    slurm: Cluster, submit: Submit, calm: Path, tmp_path: Path
) -> None:
    job = submit()
    wait_for(is_at(tmp_path / "run", 40), "step 40", lambda: read(job.log))
    slurm.command("scancel", str(job.number))
    slurm.wait(job, "CANCELLED")
    wait_for(lambda: "stopped by signal 15" in read(job.log), "a saved run", lambda: read(job.log))
    assert slurm.restarts(job) == 0
    slurm.wait(submit(), "COMPLETED")
    assert_same_run(tmp_path / "run", calm / "run")


@pytest.mark.slow
def test_rank_that_dies_ends_the_job_with_the_reason_and_the_next_start_goes_on(
    slurm: Cluster, submit: Submit, calm: Path, tmp_path: Path
) -> None:
    job = submit()
    wait_for(is_at(tmp_path / "run", 40), "step 40", lambda: read(job.log))
    strike(job, 1, signal.SIGKILL)
    wait_for(lambda: slurm.restarts(job) == 1, "the job's end", lambda: read(job.log))
    assert "task 1: Killed" in read(job.log)
    slurm.wait(job, "COMPLETED")
    assert_same_run(tmp_path / "run", calm / "run")


@pytest.mark.slow
def test_rank_that_only_waits_for_a_dead_one_is_ended_after_45_seconds(
    slurm: Cluster, submit: Submit, calm: Path, tmp_path: Path
) -> None:
    job = submit()
    wait_for(is_at(tmp_path / "run", 40), "step 40", lambda: read(job.log))
    strike(job, 0, signal.SIGSTOP)
    strike(job, 1, signal.SIGKILL)
    wait_for(lambda: slurm.restarts(job) == 1, "the job's end", lambda: read(job.log))
    assert "First task exited 45s ago" in read(job.log)
    slurm.wait(job, "COMPLETED")
    assert_same_run(tmp_path / "run", calm / "run")


@pytest.mark.slow
def test_run_that_dies_twice_at_the_same_step_is_not_queued_a_third_time(
    slurm: Cluster, submit: Submit, tmp_path: Path
) -> None:
    job = submit()
    for start in range(2):
        wait_for(
            lambda n=start: slurm.restarts(job) == n and rank_pid(job, 1) is not None,
            "rank 1",
            lambda: read(job.log),
        )
        strike(job, 1, signal.SIGKILL)
    slurm.wait(job, "FAILED")
    assert slurm.restarts(job) == 1
    assert f"has started {tmp_path}/run 2 times from step 0 and saved nothing since" in read(job.log)


@pytest.mark.slow
def test_bad_input_fails_at_once_with_its_sentence(slurm: Cluster, submit: Submit) -> None:
    job = submit(batch_size=7)
    slurm.wait(job, "FAILED")
    assert slurm.restarts(job) == 0
    assert "batch_size 7 must be 2 rank(s)" in read(job.log)


@pytest.mark.slow
def test_sweep_runs_every_arm_with_every_seed(
    slurm: Cluster, arguments: Callable[..., list[str]], tmp_path: Path
) -> None:
    for arm, schedule in {"late": "kind: one_shot", "staged": "kind: equal, num_stages: 2"}.items():
        (tmp_path / f"{arm}.yaml").write_text(f"schedule: {{{schedule}}}\n")
    common = [
        a for a in arguments(tmp_path, steps=4, schedule__stages=[]) if not a.startswith("schedule.kind")
    ]
    arms = [f"{tmp_path}/late.yaml", f"{tmp_path}/staged.yaml"]
    script = str(ROOT / "slurm/sweep.sbatch")
    slurm.submit("--array=0-3", script, f"{tmp_path}/sweep", "5 6", *arms, "--", *common, folder=tmp_path)
    wait_for(lambda: not slurm.command("squeue", "--noheader"), "all runs", lambda: logs_in(tmp_path))
    ended = sorted(p.parent.name for p in (tmp_path / "sweep").glob("*/result.json"))
    assert ended == ["late-seed5", "late-seed6", "staged-seed5", "staged-seed6"], logs_in(tmp_path)
    assert "seed: 6" in (tmp_path / "sweep/staged-seed6/config.yaml").read_text()


@pytest.mark.slow
def test_sweep_of_another_size_than_its_array_is_refused(slurm: Cluster, tmp_path: Path) -> None:
    script = str(ROOT / "slurm/sweep.sbatch")
    slurm.submit("--array=0-2", script, "out", "5 6", "a.yaml", "b.yaml", "--", folder=tmp_path)
    wait_for(lambda: len(list(tmp_path.glob("*.log"))) == 3, "three logs")
    wait_for(lambda: not slurm.command("squeue", "--noheader"), "an empty queue")
    assert all("are 4 runs: submit with --array=0-3" in read(log) for log in tmp_path.glob("*.log"))


SCORE = str(ROOT / "slurm/score.sbatch")


def missing(targets: Path) -> list[int]:
    """First samples of the shards that are not there."""
    return [r.first for r in load_header(targets).ranges(0, STEPS * 8) if r.first not in finished(targets)]


@pytest.mark.slow
def test_tasks_of_an_array_score_one_folder_that_teaches_as_the_teacher_does(
    slurm: Cluster, arguments: Callable[..., list[str]], calm: Path, submit: Submit, tmp_path: Path
) -> None:
    targets = tmp_path / "targets"
    options = ["--out", str(targets), "--codec", "hidden", "--shard-samples", "50"]
    scored = arguments(tmp_path / "none")
    slurm.submit("--array=0-1", "--ntasks-per-node=2", SCORE, *scored, *options, folder=tmp_path)
    logs = tmp_path.glob("*.log")
    wait_for(
        lambda: not slurm.command("squeue", "--noheader"), "both tasks", lambda: "\n".join(map(read, logs))
    )
    assert missing(targets) == [], "\n".join(map(read, tmp_path.glob("*.log")))
    journals = [(targets / f"part-{i}-of-2.jsonl").read_text().splitlines() for i in range(2)]
    assert abs(len(journals[0]) - len(journals[1])) <= 1
    slurm.wait(submit(teacher__targets=str(targets)), "COMPLETED")
    found, expected = (rows(folder / "run", "train") for folder in (tmp_path, calm))
    assert [row["loss"] for row in found] == pytest.approx([row["loss"] for row in expected], rel=1e-4)


@pytest.mark.slow
def test_scoring_that_is_preempted_goes_back_into_the_queue_and_on_with_what_is_missing(
    slurm: Cluster, arguments: Callable[..., list[str]], tmp_path: Path
) -> None:
    targets = tmp_path / "targets"
    options = ["--out", str(targets), "--codec", "sampled", "--shard-samples", "1"]
    job = slurm.submit("--nodes=2", SCORE, *arguments(tmp_path / "none"), *options, folder=tmp_path)
    wait_for(lambda: targets.exists() and len(finished(targets)) > 20, "21 shards", lambda: read(job.log))
    slurm.command("scancel", "--batch", "--signal=USR1", str(job.number))
    slurm.wait(job, "COMPLETED")
    assert slurm.restarts(job) == 1
    assert "stopped by signal 10 after shard" in read(job.log)
    assert missing(targets) == []
    assert len((targets / "part-0-of-1.jsonl").read_text().splitlines()) == STEPS * 8  # none twice


@pytest.mark.slow
def test_scoring_by_a_part_of_an_array_is_refused(slurm: Cluster, tmp_path: Path) -> None:
    slurm.submit("--array=1-2", SCORE, "a.yaml", "--out", "x", "--codec", "sampled", folder=tmp_path)
    wait_for(lambda: len(list(tmp_path.glob("*.log"))) == 2, "two logs")
    wait_for(lambda: not slurm.command("squeue", "--noheader"), "an empty queue")
    assert all("must be 0-N, all of it" in read(log) for log in tmp_path.glob("*.log"))


@pytest.mark.slow
def test_dump_parts_are_extracted_by_an_array_and_joined_by_one_job(slurm: Cluster, tmp_path: Path) -> None:
    for part in range(2):
        pages = [page(i) for i in range(20 * part, 20 * part + 20)]
        (tmp_path / f"part{part}.xml.bz2").write_bytes(multistream(pages))
    (tmp_path / "books").mkdir()
    for i, text in enumerate(TOPICS[:20]):
        (tmp_path / "books" / f"{i}.txt").write_text(text)
    sizes = "--export=ALL,VOCAB_SIZE=500,SEQUENCE_LENGTH=64"
    paths = [str(tmp_path / name) for name in ("part0.xml.bz2", "part1.xml.bz2", "books", "out")]
    job = slurm.submit(sizes, str(ROOT / "slurm/data_prep.sbatch"), *paths, folder=tmp_path)
    slurm.wait(job, "COMPLETED")
    wait_for(lambda: not slurm.command("squeue", "--noheader"), "the merge", lambda: logs_in(tmp_path))
    assert (tmp_path / "out/shards/index.json").exists(), logs_in(tmp_path)
    assert len(list((tmp_path / "out/wikipedia").glob("part-*/index.json"))) == 2

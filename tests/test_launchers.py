"""deepspeed's launcher, alone and over ssh, and torchrun start the ranks of one run, which is the run of one process."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from slurm_cluster import LAUNCHER
from ssh_nodes import NODES, Unavailable, ssh_nodes
from test_equivalence import assert_close_rows
from tiny import ROOT, distill, free_port, settings

pytestmark = pytest.mark.dist
DEEPSPEED = [sys.executable, "-m", "deepspeed.launcher.runner"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
KEYS = {"optim__eps": 1e-3, "log__every": 1}


@pytest.fixture(scope="module")
def alone(ragged: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("alone")
    distill(["train", *settings(ragged, folder / "run", **KEYS)], folder).ok()
    return folder / "run"


def environ() -> dict[str, str]:
    """As a shell has it, without ranks of a test run before."""
    kept = {k: v for k, v in os.environ.items() if k not in LAUNCHER}
    return {**kept, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}


def run(command: list[str], **more: str) -> str:
    ended = subprocess.run(command, env=environ() | more, cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout + ended.stderr


LAUNCHERS = {
    "deepspeed": [*DEEPSPEED, "--num_gpus=2", "--master_port=PORT", "--module", "distill"],
    "torchrun": [*TORCHRUN, "-m", "distill"],
}


@pytest.mark.parametrize("launcher", ["deepspeed", pytest.param("torchrun", marks=pytest.mark.slow)])
def test_launchers_start_two_ranks_of_the_same_run(
    launcher: str, alone: Path, ragged: Path, tmp_path: Path
) -> None:
    command = [part.replace("PORT", str(free_port())) for part in LAUNCHERS[launcher]]
    run([*command, "train", *settings(ragged, tmp_path / "run", **KEYS)])
    assert_close_rows(tmp_path / "run", alone)


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[dict[str, str]]:
    try:
        with ssh_nodes(tmp_path) as variables:
            yield variables
    except Unavailable as reason:
        pytest.skip(f"no nodes to reach by ssh: {reason}")


@pytest.mark.slow
def test_deepspeed_starts_a_rank_on_every_node_of_a_hostfile_over_ssh(
    nodes: dict[str, str], alone: Path, ragged: Path, tmp_path: Path
) -> None:
    (tmp_path / "hosts").write_text("".join(f"{node} slots=1\n" for node in NODES))
    options = [
        "--hostfile",
        str(tmp_path / "hosts"),
        "--master_addr=127.0.0.1",
        f"--master_port={free_port()}",
    ]
    arguments = ["train", *settings(ragged, tmp_path / "run", **KEYS)]
    said = run([*DEEPSPEED, *options, "--module", "distill", *arguments], **nodes)
    assert all(f"{node}: " in said for node in NODES)  # pdsh names who speaks
    assert_close_rows(tmp_path / "run", alone)

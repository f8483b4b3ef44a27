"""Ranks from whatever started the process; refusals that say what to set."""

from __future__ import annotations

import os

import pytest
import torch

from distill.distributed import (
    World,
    agree_on_stop,
    barrier,
    from_main,
    ranks_from_environment,
    start,
    sum_over_ranks,
)

STEP = {"SLURM_PROCID": "3", "SLURM_NTASKS": "8", "SLURM_LOCALID": "1", "SLURM_STEP_ID": "0"}
ALONE = World(0, 1, 0, torch.device("cpu"))


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, (0, 1, 0)),
        ({"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}, (1, 4, 1)),
        ({"RANK": "1", "WORLD_SIZE": "4"}, (1, 4, 0)),
        (STEP, (3, 8, 1)),
        ({**STEP, "WORLD_SIZE": "8"}, (3, 8, 1)),
        # torchrun inside an srun step: one task a node starts several ranks
        ({**STEP, "RANK": "5", "WORLD_SIZE": "16", "LOCAL_RANK": "1"}, (5, 16, 1)),
        # a batch shell or an interactive allocation is no step
        ({**STEP, "SLURM_STEP_ID": ""}, (0, 1, 0)),
        ({k: v for k, v in STEP.items() if k != "SLURM_STEP_ID"}, (0, 1, 0)),
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "8"}, (0, 1, 0)),
    ],
)
def test_ranks_come_from_the_launcher_else_from_an_srun_step_else_alone(
    environ: dict[str, str], expected: tuple[int, int, int]
) -> None:
    assert ranks_from_environment(environ) == expected


def test_slurm_and_world_size_that_contradict_are_refused() -> None:
    with pytest.raises(
        ValueError, match="SLURM started 8 tasks but WORLD_SIZE says 2: unset WORLD_SIZE or set RANK"
    ):
        ranks_from_environment({**STEP, "WORLD_SIZE": "2"})


def test_several_ranks_without_a_place_to_meet_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"RANK": "0", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match="2 ranks need MASTER_ADDR and MASTER_PORT"):
        start()


def test_task_that_sees_one_gpu_only_takes_it_whatever_its_local_rank(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    chosen: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    variables = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "3", "MASTER_ADDR": "a", "MASTER_PORT": "1"}
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    world = start()
    assert (world.rank, world.local_rank, world.device) == (5, 1, torch.device("cuda", 1))
    assert chosen == [world.device]
    assert os.environ["LOCAL_RANK"] == "1"


def test_alone_nothing_is_sent() -> None:
    assert sum_over_ranks([1.5, 2.0], ALONE) == [1.5, 2.0]
    assert agree_on_stop(15, ALONE) == 15
    assert from_main(7, ALONE) == 7
    barrier(ALONE)
    assert ALONE.is_main and not World(1, 2, 1, ALONE.device).is_main

"""Ranks from whatever started the process; refusals that say what to set."""

from __future__ import annotations

import os

import pytest
import torch

from distill.distributed import (
    World,
    agree_on_stop,
    any_text,
    barrier,
    from_main,
    gather_from_ranks,
    meeting_place,
    ranks_from_environment,
    start,
    sum_over_ranks,
)

STEP = {"SLURM_PROCID": "3", "SLURM_NTASKS": "8", "SLURM_LOCALID": "1", "SLURM_STEP_ID": "0"}
ONE_TASK = {**STEP, "SLURM_PROCID": "0", "SLURM_NTASKS": "1", "SLURM_JOB_NUM_NODES": "2"}
ALONE = World(0, 1, 0, torch.device("cpu"))


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, (0, 1, 0)),
        ({"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}, (1, 4, 1)),
        ({"RANK": "1", "WORLD_SIZE": "4"}, (1, 4, 0)),
        (STEP, (3, 8, 1)),
        ({**STEP, "WORLD_SIZE": "8"}, (3, 8, 1)),
        # torchrun, then deepspeed, inside an srun step: one task a node starts several ranks
        ({**STEP, "RANK": "5", "WORLD_SIZE": "16", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}, (5, 16, 1)),
        ({**STEP, "RANK": "5", "WORLD_SIZE": "16", "LOCAL_RANK": "1", "LOCAL_SIZE": "2"}, (5, 16, 1)),
        # deepspeed on two nodes through a step of one task on each
        ({**ONE_TASK, "RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_SIZE": "2"}, (3, 4, 1)),
        # torchrun on one node of an allocation of two
        ({**ONE_TASK, "RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}, (1, 2, 1)),
        # a batch script that maps SLURM's variables itself
        ({**STEP, "RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}, (3, 8, 1)),
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


@pytest.mark.parametrize(
    ("environ", "sentence"),
    [
        (
            {**STEP, "WORLD_SIZE": "2"},
            "SLURM started 8 tasks but WORLD_SIZE says 2: unset WORLD_SIZE or set RANK",
        ),
        ({"RANK": "1"}, "WORLD_SIZE is 'not set', with {'RANK': '1'}: unset RANK, WORLD_SIZE, LOCAL_RANK or"),
        ({"WORLD_SIZE": "4"}, "RANK is 'not set', with {'WORLD_SIZE': '4'}"),
        ({"RANK": "one", "WORLD_SIZE": "4"}, "RANK is 'one', with"),
        ({"RANK": "4", "WORLD_SIZE": "4"}, r"RANK is 4 but WORLD_SIZE says 4 rank\(s\)"),
        (
            {**STEP, "RANK": "3", "WORLD_SIZE": "4"},
            "RANK is 3 of WORLD_SIZE 4, but SLURM calls this task 3 of 8",
        ),
        (
            {**STEP, "RANK": "2", "WORLD_SIZE": "8"},
            "RANK is 2 of WORLD_SIZE 8, but SLURM calls this task 3 of 8",
        ),
        # a torchrun on each of eight tasks that believes in two of them
        (
            {**STEP, "RANK": "3", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"},
            r"WORLD_SIZE is 4 with 2 ranks a launcher, but SLURM started 8 task\(s\) on 1 node\(s\): start one launcher a node",
        ),
        # deepspeed told of three nodes in an allocation of two
        (
            {**ONE_TASK, "RANK": "3", "WORLD_SIZE": "6", "LOCAL_SIZE": "2"},
            r"SLURM started 1 task\(s\) on 2 node\(s\)",
        ),
    ],
)
def test_environments_that_contradict_themselves_are_refused(environ: dict[str, str], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        ranks_from_environment(environ)


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("n1", "n1"),
        ("n[1-3,7],m2", "n1"),
        ("gpu[03-05]", "gpu03"),
        ("rack[0-1]n[2,4]", "rack0n2"),
        ("a-b,c", "a-b"),
    ],
)
def test_srun_tasks_meet_on_the_first_node_at_a_port_of_the_job(nodes: str, first: str) -> None:
    place = meeting_place({**STEP, "SLURM_JOB_ID": "1201", "SLURM_STEP_NODELIST": nodes}, 8)
    assert place == {"MASTER_ADDR": first, "MASTER_PORT": "28407"}


def test_meeting_place_that_is_given_is_taken_and_one_rank_needs_none() -> None:
    given = {"MASTER_ADDR": "a", "MASTER_PORT": "1"}
    assert meeting_place({**STEP, **given}, 8) == given
    assert meeting_place({}, 1) == {}


def test_several_ranks_without_a_place_to_meet_are_refused() -> None:
    with pytest.raises(
        ValueError, match="2 ranks need MASTER_ADDR and MASTER_PORT in the environment, got neither"
    ):
        meeting_place({"RANK": "0", "WORLD_SIZE": "2"}, 2)
    with pytest.raises(ValueError, match="got {'MASTER_ADDR': 'a'}"):
        meeting_place({"MASTER_ADDR": "a"}, 2)


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
    assert gather_from_ranks([1.5, 2.0], ALONE) == [[1.5, 2.0]]
    assert any_text("a fault", ALONE) == "a fault"
    barrier(ALONE)
    assert ALONE.is_main and not World(1, 2, 1, ALONE.device).is_main

"""Ranks from SLURM, the deepspeed launcher, torchrun or alone; sums over ranks; agreement on stopping."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

TIMEOUT = timedelta(minutes=10)


@dataclass(frozen=True)
class World:
    """Who this process is among its peers, and the device it computes on."""

    rank: int
    size: int
    local_rank: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def ranks_from_environment(environ: Mapping[str, str]) -> tuple[int, int, int]:
    """(rank, world size, local rank) as the launcher says; (0, 1, 0) without one.

    That is torchrun's or deepspeed's variables, else those of an `srun` step.

    Raises:
        ValueError: the launcher's world size and the SLURM step's number of tasks contradict each other.
    """
    # Only inside an srun step do SLURM's task variables describe this process; in a batch shell they describe
    # the allocation.
    in_step = "SLURM_PROCID" in environ and environ.get("SLURM_STEP_ID", "").isdigit()
    if "RANK" in environ and "WORLD_SIZE" in environ:
        return int(environ["RANK"]), int(environ["WORLD_SIZE"]), int(environ.get("LOCAL_RANK", 0))
    if in_step:
        tasks = int(environ["SLURM_NTASKS"])
        if int(environ.get("WORLD_SIZE", tasks)) != tasks:
            raise ValueError(
                f"SLURM started {tasks} tasks but WORLD_SIZE says {environ['WORLD_SIZE']}: unset WORLD_SIZE or set RANK too"
            )
        return int(environ["SLURM_PROCID"]), tasks, int(environ["SLURM_LOCALID"])
    return 0, 1, 0


def start() -> World:
    """Join the process group (nccl on GPUs, gloo on CPU) and pick this rank's device.

    Raises:
        ValueError: several ranks, but no MASTER_ADDR / MASTER_PORT to meet at.
    """
    rank, size, local_rank = ranks_from_environment(os.environ)
    if size > 1 and not {"MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys():
        raise ValueError(
            f"{size} ranks need MASTER_ADDR and MASTER_PORT in the environment (slurm/train.sbatch sets them)"
        )
    device = torch.device("cpu")
    if torch.cuda.is_available():
        local_rank %= torch.cuda.device_count()  # SLURM may show each task its own GPU only, as number 0
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    # deepspeed reads these, the last one as the number of the GPU.
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(local_rank))
    if not dist.is_initialized():
        backend = "nccl" if device.type == "cuda" else "gloo"
        store = dist.HashStore() if size == 1 else None  # alone: no port that another run could hold
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=TIMEOUT)
    return World(rank, size, local_rank, device)


def sum_over_ranks(values: list[float], world: World) -> list[float]:
    """Each value summed over all ranks, in float64. One collective."""
    if world.size == 1:
        return values
    total = torch.tensor(values, dtype=torch.float64, device=world.device)
    dist.all_reduce(total)
    return total.tolist()


def agree_on_stop(signal_number: int, world: World) -> int:
    """The highest signal number that any rank has received, 0 if none has.

    So all ranks save and leave after the same step.
    """
    if world.size == 1:
        return signal_number
    flag = torch.tensor(signal_number, device=world.device)
    dist.all_reduce(flag, op=dist.ReduceOp.MAX)
    return int(flag.item())


def from_main(number: int, world: World) -> int:
    """The `number` of rank 0, on every rank. Collective."""
    if world.size == 1:
        return number
    shared = torch.tensor(number, device=world.device)
    dist.broadcast(shared, src=0)
    return int(shared.item())


def barrier(world: World) -> None:
    """Wait for all ranks."""
    if world.size > 1:
        dist.barrier()

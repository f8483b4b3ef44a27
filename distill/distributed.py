"""Ranks from SLURM, the deepspeed launcher, torchrun or alone; sums over ranks; agreement on stopping."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

TIMEOUT = timedelta(minutes=10)
LONG = timedelta(hours=12)  # for what one rank sends while the others wait
LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
UNSET = f"unset {', '.join(LAUNCHER)} or start all ranks by one launcher"


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
        ValueError: half of a launcher's variables, no whole numbers, or a launcher and SLURM that contradict
            each other.
    """
    # Only inside an srun step do SLURM's task variables describe this process; in a batch shell they describe
    # the allocation.
    step = "SLURM_PROCID" in environ and environ.get("SLURM_STEP_ID", "").isdigit()
    if "RANK" in environ or ("WORLD_SIZE" in environ and not step):
        rank, size, local_rank = (_whole_number(environ, n) for n in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
        if rank >= size:
            raise ValueError(f"RANK is {rank} but WORLD_SIZE says {size} rank(s): {UNSET}")
        if step:
            _refuse_other_layout(environ, rank, size)
        return rank, size, local_rank
    if not step:
        return 0, 1, 0
    rank, tasks, local_rank = (_whole_number(environ, f"SLURM_{n}") for n in ("PROCID", "NTASKS", "LOCALID"))
    if int(environ.get("WORLD_SIZE", tasks)) != tasks:
        raise ValueError(
            f"SLURM started {tasks} tasks but WORLD_SIZE says {environ['WORLD_SIZE']}: unset WORLD_SIZE or set RANK too"
        )
    return rank, tasks, local_rank


def _whole_number(environ: Mapping[str, str], name: str) -> int:
    text = environ.get(name, "0" if name == "LOCAL_RANK" else "")
    if not text.isdigit():
        others = {key: environ[key] for key in LAUNCHER if key in environ}
        raise ValueError(f"{name} is {text or 'not set'!r}, with {others}: {UNSET}")
    return int(text)


def _refuse_other_layout(environ: Mapping[str, str], rank: int, size: int) -> None:
    """A launcher inside an srun step starts its ranks once a task, or the variables are the tasks' own."""
    tasks, nodes = int(environ["SLURM_NTASKS"]), int(environ.get("SLURM_JOB_NUM_NODES", 1))
    # torchrun's name, deepspeed's name: ranks that one launcher has started on its node.
    local = environ.get("LOCAL_WORLD_SIZE", environ.get("LOCAL_SIZE"))
    if local is None:
        if (rank, size) != (int(environ["SLURM_PROCID"]), tasks):
            raise ValueError(
                f"RANK is {rank} of WORLD_SIZE {size}, but SLURM calls this task {environ['SLURM_PROCID']} of {tasks}: {UNSET}"
            )
    # One step with a launcher on each of its tasks, or a step of one task on each node (deepspeed over ssh).
    elif size != int(local) * tasks and not (
        tasks == 1 and size in (int(local) * n for n in range(1, nodes + 1))
    ):
        raise ValueError(
            f"WORLD_SIZE is {size} with {local} ranks a launcher, but SLURM started {tasks} task(s) on {nodes} node(s): "
            "start one launcher a node (srun --ntasks-per-node=1)"
        )


def meeting_place(environ: Mapping[str, str], size: int) -> dict[str, str]:
    """MASTER_ADDR and MASTER_PORT: the environment's, else the step's first node and a port of the job's own.

    Raises:
        ValueError: several ranks that SLURM did not start, and nowhere to meet.
    """
    names = ("MASTER_ADDR", "MASTER_PORT")
    given = {name: environ[name] for name in names if name in environ}
    if len(given) == 2 or size == 1:
        return given
    if not environ.get("SLURM_STEP_ID", "").isdigit():
        raise ValueError(
            f"{size} ranks need MASTER_ADDR and MASTER_PORT in the environment, got {given or 'neither'}"
        )
    # The first name of a list such as gpu[03-05,07],login1.
    first = re.sub(r"\[(\d+)[^]]*\]", r"\1", environ["SLURM_STEP_NODELIST"]).split(",")[0]
    port = 20000 + (int(environ["SLURM_JOB_ID"]) * 7 + int(environ["SLURM_STEP_ID"])) % 10000
    return {"MASTER_ADDR": first, "MASTER_PORT": str(port), **given}


def start() -> World:
    """Join the process group (nccl on GPUs, gloo on CPU) and pick this rank's device.

    Raises:
        ValueError: the environment contradicts itself, or several ranks have no place to meet.
    """
    rank, size, local_rank = ranks_from_environment(os.environ)
    os.environ.update(meeting_place(os.environ, size))
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


def gather_from_ranks(values: list[float], world: World) -> list[list[float]]:
    """The values of every rank, by rank. One collective."""
    if world.size == 1:
        return [values]
    own = torch.tensor(values, dtype=torch.float64, device=world.device)
    all_ranks = [torch.empty_like(own) for _ in range(world.size)]
    dist.all_gather(all_ranks, own)
    return [of_rank.tolist() for of_rank in all_ranks]


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


def any_text(text: str, world: World) -> str:
    """The text of the first rank whose one is not empty; empty if none is. Collective."""
    if world.size == 1:
        return text
    texts: list[str] = [""] * world.size
    dist.all_gather_object(texts, text)
    return next(filter(None, texts), "")


@contextmanager
def all_stay(world: World) -> Iterator[None]:
    """Have every rank wait for the others at the block's end, for hours if need be; a rank that dies ends the wait.

    A launcher would end those that work on soon after the first one left. Collective.
    """
    group = dist.new_group(timeout=LONG, backend="gloo") if world.size > 1 else None
    yield
    if group is not None:
        dist.barrier(group)


def barrier(world: World) -> None:
    """Wait for all ranks."""
    if world.size > 1:
        dist.barrier()

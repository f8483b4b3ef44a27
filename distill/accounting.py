"""What the steps since the last row of metrics gave and cost."""

from __future__ import annotations

import math
from typing import Any

import torch

from distill.build import Run
from distill.checkpoint import TrainState
from distill.config import Config
from distill.distributed import gather_from_ranks, sum_over_ranks
from distill.metrics import Stopwatch, Sums, means, memory_peak, peak_flops
from distill.models import DTYPES, flops_per_step
from distill.objectives import term_names, weights_at
from distill.schedule import ramp_at

Norm = float | torch.Tensor  # a tensor on a GPU, read only when it is logged


class Diverged(ValueError):
    """The loss is not finite any more."""


def refuse_diverged(value: float, name: str, state: TrainState, config: Config) -> None:
    """Called before a row or a checkpoint is written: a run that can't recover must not replace good state."""
    if not math.isfinite(value):
        raise Diverged(
            f"the {name} is {value} at step {state.step}: lower optim.lr ({config.optim.lr}) or lengthen the warm-up"
        )


class Window:
    """Sums and clocks since the last row of metrics.

    `clock` runs in steps alone, waits for a teacher included, not in validations, saves and exports. Of these
    seconds mfu counts the student's floating-point operations only: what the teacher takes lowers it; mfu_with_teacher
    counts the teacher's too. stall_seconds wait for a teacher, and swap_seconds of them for copies into its model.
    `own_clock` and `teacher_clock` run where a rank waits for no other (but in ZeRO 3): for its batches and in forward.
    slowest_rank needed most seconds for these, slowest_over_mean times the mean: 1 where all are alike.
    """

    def __init__(self, run: Run, state: TrainState) -> None:
        self.run = run
        self.tokens = state.window.get("tokens", 0.0)
        self._timed_from = self.tokens  # what an earlier start trained on took none of this one's seconds
        stored = state.window if run.world.is_main else None  # it was summed over the ranks
        self._terms = term_names(run.config.objective)
        self.sums = Sums(run.world.device, stored, self._terms)
        self.peak = peak_flops(run.world.device, DTYPES[run.config.engine.dtype]) * run.world.size
        self._restart_clocks()

    def _restart_clocks(self) -> None:
        self.clock, self.teacher_clock, self.own_clock = (Stopwatch(self.run.world.device) for _ in range(3))
        self.stall_seconds = 0.0
        self._before = self._counted()

    def _counted(self) -> tuple[float, float]:
        """(seconds of swaps, bytes read from storage) since the run's start."""
        teacher = self.run.teacher
        return (teacher.swap_seconds, float(teacher.bytes_read)) if teacher else (0.0, 0.0)

    def _total(self) -> dict[str, float]:
        local = self.sums.read()
        return dict(zip(local, sum_over_ranks(list(local.values()), self.run.world), strict=True))

    def store(self, state: TrainState) -> None:
        """Put what a resumed run needs into its state; sums are over all ranks, kept by the main one."""
        total = self._total()
        refuse_diverged(total["loss"], "loss", state, self.run.config)
        state.window = {"tokens": self.tokens, **total} if self.run.world.is_main else {}

    def row(self, state: TrainState, lr: float, grad_norm: Norm) -> dict[str, Any]:
        """The row of the steps since the last one, over all ranks; starts a new window.

        Raises Diverged if the loss is not finite.
        """
        config, share = self.run.config, (state.step - 1) / self.run.config.steps
        total = self._total()  # on a GPU this waits for the step to end
        seconds, teacher_seconds = self.clock.take(), self.teacher_clock.take()
        swap_seconds, num_bytes = (
            now - before for now, before in zip(self._counted(), self._before, strict=True)
        )
        of_rank = [teacher_seconds + self.own_clock.take(), num_bytes, memory_peak(self.run.world.device)]
        own, read, peak = zip(*gather_from_ranks(of_rank, self.run.world), strict=True)
        values: dict[str, Any] = {
            "samples": state.consumed,
            **means(total),
            "grad_norm": float(grad_norm),
            "lr": lr,
        }
        refuse_diverged(values["loss"], "loss", state, config)
        if self.run.schedule:
            values["teacher_step"] = self.run.schedule.checkpoint_at(state.consumed - config.batch_size)
            values["temperature"] = ramp_at(config.objective.temperature, share)
        values |= self.run.engine.units_left
        values |= {f"weight_{name}": weight for name, weight in weights_at(config.objective, share).items()}
        timed = self.tokens - self._timed_from
        rows_timed = total["num_rows"] * timed / max(self.tokens, 1.0)
        met = (int(timed), rows_timed, self.run.samples.sequence_length)
        flops = flops_per_step(self.run.engine.work, *met, backward=True)
        taught = self.run.teacher.work if self.run.teacher else None
        teacher_flops = flops_per_step(taught, *met, backward=False) if taught else 0.0
        values |= {
            "seconds": seconds,
            "tokens_per_second": timed / seconds,
            "mfu": flops / seconds / self.peak,
            "mfu_with_teacher": (flops + teacher_flops) / seconds / self.peak,
            "teacher_share": teacher_seconds / seconds,
            "stall_seconds": self.stall_seconds,
            "swap_seconds": swap_seconds,
            "slowest_rank": own.index(max(own)),
            "slowest_over_mean": max(own) * len(own) / sum(own) if sum(own) else 1.0,
            "storage_mb_per_node": max(read) / 1e6,
            "memory_peak_gib": max(peak),
        }
        self.sums, self.tokens, self._timed_from = Sums(self.run.world.device, terms=self._terms), 0.0, 0.0
        self._restart_clocks()
        return values

"""Progressive distillation, top to bottom: build everything, then the one loop.

A teacher run is the same loop with a save rule and no teacher.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from distill import checkpoint, distributed
from distill.checkpoint import TrainState
from distill.config import Config
from distill.data import Batch, Samples, key_of, train_batches
from distill.distributed import World, agree_on_stop, sum_over_ranks
from distill.engine import Engine
from distill.evaluate import validate, validation_samples
from distill.metrics import Log, Stopwatch, Sums, means, peak_flops
from distill.models import (
    DTYPES,
    build_model,
    check_split,
    flops_per_step,
    load_model,
    num_parameters,
    quiet_transformers,
)
from distill.objectives import Objective, make_objective, weights_at
from distill.run_folder import claim, read_result, read_schedule, store_settings, write_result
from distill.schedule import Schedule, is_trajectory_step, learning_rate, make_schedule, ramp_at
from distill.signals import stop_signal
from distill.teacher import Teacher
from distill.trajectory.manifest import BadTrajectory, Manifest, load_manifest

log = logging.getLogger(__name__)
Norm = float | torch.Tensor  # a tensor on a GPU, read only when it is logged


class Stopped(Exception):
    """A signal asked the run to leave; it was saved first."""

    def __init__(self, signal_number: int, step: int) -> None:
        self.signal_number = signal_number
        super().__init__(
            f"stopped by signal {signal_number} after step {step}; the same command goes on from there"
        )


class Diverged(ValueError):
    """The loss is not finite any more."""


def refuse_diverged(value: float, name: str, state: TrainState, config: Config) -> None:
    """Called before a row or a checkpoint is written: a run that can't recover must not replace good state."""
    if not math.isfinite(value):
        raise Diverged(
            f"the {name} is {value} at step {state.step}: lower optim.lr ({config.optim.lr}) or lengthen the warm-up"
        )


def train(config: Config) -> dict[str, Any]:
    """Run `config` to its end, from where it stopped if it was started before. Returns the final validation.

    Raises:
        Stopped: a signal came; a checkpoint was saved.
        ValueError: (and its kinds) what can't be trained on, before the first step.
    """
    world = distributed.start()
    with claim(config, world.is_main) as folder:
        if (result := read_result(folder)) is not None:
            return result
        run = prepare(config, world, folder)
        if world.is_main:
            store_settings(folder, config, run.schedule)
        state = checkpoint.resume(folder, run.engine, run.samples.fingerprint, world)
        window = Window(run, state)
        rows = Log(folder, state.step, config.steps, world.is_main)
        batches = train_batches(
            run.samples, state.consumed, config.batch_size, run.micro, world.rank, world.size
        )
        found: dict[str, float] = {}

        while state.step < config.steps:
            if run.teacher and run.schedule:
                current, following = (
                    run.schedule.checkpoint_at(state.consumed),
                    run.schedule.checkpoint_after(state.consumed),
                )
                window.stall_seconds += run.teacher.use(current, following)
            objective = make_objective(
                config.objective, state.step / config.steps, run.samples.tokenizer.vocab_size
            )
            lr = learning_rate(config.optim, state.step, config.steps)
            grad_norm = train_step(run, batches, objective, lr, state, window)
            state.step, state.consumed = state.step + 1, state.consumed + config.batch_size
            rows.advance()

            leaves_checkpoint = is_trajectory_step(
                state.step, config.save.trajectory_every, config.save.trajectory_first
            )
            leaves_checkpoint |= config.save.trajectory_every > 0 and state.step == config.steps
            if state.step % config.log.every == 0:
                rows.row("train", state.step, window.row(state, lr, grad_norm))
            if state.step % config.log.eval_every == 0 or state.step == config.steps or leaves_checkpoint:
                found = validate(run.engine.model, run.validation, config, run.micro, world)
                refuse_diverged(found["hard"], "validation loss", state, config)
                rows.row("validation", state.step, found)
            if run.manifest and leaves_checkpoint:
                checkpoint.save_to_trajectory(
                    run.manifest, run.engine.model, run.tokenizer, state, found["hard"], world
                )
            stop = agree_on_stop(stop_signal(), world)
            if state.step % config.save.every == 0 or stop or state.step == config.steps:
                refuse_diverged(float(grad_norm), "gradient norm", state, config)
                window.store(state)
                rows.flush()
                checkpoint.save(folder, run.engine, state, run.samples.fingerprint, world, config.save.keep)
            if stop and state.step < config.steps:
                rows.close()
                raise Stopped(stop, state.step)

        return finish(run, state, found, rows)


def train_step(
    run: Run, batches: Iterator[Batch], objective: Objective, lr: float, state: TrainState, window: Window
) -> Norm:
    """One optimizer step on this rank's micro-batches. Returns the norm of the gradient before clipping."""
    torch.manual_seed(
        int(key_of(run.config.seed, state.step, run.world.rank)) >> 1
    )  # dropout, if any, is the same after a resume
    micro_batches = list(islice(batches, run.engine.accumulation))
    counts = [
        float(sum(len(b.rows_N) for b in micro_batches)),
        float(sum(b.num_tokens for b in micro_batches)),
    ]
    global_rows, global_tokens = sum_over_ranks(counts, run.world)
    state.tokens, window.tokens = state.tokens + global_tokens, window.tokens + global_tokens
    for batch in micro_batches:
        batch = batch.to(run.world.device)
        teacher_rows = None
        if run.teacher:
            with window.teacher_clock:
                teacher_rows = run.teacher.rows(batch.inputs, batch.rows_N)
        sums = run.engine.forward(batch.inputs, batch.rows_N, batch.labels_N, teacher_rows, objective)
        run.engine.backward(sums.loss, max(global_rows, 1.0))
        window.sums.add(sums)
    return run.engine.step(lr)


# ------------------------------------------------------------------------------------------------ building


@dataclass
class Run:
    """All parts of a run, built."""

    config: Config
    world: World
    folder: Path
    samples: Samples
    validation: Samples
    engine: Engine
    micro: int
    schedule: Schedule | None
    teacher: Teacher | None
    manifest: Manifest | None  # of the trajectory that this run leaves

    @property
    def tokenizer(self) -> Path:
        return Path(self.config.data.shards) / "tokenizer"


def prepare(config: Config, world: World, folder: Path) -> Run:
    """Build every part; whatever doesn't fit together is refused here."""
    quiet_transformers()
    samples = Samples(config.data, "train", config.seed, shuffle=True)
    micro, accumulation = layout(config, world)
    schedule, teacher = None, None
    if config.teacher.trajectory:
        trajectory = load_manifest(Path(config.teacher.trajectory))
        schedule = read_schedule(folder) or first_schedule(config, trajectory)
        teacher = Teacher(trajectory, config, samples.tokenizer, samples.sequence_length, world.device)
        if world.is_main:
            log.info("teacher schedule\n%s", schedule.table())
    model = student_model(config, samples)
    log.info("model: %s, %.2f M parameters", model.config.model_type, num_parameters(model) / 1e6)
    engine = Engine(model.to(world.device), config, world, accumulation)
    manifest = own_trajectory(config, folder, samples) if config.save.trajectory_every else None
    return Run(
        config, world, folder, samples, validation_samples(config), engine, micro, schedule, teacher, manifest
    )


def first_schedule(config: Config, trajectory: Manifest) -> Schedule:
    """The schedule of a run that starts; one that goes on keeps it, even if the trajectory has grown.

    Raises:
        BadTrajectory: the teacher's own run has not ended, and the schedule would take its newest checkpoint
            for the final one.
    """
    if not trajectory.complete and not (config.schedule.checkpoints or config.schedule.stages):
        raise BadTrajectory(
            f"{trajectory.root}: the teacher's run has not ended, its newest checkpoint is "
            f"step {max(trajectory.checkpoints, default=0)}: let it end, or "
            "name the teacher steps in schedule.checkpoints or schedule.stages"
        )
    return make_schedule(
        config.schedule, list(trajectory.checkpoints), trajectory.losses, config.steps, config.batch_size
    )


def layout(config: Config, world: World) -> tuple[int, int]:
    """(sequences a micro-batch, micro-batches a step) of one rank.

    Raises:
        ValueError: the batch does not divide.
    """
    share, remainder = divmod(config.batch_size, world.size)
    micro = config.micro_batch_size or share
    if remainder or share % micro:
        raise ValueError(
            f"batch_size {config.batch_size} must be {world.size} rank(s) x micro_batch_size {micro} x a whole number"
        )
    return micro, share // micro


def student_model(config: Config, samples: Samples) -> Any:
    """The model to train: new from the seed, or loaded. Same seed, same weights, whatever the teacher."""
    tokenizer = samples.tokenizer
    if config.model.init_from:
        model = load_model(
            config.data.task, Path(config.model.init_from), torch.float32, samples.sequence_length
        )
    else:
        begin, end = tokenizer.bos_id, tokenizer.eos_id
        specials = {
            "pad_token_id": tokenizer.pad_id,
            "bos_token_id": begin,
            "eos_token_id": end,
            "cls_token_id": begin,
            "sep_token_id": end,
        }
        model = build_model(
            config.data.task, config.model.architecture, config.model.overrides,
            vocab_size=tokenizer.vocab_size, sequence_length=samples.sequence_length, special_ids=specials, seed=config.seed,
        )  # fmt: skip
    if model.config.vocab_size < tokenizer.vocab_size:
        raise ValueError(
            f"the model has {model.config.vocab_size} logits, the shards' tokenizer {tokenizer.vocab_size} tokens"
        )
    check_split(model)
    return model


def own_trajectory(config: Config, folder: Path, samples: Samples) -> Manifest:
    root = folder / "trajectory"
    if (root / "manifest.json").exists():
        return load_manifest(root)
    root.mkdir(exist_ok=True)
    tokenizer = samples.tokenizer
    return Manifest(root, "distill", config.model.architecture, tokenizer.vocab_size, tokenizer.sha256)


def finish(run: Run, state: TrainState, found: dict[str, float], rows: Log) -> dict[str, Any]:
    """Export the trained model, complete the trajectory, mark the run as done."""
    rows.close()
    if not found:  # killed between the last checkpoint and the mark
        found = validate(run.engine.model, run.validation, run.config, run.micro, run.world)
    result = {"step": state.step, "samples": state.consumed, "tokens": state.tokens, **found}
    if run.world.is_main:
        if not (run.folder / "model").exists():
            checkpoint.export(run.engine.model, run.tokenizer, run.folder / "model")
        if run.manifest:
            run.manifest.complete = True
            run.manifest.write()
        write_result(run.folder, result)
    distributed.barrier(run.world)
    if run.teacher:
        run.teacher.close()
    return result


# ------------------------------------------------------------------------------------------------ measuring


class Window:
    """Sums and clocks since the last row of metrics."""

    def __init__(self, run: Run, state: TrainState) -> None:
        self.run = run
        self.tokens = state.window.get("tokens", 0.0)
        self.sums = Sums(
            run.world.device, state.window if run.world.is_main else None
        )  # stored summed over the ranks
        self.peak = peak_flops(run.world.device, DTYPES[run.config.engine.dtype]) * run.world.size
        self._restart_clocks()

    def _restart_clocks(self) -> None:
        self.teacher_clock = Stopwatch(self.run.world.device)
        self.stall_seconds, self.start = 0.0, time.perf_counter()

    def store(self, state: TrainState) -> None:
        """Put what a resumed run needs into its state; sums are over all ranks, kept by the main one."""
        local = self.sums.read()
        total = dict(zip(local, sum_over_ranks(list(local.values()), self.run.world), strict=False))
        refuse_diverged(total["loss"], "loss", state, self.run.config)
        state.window = {"tokens": self.tokens, **total} if self.run.world.is_main else {}

    def row(self, state: TrainState, lr: float, grad_norm: Norm) -> dict[str, Any]:
        """The row of the steps since the last one, over all ranks; starts a new window.

        Raises Diverged if the loss is not finite.
        """
        config, share = self.run.config, (state.step - 1) / self.run.config.steps
        local = self.sums.read()  # on a GPU this waits for the step to end
        seconds = time.perf_counter() - self.start
        teacher_seconds = self.teacher_clock.take()
        total = dict(zip(local, sum_over_ranks(list(local.values()), self.run.world), strict=False))
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
        values |= {f"weight_{name}": weight for name, weight in weights_at(config.objective, share).items()}
        flops = flops_per_step(
            self.run.engine.model,
            int(self.tokens),
            total["num_rows"],
            self.run.samples.sequence_length,
            backward=True,
        )
        values |= {"seconds": seconds, "tokens_per_second": self.tokens / seconds, "mfu": flops / seconds / self.peak,
                   "teacher_share": teacher_seconds / seconds, "stall_seconds": self.stall_seconds}  # fmt: skip
        self.sums, self.tokens = Sums(self.run.world.device), 0.0
        self._restart_clocks()
        return values

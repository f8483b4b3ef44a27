"""Progressive distillation, top to bottom. A teacher run is the same loop with a save rule and no teacher."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from itertools import islice
from typing import Any

import torch

from distill import checkpoint, distributed
from distill.accounting import Norm, Window, refuse_diverged
from distill.build import Run, build_run
from distill.checkpoint import TrainState
from distill.config import Config
from distill.data import Batch, train_batches
from distill.distributed import agree_on_stop, sum_over_ranks
from distill.evaluate import validate
from distill.metrics import Log
from distill.objectives import Objective
from distill.run_folder import claim, read_result, store_settings, write_result
from distill.sample_order import key_of
from distill.schedule import due_after, learning_rate
from distill.signals import Stopped, stop_signal


def train(config: Config) -> dict[str, Any]:
    """Run `config` to its end, from where it stopped if it was started before. Returns the final validation.

    Raises:
        Stopped: a signal came; a checkpoint was saved.
        ValueError: (and its kinds) what can't be trained on, before the first step.
    """
    world = distributed.start()
    with claim(config, world.is_main) as folder, ExitStack() as at_end:
        if (result := read_result(folder)) is not None:
            return result
        run = build_run(config, world, folder)
        at_end.callback(run.close)
        state = checkpoint.resume(folder, run.engine, run.samples.fingerprint, world)
        window = Window(run, state)
        with window.clock:  # before the settings are stored: a bad teacher binds the folder to nothing
            window.stall_seconds += run.follow_schedule(state.consumed)
        if world.is_main:
            store_settings(folder, config, run.schedule, run.trajectory)
        rows = Log(folder, state.step, config.steps, world.is_main)
        batches = train_batches(
            run.samples, state.consumed, config.batch_size, run.micro, world.rank, world.size
        )
        found: dict[str, float] = {}

        while state.step < config.steps:
            objective = run.objective.at(state.step / config.steps)
            lr = learning_rate(config.optim, state.step, config.steps)
            with window.clock:
                window.stall_seconds += run.follow_schedule(state.consumed)
                grad_norm = train_step(run, batches, objective, lr, state, window)
            state.step, state.consumed = state.step + 1, state.consumed + config.batch_size
            rows.advance()

            due = due_after(state.step, config, state.left)
            if due.log:
                rows.row("train", state.step, window.row(state, lr, grad_norm))
            if due.validate:
                found = validate(run.engine.student, run.validation, config, run.micro, world)
                refuse_diverged(found["hard"], "validation loss", state, config)
                rows.row("validation", state.step, found)
                run.follow_student(state, found["accuracy"])
            if run.publisher and due.leave_checkpoint:
                checkpoint.save_to_trajectory(
                    run.publisher, run.engine, run.tokenizer, state, found["hard"], world
                )
            with window.clock:  # before the step is saved: a signal or a fault may end the wait
                window.stall_seconds += run.await_teacher(state.consumed)
            stop = agree_on_stop(stop_signal(), world)
            if due.save or stop or run.lacks_teacher:
                refuse_diverged(float(grad_norm), "gradient norm", state, config)
                window.store(state)
                rows.flush()
                checkpoint.save(folder, run.engine, state, run.samples.fingerprint, world, config.save.keep)
            if stop and state.step < config.steps:
                rows.close()
                raise Stopped(stop, state.step)

        rows.close()
        return finish(run, state, found)


def train_step(
    run: Run, batches: Iterator[Batch], objective: Objective, lr: float, state: TrainState, window: Window
) -> Norm:
    """One optimizer step on this rank's micro-batches. Returns the norm of the gradient before clipping."""
    # Dropout, if any, is the same after a resume.
    torch.manual_seed(int(key_of(run.config.seed, state.step, run.world.rank)) >> 1)
    with window.own_clock:
        micro_batches = run.questions(list(islice(batches, run.engine.accumulation)), state)
    num_rows, num_tokens = (
        sum(len(b.rows_N) for b in micro_batches),
        sum(b.num_tokens for b in micro_batches),
    )
    global_rows, global_tokens = sum_over_ranks([num_rows, num_tokens], run.world)
    state.tokens, window.tokens = state.tokens + global_tokens, window.tokens + global_tokens
    for batch in micro_batches:
        batch = batch.to(run.world.device)
        said = None
        if run.teacher:
            with window.teacher_clock:
                said = run.teacher.signal(batch)
        with window.own_clock:
            sums = run.engine.forward(batch.inputs, batch.rows_N, batch.labels_N, said, objective)
        run.engine.backward(sums.loss, max(global_rows, 1.0))
        window.sums.add(sums)
    return run.engine.step(lr)


def finish(run: Run, state: TrainState, found: dict[str, float]) -> dict[str, Any]:
    """Export the trained model, complete the trajectory, mark the run as done."""
    if not found:  # killed between the last checkpoint and the mark
        found = validate(run.engine.student, run.validation, run.config, run.micro, run.world)
    result = {"step": state.step, "samples": state.consumed, "tokens": state.tokens, **found}
    model, weights = run.engine.trained()
    with distributed.all_stay(run.world):  # the main rank may have gigabytes to write and to send
        if run.world.is_main:
            if not (run.folder / "model").exists():
                checkpoint.export(model, weights, run.tokenizer, run.folder / "model")
            if run.publisher:
                run.publisher.complete()
            write_result(run.folder, result)
    return result

"""Everything that decides the next step, saved as one unit.

Also the trajectory that a teacher run leaves, and the export of a model.
"""

from __future__ import annotations

import dataclasses
import logging
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedModel

from distill.distributed import World, any_text, barrier, from_main
from distill.engine import Engine
from distill.files import publish_folder, write_text, writing
from distill.intact import FILES, fault_of, file_sizes, sealed, unsealed
from distill.run_folder import STATE, checkpoint_folder, saved_checkpoints, step_of
from distill.trajectory.manifest import describe
from distill.trajectory.publish import Publisher

log = logging.getLogger(__name__)


@dataclass
class TrainState:
    """Where a run stands: with the weights, the optimizer and the config this decides all that follows.

    The teacher, its temperature, the learning rate, the sample order and the masks are functions of
    `consumed`.
    window: sums since the last metrics row, so that a resumed run writes the same rows.
    left: [step, validation loss] of the last two checkpoints of the trajectory, by which the save rule goes.
    gained: validation top-1 since the teacher's stage began, for a schedule that follows the student.
    """

    step: int = 0
    consumed: int = 0
    tokens: float = 0.0
    window: dict[str, float] = dataclasses.field(default_factory=dict)
    left: list[list[float]] = dataclasses.field(default_factory=list)
    gained: list[float] = dataclasses.field(default_factory=list)


def save(folder: Path, engine: Engine, state: TrainState, data: str, world: World, keep: int) -> None:
    """Save a resumable checkpoint of the run in `folder`, then drop all but the newest `keep`. Collective.

    data: fingerprint of the samples it was trained on.
    """
    final = checkpoint_folder(folder, state.step)
    if from_main(int(world.is_main and (final / STATE).exists()), world):
        return
    temporary = final.with_suffix(".tmp")
    with writing(temporary, removes=world.is_main):
        engine.save(temporary)
    barrier(world)
    if world.is_main:
        written_by = {"world_size": world.size, "zero_stage": engine.zero_stage, "data": data}
        content = {**dataclasses.asdict(state), **written_by, FILES: file_sizes(temporary)}
        write_text(temporary / STATE, sealed(content))
        publish_folder(temporary, final)
        # One that a disk has spoilt is none of the newest: it must not push out the last that can be loaded.
        whole = [c for c in saved_checkpoints(folder) if not fault_of(c, contents=False)]
        for old in whole[:-keep]:
            # Under a name that resume clears away if this is cut off.
            shutil.rmtree(old.rename(old.with_suffix(".tmp")))
    barrier(world)


def resume(folder: Path, engine: Engine, data: str, world: World) -> TrainState:
    """Bring `engine` to the newest checkpoint of the run that is whole. Returns where that stood. Collective.

    Another number of ranks or another ZeRO stage may have written it. Without a checkpoint that is a fresh state.

    Raises:
        ValueError: no checkpoint is whole any more, or it was written after training on other data.
    """
    if world.is_main:
        for half_written in (folder / "checkpoints").glob("*.tmp"):
            log.warning("removing %s, which was cut off while it was written", half_written)
            shutil.rmtree(half_written)
    newest = _newest_whole(folder, world)
    if newest is None:
        return TrainState()
    content = unsealed(newest)
    content.pop(FILES, None)
    ranks, stage = content.pop("world_size"), content.pop("zero_stage", engine.zero_stage)
    if content.pop("data") != data:
        raise ValueError(
            f"{newest} was trained on other samples than data.shards holds now: "
            "go back to those shards or choose another run_dir"
        )
    engine.load(newest, ranks, stage)
    return TrainState(**content)


def _newest_whole(folder: Path, world: World) -> Path | None:
    """The checkpoint to go on from; newer ones that are damaged are put aside. Collective.

    Rank 0 proposes, as another rank may not see the newest on a shared file system; all look for damage.
    """
    known = saved_checkpoints(folder) if world.is_main else []
    there = (folder / "checkpoints").glob("step_????????") if world.is_main else []
    damaged = {path: f"{STATE} is gone" for path in there if path not in known}
    while step := from_main(step_of(known.pop()) if known else 0, world):
        candidate = checkpoint_folder(folder, step)
        fault, unreadable = "", ""
        try:
            _await(candidate / STATE)
            fault = fault_of(candidate, world.rank, world.size)
        except OSError as error:
            unreadable = str(error)
        if unreadable := any_text(unreadable, world):  # no proof of damage: a disk may answer again later
            raise OSError(f"{candidate} can't be read: {unreadable}")
        fault = any_text(fault, world)
        if not fault:
            if world.is_main:
                _put_aside(damaged, candidate)
            barrier(world)
            return candidate
        damaged[candidate] = fault
    if damaged:
        told = "".join(f"\n  {path.name}: {fault}" for path, fault in damaged.items())
        raise ValueError(
            f"no checkpoint in {folder / 'checkpoints'} is whole any more:{told}\n"
            "bring one back from a copy, or remove that folder to start from the beginning"
        )
    return None


def _await(mark: Path, seconds: float = 60.0) -> None:
    """Wait until this rank sees a file that rank 0 saw: a shared file system may be late."""
    end = time.monotonic() + seconds
    while not mark.exists() and time.monotonic() < end:
        time.sleep(0.5)


def _put_aside(damaged: dict[Path, str], good: Path) -> None:
    """Under a name that is no checkpoint's: the run will come to that step again, and save it anew."""
    for path, fault in damaged.items():
        aside = path.with_suffix(".damaged")
        log.warning("%s is damaged (%s): put aside as %s; going on from %s", path, fault, aside.name, good)
        if aside.exists():
            shutil.rmtree(aside)
        path.rename(aside)


# ------------------------------------------------------------------------------------------------ trajectory


def save_to_trajectory(
    publisher: Publisher, engine: Engine, tokenizer: Path, state: TrainState, loss: float, world: World
) -> None:
    """Add the model as it is now, of validation loss `loss`, to the run's trajectory. Collective.

    The Hugging Face folder comes first, then its line in the manifest. One that is there already stays: a run that
    goes on from before it comes here again, and somebody may be learning from it.
    """
    weights = engine.weights()
    if world.is_main and state.step not in publisher.own.checkpoints:
        final = publisher.folder / f"step_{state.step:08d}"
        if final.exists():
            shutil.rmtree(final)
        export(engine.model, weights, tokenizer, final)
        publisher.add(describe(final, final.name, state.step, int(state.tokens), loss))
    state.left = [*state.left, [state.step, loss]][-2:]
    barrier(world)


def export(model: PreTrainedModel, weights: dict[str, Tensor], tokenizer: Path, folder: Path) -> None:
    """Write a folder that `AutoModel*.from_pretrained` and `AutoTokenizer.from_pretrained` open.

    weights: the model's state dict, whole. The folder appears whole or not at all.
    """
    temporary = folder.with_name(folder.name + ".tmp")
    if temporary.exists():
        shutil.rmtree(temporary)
    with writing(temporary):
        temporary.mkdir(parents=True)
        model.save_pretrained(temporary, state_dict=weights)
        for path in tokenizer.iterdir():
            if path.is_file() and path.name != "config.json":
                shutil.copy(path, temporary / path.name)
    publish_folder(temporary, folder)

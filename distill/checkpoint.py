"""Everything that decides the next step, saved as one unit.

Also the trajectory that a teacher run leaves, and the export of a model.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import shutil
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedModel

from distill.distributed import World, barrier, from_main
from distill.engine import Engine
from distill.files import publish_folder, write_text, writing
from distill.run_folder import STATE, checkpoint_folder, saved_checkpoints
from distill.trajectory.manifest import Manifest, describe

log = logging.getLogger(__name__)


@dataclass
class TrainState:
    """Where a run stands: with the weights, the optimizer and the config this decides all that follows.

    The teacher, its temperature, the learning rate, the sample order and the masks are functions of
    `consumed`.
    window: sums since the last metrics row, so that a resumed run writes the same rows.
    """

    step: int = 0
    consumed: int = 0
    tokens: float = 0.0
    window: dict[str, float] = dataclasses.field(default_factory=dict)


def save(folder: Path, engine: Engine, state: TrainState, data: str, world: World, keep: int) -> None:
    """Save a resumable checkpoint of the run in `folder`, then drop all but the newest `keep`. Collective.

    data: fingerprint of the samples it was trained on.
    """
    final = checkpoint_folder(folder, state.step)
    if final.exists():
        return
    temporary = final.with_suffix(".tmp")
    with writing(temporary, removes=world.is_main):
        engine.save(temporary)
    barrier(world)
    if world.is_main:
        write_text(
            temporary / STATE,
            json.dumps({**dataclasses.asdict(state), "world_size": world.size, "data": data}),
        )
        publish_folder(temporary, final)
        for old in saved_checkpoints(folder)[:-keep]:
            # Under a name that resume clears away if this is cut off.
            shutil.rmtree(old.rename(old.with_suffix(".tmp")))
    barrier(world)


def resume(folder: Path, engine: Engine, data: str, world: World) -> TrainState:
    """Bring `engine` to the newest checkpoint of the run that rank 0 sees. Returns where that stood. Collective.

    Without a checkpoint that is a fresh state.

    Raises:
        ValueError: the checkpoint was written by another number of ranks, or after training on other data.
    """
    if world.is_main:
        for half_written in (folder / "checkpoints").glob("*.tmp"):
            log.warning("removing %s, which was cut off while it was written", half_written)
            shutil.rmtree(half_written)
    found = saved_checkpoints(folder) if world.is_main else []
    # On a shared file system another rank may not see the newest yet: one chooses, or they would start apart.
    step = from_main(int(found[-1].name.removeprefix("step_")) if found else 0, world)
    if step == 0:
        return TrainState()
    newest = checkpoint_folder(folder, step)
    content = json.loads((newest / STATE).read_text(encoding="utf-8"))
    if (ranks := content.pop("world_size")) != world.size:
        raise ValueError(
            f"{newest} was written by {ranks} ranks, this run has {world.size}: start it with {ranks}"
        )
    if content.pop("data") != data:
        raise ValueError(
            f"{newest} was trained on other samples than data.shards holds now: "
            "go back to those shards or choose another run_dir"
        )
    engine.load(newest)
    return TrainState(**content)


# ------------------------------------------------------------------------------------------------ trajectory


def save_to_trajectory(
    manifest: Manifest, engine: Engine, tokenizer: Path, state: TrainState, loss: float, world: World
) -> None:
    """Add the model as it is now to the run's trajectory. Collective.

    The Hugging Face folder comes first, then its line in the manifest.
    """
    weights = engine.weights()
    if world.is_main:
        final = manifest.root / f"step_{state.step:08d}"
        if final.exists():  # a resumed run comes here again, with the same weights
            shutil.rmtree(final)
        export(engine.model, weights, tokenizer, final)
        manifest.add(describe(manifest.root, state.step, final, int(state.tokens), loss))
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

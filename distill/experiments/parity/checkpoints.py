"""The teachers' trajectories, one a seed, in the format of every other teacher; the only file that knows it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load, save

from data_prep.files import sha256_of, whole_file
from distill.experiments.parity.models import Params
from distill.experiments.parity.settings import Net, Settings
from distill.files import write_text
from distill.trajectory.manifest import BadTrajectory, Manifest, describe, load_manifest
from distill.trajectory.store import open_store

WEIGHTS, CONFIG = "model.safetensors", "config.json"


@dataclass
class Trajectory:
    """The checkpoints of one teacher in `root`, each a folder with weights and the network's description."""

    root: Path
    manifest: Manifest

    @property
    def steps(self) -> list[int]:
        return list(self.manifest.checkpoints)

    @property
    def losses(self) -> dict[int, float]:
        """Validation loss (nats) of every checkpoint."""
        return self.manifest.losses

    def add(self, step: int, net: Params, description: dict[str, Any], samples: int, loss: float) -> None:
        """Leave a checkpoint: its files first, then its line in the manifest. Writing one again changes nothing."""
        folder = self.folder(step)
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / CONFIG, json.dumps(description, indent=1))
        with whole_file(folder / WEIGHTS) as file:
            file.write(save({name: tensor.contiguous().cpu() for name, tensor in net.items()}))
        self.manifest.add(describe(folder, folder.name, step, samples, loss))

    def read(self, step: int, description: dict[str, Any]) -> Params:
        """The weights of a checkpoint, checked against the manifest.

        Raises:
            BadTrajectory: no such step, a file that is missing or differs, or another network than `description`.
        """
        if step not in self.manifest.checkpoints:
            raise BadTrajectory(
                f"{self.root} has no teacher step {step}; it has {self.steps}: delete it to train it anew"
            )
        folder, files = self.folder(step), self.manifest.checkpoints[step].files
        for name in (CONFIG, WEIGHTS):
            if not (folder / name).is_file() or sha256_of(folder / name) != files[name][1]:
                raise BadTrajectory(
                    f"teacher step {step}: {folder / name} is missing or not the file of the manifest: "
                    f"delete {self.root.parent} to train the teachers anew"
                )
        found = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        if found != description:
            keys = [key for key, value in description.items() if found.get(key) != value]
            different = "; ".join(
                f"{key}: {found.get(key)!r}, asked for {description[key]!r}" for key in keys
            )
            raise BadTrajectory(f"{folder} holds another network ({different}): choose another --out")
        return load((folder / WEIGHTS).read_bytes())

    def folder(self, step: int) -> Path:
        return self.root / f"step_{step:08d}"

    def complete(self) -> None:
        """Mark the teacher's run as ended."""
        if not self.manifest.complete:
            self.manifest.complete = True
            self.manifest.write()


def open_trajectory(root: Path, num_classes: int) -> Trajectory:
    """The trajectory in `root` as it stands, or a new one."""
    if (root / "manifest.json").exists():
        return Trajectory(root, load_manifest(root))
    root.mkdir(parents=True, exist_ok=True)
    return Trajectory(root, Manifest(open_store(root), "distill", "parity", num_classes))


def describe_net(settings: Settings, net: Net) -> dict[str, Any]:
    """What config.json of a checkpoint tells of its network."""
    task = {key: getattr(settings, key) for key in ("d", "k", "depth")}
    return {"model_type": f"parity_{settings.model}", **task, "width": net.width}

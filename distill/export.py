"""A run's newest weights as a Hugging Face folder, and the validation of any such folder."""

from __future__ import annotations

import shutil
from pathlib import Path

from distill import distributed
from distill.build import layout, student_model
from distill.checkpoint import export
from distill.config import Config
from distill.config_reader import load_config
from distill.data import Samples
from distill.engine import Student, saved_weights
from distill.evaluate import validate, validation_samples
from distill.intact import fault_of
from distill.models import DTYPES, quiet_transformers
from distill.pretrained import cast_parameters, load_model
from distill.pruning import Pruning
from distill.run_folder import CONFIG, saved_checkpoints


def export_run(run_dir: Path, out: Path) -> Path:
    """Write `out` from the run's result or, while it is under way, from its newest checkpoint. Returns `out`.

    Raises:
        ValueError: no run there, nothing saved yet, or `out` exists.
    """
    if not (run_dir / CONFIG).exists():
        raise ValueError(f"{run_dir} is no run folder: it has no {CONFIG}")
    if out.exists():
        raise ValueError(f"{out} exists already: choose another --out")
    if (run_dir / "model").exists():
        shutil.copytree(run_dir / "model", out)
        return out
    newest = next((c for c in reversed(saved_checkpoints(run_dir)) if not fault_of(c)), None)
    if newest is None:
        raise ValueError(
            f"{run_dir} has no whole checkpoint yet: it saves one every save.every steps, at a stop and at the end"
        )
    quiet_transformers()
    config = load_config([run_dir / CONFIG], [])
    model = student_model(config, Samples(config.data, "train", config.seed, shuffle=True))
    model.load_state_dict(saved_weights(newest))
    cast_parameters(model, DTYPES[config.engine.dtype])
    pruning = Pruning(model, config)
    pruning.load(newest)
    export(*pruning.cut(model, model.state_dict()), Path(config.data.shards) / "tokenizer", out)
    return out


def evaluate_folder(folder: Path, config: Config) -> dict[str, float]:
    """Validation of a Hugging Face folder on the held-out documents of config.data.shards."""
    quiet_transformers()
    world = distributed.start()
    samples = validation_samples(config)
    model = load_model(config.data.task, folder, DTYPES[config.engine.dtype], samples.sequence_length)
    model.to(device=world.device)  # type: ignore[call-arg]  # transformers wraps Module.to untyped
    return validate(Student(model), samples, config, layout(config, world)[0], world)

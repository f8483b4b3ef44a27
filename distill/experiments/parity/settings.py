"""What a sparse-parity study is made of. The defaults are R1: (60, 4), four seeds, minutes on two cores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from distill.config import OptimConfig
from distill.config_reader import ConfigError, fill
from distill.experiments.parity.models import MODELS
from distill.experiments.parity.task import Task


def _flat(lr: float) -> OptimConfig:
    return OptimConfig(lr=lr, warmup_share=0.0, decay="constant")


@dataclass
class Net:
    """A network: `width` hidden units of an MLP, or features of a Transformer (heads of 8); its budget and rate.

    Of `optim` lr, warmup_share, decay, decay_share and final_lr_share count.
    """

    width: int
    steps: int
    optim: OptimConfig = field(default_factory=lambda: _flat(0.1))


@dataclass
class Settings:
    """One study. Steps are optimizer steps of `batch_size` fresh samples.

    d, k: coordinates, and how many of them decide (Panigrahi et al., definition 3.1). depth: of the tree of the
    hierarchical task, 2^depth classes; 1 is plain parity. model: mlp | transformer. initializer_range: standard
    deviation of a Transformer's first weights; an MLP starts as torch's layers do. optimizer: sgd (plain) | adam.
    seeds: each has its own teacher, students and data. every: steps between validations, which are also the
    teacher's checkpoints. early_steps: of a 2-shot student on its early checkpoint. early_distance: teacher
    steps by which the checkpoint `before` the transition precedes the one inside.
    temperatures: of the teacher, one set of arms each; below 1e-4 its arg-max is the label.
    """

    d: int = 60
    k: int = 4
    depth: int = 1
    model: str = "mlp"
    initializer_range: float = 0.02
    optimizer: str = "sgd"
    batch_size: int = 32
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2, 3])
    every: int = 200
    early_steps: int = 2000
    early_distance: int = 800
    temperatures: list[float] = field(default_factory=lambda: [0.0, 1.0])
    validation_samples: int = 4096
    probe_samples: int = 20_000
    teacher: Net = field(default_factory=lambda: Net(1000, 10_000))
    student: Net = field(default_factory=lambda: Net(24, 16_000))

    @property
    def task(self) -> Task:
        return Task(self.d, self.k, self.depth)


def load_settings(files: Sequence[str | Path], assignments: Sequence[str]) -> Settings:
    """Defaults < YAML files < key=value. Raises ConfigError with all problems at once."""
    settings = Settings()
    problems = fill(settings, files, assignments) or list(_problems(settings))
    if problems:
        raise ConfigError(problems)
    return settings


def _problems(s: Settings) -> list[str]:
    nets = {"teacher": s.teacher, "student": s.student}
    rules = [
        (1 <= s.k <= s.d, f"k must lie in 1 to d={s.d}, got {s.k}: lower k or raise d"),
        (1 <= s.depth <= 8, f"depth must lie in 1 to 8, got {s.depth}"),
        (
            not 1 <= s.depth <= 8 or s.k * (2**s.depth - 1) <= s.d,
            f"depth={s.depth} has {2**s.depth - 1} nodes of k={s.k} coordinates each, more than d={s.d}: "
            f"raise d to {s.k * (2**s.depth - 1)} or lower k or depth",
        ),
        (s.model in MODELS, f"model must be one of {', '.join(MODELS)}, got {s.model!r}"),
        (s.initializer_range > 0, f"initializer_range must be above 0, got {s.initializer_range}"),
        (s.optimizer in ("sgd", "adam"), f"optimizer must be sgd or adam, got {s.optimizer!r}"),
        (len(set(s.seeds)) == len(s.seeds) > 0, f"seeds must be different numbers, got {s.seeds}"),
        (all(seed >= 0 for seed in s.seeds), f"seeds must not be negative, got {s.seeds}"),
        (len(s.temperatures) > 0, "temperatures is empty: give e.g. [0]"),
        (all(t >= 0 for t in s.temperatures), f"temperatures must not be negative, got {s.temperatures}"),
        (len(set(s.temperatures)) == len(s.temperatures), f"temperatures must be different numbers, got {s.temperatures}"),
        *[
            (getattr(s, key) > 0, f"{key} must be above 0, got {getattr(s, key)}")
            for key in ("batch_size", "every", "early_steps", "early_distance", "validation_samples", "probe_samples")
        ],
        *[(n.steps > 0 and n.width > 0, f"{who}.steps and .width must be above 0, got {n}") for who, n in nets.items()],
        (
            s.model != "transformer" or all(n.width % 8 == 0 for n in nets.values()),
            "a Transformer's width must be a multiple of 8, the features of a head, got "
            f"{s.teacher.width} and {s.student.width}",
        ),
        (
            s.every > 0 and s.early_steps % s.every == 0 and s.early_distance % s.every == 0,
            f"early_steps={s.early_steps} and early_distance={s.early_distance} must be multiples of every={s.every}, "
            "the steps between checkpoints",
        ),
        (s.early_steps < s.student.steps, f"early_steps={s.early_steps} must be below student.steps={s.student.steps}"),
    ]  # fmt: skip
    return [message for holds, message in rules if not holds]

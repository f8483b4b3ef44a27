"""What a run is made of: small typed dataclasses, merged as defaults < YAML files < `key=value`.

Every problem is reported at once, with the nearest valid name. Imports no torch, so that launch tools can
read a config in milliseconds.
A *ramp* is a number, or a list of [share, value] points: share is the share of the run's budget (0 to 1),
values in between are linear.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

Ramp = float | list[list[float]]
OBJECTIVES = ("forward_kl", "hard")


class ConfigError(ValueError):
    """All that is wrong with a config, one line each."""

    def __init__(self, problems: list[str]) -> None:
        self.problems = problems
        super().__init__(
            "the config has " + f"{len(problems)} problem(s):\n" + "\n".join(f"  - {p}" for p in problems)
        )


def _opt(default: Any, help: str, choices: tuple[str, ...] = ()) -> Any:
    metadata = {"help": help, "choices": choices}
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass
class DataConfig:
    """Where the samples come from and what is asked about them."""

    shards: str = _opt("", "folder of shards made by `python -m data_prep shards`")
    task: str = _opt("mlm", "masked or causal language modelling", ("mlm", "clm"))
    mask_rate: float = _opt(0.15, "MLM: share of the tokens that are predicted, 0 to 1")
    mask_token_share: float = _opt(0.8, "MLM: share of the predicted tokens replaced by <mask>")
    random_token_share: float = _opt(0.1, "MLM: share of the predicted tokens replaced by a random token")
    isolate_documents: bool = _opt(
        False, "no attention across documents in a sequence; positions restart at each"
    )
    shuffle_window: int = _opt(65536, "samples shuffled together; 1 keeps the order of the shards")
    num_workers: int = _opt(0, "reader processes a rank; 0 reads in the training process")


@dataclass
class ModelConfig:
    """The model that is trained, as `transformers` knows it."""

    architecture: str = _opt("bert", "transformers model type: bert (MLM), gpt2, gpt_neox, llama (CLM)")
    overrides: dict[str, Any] = _opt({}, "keys of that transformers config, e.g. {hidden_size: 256}")
    init_from: str = _opt("", "folder with weights to start from; empty: random weights from the seed")


@dataclass
class TeacherConfig:
    """The teacher's trajectory; none for training on hard labels."""

    trajectory: str = _opt(
        "", "folder with manifest.json (see `distill trajectory index`); empty: no teacher"
    )
    dtype: str = _opt("bf16", "dtype of the frozen teacher's weights", ("bf16", "fp32"))


@dataclass
class ScheduleConfig:
    """Which teacher checkpoint teaches which samples."""

    kind: str = _opt(
        "one_shot",
        "one_shot: the final teacher; equal: num_stages equal stages; n_t: stage_steps on each, the rest on the last; "
        "two_shot: one early checkpoint for early_share, then the final; explicit: stages as given; "
        "speed: student step s is taught by the checkpoint at or after speed*(s+1)",
        ("one_shot", "equal", "n_t", "two_shot", "explicit", "speed"),
    )
    checkpoints: list[int] = _opt([], "teacher steps to use; empty: chosen from the whole trajectory")
    num_stages: int = _opt(0, "equal, n_t: number of stages; 0: one a checkpoint")
    stage_steps: int = _opt(0, "n_t: student steps on every checkpoint but the last")
    early_share: float = _opt(0.1, "two_shot: share of the budget on the early checkpoint, 0 to 1")
    stages: list[list[int]] = _opt([], "explicit: [[first student step, teacher step], ...]")
    speed: float = _opt(1.0, "speed: teacher steps a student step")


@dataclass
class ObjectiveConfig:
    """What is minimised."""

    weights: dict[str, Ramp] = _opt(
        {}, "weight (a ramp) of each: forward_kl, hard; empty: all on forward_kl with a teacher, else on hard"
    )
    temperature: Ramp = _opt(
        1.0, "softmax temperature, a ramp; below 1e-4 the teacher's arg-max is the label"
    )
    temperature_on: str = _opt("teacher", "whose logits the temperature divides", ("teacher", "both"))
    temperature_squared: bool = _opt(False, "multiply the divergence by temperature^2")
    chunk_rows: int = _opt(4096, "rows whose logits are alive at once")
    kernel: str = _opt("auto", "implementation of the divergence", ("auto", "cpu", "reference"))


@dataclass
class OptimConfig:
    """AdamW and its learning rate."""

    lr: float = _opt(1e-3, "peak learning rate")
    beta1: float = _opt(0.9, "AdamW")
    beta2: float = _opt(0.95, "AdamW")
    eps: float = _opt(1e-8, "AdamW")
    weight_decay: float = _opt(0.0, "AdamW; never on biases and norms")
    clip: float = _opt(1.0, "largest global gradient norm; 0: no clipping")
    warmup_share: float = _opt(0.06, "share of the budget with linear warm-up")
    decay: str = _opt(
        "cosine",
        "after the warm-up: cosine, wsd (flat, then linear) or constant",
        ("cosine", "wsd", "constant"),
    )
    decay_share: float = _opt(0.2, "wsd: share of the budget that decays")
    final_lr_share: float = _opt(0.0, "learning rate at the end, as a share of lr")


@dataclass
class EngineConfig:
    """How DeepSpeed holds the student."""

    zero_stage: int = _opt(1, "DeepSpeed ZeRO stage: 0, 1 or 2")
    dtype: str = _opt(
        "bf16", "dtype of weights and activations; the optimizer's copy is fp32", ("bf16", "fp32")
    )


@dataclass
class SaveConfig:
    """What the run leaves on disk."""

    every: int = _opt(500, "steps between resumable checkpoints")
    keep: int = _opt(2, "resumable checkpoints kept")
    trajectory_every: int = _opt(
        0, "steps between checkpoints of the trajectory (a teacher run); 0: none is left"
    )
    trajectory_first: int = _opt(
        0, "first checkpoint of the trajectory; doubled until trajectory_every; 0: no log-spaced start"
    )


@dataclass
class LogConfig:
    """What the run says."""

    every: int = _opt(10, "steps between rows of metrics.jsonl, TensorBoard and the terminal")
    eval_every: int = _opt(500, "steps between validations; the last step is always validated")
    eval_samples: int = _opt(1024, "validation samples read, at most")


@dataclass
class Config:
    """One run. `batch_size`, `micro_batch_size` are in sequences;

    the first is global, the second on one rank.
    """

    run_dir: str = _opt("", "folder of the run; the same command goes on where it stopped")
    seed: int = _opt(0, "of weights, sample order and masks")
    steps: int = _opt(1000, "optimizer steps: the budget")
    batch_size: int = _opt(64, "sequences an optimizer step, over all ranks")
    micro_batch_size: int = _opt(0, "sequences a forward on one rank; 0: as many as the batch gives a rank")
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    save: SaveConfig = field(default_factory=SaveConfig)
    log: LogConfig = field(default_factory=LogConfig)

    @property
    def total_samples(self) -> int:
        return self.steps * self.batch_size


# ------------------------------------------------------------------------------------------------ reading


def load_config(files: list[str | Path], assignments: list[str]) -> Config:
    """Merge defaults < YAML `files` in order < `key=value` assignments (`a.b=value`, value in YAML), and
    check the whole.

    Raises:
        ConfigError: unknown keys, wrong types, values out of range and contradictions, all at once.
    """
    problems: list[str] = []
    layers = [_read_yaml(Path(f), problems) for f in files]
    layers += [_parse_assignment(a, problems) for a in assignments]
    config = Config()
    for layer in layers:
        _merge(config, layer, "", problems)
    if not config.objective.weights:
        config.objective.weights = {"forward_kl": 1.0} if config.teacher.trajectory else {"hard": 1.0}
    if not problems:
        problems += check(config)
    if problems:
        raise ConfigError(problems)
    return config


def _read_yaml(path: Path, problems: list[str]) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        problems.append(f"{path} can't be read as YAML: {error}")
        return {}
    if content is not None and not isinstance(content, dict):
        problems.append(f"{path} must hold `key: value` lines, got {type(content).__name__}")
        return {}
    return content or {}


def _parse_assignment(text: str, problems: list[str]) -> dict[str, Any]:
    key, equals, value = text.partition("=")
    if not equals or not key:
        problems.append(f"{text!r} is not of the form key=value, e.g. optim.lr=0.001")
        return {}
    try:
        nested: Any = yaml.safe_load(value)
    except yaml.YAMLError as error:
        problems.append(f"{text!r}: the value is not YAML: {error}")
        return {}
    for name in reversed(key.split(".")):
        nested = Inside({name: nested})
    return nested


class Inside(dict[str, Any]):
    """What a dotted key says:

    it changes one entry, where a written-out mapping replaces a setting that is a mapping.
    """


def _plain(value: Any) -> Any:
    return {key: _plain(v) for key, v in value.items()} if isinstance(value, dict) else value


def _merge(target: Any, layer: dict[str, Any], prefix: str, problems: list[str]) -> None:
    hints = typing.get_type_hints(type(target))
    for name, value in layer.items():
        if name not in hints:
            problems.append(f"unknown key {prefix}{name}{_nearest(str(name), prefix, list(hints))}")
        elif dataclasses.is_dataclass(getattr(target, name)):
            if isinstance(value, dict):
                _merge(getattr(target, name), value, f"{prefix}{name}.", problems)
            else:
                problems.append(
                    f"{prefix}{name} is a group of settings, got {value!r}; set e.g. {prefix}{name}.KEY=..."
                )
        else:
            before = getattr(target, name)
            if isinstance(value, Inside) and isinstance(before, dict):
                value = before | _plain(value)
            try:
                setattr(target, name, coerce(value, hints[name]))
            except ValueError as error:
                problems.append(f"{prefix}{name}: {error}")


def _nearest(name: str, prefix: str, names: list[str]) -> str:
    """The nearest valid key, looked for in its own group first, then in all of them."""
    everywhere = {key.rsplit(".", 1)[-1]: key for key, _, _ in fields_of(Config())}
    close = difflib.get_close_matches(name, names, n=1)
    if not close and (elsewhere := difflib.get_close_matches(name, everywhere, n=1)):
        return f"; did you mean {everywhere[elsewhere[0]]}?"
    return f"; did you mean {prefix}{close[0]}?" if close else f"; valid here: {', '.join(names)}"


def _nearest_of(name: str, names: tuple[str, ...]) -> str:
    close = difflib.get_close_matches(name, names, n=1)
    return f"; did you mean {close[0]}?" if close else f"; valid: {', '.join(names)}"


def coerce(value: Any, hint: Any) -> Any:
    """`value` as the annotated type `hint`; raises ValueError saying what was expected and what was got."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        for option in args:
            try:
                return coerce(value, option)
            except ValueError:
                continue
    elif origin is list and isinstance(value, list):
        return [coerce(v, args[0]) for v in value]
    elif origin is dict and isinstance(value, dict):
        return {str(k): coerce(v, args[1]) for k, v in value.items()}
    elif hint is Any:
        return value
    elif hint is float and isinstance(value, (int, float, str)) and not isinstance(value, bool):
        try:
            if math.isfinite(number := float(value)):  # YAML reads 1e-3 as text
                return number
        except ValueError:
            pass
    elif isinstance(hint, type) and type(value) is hint:
        return value
    raise ValueError(f"expected {_type_name(hint)}, got {value!r}")


def _type_name(hint: Any) -> str:
    if hint == Ramp:
        return "a number or a list of [share, value]"
    return hint.__name__ if isinstance(hint, type) and not typing.get_args(hint) else str(hint)


# ------------------------------------------------------------------------------------------------ checking


SHARES = (
    "data.mask_rate",
    "data.mask_token_share",
    "data.random_token_share",
    "schedule.early_share",
    "optim.warmup_share",
    "optim.decay_share",
    "optim.final_lr_share",
)
POSITIVE = (
    "steps",
    "batch_size",
    "data.shuffle_window",
    "objective.chunk_rows",
    "schedule.speed",
    "save.every",
    "save.keep",
    "log.every",
    "log.eval_every",
    "log.eval_samples",
    "optim.lr",
)
NOT_NEGATIVE = (
    "micro_batch_size",
    "data.num_workers",
    "schedule.num_stages",
    "optim.clip",
    "optim.eps",
    "optim.weight_decay",
    "save.trajectory_every",
    "save.trajectory_first",
)


def check(config: Config) -> list[str]:
    """Every value out of range and every contradiction in `config`, as lines for the user;

    empty when it is sound.
    """
    problems = [
        f"{key} must be one of {', '.join(f.metadata['choices'])}, got {value!r}"
        for key, f, value in fields_of(config)
        if f.metadata["choices"] and value not in f.metadata["choices"]
    ]
    for rule, message in _rules(config):
        if not rule:
            problems.append(message)
    for name, ramp in {**config.objective.weights, "temperature": config.objective.temperature}.items():
        problems += [f"objective {name}: {p}" for p in _ramp_problems(ramp)]
    return problems


def _rules(c: Config) -> list[tuple[bool, str]]:
    at = {key: value for key, _, value in fields_of(c)}
    needs_teacher = any(name != "hard" for name in c.objective.weights)
    kind, stage = c.schedule.kind, c.schedule
    return [
        *[(0 <= at[k] <= 1, f"{k} must lie in 0 to 1, got {at[k]}") for k in SHARES],
        *[(at[k] > 0, f"{k} must be above 0, got {at[k]}") for k in POSITIVE],
        *[(at[k] >= 0, f"{k} must not be negative, got {at[k]}") for k in NOT_NEGATIVE],
        *[
            (0 <= at[k] < 1, f"{k} must be at least 0 and below 1, got {at[k]}")
            for k in ("optim.beta1", "optim.beta2")
        ],
        (bool(c.run_dir), "run_dir is not set: give the run a folder, e.g. run_dir=runs/student"),
        (bool(c.data.shards), "data.shards is not set: make shards with `python -m data_prep shards`"),
        (
            c.data.mask_token_share + c.data.random_token_share <= 1,
            "data.mask_token_share + data.random_token_share must not pass 1, got "
            f"{c.data.mask_token_share} + {c.data.random_token_share}",
        ),
        (c.engine.zero_stage in (0, 1, 2), f"engine.zero_stage must be 0, 1 or 2, got {c.engine.zero_stage}"),
        (
            not (c.engine.zero_stage == 0 and c.engine.dtype == "bf16"),
            "engine.zero_stage=0 with bf16 takes a wrong first Adam step in DeepSpeed; use zero_stage=1, which costs the same",
        ),
        *[
            (name in OBJECTIVES, f"objective.weights.{name} is unknown{_nearest_of(name, OBJECTIVES)}")
            for name in c.objective.weights
        ],
        (
            bool(c.teacher.trajectory) or not needs_teacher,
            "objective.weights names a teacher's objective but teacher.trajectory is not set; "
            "set it, or train on labels with objective.weights={hard: 1}",
        ),
        (
            not c.teacher.trajectory or needs_teacher,
            "teacher.trajectory is set but objective.weights only has `hard`: the teacher would run for nothing",
        ),
        (
            kind != "explicit" or bool(stage.stages),
            "schedule.kind=explicit needs schedule.stages=[[step, teacher step], ...]",
        ),
        (kind != "n_t" or stage.stage_steps > 0, "schedule.kind=n_t needs schedule.stage_steps above 0"),
        (
            kind == "two_shot" or len(stage.checkpoints) != 1 or kind == "one_shot",
            "schedule.checkpoints has one entry: use kind=one_shot",
        ),
        (
            all(len(pair) == 2 for pair in stage.stages),
            f"schedule.stages must be pairs [student step, teacher step], got {stage.stages}",
        ),
        (
            not c.save.trajectory_first or c.save.trajectory_every > 0,
            "save.trajectory_first needs save.trajectory_every, the steps between the later checkpoints",
        ),
    ]


def _ramp_problems(ramp: Ramp) -> list[str]:
    points = ramp if isinstance(ramp, list) else [[0.0, ramp]]
    if not points or any(len(p) != 2 for p in points):
        return [f"a ramp is a list of [share, value], got {ramp!r}"]
    shares = [p[0] for p in points]
    if shares != sorted(shares) or not 0 <= shares[0] <= shares[-1] <= 1:
        return [f"the shares of a ramp must rise within 0 to 1, got {shares}"]
    return [f"must not be negative, got {p[1]}" for p in points if p[1] < 0]


# ------------------------------------------------------------------------------------------------ showing


def fields_of(config: Any, prefix: str = "") -> list[tuple[str, dataclasses.Field[Any], Any]]:
    """Every leaf of the config as (dotted key, field, value)."""
    leaves = []
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        if dataclasses.is_dataclass(value):
            leaves += fields_of(value, f"{prefix}{f.name}.")
        else:
            leaves.append((prefix + f.name, f, value))
    return leaves


def help_text() -> str:
    """Every key with its default and meaning, for `distill train --help`."""
    lines = []
    for key, f, value in fields_of(Config()):
        choices = f" [{' | '.join(f.metadata['choices'])}]" if f.metadata["choices"] else ""
        lines.append(f"  {key:<28} {value!r:<20} {f.metadata['help']}{choices}")
    return "\n".join(lines)


def to_yaml(config: Config) -> str:
    """The resolved config, as stored with a run."""
    return yaml.safe_dump(dataclasses.asdict(config), sort_keys=False)

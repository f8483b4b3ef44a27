"""What a run is made of: small typed dataclasses. `config_reader` fills them, `config_rules` checks them.

None of the three imports torch, so that launch tools can read a config in milliseconds.
A *ramp* is a number, or a list of [share, value] points: share is the share of the run's budget (0 to 1),
values in between are linear.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

import yaml

Ramp = float | list[list[float]]
FUSED = ("forward_kl", "reverse_kl", "jsd", "tvd", "hard")  # one of the first four, and hard, in one pass
TERMS = (
    "atkd", "rld", "pearson", "spearman", "cmkd", "clkd", "gate", "gate_learned", "ada_alpha", "ada_margin",
    "excess_loss", "cross_head", "ckd", "ckd_hidden", "double", "double_pairs", "double_sampled", "hidden_cosine",
    "hidden_square", "attention_kl", "curriculum", "dpk", "relations", "contrastive", "mixkd", "kdiga", "preference",
)  # fmt: skip
# Any number of them; `distill.objectives.terms` holds their functions
OBJECTIVES = (*FUSED, *TERMS)
ANY_TOKENIZER = ("ckd_hidden", "relations", "contrastive")  # on hidden states of rows alone: no word enters
PRUNED = ("ffn", "heads")  # `distill.units` knows where they are


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
    span_depth: int = _opt(
        0,
        "CLM on shards of `python -m data_prep pcfg`: only words that end a span at most so deep below the root count; "
        "0: all",
    )
    shuffle_window: int = _opt(65536, "samples shuffled together; 1 keeps the order of the shards")
    num_workers: int = _opt(0, "reader processes a rank; 0 reads in the training process")


@dataclass
class ModelConfig:
    """The model that is trained, as `transformers` knows it."""

    architecture: str = _opt("bert", "transformers model type: bert (MLM), gpt2, gpt_neox, llama (CLM)")
    overrides: dict[str, Any] = _opt({}, "keys of that transformers config, e.g. {hidden_size: 256}")
    init_from: str = _opt("", "folder with weights to start from; empty: random weights from the seed")
    init_layers: list[int] = _opt(
        [], "layers of init_from, from 0, that the model starts with, e.g. [0, 2, 4] of a teacher; empty: all"
    )
    prune_to: dict[str, float] = _opt(
        {},
        "units of every layer that are left at the end, above 0 to 1: {ffn: 0.5} of the feed-forward part, {heads: 0.5} of "
        "attention (llama); the least important are pruned while the model learns; empty: none",
    )
    prune_until: float = _opt(
        0.7, "share of the budget after which no more is pruned; it begins when the warm-up ends"
    )


@dataclass
class TeacherConfig:
    """The teacher's trajectory, or what it said; neither for training on hard labels."""

    trajectory: str = _opt(
        "",
        "folder or URL (s3://, gs://, az://, https://) with manifest.json (see `distill trajectory index`); "
        "empty: no teacher",
    )
    targets: str = _opt(
        "",
        "folder of stored targets (see `distill score`) that teach in place of the model; a trajectory that is set too is "
        "only held against them",
    )
    tokenizer: str = _opt(
        "",
        "folder of the teacher's tokenizer (`python -m data_prep tokenizer --from`) where it is not that of the shards; then "
        "hidden states are compared where tokens of both end together; empty: the shards' own",
    )
    dtype: str = _opt("bf16", "dtype of the frozen teacher's weights", ("bf16", "fp32"))
    zero_stage: int = _opt(
        0, "0: whole on every rank; 3: its trunk is dealt over the ranks (DeepSpeed ZeRO 3)"
    )
    ensemble: int = _opt(
        1,
        "checkpoints that teach together: the one that the schedule names and those before it, each whole in memory",
    )
    pool: str = _opt(
        "probs",
        "how an ensemble is one teacher: mean of probabilities, of log-probabilities, or of probabilities weighted by what "
        "each gives to the label",
        ("probs", "log_probs", "gold"),
    )
    offload: bool = _opt(
        False,
        "with zero_stage=3: its trunk stays in pinned host memory, each layer is fetched when a forward comes to it",
    )
    unfinished: str = _opt(
        "refuse",
        "a teacher whose run has not ended, or targets still being scored: refuse it where the schedule needs more than "
        "is there; wait for a stage's checkpoint or a step's targets, or go on with the newest checkpoint (and record that)",
        ("refuse", "wait", "newest"),
    )
    cache: str = _opt(
        "",
        "folder on each node's own disk for fetched checkpoints, e.g. $TMPDIR/teacher; "
        "empty: ~/.cache/distill, for a trajectory in a local folder none",
    )
    cache_gb: float = _opt(0.0, "most that the cache may hold, in GB; 0: half of what is free on its disk")


@dataclass
class ScheduleConfig:
    """Which teacher checkpoint teaches which samples."""

    kind: str = _opt(
        "one_shot",
        "one_shot: the final teacher; equal: num_stages equal stages; n_t: stage_steps on each, the rest on the last; "
        "two_shot: one early checkpoint for early_share, then the final; explicit: stages as given; "
        "speed: student step s is taught by the checkpoint at or after speed*(s+1); "
        "saturation: num_stages in turn, the next when the student has stopped gaining",
        ("one_shot", "equal", "n_t", "two_shot", "explicit", "speed", "saturation"),
    )
    checkpoints: list[int] = _opt([], "teacher steps to use; empty: chosen from the whole trajectory")
    num_stages: int = _opt(0, "equal, n_t, saturation: number of stages; 0: one a checkpoint")
    stage_steps: int = _opt(
        0, "n_t: student steps on every checkpoint but the last; saturation: the most steps, 0: no limit"
    )
    early_share: float = _opt(0.1, "two_shot: share of the budget on the early checkpoint, 0 to 1")
    stages: list[list[int]] = _opt([], "explicit: [[first student step, teacher step], ...]")
    speed: float = _opt(1.0, "speed: teacher steps a student step")
    patience: int = _opt(2, "saturation: validations without a gain after which the next checkpoint teaches")
    min_gain: float = _opt(0.01, "saturation: validation top-1 that counts as a gain, 0 to 1")


@dataclass
class ObjectiveConfig:
    """What is minimised."""

    weights: dict[str, Ramp] = _opt(
        {},
        "weight (a ramp) of each: hard, one of forward_kl, reverse_kl, jsd, tvd, and any of `distill train "
        "--help-objectives`; empty: all on forward_kl with a teacher, else on hard",
    )
    settings: dict[str, Any] = _opt(
        {}, "settings of terms by name, as that help lists them, e.g. {atkd: {easy_share: 0.3}}"
    )
    speculate_from: float = _opt(
        1.0,
        "clm: share of the budget from which the student continues half of each text, and learns on that; 1: never",
    )
    speculate_top_k: int = _opt(
        25,
        "a token of the student's that is not among so many of the teacher's likeliest is replaced by the teacher, also "
        "in the warm-up by `preference`",
    )
    beta: float = _opt(0.5, "jsd: the teacher's share of the mixture, 0 (forward KL) to 1 (reverse KL)")
    temperature: Ramp = _opt(
        1.0, "softmax temperature, a ramp; below 1e-4 the teacher's arg-max is the label"
    )
    temperature_on: str = _opt("teacher", "whose logits the temperature divides", ("teacher", "both"))
    temperature_squared: bool = _opt(False, "multiply the divergence by temperature^2")
    chunk_rows: int = _opt(0, "rows whose logits are alive at once; 0: by device and vocabulary")
    kernel: str = _opt("auto", "implementation of the divergence", ("auto", "triton", "cpu", "reference"))


@dataclass
class OptimConfig:
    """AdamW and its learning rate."""

    lr: float = _opt(1e-3, "peak learning rate")
    beta1: float = _opt(0.9, "AdamW: decay of the running mean of the gradient, 0 to below 1")
    beta2: float = _opt(0.95, "AdamW: decay of the running mean of the squared gradient, 0 to below 1")
    eps: float = _opt(
        1e-8, "AdamW: added to the root of the squared gradient's mean, against a division by 0"
    )
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

    zero_stage: int = _opt(1, "DeepSpeed ZeRO stage: 0 to 3; 3 also splits the weights over the ranks")
    dtype: str = _opt(
        "bf16", "dtype of weights and activations; the optimizer's copy is fp32", ("bf16", "fp32")
    )
    offload_optimizer: bool = _opt(
        False, "ZeRO 1 to 3: fp32 weights and AdamW's moments in host memory, where the step is computed too"
    )
    activation_checkpointing: bool = _opt(
        False,
        "keep each layer's input only and compute the layer again in backward: less memory, a third more work",
    )
    compile: bool = _opt(False, "ZeRO 0 to 2: torch.compile of the student's trunk; minutes at the start")


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
    trajectory_drop_every: int = _opt(
        0,
        "the same where the validation loss falls by more than 0.3 nats per doubling of steps, where most is learned "
        "from a trajectory; 0: no more than elsewhere",
    )
    trajectory_to: str = _opt(
        "", "URL (s3://, gs://, az://) to send the trajectory to; empty: it stays in run_dir"
    )


@dataclass
class LogConfig:
    """What the run says."""

    every: int = _opt(10, "steps between rows of metrics.jsonl, TensorBoard and the terminal")
    eval_every: int = _opt(500, "steps between validations; the last step is always validated")
    eval_samples: int = _opt(1024, "validation samples read, at most")


@dataclass
class Config:
    """One run. `batch_size` sequences are a step of all ranks, `micro_batch_size` a forward on one."""

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

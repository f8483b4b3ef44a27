"""Validation on held-out documents: the same samples and masks every time."""

from __future__ import annotations

import math

import torch

from distill.config import Config
from distill.data import Samples, validation_batches
from distill.distributed import World, sum_over_ranks
from distill.engine import Student
from distill.metrics import Sums, means
from distill.objectives import hard_labels

SEED = 0  # of the validation masks: the same for all runs, so that their figures compare


def validation_samples(config: Config) -> Samples:
    """The held-out documents of the run's shards. Raises ValueError if there are none: a loss over nothing is 0."""
    samples = Samples(config.data, "validation", SEED, shuffle=False)
    if len(samples) == 0:
        raise ValueError(
            f"{config.data.shards}: no held-out documents: run `python -m data_prep documents` with a larger "
            "--validation-share and make the shards again"
        )
    return samples


@torch.no_grad()
def validate(
    student: Student, samples: Samples, config: Config, micro: int, world: World
) -> dict[str, float]:
    """Hard loss in nats a counted token, top-1 accuracy and perplexity, over all ranks. Collective."""
    objective = hard_labels(config.objective, samples.tokenizer.vocab_size)
    was_training = student.training
    student.eval()
    sums = Sums(world.device)
    for batch in validation_batches(samples, config.log.eval_samples, micro, world.rank, world.size):
        batch = batch.to(world.device)
        sums.add(student(batch.inputs, batch.rows_N, batch.labels_N, None, objective))
    student.train(was_training)
    local = sums.read()
    found = means(dict(zip(local, sum_over_ranks(list(local.values()), world), strict=False)))
    return {
        "hard": found["hard"],
        "accuracy": found["accuracy"],
        "perplexity": math.exp(min(found["hard"], 700.0)),
    }

"""Validation on held-out documents: the same samples and masks every time."""

from __future__ import annotations

import math
from functools import partial

import torch
from transformers import PreTrainedModel

from distill.config import Config, ObjectiveConfig
from distill.data import Samples, validation_batches
from distill.distributed import World, sum_over_ranks
from distill.metrics import Sums, means
from distill.models import counted_rows
from distill.objectives import HARD
from distill.objectives.forward_kl import forward_kl

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
    model: PreTrainedModel, samples: Samples, config: Config, micro: int, world: World
) -> dict[str, float]:
    """Hard loss in nats a counted token, top-1 accuracy and perplexity, over all ranks."""
    objective = partial(
        forward_kl,
        config=ObjectiveConfig(chunk_rows=config.objective.chunk_rows, kernel=config.objective.kernel),
        weights=HARD,
        temperature=1.0,
        vocab_size=samples.tokenizer.vocab_size,
    )
    was_training = model.training
    model.eval()
    sums = Sums(world.device)
    for batch in validation_batches(samples, config.log.eval_samples, micro, world.rank, world.size):
        batch = batch.to(world.device)
        sums.add(objective(counted_rows(model, batch.inputs, batch.rows_N), None, batch.labels_N))
    model.train(was_training)
    local = sums.read()
    found = means(dict(zip(local, sum_over_ranks(list(local.values()), world), strict=False)))
    return {
        "hard": found["hard"],
        "accuracy": found["accuracy"],
        "perplexity": math.exp(min(found["hard"], 700.0)),
    }

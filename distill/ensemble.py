"""Several checkpoints of one trajectory teach together, a snapshot ensemble (Wang et al., NeurIPS 2022, 2210.06458)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from data_prep.shards import TokenizerInfo
from distill.config import Config
from distill.data import Batch
from distill.distributed import World
from distill.head import Mixture, Pooled
from distill.models import Rows, Work
from distill.objectives.seen import label_log_probabilities
from distill.schedule import Schedule, together
from distill.teacher import Teacher
from distill.trajectory.manifest import Manifest


class Ensemble:
    """The checkpoint that the schedule names and those before it in the trajectory, `teacher.ensemble` in all.

    Each member has a model of its own in memory and stays while it teaches: from one stage to the next only those
    that are new are read.
    """

    def __init__(
        self, manifest: Manifest, config: Config, tokenizer: TokenizerInfo, sequence_length: int, world: World
    ) -> None:
        """Collective, as are `follow` and, under ZeRO 3, `signal`."""
        self.known, self.pool = list(manifest.checkpoints), config.teacher.pool
        self.vocab_size = tokenizer.vocab_size
        self.members = [
            Teacher(manifest, config, tokenizer, sequence_length, world)
            for _ in range(config.teacher.ensemble)
        ]

    def _at(self, schedule: Schedule, consumed: int) -> list[int]:
        return together(schedule.checkpoint_at(consumed), self.known, len(self.members))

    def follow(self, schedule: Schedule, consumed: int) -> float:
        """Be the teachers of the sample after `consumed` samples, have the next ones fetched. Seconds waited."""
        size = len(self.members)
        now = self._at(schedule, consumed)
        later = [together(step, self.known, size) for step in schedule.upcoming(consumed)]
        return sum(
            member.use(step, [then[slot] for then in later if then[slot] != step])
            for slot, (member, step) in enumerate(zip(self.members, now, strict=True))
        )

    def await_next(self, schedule: Schedule, consumed: int) -> bool:
        """Wait for the weights that `follow` will need. Whether they are at hand."""
        wanted = zip(self.members, self._at(schedule, consumed), strict=True)
        return all([member.await_weights(step) for member, step in wanted])

    @property
    def swap_seconds(self) -> float:
        return sum(member.swap_seconds for member in self.members)

    @property
    def bytes_read(self) -> int:
        return sum(member.bytes_read for member in self.members)

    @property
    def work(self) -> Work:
        """Of one forward of all members."""
        of_each = [member.work for member in self.members if member.work]
        return Work(*(sum(numbers) for numbers in zip(*of_each, strict=True)))

    def signal(self, batch: Batch) -> Pooled:
        """What they say together about this batch."""
        said = [member.signal(batch) for member in self.members]
        return pooled(said, batch.labels_N, self.pool, self.vocab_size)

    def close(self) -> None:
        for member in self.members:
            member.close()


def pooled(members: Sequence[Rows], labels_N: Tensor, pool: str, vocab_size: int) -> Pooled:
    """One teacher of several, by what `pool` says.

    probs: the mean of their probabilities. log_probs: of their logarithms, i.e. of the logits. gold: of their
    probabilities, a row's weights proportional to what each gives to its label (UniKD, 2204.00548, with exp(-CE)).
    """
    hidden = [rows.hidden_ND for rows in members]
    weights_NM = hidden[0].new_zeros(len(labels_N), len(members))
    if pool == "gold":
        gold = [label_log_probabilities(rows, labels_N, vocab_size) for rows in members]
        weights_NM = torch.stack(gold, 1).log_softmax(1).to(hidden[0].dtype)
    heads = tuple(rows.head for rows in members)
    return Pooled(torch.cat([*hidden, weights_NM], 1), Mixture(heads, vocab_size, pool == "log_probs"))

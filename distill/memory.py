"""What the memory of one rank holds in training, by part, at each ZeRO stage. In bytes.

The layouts are DeepSpeed 0.19.8's own (read in runtime/zero), and tests/test_memory.py holds weights, gradients and
optimizer state against measured peaks. Activations and logits are estimates.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel

from distill.kernels.linear import LOGITS_BYTES, ROWS_ON_GPU
from distill.models import num_parameters

BYTES = {"bf16": 2, "fp32": 4}
BUCKET = 50_000_000  # gradients that the engine collects before it sums them over the ranks: 0.1 GB in bf16
GATHERED = 1_000_000_000  # weights that stage 3 holds whole at once, at most; its default
PREFETCHED = 50_000_000  # weights that stage 3 gathers ahead of their use; its default
PERSISTENT = 100_000  # stage 3 keeps weights of fewer numbers whole on every rank; its default


@dataclass(frozen=True)
class RankMemory:
    """Bytes of one rank at the moment of the step when it needs most.

    weights: in the dtype of training; in stage 3 those gathered for the moment count too. optimizer: fp32 master
    weights and AdamW's two moments. gradients: whole or this rank's part, with the copies that the step makes.
    buckets: gradients on their way to the other ranks.
    """

    weights: int
    optimizer: int
    gradients: int
    buckets: int = 0
    teacher: int = 0
    activations: int = 0
    logits: int = 0

    @property
    def total(self) -> int:
        return sum(dataclasses.astuple(self))


def student_memory(
    model: nn.Module, stage: int, dtype: str, ranks: int, bucket: int = BUCKET, offload: bool = False
) -> RankMemory:
    """Weights, optimizer state, gradients and buckets of `model` in ZeRO `stage` on each of `ranks` ranks.

    dtype: bf16 or fp32; stage 0 is always fp32 (in bf16 it is refused).
    bucket: its size in numbers; on a GPU it takes all of that, on CPU what of it is touched.
    offload: of the optimizer, which takes the memory of the host instead (see `host_memory`); not in stage 0.
    """
    numbers, each = num_parameters(model), BYTES["fp32" if stage == 0 else dtype]
    if stage == 0:
        return RankMemory(4 * numbers, 8 * numbers, 4 * numbers, 4 * min(bucket, numbers))
    part = -(-numbers // ranks)
    optimizer = 0 if offload else 12 * part
    # In backward gradients wait beside the bucket until it is reduced; for the step a rank flattens its part of
    # them, then casts that to fp32. The larger of the two counts.
    waiting = numbers if stage == 1 else min(bucket, numbers) + (part if numbers > bucket else 0)
    stepping = each * part + (4 * part if dtype == "bf16" or stage == 3 else 0)
    if stage == 3:
        return _with_weights_split(model, each, part, optimizer, each * waiting, stepping, each * bucket)
    stepping += each * part
    if each * (waiting + bucket) > stepping:
        return RankMemory(each * numbers, optimizer, each * waiting, each * bucket)
    return RankMemory(each * numbers, optimizer, stepping)


def _with_weights_split(
    model: nn.Module, each: int, part: int, optimizer: int, waiting: int, stepping: int, bucket: int
) -> RankMemory:
    """Stage 3 keeps its part of the gradients and its bucket; in backward it has gathered the weights."""
    own = each * (part + sum(p.numel() for p in model.parameters() if p.numel() < PERSISTENT))
    gathered = each * min(GATHERED, num_parameters(model))
    if gathered + waiting > stepping:
        return RankMemory(own + gathered, optimizer, each * part + waiting, bucket)
    return RankMemory(own, optimizer, each * part + stepping, bucket)


def host_memory(model: nn.Module, ranks: int) -> int:
    """What a rank's offloaded optimizer takes of the host: fp32 weights, two moments, and the gradients of the step."""
    return 16 * -(-num_parameters(model) // ranks)


def teacher_memory(
    model: PreTrainedModel | None, dtype: str, ranks: int = 1, stage: int = 0, offload: bool = False
) -> int:
    """The frozen teacher's weights: no gradients, no optimizer state.

    Stage 3: the head whole, of the trunk this rank's part (offload: none, it lies in host memory) and what is fetched at
    once, at most PREFETCHED and the largest weight.
    """
    if model is None:
        return 0
    if stage == 0:
        return BYTES[dtype] * num_parameters(model)
    head, part = _dealt(model, ranks)
    largest = max(p.numel() for p in model.parameters())
    gathered = min(num_parameters(model.base_model), PREFETCHED + largest)
    return BYTES[dtype] * (head + gathered + (0 if offload else part))


def next_teacher_memory(
    model: PreTrainedModel | None, dtype: str, ranks: int = 1, stage: int = 0, offload: bool = False
) -> int:
    """What a rank's teacher takes of the host: the next checkpoint, waiting; offload: the trunk that teaches, too."""
    if model is None:
        return 0
    if stage == 0:
        return BYTES[dtype] * num_parameters(model)
    head, part = _dealt(model, ranks)
    return BYTES[dtype] * (head + part + (part if offload else 0))


def _dealt(model: PreTrainedModel, ranks: int) -> tuple[int, int]:
    """(numbers of the head, whole on every rank, also where it is tied to the trunk; of a rank's part of the trunk)."""
    trunk = set(model.base_model.parameters())
    head = {
        *model.get_output_embeddings().parameters(),
        *(p for p in model.parameters() if p not in trunk),
    }
    return sum(p.numel() for p in head), -(-num_parameters(model.base_model) // ranks)


def activation_memory(
    model: PreTrainedModel, sequences: int, length: int, dtype: str, checkpointing: bool = False
) -> int:
    """What a forward of the student keeps for its backward; attention's probabilities are not kept.

    34 bytes a token, layer and unit of width in 16 bits (Korthikanti et al. 2022, equation 1 without its attention
    term), twice that in fp32. checkpointing: 2 a layer, its input, and one layer as it is computed again.
    An estimate: architectures differ by a third.
    """
    layers = model.config.num_hidden_layers
    kept = layers + 17 if checkpointing else 17 * layers
    return kept * BYTES[dtype] * sequences * length * model.config.hidden_size


def logits_memory(model: PreTrainedModel, rows: int, chunk_rows: int, dtype: str, taught: bool) -> int:
    """A chunk of logits of student and teacher, and the fp32 gradient of the student's last layer. An estimate."""
    vocabulary, each = model.config.vocab_size, BYTES[dtype]
    at_once = chunk_rows or min(ROWS_ON_GPU, LOGITS_BYTES // (2 * vocabulary * each))
    return (2 if taught else 1) * min(
        rows, at_once
    ) * vocabulary * each + 4 * vocabulary * model.config.hidden_size

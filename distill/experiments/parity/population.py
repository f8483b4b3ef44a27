"""Networks of several seeds trained side by side in plain PyTorch, and their state as one file."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor

from data_prep.files import whole_file
from distill.experiments.parity.models import MODELS, Params, logits_of, stacked
from distill.experiments.parity.settings import Net, Settings
from distill.experiments.parity.task import VALIDATION, samples
from distill.kernels import divergence
from distill.sample_order import key_of
from distill.schedule import learning_rate

STATE = "state.safetensors"


class BadState(ValueError):
    """A run's folder that belongs to another study."""


@dataclass(frozen=True)
class Lesson:
    """What some of the networks learn from: a teacher at this temperature, or (None) the labels."""

    networks: slice
    temperature: float | None


LABELS_ALONE = (Lesson(slice(None), None),)


@dataclass
class Population:
    """`copies` networks a seed, which start equal and see the same samples; network c * S + s is copy c of seed s.

    Their weights and samples are functions of (seed, stream) alone, whatever other seeds there are.
    `rows`: one a validation, {step, accuracy [copies][S], loss [copies][S], ...}.
    """

    settings: Settings
    net: Net
    stream: int
    device: torch.device
    copies: int = 1
    params: Params = field(default_factory=dict)
    step: int = 0
    rows: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        s, self.model = self.settings, MODELS[self.settings.model]
        generators = [torch.Generator().manual_seed(int(key_of(seed, self.stream)) >> 1) for seed in s.seeds]
        nets = stacked(self.model, s.task, self.net.width, s.initializer_range, generators)
        self.params = {
            name: _repeat(one_a_seed, self.copies).to(self.device).requires_grad_()
            for name, one_a_seed in nets.items()
        }
        kinds = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}
        self.optimizer = kinds[s.optimizer](self.params.values(), lr=self.net.optim.lr)
        held_out = [samples(s.task, seed, VALIDATION, 0, s.validation_samples) for seed in s.seeds]
        self.held_out_SND = torch.stack(held_out).to(self.device)
        self.held_out_SN = s.task.labels(self.held_out_SND)

    def next_block(self) -> Tensor:
        """Samples [steps, S, batch, d] up to the next validation."""
        s = self.settings
        steps = min(s.every, self.net.steps - self.step)
        num = steps * s.batch_size
        drawn = [samples(s.task, seed, self.stream, self.step // s.every, num) for seed in s.seeds]
        blocks = torch.stack(drawn).unflatten(1, (steps, s.batch_size))
        return blocks.transpose(0, 1).contiguous().to(self.device)

    def train(self, x_TSBD: Tensor, lessons: Sequence[Lesson], teacher_TGBC: Tensor | None = None) -> None:
        """A step a batch, by hard labels or by forward KL from the teachers' logits of all G networks."""
        labels_TSB = self.settings.task.labels(x_TSBD)
        for i, x_SBD in enumerate(x_TSBD):
            student_GBC = self.model.forward(self.params, _repeat(x_SBD, self.copies))
            labels_GB = _repeat(labels_TSB[i], self.copies)
            losses = [
                _loss(lesson, student_GBC, labels_GB, None if teacher_TGBC is None else teacher_TGBC[i])
                for lesson in lessons
            ]
            self.optimizer.zero_grad()
            # The networks share no parameter: the gradient of the sum is each one's own.
            (sum(losses[1:], losses[0]) / self.settings.batch_size).backward()
            for group in self.optimizer.param_groups:
                group["lr"] = learning_rate(self.net.optim, self.step, self.net.steps)
            self.optimizer.step()
            self.step += 1

    def validate(self) -> dict[str, Any]:
        """Accuracy and cross-entropy (nats) on held-out samples, [copies][S]."""
        accuracy, loss = [], []
        size = self.model.features_a_row(self.settings.task, self.net.width)
        for copy in range(self.copies):
            logits = logits_of(self.model, self._copy(copy), self.held_out_SND, size).double()
            log_p = logits.log_softmax(-1).gather(-1, self.held_out_SN[..., None])[..., 0]
            accuracy.append((logits.argmax(-1) == self.held_out_SN).double().mean(1).tolist())
            loss.append((-log_p.mean(1)).tolist())
        return {"step": self.step, "accuracy": accuracy, "loss": loss}

    def _copy(self, copy: int) -> Params:
        seeds = len(self.settings.seeds)
        return {name: t.detach()[copy * seeds : (copy + 1) * seeds] for name, t in self.params.items()}

    def network(self, index: int) -> Params:
        """The parameters of one network, detached."""
        return {name: tensor.detach()[index] for name, tensor in self.params.items()}

    # -------------------------------------------------------------------------------------------- state

    def save(self, folder: Path, bound_to: dict[str, Any]) -> None:
        """All that decides the following steps, in one file that appears whole or not at all."""
        tensors = {f"net.{name}": tensor.detach().cpu() for name, tensor in self.params.items()}
        for name, tensor in self.params.items():
            for key, value in self.optimizer.state.get(tensor, {}).items():
                if torch.is_tensor(value):
                    tensors[f"optimizer.{name}.{key}"] = value.detach().cpu()
        told = {"step": self.step, "rows": self.rows, "bound_to": bound_to}
        folder.mkdir(parents=True, exist_ok=True)
        with whole_file(folder / STATE) as file:
            file.write(save(tensors, {"told": json.dumps(told)}))

    def load(self, folder: Path, bound_to: dict[str, Any]) -> None:
        """Go on from where `folder` stands, if it holds anything.

        Raises:
            BadState: it was left by a run with other settings (each is named).
        """
        path = folder / STATE
        if not path.exists():
            return
        content = path.read_bytes()
        told = json.loads(_metadata(content)["told"])
        before = asdict(Settings()) | told["bound_to"]  # a setting that came later had its default
        different = [f"{k}: {before.get(k)!r} -> {v!r}" for k, v in bound_to.items() if before.get(k) != v]
        if different:
            raise BadState(
                f"{folder} was started with other settings ({'; '.join(different)}): choose another --out"
            )
        tensors = load(content)
        with torch.no_grad():
            for name, tensor in self.params.items():
                tensor.copy_(tensors[f"net.{name}"])
                prefix = f"optimizer.{name}."
                kept = {key.removeprefix(prefix): v for key, v in tensors.items() if key.startswith(prefix)}
                if kept:
                    steps_stay_on_cpu = {k: v if k == "step" else v.to(self.device) for k, v in kept.items()}
                    self.optimizer.state[tensor] = steps_stay_on_cpu
        self.step, self.rows = told["step"], told["rows"]


def _metadata(content: bytes) -> dict[str, str]:
    """The header's free part of a safetensors file."""
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length])["__metadata__"]


def _repeat(one_a_seed: Tensor, copies: int) -> Tensor:
    """[S, ...] -> [copies * S, ...]."""
    return one_a_seed.repeat(copies, *(1,) * (one_a_seed.dim() - 1))


def _loss(lesson: Lesson, student_GBC: Tensor, labels_GB: Tensor, teacher_GBC: Tensor | None) -> Tensor:
    """Sum over the lesson's networks and samples."""
    student_NC = student_GBC[lesson.networks].flatten(0, 1)
    labels_N = labels_GB[lesson.networks].flatten()
    if lesson.temperature is None or teacher_GBC is None:
        return divergence(student_NC, None, labels_N, soft_weight=0.0, hard_weight=1.0).loss
    teacher_NC = teacher_GBC[lesson.networks].flatten(0, 1)
    return divergence(student_NC, teacher_NC, labels_N, temperature=lesson.temperature).loss

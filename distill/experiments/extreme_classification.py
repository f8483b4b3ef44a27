"""Many classes, few samples: what double distillation buys over KL for the ranking of labels.

    python -m distill.experiments.extreme_classification                    # minutes on one core

Menon et al. (2005.10419; ICML 2021), section on multiclass retrieval, on synthetic data: x from N(0, I), P(y | x) the
softmax of a linear map and a Zipf prior, five relevant labels an x drawn from it without return, one of them the
label of training. The teacher is a linear model trained on many samples, the student one with a bottleneck, trained
on few, by `distill.objectives`. P@k: the share of relevant labels among the k best of held-out x.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from distill.config import ObjectiveConfig
from distill.experiments.arms import mean_and_spread, paired_t, save_results
from distill.kernels import Head
from distill.models import Rows
from distill.objectives import Objective

ARMS: dict[str, dict[str, Any]] = {
    "labels": {"hard": 1.0},
    "forward_kl": {"forward_kl": 1.0},
    "double": {"double": 1.0},
    "double, forward_kl": {"double": 0.5, "forward_kl": 0.5},
    "double_pairs": {"double_pairs": 1.0},
    "double_sampled": {"double_sampled": 1.0},
}
SETTINGS: dict[str, dict[str, Any]] = {"double_sampled": {"classes": 16, "samples": 64}}
RELEVANT, AT = 5, (1, 3, 5)


@dataclass
class Setting:
    """sharpness: scale of the logits beside the prior."""

    classes: int = 2000
    features: int = 32
    bottleneck: int = 16
    teacher_samples: int = 50_000
    student_samples: int = 4_000
    test_samples: int = 4_000
    sharpness: float = 1.2
    steps: int = 600
    batch_size: int = 128
    lr: float = 0.01


class Linear(nn.Module):
    """x -> logits, through `bottleneck` features if there are fewer of them than of x."""

    def __init__(self, setting: Setting, bottleneck: int) -> None:
        super().__init__()
        narrow = bottleneck < setting.features
        self.down = nn.Linear(setting.features, bottleneck) if narrow else nn.Identity()
        self.up = nn.Linear(bottleneck, setting.classes)

    def rows(self, x_ND: Tensor) -> Rows:
        return Rows(self.down(x_ND), Head(self.up.weight, self.up.bias))


def draw(setting: Setting, seed: int) -> tuple[Tensor, Tensor]:
    """x [N, features] and RELEVANT labels of each [N, 5] of teacher's, student's and test's samples together."""
    torch.manual_seed(seed)
    number = setting.teacher_samples + setting.student_samples + setting.test_samples
    directions_CD = torch.randn(setting.classes, setting.features) * setting.sharpness
    prior_C = -torch.arange(1, setting.classes + 1).log()
    x_ND = torch.randn(number, setting.features)
    labels = []
    for some_BD in x_ND.split(4096):
        logits_BC = some_BD @ directions_CD.T + prior_C
        gumbel_BC = -torch.empty_like(logits_BC).exponential_().log()
        labels.append((logits_BC + gumbel_BC).topk(RELEVANT, dim=1).indices)
    labels_N5 = torch.cat(labels)
    order = torch.rand(labels_N5.shape).argsort(1)  # the label of training is any of the five
    return x_ND, labels_N5.gather(1, order)


def fit(
    model: Linear, x_ND: Tensor, labels_N: Tensor, teacher: Linear | None, weights: dict[str, Any], s: Setting
) -> None:
    settings = {name: keys for name, keys in SETTINGS.items() if name in weights}
    objective = Objective(ObjectiveConfig(weights=weights, settings=settings), s.classes)
    optimizer = torch.optim.Adam(model.parameters(), lr=s.lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, s.steps)
    for _ in range(s.steps):
        chosen = torch.randint(len(x_ND), (s.batch_size,))
        with torch.no_grad():
            said = teacher.rows(x_ND[chosen]) if teacher else None
        sums = objective(model.rows(x_ND[chosen]), said, labels_N[chosen])
        optimizer.zero_grad()
        (sums.loss / s.batch_size).backward()
        optimizer.step()
        schedule.step()


@torch.no_grad()
def precision(model: Linear, x_ND: Tensor, relevant_N5: Tensor) -> dict[str, float]:
    """P@k for each k."""
    rows = model.rows(x_ND)
    best_NK = rows.head(rows.hidden_ND).topk(max(AT), dim=1).indices
    hit_NK = (best_NK[:, :, None] == relevant_N5[:, None, :]).any(2).double()
    return {f"P@{k}": float(hit_NK[:, :k].mean()) for k in AT}


def one_seed(setting: Setting, seed: int) -> dict[str, dict[str, float]]:
    x_ND, labels_N5 = draw(setting, seed)
    sizes = [setting.teacher_samples, setting.student_samples, setting.test_samples]
    for_teacher, for_student, for_test = zip(x_ND.split(sizes), labels_N5.split(sizes), strict=True)
    teacher = Linear(setting, setting.features)
    fit(teacher, for_teacher[0], for_teacher[1][:, 0], None, {"hard": 1.0}, setting)
    found = {"teacher": precision(teacher, *for_test)}
    for name, weights in ARMS.items():
        torch.manual_seed(seed)
        student = Linear(setting, setting.bottleneck)
        start = time.process_time()
        fit(student, for_student[0], for_student[1][:, 0], teacher, weights, setting)
        seconds = time.process_time() - start
        found[name] = {**precision(student, *for_test), "cpu_seconds": seconds}
    return found


def report(found: dict[int, dict[str, dict[str, float]]]) -> str:
    """Markdown: mean and spread over seeds, and t of the paired difference of P@5 from the forward KL."""
    lines = ["| | P@1 | P@3 | P@5 | t of P@5 - forward_kl's |", "|---|---|---|---|---|"]
    runs = list(found.values())
    for name in runs[0]:
        cells = [mean_and_spread([run[name][f"P@{k}"] for run in runs]) for k in AT]
        shown = " | ".join(f"{mean:.3f} ± {spread:.3f}" for mean, spread in cells)
        gaps = [run[name]["P@5"] - run["forward_kl"]["P@5"] for run in runs]
        t = "" if name in ("forward_kl", "teacher") or len(runs) < 2 else f"{paired_t(gaps):.1f}"
        lines.append(f"| {name} | {shown} | {t} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("work/extreme"), help="folder for results.json")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4], help="of data and weights")
    arguments = parser.parse_args()
    setting, found = Setting(), {}
    arguments.out.mkdir(parents=True, exist_ok=True)
    for seed in arguments.seeds:
        found[seed] = one_seed(setting, seed)
        print(f"seed {seed} done, {len(found)} of {len(arguments.seeds)}", file=sys.stderr, flush=True)
    save_results(arguments.out / "results.json", {"setting": asdict(setting), "seeds": found})
    print(report(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Why distillation helps: a student of labels, of Bayes probabilities, and of teachers that are wrong about them.

    python -m distill.experiments.bayes_teacher                                  # seconds on one core

Menon et al., "A statistical perspective on distillation" (ICML 2021), in the setting R4: x from two Gaussians
N(+v, I) and N(-v, I) of equal weight, so that P(1 | x) = sigmoid(2 v x) is known; the student is a logistic
regression brought to convergence. A teacher's soft labels lower the variance of the empirical risk, whatever the
teacher; what it gets wrong about the probabilities stays as a bias that no number of samples removes.
"""

from __future__ import annotations

import argparse
import platform
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distill.experiments.arms import mean_and_spread, paired_t, pyplot, save_results
from distill.kernels import divergence
from distill.probes.report import save_figure

# Teacher -> (slope, offset) of its logit on the Bayes logit; the student of labels has none.
TEACHERS: dict[str, tuple[float, float]] = {
    "Bayes": (1.0, 0.0),
    "over-confident (logit x 3)": (3.0, 0.0),
    "biased (logit + 1.5)": (1.0, 1.5),
}
LABELS = "labels"
TOLERANCE, MAX_NEWTON_STEPS = 1e-10, 100
ECE_BINS = 15


@dataclass
class Setting:
    """R4 of the project's notes on the paper. l2: of the mean loss + l2/2 |weights|^2, the offset is free."""

    d: int = 20
    norm_of_v: float = 1.0
    sizes: list[int] = field(default_factory=lambda: [25, 100, 400, 1600])
    repeats: int = 100
    l2: float = 1e-3
    test_samples: int = 40_000
    seed: int = 0


def draw(setting: Setting, num: int, rng: np.random.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """x [num, d], labels [num] int64, Bayes logits [num]; float64."""
    labels = rng.integers(0, 2, num)
    x = rng.standard_normal((num, setting.d))
    x[:, 0] += np.where(labels == 1, setting.norm_of_v, -setting.norm_of_v)
    return torch.from_numpy(x), torch.from_numpy(labels), torch.from_numpy(2 * setting.norm_of_v * x[:, 0])


def two_columns(logit: Tensor) -> Tensor:
    """[..., 2] logits of class 0 and 1 whose difference is `logit`."""
    return torch.stack([torch.zeros_like(logit), logit], -1)


def fit(x_RND: Tensor, labels_RN: Tensor, teacher_RN: Tensor | None, l2: float) -> Tensor:
    """Weights [R, d + 1] (the offset last) of R logistic regressions at convergence, by Newton's method.

    Their loss is ours: forward KL from the teacher's logits, or hard labels.

    Raises:
        ValueError: no convergence.
    """
    repeats, num, d = x_RND.shape
    x = torch.cat([x_RND, torch.ones(repeats, num, 1, dtype=x_RND.dtype)], -1)
    penalty = torch.diag(torch.tensor([l2] * d + [0.0], dtype=x.dtype))
    weights = torch.zeros(repeats, d + 1, dtype=x.dtype)
    value, gradient, hessian = _derivatives(x, labels_RN, teacher_RN, weights, penalty)
    for _ in range(MAX_NEWTON_STEPS):
        if gradient.abs().max() < TOLERANCE:
            return weights
        step = torch.linalg.solve(hessian, gradient)
        scale = torch.ones(repeats, 1, dtype=x.dtype)
        while True:  # halve the step of every regression that it would make worse
            tried = _derivatives(x, labels_RN, teacher_RN, weights - scale * step, penalty)
            worse = (tried[0] > value + 1e-12)[:, None] & (scale > 1e-6)
            if not worse.any():
                break
            scale = torch.where(worse, scale / 2, scale)
        weights = weights - scale * step
        value, gradient, hessian = tried
    raise ValueError(f"no convergence in {MAX_NEWTON_STEPS} Newton steps: raise l2, got {l2}")


def _derivatives(
    x_RND: Tensor, labels_RN: Tensor, teacher_RN: Tensor | None, weights_RD: Tensor, penalty: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Value [R] (but for a constant), gradient [R, D] and Hessian [R, D, D] of the penalised mean loss."""
    repeats, num, _ = x_RND.shape
    weights = weights_RD.detach().requires_grad_()
    logit_RN = (x_RND @ weights[..., None])[..., 0]
    is_taught = teacher_RN is not None
    sums = divergence(
        two_columns(logit_RN.flatten()),
        two_columns(teacher_RN.flatten()) if teacher_RN is not None else None,
        labels_RN.flatten(),
        soft_weight=float(is_taught),
        hard_weight=float(not is_taught),
        impl="reference",
    )
    penalties = 0.5 * (weights @ penalty * weights).sum(-1)
    (gradient,) = torch.autograd.grad(sums.loss / num + penalties.sum(), weights)
    with torch.no_grad():
        p = logit_RN.sigmoid()
        target = labels_RN.double() if teacher_RN is None else teacher_RN.sigmoid()
        value = risk(logit_RN, target).mean(1) + penalties
        hessian = (x_RND * (p * (1 - p))[..., None]).mT @ x_RND / num + penalty
    return value, gradient, hessian


def risk(logit: Tensor, probability: Tensor) -> Tensor:
    """Cross-entropy (nats) of the prediction with a target that is 1 with `probability`."""
    return probability * torch.nn.functional.softplus(-logit) + (
        1 - probability
    ) * torch.nn.functional.softplus(logit)


def quality(logit_N: Tensor, labels_N: Tensor) -> dict[str, float]:
    """Log-loss, Brier score, expected calibration error and error rate of probabilities of class 1."""
    p, y = logit_N.sigmoid(), labels_N.double()
    confidence, correct = torch.maximum(p, 1 - p), ((p > 0.5) == (y > 0.5)).double()
    bins = (confidence * ECE_BINS).long().clamp(max=ECE_BINS - 1)
    gaps = torch.zeros(ECE_BINS, dtype=torch.float64).index_add_(0, bins, confidence - correct)
    return {
        "log_loss": risk(logit_N, y).mean().item(),
        "brier": 2 * (p - y).square().mean().item(),  # over both classes
        "ece": (gaps.abs().sum() / len(y)).item(),
        "error": 1 - correct.mean().item(),
    }


def study(setting: Setting) -> dict[str, Any]:
    """Teachers as estimates of probabilities, students of every kind and size, and the risk's bias and variance."""
    rng = np.random.default_rng(setting.seed)
    test_x, test_labels, test_bayes = draw(setting, setting.test_samples, rng)
    teachers = {name: quality(a * test_bayes + b, test_labels) for name, (a, b) in TEACHERS.items()}
    students: dict[str, Any] = {}
    risks: dict[str, Any] = {}
    for num in setting.sizes:
        drawn = [draw(setting, num, rng) for _ in range(setting.repeats)]
        x, labels, bayes = (torch.stack(each) for each in zip(*drawn, strict=True))
        students[str(num)] = {}
        for name, teacher in {LABELS: None, **{n: a * bayes + b for n, (a, b) in TEACHERS.items()}}.items():
            weights = fit(x, labels, teacher, setting.l2)
            logits = test_x @ weights[:, :-1].T + weights[:, -1]
            found = [quality(logit, test_labels) for logit in logits.T]
            students[str(num)][name] = {key: [run[key] for run in found] for key in ("log_loss", "error")}
        risks[str(num)] = _bias_and_variance(bayes, labels, risk(test_bayes, test_bayes.sigmoid()).mean())
    return {"setting": asdict(setting), "teachers": teachers, "students": students, "risks": risks}


def _bias_and_variance(
    bayes_RN: Tensor, labels_RN: Tensor, population: Tensor
) -> dict[str, dict[str, float]]:
    """Of the empirical risk of the Bayes classifier, measured by labels and by every teacher, over the repeats.

    The paper's section 3: E[(risk_distilled - risk)^2] is at most Var / N + (distance of the teacher)^2.
    """
    targets = {
        LABELS: labels_RN.double(),
        **{n: (a * bayes_RN + b).sigmoid() for n, (a, b) in TEACHERS.items()},
    }
    empirical = {name: risk(bayes_RN, target).mean(1) for name, target in targets.items()}
    return {
        name: {"variance": risks.var().item(), "squared_bias": (risks.mean() - population).square().item()}
        for name, risks in empirical.items()
    }


def tables(found: dict[str, Any]) -> str:
    """Markdown: the teachers, the students, and the two parts of the risk's error."""
    names = [LABELS, *TEACHERS]
    teachers = {
        name: [f"{q[key]:.3f}" for key in ("log_loss", "brier", "ece", "error")]
        for name, q in found["teachers"].items()
    }
    students, risks = {}, {}
    for num, by_name in found["students"].items():
        pairs = zip(by_name[LABELS]["log_loss"], by_name["Bayes"]["log_loss"], strict=True)
        t = paired_t([labels - bayes for labels, bayes in pairs])
        students[num] = [*(_student(by_name[name]) for name in names), f"{t:.1f}"]
    for num, by_name in found["risks"].items():
        ratio = by_name["Bayes"]["variance"] / by_name[LABELS]["variance"]
        parts = (
            f"{1e3 * by_name[n]['variance']:.3f} / {1e3 * by_name[n]['squared_bias']:.3f}" for n in names
        )
        risks[num] = [*parts, f"{ratio:.2f}"]
    return "\n\n".join(
        [
            _table("teacher", ["log-loss", "Brier", "calibration error", "error"], teachers),
            _table("samples: log-loss / error", [*names, "labels - Bayes, paired t"], students),
            _table("samples: variance / squared bias of the risk, x 1000", [*names, "Bayes / labels"], risks),
        ]
    )


def _student(runs: dict[str, list[float]]) -> str:
    mean, spread = mean_and_spread(runs["log_loss"])
    return f"{mean:.3f} ± {spread:.3f} / {mean_and_spread(runs['error'])[0]:.3f}"


def _table(corner: str, columns: list[str], rows: dict[str, list[str]]) -> str:
    head = [f"| {corner} | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    return "\n".join(head + [f"| {name} | {' | '.join(cells)} |" for name, cells in rows.items()])


def draw_picture(found: dict[str, Any], path: Path) -> None:
    """The students' log-loss over the number of samples, with its spread, as a PNG."""
    figure, axis = pyplot.subplots(figsize=(6, 4), constrained_layout=True)
    sizes = [int(num) for num in found["students"]]
    for name in (LABELS, *TEACHERS):
        points = [mean_and_spread(by_name[name]["log_loss"]) for by_name in found["students"].values()]
        axis.errorbar(
            sizes, [m for m, _ in points], [s for _, s in points], marker=".", capsize=3, label=name
        )
    axis.axhline(
        found["teachers"]["Bayes"]["log_loss"],
        color="black",
        linestyle="--",
        linewidth=1,
        label="Bayes, test",
    )
    axis.set(
        xscale="log",
        xlabel="training samples",
        ylabel="student's log-loss (nats)",
        title="Gaussians with known probabilities",
    )
    axis.grid(alpha=0.3)
    axis.legend()
    save_figure(figure, path)


def main(arguments: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out", type=Path, default=Path("work/bayes_teacher"), help="folder for table and picture"
    )
    parser.add_argument("--seed", type=int, default=0, help="of all samples")
    parser.add_argument("--repeats", type=int, default=100, help="training sets of every size, at least 2")
    given = parser.parse_args(arguments)
    if given.repeats < 2 or given.seed < 0:
        parser.error(
            f"--repeats must be at least 2 and --seed not negative, got {given.repeats} and {given.seed}"
        )
    found = study(Setting(seed=given.seed, repeats=given.repeats))
    given.out.mkdir(parents=True, exist_ok=True)
    save_results(
        given.out / "results.json",
        {**found, "versions": {"torch": torch.__version__, "python": platform.python_version()}},
    )
    draw_picture(found, given.out / "curves.png")
    print(f"{tables(found)}\n\npicture: {given.out}/curves.png   figures: {given.out}/results.json")
    return 0


if __name__ == "__main__":
    sys.exit(main())

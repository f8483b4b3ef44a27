"""Terms on the distributions of each row, next to their equations written out in loops and float64."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from term_case import STORED, Row, assert_follows, rows_in, seen_case, with_heavy_tail
from torch import Tensor

from distill.objectives.seen import Seen
from distill.objectives.terms import TERMS

BOTH = pytest.mark.parametrize("stored", [False, True], ids=["live", "stored"])


def kl(p: list[Tensor], q: list[Tensor]) -> Tensor:
    return sum((a * (a / b).log() for a, b in zip(p, q, strict=True)), torch.tensor(0.0))


def normal(p: list[Tensor]) -> list[Tensor]:
    total = sum(p, torch.tensor(0.0))
    return [x / total for x in p]


def warm(p: list[Tensor], temperature: float) -> list[Tensor]:
    return normal([x ** (1 / temperature) for x in p])


def median(values: list[float]) -> float:
    """The lower of two middle ones."""
    return sorted(values)[(len(values) - 1) // 2]


def total(values: list[Tensor]) -> Tensor:
    return sum(values, torch.tensor(0.0, dtype=torch.float64))


def apart(row: Row) -> tuple[Tensor, Tensor, Tensor]:
    t, s = row.teacher[row.gold], row.student[row.gold]
    tkd = kl([t, 1 - t], [s, 1 - s])
    dkd = kl(normal([row.teacher[k] for k in row.others]), normal([row.student[k] for k in row.others]))
    return tkd, dkd, 1 - t


def atkd(easy: float) -> Callable[[Seen], Tensor]:
    def expected(seen: Seen) -> Tensor:
        parts = [apart(row) for row in rows_in(seen)]
        middle = median([float(unc) for _, _, unc in parts])
        return total([easy * d if float(u) < middle else (1 - easy) * (t + d) for t, d, u in parts])

    return expected


def rld(alpha: float, beta: float, t: float, ta: float) -> Callable[[Seen], Tensor]:
    def expected(seen: Seen) -> Tensor:
        found = []
        for row in rows_in(seen):
            top, own = warm(row.teacher, ta)[row.likeliest(1)[0]], warm(row.student, ta)[row.gold]
            found.append(alpha * ta**2 * kl([top, 1 - top], [own, 1 - own]))
            gold = row.teacher[row.gold]
            kept = [k for k in row.others if k not in row.classes or row.teacher[k] < gold]
            if kept:
                both = (warm([x[k] for k in kept], t) for x in (row.teacher, row.student))
                found.append(beta * t**2 * kl(*both))
        return total(found)

    return expected


def rho(x: list[Tensor], y: list[Tensor]) -> Tensor:
    mean_x, mean_y = (sum(z, torch.tensor(0.0)) / len(z) for z in (x, y))
    cov = sum(((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)), torch.tensor(0.0))
    var_x, var_y = (sum(((a - m) ** 2 for a in z), torch.tensor(0.0)) for z, m in ((x, mean_x), (y, mean_y)))
    return cov / (var_x * var_y).sqrt()


def pearson(classes: int) -> Callable[[Seen], Tensor]:
    def expected(seen: Seen) -> Tensor:
        found = []
        for row in rows_in(seen):
            kept = row.likeliest(classes)
            found.append(1 - rho([row.student[k].log() for k in kept], [row.teacher[k].log() for k in kept]))
        return total(found)

    return expected


def soft_ranks(z: list[Tensor], temperature: float) -> list[Tensor]:
    return [
        0.5 + sum((1 / (1 + (-(other - own) / temperature).exp()) for other in z), torch.tensor(0.0))
        for own in z
    ]


def spearman(classes: int, temperature: float) -> Callable[[Seen], Tensor]:
    def expected(seen: Seen) -> Tensor:
        found = []
        for row in rows_in(seen):
            kept = row.likeliest(classes)
            both = ([x[k].log() for k in kept] for x in (row.student, row.teacher))
            found.append(1 - rho(*(soft_ranks(side, temperature) for side in both)))
        return total(found)

    return expected


def cmkd(classes: int, temperature: float) -> Callable[[Seen], Tensor]:
    def expected(seen: Seen) -> Tensor:
        found = []
        for row in rows_in(seen):
            kept = row.likeliest(classes)
            own, other = ([x[k].log() for k in kept] for x in (row.student, row.teacher))
            h = float(-sum(p * p.log() for p in row.teacher)) / math.log(13)
            ranked = 1 - rho(soft_ranks(own, temperature), soft_ranks(other, temperature))
            found.append((1 - h) * (1 - rho(own, other)) + h * ranked)
        return total(found)

    return expected


def gate_learned(seen: Seen) -> Tensor:
    rows, sequences = rows_in(seen), seen.sequence_N.tolist()
    (w, bias), found = seen.learned["gate_learned"].parameters(), []
    for row, sequence in zip(rows, sequences, strict=True):
        same = [r for r, s in zip(rows, sequences, strict=True) if s == sequence]
        ce = -sum(float(r.student[r.gold].detach().log()) for r in same) / len(same)
        entropy = -sum(float(sum(p * p.log() for p in r.teacher)) for r in same) / len(same)
        g = 1 / (1 + (-(w[0, 0] * ce + w[0, 1] * entropy + w[0, 2] * math.log(len(same)) + bias[0])).exp())
        best = row.likeliest(1)[0]
        found.append(g * kl(row.teacher, row.student) - (1 - g) * row.student[best].log())
    return total(found)


def gate(slope: float) -> Callable[[Seen], Tensor]:
    def expected(seen: Seen) -> Tensor:
        rows, sequences = rows_in(seen), seen.sequence_N.tolist()
        entropy = [float(-sum(p * p.log() for p in row.teacher)) for row in rows]
        found = []
        for row, sequence in zip(rows, sequences, strict=True):
            same = [h for h, s in zip(entropy, sequences, strict=True) if s == sequence]
            g = 1 / (1 + math.exp(-slope * (sum(entropy) / len(entropy) - sum(same) / len(same))))
            best = row.likeliest(1)[0]
            found.append(g * kl(row.teacher, row.student) - (1 - g) * row.student[best].log())
        return total(found)

    return expected


def margins(seen: Seen) -> list[tuple[Row, float]]:
    """Each row with the mean margin of its bucket."""
    rows = rows_in(seen)
    bucket = [int(seen.bucket_V[row.ids[row.gold]]) for row in rows]  # type: ignore[index]
    own = []
    for row in rows:
        wrong = [float(row.teacher[k]) for k in row.classes if k != row.gold]
        own.append(float(row.teacher[row.gold]) - max(wrong, default=0.0))
    means = {b: [m for m, c in zip(own, bucket, strict=True) if c == b] for b in bucket}
    return [(row, sum(means[b]) / len(means[b])) for row, b in zip(rows, bucket, strict=True)]


def ada_alpha(seen: Seen) -> Tensor:
    return total(
        [
            (1 - (1 + m) / 2) * -row.student[row.gold].log() + (1 + m) / 2 * kl(row.teacher, row.student)
            for row, m in margins(seen)
        ]
    )


def ada_margin(seen: Seen) -> Tensor:
    return total(
        [
            (
                1 + sum(row.student[k] / row.student[row.gold] for k in row.others) * math.exp(max(0.0, m))
            ).log()
            for row, m in margins(seen)
        ]
    )


def excess_loss(temperature: float) -> Callable[[Seen], Tensor]:
    def expected(seen: Seen) -> Tensor:
        rows = rows_in(seen)
        w = [
            float(row.teacher[row.gold] / row.student[row.gold].detach()) ** (1 / temperature) for row in rows
        ]
        return len(rows) * total(
            [x / sum(w) * kl(r.teacher, r.student) for x, r in zip(w, rows, strict=True)]
        )

    return expected


EQUATIONS = {
    "atkd": (atkd(0.3), {"easy_share": 0.3}),
    "rld": (rld(1.0, 0.5, 1.0, 1.0), {}),
    "pearson": (pearson(3), {"classes": 3}),
    "spearman": (spearman(3, 0.7), {"classes": 3, "temperature": 0.7}),
    "cmkd": (cmkd(3, 0.7), {"classes": 3, "temperature": 0.7}),
    "gate": (gate(2.0), {"slope": 2.0}),
    "gate_learned": (gate_learned, {}),
    "ada_alpha": (ada_alpha, {}),
    "ada_margin": (ada_margin, {}),
    "excess_loss": (excess_loss(0.8), {"temperature": 0.8}),
}


@BOTH
@pytest.mark.parametrize("num_rows", [1, 2, 7])
@pytest.mark.parametrize("name", EQUATIONS)
def test_term_and_its_gradient_follow_the_equation(name: str, num_rows: int, stored: bool) -> None:
    expected, settings = EQUATIONS[name]
    seen = seen_case(num_rows, stored=stored, learns=name)
    for p in (p for module in seen.learned.values() for p in module.parameters()):
        torch.nn.init.normal_(p, std=0.3)  # not 0
    assert_follows(name, expected, seen, **settings)


@pytest.mark.parametrize("name", EQUATIONS)
def test_rest_of_the_vocabulary_is_no_class_however_heavy(name: str) -> None:
    expected, settings = EQUATIONS[name]
    assert_follows(name, expected, with_heavy_tail(seen_case(learns=name)), **settings)


def test_temperatures_of_rld_follow_the_equation() -> None:
    settings = {"confidence": 0.7, "others": 2.0, "temperature": 3.0, "confidence_temperature": 2.0}
    assert_follows("rld", rld(0.7, 2.0, 3.0, 2.0), seen_case(), **settings)


@BOTH
def test_label_and_others_apart_add_up_to_the_kl_divergence(stored: bool) -> None:
    for row in rows_in(seen_case(stored=stored)):
        tkd, dkd, unc = apart(row)
        torch.testing.assert_close(tkd + unc * dkd, kl(row.teacher, row.student))


@pytest.mark.parametrize("name", STORED)
def test_stored_targets_that_keep_every_class_say_what_the_live_teacher_says(name: str) -> None:
    from term_case import V, probabilities

    from distill.kernels import SparseTargets

    live = seen_case(learns=name)
    p_NV = probabilities(live.live)
    ids_NV = torch.arange(V).expand(7, V)
    gold_N = p_NV.gather(1, live.labels_N[:, None]).squeeze(1)
    targets = SparseTargets(ids_NV, p_NV, torch.zeros(7, dtype=torch.float64), gold_N)
    kept = seen_case(teacher=targets, learns=name)
    outcomes = []
    for seen in (live, kept):
        torch.manual_seed(3)
        value = TERMS[name].function(seen)
        outcomes.append((value, torch.autograd.grad(value, seen.student.hidden_ND)))
    torch.testing.assert_close(outcomes[0], outcomes[1], rtol=1e-6, atol=1e-6)


@BOTH
@pytest.mark.parametrize("name", STORED)
def test_teacher_that_is_sure_gives_finite_values_and_gradients(name: str, stored: bool) -> None:
    seen = seen_case(stored=stored, scale=60.0, learns=name)
    value = TERMS[name].function(seen)
    gradient = torch.autograd.grad(value, seen.student.hidden_ND)[0]
    assert value.isfinite()
    assert gradient.isfinite().all()


@pytest.mark.parametrize(
    "name",
    [name for name in STORED if name not in ("ada_margin", "double", "double_pairs", "double_sampled")],
)
def test_student_that_says_what_the_teacher_says_has_no_gradient_from_the_teacher(name: str) -> None:
    """But from labels and best guesses, which atkd, gate and the others that mix them in keep."""
    seen = seen_case()
    same = seen.live._replace(hidden_ND=seen.live.hidden_ND.clone().requires_grad_())
    seen = seen_case(student=same, learns=name)
    value = TERMS[name].function(seen)
    gradient = torch.autograd.grad(value, seen.student.hidden_ND)[0]
    mixes_labels = name in ("rld", "gate", "gate_learned", "ada_alpha")
    assert (float(gradient.abs().max()) > 1e-3) == mixes_labels

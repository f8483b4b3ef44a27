"""How much of the teacher each row takes: sentence and token level, by word frequency, by excess loss."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from distill.objectives.seen import Buckets, Seen, entropy, kl, of_classes, of_gold, over_rows


def gate(seen: Seen, *, slope: float = 1.0) -> Tensor:
    """sum_n g_s KL(p_t || p_s) + (1 - g_s) CE(argmax p_t, p_s), where s is the row's sequence.

    g_s = sigmoid(slope * (H - H_s)), with the teacher's mean entropy over all rows, H, and over those of the
    sequence: what is simple to the teacher is learnt token by token, the rest by its best guess. Depends on the
    micro-batch through H; where all its rows are of one sequence g is 1/2. Source: hybrid of sentence- and token-level
    distillation (2404.14827); there the gate is learned (`gate_learned`) and the sentences are generated.
    """
    soft_N, best_N, entropy_N, _ = _levels(seen)
    if seen.num_rows == 0:
        return soft_N.sum()
    gate_N = torch.sigmoid(slope * (entropy_N.mean() - group_means(entropy_N, seen.sequence_N)))
    return (gate_N * soft_N + (1 - gate_N) * best_N).sum()


class Gate(nn.Module):
    """Logit [N, 1] of three facts of each row's sequence; 0 at first."""

    def __init__(self, student_width: int, teacher_width: int) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 1)
        nn.init.zeros_(self.layer.weight)
        nn.init.zeros_(self.layer.bias)

    def forward(self, facts_N3: Tensor) -> Tensor:
        logit_N1: Tensor = self.layer(facts_N3)
        return logit_N1


def gate_learned(seen: Seen) -> Tensor:
    """sum_n g_s KL(p_t || p_s) + (1 - g_s) CE(argmax p_t, p_s), g_s = sigmoid( w . facts of the row's sequence ).

    Facts: mean CE_s of the labels, the teacher's mean entropy, log of the number of rows, without their gradient; w is
    learned with the student, from 0, so that g starts at 1/2. The loss itself trains it, hence it leans to the level
    that costs less, which can differ from the one that teaches more. Source: hybrid of sentence- and token-level
    distillation (2404.14827), of which the abstract was read; the facts [R], and the teacher's best guess of each token
    in place of a sentence that it generates, which raw text has none of.
    """
    soft_N, best_N, entropy_N, hard_N = _levels(seen)
    sequence_N = seen.sequence_N
    counts_N = torch.bincount(sequence_N)[sequence_N].to(entropy_N.dtype)
    means = [group_means(x, sequence_N) for x in (hard_N, entropy_N)]
    facts_N3 = torch.stack([*means, counts_N.log()], 1).to(seen.student.hidden_ND.dtype)
    gate_N = torch.sigmoid(seen.learned["gate_learned"](facts_N3).to(soft_N.dtype)).squeeze(1)
    return (gate_N * soft_N + (1 - gate_N) * best_N).sum()


def _levels(seen: Seen) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """[N] each: KL(p_t || p_s), CE with the teacher's best guess; its entropy and CE(label), without gradients."""

    def of_rows(rows: Buckets) -> Tensor:
        best_C = of_classes(rows.teacher_CK, rows.ids_CK).argmax(1)
        soft_C, best_C = kl(rows.teacher_CK, rows.student_CK), -of_gold(rows.student_CK, best_C)
        hard_C = -of_gold(rows.student_CK, rows.gold_C)
        return torch.stack([soft_C, best_C, entropy(rows.teacher_CK), hard_C], 1)

    soft_N, best_N, entropy_N, hard_N = over_rows(seen, of_rows).unbind(1)
    return soft_N, best_N, entropy_N.detach(), hard_N.detach()


def ada_alpha(seen: Seen) -> Tensor:
    """sum_n (1 - a_b) CE(label) + a_b KL(p_t || p_s), where b is the label's frequency bucket.

    a_b = (1 + m_b) / 2 with m_b the teacher's mean margin p_t(label) - max over others, -1 to 1, on the bucket's rows
    of the micro-batch: the teacher is followed where it is right. Depends on the micro-batch through m_b.
    Source: AdaAlpha (2106.10494, TMLR 2022), by bucket instead of by class; the map from margin to a is recalled [R].
    """
    soft_N, hard_N, _, margin_N = _margins(seen)
    alpha_N = (1 + margin_N) / 2
    return ((1 - alpha_N) * hard_N + alpha_N * soft_N).sum()


def ada_margin(seen: Seen) -> Tensor:
    """sum_n log( 1 + sum_{y' != y} exp( f_y' - f_y + max(0, m_b) ) ), y the label, m_b as in `ada_alpha`.

    Cross-entropy that asks for a larger margin where the teacher has one; no teacher probability enters otherwise.
    Source: AdaMargin (2106.10494, TMLR 2022), by bucket instead of by class [R].
    """
    _, _, odds_N, margin_N = _margins(seen)
    return softplus(odds_N + margin_N.clamp(min=0.0)).sum()


def excess_loss(seen: Seen, *, temperature: float = 1.0) -> Tensor:
    """N * sum_n w_n KL(p_t || p_s), w = softmax over rows of (CE_s - CE_t) / temperature, without its gradient.

    Rows on which the student's loss on the label is furthest above the teacher's count most. Depends on the
    micro-batch: the weights sum to 1 within it. Source: TST (2212.05422, IJCAI 2023), its search for inputs where
    the teacher is good and the student bad as a choice among the rows that there are.
    """

    def of_rows(rows: Buckets) -> Tensor:
        excess_C = of_gold(rows.teacher_CK, rows.gold_C) - of_gold(rows.student_CK, rows.gold_C)
        return torch.stack([kl(rows.teacher_CK, rows.student_CK), excess_C], 1)

    soft_N, excess_N = over_rows(seen, of_rows).unbind(1)
    return seen.num_rows * ((excess_N.detach() / temperature).softmax(0) * soft_N).sum()


def _margins(seen: Seen) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """[N] each: KL(p_t || p_s), CE(label), log odds against the label, the teacher's mean margin in the row's bucket."""
    assert seen.bucket_V is not None, "build_run counts the words"

    def of_rows(rows: Buckets) -> Tensor:
        student_CK, teacher_CK = rows.without_gold()
        gold_C = of_gold(rows.student_CK, rows.gold_C)
        wrong_C = of_classes(teacher_CK, rows.ids_CK).max(1).values
        margin_C = of_gold(rows.teacher_CK, rows.gold_C).exp() - wrong_C.exp()
        odds_C = student_CK.logsumexp(1) - gold_C
        return torch.stack([kl(rows.teacher_CK, rows.student_CK), -gold_C, odds_C, margin_C], 1)

    soft_N, hard_N, odds_N, margin_N = over_rows(seen, of_rows).unbind(1)
    return soft_N, hard_N, odds_N, group_means(margin_N.detach(), seen.bucket_V[seen.labels_N])


def group_means(values_N: Tensor, group_N: Tensor) -> Tensor:
    """[N]: for each row the mean over the rows of its group."""
    if values_N.shape[0] == 0:
        return values_N
    size = int(group_N.max()) + 1
    total = values_N.new_zeros(size).index_add(0, group_N, values_N)
    count = values_N.new_zeros(size).index_add(0, group_N, torch.ones_like(values_N))
    return (total / count.clamp(min=1))[group_N]

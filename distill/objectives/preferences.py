"""Which of two texts the student should rather write."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import logsigmoid

from distill.objectives.seen import Seen, label_log_probabilities


def preference(seen: Seen, *, beta: float = 0.1) -> Tensor:
    """sum_pairs -N/P log sigmoid( beta (r_corrected - r_own) ), r = sum over a text's rows of log p_s(y) - log p_0(y).

    The warm-up before (speculative) distillation, of a student that was trained already: while this has weight, each of
    the P texts of a micro-batch becomes a pair, the student's own continuation and the same as the teacher corrects it
    (`distill.speculative.corrected_pairs`). p_0: the model that the run started from, frozen. At other times 0, and 0 of
    texts with padding. Costs L / 2 short passes of the student, one of teacher and reference, twice the memory of a
    micro-batch and that of p_0. Source: Warmup-Distill (2502.11766) for the stage, of which its abstract was read;
    DPO (2305.18290, equation 7) for the loss; who is replaced by what, and beta, [R].
    """
    reference_N = seen.live.inside.reference_N
    if reference_N is None or seen.num_rows == 0:
        return seen.student.hidden_ND.sum() * 0.0
    log_p_N = label_log_probabilities(seen.student, seen.labels_N, seen.vocab_size, seen.chunk_rows)
    gain_N = log_p_N - reference_N
    gain_S = gain_N.new_zeros(int(seen.sequence_N[-1]) + 1).index_add(0, seen.sequence_N, gain_N)
    corrected_P, own_P = gain_S.chunk(2)
    return -logsigmoid(beta * (corrected_P - own_P)).mean() * seen.num_rows

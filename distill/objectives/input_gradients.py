"""How each model's loss would change with its inputs, for a live teacher."""

from __future__ import annotations

import torch
from torch import Tensor

from distill.models import Inside, Rows
from distill.objectives.seen import Seen, label_log_probabilities


def kdiga(seen: Seen) -> Tensor:
    """sum_blc ( dl_t / dx_blc - dl_s / dx_blc )^2 / L, l: cross-entropy with the labels, summed over the counted rows.

    x: the inputs as one-hot vectors, which both models share whatever their widths: dl/dx_blc = e_c . dl/de_bl, with e
    the word embeddings. Of the V classes c those that stand in the same sequence are compared, each as often as it
    stands there. Costs a backward pass of each trunk, and one of the student's backward pass; both models compute
    attention in the plain way. Source: KDIGA (2110.12072), there on pixels; classes and 1 / L ours.
    """
    own, other, wanted = seen.student.inside, seen.live.inside, torch.is_grad_enabled()
    assert other.words_BLD is not None and other.pulls_BLD is not None, "needs `gradients`"
    felt_BLD = pulls(seen.student, seen.labels_N, seen.vocab_size, seen.chunk_rows, wanted)
    own_BLL = _entries(own.words_BLD, felt_BLD)
    return (own_BLL - _entries(other.words_BLD, other.pulls_BLD)).square().mean(2).sum()


def _entries(words_BLD: Tensor | None, pulls_BLD: Tensor) -> Tensor:
    """[B, L, L] float32 or better: the loss's derivative at each position by each class of the sequence."""
    assert words_BLD is not None
    wide = torch.promote_types(words_BLD.dtype, torch.float32)
    return pulls_BLD.to(wide) @ words_BLD.to(wide).transpose(1, 2)


def pulls(
    rows: Rows, labels_N: Tensor, vocab_size: int, chunk_rows: int = 0, create_graph: bool = False
) -> Tensor:
    """[B, L, D]: gradient of the loss on the labels by the word embeddings, which no parameter's .grad is told of.

    create_graph: so that it can be derived in its turn. The graph of `rows` is kept in any case.
    """
    assert rows.inside.words_BLD is not None, "needs `gradients`"
    with torch.enable_grad():
        loss = -label_log_probabilities(rows, labels_N, vocab_size, chunk_rows).sum()
        (found_BLD,) = torch.autograd.grad(
            loss, rows.inside.words_BLD, create_graph=create_graph, retain_graph=True
        )
    return found_BLD


def with_pulls(rows: Rows, labels_N: Tensor, vocab_size: int) -> Rows:
    """What a teacher says with its own `pulls_BLD` beside, nothing of it within a graph any more."""
    inside, found_BLD = rows.inside, pulls(rows, labels_N, vocab_size)
    assert inside.words_BLD is not None
    layers, attentions = (tuple(x.detach() for x in each) for each in (inside.layers, inside.attentions))
    apart = Inside(layers, attentions, inside.mixed_ND, inside.words_BLD.detach(), found_BLD)
    return rows._replace(hidden_ND=rows.hidden_ND.detach(), inside=apart)

"""Liger's kernels as peers, where it is installed (`pip install --no-deps liger-kernel`). Each class may be missing."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from measure import say
from torch import Tensor

JSD_AT = 32000  # the JSD kernel spills so much that ptxas takes up to 100 s for each vocabulary: one alone


@cache
def is_there() -> bool:
    found = importlib.util.find_spec("liger_kernel") is not None
    if not found:
        say("liger_kernel is not installed: its figures are left out")
    return found


@cache
def class_of(module: str, name: str) -> Any:
    """A class of Liger, or None and, once, the reason on stderr."""
    if not is_there():
        return None
    try:
        return getattr(importlib.import_module(f"liger_kernel.{module}"), name)
    except Exception as error:  # it imports much, some of it of other packages' versions
        say(f"Liger's {name} failed: {type(error).__name__}: {error}")
        return None


def liger_on_logits(V: int, kind: str, temperature: float) -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
    """Liger's losses on logits: they take log-probabilities, which torch must make first."""
    kl, jsd = class_of("transformers", "LigerKLDIVLoss"), class_of("transformers", "LigerJSD")
    found: dict[str, Callable[[Tensor, Tensor], Tensor]] = {}

    def log_p(x: Tensor) -> Tensor:
        return x.log_softmax(-1, dtype=torch.float32)

    if kl and kind == "forward_kl":
        found["liger"] = lambda s, t: kl(reduction="sum")(
            log_p(s), (t / temperature).softmax(-1, dtype=torch.float32)
        )
    if jsd and kind in ("forward_kl", "jsd") and V == JSD_AT:
        found["liger jsd"] = lambda s, t: jsd(0.5)(log_p(s), log_p(t))
    return found


def liger_linear(
    student: Tensor,
    student_head: Tensor,
    teacher: Tensor,
    teacher_head: Tensor,
    labels: Tensor,
    temperature: float,
) -> dict[str, Callable[[], Tensor]]:
    """Liger's fused heads: JSD chunked and compiled, KL from given teacher probabilities, JSD by its kernel."""
    both = (student, student_head, teacher, teacher_head)
    chunked = class_of("chunked_loss", "LigerFusedLinearJSDLoss")
    kl = class_of("transformers.fused_linear_kl_div", "LigerFusedLinearKLDivLoss")
    jsd = class_of("transformers", "LigerFusedLinearJSD")
    found: dict[str, Callable[[], Tensor]] = {}

    def q() -> Tensor:
        return (teacher @ teacher_head.T / temperature).softmax(-1, dtype=torch.float32)

    if chunked:
        found["liger chunked"] = lambda: chunked(weight_hard_loss=0.0, weight_soft_loss=1.0)(
            *both, labels, student_bias=None, teacher_bias=None
        )
    if kl:
        found["liger fused kl"] = lambda: kl(reduction="sum")(student, student_head, q())
    if jsd and student_head.shape[0] == JSD_AT:
        found["liger fused"] = lambda: jsd(jsd_beta=0.5)(*both, None)
    return found

"""Every term that can stand beside the fused divergence, by name, and what the names and settings of a config mean."""

from __future__ import annotations

import difflib
import inspect
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from distill.config import ANY_TOKENIZER, FUSED, ObjectiveConfig
from distill.objectives import (
    comparative,
    correlation,
    cross_head,
    decoupled,
    double,
    gating,
    input_gradients,
    layers,
    mixed,
    preferences,
    relations,
)

# What settings of a name must not fall below; 0 for others.
LEAST = {
    "classes": 1,
    "group": 2,
    "samples": 1,
    "temperature": 0.01,
    "confidence_temperature": 0.01,
    "until": 0.001,
}
MOST = {"easy_share": 1, "until": 1}  # what shares must not exceed


# Of itself a teacher shows: everything, live; hidden states of the rows that count; probabilities, as classes, label and
# rest; or draws of classes alone, from which the fused forward KL learns.
Gives = Literal["all", "hidden", "buckets", "draws"]


class Term(NamedTuple):
    """A sum over rows, and what it asks for.

    function: (Seen, **settings) -> 0-d tensor, a sum over the counted rows. help: one line, with the source.
    needs: `layers`, `attentions`, `gradients` by the inputs or a `mixed` run of both models, a `reference`, which the
    student was, or `words`, how frequent each token is. stored: whether targets that were stored with the label's
    probability and the rest's can serve it. learns: makes what is learnt beside the student, of (width of the student,
    of the teacher). heads: how often a counted row meets the (student's, teacher's) last layer for it, backward passes
    and what they make again included; trunks: such passes of the (student's, teacher's) trunk beyond the usual ones, about.
    """

    function: Callable[..., Tensor]
    help: str
    needs: tuple[str, ...] = ()
    stored: bool = False
    learns: Callable[[int, int], nn.Module] | None = None
    heads: tuple[int, int] = (4, 2)
    trunks: tuple[int, int] = (0, 0)


NO_LOGITS = (0, 0)

TERMS: dict[str, Term] = {
    "atkd": Term(
        decoupled.atkd, "label and others apart, easy and hard rows apart (ATKD, ACL 2024)", stored=True
    ),
    "rld": Term(
        decoupled.rld,
        "confidence on the label, and the classes ranked below it (RLD, ICCV 2025)",
        stored=True,
    ),
    "pearson": Term(correlation.pearson, "correlation of log-probabilities (CMKD, 2410.06561)", stored=True),
    "spearman": Term(correlation.spearman, "correlation of soft ranks (CMKD, 2410.06561) [R]", stored=True),
    "cmkd": Term(correlation.cmkd, "both, by the teacher's entropy (CMKD, 2410.06561) [R]", stored=True),
    "clkd": Term(
        correlation.clkd, "rows, columns and correlation of classes (CLKD, 2211.14773) [R]", heads=(4, 3)
    ),
    "gate": Term(gating.gate, "token level where simple, best guess elsewhere (2404.14827)", stored=True),
    "gate_learned": Term(
        gating.gate_learned,
        "the same, by a gate that is learned (2404.14827) [R]",
        stored=True,
        learns=gating.Gate,
    ),
    "ada_alpha": Term(
        gating.ada_alpha,
        "labels or teacher by word frequency (AdaAlpha, TMLR 2022) [R]",
        ("words",),
        stored=True,
    ),
    "ada_margin": Term(
        gating.ada_margin, "margin by word frequency (AdaMargin, TMLR 2022) [R]", ("words",), stored=True
    ),
    "excess_loss": Term(
        gating.excess_loss, "rows by the student's excess loss (TST, IJCAI 2023)", stored=True
    ),
    "cross_head": Term(
        cross_head.cross_head,
        "the teacher's head on the student's states (SRD, IJCV 2024)",
        learns=layers.projection,
        heads=(0, 5),
    ),
    "ckd": Term(comparative.ckd, "differences between rows (CKD, WACV 2025)", stored=True),
    "ckd_hidden": Term(
        comparative.ckd_hidden,
        "the same of hidden states, squared (CKD, WACV 2025)",
        learns=layers.projection,
        heads=NO_LOGITS,
    ),
    "double": Term(double.double, "double distillation (Menon et al., ICML 2021) [R]", stored=True),
    "double_pairs": Term(
        double.double_pairs, "the same, pair by pair (Menon et al., ICML 2021) [R]", stored=True
    ),
    "double_sampled": Term(
        double.double_sampled,
        "the same, on teacher-guided and drawn negatives (ICML 2021) [R]",
        stored=True,
        heads=(0, 2),
    ),
    "hidden_cosine": Term(
        layers.hidden_cosine,
        "last hidden states (DistilBERT, 1910.01108)",
        ("layers",),
        learns=layers.projection_if_needed,
        heads=NO_LOGITS,
    ),
    "hidden_square": Term(
        layers.hidden_square,
        "all hidden states (HomoDistil, ICLR 2023)",
        ("layers",),
        learns=layers.projection,
        heads=NO_LOGITS,
    ),
    "attention_kl": Term(
        layers.attention_kl, "attentions (MiniLM, 2002.10957)", ("attentions",), heads=NO_LOGITS
    ),
    "curriculum": Term(
        layers.curriculum,
        "random projections of layers, shallow to deep (2503.17494)",
        ("layers",),
        heads=NO_LOGITS,
    ),
    "dpk": Term(
        layers.dpk,
        "dynamic prior knowledge (DPK, ICLR 2023)",
        ("layers",),
        learns=layers.PriorPredictor,
        heads=NO_LOGITS,
    ),
    "relations": Term(relations.relations, "similarities among rows (ReFilled, 2205.01915)", heads=NO_LOGITS),
    "contrastive": Term(
        relations.contrastive,
        "each row its teacher's among all (2407.11802)",
        learns=relations.Aligner,
        heads=NO_LOGITS,
    ),
    "mixkd": Term(
        mixed.mixkd, "KL on mixtures of two sequences (MixKD, ICLR 2021) [R]", ("mixed",), trunks=(3, 1)
    ),
    "kdiga": Term(
        input_gradients.kdiga,
        "gradients by the inputs, squared (KDIGA, 2110.12072)",
        ("gradients",),
        heads=(8, 3),
        trunks=(3, 1),
    ),
    "preference": Term(
        preferences.preference,
        "warm-up on corrected texts (Warmup-Distill, 2502.11766)",
        ("reference",),
        heads=(4, 0),
    ),
}


def needs_of(names: Iterable[str]) -> frozenset[str]:
    """What these objectives look at beside the rows: `needs` of Term, and the teacher's `width`."""
    terms = [TERMS[name] for name in names if name in TERMS]
    widths = ["width"] if any(term.learns for term in terms) else []
    return frozenset([*widths, *(need for term in terms for need in term.needs)])


def learned_modules(
    names: Iterable[str], student_width: int, teacher_width: int, seed: int
) -> dict[str, nn.Module]:
    """What these objectives learn beside the student, by name; a function of `seed`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return {
            name: learns(student_width, teacher_width)
            for name in names
            if name in TERMS and (learns := TERMS[name].learns)
        }


def settings_of(function: Callable[..., Tensor]) -> dict[str, Any]:
    """Keyword arguments of a term with their defaults."""
    parameters = inspect.signature(function).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}


def check_terms(config: ObjectiveConfig, vocab_size: int, gives: Gives = "all", why: str = "") -> None:
    """Refuse what the vocabulary or the kind of teacher does not allow.

    gives: what the teacher shows of itself; why: it does not show all.

    Raises:
        ValueError: every problem: settings of a term that is not named, unknown ones (with the nearest name) or
            of another type, more classes than there are, a term that stored targets can't serve.
    """
    problems = []
    for name, given in config.settings.items():
        problems += _problems_of(name, given, config, vocab_size)
    for name in config.weights:
        if name in TERMS and not _serves(gives, TERMS[name]):
            served = ", ".join([*FUSED, *(other for other, term in TERMS.items() if _serves(gives, term))])
            problems.append(
                f"objective.weights.{name} needs more of the teacher than there is, as {why}: use one live teacher, or choose "
                f"among {served}"
            )
    if (config.speculate_from < 1 or "preference" in config.weights) and config.speculate_top_k > vocab_size:
        problems.append(
            f"objective.speculate_top_k is {config.speculate_top_k}, but the vocabulary has {vocab_size}: set it to less"
        )
    if problems:
        raise ValueError("\n".join(problems))


def _serves(gives: Gives, term: Term) -> bool:
    inside = set(term.needs) - {"words"}
    return {"all": True, "hidden": not inside, "buckets": term.stored, "draws": False}[gives]


def _problems_of(name: str, given: Mapping[str, Any], config: ObjectiveConfig, vocab_size: int) -> list[str]:
    if name not in config.weights or name not in TERMS:
        named = ", ".join(n for n in config.weights if n in TERMS) or "none"
        return [f"objective.settings.{name} is for no term of objective.weights, which names {named}"]
    known = settings_of(TERMS[name].function)
    problems = []
    for key, value in given.items():
        where = f"objective.settings.{name}.{key}"
        if key not in known:
            close = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {close[0]}?" if close else f"valid: {', '.join(known) or 'none'}"
            problems.append(f"{where} is unknown; {hint}")
        elif isinstance(known[key], bool) != isinstance(value, bool) or not isinstance(value, (int, float)):
            problems.append(f"{where} must be like its default {known[key]!r}, got {value!r}")
        elif isinstance(known[key], int) and not isinstance(value, int):
            problems.append(f"{where} must be a whole number, got {value!r}")
        elif not math.isfinite(value):
            problems.append(f"{where} must be finite, got {value!r}")
        elif value > (most := MOST.get(key, math.inf)):
            problems.append(f"{where} must be at most {most}, got {value!r}")
        elif value < (least := LEAST.get(key, 0)):
            problems.append(f"{where} must be at least {least}, got {value!r}")
        elif key == "classes" and value > vocab_size:
            problems.append(f"{where} is {value}, but the vocabulary has {vocab_size}: set it to less")
    return problems


def help_text() -> str:
    """Every objective, for `distill train --help-objectives`."""
    lines = [
        "objective.weights={NAME: WEIGHT, ...}: one of the first four, hard, and any number of the others.",
        "stored: stored targets with the label's probability and the rest's serve it too. live: it needs a live teacher.",
        "any tokenizer: the teacher's may be another than the shards' (teacher.tokenizer).",
        "(key=default) can be set: objective.settings={NAME: {key: value}}. objective.temperature is of the first four alone.",
        "",
        "  forward_kl       KL(teacher || student), fused with hard (Hinton et al. 2015)   [live, stored]",
        "  reverse_kl       KL(student || teacher), fused (MiniLLM, ICLR 2024)   [live]",
        "  jsd              between both, objective.beta, fused (GKD, ICLR 2024)   [live]",
        "  tvd              1/2 |teacher - student|, fused (Wen et al., ACL 2023)   [live]",
        "  hard             cross-entropy with the labels, fused",
    ]
    for name, term in TERMS.items():
        settings = ", ".join(f"{key}={value}" for key, value in settings_of(term.function).items())
        any_tokenizer = ["any tokenizer"] if name in ANY_TOKENIZER else []
        needs = ", ".join(["live, stored" if term.stored else "live", *term.needs, *any_tokenizer])
        learns = ", learns a module" if term.learns else ""
        lines.append(f"  {name:<16} {term.help}   [{needs}{learns}]" + (f" ({settings})" if settings else ""))
    return "\n".join(lines)

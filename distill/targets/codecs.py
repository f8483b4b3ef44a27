"""What may be kept of a teacher's distribution; `encode` and `decode` do it, README.md describes the bytes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

COLDEST = 1e-4  # below it a teacher is its arg-max, which labels are cheaper for
READS = {"top_k": ("k",), "top_p": ("p", "k"), "sampled": ("draws",), "hidden": ()}
DEFAULTS: dict[str, dict[str, Any]] = {
    "top_k": {"k": 64},
    "top_p": {"p": 0.95, "k": 100},
    "sampled": {"draws": 50},
    "hidden": {},
}


@dataclass(frozen=True)
class Codec:
    """What is kept.

    top_k: the k likeliest classes. top_p: as many of the k likeliest as have the mass p together (Peng et al. 2024,
    Pre-training Distillation, section 3.1). Both with the mass of the others as one bucket and the label's own
    probability. sampled: `draws` independent draws from the teacher, whose frequencies are an unbiased estimate of it
    (Anshumann et al., RS-KD, ACL 2025). hidden: what the head reads, exact; the head is applied when it is read.
    temperature: at which the distribution was made; hidden states have none, and serve every one.
    """

    name: str
    k: int = 0
    p: float = 0.0
    draws: int = 0
    temperature: float = 1.0

    @property
    def is_exact(self) -> bool:
        return self.name == "hidden"

    def __str__(self) -> str:
        settings = [f"{key}={getattr(self, key)}" for key in READS[self.name]]
        return " ".join([self.name, *settings])


def make_codec(
    name: str, temperature: float, k: int | None = None, p: float | None = None, draws: int | None = None
) -> Codec:
    """The codec with these settings, None for its default. Raises ValueError for one that it does not read."""
    given = {key: value for key, value in {"k": k, "p": p, "draws": draws}.items() if value is not None}
    for key in given:
        if key not in READS[name]:
            readers = " and ".join(codec for codec, keys in READS.items() if key in keys)
            raise ValueError(f"--{key} is read by codec {readers} only, got --codec {name}: leave it out")
    settings = {**DEFAULTS[name], **given}
    return Codec(name, **settings, temperature=1.0 if name == "hidden" else temperature)


def check_codec(codec: Codec, vocab_size: int) -> None:
    """Raises ValueError for settings that keep nothing or more than there is."""
    if "k" in READS[codec.name] and not 1 <= codec.k <= vocab_size:
        raise ValueError(f"--k must be in 1..{vocab_size} (the tokens of the vocabulary), got {codec.k}")
    if codec.name == "top_p" and not 0 < codec.p <= 1:
        raise ValueError(f"--p must be above 0 and at most 1, got {codec.p}")
    if codec.name == "sampled" and codec.draws < 1:
        raise ValueError(f"--draws must be at least 1, got {codec.draws}")
    if not codec.is_exact and not COLDEST <= codec.temperature < math.inf:
        raise ValueError(
            f"objective.temperature={codec.temperature} makes the teacher its arg-max, of which codec {codec.name} keeps "
            f"nothing useful: score at {COLDEST} or above, or with --codec hidden"
        )


def bytes_a_row(codec: Codec, vocab_size: int, width: int = 0, item_bytes: int = 2) -> float:
    """What a row takes before compression, about.

    Of 50 draws 12 are assumed to be different ones, as in RS-KD section 4; of a flat teacher all are, at three times
    the bytes.
    """
    if codec.is_exact:
        return float(width * item_bytes)
    entries = min(codec.k or 12 * (codec.draws / 50) ** 0.5, vocab_size)
    ids = entries * (2 + math.log2(max(vocab_size / entries, 1))) / 8
    return ids + (codec.draws / 8 if codec.draws else 2 * entries + 4)

"""A trajectory, an audit and a difference as text for a terminal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from distill.trajectory.audit.verdicts import Audit
from distill.trajectory.manifest import Checkpoint, Manifest

BAR = 24  # columns of the longest bar


def trajectory_lines(manifest: Manifest, audit: Audit | None) -> Iterator[str]:
    """What the trajectory is, then a line a checkpoint: step, tokens, size, validation loss with a bar, verdict."""
    checkpoints = manifest.checkpoints.values()
    known = f"{manifest.real_vocab_size} tokens, " if manifest.real_vocab_size else ""
    yield (
        f"{manifest.url}: {manifest.family}, {manifest.architecture}, {manifest.dtype or 'dtype unknown'}, "
        f"{known}{manifest.vocab_size} logits, {'tied' if manifest.tied else 'untied'}, "
        f"{len(checkpoints)} checkpoints, {size_text(sum(c.num_bytes for c in checkpoints))}"
        f"{'' if manifest.complete else ', still growing'}"
    )
    highest = max(manifest.losses.values(), default=1.0)
    rows = [
        (
            str(c.step),
            count_text(c.tokens),
            size_text(c.num_bytes),
            "" if c.validation_loss is None else f"{c.validation_loss:.3f}",
            "" if c.validation_loss is None else "█" * round(BAR * c.validation_loss / highest),
            _verdict(c, audit),
        )
        for c in checkpoints
    ]
    yield from table(("step", "tokens", "size", "loss", "", "verdict"), rows)


def _verdict(checkpoint: Checkpoint, audit: Audit | None) -> str:
    verdict = audit.steps.get(checkpoint.step) if audit else None
    if verdict is None or verdict.weights != list(checkpoint.weights):
        return "not audited"
    return verdict.verdict if not verdict.findings else f"{verdict.verdict}: {verdict.reason}"


def audit_lines(audit: Audit) -> Iterator[str]:
    """A line a step that is not simply good, then how many are and what the audit took."""
    rows = [(str(step), v.verdict, v.reason) for step, v in audit.steps.items() if v.findings]
    if rows:
        yield from table(("step", "verdict", "found"), rows)
    good = len(audit.steps) - len(audit.bad)
    looked = "all bytes read" if audit.full else "headers and samples read"
    yield f"{good} of {len(audit.steps)} steps are good; {looked}: {size_text(audit.bytes_read)} in {audit.seconds:.1f} s"


def difference_lines(one: Manifest, other: Manifest) -> Iterator[str]:
    """Steps that only one has, facts and files that differ; nothing for the same trajectory."""
    for fact in ("architecture", "vocab_size", "real_vocab_size", "tied", "dtype", "tokenizer_sha256"):
        here, there = getattr(one, fact), getattr(other, fact)
        if here != there:
            yield f"{fact}: {here} / {there}"
    for step in sorted(one.checkpoints.keys() ^ other.checkpoints.keys()):
        yield f"step {step}: only in {one.url if step in one.checkpoints else other.url}"
    for step in sorted(one.checkpoints.keys() & other.checkpoints.keys()):
        here, there = one.checkpoints[step].files, other.checkpoints[step].files
        for name in sorted(here.keys() | there.keys()):
            if (said := _difference(here.get(name), there.get(name))) is not None:
                yield f"step {step}: {name}: {said}"


def _difference(here: Sequence[object] | None, there: Sequence[object] | None) -> str | None:
    if here is None or there is None:
        return f"only in the {'second' if here is None else 'first'}"
    if here[0] != there[0]:
        return f"{here[0]} / {there[0]} bytes"
    if here[1] and there[1] and here[1] != there[1]:
        return f"sha256 {str(here[1])[:12]} / {str(there[1])[:12]}"
    return None


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Columns as wide as their widest entry; those of numbers stand to the right."""
    columns = list(zip(*rows, strict=True))
    widths = [max(map(len, (name, *cells))) for name, cells in zip(head, columns, strict=True)]
    right = [all(cell == "" or cell[0].isdigit() for cell in cells) for cells in columns]
    for row in (head, *rows):
        cells = zip(row, widths, right, strict=True)
        yield "  ".join(
            c.rjust(width) if is_number else c.ljust(width) for c, width, is_number in cells
        ).rstrip()


def count_text(count: int | None) -> str:
    """1234567 -> 1.23 M; empty for None."""
    if count is None:
        return ""
    for unit, size in (("T", 10**12), ("B", 10**9), ("M", 10**6), ("k", 10**3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return str(count)


def size_text(num_bytes: int) -> str:
    for unit, size in (("TB", 10**12), ("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if num_bytes >= size:
            return f"{num_bytes / size:.3g} {unit}"
    return f"{num_bytes} B"

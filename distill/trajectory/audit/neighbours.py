"""Weights at the wrong place: the same at two steps, shards of two steps in one, a jump off the path.

Training moves weights along a path. For three checkpoints in order, l, x and r, a path that drifts gives
|lx| + |xr| about |lr|, a random walk of equal steps 1.4 times that, and pure noise about a fixed point, the worst
that training can do, twice. A checkpoint from elsewhere lies far from both neighbours, which are close to each other.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence

import torch

from distill.trajectory.audit.headers import Headers
from distill.trajectory.audit.listing import Finding, few
from distill.trajectory.audit.samples import Samples

LIMIT = 2.5  # times the distance of the neighbours from each other
START_LIMIT, END_LIMIT = 8.0, 4.0  # times the next stretch; training is fastest where it starts
TWIN_SLACK = 1.25  # times the longest detour of the others: of equal weights only the one that fits is right
LONGEST_RUN = (
    1 / 3
)  # of the trajectory: more neighbours in a row at the wrong place are not told from the right ones
TINY = 1e-30


def faults_of_neighbours(
    headers: Mapping[int, Headers], samples: Mapping[int, Samples]
) -> dict[int, list[Finding]]:
    """{step: faults}. Every step in `samples` has the same tensors, all finite."""
    faults: dict[int, list[Finding]] = defaultdict(list)
    if len(samples) < 2:
        return {}
    path = Track(samples, list(next(iter(samples.values())).values))
    for step, twins in _misplaced(path, samples):
        faults[step].append(Finding("duplicate", f"holds the same weights as step {few(twins)}"))
    rest = {step: found for step, found in samples.items() if step not in faults}
    for step, finding in _by_shard(headers, rest):
        faults[step].append(finding)
    return dict(faults)


class Track:
    """Where the samples of all steps lie to each other, over some tensors, each scaled by its size."""

    def __init__(self, samples: Mapping[int, Samples], names: Sequence[str]) -> None:
        self.steps, self.names = list(samples), names
        self._row = {step: i for i, step in enumerate(self.steps)}
        columns = []
        for name in names:
            values = torch.stack([found.values[name] for found in samples.values()])
            columns.append(values / values.square().mean().sqrt().clamp_min(TINY))
        matrix = torch.cat(columns, dim=1)  # steps x values
        # Not by a matrix product, whose rounding is larger than the distance of close neighbours.
        distances = torch.cdist(matrix, matrix, compute_mode="donot_use_mm_for_euclid_dist")
        self._distance: list[list[float]] = distances.tolist()

    def between(self, one: int, other: int) -> float:
        return self._distance[self._row[one]][self._row[other]]

    def detour(self, left: int, step: int, right: int) -> float:
        """Length of the way from `left` to `right` over `step`, in units of the straight one."""
        return (self.between(left, step) + self.between(step, right)) / max(self.between(left, right), TINY)

    def end_detour(self, end: int, second: int, third: int) -> float:
        """The stretch at an end in units of the next one, at the same pace."""
        pace = max(1.0, abs(end - second) / abs(second - third))
        return self.between(end, second) / max(self.between(second, third) * pace, TINY)

    def fits(self, step: int, others: Sequence[int]) -> bool:
        """Whether `step` lies on the path of the others as these do themselves; at least two others are needed."""
        below, above = [s for s in others if s < step], [s for s in others if s > step]
        if below and above:
            detours = [self.detour(*three) for three in zip(others, others[1:], others[2:], strict=False)]
            limit = min(TWIN_SLACK * max(detours, default=LIMIT), LIMIT)
            return self.detour(below[-1], step, above[0]) <= limit
        if below:
            return self.end_detour(step, *below[:-3:-1]) <= END_LIMIT
        return self.end_detour(step, *above[:2]) <= START_LIMIT

    def jumps(self, steps: Sequence[int]) -> dict[int, float]:
        """{step off the path: its detour}, also of several in a row that lie close to each other."""
        good, off = list(steps), dict[int, float]()
        for length in range(1, max(int(len(steps) * LONGEST_RUN), 1) + 1):
            first = 1
            while first + length < len(good):
                run = good[first : first + length]
                detours = {x: self.detour(good[first - 1], x, good[first + length]) for x in run}
                if min(detours.values()) > LIMIT:
                    off |= detours
                    del good[first : first + length]
                    first = max(first - length, 1)
                else:
                    first += 1
        for end, limit in ((good[:3], START_LIMIT), (good[:-4:-1], END_LIMIT)):
            if len(end) == 3 and (detour := self.end_detour(*end)) > limit:
                off[end[0]] = detour
        return off


def _misplaced(path: Track, samples: Mapping[int, Samples]) -> Iterator[tuple[int, list[int]]]:
    """(step, steps with the same weights), but for the one of them that alone lies on the path of the others."""
    groups = _twins(samples, path.names)
    doubtful = {step for group in groups for step in group}
    others = [step for step in path.steps if step not in doubtful]
    off = path.jumps(others)
    others = [step for step in others if step not in off]
    for group in groups:
        fitting = [step for step in group if len(others) > 1 and path.fits(step, others)]
        for step in group:
            if fitting != [step]:
                yield step, [other for other in group if other != step]


def _twins(samples: Mapping[int, Samples], names: Sequence[str]) -> list[list[int]]:
    """Groups of steps with the same bytes in these tensors."""
    groups: dict[tuple[str, ...], list[int]] = defaultdict(list)
    for step, found in samples.items():
        groups[tuple(found.digests[name] for name in names)].append(step)
    return [group for group in groups.values() if len(group) > 1]


def _by_shard(
    headers: Mapping[int, Headers], samples: Mapping[int, Samples]
) -> Iterator[tuple[int, Finding]]:
    """Jumps, told apart from shards of another step by how many of a checkpoint's shards are off."""
    off: dict[tuple[str, ...], dict[int, str]] = {}
    varying = _varying(samples)
    for step, found in samples.items():
        parts = {}
        for shard, tensors in headers[step].shards.items():
            names = tuple(name for name in found.values if name in tensors and name in varying)
            if names:
                if names not in off:
                    off[names] = _off_path(samples, names)
                parts[shard] = off[names].get(step)
        wrong = {shard: reason for shard, reason in parts.items() if reason}
        if wrong and len(wrong) == len(parts):
            yield step, Finding("jump", f"does not fit its neighbours: {next(iter(wrong.values()))}")
        elif wrong:
            told = ", ".join(f"{shard} {reason}" for shard, reason in wrong.items())
            yield step, Finding("mixed", f"shards of several steps: {told}; the others fit")


def _off_path(samples: Mapping[int, Samples], names: Sequence[str]) -> dict[int, str]:
    """{step: why it can't be what it should be}, by these tensors alone."""
    path = Track(samples, names)
    twins = dict(_misplaced(path, samples))
    told = {step: f"holds the same as at step {few(others)}" for step, others in twins.items()}
    for step, detour in path.jumps([step for step in path.steps if step not in twins]).items():
        told[step] = f"is {detour:.3g} times as far off as its neighbours are apart"
    return told


def _varying(samples: Mapping[int, Samples]) -> set[str]:
    """Tensors that differ between steps; masks and frozen ones do not."""
    seen: dict[str, set[str]] = defaultdict(set)
    for found in samples.values():
        for name, digest in found.digests.items():
            seen[name].add(digest)
    return {name for name, digests in seen.items() if len(digests) > 1}

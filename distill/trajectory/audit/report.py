"""The audit itself, and how it is shown."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterable, Mapping

from distill.trajectory.audit.full import faults_of_all_bytes
from distill.trajectory.audit.headers import faults_of_headers, read_headers, usual_layout
from distill.trajectory.audit.listing import Finding, faults_of_listing
from distill.trajectory.audit.neighbours import faults_of_neighbours
from distill.trajectory.audit.samples import choose_tensors, faults_of_samples, read_samples
from distill.trajectory.audit.sizes import faults_of_sizes
from distill.trajectory.audit.verdicts import Audit, judge
from distill.trajectory.manifest import Manifest

SPOILS_NOTHING = ("tokenizer",)  # faults with which weights still tell where they lie on the path


def audit(manifest: Manifest, *, full: bool = False, trusted: Iterable[int] = ()) -> Audit:
    """Look at every checkpoint: sizes, headers, some values, and whether these lie on one path.

    Reads about 0.3 MB a checkpoint; with `full` every byte. trusted: steps that stay usable whatever is found.

    Raises:
        StoreError: what storage could not do.
    """
    start, before = time.perf_counter(), manifest.store.bytes_read
    faults: dict[int, list[Finding]] = defaultdict(list)

    def note(found: Mapping[int, list[Finding]]) -> None:
        for step, findings in found.items():
            said = {finding.sentence for finding in faults[step]}
            faults[step] += [finding for finding in findings if finding.sentence not in said]

    listed = faults_of_listing(manifest)
    note({step: [f for f in found if f.kind != "duplicate"] for step, found in listed.items()})
    note(faults_of_sizes(manifest))
    headers = read_headers(manifest)
    note(faults_of_headers(headers))
    names = choose_tensors(usual_layout(headers))
    samples = read_samples(manifest, headers, names)
    note(faults_of_samples(samples))
    whole = {
        s: found for s, found in samples.items() if not _spoilt(faults[s]) and set(found.values) == set(names)
    }
    note(faults_of_neighbours(headers, whole))
    # Twins among those whose samples could not be compared.
    note({s: [f for f in found if f.kind == "duplicate"] for s, found in listed.items() if s not in whole})
    if full:
        note(faults_of_all_bytes(manifest, headers))
    steps = judge(manifest, {step: found for step, found in faults.items() if found}, trusted)
    return Audit(full, manifest.store.bytes_read - before, round(time.perf_counter() - start, 2), steps)


def _spoilt(findings: Iterable[Finding]) -> bool:
    return any(finding.kind not in SPOILS_NOTHING for finding in findings)

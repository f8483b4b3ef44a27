"""What an audit found, kept beside the manifest, and the refusal to learn from a checkpoint that failed it."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from distill.trajectory.audit.listing import Finding, faults_of_listing
from distill.trajectory.manifest import BadTrajectory, Checkpoint, Manifest, refuse_without_hashes
from distill.trajectory.store import Store, StoreError

log = logging.getLogger(__name__)
NAME, SCHEMA = "audit.json", 1
OK, BAD, TRUSTED = "ok", "bad", "trusted"
OWN = "distill"  # family of this project's own runs, which say themselves what they wrote


@dataclass
class Verdict:
    """On one step. weights: what they were when it was given (`Checkpoint.weights`); others void it."""

    verdict: str
    weights: list[str]
    findings: list[Finding] = field(default_factory=list)

    @property
    def reason(self) -> str:
        return "; ".join(finding.sentence for finding in self.findings)


@dataclass
class Audit:
    """Verdicts by step. full: every byte was read. bytes_read, seconds: what it took."""

    full: bool
    bytes_read: int
    seconds: float
    steps: dict[int, Verdict]

    @property
    def bad(self) -> dict[int, Verdict]:
        return {step: verdict for step, verdict in self.steps.items() if verdict.verdict == BAD}

    def to_json(self) -> str:
        return json.dumps({"schema": SCHEMA, **dataclasses.asdict(self)}, indent=1)


def judge(
    manifest: Manifest, faults: Mapping[int, list[Finding]], trusted: Iterable[int]
) -> dict[int, Verdict]:
    """A verdict on every step: bad with any fault, unless the user vouches for it."""
    trusted = set(trusted)
    verdicts = {}
    for step, checkpoint in manifest.checkpoints.items():
        found = faults.get(step, [])
        verdict = OK if not found else TRUSTED if step in trusted else BAD
        verdicts[step] = Verdict(verdict, list(checkpoint.weights), found)
    return verdicts


def read_audit(store: Store) -> Audit | None:
    """The audit beside a manifest; None where there is none.

    To who may not list a bucket, S3 says of what is missing that it is forbidden.
    """
    try:
        content = json.loads(store.read(NAME))
        if content.pop("schema") != SCHEMA:
            raise ValueError("another schema")
        steps = {int(step): _verdict(told) for step, told in content.pop("steps").items()}
        return Audit(**content, steps=steps)
    except StoreError as error:
        if error.kind in ("missing", "denied"):
            return None
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BadTrajectory(
            f"{store.url}/{NAME} is no audit ({error!r}): run `distill trajectory audit {store.url}` again"
        ) from error


def store_audit(store: Store, audit: Audit) -> None:
    """Keep it beside the manifest; where that can't be written to, say so."""
    try:
        store.write(NAME, audit.to_json().encode())
    except StoreError as error:
        if error.kind not in ("listing", "denied"):
            raise
        log.warning("the audit is not kept, so training does not know of it: %s", error)


def _verdict(told: dict[str, object]) -> Verdict:
    findings = [Finding(**finding) for finding in told.pop("findings")]  # type: ignore[attr-defined]
    return Verdict(**told, findings=findings)  # type: ignore[arg-type]


def bad_steps(manifest: Manifest, audit: Audit | None) -> dict[int, str]:
    """{step: why nobody should learn from it}, by the audit and by what the manifest's entries alone show."""
    faults = faults_of_listing(manifest)
    for step, verdict in (audit.steps if audit else {}).items():
        if not _holds(verdict, manifest.checkpoints.get(step)):
            continue
        if verdict.verdict == BAD:
            faults[step] = verdict.findings
        elif verdict.verdict == TRUSTED:
            faults.pop(step, None)
        else:  # which of two steps with the same weights is mislabelled, it knows better
            faults[step] = [fault for fault in faults.get(step, []) if fault.kind != "duplicate"]
    return {step: "; ".join(f.sentence for f in found) for step, found in faults.items() if found}


def refuse_bad_steps(manifest: Manifest, steps: Iterable[int]) -> None:
    """Refuse to learn from steps that failed the audit, whose entries show a fault, or whose weights have no hash.

    Raises:
        BadTrajectory: naming each step, what is wrong with it and the nearest good ones.
    """
    steps, audit = set(steps), read_audit(manifest.store)
    if audit is None and manifest.family != OWN:
        log.warning("%s was never audited: run `distill trajectory audit` on it", manifest.url)
    for step, verdict in (audit.steps if audit else {}).items():
        if not _holds(verdict, manifest.checkpoints.get(step)):
            log.warning("the audit of %s is older than its step %d: audit it again", manifest.url, step)
    bad = bad_steps(manifest, audit)
    used = [step for step in sorted(steps) if step in bad]
    if used:
        reasons = "\n  ".join(f"step {step}: {bad[step]}; {_nearest(step, manifest, bad)}" for step in used)
        raise BadTrajectory(
            f"{manifest.url}: the schedule uses {len(used)} bad teacher checkpoint(s):\n  {reasons}\n"
            "Name good ones in schedule.checkpoints, or mend the trajectory and audit it again"
        )
    refuse_without_hashes(manifest, steps)


def _holds(verdict: Verdict, checkpoint: Checkpoint | None) -> bool:
    """Whether it was given on these weights."""
    return checkpoint is not None and verdict.weights == list(checkpoint.weights)


def _nearest(step: int, manifest: Manifest, bad: Mapping[int, str]) -> str:
    good = [s for s in manifest.checkpoints if s not in bad]
    below, above = [s for s in good if s < step][-1:], [s for s in good if s > step][:1]
    return f"the nearest good steps are {below + above}" if good else "no step is good"

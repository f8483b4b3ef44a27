"""Whether the files are still there, with the sizes that the manifest has."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

from distill.trajectory.audit.listing import Finding
from distill.trajectory.manifest import Checkpoint, Manifest
from distill.trajectory.store import StoreError

AT_ONCE = 16  # requests where there is no listing


def faults_of_sizes(manifest: Manifest) -> dict[int, list[Finding]]:
    """{step: files that are missing or have another size}; from one listing, or from a request a file without one."""
    listed = _listed(manifest)

    def size_of(checkpoint: Checkpoint, name: str) -> int | None:
        if listed is not None and "://" not in checkpoint.location:
            return listed.get(f"{checkpoint.location}/{name}")
        try:
            return manifest.files_of(checkpoint.step).head(name).size
        except StoreError as error:
            if error.kind != "missing":
                raise
            return None

    def faults(checkpoint: Checkpoint) -> list[Finding]:
        sizes = [(name, size, size_of(checkpoint, name)) for name, (size, _) in checkpoint.files.items()]
        return [_fault(*each) for each in sizes if each[1] != each[2]]

    with ThreadPoolExecutor(AT_ONCE) as threads:
        steps = manifest.checkpoints
        found = dict(zip(steps, threads.map(faults, steps.values()), strict=True))
    return {step: faults for step, faults in found.items() if faults}


def _listed(manifest: Manifest) -> dict[str, int] | None:
    """{path: bytes} of all that lies beside the manifest; None where that can't be listed."""
    try:
        return {o.path: o.size for o in manifest.store.objects()}
    except StoreError as error:
        if error.kind != "listing":
            raise
        return None


def _fault(name: str, size: int, found: int | None) -> Finding:
    if found is None:
        return Finding("missing", f"{name} is missing from the storage")
    return Finding("truncated", f"{name} has {found} bytes, the manifest says {size}")

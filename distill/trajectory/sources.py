"""Where checkpoints come from: a folder, object storage, the hub, or a local cache of the hub."""

from __future__ import annotations

import re
from pathlib import PurePosixPath

from distill.trajectory import hub
from distill.trajectory.storage import Folder
from distill.trajectory.store import Store, open_store

# models--owner--name/refs/<branch> holds the commit under models--owner--name/snapshots/
REFS = re.compile(r"((?:models--[^/]+/)?)refs(?:/.*)?")


def find_folders(source: str) -> list[Folder]:
    """All that may be a checkpoint at `source`: a folder each, with its files, by the name its family gave it.

    Raises:
        StoreError: the source can't be reached or listed.
    """
    if source.startswith("hf://"):
        return hub.revisions(source)
    store = open_store(source)
    folders: dict[str, Folder] = {}
    for found in store.objects():
        parent, _, name = found.path.rpartition("/")
        folder = folders.setdefault(parent, Folder(PurePosixPath(parent).name, parent))
        folder.files[name], folder.etags[name] = [found.size, None], found.etag
    if any(REFS.fullmatch(path) for path in folders):
        return _cached(store, folders)
    return [folder for path, folder in sorted(folders.items()) if path and "/" not in path]


def _cached(store: Store, folders: dict[str, Folder]) -> list[Folder]:
    """Folders of a hub cache by the names of their revisions, or of their repositories where there are several."""
    repositories: dict[str, dict[str, str]] = {}
    for path, folder in folders.items():
        if match := REFS.fullmatch(path):
            branches = repositories.setdefault(match[1], {})
            for name in folder.files:
                branch = f"{path}/{name}".removeprefix(f"{match[1]}refs/")
                branches[branch] = store.read(f"{path}/{name}").decode().strip()
    several = len(repositories) > 1
    found = []
    for root, branches in sorted(repositories.items()):
        for branch, commit in sorted(branches.items()):
            known = folders.get(f"{root}snapshots/{commit}")
            if known and not (several and branch != "main"):
                name = root.rstrip("/").split("--")[-1] if several else branch
                found.append(Folder(name, known.location, known.files, known.etags))
    return found

"""Checkpoints on the Hugging Face hub: a revision each, or a repository each. The hub is the one HF_ENDPOINT names.

Three routes of its API serve: /api/models, /api/models/NAME/refs and /api/models/NAME/tree/REVISION.
"""

from __future__ import annotations

import fnmatch
import json
import os
import re
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.parse import quote, urlencode
from urllib.request import Request, urlopen

from distill.trajectory.storage import Folder, StoreError
from distill.trajectory.store import hub_endpoint

ATTEMPTS, TIMEOUT = 6, 30.0  # seconds for an answer
PASSING = (408, 429, 500, 502, 503, 504)
AT_ONCE = 8


def revisions(url: str) -> list[Folder]:
    """What lies under hf://owner/name (branches and tags) or hf://owner/name-* (repositories), a folder each.

    The location names the commit, so that what was indexed is what is read. Weights come with the sha256 that the hub
    keeps for large files; every file has a blob id, the same for the same content, as etag.

    Raises:
        StoreError: no such repository, no access, or no connection.
    """
    name = url.removeprefix("hf://")
    wanted = _repositories(url, name) if "*" in name else _branches(url, name)
    with ThreadPoolExecutor(AT_ONCE) as threads:
        return list(threads.map(lambda each: _folder(url, *each), wanted))


def _repositories(url: str, pattern: str) -> list[tuple[str, str, str]]:
    """(repository, commit, name) of all repositories that fit."""
    owner, _, name = pattern.partition("/")
    query = urlencode({"author": owner, "search": name.split("*")[0], "full": "true"})
    found = _get(url, f"/api/models?{query}")
    fitting = sorted((m["id"], m["sha"]) for m in found if fnmatch.fnmatchcase(m["id"], pattern))
    return [(repository, commit, repository.split("/")[1]) for repository, commit in fitting]


def _branches(url: str, repository: str) -> list[tuple[str, str, str]]:
    refs = _get(url, f"/api/models/{repository}/refs")[0]
    commits = {ref["name"]: ref["targetCommit"] for ref in [*refs["branches"], *refs["tags"]]}
    return [(repository, commit, branch) for branch, commit in sorted(commits.items())]


def _folder(url: str, repository: str, commit: str, name: str) -> Folder:
    folder = Folder(name, f"hf://{repository}@{commit}")
    for entry in _get(url, f"/api/models/{repository}/tree/{quote(commit, safe='')}"):
        if entry["type"] == "file":
            folder.files[entry["path"]] = [entry["size"], entry["lfs"]["oid"] if "lfs" in entry else None]
            folder.etags[entry["path"]] = entry["oid"]
    return folder


def _get(url: str, route: str) -> list[Any]:
    """All entries of an answer, over all its pages; an answer that is no list is its only entry."""
    entries: list[Any] = []
    address: str | None = hub_endpoint() + route
    while address:
        content, address = _page(url, address)
        entries += content if isinstance(content, list) else [content]
    return entries


def _page(url: str, address: str) -> tuple[Any, str | None]:
    """(content, address of the next page)."""
    token = os.environ.get("HF_TOKEN")
    request = Request(address)
    if token:
        request.add_unredirected_header("Authorization", f"Bearer {token}")
    for attempt in range(1, ATTEMPTS + 1):
        try:
            with urlopen(request, timeout=TIMEOUT) as answer:
                following = re.search(r'<([^>]+)>; *rel="next"', answer.headers.get("Link") or "")
                return json.load(answer), following and following[1]
        except HTTPError as error:
            fault = _refusal(url, error.code)
            if error.code not in PASSING:
                break
        except (URLError, OSError, ValueError) as error:
            reason = getattr(error, "reason", error)
            fault = StoreError(
                url, f"can't be reached ({reason}): see HF_ENDPOINT and the connection", "unreachable"
            )
        if attempt < ATTEMPTS:
            time.sleep(0.1 * 2**attempt)
    raise fault


def _refusal(url: str, code: int) -> StoreError:
    if code in (401, 403, 404):  # the hub says 401 also of what does not exist
        said = f"does not exist, or may not be read (status {code}): correct the name, or set HF_TOKEN"
        return StoreError(url, said, "missing" if code == 404 else "denied")
    return StoreError(url, f"was refused by the hub (status {code}): try again later", "unreachable")

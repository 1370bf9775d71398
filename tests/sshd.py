"""A real sshd of the tests' own, apart from ~/.ssh and port 22: loopback names are hosts that DeepSpeed logs into."""

import getpass
import os
import shutil
import signal
import socket
import subprocess
import time
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from tests.launcher import BIN, free_port

ADDRESSES = ("127.0.0.1", "127.0.0.2")

PACKAGES = {
    "sshd": "openssh-server",
    "ssh": "openssh-client",
    "ssh-keygen": "openssh-client",
    "pdsh": "pdsh",
    "setpriv": "util-linux",
}
"""Of Debian, by the program that is needed."""

MARK = "STARTED_BY_TEST"
"""Environment variable of everything that a test starts, here and by ssh."""

SERVER = """\
Port {port}
ListenAddress 127.0.0.1
ListenAddress 127.0.0.2
HostKey {folder}/host_key
AuthorizedKeysFile {folder}/user_key.pub
PidFile none
StrictModes no
UsePAM no
PasswordAuthentication no
KbdInteractiveAuthentication no
PermitRootLogin prohibit-password
SetEnv {mark}={folder}
"""

CLIENT = """\
User {user}
Port {port}
AddressFamily inet
IdentityFile {folder}/user_key
IdentitiesOnly yes
IdentityAgent none
HostKeyAlias tests
UserKnownHostsFile {folder}/known_hosts
GlobalKnownHostsFile /dev/null
StrictHostKeyChecking yes
BatchMode yes
LogLevel ERROR
"""


@dataclass(frozen=True)
class LoopbackHosts:
    """The hosts of ssh_server: localhost, 127.0.0.1 and 127.0.0.2. Its configuration and log are in `folder`."""

    folder: Path

    @property
    def environment(self):
        """What launched programs need: a PATH with an `ssh` that reaches the hosts, and the mark."""
        path = os.pathsep.join([str(self.folder / "bin"), str(BIN), os.environ["PATH"]])
        return {"PATH": path, MARK: str(self.folder)}

    def logins(self):
        """How often somebody has logged in."""
        return (self.folder / "sshd.log").read_text().count("Accepted publickey")

    def processes(self):
        """The pids of all that was started with `environment` or by a login, and of all that these have started."""
        mark, pids = f"{MARK}={self.folder}".encode(), []
        for entry in Path("/proc").glob("[0-9]*"):
            # Others' processes may not be read, and any process may end while it is looked at.
            with suppress(OSError):
                if mark in (entry / "environ").read_bytes().split(b"\0"):
                    pids.append(int(entry.name))
        return pids

    def kill_processes(self):
        while pids := self.processes():
            for pid in pids:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.05)


@contextmanager
def ssh_server(folder):
    """Runs sshd with keys and configuration in `folder`; gives LoopbackHosts.

    At the end it is gone with everything that was started by it. It ends by itself where the tests are killed.
    """
    program("pdsh")
    port = free_port()
    _configure(folder, port)
    server = [program("sshd"), "-D", "-e", "-f", str(folder / "sshd_config")]
    command = [program("setpriv"), "--pdeathsig", "TERM", *server]
    hosts = LoopbackHosts(folder)
    with (folder / "sshd.log").open("wb") as log:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)
    try:
        _wait_until_it_listens(process, port, folder / "sshd.log")
        yield hosts
    finally:
        process.terminate()
        process.wait()
        hosts.kill_processes()


def program(name):
    """The path of an installed program; system folders count, which are not on everyone's PATH."""
    found = shutil.which(name, path=os.pathsep.join([os.environ["PATH"], "/usr/local/sbin", "/usr/sbin", "/sbin"]))
    assert found, f"{name} is not installed, and these tests need it: apt-get install {PACKAGES[name]}"
    return found


def _configure(folder, port):
    for key in ("host_key", "user_key"):
        command = [program("ssh-keygen"), "-q", "-t", "ed25519", "-N", "", "-C", "tests", "-f", str(folder / key)]
        subprocess.run(command, check=True)
    (folder / "known_hosts").write_text(f"tests {(folder / 'host_key.pub').read_text()}")
    values = {"folder": folder, "port": port, "mark": MARK, "user": getpass.getuser()}
    (folder / "sshd_config").write_text(SERVER.format(**values))
    (folder / "ssh_config").write_text(CLIENT.format(**values))
    ssh = folder / "bin" / "ssh"
    ssh.parent.mkdir()
    ssh.write_text(f'#!/bin/sh\nexec {program("ssh")} -F {folder}/ssh_config "$@"\n')
    ssh.chmod(0o755)
    if os.geteuid() == 0:
        Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)  # root's sshd drops its rights there; booting makes it


def _wait_until_it_listens(process, port, log, seconds=20):
    deadline = time.monotonic() + seconds
    waiting = set(ADDRESSES)
    while waiting and time.monotonic() < deadline and process.poll() is None:
        for address in sorted(waiting):
            with suppress(OSError), socket.create_connection((address, port), timeout=1):
                waiting.remove(address)
        time.sleep(0.05)
    assert not waiting, f"sshd does not listen; exit code {process.poll()}:\n{log.read_text()}"

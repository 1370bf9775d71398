"""Where files lie: on this machine's disks, on a network file system, or behind a URL."""

import re
import subprocess
from pathlib import Path

NETWORK_FILE_SYSTEMS = ("nfs", "lustre", "gpfs", "ceph", "smb", "cifs", "fuse", "beegfs", "afs")


def is_url(name: str) -> bool:
    """Whether `name` is no path, but of a scheme: https://..., s3://..."""
    return re.match(r"[a-zA-Z][a-zA-Z0-9+.-]*://", name) is not None


def is_on_network(path: Path) -> bool:
    """Whether the file system of an existing path belongs to another machine."""
    command = ["stat", "-f", "-c", "%T", path]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.startswith(NETWORK_FILE_SYSTEMS)

"""The ways to launch a training on two processes: by the launchers' own commands, and by launch/pretrain.sh."""

import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from tests.launcher import free_port, run

LOOPBACK = "127.0.0.1"

TWO_HOSTS = "localhost slots=1\n127.0.0.2 slots=1\n"

AS_ROOT = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}


@dataclass(frozen=True)
class Launch:
    """A command and the environment that it needs beyond tests.launcher's."""

    command: list[str]
    environment: dict[str, str] = field(default_factory=dict)


def by_hostfile(arguments, hosts):
    """One machine of a hostfile, which DeepSpeed asks by ssh for its name and address."""
    return [
        _deepspeed("--hostfile", "launch/hosts", *_first_host(), arguments=arguments, environment=hosts.environment)
    ]


def by_pdsh(arguments, hosts):
    """Two machines that pdsh logs into."""
    environment = {**hosts.environment, "DS_ENV_FILE": str(hosts.folder / "deepspeed_env")}
    written = run(["launch/deepspeed_env.sh", environment["DS_ENV_FILE"]], **environment)
    assert written.returncode == 0, written.stdout
    return [_deepspeed("--hostfile", _two_hosts(hosts), *_first_host(), arguments=arguments, environment=environment)]


def by_hand(arguments, hosts):
    """Two machines without ssh: a launcher on each."""
    port, hostfile = str(free_port()), _two_hosts(hosts)
    meeting = ("--master_addr", LOOPBACK, "--master_port", port)
    return [
        _deepspeed(
            *("--hostfile", hostfile, "--no_ssh", "--node_rank", str(node), *meeting),
            arguments=arguments,
            environment=hosts.environment,
        )
        for node in (0, 1)
    ]


def by_mpirun(arguments, hosts):
    """One machine, without DeepSpeed's launcher."""
    command = ["mpirun", "-n", "2", "python", "pipeline/pretrain.py", *arguments]
    return [Launch(command, {**hosts.environment, **AS_ROOT})]


MODES = {"hostfile": by_hostfile, "pdsh": by_pdsh, "no_ssh": by_hand, "mpirun": by_mpirun}
"""mode(arguments, hosts): the launches of pipeline/pretrain.py that make up a run, to be started side by side."""


def by_script(mode, arguments, hosts):
    """The launches of launch/pretrain.sh that make up a run in one of MODES, or `local`: without a hostfile."""
    two_hosts = {"HOSTFILE": _two_hosts(hosts)}
    first_host = {"MASTER_ADDR": LOOPBACK} if _has_no_address() else {}
    meeting = {**two_hosts, "MASTER_ADDR": LOOPBACK, "MASTER_PORT": str(free_port())}
    settings = {
        "local": [{"PROCESSES": "2"}],
        "hostfile": [{"HOSTFILE": "launch/hosts", **first_host}],
        "pdsh": [{**two_hosts, **first_host}],
        "no_ssh": [{**meeting, "NODE_RANK": "0"}, {**meeting, "NODE_RANK": "1"}],
        "mpirun": [{"LAUNCHER": "mpirun", "PROCESSES": "2"}],
    }[mode]
    return [Launch(["launch/pretrain.sh", *arguments], {**hosts.environment, **setting}) for setting in settings]


def run_all(launches, timeout=300):
    """Runs `launches` side by side; their outputs. Fails the test with one that did not end well."""
    with ThreadPoolExecutor(len(launches)) as threads:
        results = list(threads.map(lambda one: run(one.command, timeout=timeout, **one.environment), launches))
    for result in results:
        assert result.returncode == 0, result.stdout[-6000:]
    return "".join(result.stdout for result in results)


def _deepspeed(*options, arguments, environment):
    return Launch(["deepspeed", *options, "pipeline/pretrain.py", *arguments], environment)


def _two_hosts(hosts):
    path = hosts.folder / "two_hosts"
    path.write_text(TWO_HOSTS)
    return str(path)


def _first_host():
    return ("--master_addr", LOOPBACK) if _has_no_address() else ()


def _has_no_address():
    """Whether this machine, a container without a network perhaps, has loopback's address alone.

    Then `hostname -I`, by which DeepSpeed finds out where rank 0 is, says nothing, and DeepSpeed breaks unless told.
    """
    return not subprocess.run(["hostname", "-I"], capture_output=True, text=True, check=True).stdout.split()

"""The examples run on two ranks, print what they should, and are short."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
PRINTED = {
    "generate.py": "The capital of France is Paris",
    "own_block.py": "2 ranks, largest difference",
    "transformers_model.py": "The capital of France is Paris",
}
TWO_HOSTS = "two_hosts.py"
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]


def test_every_example_is_run_here_and_short():
    assert {path.name for path in EXAMPLES.glob("*.py")} == {*PRINTED, TWO_HOSTS}
    for path in EXAMPLES.glob("*.py"):
        assert len(path.read_text().splitlines()) <= 30, path


def lines(process: subprocess.Popen) -> list[str]:
    stdout, stderr = process.communicate(timeout=120)
    assert process.returncode == 0, stderr
    return stdout.splitlines()


def start(command: list[str], **environment: str) -> subprocess.Popen:
    pipe = subprocess.PIPE
    env = {**os.environ, **environment}
    return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=env)


@pytest.mark.parametrize("name", PRINTED)
def test_example(name):
    command = [*TORCHRUN, "--standalone", "--nproc-per-node", "2", str(EXAMPLES / name)]
    assert lines(start(command))[0].startswith(PRINTED[name])


def test_example_for_two_hosts():
    """Where the machine permits it, the second torchrun has a host name of its own: its ranks are
    taken for another host's. Elsewhere both are one host's.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    commands = [
        [*TORCHRUN, "--nnodes", "2", "--node-rank", str(node), "--master-addr", "127.0.0.1",
         "--master-port", str(port), "--nproc-per-node", "1", str(EXAMPLES / TWO_HOSTS)]
        for node in range(2)
    ]  # fmt: skip
    script = 'hostname second && exec "$@"'
    renamed = ["unshare", "--uts", "--map-root-user", "sh", "-c", script, "sh"]
    permitted = subprocess.run([*renamed, "true"], capture_output=True, check=False).returncode == 0
    hosts = [commands[0], [*renamed, *commands[1]] if permitted else commands[1]]
    names = (socket.gethostname(), "second" if permitted else socket.gethostname())
    transport = "torch.distributed" if permitted else "shared memory"
    processes = [start(command, GLOO_SOCKET_IFNAME="lo") for command in hosts]
    try:
        printed = [lines(process) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    for name, (where, difference) in zip(names, printed, strict=True):
        assert where == f"{name}: 2 ranks over {transport}"
        assert float(difference.split()[-1]) < 1e-5

"""Two hosts on one machine: network namespaces joined by a cable of a given speed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence

ADDRESSES = ("10.231.77.1", "10.231.77.2")
PORT = "29531"  # in a namespace of its own, where nobody else has one


class TwoHosts:
    """Programs on two hosts that share neither memory nor a network but the cable between them.

    As a context manager it sets the namespaces up and takes them down again, with all that still
    runs in them.

    Args:
        megabits_per_second: of the cable, each way (tc's token bucket).

    Example:
        >>> with TwoHosts() as hosts:
        ...     done = hosts.torchrun(["program.py"], processes_each=1)
    """

    def __init__(self, megabits_per_second: int = 1000):
        self.rate = megabits_per_second
        self.names = tuple(f"commfuse-{os.getpid()}-{end}" for end in "ab")
        self._jobs: list[subprocess.Popen] = []

    @staticmethod
    def obstacle() -> str | None:
        """Why this machine does not permit it, or None."""
        for program in ("ip", "tc", "unshare"):
            if shutil.which(program) is None:
                return f"{program} is not installed (package iproute2)"
        if subprocess.run(["unshare", "--net", "true"], capture_output=True).returncode:
            return "network namespaces need root"
        return None

    def __enter__(self) -> TwoHosts:
        try:
            self._set_up()
        except BaseException:
            self.__exit__()
            raise
        return self

    def _set_up(self) -> None:
        first, second = self.names
        for name in self.names:
            _run("ip", "netns", "add", name)
        _run("ip", "-n", first, "link", "add", "cable", "type", "veth", "peer", "name", "cable",
             "netns", second)  # fmt: skip
        for name, address in zip(self.names, ADDRESSES, strict=True):
            _run("ip", "-n", name, "address", "add", f"{address}/24", "dev", "cable")
            for device in ("lo", "cable"):
                _run("ip", "-n", name, "link", "set", device, "up")
            _run("ip", "netns", "exec", name, "tc", "qdisc", "add", "dev", "cable", "root", "tbf",
                 "rate", f"{self.rate}mbit", "burst", "128kb", "latency", "50ms")  # fmt: skip

    def start_torchrun(
        self, arguments: Sequence[str], processes_each: int
    ) -> tuple[subprocess.Popen, subprocess.Popen]:
        """One ``torchrun`` a host, of one job: ``arguments`` are the program and its own."""
        jobs = []
        for node, name in enumerate(self.names):
            command = [
                "ip", "netns", "exec", name, sys.executable, "-m", "torch.distributed.run",
                "--nnodes", "2", "--node-rank", str(node), "--nproc-per-node", str(processes_each),
                "--master-addr", ADDRESSES[0], "--master-port", PORT, *arguments,
            ]  # fmt: skip
            env = {**os.environ, "GLOO_SOCKET_IFNAME": "cable", "OMP_NUM_THREADS": "1"}
            jobs.append(
                subprocess.Popen(
                    command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
                )
            )
        self._jobs += jobs
        return jobs[0], jobs[1]

    def __exit__(self, *exception: object) -> None:
        for name in self.names:
            found = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True)
            for process in found.stdout.split():
                subprocess.run(["kill", "-9", process], capture_output=True)
            subprocess.run(["ip", "netns", "delete", name], capture_output=True)
        for job in self._jobs:
            job.kill()
            job.wait()


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()}")

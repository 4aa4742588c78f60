"""Creates the virtual environment of a clone and installs what commfuse depends on.

Used by the Makefile; needs nothing but Python 3.10. It asks no question: it says what it is going
to download, and how large that is, and does it. commfuse itself is compiled afterwards, because its
build needs the torch that is installed here.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import unquote, urlparse

CLONE = Path(__file__).resolve().parent.parent
EXTRAS = "test,demo"
TORCH = "torch>=2.11"
PREREQUISITES = "sudo apt-get install -y make g++ python3-dev python3-venv"
TIMEOUT = 8  # seconds, for questions about sizes and reachability


def say(text: str) -> None:
    print(f"setup: {text}", flush=True)


def megabytes(size: int) -> str:
    return f"{size / 1e6:,.0f} MB"


def check_prerequisites() -> None:
    """Exits with everything that is missing on this machine, and the line that installs it."""
    missing = []
    if importlib.util.find_spec("ensurepip") is None:
        missing.append("python3-venv (this Python cannot create a virtual environment)")
    compiler = os.environ.get("CXX", "g++").split()[0]
    if shutil.which(compiler) is None:
        missing.append(f"g++ (no {compiler} was found; the environment variable CXX chooses it)")
    header = Path(sysconfig.get_path("include")) / "Python.h"
    if not header.is_file():
        missing.append(f"python3-dev ({header} does not exist)")
    if missing:
        lines = ["setup: this machine lacks", *(f"         {what}" for what in missing)]
        sys.exit("\n".join([*lines, f"       on Debian or Ubuntu: {PREREQUISITES}"]))


def has_nvidia_gpu() -> bool:
    return Path("/proc/driver/nvidia/version").exists() or shutil.which("nvidia-smi") is not None


def reachable(index: str) -> bool:
    """Whether a package index answers; pip would retry an absent one for a long time."""
    try:
        with urllib.request.urlopen(f"{index.rstrip('/')}/torch/", timeout=TIMEOUT):
            return True
    except OSError:
        return False


class Environment:
    """A virtual environment and its pip."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.python = folder / "bin" / "python"
        self.sources: list[str] = []  # package sources besides those that pip is configured for

    def create(self) -> None:
        """Makes the environment, unless a working one of this Python version is there."""
        version = "import sys, pip; print(*sys.version_info[:2])"
        old = []
        if self.python.exists():
            found = subprocess.run([self.python, "-c", version], capture_output=True, text=True)
            if found.stdout.split() == [str(part) for part in sys.version_info[:2]]:
                return
            old = ["--clear"]  # of another Python, or damaged
        say(f"creating {self.folder} with {sys.executable}")
        subprocess.run([sys.executable, "-m", "venv", *old, self.folder], check=True)

    def pip(self, verb: str, *arguments: str, quiet: bool = True) -> None:
        options = ["--disable-pip-version-check", *(["--quiet"] if quiet else []), *self.sources]
        command = [self.python, "-m", "pip", verb, *options, *arguments]
        if (code := subprocess.run(command, cwd=CLONE).returncode) != 0:
            sys.exit(f"setup: failed ({code}): {' '.join(map(str, command))}")

    def torch_version(self) -> str | None:
        code = "from importlib.metadata import version; print(version('torch'))"
        found = subprocess.run([self.python, "-c", code], capture_output=True, text=True)
        return found.stdout.strip() or None

    def newest_cpu_torch(self) -> str | None:
        """The newest CPU-only torch (version "…+cpu") that pip can see, from 2.11 on, or None."""
        command = [self.python, "-m", "pip", "index", "versions", "torch", *self.sources]
        listed = subprocess.run(command, capture_output=True, text=True).stdout
        for line in listed.splitlines():
            if line.startswith("Available versions:"):
                for version in line.split(":")[1].replace(",", " ").split():  # newest first
                    major, minor = version.split(".")[:2]
                    if version.endswith("+cpu") and (int(major), int(minor)) >= (2, 11):
                        return version
        return None

    def resolve(self, *requirements: str) -> list[dict]:
        """What pip would download for the requirements: the entries of its installation report."""
        with tempfile.TemporaryDirectory() as folder:
            report = Path(folder) / "report.json"
            self.pip(
                *("install", "--dry-run", "--no-build-isolation", "--report", str(report)),
                *requirements,
            )
            return json.loads(report.read_text())["install"]


def choose_torch(environment: Environment, asked: str, cpu_index: str) -> str:
    """The torch requirement to install, with a line that says why it is this one."""
    present = environment.torch_version()
    if present and not asked:
        say(f"keeping torch {present}")
        return f"torch=={present}"
    if has_nvidia_gpu():
        return asked or TORCH
    # PyPI's torch for Linux brings gigabytes of CUDA libraries, which are of no use here.
    if cpu_index and reachable(cpu_index):
        say(f"no NVIDIA GPU here: CPU builds of torch are looked up at {cpu_index} as well")
        environment.sources = ["--extra-index-url", cpu_index]
    elif cpu_index:
        say(f"{cpu_index} (CPU builds of torch) cannot be reached from here")
    if asked:
        return asked
    version = environment.newest_cpu_torch()
    if version is None:
        say("no NVIDIA GPU here, but pip finds no CPU build of torch: the CUDA build will do")
        return TORCH
    say(f'no NVIDIA GPU here: taking the CPU build torch {version} (choose: make TORCH="{TORCH}")')
    return f"torch=={version}"


def download_size(entry: dict) -> int | None:
    """Bytes of one entry of pip's report, or None where its server does not say."""
    url = urlparse(entry["download_info"]["url"])
    try:
        if url.scheme == "file":
            return Path(unquote(url.path)).stat().st_size
        request = urllib.request.Request(url.geturl(), method="HEAD")
        with urllib.request.urlopen(request, timeout=TIMEOUT) as answer:
            return int(answer.headers["Content-Length"])
    except (OSError, TypeError, ValueError):
        return None


def announce(entries: list[dict]) -> None:
    """Prints the number and size of the downloads to come, the large ones by name."""
    with ThreadPoolExecutor(8) as pool:
        sizes = list(pool.map(download_size, entries))
    named = [
        (size, f"{entry['metadata']['name']} {entry['metadata']['version']}")
        for size, entry in zip(sizes, entries, strict=True)
    ]
    known = sum(size or 0 for size, _ in named)
    unknown = sum(size is None for size, _ in named)
    say(
        f"downloading {len(entries)} packages, {megabytes(known)}"
        + (f" and {unknown} of unknown size" if unknown else "")
        + ", unless pip has them in its cache"
    )
    for size, name in sorted((n for n in named if (n[0] or 0) > 50e6), reverse=True):
        say(f"  {megabytes(size):>9}  {name}")


def pinned(entry: dict) -> str:
    """The requirement that installs exactly what was announced."""
    name, version = entry["metadata"]["name"], entry["metadata"]["version"]
    return (
        f"{name} @ {entry['download_info']['url']}" if entry["is_direct"] else f"{name}=={version}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="the virtual environment")
    parser.add_argument("--torch", default="", help=f"torch requirement (default: {TORCH})")
    parser.add_argument("--cpu-index", default="", help="index with CPU builds of torch")
    arguments = parser.parse_args()

    check_prerequisites()
    environment = Environment(arguments.folder.absolute())
    environment.create()
    say("build tools: pip, setuptools, ninja (5 MB)")
    environment.pip("install", "--upgrade", "pip>=24", "setuptools>=77", "ninja")
    torch = choose_torch(environment, arguments.torch, arguments.cpu_index)
    say("asking pip what is missing")
    entries = environment.resolve(torch, "-e", f".[{EXTRAS}]")
    entries = [entry for entry in entries if entry["metadata"]["name"] != "commfuse"]
    if entries:
        announce(entries)
        progress = sys.stdout.isatty()
        environment.pip("install", "--no-deps", *map(pinned, entries), quiet=not progress)
    say("all dependencies are installed")


if __name__ == "__main__":
    main()

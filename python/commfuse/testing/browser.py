"""Looks at a page in headless Chromium: what a script finds, what the console says, a picture.

``python -m commfuse.testing.browser PAGE.html PICTURE.png`` makes the picture in docs/.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from html import unescape
from pathlib import Path
from typing import Any

WIDTH, HEIGHT = 1100, 3600  # of the window: the whole page is in it
SECONDS = 120
_PROGRAMS = ("chromium", "chromium-browser", "google-chrome")
_ANSWER = re.compile(r'<pre id="answer">(.*?)</pre>', re.S)
_CONSOLE = re.compile(r'CONSOLE[:(]\d+\)?\] "(.*)", source:')


@dataclass(frozen=True)
class Look:
    """What was found.

    Attributes:
        answer: of the script.
        console: what the page, or the browser about it, has written to the console.
    """

    answer: Any
    console: list[str]


def obstacle() -> str | None:
    """Why there is no browser here, or None."""
    if any(map(shutil.which, _PROGRAMS)):
        return None
    return "Chromium is not installed (package chromium)"


def look(page: str, script: str) -> Look:
    """Opens a page, without a network, and asks it something.

    Args:
        page: HTML.
        script: JavaScript expression, evaluated at the page's end; its value goes through JSON.

    Raises:
        RuntimeError: the browser failed, or the script did.

    Example:
        >>> look("<p>one<p>two", "document.querySelectorAll('p').length").answer
        2
    """
    asking = (
        '<pre id="answer"></pre><script>document.getElementById("answer").textContent = '
        f"JSON.stringify({script})</script>"
    )
    with tempfile.TemporaryDirectory(prefix="commfuse-browser-") as folder:
        path = Path(folder) / "page.html"
        path.write_text(page + asking, encoding="utf-8")
        done = _run(folder, path, "--enable-logging=stderr", "--dump-dom")
    found = _ANSWER.search(done.stdout)
    console = _CONSOLE.findall(done.stderr)
    if not found or not found[1]:
        raise RuntimeError(f"the script gave no answer; console: {console}; {done.stderr[-2000:]}")
    return Look(json.loads(unescape(found[1])), console)


def screenshot(page: Path, picture: Path, height: int = HEIGHT) -> None:
    """Writes a picture of a page, as PNG."""
    with tempfile.TemporaryDirectory(prefix="commfuse-browser-") as folder:
        _run(folder, page.resolve(), f"--screenshot={picture.resolve()}", height=height)


def _run(
    folder: str, page: Path, *options: str, height: int = HEIGHT
) -> subprocess.CompletedProcess:
    program = next(found for found in map(shutil.which, _PROGRAMS) if found)
    command = [program, "--headless", "--disable-gpu", "--hide-scrollbars", *options]
    command += [f"--user-data-dir={folder}/profile", f"--window-size={WIDTH},{height}"]
    # A container's /dev/shm may be too small for a page.
    command.append("--disable-dev-shm-usage")
    # Nothing is to come from elsewhere: every name leads nowhere.
    command += ["--host-resolver-rules=MAP * ~NOTFOUND"]
    if os.geteuid() == 0:
        command.append("--no-sandbox")  # it cannot be set up by root
    command.append(page.as_uri())
    done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
    if done.returncode:
        raise RuntimeError(f"{program}: exit status {done.returncode}: {done.stderr[-2000:]}")
    return done


if __name__ == "__main__":
    screenshot(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]) if sys.argv[3:] else HEIGHT)

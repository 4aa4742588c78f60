"""Builds commfuse and its extension ``commfuse._C``; everything static is in pyproject.toml.

Environment:
    COMMFUSE_CUDA  0 leaves the CUDA sources out, 1 insists on them; unset: they are built where
                   nvcc and a CUDA build of torch are found.
    MAX_JOBS       parallel compilations; default: as many as the cores and the free memory allow.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import setuptools
from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext as PlainBuildExt
from setuptools.command.build_py import build_py as PlainBuildPy
from setuptools.command.dist_info import dist_info as PlainDistInfo

ROOT = Path(__file__).resolve().parent
RECORD = "_C.build.json"  # beside the library; _extension.py checks it before it loads
GIB_PER_JOB = 2.0  # a file that includes torch's headers takes 1 to 2 GiB to compile
CUDA_ARCHITECTURES = ("80", "90a")


def cuda_toolkit() -> str | None:
    """The folder of the CUDA toolkit: nvcc says it, also where the nvcc on PATH is a wrapper."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        return None
    plan = subprocess.run([nvcc, "--dryrun", "-c", "x.cu"], capture_output=True, text=True).stderr
    tops = [line.split("=", 1)[1] for line in plan.splitlines() if line.startswith("#$ TOP=")]
    return os.path.realpath(tops[0].strip()) if tops else None


if not os.environ.get("CUDA_HOME") and (toolkit := cuda_toolkit()):
    os.environ["CUDA_HOME"] = toolkit  # torch reads it when cpp_extension is imported

try:
    import torch
    from torch.utils import cpp_extension
except ImportError:
    torch = None

OWN_LIBSTDCXX = """
commfuse: the compiler has linked the C++ library statically into commfuse._C. Beside the one that
torch brings, its streams break: numbers are read as 0, and messages with numbers crash. Build with
a compiler that links libstdc++.so, as the system's own does:

    CC=/usr/bin/gcc CXX=/usr/bin/g++ pip install --no-build-isolation --no-deps .      (or -e .)
"""

NO_TORCH = f"""
commfuse is compiled against the torch that will load it, and {sys.executable} has none.
pip's build isolation hides an installed torch, so install it first and turn isolation off:

    pip install "torch>=2.11" "setuptools>=77" ninja
    pip install --no-build-isolation .        (or -e . in a clone)
"""


def say(line: str) -> None:
    print(f"commfuse: {line}", flush=True)


def relative(pattern: str) -> list[str]:
    """Files below csrc/, relative to this file as setuptools wants them, in a fixed order."""
    return sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "csrc").rglob(pattern))


def max_jobs() -> int:
    """Compilations that fit both the cores of this process and the free memory."""
    cores = len(os.sched_getaffinity(0))
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            free = int(line.split()[1]) * 1024
    return max(1, min(cores, int(free / (GIB_PER_JOB * 2**30))))


def why_no_cuda() -> str | None:
    """The reason why the CUDA sources cannot be built here, or None."""
    if os.environ.get("COMMFUSE_CUDA") == "0":
        return "COMMFUSE_CUDA=0"
    if not relative("*.cu"):
        return "csrc/ has no CUDA sources"
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is not a CUDA build"
    if cpp_extension.CUDA_HOME is None:
        return "nvcc was not found (set CUDA_HOME)"
    nvcc = Path(cpp_extension.CUDA_HOME) / "bin" / "nvcc"
    if not nvcc.exists():
        return f"{nvcc} does not exist"
    said = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    release = said.partition("release ")[2].partition(",")[0]
    if release.split(".")[0] != torch.version.cuda.split(".")[0]:  # torch refuses the mixture
        return f"{nvcc} is of CUDA {release or 'unknown'}, but torch of CUDA {torch.version.cuda}"
    return None


def openmp_link_flags() -> list[str]:
    """Links the OpenMP runtime that torch brings along: two runtimes mean two thread pools."""
    bundled = sorted((Path(torch.__file__).parent / "lib").glob("libgomp*.so*"))
    return [str(bundled[0])] if bundled else ["-fopenmp"]


def extension() -> Extension:
    """``commfuse._C`` from csrc/**/*.cpp, with csrc/**/*.cu where CUDA can be built."""
    # *_cuda.cpp: the host's side of CUDA, which needs its headers too.
    of_cuda = relative("*_cuda.cpp") + relative("*.cu")
    sources = [source for source in relative("*.cpp") if source not in of_cuda]
    headers = relative("*.h") + relative("*.hpp") + relative("*.cuh") + relative("*.inc")
    if not sources:
        raise SystemExit("commfuse: csrc/ holds no C++ sources; is this a complete source tree?")
    if torch is None:  # enough for metadata and sdist; BuildExt refuses to compile
        return Extension("commfuse._C", sources, depends=headers)

    asked = os.environ.get("COMMFUSE_CUDA", "")
    if asked not in ("", "0", "1"):
        raise SystemExit(f"commfuse: COMMFUSE_CUDA is {asked!r}; use 0, 1 or leave it unset")
    no_cuda = why_no_cuda()
    if asked == "1" and no_cuda:
        raise SystemExit(f"commfuse: COMMFUSE_CUDA=1, but {no_cuda}")

    # No -march=native: a wheel must run on other CPUs, so the variants of an instruction set are
    # chosen at run time and set their own targets.
    common = ["-O3", "-fvisibility=hidden"]
    flags = {
        "cxx": [*common, "-std=c++20", "-Wall", "-fopenmp", "-DAT_PARALLEL_OPENMP=1"],
        "nvcc": [
            *("-O3", "-std=c++20", "-Xcompiler=-fvisibility=hidden"),
            *(f"-gencode=arch=compute_{a},code=sm_{a}" for a in CUDA_ARCHITECTURES),
        ],
    }
    options = {
        "include_dirs": [str(ROOT / "csrc")],
        "depends": headers,
        "define_macros": [],
        "extra_compile_args": flags,
        "extra_link_args": openmp_link_flags(),
    }
    if no_cuda is None:
        options["define_macros"] = [("COMMFUSE_WITH_CUDA", None)]
        built = cpp_extension.CUDAExtension("commfuse._C", sources + of_cuda, **options)
    else:
        built = cpp_extension.CppExtension("commfuse._C", sources, **options)
    built.commfuse_no_cuda = no_cuda
    return built


class BuildPy(PlainBuildPy):
    """Copies the Python files into a fresh folder: no deleted module lives on in a wheel."""

    def run(self):
        if not self.editable_mode:
            shutil.rmtree(Path(self.build_lib) / "commfuse", ignore_errors=True)
        super().run()


class DistInfo(PlainDistInfo):
    """Metadata, the first thing that pip asks for: an isolated build, which cannot succeed, ends
    here and not after pip has downloaded torch and its libraries.
    """

    def run(self):
        if torch is None and any("pip-build-env" in entry for entry in sys.path):
            raise SystemExit(NO_TORCH)
        super().run()


class BuildExt(PlainBuildExt if torch is None else cpp_extension.BuildExtension):
    """Compiles the extension, says what was built, and records what it was built against."""

    def finalize_options(self):
        super().finalize_options()
        if torch is not None:
            # Objects stay in the clone (an editable install would use a temporary folder), so that
            # only what changed is compiled again; each torch and Python has a folder of its own.
            tag = f"{sys.implementation.cache_tag}-torch-{torch.__version__}"
            self.build_temp = str(ROOT / "build" / f"objects-{tag}")

    def run(self):
        if torch is None:
            raise SystemExit(NO_TORCH)
        os.environ.setdefault("MAX_JOBS", str(max_jobs()))
        (ext,) = self.extensions
        kinds = "C++ and CUDA" if ext.commfuse_no_cuda is None else "C++"
        say(f"compiling {len(ext.sources)} {kinds} files against torch {torch.__version__}")
        super().run()
        library = Path(self.get_ext_fullpath(ext.name))
        content = library.read_bytes()
        if b"basic_string" in content and b"libstdc++.so" not in content:
            library.unlink()
            raise SystemExit(OWN_LIBSTDCXX)
        record = self.record(ext)
        say(f"built commfuse._C for the CPU{' and CUDA' if record['cuda'] else ''}")
        if not record["cuda"]:
            say(f"left out the CUDA sources: {record['no_cuda']}")

    def record(self, ext: Extension) -> dict:
        """Writes the sidecar file that _extension.py checks before it loads the library."""
        cuda = ext.commfuse_no_cuda is None
        compiler = os.environ.get("CXX", "c++").split()[0]
        version = subprocess.run([compiler, "--version"], capture_output=True, text=True)
        record = {
            "torch": torch.__version__,
            "python": platform.python_version(),
            "compiler": (version.stdout.splitlines() or ["unknown"])[0],
            "cuda": torch.version.cuda if cuda else None,
            "cuda_architectures": [f"sm_{a}" for a in CUDA_ARCHITECTURES] if cuda else [],
            "no_cuda": ext.commfuse_no_cuda,
            "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        }
        path = Path(self.get_ext_fullpath(ext.name)).with_name(RECORD)
        path.write_text(json.dumps(record, indent=2) + "\n")
        return record


def layout() -> tuple[list[str], dict[str, str]]:
    """Packages and their folders; two folders of the top level are installed below commfuse."""
    packages = find_packages("python", include=["commfuse", "commfuse.*"])
    package_dir = {"commfuse": "python/commfuse"}
    for folder in ("triton_kernels", "bench"):
        if (ROOT / folder / "__init__.py").exists():
            package_dir[f"commfuse.{folder}"] = folder
            packages.append(f"commfuse.{folder}")
            packages += [f"commfuse.{folder}.{name}" for name in find_packages(folder)]
    return packages, package_dir


if int(setuptools.__version__.split(".")[0]) < 77:
    raise SystemExit(
        f"commfuse: setuptools {setuptools.__version__} is too old; "
        'run: pip install "setuptools>=77"'
    )

packages, package_dir = layout()
setup(
    packages=packages,
    package_dir=package_dir,
    include_package_data=False,
    package_data={
        "commfuse": ["py.typed"],
        "commfuse.runtime": ["tables/*.json"],
        "commfuse.planner": ["data/*.json"],
    },
    ext_modules=[extension()],
    cmdclass={"build_py": BuildPy, "build_ext": BuildExt, "dist_info": DistInfo},
)

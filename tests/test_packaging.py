"""What gets built, what is in it, and what an incomplete installation says.

The archives are built from a copy of the clone. A module of a few lines stands in for csrc/, so
that a build takes seconds; ``test_the_sources_compile`` builds the real one.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch

import commfuse
from commfuse import _extension

CLONE = Path(__file__).resolve().parent.parent
STAND_IN = """
#include <Python.h>
static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr};
extern "C" __attribute__((visibility("default"))) PyObject* PyInit__C() {
  return PyModule_Create(&definition);
}
"""


def run(*command, cwd, **environment) -> subprocess.CompletedProcess:
    """Runs a command to its end; ``environment`` is added to ours, PYTHONPATH not inherited."""
    inherited = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    return subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=inherited | {key: str(value) for key, value in environment.items()},
        capture_output=True,
        text=True,
    )


def succeed(*command, cwd, **environment) -> str:
    done = run(*command, cwd=cwd, **environment)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def built_wheel(tree: Path, folder: Path) -> Path:
    options = ["--no-build-isolation", "--no-deps", "--disable-pip-version-check"]
    succeed(sys.executable, "-m", "pip", "wheel", *options, "-w", folder, tree, cwd=tree)
    (wheel,) = folder.glob("*.whl")
    return wheel


def without_torch(folder: Path) -> Path:
    """A folder for PYTHONPATH in which torch cannot be imported."""
    folder.mkdir()
    (folder / "torch.py").write_text("raise ImportError('hidden by a test')\n")
    return folder


@pytest.fixture(scope="module")
def copied(tmp_path_factory) -> Path:
    """The files of this clone as they are now, without what was built or downloaded."""
    tree = tmp_path_factory.mktemp("clone") / "commfuse"
    generated = (".git", ".venv", "build", "dist", "*.egg-info", "__pycache__", ".*_cache", "*.so")
    shutil.copytree(CLONE, tree, ignore=shutil.ignore_patterns(*generated, _extension._RECORD))
    results = tree / "bench" / "results"
    results.mkdir(parents=True, exist_ok=True)
    (results / "row.jsonl").write_text("{}\n")
    return tree


@pytest.fixture(scope="module")
def sdist(copied, tmp_path_factory) -> Path:
    """The source archive, unpacked; made where torch is missing, which must be enough."""
    folder = tmp_path_factory.mktemp("sdist")
    hidden = without_torch(folder / "hidden")
    setup = [sys.executable, "setup.py", "--quiet", "sdist", "--dist-dir", folder]
    succeed(*setup, cwd=copied, PYTHONPATH=hidden)
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        tar.extraction_filter = getattr(tarfile, "data_filter", None)  # Python 3.11.4 and later
        tar.extractall(folder)
    return folder / archive.name.removesuffix(".tar.gz")


@pytest.fixture(scope="module")
def stand_in(sdist, tmp_path_factory) -> Path:
    """The unpacked source archive with a trivial extension."""
    tree = tmp_path_factory.mktemp("stand_in") / "commfuse"
    shutil.copytree(sdist, tree)
    shutil.rmtree(tree / "csrc")
    (tree / "csrc").mkdir()
    (tree / "csrc" / "bindings.cpp").write_text(STAND_IN)
    return tree


@pytest.fixture(scope="module")
def wheel(stand_in, tmp_path_factory) -> Path:
    """The wheel of the stand-in, built from a tree that still holds what an older build left."""
    tag = f"{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
    stale = stand_in / "build" / f"lib.{tag}" / "commfuse"
    stale.mkdir(parents=True)
    (stale / "deleted.py").touch()
    return built_wheel(stand_in, tmp_path_factory.mktemp("wheel"))


@pytest.fixture
def package(tmp_path) -> Path:
    """A copy of the Python files of the package, for PYTHONPATH: it has no extension."""
    folder = tmp_path / "path" / "commfuse"
    ignored = shutil.ignore_patterns("*.so", _extension._RECORD, "__pycache__")
    shutil.copytree(CLONE / "python" / "commfuse", folder, ignore=ignored)
    return folder


def require_in(package: Path) -> str:
    """The error of ``_extension.require()`` in the copied package."""
    code = (
        "import commfuse\n"
        "from commfuse import _extension, errors\n"
        f"assert commfuse.__file__ == {str(package / '__init__.py')!r}, commfuse.__file__\n"
        "try:\n"
        "    _extension.require()\n"
        "except errors.BackendUnavailable as error:\n"
        "    assert str(error) == _extension.reason == _extension.summary()\n"
        "    print(error)\n"
    )
    return succeed(sys.executable, "-c", code, cwd=package.parent, PYTHONPATH=package.parent)


class TestImport:
    def test_costs_no_torch(self):
        code = "import sys, commfuse; commfuse.__version__; print('torch' in sys.modules)"
        assert succeed(sys.executable, "-c", code, cwd="/").strip() == "False"

    def test_help_of_the_command_costs_no_torch(self):
        code = (
            "import sys\n"
            "from commfuse.cli import main\n"
            "sys.argv = ['commfuse', '--help']\n"
            "try:\n"
            "    main()\n"
            "except SystemExit as end:\n"
            "    assert not end.code, end.code\n"
            "print('torch' in sys.modules)\n"
        )
        assert succeed(sys.executable, "-c", code, cwd="/").splitlines()[-1] == "False"

    def test_public_names(self):
        assert {"Communicator", "init_mesh", "explain", "ops", "nn", "errors"} <= set(dir(commfuse))
        for name in commfuse.__all__:
            assert getattr(commfuse, name) is not None

    def test_unknown_name(self):
        with pytest.raises(AttributeError, match="'commfuse' has no attribute 'all_gather_it'"):
            commfuse.all_gather_it  # noqa: B018

    def test_version_is_that_of_pyproject(self):
        assert f'version = "{commfuse.__version__}"' in (CLONE / "pyproject.toml").read_text()


class TestExtension:
    def test_loads_here(self):
        assert _extension.require() is _extension.module
        assert _extension.reason is None
        assert torch.__version__ in _extension.summary()

    def test_missing(self, package):
        reason = require_in(package)
        assert "not built" in reason
        assert "pip install --no-build-isolation" in reason

    def test_of_another_torch(self, package):
        (package / "_C.cpython.so").write_bytes(b"never loaded")
        (package / _extension._RECORD).write_text(json.dumps({"torch": "2.11.0+other"}))
        reason = require_in(package)
        assert "built against torch 2.11.0+other" in reason
        assert f"torch {torch.__version__} is installed" in reason
        assert "pip install --no-build-isolation" in reason

    @pytest.mark.parametrize("record", [None, "", "{", "[]", "{}"])
    def test_without_a_usable_record(self, tmp_path, record):
        (tmp_path / "_C.cpython.so").write_bytes(b"never loaded")
        if record is not None:
            (tmp_path / _extension._RECORD).write_text(record)
        module, reason, _ = _extension._load(tmp_path)
        assert module is None
        assert f"{_extension._RECORD} is missing or unreadable" in reason

    def test_damaged(self, package):
        suffix = Path(_extension.require().__file__).name.removeprefix("_C")
        (package / f"_C{suffix}").write_bytes(b"not a library")
        (package / _extension._RECORD).write_text(json.dumps({"torch": torch.__version__}))
        assert "does not load" in require_in(package)

    def test_rebuild_command_names_the_clone(self, tmp_path):
        (tmp_path / "csrc").mkdir()
        (tmp_path / "setup.py").touch()
        assert _extension._rebuild_command(tmp_path / "python" / "commfuse").endswith(f"{tmp_path}")


class TestSourceArchive:
    def test_holds_all_sources(self, copied, sdist):
        for folder in ("csrc", "python", "triton_kernels", "bench", "tests"):
            for path in (copied / folder).rglob("*.*"):
                inside = path.relative_to(copied)
                wanted = path.is_file() and inside.parts[:2] != ("bench", "results")
                assert (sdist / inside).is_file() == wanted or "egg-info" in str(inside), inside

    def test_holds_what_set_up_needs(self, sdist):
        for name in ("setup.py", "pyproject.toml", "Makefile", "LICENSE", "README.md"):
            assert (sdist / name).is_file(), name


class TestWheel:
    def test_installs_commfuse_and_nothing_else(self, wheel):
        with zipfile.ZipFile(wheel) as archive:
            names = archive.namelist()
        assert {name.split("/")[0] for name in names} == {
            "commfuse",
            f"commfuse-{commfuse.__version__}.dist-info",
        }
        python_files = {"commfuse/" + p for p in ("__init__.py", "triton_kernels/__init__.py")}
        assert python_files <= set(names)
        facts = ("calibration", "devices", "links", "models", "plan.schema")
        assert {f"commfuse/planner/data/{name}.json" for name in facts} <= set(names)
        assert "commfuse/deleted.py" not in names
        assert f"commfuse/{_extension._RECORD}" in names
        assert not [name for name in names if name.endswith((".cpp", ".h", ".cu", ".jsonl"))]

    def test_works_when_installed(self, wheel, tmp_path):
        target = tmp_path / "installed"
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", target]
        succeed(*pip, wheel, cwd=tmp_path)
        code = (
            "import commfuse.triton_kernels\n"
            "from commfuse import _extension\n"
            "print(_extension.require().__file__)\n"
            "print(commfuse.triton_kernels.__file__)\n"
        )
        for line in succeed(
            sys.executable, "-c", code, cwd=tmp_path, PYTHONPATH=target
        ).splitlines():
            assert line.startswith(str(target)), line

    @pytest.mark.long
    @pytest.mark.timeout(3600)
    def test_the_sources_compile(self, sdist, tmp_path):
        wheel = built_wheel(sdist, tmp_path / "wheels")
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(tmp_path / "installed")
        code = "from commfuse import _extension; print(_extension.require().__file__)"
        path = succeed(sys.executable, "-c", code, cwd=tmp_path, PYTHONPATH=tmp_path / "installed")
        assert path.startswith(str(tmp_path))


class TestBuildErrors:
    def test_without_torch(self, stand_in, tmp_path):
        hidden = without_torch(tmp_path / "hidden")
        build = [sys.executable, "setup.py", "build_ext", "--inplace"]
        done = run(*build, cwd=stand_in, PYTHONPATH=hidden)
        assert done.returncode != 0
        assert "pip install --no-build-isolation" in done.stderr
        assert "Traceback" not in done.stderr

    @pytest.mark.parametrize(
        ("value", "message"),
        [("1", "COMMFUSE_CUDA=1, but csrc/ has no CUDA sources"), ("yes", "use 0, 1 or leave it")],
    )
    def test_cuda_that_cannot_be_built(self, stand_in, value, message):
        build = [sys.executable, "setup.py", "build_ext", "--inplace"]
        done = run(*build, cwd=stand_in, COMMFUSE_CUDA=value)
        assert done.returncode != 0
        assert message in done.stderr
        assert "Traceback" not in done.stderr

    def test_what_was_built_is_printed(self, stand_in):
        build = [sys.executable, "setup.py", "build_ext", "--inplace"]
        said = succeed(*build, cwd=stand_in, COMMFUSE_CUDA="0")
        assert f"against torch {torch.__version__}" in said
        assert "commfuse: built commfuse._C for the CPU\n" in said
        assert "commfuse: left out the CUDA sources: COMMFUSE_CUDA=0" in said

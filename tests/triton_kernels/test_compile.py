"""Kernels compile, without a GPU, for the supported GPUs and to the expected instructions."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

COMPILE = Path(__file__).with_name("compile_kernels.py")
ARCHITECTURES = [80, 90, 100]
VARIANTS = ["bfloat16 W=2", "float16 W=3", "float32 W=8"]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """[architecture][variant] -> {"cubin_bytes", "ptx"}, from a process without the interpreter."""
    env = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton"))}
    env.pop("TRITON_INTERPRET", None)
    done = subprocess.run(
        [sys.executable, COMPILE, *map(str, ARCHITECTURES)],
        env=env,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
class TestAllReduce:
    def test_cubin(self, compiled, architecture, variant):
        result = compiled[str(architecture)][variant]
        assert result["cubin_bytes"] > 0
        assert re.search(rf"^\.target sm_{architecture}", result["ptx"], re.MULTILINE)

    def test_words_are_released_and_acquired_at_system_scope(self, compiled, architecture, variant):
        ptx = compiled[str(architecture)][variant]["ptx"]
        signals = re.findall(r"atom\.global\.sys\.release\.exch\.b64", ptx)
        assert len(signals) == 1  # a vector of peers, not one after the other
        assert re.search(r"atom\.global\.sys\.acquire\.add\.u64", ptx)
        # Nothing that others see may have a smaller scope.
        atomics = re.findall(r"(?:atom|red)\.\S*(?:acquire|release|acq_rel|relaxed)\S*", ptx)
        assert atomics and all(".sys" in atomic for atomic in atomics)

    def test_signal_comes_after_the_payload_and_a_barrier(self, compiled, architecture, variant):
        ptx = compiled[str(architecture)][variant]["ptx"]
        before_signal, _ = ptx.split("atom.global.sys.release.exch", 1)
        last_payload = before_signal.rindex("st.global.v4.b32")
        assert "bar.sync" in before_signal[last_payload:]

    def test_payload_moves_16_bytes_at_a_time(self, compiled, architecture, variant):
        ptx = compiled[str(architecture)][variant]["ptx"]
        world_size = int(variant.split("=")[1])
        # To every peer and to the result; from the input and from every slot.
        assert len(re.findall(r"st\.global\.v4\.b32", ptx)) == world_size + 1
        assert len(re.findall(r"ld\.global\.v4\.b32", ptx)) == world_size + 1

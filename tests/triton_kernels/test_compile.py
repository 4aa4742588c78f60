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
    """[architecture][op][variant] -> what came out, from processes without the interpreter."""
    env = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton"))}
    env.pop("TRITON_INTERPRET", None)
    started = [
        subprocess.Popen(
            [sys.executable, COMPILE, *map(str, architectures)],
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for architectures in ([90], [80, 100])  # about equally long
    ]
    found = {}
    for process in started:
        out, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
        found |= json.loads(out)
    return found


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
class TestAllReduce:
    def test_cubin(self, compiled, architecture, variant):
        result = compiled[str(architecture)]["all_reduce"][variant]
        assert result["cubin_bytes"] > 0
        assert re.search(rf"^\.target sm_{architecture}", result["ptx"], re.MULTILINE)

    def test_words_are_released_and_acquired_at_system_scope(self, compiled, architecture, variant):
        ptx = compiled[str(architecture)]["all_reduce"][variant]["ptx"]
        signals = re.findall(r"atom\.global\.sys\.release\.exch\.b64", ptx)
        assert len(signals) == 1  # a vector of peers, not one after the other
        assert re.search(r"atom\.global\.sys\.acquire\.add\.u64", ptx)
        # Nothing that others see may have a smaller scope.
        atomics = re.findall(r"(?:atom|red)\.\S*(?:acquire|release|acq_rel|relaxed)\S*", ptx)
        assert atomics and all(".sys" in atomic for atomic in atomics)

    def test_signal_comes_after_the_payload_and_a_barrier(self, compiled, architecture, variant):
        ptx = compiled[str(architecture)]["all_reduce"][variant]["ptx"]
        before_signal, _ = ptx.split("atom.global.sys.release.exch", 1)
        last_payload = before_signal.rindex("st.global.v4.b32")
        assert "bar.sync" in before_signal[last_payload:]

    def test_payload_moves_16_bytes_at_a_time(self, compiled, architecture, variant):
        ptx = compiled[str(architecture)]["all_reduce"][variant]["ptx"]
        world_size = int(variant.split("=")[1])
        # To every peer and to the result; from the input and from every slot.
        assert len(re.findall(r"st\.global\.v4\.b32", ptx)) == world_size + 1
        assert len(re.findall(r"ld\.global\.v4\.b32", ptx)) == world_size + 1


@pytest.mark.parametrize("architecture", [80, 90])
def test_drawing(compiled, architecture):
    result = compiled[str(architecture)]["verify_chain"]["float16 W=3"]
    assert result["cubin_bytes"] > 0 and result["STACK"] == 0
    ptx = result["ptx"]
    # Of the maxima, the bounds, the mass and the winner.
    assert len(re.findall(r"atom\.global\.sys\.release\.exch\.b64", ptx)) == 4
    assert re.search(r"atom\.global\.sys\.acquire\.add\.u64", ptx)
    assert not re.findall(r"(?:atom|red)\.\S*\.f(?:16|32|64)", ptx)


FUSED = [(80, "float16 W=3"), (100, "float16 W=3"), *((90, variant) for variant in VARIANTS)]


@pytest.mark.parametrize(("architecture", "variant"), FUSED)
class TestFused:
    @pytest.fixture(params=["all_reduce_rms_norm", "matmul_all_reduce"])
    def result(self, request, compiled, architecture, variant):
        return compiled[str(architecture)][request.param][variant]

    def test_fits_the_gpu(self, result):
        assert result["cubin_bytes"] > 0
        assert result["STACK"] == 0  # no register is spilled
        assert result["shared_bytes"] <= 163 * 1024

    def test_words_are_released_and_acquired_at_system_scope(self, result):
        ptx = result["ptx"]
        assert len(re.findall(r"atom\.global\.sys\.release\.exch\.b64", ptx)) == 1
        assert re.search(r"atom\.global\.sys\.acquire\.add\.u64", ptx)

    def test_sums_do_not_depend_on_who_comes_first(self, result):
        assert not re.findall(r"(?:atom|red)\.\S*\.f(?:16|32|64)", result["ptx"])

    def test_payload_is_pushed_before_the_signal(self, result):
        before_signal, _ = result["ptx"].split("atom.global.sys.release.exch", 1)
        last_payload = before_signal.rindex("st.global.v4.b32")
        assert "bar.sync" in before_signal[last_payload:]


@pytest.mark.parametrize(("architecture", "variant"), FUSED)
def test_weights_stream(compiled, architecture, variant):
    """Asynchronous copies of 16 bytes, some always under way while others are multiplied."""
    ptx = compiled[str(architecture)]["matmul_all_reduce"][variant]["ptx"]
    copies = re.findall(r"cp\.async\.c[ga]\S+ .*?, (0x\w+)", ptx)
    assert copies and set(copies) == {"0x10"}
    assert max(map(int, re.findall(r"cp\.async\.wait_group\s+(\d+)", ptx))) >= 4
    if "float32" not in variant:
        tensor_core = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}[architecture]
        assert tensor_core in ptx


def test_blocks_of_one_gpu_meet_at_its_scope(compiled):
    fused = compiled["90"]["matmul_all_reduce"]
    meeting = [
        bool(re.search(r"atom\.global\.gpu\.release\.exch", fused[v]["ptx"])) for v in VARIANTS
    ]
    assert meeting == [False, True, False]  # with the norm alone


@pytest.mark.parametrize(("architecture", "variant"), [(80, "float16 W=3"), (90, "bfloat16 W=2")])
@pytest.mark.parametrize("kernel", ["append", "decode", "join", "prefill", "silu_mul"])
def test_attention_fits_the_gpu(compiled, architecture, variant, kernel):
    result = compiled[str(architecture)][kernel][variant]
    assert result["cubin_bytes"] > 0
    assert result["shared_bytes"] <= 163 * 1024
    assert result["STACK"] == 0  # no register is spilled
    # Where a kernel may start early, it waits before it touches memory.
    touches = re.findall(r"griddepcontrol\.\w+|(?:ld|st|cp\.async\S*)\.global", result["ptx"])
    begin = {80: [], 90: ["griddepcontrol.launch_dependents", "griddepcontrol.wait"]}[architecture]
    if kernel == "append":  # what is before it may be waiting for other ranks
        begin.reverse()
    assert touches[: len(begin)] == begin
    assert not any("griddepcontrol" in touch for touch in touches[len(begin) :])
    if kernel in ("decode", "prefill"):
        assert "mma" in result["ptx"]  # tensor cores
        copies = re.findall(r"cp\.async\.c[ga]\S+ .*?, (0x\w+)", result["ptx"])
        assert copies and set(copies) == {"0x10"}  # of keys and values, 16 bytes at a time

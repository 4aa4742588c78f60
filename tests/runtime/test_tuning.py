"""Tuning tables: the user's come first, then the package's; what cannot be used says so."""

import json

import pytest

from commfuse.errors import UsageError
from commfuse.runtime import tuning
from commfuse.runtime.tuning import Table

H100, OTHER = "NVIDIA H100 80GB HBM3", "NVIDIA Z1"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("COMMFUSE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_the_package_has_a_table_of_an_h100():
    table, source = tuning.load(H100, 4)
    assert table.one_shot_bytes > 0 and "package's h100 table, measured with 4 ranks" in source
    assert tuning.load("NVIDIA H100 PCIe", 2)[0] == tuning.load(H100, 2)[0]


def test_an_unknown_gpu_has_fixed_values():
    assert tuning.load(OTHER, 2) == (
        Table(),
        "fixed values: nothing was measured on NVIDIA Z1 (commfuse tune)",
    )


def test_the_users_own_table_comes_first(cache):
    two, eight = Table(1, 2, 3, 4, 20), Table(4, 5, 6)
    path = tuning.save(H100, {2: two}, {"torch": "2.11.0"})
    assert path == cache / "tune-nvidia-h100-80gb-hbm3.json"
    tuning.save(H100, {8: eight}, {})
    assert tuning.load(H100, 2) == (two, f"{path}, measured with 2 ranks")
    # The next larger number of ranks counts, else the largest.
    assert [tuning.load(H100, ranks)[0] for ranks in (1, 3, 8, 16)] == [two, eight, eight, eight]
    assert json.loads(path.read_text())["tables"]["2"]["torch"] == "2.11.0"
    assert [file.name for file in cache.iterdir()] == [path.name]


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        '{"tables": {}}',
        '{"tables": {"2": {"one_shot_bytes": 1}}}',
        '{"tables": {"2": {"one_shot_bytes": 9, "lines_bytes": 8, "fused_from_rows": 1, '
        '"fused_to_rows": 64, "claimed_percent": 0}}}',
        '{"tables": {"2": {"one_shot_bytes": -1, "lines_bytes": 8, "fused_from_rows": 1, '
        '"fused_to_rows": 64, "claimed_percent": 0}}}',
        '{"tables": {"2": {"one_shot_bytes": 1, "lines_bytes": 8, "fused_from_rows": 1, '
        '"fused_to_rows": 64, "claimed_percent": 101}}}',
        '{"tables": {"2": {"one_shot_bytes": "1", "lines_bytes": 8, "fused_from_rows": 1, '
        '"fused_to_rows": 64, "claimed_percent": 0}}}',
    ],
)
def test_a_table_that_cannot_be_used_is_named(content, cache):
    path = tuning.user_path(OTHER)
    cache.mkdir()
    path.write_text(content)
    with pytest.raises(UsageError, match=r"tune-nvidia-z1\.json cannot be used.*commfuse tune"):
        tuning.load(OTHER, 2)
    tuning.save(OTHER, {2: Table()}, {})
    assert tuning.load(OTHER, 2)[0] == Table()


def test_a_cache_that_cannot_be_written_is_named(cache):
    cache.write_text("a file")
    with pytest.raises(UsageError, match="cannot write the tuning table"):
        tuning.save(OTHER, {2: Table()}, {})

"""Clusters: descriptions, files, and what messages cost in them."""

import pytest

from commfuse.errors import UsageError
from commfuse.planner.cluster import parse_cluster
from commfuse.planner.cluster_file import EXAMPLE
from commfuse.planner.curves import Curve

MEASURED = [  # published all-reduces, us: cluster, members, bytes, time
    ("8:h100-sxm", 8, 16 << 10, 3.7),
    ("8:h100-sxm", 4, 512 << 20, 2307),
    ("8:a100-80g-sxm", 2, 16 << 10, 5.3),
    ("8:l40s,ib-ndr,pcie4-host", 8, 1 << 20, 863),
]


@pytest.mark.parametrize(("text", "members", "nbytes", "us"), MEASURED)
def test_measured_all_reduces_come_back(text, members, nbytes, us):
    found = parse_cluster(text).all_reduce_seconds(0, members, nbytes)
    assert found * 1e6 == pytest.approx(us, rel=0.15)


def test_hosts_and_levels():
    cluster = parse_cluster("2x8:a100-80g-sxm,ib-hdr")
    assert (cluster.count, cluster.host_size) == (16, 8)
    assert cluster.level_between(0, 7).name == "host"
    assert cluster.level_between(7, 8).link.name == "ib-hdr"
    assert parse_cluster("16:a100-80g-sxm").host_size == 8


def test_a_file_has_pairs_hosts_and_a_network(tmp_path):
    path = tmp_path / "own.yaml"
    path.write_text(EXAMPLE)
    cluster = parse_cluster(str(path))
    names = [cluster.level_between(0, other).name for other in (1, 2, 8)]
    assert names == ["pair", "host", "network"]
    within, across = (cluster.all_reduce_seconds(begin, 2, 1 << 20) for begin in (0, 1))
    assert within < across  # devices 1 and 2 are not a pair


@pytest.mark.parametrize("members", [2, 3, 4, 6, 8, 12, 16])
@pytest.mark.parametrize("text", ["2x8:h100-sxm,ib-ndr", "2x8:a100-80g-pcie,10gbe", "16:l40s"])
def test_more_bandwidth_and_smaller_messages_are_never_slower(text, members):
    cluster = parse_cluster(text)
    last = 0.0
    for nbytes in (0, 1 << 10, 16 << 10, 100_000, 1 << 20, 5 << 20, 1 << 28):
        seconds = cluster.all_reduce_seconds(0, members, nbytes)
        assert seconds >= last
        assert cluster.faster(2.0).all_reduce_seconds(0, members, nbytes) <= seconds
        last = seconds


def test_groups_that_lie_alike_cost_the_same():
    cluster = parse_cluster("4x8:h100-sxm,ib-ndr")
    for nbytes in (1 << 14, 1 << 24):
        times = {cluster.all_reduce_seconds(begin, 4, nbytes) for begin in (0, 4, 8, 20)}
        assert len(times) == 1


def test_a_curve_is_linear_between_points():
    curve = Curve(((0, 1.0), (10, 2.0), (20, 4.0)))
    assert [curve.seconds(x) for x in (0, 5, 15, 30)] == [1.0, 1.5, 3.0, 6.0]
    with pytest.raises(UsageError, match="must ascend"):
        Curve(((0, 2.0), (10, 1.0)))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("8xh100", "not understood"),
        ("2xany:h100-sxm", "not understood"),
        ("0:h100-sxm", "at least one device"),
        ("8:h1000", "did you mean"),
        ("8:h20", "did you mean .*h200"),
        ("8:l40", "did you mean .*l40s"),
        ("8:h100-sxm,infinibond", "unknown link"),
        ("nothing.yaml", "No such file"),
    ],
)
def test_bad_descriptions(text, message):
    with pytest.raises(UsageError, match=message):
        parse_cluster(text)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[1, 2]", "fields were expected"),
        ("{device: h100-sxm}", "levels must be a list"),
        ("{device: h100-sxm, levels: [{name: host, size: 0, link: nvlink4}]}", "size must be"),
        ("{device: h100-sxm, levels: [{name: host, size: 2, link: {latency_us: 1}}]}", "gb_per_s"),
        ("{device: {tflops: {}}, levels: [{name: host, size: 2, link: pcie4}]}", "lacks"),
        ("{devices: h100-sxm}", "unknown devices"),
        ("{", "not readable as YAML"),
    ],
)
def test_bad_files(content, message, tmp_path):
    path = tmp_path / "own.yaml"
    path.write_text(content)
    with pytest.raises(UsageError, match=message):
        parse_cluster(str(path))

"""Clusters as YAML files: read, checked, and written by ``commfuse profile``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from commfuse.errors import UsageError
from commfuse.planner.calibration import PRIOR
from commfuse.planner.cluster import Cluster, Level
from commfuse.planner.devices import Device, load_device
from commfuse.planner.links import link_from_facts, load_link

EXAMPLE = """\
device: a100-80g-pcie          # a preset, or a mapping with the figures of one
levels:                        # from the inside out; each size is a multiple of the one before
  - {name: pair, size: 2, link: nvlink-bridge}
  - {name: host, size: 8, link: pcie4-host}
  - {name: network, size: 16, link: {latency_us: 20, gb_per_s: 11, shared: true}}
count: 16                      # devices; the default is all of the last level
"""
_DEVICE_FIELDS = (
    "title",
    "memory_gb",
    "bandwidth_gb_per_s",
    "tflops",
    "achievable",
    "dollars_per_hour",
    "host_bandwidth_gb_per_s",
)


def read_cluster(path: str) -> Cluster:
    """The cluster in a YAML file, see :data:`EXAMPLE`.

    Raises:
        UsageError: no such file, no YAML, or a field that cannot be used; the message names it.
    """
    import yaml

    try:
        content = yaml.safe_load(Path(path).read_text())
    except OSError as error:
        raise UsageError(f"--cluster {path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"--cluster {path}: not readable as YAML: {error}") from None
    if not isinstance(content, Mapping):
        raise UsageError(f"--cluster {path}: fields were expected, as in\n{EXAMPLE}")
    return cluster_from_facts(content, path)


def cluster_from_facts(content: Mapping[str, Any], path: str) -> Cluster:
    """A cluster from the content of a YAML file.

    Raises:
        UsageError: a field is missing, unknown or of the wrong kind; the message names it.
    """
    known = {"name", "device", "levels", "count", "measured", "calibration"}
    if unknown := sorted(set(map(str, content)) - known):
        raise UsageError(f"{path}: unknown {', '.join(unknown)}; as in\n{EXAMPLE}")
    levels = content.get("levels")
    if not isinstance(levels, list) or not levels:
        raise UsageError(f"{path}: levels must be a list that is not empty, as in\n{EXAMPLE}")
    parsed = tuple(_level(level, path, number) for number, level in enumerate(levels))
    count = content.get("count", parsed[-1].size)
    if not isinstance(count, int) or isinstance(count, bool) or count < 1:
        raise UsageError(f"{path}: count must be a positive integer, not {count!r}")
    return Cluster(
        name=str(content.get("name", Path(path).stem)),
        device=_device(content.get("device"), path, parsed),
        count=count,
        levels=parsed,
        calibration=tuple(_calibration(content.get("calibration"), path).items()),
    )


def _calibration(facts: Any, path: str) -> dict[str, float]:
    """Constants as :class:`~commfuse.planner.calibration.Calibration` has them, checked."""
    if facts is None:
        return {}
    if not isinstance(facts, Mapping):
        raise UsageError(f"{path}: calibration must map constants to numbers")
    constants = {str(name): value for name, value in facts.items()}
    PRIOR.with_changes(**constants)
    return constants


def _level(level: Any, path: str, number: int) -> Level:
    where = f"{path}: levels[{number}]"
    if not isinstance(level, Mapping) or not {"name", "size", "link"} <= set(level):
        raise UsageError(f"{where} needs name, size and link, as in\n{EXAMPLE}")
    size, link = level["size"], level["link"]
    if not isinstance(size, int) or isinstance(size, bool) or size < 1:
        raise UsageError(f"{where}.size must be a positive integer, not {size!r}")
    if isinstance(link, Mapping):
        return Level(str(level["name"]), size, link_from_facts(f"{where}.link", link))
    return Level(str(level["name"]), size, load_link(str(link), f"{where}.link"))


def _device(facts: Any, path: str, levels: tuple[Level, ...]) -> Device:
    if isinstance(facts, str):
        return load_device(facts, f"{path}: device")
    if not isinstance(facts, Mapping):
        raise UsageError(f"{path}: device must be a preset's name or a mapping, as in\n{EXAMPLE}")
    base, given = {}, {str(key): value for key, value in facts.items()}
    if "like" in given:
        preset = load_device(str(given.pop("like")), f"{path}: device.like")
        base = {key: getattr(preset, key) for key in _DEVICE_FIELDS}
    name = str(given.pop("name", "own device"))
    if unknown := sorted(set(given) - set(_DEVICE_FIELDS)):
        raise UsageError(f"{path}: device has unknown {', '.join(unknown)}")
    merged = {"title": name, "dollars_per_hour": 1.0, "achievable": 1.0, **base, **given}
    optional = {"host_bandwidth_gb_per_s"}
    if missing := sorted(set(_DEVICE_FIELDS) - set(merged) - optional):
        raise UsageError(f"{path}: device lacks {', '.join(missing)}")
    if not isinstance(merged["tflops"], Mapping):
        raise UsageError(f"{path}: device.tflops must map dtypes to numbers, as in {{bf16: 312}}")
    hosts = [level.size for level in levels if level.name == "host"]
    return Device(name=name, host=hosts[0] if hosts else levels[0].size, link="", **merged)


def write_cluster(path: Path, content: Mapping[str, Any]) -> None:
    """Writes a cluster that :func:`read_cluster` reads."""
    import yaml

    path.write_text(yaml.safe_dump(dict(content), sort_keys=False, default_flow_style=None))

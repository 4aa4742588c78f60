"""The GPUs that all jobs of these tests run on, one after the other."""

import pytest

from commfuse.testing import GpuLab


@pytest.fixture(scope="session")
def lab():
    with GpuLab() as made:
        yield made

"""Groups of processes wait for each other as long as run.timeout_minutes says."""

from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from dinokit.runtime import distributed


@pytest.fixture
def connected():
    """One process that is connected as several are, and waits five hours for the others."""
    distributed.connect("gloo", dist.HashStore(), 0, 1, timedelta(hours=5))
    yield
    dist.destroy_process_group()
    distributed._timeout = None


def waits(group):
    return group._get_backend(torch.device("cpu")).options._timeout


def test_groups_that_are_made_later_wait_as_long_as_the_first(connected):
    made = [distributed.new_cpu_group()]
    with distributed.part([[0]]):
        made += [distributed.group(), distributed.new_cpu_group()]
    assert len(made) == 3
    for group in made:
        assert abs(waits(group) - timedelta(hours=5)) < timedelta(seconds=1)  # kept in milliseconds

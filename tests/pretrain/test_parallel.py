"""The process groups of one rank can be opened again and again, and leave nothing behind."""

from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from torch.distributed import ProcessGroupGloo

from pretrain.parallel import launched_rank, launched_world_size, parallel_context


def test_groups_open_twice_in_one_process() -> None:
    """Each time the same place among the ranks, with no group left open between."""
    places = []
    for _ in range(2):
        assert not dist.is_initialized()
        with parallel_context(tensor_parallel_size=1, seed=0) as context:
            places.append((context.rank, context.world_size, context.data_parallel_size, context.device.type))
            assert dist.is_initialized() and context.is_first_rank
    assert places[0] == places[1]
    assert places[0][:3] == (0, 1, 1)
    assert not dist.is_initialized()


def test_groups_are_closed_when_the_run_fails() -> None:
    """So that the error seen is the run's own, and the next run can start."""
    with pytest.raises(RuntimeError, match="of the run"), parallel_context(tensor_parallel_size=1, seed=0):
        raise RuntimeError("of the run")
    test_groups_open_twice_in_one_process()


def test_a_process_group_of_the_callers_is_left_standing() -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        with parallel_context(tensor_parallel_size=1, seed=0):
            pass
        assert dist.is_initialized()
    finally:
        dist.destroy_process_group()


def devices(backend: object) -> list[object]:
    """Each has a thread that waits on the sockets of the groups that share it."""
    return backend.options._devices  # type: ignore[attr-defined]


def test_all_groups_share_one_device() -> None:
    """Also once groups were closed and opened again; the twin: a group as torch makes it has a device of its own."""
    for _ in range(2):
        with parallel_context(tensor_parallel_size=1, seed=0) as context:
            assert dist.group.WORLD is not None
            groups = (dist.group.WORLD, context.groups.tp, context.groups.pp, dist.new_group([0]))
            (first,), *others = (devices(group._get_backend(torch.device("cpu"))) for group in groups)
            assert all(other == [first] for other in others)
            assert devices(ProcessGroupGloo(dist.HashStore(), 0, 1, timedelta(seconds=9))) != [first]


def test_a_groups_time_limit_stays_its_own() -> None:
    with parallel_context(tensor_parallel_size=1, seed=0):
        limits = (timedelta(seconds=7), timedelta(seconds=70))
        groups = [dist.new_group([0], timeout=limit) for limit in limits]
        backends = [group._get_backend(torch.device("cpu")) for group in groups]
        assert [backend.options._timeout for backend in backends] == list(limits)


def test_the_seed_sets_torchs_generator() -> None:
    numbers = []
    for seed in (1, 1, 2):
        with parallel_context(tensor_parallel_size=1, seed=seed):
            numbers.append(torch.randn(3))
    assert torch.equal(numbers[0], numbers[1])
    assert not torch.equal(numbers[0], numbers[2])


def test_the_mean_over_ranks_is_a_new_tensor_without_gradient() -> None:
    values = torch.ones(3, requires_grad=True)
    with parallel_context(tensor_parallel_size=1, seed=0) as context:
        mean = context.data_parallel_mean(values)
        mean += 1
    assert torch.equal(values, torch.ones(3))
    assert not mean.requires_grad


def test_what_torchrun_says_is_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert (launched_rank(), launched_world_size()) == (0, 1)
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert (launched_rank(), launched_world_size()) == (3, 8)

"""Random numbers of a part of the model, the same wherever it is built; and the files that a rank may have open."""

import resource
from importlib.util import find_spec, module_from_spec
from typing import Any

import pytest
import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker, get_data_parallel_rng_tracker_name

from looplm.config import ParallelConfig
from looplm.files import raise_file_limit
from looplm.megatron.process_groups import files_needed, seeded, start


def drawn(part: str) -> tuple[float, ...]:
    """Return a number of the CPU's generator, and of both that modules on a GPU draw from: a rank's own, and all's."""
    with seeded(part):
        numbers = [float(torch.rand(()))]
        for name in (None, get_data_parallel_rng_tracker_name()):  # the latter for weights that each rank holds whole
            with get_cuda_rng_tracker().fork(*filter(None, [name])):
                numbers.append(float(torch.rand(())))
    return tuple(numbers)


def test_a_part_of_the_model_has_random_numbers_of_its_own(single_process: ProcessGroupCollection) -> None:
    torch.manual_seed(7)
    first, again, other = drawn("layer 1"), drawn("layer 1"), drawn("layer 2")
    assert first == again
    assert len({*first, *other}) == 6


def test_what_is_drawn_afterwards_does_not_depend_on_the_parts(single_process: ProcessGroupCollection) -> None:
    torch.manual_seed(7)
    with get_cuda_rng_tracker().fork():
        expected = float(torch.rand(()))
    torch.manual_seed(7)
    states = get_cuda_rng_tracker().get_states()
    drawn("layer 1")
    after = get_cuda_rng_tracker().get_states()
    assert all(torch.equal(after[name], state) for name, state in states.items())
    assert expected != drawn("layer 1")[1]


@pytest.mark.parametrize("refuses", [False, True])
def test_the_ranks_may_open_as_many_files_as_the_system_allows(monkeypatch, refuses):
    limits = [1024, 4096]

    def change(_: int, wanted: tuple[int, int]) -> None:
        if refuses:
            raise ValueError("not allowed to raise maximum limit")
        limits[:] = wanted

    monkeypatch.setattr(resource, "getrlimit", lambda _: tuple(limits))
    monkeypatch.setattr(resource, "setrlimit", change)
    assert raise_file_limit() == (1024 if refuses else 4096)


def test_every_start_raises_the_limit(single_process):
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard - 1, hard))
    start(1234)
    assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] == hard


@pytest.mark.parametrize(
    ("ranks", "tensor", "pipeline", "context"),
    [(512, 1, 1, 1), (128, 1, 1, 1), (512, 8, 1, 1), (512, 1, 4, 1), (512, 1, 1, 8), (512, 2, 2, 2)],
)
def test_a_rank_needs_at_most_the_files_of_its_groups(monkeypatch, ranks, tensor, pipeline, context):
    """Each of the groups that Megatron makes opens its size and three."""
    sizes = [ranks]

    def new_group(**keys: Any) -> str:
        sizes.extend([len(keys["ranks"])] * (0 in keys["ranks"]))
        return "a group"

    for name, value in {"is_initialized": True, "get_world_size": ranks, "get_rank": 0}.items():
        monkeypatch.setattr(dist, name, lambda *_, value=value: value)
    monkeypatch.setattr(dist, "new_group", new_group)
    spec = find_spec("megatron.core.parallel_state")
    assert spec is not None and spec.loader is not None
    fresh = module_from_spec(spec)  # other tests use the groups of the imported one
    spec.loader.exec_module(fresh)
    fresh.initialize_model_parallel(tensor, pipeline, context_parallel_size=context)
    needed = files_needed(ranks, ParallelConfig(tensor=tensor, pipeline=pipeline, context=context))
    assert 0.7 * needed < sum(size + 3 for size in sizes) < needed

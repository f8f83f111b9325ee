"""Random numbers of a part of the model: the same wherever it is built, and unlike those of any other part."""

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker, get_data_parallel_rng_tracker_name

from looplm.megatron.process_groups import seeded


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

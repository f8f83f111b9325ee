"""Samples and micro-batches of each optimizer step."""

from looplm.bounds import require
from looplm.config import DataConfig, RunConfig


class BatchSchedule:
    """Samples of each step: constant, or growing with the consumed samples (data.rampup).

    It equals Megatron-core 0.16's calculator, which 0.18 replaced by one with other steps.
    """

    def __init__(self, data: DataConfig, data_parallel_size: int, pipeline: int = 1) -> None:
        unit = data.micro_batch_size * data_parallel_size * pipeline
        parts = f"data.micro_batch_size={data.micro_batch_size} x {data_parallel_size} data-parallel ranks"
        if pipeline > 1:  # Megatron's interleaved schedule processes micro-batches in groups of that many
            parts += f" x parallel.pipeline={pipeline}"
        sizes = {"data.global_batch_size": data.global_batch_size}
        if data.rampup is not None:
            sizes |= {"data.rampup.start": data.rampup.start, "data.rampup.increment": data.rampup.increment}
        for key, value in sizes.items():
            require(value % unit == 0, key, value, f"give a multiple of {parts} = {unit}")
        self._data, self._samples_per_microbatch = data, data.micro_batch_size * data_parallel_size
        self._pipeline = pipeline

    def validation(self, samples: int, held: int | None = None) -> int:
        """Return micro-batches per rank that read at least ``samples`` samples and fill the pipeline evenly.

        With ``held``, they read at most so many samples, unless that would be none.
        """
        unit = self._samples_per_microbatch * self._pipeline
        most = samples if held is None else max(1, held // unit)
        return min(-(-samples // unit), most) * self._pipeline

    def at(self, consumed_samples: int) -> tuple[int, int]:
        """Return micro-batches per rank and samples over all ranks for the step that starts at ``consumed_samples``."""
        size, ramp = self._data.global_batch_size, self._data.rampup
        if ramp is not None and consumed_samples < ramp.samples:
            rises = (size - ramp.start) // ramp.increment
            size = ramp.start + (consumed_samples * rises // ramp.samples) * ramp.increment
        return size // self._samples_per_microbatch, size

    def samples_of(self, steps: int, consumed: int = 0) -> int:
        """Return the samples that are consumed ``steps`` steps after ``consumed`` were."""
        ramp = self._data.rampup
        while ramp is not None and consumed < ramp.samples and steps > 0:
            consumed, steps = consumed + self.at(consumed)[1], steps - 1
        return consumed + max(steps, 0) * self._data.global_batch_size


def schedule_on(config: RunConfig, ranks: int) -> BatchSchedule:
    """Return the run's batch schedule on that many ranks.

    Raises:
        UserError: the ranks are no multiple of the layout's, or the batch does not divide by the replicas.
    """
    return BatchSchedule(config.data, config.parallel.replicas(ranks), config.parallel.pipeline)

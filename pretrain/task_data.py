"""Synthetic tasks as training data: the n-th sample depends on the task, the seed, the split and n alone.

Shapes: B samples of a micro-batch, S sequence.
"""

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from data_pipeline.synthetic.task import NO_LEVEL, SPLITS, Examples, Split, Task

_BLOCK = 1024  # samples that are made together


class TaskDataset(Dataset[dict[str, Tensor]]):
    """Samples of a task; like Megatron's, but their labels are the task's, and a sample is one document.

    Args:
        task: the generator.
        length: tokens of a sample.
        split: train, valid or test; they share no item.
        seed: of the samples.
        samples: how many there are.
    """

    def __init__(self, task: Task, length: int, split: Split, seed: int, samples: int) -> None:
        self._task, self._length, self._split, self._seed, self._samples = task, length, split, seed, samples
        self._block = lru_cache(maxsize=2)(self._make_block)

    def __len__(self) -> int:
        return self._samples

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {name: x_BS[0] for name, x_BS in self.__getitems__([index]).items()}

    def __getitems__(self, indices: list[int]) -> dict[str, Tensor]:
        """Return a batch: tokens, labels, loss_mask and level of each sample, all [B, S]."""
        rows = [tuple(x_NS[index % _BLOCK] for x_NS in self._block(index // _BLOCK)) for index in indices]
        ids_BS, label_BS, level_BS = (torch.from_numpy(np.stack(column)) for column in zip(*rows, strict=True))
        mask_BS = (level_BS != NO_LEVEL).float()
        return {"tokens": ids_BS, "labels": label_BS, "loss_mask": mask_BS, "level": level_BS}

    def _make_block(self, block: int) -> Examples:
        random = np.random.Generator(np.random.Philox([self._seed, SPLITS.index(self._split), block]))
        made = self._task.generate(random, _BLOCK, self._length, self._split)
        return Examples(*(np.ascontiguousarray(x_NS, dtype=np.int64) for x_NS in made))

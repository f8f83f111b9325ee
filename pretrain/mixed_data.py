"""Megatron's GPTDataset, extended to read conversations, which are packed whole into samples.

Megatron concatenates plain text and cuts it into samples. A conversation that is cut loses its question, so
conversations are packed by best fit instead, and the rest of a sample is padded. Only answers have a loss. Both kinds
blend in one run.

Shapes: N documents, S sequence (model inputs; a sample holds S + 1 tokens).
"""

import os
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import numpy as np
import torch
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from torch import Tensor

from data_pipeline.token_file import unmark
from looplm.failures import UserError


@dataclass
class MixConfig(GPTDatasetConfig):
    """Megatron's dataset config, with the prefixes that hold conversations, and the id that pads their samples."""

    conversations: tuple[str, ...] = ()
    pad_id: int = 0


class MixedDataset(GPTDataset):
    """The samples of one prefix."""

    config: MixConfig

    @property
    def _packs(self) -> bool:
        return self.dataset_path in self.config.conversations

    def _build_document_sample_shuffle_indices(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """For conversations, return the order of documents, each sample's start in it, and an unused shuffle index."""
        if not self._packs:
            return super()._build_document_sample_shuffle_indices()
        path = Path(self.config.path_to_cache) / f"{self.unique_description_hash}-packing.npz"
        if not path.is_file():  # rank 0 builds before the others look
            path.parent.mkdir(parents=True, exist_ok=True)
            partial = path.with_suffix(f".{os.getpid()}.npz")
            lengths_N = self.dataset.sequence_lengths
            order, starts = pack(lengths_N, self.config.sequence_length + 1, self.num_samples, self.config.random_seed)
            np.savez(partial, order=order, starts=starts)
            os.replace(partial, path)
        with np.load(path) as packing:
            return packing["order"], packing["starts"], np.arange(0)

    def __getitem__(self, idx: int) -> dict[str, Tensor]:
        """Return a sample, whose tensors do not refer to the token file.

        Raises:
            UserError: an id is not in the vocabulary. A tensor-parallel embedding would map it to zeros.
        """
        sample = self._packed(idx) if self._packs else super().__getitem__(idx)
        size = self.config.tokenizer.vocab_size
        for ids in (sample["tokens"], sample["labels"][-1:]):
            low, high = int(ids.min()), int(ids.max())
            if low < 0 or high >= size:
                fault = f"holds token id {low if low < 0 else high}, the vocabulary has {size}"
                fix = "run data_pipeline.verify --deep and build the data again"
                raise UserError(f"{self.dataset_path}.bin: {fault} (sample {idx}); {fix}")
        return sample

    def _packed(self, idx: int) -> dict[str, Tensor]:
        start, end = self.sample_index[idx : idx + 2]
        documents = [self.dataset.get(int(document)) for document in self.document_index[start:end]]
        padding = self.config.sequence_length + 1 - sum(map(len, documents))
        tokens, has_loss = unmark(np.concatenate([*documents, np.zeros(padding, np.int32)]).astype(np.int64))
        tokens[len(tokens) - padding :], has_loss[len(tokens) - padding :] = self.config.pad_id, False
        position = np.concatenate([np.arange(length) for length in (*map(len, documents), padding)])
        return {
            "tokens": torch.from_numpy(tokens[:-1]),
            "labels": torch.from_numpy(tokens[1:]),
            "loss_mask": torch.from_numpy(has_loss[1:]).float(),
            "position_ids": torch.from_numpy(position[:-1]),
        }


def pack(lengths_N: np.ndarray, size: int, samples: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Pack whole documents into at least ``samples`` samples of ``size`` tokens, in as many epochs as that takes.

    Every epoch holds each document that fits once, in an order of its own.

    Returns:
        the documents in reading order, and the index in it at which each sample begins, followed by the end.

    Raises:
        ValueError: no document fits.
    """
    fitting = np.flatnonzero(lengths_N <= size)
    if not len(fitting):
        raise ValueError(f"none of {len(lengths_N)} documents has {size} tokens or fewer")
    orders, counts = list[np.ndarray](), list[np.ndarray]()
    for epoch in count():
        random = np.random.default_rng((seed, epoch))
        documents = random.permutation(fitting)
        sample = best_fit(lengths_N[documents], size)
        sample = random.permutation(sample.max() + 1)[sample]  # shuffle the samples too
        orders.append(documents[np.argsort(sample, kind="stable")])
        counts.append(np.bincount(sample))
        if sum(map(len, counts)) >= samples:
            break
    return np.concatenate(orders), np.concatenate([[0], np.cumsum(np.concatenate(counts))])


def best_fit(lengths_N: np.ndarray, size: int) -> np.ndarray:
    """Return the bin of each item: longest items first, each in the fullest bin that still has room for it.

    Bins are listed by their free room. Bit r of ``rooms`` is set if some bin has room r, so the fullest bin that fits
    is found by one shift, however many bins there are.
    """
    bins: list[list[int]] = [[] for _ in range(size + 1)]
    bin_N, rooms, used = np.empty(len(lengths_N), np.int64), 0, 0
    for item in np.argsort(-lengths_N.astype(np.int64), kind="stable"):
        length = int(lengths_N[item])
        fitting = rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            chosen = bins[room].pop()
            rooms ^= 0 if bins[room] else 1 << room
        else:
            room, chosen, used = size, used, used + 1
        bin_N[item] = chosen
        bins[room - length].append(chosen)
        rooms |= 1 << (room - length)
    return bin_N

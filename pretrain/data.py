"""Training data: checked prefixes in, micro-batches out, in an order that depends on consumed samples alone.

Shapes: B micro-batch, S sequence (model inputs; a sample holds S + 1 tokens).
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from data_pipeline.manifest import Manifest
from data_pipeline.token_file import read_index
from data_pipeline.verify import check_prefix
from looplm.cli import UserError, require
from looplm.config import DataConfig, DataSource, RunConfig
from looplm.megatron import context_parallel
from looplm.megatron.device import DEVICE
from pretrain.mixed_data import MixConfig, MixedDataset

READ_WHOLE_BYTES = 1 << 28


class Batch(NamedTuple):
    """A micro-batch on its device."""

    ids_BS: Tensor
    labels_SB: Tensor
    mask_SB: Tensor  # 1.0 where the label counts
    document_start_SB: Tensor | None  # None: a sample is one document

    def deal(self, group: context_parallel.Group) -> "Batch":
        """The positions that this context-parallel rank holds; a document's start still counts from the sample's."""
        start_SB = self.document_start_SB
        return Batch(
            context_parallel.deal(self.ids_BS, group, dim=1),
            context_parallel.deal(self.labels_SB, group),
            context_parallel.deal(self.mask_SB, group),
            None if start_SB is None else context_parallel.deal(start_SB, group),
        )


@dataclass(frozen=True)
class Corpus:
    """What the checked sources have in common.

    ``conversations`` are the prefixes that hold some; a run that trains on any ends what it writes as an answer ends.
    ``left_out`` are lines on conversations that no sample has room for.
    """

    tokenizer: Path
    tokenizer_sha256: str
    vocab_size: int
    bos_id: int | None
    eos_id: int
    pad_id: int
    fingerprint: str
    conversations: tuple[str, ...] = ()
    end_id: int | None = None
    left_out: tuple[str, ...] = ()

    @property
    def stop_id(self) -> int:
        """The token at which generation ends."""
        return self.eos_id if self.end_id is None else self.end_id


def check_corpus(data: DataConfig, vocab_size: int) -> Corpus:
    """Check the manifests of all sources, before any long work starts, against each other and the model's vocabulary.

    Raises:
        UserError: files missing, truncated or not fitting each other, the sequence length or the model's vocabulary.
    """
    prefixes = [source.prefix for source in (*data.train, *data.valid)]
    checked = [(prefix, check_prefix(prefix, deep=_is_small(prefix))) for prefix in prefixes]
    first_prefix, first = checked[0]
    left_out = list[str]()
    for prefix, manifest in checked:
        if manifest.tokenizer.sha256 != first.tokenizer.sha256:
            raise UserError(
                f"{prefix}: made with another tokenizer than {first_prefix}; tokenise both with the same one"
            )
        if manifest.chat is None:
            _require_enough_tokens(prefix, manifest, data.seq_length)
        else:
            left_out += _too_long(prefix, data.seq_length)
    require(
        first.vocab_size <= vocab_size,
        "model.vocab_size",
        vocab_size,
        f"the tokenizer of {first_prefix} has {first.vocab_size} tokens; give at least as many",
    )
    fingerprint = hashlib.sha256("".join(manifest.fingerprint for _, manifest in checked).encode()).hexdigest()
    folder = Path(first_prefix).parent
    trained = [manifest.chat for _, manifest in checked[: len(data.train)] if manifest.chat is not None]
    return Corpus(
        tokenizer=folder / first.tokenizer.path,
        tokenizer_sha256=first.tokenizer.sha256,
        vocab_size=first.vocab_size,
        bos_id=first.tokenizer.bos_id,
        eos_id=first.tokenizer.eos_id,
        pad_id=first.tokenizer.pad_id,
        fingerprint=fingerprint,
        conversations=tuple(prefix for prefix, manifest in checked if manifest.chat is not None),
        end_id=trained[0].end_id if trained else None,
        left_out=tuple(left_out),
    )


def _is_small(prefix: str) -> bool:
    """Small enough to read whole before every run: ids and hashes too. data_pipeline.verify --deep does it for the rest."""
    path = Path(f"{prefix}.bin")
    return path.is_file() and path.stat().st_size <= READ_WHOLE_BYTES


def data_order(config: RunConfig, corpus: Corpus) -> str:
    """Fingerprint of everything that decides which tokens the n-th training sample holds."""
    weights = [source.weight for source in config.data.train]
    parts = (corpus.fingerprint, weights, config.data.seq_length, config.seed)
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _require_enough_tokens(prefix: str, manifest: Manifest, seq_length: int) -> None:
    if manifest.tokens <= seq_length:
        raise UserError(
            f"{prefix}: holds {manifest.tokens} tokens, fewer than a sample of data.seq_length={seq_length} needs; "
            "shorten data.seq_length or add data"
        )


def _too_long(prefix: str, seq_length: int) -> list[str]:
    """A line on the conversations that no sample of this length holds, if there are any; some must fit."""
    lengths_N = read_index(Path(f"{prefix}.idx")).lengths()
    longer = int((lengths_N > seq_length + 1).sum())
    if longer == len(lengths_N):
        raise UserError(
            f"{prefix}: its shortest conversation has {lengths_N.min()} tokens, more than a sample of "
            f"data.seq_length={seq_length} holds; lengthen data.seq_length"
        )
    note = f"{prefix}: {longer:,} of {len(lengths_N):,} conversations are longer than data.seq_length={seq_length}"
    return [f"{note} and left out; the longest has {lengths_N.max():,} tokens"] if longer else []


class BatchSchedule:
    """How many samples a step takes: constant, or growing with the samples consumed (data.rampup).

    Megatron-core had this as a calculator until 0.17; from 0.18 on it has another, of other steps.
    """

    def __init__(self, data: DataConfig, data_parallel_size: int, pipeline: int = 1) -> None:
        unit = data.micro_batch_size * data_parallel_size * pipeline
        parts = f"data.micro_batch_size={data.micro_batch_size} x {data_parallel_size} data-parallel ranks"
        if pipeline > 1:  # Megatron's interleaved schedule deals micro-batches in groups of that many
            parts += f" x parallel.pipeline={pipeline}"
        sizes = {"data.global_batch_size": data.global_batch_size}
        if data.rampup is not None:
            sizes |= {"data.rampup.start": data.rampup.start, "data.rampup.increment": data.rampup.increment}
        for key, value in sizes.items():
            require(value % unit == 0, key, value, f"give a multiple of {parts} = {unit}")
        self._data, self._samples_per_microbatch = data, data.micro_batch_size * data_parallel_size

    def at(self, consumed_samples: int) -> tuple[int, int]:
        """Micro-batches per rank and samples over all ranks of the step that starts at ``consumed_samples``."""
        size, ramp = self._data.global_batch_size, self._data.rampup
        if ramp is not None and consumed_samples < ramp.samples:
            rises = (size - ramp.start) // ramp.increment
            size = ramp.start + (consumed_samples * rises // ramp.samples) * ramp.increment
        return size // self._samples_per_microbatch, size

    def samples_of(self, steps: int) -> int:
        """Samples that ``steps`` steps from the start consume."""
        consumed = 0
        for _ in range(steps):
            consumed += self.at(consumed)[1]
        return consumed


def schedule_on(config: RunConfig, ranks: int) -> BatchSchedule:
    """The batch on that many ranks.

    Raises:
        UserError: the layout, or the batch of one step, does not divide into them.
    """
    return BatchSchedule(config.data, config.parallel.replicas(ranks), config.parallel.pipeline)


class _Tokenizer:
    """The four things that Megatron's GPTDataset asks of a tokenizer."""

    def __init__(self, corpus: Corpus) -> None:
        self.eod, self.pad, self.vocab_size = corpus.eos_id, corpus.pad_id, corpus.vocab_size
        self.unique_identifiers = {"sha256": corpus.tokenizer_sha256}
        self.special_tokens_dict = {"eos_token": corpus.eos_id, "pad_token": corpus.pad_id}


def build_train_set(config: RunConfig, corpus: Corpus, train_samples: int, horizon: int) -> Dataset[Any]:
    """The training mix, in passes of ``horizon`` samples.

    Megatron shuffles all epochs that ``num_samples`` needs together, so a longer run would see another order from the
    start. The pass length is therefore fixed when a run starts: an extended run appends a pass and leaves the earlier
    ones as they were.
    """
    passes = -(-train_samples // horizon)
    data, cache = config.data, index_cache(config)
    built = [_build(data, data.train, corpus, horizon, config.seed + index, cache) for index in range(passes)]
    return _Passes(built, horizon)


def build_valid_set(data: DataConfig, corpus: Corpus, samples: int, seed: int, cache: Path) -> Dataset[Any] | None:
    """Return ``samples`` samples of ``data.valid``, always the same for one seed; None without data.valid.

    ``cache`` is the folder of Megatron's sample indices; see :func:`index_cache`.
    """
    return _build(data, data.valid, corpus, samples, seed, cache) if data.valid else None


def index_cache(config: RunConfig) -> Path:
    """Return the folder where a run keeps Megatron's sample indices."""
    return Path(config.data.cache_dir or Path(config.output_dir) / "index_cache")


def _build(
    data: DataConfig, sources: tuple[DataSource, ...], corpus: Corpus, samples: int, seed: int, cache: Path
) -> GPTDataset:
    """Return Megatron's blended dataset. Its indices are cached under the data's fingerprint: a cache outlives its data."""
    dataset_config = MixConfig(
        conversations=corpus.conversations,
        random_seed=seed,
        sequence_length=data.seq_length,
        blend_per_split=[([source.prefix for source in sources], [source.weight for source in sources]), None, None],
        path_to_cache=str(cache / corpus.fingerprint[:16]),
        tokenizer=_Tokenizer(corpus),
        reset_position_ids=data.document_masking,
        reset_attention_mask=False,
        eod_mask_loss=data.document_masking,
        create_attention_mask=False,
    )
    return BlendedMegatronDatasetBuilder(MixedDataset, [samples, 0, 0], lambda: True, dataset_config).build()[0]


class _Passes(Dataset[Any]):
    """Sample i is sample ``i % horizon`` of pass ``i // horizon``."""

    def __init__(self, passes: list[GPTDataset], horizon: int) -> None:
        self.passes, self.horizon = passes, horizon

    def __len__(self) -> int:
        return len(self.passes) * self.horizon

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return self.passes[index // self.horizon][index % self.horizon]


class _MicroBatches(Sampler[list[int]]):
    """Consecutive micro-batches dealt to the data-parallel ranks in turn, from ``consumed_samples`` on."""

    def __init__(self, total: int, consumed_samples: int, micro_batch: int, rank: int, ranks: int) -> None:
        self.total, self.consumed, self.micro, self.rank, self.ranks = total, consumed_samples, micro_batch, rank, ranks

    def __iter__(self) -> Iterator[list[int]]:
        for start in range(self.consumed + self.rank * self.micro, self.total, self.micro * self.ranks):
            if start + self.micro <= self.total:
                yield list(range(start, start + self.micro))


def micro_batches(
    dataset: Dataset[Any], data: DataConfig, consumed_samples: int, rank: int, ranks: int
) -> Iterator[Batch]:
    """This data-parallel rank's micro-batches, on its device."""
    sampler = _MicroBatches(len(dataset), consumed_samples, data.micro_batch_size, rank, ranks)  # type: ignore[arg-type]
    loader = DataLoader(dataset, batch_sampler=sampler, num_workers=data.num_workers)
    return (_to_batch(sample, data.document_masking) for sample in loader)


def _to_batch(sample: dict[str, Tensor], document_masking: bool) -> Batch:
    ids_BS = sample["tokens"].to(DEVICE)
    document_start_SB = None
    if document_masking:  # position ids restart with each document
        position_BS = torch.arange(ids_BS.size(1)).expand_as(sample["position_ids"])
        document_start_SB = (position_BS - sample["position_ids"]).t().contiguous().to(DEVICE)
    return Batch(
        ids_BS,
        sample["labels"].t().contiguous().to(DEVICE),
        sample["loss_mask"].t().contiguous().to(DEVICE),
        document_start_SB,
    )

"""Training data: checked data sets in, micro-batches out, in an order that depends only on the consumed samples.

Shapes: B micro-batch, S sequence (model inputs; a sample holds S + 1 tokens).
"""

import atexit
import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset
from torch import Tensor
from torch.utils.data import BatchSampler, ConcatDataset, DataLoader, Dataset, Subset

from data_pipeline.manifest import Manifest, TokenizerRecord
from data_pipeline.synthetic.registry import fingerprint_of, open_task, tokenizer_of
from data_pipeline.synthetic.task import SPLITS, Split
from data_pipeline.token_file import read_index
from data_pipeline.verify import check_prefix
from looplm import chat
from looplm.bounds import require
from looplm.config import DataConfig, DataSource, RunConfig, TaskConfig
from looplm.failures import UserError
from looplm.megatron import context_parallel
from looplm.megatron.device import DEVICE, HAS_CUDA
from pretrain.index_cache import checked_cache
from pretrain.mix import samples_of_one_pass
from pretrain.mixed_data import MixConfig, MixedDataset, pack
from pretrain.stopping import end_workers, ignore_signals
from pretrain.task_data import TaskDataset

_NO_ID = -1
_VALID_SEED = 1234  # of the order of validation text, whatever RunConfig.seed is; its default
atexit.register(end_workers)  # of a loader that is still in use then
FULL_CHECK_BYTES = 1 << 28  # a larger .bin file is read whole only by data_pipeline.verify --deep


class Batch(NamedTuple):
    """A micro-batch. The documents' starts stay on the host, which makes spans of them."""

    ids_BS: Tensor
    labels_SB: Tensor
    mask_SB: Tensor  # 1.0 for labels with a loss, 0.0 for the others
    document_start_SB: Tensor | None  # position at which each token's document starts; None: a sample is one document
    level_SB: Tensor | None = None  # how hard a synthetic task's label is; -1 without a label

    def to_device(self) -> "Batch":
        """Return the batch on this rank's device; from pinned memory, the host does not wait for the copy."""
        ids_BS, labels_SB, mask_SB = (x.to(DEVICE, non_blocking=True) for x in self[:3])
        level_SB = None if self.level_SB is None else self.level_SB.to(DEVICE, non_blocking=True)
        return Batch(ids_BS, labels_SB, mask_SB, self.document_start_SB, level_SB)

    def shard(self, group: context_parallel.Group) -> "Batch":
        """Return this context-parallel rank's positions; document starts still count from the start of the sample."""
        return Batch(
            context_parallel.shard(self.ids_BS, group, dim=1),
            context_parallel.shard(self.labels_SB, group),
            context_parallel.shard(self.mask_SB, group),
            *(None if x_SB is None else context_parallel.shard(x_SB, group) for x_SB in self[3:]),
        )


@dataclass(frozen=True)
class Corpus:
    """Checked data sources, with the tokenizer that they share; or a synthetic task with its own."""

    tokenizer_json: bytes
    tokenizer: TokenizerRecord
    vocab_size: int
    fingerprint: str  # hash of all sources
    conversations: tuple[str, ...] = ()  # prefixes that hold conversations
    end_id: int | None = None  # the chat end token, if any training source is conversational
    chat_template: str | None = None  # then also the template, in Jinja
    train_fingerprint: str = ""  # hash of the training sources; empty for a task
    train_tokens: tuple[int, ...] = ()  # in each training source; empty for a task
    left_out: tuple[str, ...] = ()  # messages about conversations that are too long for a sample

    @property
    def stop_id(self) -> int:
        """The token at which generation stops: the chat end token if there is one."""
        return self.tokenizer.eos_id if self.end_id is None else self.end_id


def check_corpus(data: DataConfig, vocab_size: int) -> Corpus:
    """Check the manifests of all sources, before any long work starts, against each other and the model's vocabulary.

    Raises:
        UserError: a file is missing or truncated, or does not fit the others, the sequence length or the vocabulary.
    """
    if data.task is not None:
        return _check_task(data, data.task, vocab_size)
    prefixes = [source.prefix for source in (*data.train, *data.valid)]
    checked = [(prefix, check_prefix(prefix, deep=_size(prefix) <= FULL_CHECK_BYTES)) for prefix in prefixes]
    first_prefix, first = checked[0]
    left_out = list[str]()
    for prefix, manifest in checked:
        if manifest.tokenizer.sha256 != first.tokenizer.sha256:
            raise UserError(
                f"{prefix}: made with another tokenizer than {first_prefix}; tokenize both with the same one"
            )
        if manifest.chat is not None:
            left_out += _find_too_long(prefix, data.seq_length)
        elif manifest.tokens <= data.seq_length:
            raise UserError(
                f"{prefix}: holds {manifest.tokens} tokens, fewer than a sample of data.seq_length={data.seq_length} "
                "needs; shorten data.seq_length or add data"
            )
    fix = f"the tokenizer of {first_prefix} has {first.vocab_size} tokens; give at least as many"
    require(first.vocab_size <= vocab_size, "model.vocab_size", vocab_size, fix)
    end_id, template = _conversations(checked[: len(data.train)], checked[len(data.train) :])
    return Corpus(
        tokenizer_json=(Path(first_prefix).parent / first.tokenizer.path).read_bytes(),
        tokenizer=first.tokenizer,
        vocab_size=first.vocab_size,
        fingerprint=_fingerprint(checked),
        train_fingerprint=_fingerprint(checked[: len(data.train)]),
        train_tokens=tuple(manifest.tokens for _, manifest in checked[: len(data.train)]),
        conversations=tuple(prefix for prefix, manifest in checked if manifest.chat is not None),
        end_id=end_id,
        chat_template=template,
        left_out=tuple(left_out),
    )


def _conversations(
    trained: list[tuple[str, Manifest]], validated: list[tuple[str, Manifest]]
) -> tuple[int | None, str | None]:
    """Return the chat end token and the template of the training sources that hold conversations; None without one."""
    talks = [(prefix, manifest.chat) for prefix, manifest in (*trained, *validated) if manifest.chat is not None]
    for prefix, talk in talks:
        first_prefix, first = talks[0]
        if (talk.template, talk.template_sha256) != (first.template, first.template_sha256):
            fix = "pack the conversations of both in one template"
            raise UserError(f"{prefix}: packed in another chat template than {first_prefix}; {fix}")
    if not any(manifest.chat is not None for _, manifest in trained):
        return None, None
    if first.template_sha256 is None:
        return first.end_id, chat.JINJA
    return first.end_id, (Path(first_prefix).parent / first.template).read_text(encoding="utf-8")


def _check_task(data: DataConfig, config: TaskConfig, vocab_size: int) -> Corpus:
    task = open_task(config)
    symbols, json_text = len(task.symbols), tokenizer_of(task).encode()
    fix = f"data.task.{config.name} has {symbols} symbols; give at least as many"
    require(symbols <= vocab_size, "model.vocab_size", vocab_size, fix)
    for split in SPLITS:  # refuses a length that is too short, and a task with too few items
        task.generate(np.random.default_rng(0), 1, data.seq_length, split)
    digest = hashlib.sha256(json_text).hexdigest()
    record = TokenizerRecord(path="tokenizer.json", sha256=digest, bos_id=None, eos_id=0, pad_id=0)
    return Corpus(json_text, record, symbols, fingerprint_of(config))


def _size(prefix: str) -> int:
    path = Path(f"{prefix}.bin")
    return path.stat().st_size if path.is_file() else 0


def _fingerprint(checked: list[tuple[str, Manifest]]) -> str:
    return hashlib.sha256("".join(manifest.fingerprint for _, manifest in checked).encode()).hexdigest()


def data_order(config: RunConfig, corpus: Corpus) -> str:
    """Return a fingerprint of everything that decides which tokens the n-th training sample holds."""
    return _order_of(config, corpus.train_fingerprint or corpus.fingerprint)


def matches_data_order(found: str, config: RunConfig, corpus: Corpus) -> bool:
    """Return True if a checkpoint's fingerprint is that of this data; earlier ones count the validation sources too."""
    return found in (data_order(config, corpus), _order_of(config, corpus.fingerprint))


def _order_of(config: RunConfig, fingerprint: str) -> str:
    weights = [source.weight for source in config.data.train]
    parts = (fingerprint, weights, config.data.seq_length, config.seed)
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _find_too_long(prefix: str, seq_length: int) -> list[str]:
    """Return a message if some conversations are too long for a sample; raise if all are."""
    lengths_N = read_index(Path(f"{prefix}.idx")).lengths()
    longer = int((lengths_N > seq_length + 1).sum())
    if longer == len(lengths_N):
        raise UserError(
            f"{prefix}: its shortest conversation has {lengths_N.min()} tokens, more than a sample of "
            f"data.seq_length={seq_length} holds; lengthen data.seq_length"
        )
    note = f"{prefix}: {longer:,} of {len(lengths_N):,} conversations are longer than data.seq_length={seq_length}"
    return [f"{note} and left out; the longest has {lengths_N.max():,} tokens"] if longer else []


class _Tokenizer:
    """The part of a tokenizer that Megatron's GPTDataset uses."""

    def __init__(self, record: TokenizerRecord, vocab_size: int) -> None:
        # Megatron turns every pad id of a text into id 0 without a loss, and the first sample's mask leaks into later
        # ones (NVIDIA/Megatron-LM#6981). Plain text has no padding, so its pad is an id that no text holds.
        self.eod, self.pad, self.vocab_size = record.eos_id, _NO_ID, vocab_size
        self.unique_identifiers = {"sha256": record.sha256}
        self.special_tokens_dict = {"eos_token": record.eos_id}


def samples_without_repetition(data: DataConfig, corpus: Corpus) -> int:
    """Return how many samples of the training mix surely need no source twice; 0 with conversations and for a task.

    Up to there, Megatron's order does not depend on the number of samples that it is asked for.
    """
    if not corpus.train_tokens or any(source.prefix in corpus.conversations for source in data.train):
        return 0
    return samples_of_one_pass([(tokens - 1) // data.seq_length for tokens in corpus.train_tokens], data.train)


def build_train_set(
    config: RunConfig, corpus: Corpus, train_samples: int, horizon: int, first: int = 0
) -> Dataset[Any]:
    """Return the training mix, in passes of ``horizon`` samples. Those before sample ``first`` are not built.

    Megatron shuffles all epochs that ``num_samples`` needs together, so a longer run would see another order from the
    start. The pass length is therefore fixed when a run starts: an extended run appends a pass and leaves the earlier
    ones as they were. Within a pass that repeats no source the order is the same for any number of samples, so that no
    more need to be indexed than are read; the number is rounded up, or every rollback would build another index.
    """
    data = config.data
    if data.task is not None:  # every sample is new: there are no passes
        return TaskDataset(open_task(data.task), data.seq_length, "train", config.seed, train_samples)
    cache, any_length = index_cache(config), horizon <= samples_without_repetition(data, corpus)
    passes = list[Any]()
    with checked_cache(_cache_of(cache, corpus)):
        for index, start in enumerate(range(0, train_samples, horizon)):
            if start + horizon <= first:
                passes.append(range(horizon))  # keeps its place
                continue
            read = min(horizon, train_samples - start) if any_length else horizon
            size = min(horizon, _rounded_up(read)) if any_length else horizon
            built = _build(data, data.train, corpus, size, config.seed + index, cache)
            passes.append(Subset(built, range(read)))
    return ConcatDataset(passes)


def _rounded_up(number: int) -> int:
    """Return a number that is at most an eighth larger, and the same for most numbers that are a little larger."""
    unit = 1 << max(0, number.bit_length() - 4)
    return -(-number // unit) * unit


def valid_samples(data: DataConfig, corpus: Corpus) -> int | None:
    """Return how many samples read all of ``data.valid``; None without it, and for a task, which has any number.

    Of several sources some are read more often until then, as their weights say.
    """
    if data.task is not None or not data.valid:
        return None
    held = list[int]()
    for source in data.valid:
        lengths_N = read_index(Path(f"{source.prefix}.idx")).lengths()
        if source.prefix in corpus.conversations:
            held.append(len(pack(lengths_N, data.seq_length + 1, 1, _VALID_SEED)[1]) - 1)
        else:
            held.append((int(lengths_N.sum()) - 1) // data.seq_length)
    total = sum(source.weight for source in data.valid)
    return max(int(own * total / source.weight) for own, source in zip(held, data.valid, strict=True))


def build_valid_set(
    data: DataConfig, corpus: Corpus, samples: int, seed: int, cache: Path, split: Split = "valid"
) -> Dataset[Any] | None:
    """Return ``samples`` samples of ``data.valid`` or of a task; None without data.valid.

    Those of text are the same for every seed, so that runs of several seeds are compared on the same text.

    Args:
        data: its sequence length and sources count.
        corpus: the checked sources.
        samples: how many.
        seed: of a task's samples.
        cache: folder of Megatron's sample indices; see :func:`index_cache`.
        split: of a task.
    """
    if data.task is not None:
        return TaskDataset(open_task(data.task), data.seq_length, split, seed, samples)
    if not data.valid:
        return None
    with checked_cache(_cache_of(cache, corpus)):
        valid_set: Dataset[Any] = _build(data, data.valid, corpus, samples, _VALID_SEED, cache)
    return valid_set


def index_cache(config: RunConfig) -> Path:
    """Return the folder where a run keeps Megatron's sample indices."""
    return Path(config.data.cache_dir or Path(config.output_dir) / "index_cache")


def _cache_of(cache: Path, corpus: Corpus) -> Path:
    """Return the folder for one content: Megatron's own key is the prefix, whose data may be rewritten."""
    return cache / corpus.fingerprint[:16]


def _build(
    data: DataConfig, sources: tuple[DataSource, ...], corpus: Corpus, samples: int, seed: int, cache: Path
) -> GPTDataset:
    """Return Megatron's blended dataset."""
    dataset_config = MixConfig(
        conversations=corpus.conversations,
        pad_id=corpus.tokenizer.pad_id,
        random_seed=seed,
        sequence_length=data.seq_length,
        blend_per_split=[([source.prefix for source in sources], [source.weight for source in sources]), None, None],
        path_to_cache=str(_cache_of(cache, corpus)),
        tokenizer=_Tokenizer(corpus.tokenizer, corpus.vocab_size),
        reset_position_ids=data.document_masking,
        reset_attention_mask=False,
        eod_mask_loss=data.document_masking,
        create_attention_mask=False,
    )
    return BlendedMegatronDatasetBuilder(MixedDataset, [samples, 0, 0], lambda: True, dataset_config).build()[0]


def micro_batches(
    dataset: Dataset[Any], data: DataConfig, consumed_samples: int, rank: int, ranks: int
) -> Iterator[Batch]:
    """Return this data-parallel rank's micro-batches, on its device.

    Consecutive micro-batches from ``consumed_samples`` on go to the ranks in turn. With ``data.num_workers``, processes
    prepare whole micro-batches ahead, documents' starts included. A thread then copies them to pinned memory, from
    which a GPU fetches them while the host goes on.
    """
    of_text = partial(_collate, document_masking=data.document_masking)
    collate: Callable[[Any], Batch] = of_text if data.task is None else _collate_task
    samples = range(consumed_samples, len(dataset))  # type: ignore[arg-type]  # Dataset declares no length
    consecutive = BatchSampler(samples, data.micro_batch_size, drop_last=True)
    loader = DataLoader(
        dataset,
        batch_sampler=islice(consecutive, rank, None, ranks),
        collate_fn=collate,
        num_workers=data.num_workers,
        pin_memory=HAS_CUDA,
        # A server of forks, the default since Python 3.14, would be ended by a signal to the process group.
        multiprocessing_context="fork" if data.num_workers else None,
        worker_init_fn=ignore_signals,
    )
    return (batch.to_device() for batch in _host_batches(loader))


def _host_batches(loader: DataLoader[Any]) -> Iterator[Batch]:
    try:
        yield from loader
    except UserError as error:  # from a worker, the loader puts its traceback before the message
        raise UserError(str(error).rsplit("UserError: ", 1)[-1].strip()) from None


def _collate(samples: list[dict[str, Tensor]], document_masking: bool) -> Batch:
    """Return samples as a micro-batch on the host; it runs in the workers."""
    names = ("tokens", "labels", "loss_mask", "position_ids")
    ids_BS, labels_BS, mask_BS, position_BS = (torch.stack([sample[name] for sample in samples]) for name in names)
    document_start_SB = None
    if document_masking:  # position ids restart at each document
        document_start_SB = (torch.arange(ids_BS.size(1)) - position_BS).t().contiguous()
    return Batch(ids_BS, labels_BS.t().contiguous(), mask_BS.t().contiguous(), document_start_SB)


def _collate_task(batch: dict[str, Tensor]) -> Batch:
    """Return a batch of :class:`TaskDataset` as a micro-batch on the host."""
    labels_SB, mask_SB, level_SB = (batch[name].t().contiguous() for name in ("labels", "loss_mask", "level"))
    return Batch(batch["tokens"], labels_SB, mask_SB, None, level_SB)

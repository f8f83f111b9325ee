"""The checks of a preflight, in order: measurements (probes.py), judged by findings.py."""

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from shutil import disk_usage

import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection

from data_pipeline.manifest import read_manifest
from looplm import checkpoint
from looplm.accounting import checkpoint_bytes
from looplm.checkpoint import step_folder
from looplm.config import RunConfig
from looplm.failures import UserError
from looplm.megatron import device, process_groups
from looplm.megatron.settings import check_engine
from pretrain.batch_schedule import schedule_on
from pretrain.cluster import findings, probes
from pretrain.cluster.findings import Finding
from pretrain.cluster.probes import RankInfo, gather
from pretrain.data import Corpus, check_corpus
from pretrain.progress import check_start, first_sample, own_steps

ALL_REDUCE_BYTES = 1 << 28 if device.HAS_CUDA else 1 << 22
FILE_BYTES = 1 << 28 if device.HAS_CUDA else 1 << 24  # per rank that writes
DRIVER = Path("/proc/driver/nvidia/version")


def examine(config: RunConfig, groups: ProcessGroupCollection) -> Iterator[Finding]:
    """Yield the findings of all checks, the same on every rank; collective."""
    try:
        yield findings.sums(probes.wrong_sums(groups))
        speed = probes.bandwidth(ALL_REDUCE_BYTES)
    except RuntimeError as error:  # from NCCL; the collectives of later checks would hang
        yield findings.sums([], fault=str(error).strip().splitlines()[0])
        return
    ranks = probes.describe_ranks()
    nodes = {info.node: info.rank for info in reversed(ranks)}  # and the first rank of each
    yield findings.network(speed, len(ranks), len(nodes), device.HAS_CUDA)
    yield from _machines(config, ranks)
    yield from _data(config, nodes)
    yield from _storage(config, groups, ranks)


def _machines(config: RunConfig, ranks: list[RankInfo]) -> Iterator[Finding]:
    if device.HAS_CUDA:
        yield findings.gpus(ranks, [config.optim.precision])
        connections = os.environ.get("CUDA_DEVICE_MAX_CONNECTIONS")
        yield findings.environment(config.parallel.tensor, ranks[0].device.capability, connections)
    else:
        driver = DRIVER.read_text().splitlines()[0] if DRIVER.exists() else ""
        yield findings.no_gpu(driver, ranks[0].device.built_for)
    fault = ""
    try:
        check_engine(config.engine)
    except UserError as error:
        fault = str(error)
    yield findings.engine(config.engine, gather(fault))
    yield findings.gradients(config, device.HAS_CUDA and device.HAS_FUSED_WEIGHT_GRADIENTS)
    for check in (findings.software, findings.speed, findings.clocks, findings.shared_memory):
        yield check(ranks)


def _data(config: RunConfig, nodes: dict[str, int]) -> Iterator[Finding]:
    """Check the data as each node sees them, and then the checkpoint to start from, which shares their tokenizer."""
    corpus, fault = None, ""
    if dist.get_rank() in nodes.values():
        try:
            corpus = check_corpus(config.data, config.model.vocab_size)
        except UserError as error:
            fault = str(error)
    faults, corpora = gather(fault), gather(corpus)
    for node, rank in nodes.items():
        if faults[rank]:
            yield Finding("FAIL", "data", f"{node}: {faults[rank]}")
            return
    seen = {node: corpora[rank] for node, rank in nodes.items()}
    yield findings.same_data({node: "" if one is None else one.fingerprint for node, one in seen.items()})
    shared = corpora[0]
    assert shared is not None
    samples = schedule_on(config, dist.get_world_size()).samples_of(config.optim.train_steps)
    if config.data.task is None:
        tokens = (_read_before(config, shared) + samples) * config.data.seq_length
        weights = {source.prefix: source.weight for source in config.data.train}
        needed = {prefix: tokens * weight / sum(weights.values()) for prefix, weight in weights.items()}
        yield findings.passes(needed, {prefix: read_manifest(prefix).tokens for prefix in weights})
    else:
        yield findings.made_while_training(samples * config.data.seq_length)
    try:
        yield _start(config, shared)
    except UserError as error:
        yield Finding("FAIL", "start", str(error))


def _read_before(config: RunConfig, corpus: Corpus) -> int:
    """Return the samples of these data that earlier stages have read; 0 if their checkpoint cannot be opened."""
    name = config.checkpoint.initial
    step, initial = None if name is None else step_folder.glance(name), None
    if step is not None:
        with suppress(UserError):  # :func:`_start` reports it, and reads whole checkpoints
            initial = checkpoint.read_about(step)
    return first_sample(config, corpus, initial)


def _start(config: RunConfig, corpus: Corpus) -> Finding:
    """Check that the checkpoint from which the run resumes or starts is complete and fits, as pretrain.run does.

    Collective. Only rank 0 reads whole checkpoints.

    Raises:
        UserError: the checkpoint is damaged or does not fit; on every rank.
    """
    newest, step = process_groups.on_rank_0(lambda: _newest_steps(config))
    name = config.checkpoint.initial if step is None else None  # a run that resumes does not read it
    initial = None if name is None else step_folder.locate(name)

    def check() -> Finding:
        resumed = None if step is None else checkpoint.check_resume(step, config)
        initial_about = None if initial is None else checkpoint.check_fit(initial, config.model, config.gate)
        if initial is not None and config.checkpoint.initial_optimizer:
            checkpoint.check_moments(initial, config)
        check_start(config, corpus, resumed, initial_about)
        total = config.optim.train_steps
        if newest != step:
            return Finding("warn", "start", f"{newest} is broken; the run would resume from {step or 'the start'}")
        if resumed is not None:
            return Finding("ok", "start", f"resumes from {step}, after step {resumed.step} of {total}")
        origin = f"the weights of {initial}, which are complete and fit" if initial else "fresh weights"
        return Finding("ok", "start", f"step 1 of {total}, from {origin}")

    return process_groups.on_rank_0(check)


def _newest_steps(config: RunConfig) -> tuple[Path | None, Path | None]:
    """Return the run's newest checkpoint, and its newest complete one."""
    steps = own_steps(config)
    whole = next((step for step in steps if step_folder.find_fault(step) is None), None)
    return steps[0] if steps else None, whole


def _storage(config: RunConfig, groups: ProcessGroupCollection, ranks: list[RankInfo]) -> Iterator[Finding]:
    size = checkpoint_bytes(config.model, config.gate, config.optim.precision, config.loss.frozen_trunk)
    output, keep = Path(config.output_dir), max(1, checkpoint.number_at_once(config) - 1)
    folder = next(path for path in (output, *output.absolute().parents) if path.is_dir())
    kept = min(keep, len(step_folder.steps_in(step_folder.of_run(output))))
    free, kept = gather((disk_usage(folder).free, kept))[0]
    yield findings.disk(free, size, keep, kept)
    speed = probes.write_speed(folder, groups, FILE_BYTES)
    yield findings.saving(speed, size, config.checkpoint.save_every, config.checkpoint.in_background)
    yield findings.memory(ranks, checkpoint.host_bytes(config), speed.writers, config.health.max_rollbacks > 0)

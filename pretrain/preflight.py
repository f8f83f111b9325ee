"""Look before a long run: everything that can be known about a training stage on its machines, in a few minutes.

Takes the configuration of pretrain.train, on the same ranks: torchrun in front, or pretrain/slurm/preflight.sbatch. Each
line says ok, warn or FAIL, and the figure. It ends with "go" and exit status 0, or with what is wrong and 2. It trains
nothing, and leaves nothing behind.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from shutil import disk_usage

import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection

from data_pipeline.manifest import read_manifest
from looplm import checkpoint
from looplm.accounting import checkpoint_bytes
from looplm.checkpoint import step_folder
from looplm.cli import UserError, parse_config, run_main
from looplm.config import RunConfig
from looplm.megatron import device, process_groups
from looplm.megatron.settings import check_engine
from pretrain.cluster import probes, verdicts
from pretrain.cluster.probes import Place
from pretrain.cluster.verdicts import Verdict
from pretrain.data import Corpus, check_corpus, schedule_on
from pretrain.progress import refuse_other_data

MESSAGE = {True: 1 << 28, False: 1 << 22}  # bytes of the all-reduce that is timed: on GPUs, and on CPUs
FILE = {True: 1 << 28, False: 1 << 24}  # bytes that every writer writes
DRIVER = Path("/proc/driver/nvidia/version")


def main(argv: list[str]) -> None:
    """``torchrun --nproc-per-node 8 -m pretrain.preflight --config A.yaml [--config B.yaml] [--parallel.tensor 8 ...]``"""
    config = parse_config(RunConfig, argv, prog="python -m pretrain.preflight", description=str(__doc__))
    ranks, ranks_on_node = (int(os.environ.get(name, "1")) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"))
    _say(verdicts.layout(config, ranks, ranks_on_node))
    if device.HAS_CUDA:
        _refuse(verdicts.enough_gpus(ranks_on_node, device.visible_gpus()))
    _say(Verdict("ok", "ranks", f"{ranks} are joining; nothing after this line means that some cannot reach MASTER_ADDR={os.environ.get('MASTER_ADDR', 'this machine')}"))  # fmt: skip
    groups = process_groups.start(config.seed, config.parallel)
    found = []
    try:
        for verdict in examine(config, groups):
            _say(verdict)
            found.append(verdict)
    finally:
        process_groups.stop()
    wrong = [verdict for verdict in found if verdict.level == "FAIL"]
    if wrong:
        lines = [f"{verdict.about}: {verdict.text}" for verdict in wrong]
        raise UserError("\nerror: ".join([f"no go: {len(wrong)} of {len(found)} checks failed", *lines]))
    _say("go")


def _say(line: Verdict | str) -> None:
    """On the first rank, also before the ranks have met and after they have parted."""
    if os.environ.get("RANK", "0") == "0":
        print(line, flush=True)


def _refuse(verdict: Verdict) -> None:
    """What would end in a traceback right after."""
    if verdict.level == "FAIL":
        raise UserError(f"{verdict.about}: {verdict.text}")


def examine(config: RunConfig, groups: ProcessGroupCollection) -> Iterator[Verdict]:
    """Every check, the same verdicts on every rank; collective."""
    try:
        yield verdicts.sums(probes.wrong_sums(groups))
        speed = probes.bandwidth(MESSAGE[device.HAS_CUDA])
    except RuntimeError as error:  # NCCL's; what comes after would hang
        yield verdicts.sums([], fault=str(error).strip().splitlines()[0])
        return
    places = probes.look_around()
    nodes = {place.node: place.rank for place in reversed(places)}  # and the first rank of each
    yield verdicts.network(speed, len(places), len(nodes), device.HAS_CUDA)
    yield from _machines(config, places)
    yield from _data(config, nodes)
    yield from _storage(config, groups, places)


def _machines(config: RunConfig, places: list[Place]) -> Iterator[Verdict]:
    if device.HAS_CUDA:
        yield verdicts.gpus(places, [config.optim.precision])
        connections = os.environ.get("CUDA_DEVICE_MAX_CONNECTIONS")
        yield verdicts.environment(config.parallel.tensor, places[0].device.capability, connections)
    else:
        driver = DRIVER.read_text().splitlines()[0] if DRIVER.exists() else ""
        yield verdicts.no_gpu(driver, places[0].device.built_for)
    yield verdicts.engine(config.engine, probes.all_of(_engine_fault(config)))
    yield verdicts.software(places)
    yield verdicts.speed(places)
    yield verdicts.clocks(places)
    yield verdicts.shared_memory(places)


def _engine_fault(config: RunConfig) -> str:
    try:
        check_engine(config.engine)
    except UserError as error:
        return str(error)
    return ""


def _data(config: RunConfig, nodes: dict[str, int]) -> Iterator[Verdict]:
    """Data as every node sees them, and what the run starts from, which belongs to their tokenizer."""
    corpus, fault = None, ""
    if dist.get_rank() in nodes.values():
        try:
            corpus = check_corpus(config.data, config.model.vocab_size)
        except UserError as error:
            fault = str(error)
    faults, corpora = probes.all_of(fault), probes.all_of(corpus)
    for node, rank in nodes.items():
        if faults[rank]:
            yield Verdict("FAIL", "data", f"{node}: {faults[rank]}")
            return
    seen = {node: corpora[rank] for node, rank in nodes.items()}
    yield verdicts.same_data({node: "" if one is None else one.fingerprint for node, one in seen.items()})
    weights = {source.prefix: source.weight for source in config.data.train}
    tokens = schedule_on(config, dist.get_world_size()).samples_of(config.optim.train_steps) * config.data.seq_length
    needed = {prefix: tokens * weight / sum(weights.values()) for prefix, weight in weights.items()}
    yield verdicts.passes(needed, {prefix: read_manifest(prefix).tokens for prefix in weights})
    first = corpora[0]
    assert first is not None
    # One rank reads whole checkpoints; the verdict is everyone's.
    yield probes.all_of(_start(config, first) if dist.get_rank() == 0 else Verdict("ok", "start", ""))[0]


def _start(config: RunConfig, corpus: Corpus) -> Verdict:
    """Whether what the run goes on or starts from is whole and fits."""
    steps = step_folder.steps_in(Path(config.output_dir) / "checkpoints") if config.checkpoint.resume else []
    step = next((step for step in steps if step_folder.find_fault(step) is None), None)
    try:
        initial = None if config.checkpoint.initial is None else step_folder.locate(config.checkpoint.initial)
        done = None if step is None else checkpoint.check_fit(step, config.model, config.gate)
        begun = None if initial is None else checkpoint.check_fit(initial, config.model, config.gate)
        refuse_other_data(config, corpus, done, begun)
    except UserError as error:
        return Verdict("FAIL", "start", str(error))
    if steps[:1] != [step] and steps:
        return Verdict("warn", "start", f"{steps[0]} is broken; the run would go on from {step or 'the start'}")
    if done is not None:
        return Verdict("ok", "start", f"goes on from {step}, after step {done.step} of {config.optim.train_steps}")
    origin = f"the weights of {initial}, which are whole and fit" if initial else "fresh weights"
    return Verdict("ok", "start", f"step 1 of {config.optim.train_steps}, from {origin}")


def _storage(config: RunConfig, groups: ProcessGroupCollection, places: list[Place]) -> Iterator[Verdict]:
    frozen = config.loss.frozen_trunk
    size = checkpoint_bytes(config.model, config.gate, config.optim.precision, frozen)
    output, keep = Path(config.output_dir), config.checkpoint.keep
    folder = next(path for path in (output, *output.absolute().parents) if path.is_dir())
    kept = min(keep, len(step_folder.steps_in(output / "checkpoints")))
    free, kept = probes.all_of((disk_usage(folder).free, kept))[0]
    yield verdicts.disk(free, size, keep, kept)
    writing = probes.write_speed(folder, groups, FILE[device.HAS_CUDA])
    yield verdicts.saving(writing, size, config.checkpoint.save_every)
    yield verdicts.memory(places, size, writing.writers)


if __name__ == "__main__":
    run_main(main)

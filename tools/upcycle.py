"""Make a trained model into another, and say what the result has of it exactly and what only nearly.

The first word says how; `python -m tools.upcycle KIND --help` has its keys:

    depth   copy layers: a deeper stack, with Adam's moments
    loops   another number of loops of the same weights
    gate    a fresh exit gate
    dense   layers of a dense Llama- or Qwen-style Hugging Face model become the shared stack of a looped one
    latent  plain attention becomes multi-head latent attention, by a low-rank factorisation

A training checkpoint becomes a training directory that pretrain.train resumes at the same step; where there are no moments
to go on with, the result is weights alone, for checkpoint.initial. Losses before and after are measured with --data.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

from megatron.core.process_groups_config import ProcessGroupCollection

from looplm.cli import UserError, parse_config, require, run_main
from looplm.config import GateConfig
from looplm.megatron import process_groups
from pretrain.data import Batch
from tools.upcycling.calibrate import second_moments
from tools.upcycling.dense import loop_layers, open_dense
from tools.upcycling.depth import How, deepen
from tools.upcycling.latent import to_latent
from tools.upcycling.loops import change_gate, change_loops
from tools.upcycling.measure import Sample, measure
from tools.upcycling.parts import Source, Upcycled, open_source, write

SEED = 1234  # of what is drawn anew: a fresh gate


@dataclass(frozen=True, kw_only=True)
class Output:
    """What every kind writes and measures.

    Args:
        output: directory to make; it must not exist.
        data: prefix of tokenised data to measure the losses before and after on; null measures none.
        samples: sequences of it.
        seq_length: tokens of each; null takes 256, or what the model can take if that is less.
    """

    output: str
    data: str | None = None
    samples: int = 16
    seq_length: int | None = None

    def __post_init__(self) -> None:
        require(not Path(self.output).exists(), "output", self.output, "it exists already; name a directory to make")
        for key in ("samples", "seq_length"):
            require(getattr(self, key) is None or getattr(self, key) > 0, key, getattr(self, key), "give a number above 0")  # fmt: skip

    def read(self, prefix: str, source: Source, groups: ProcessGroupCollection) -> list[Batch]:
        """Samples of a prefix, for the source's model."""
        model = source.parts.model
        sample = Sample(prefix, self.samples, self.seq_length or min(256, model.max_sequence_length))
        return sample.read(model, source.about.tokenizer_sha256, groups)


@dataclass(frozen=True, kw_only=True)
class FromCheckpoint(Output):
    """Upcycling of a model of ours.

    Args:
        checkpoint: a training directory, one of its step directories, or weights alone.
    """

    checkpoint: str


@dataclass(frozen=True, kw_only=True)
class DepthConfig(FromCheckpoint):
    """A deeper stack of copied layers.

    Args:
        layers: of the result; a multiple of the source's.
        how: stack (0 1 2 3 0 1 2 3) or interleave (0 0 1 1 2 2 3 3).
        residual_scale: factor on what every sublayer adds to the residual stream; 1 carries it unchanged.
    """

    layers: int
    how: How = "stack"
    residual_scale: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.residual_scale > 0, "residual_scale", self.residual_scale, "give a number above 0")


@dataclass(frozen=True, kw_only=True)
class LoopsConfig(FromCheckpoint):
    """Another number of loops.

    Args:
        loops: from here on.
    """

    loops: int


@dataclass(frozen=True, kw_only=True)
class FreshGateConfig(FromCheckpoint):
    """A fresh exit gate on the same trunk.

    Args:
        kind: lru (a recurrent state) or linear (Ouro's).
        state_size: lru only: width of the state.
        sequence_level: lru only: read out the running mean of the state over the document too.
    """

    kind: Literal["lru", "linear"] = "lru"
    state_size: int = 64
    sequence_level: bool = False


@dataclass(frozen=True, kw_only=True)
class DenseConfig(Output):
    """Layers of a dense Llama- or Qwen-style model become the shared stack of a looped one.

    Args:
        input: a Hugging Face directory: config.json, safetensors, tokenizer.json.
        layers: which, as FIRST:END, counted from 0 and without END; null takes all.
        loops: of the result; 1 over all layers is the dense model.
        gate: the fresh exit gate's.
        tokenizer: a tokenizer.json in place of the directory's own.
        eos_token: the token that ends a text, where no file names it.
    """

    input: str
    layers: str | None = None
    loops: int = 4
    gate: GateConfig = field(default_factory=GateConfig)
    tokenizer: str | None = None
    eos_token: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.loops > 0, "loops", self.loops, "give a number above 0")


@dataclass(frozen=True, kw_only=True)
class LatentConfig(FromCheckpoint):
    """Multi-head latent attention in place of plain or grouped attention.

    Args:
        kv_lora_rank: width of the latent; hidden_size is exact.
        qk_rope_head_dim: width of the rotary keys that are kept, a multiple of the head's width; null keeps those of all
            key-value heads, which is exact. One head's width gives the usual layout, a single shared key.
        calibrate: prefix of data on which the factorisation is best, --samples of it; null takes the weights alone.
    """

    kv_lora_rank: int
    qk_rope_head_dim: int | None = None
    calibrate: str | None = None


def depth(config: DepthConfig, groups: ProcessGroupCollection) -> tuple[Source, Upcycled]:
    """Copied layers."""
    source = open_source(config.checkpoint, groups)
    return source, deepen(source.parts, config.layers, config.how, config.residual_scale)


def loops(config: LoopsConfig, groups: ProcessGroupCollection) -> tuple[Source, Upcycled]:
    """Another number of loops."""
    source = open_source(config.checkpoint, groups)
    return source, change_loops(source.parts, config.loops)


def gate(config: FreshGateConfig, groups: ProcessGroupCollection) -> tuple[Source, Upcycled]:
    """Another gate."""
    source = open_source(config.checkpoint, groups)
    fresh = GateConfig(kind=config.kind, state_size=config.state_size, sequence_level=config.sequence_level)
    return source, change_gate(source.parts, fresh)


def dense(config: DenseConfig, groups: ProcessGroupCollection) -> tuple[Source, Upcycled]:
    """From Hugging Face."""
    tokenizer = None if config.tokenizer is None else Path(config.tokenizer)
    source = open_dense(Path(config.input), tokenizer, config.eos_token)
    return source, loop_layers(source.parts, config.layers, config.loops, config.gate)


def latent(config: LatentConfig, groups: ProcessGroupCollection) -> tuple[Source, Upcycled]:
    """Latent attention."""
    source = open_source(config.checkpoint, groups)
    moments_LDD = None
    if config.calibrate is not None:
        moments_LDD = second_moments(source.parts, config.read(config.calibrate, source, groups), groups)
    return source, to_latent(source.parts, config.kv_lora_rank, config.qk_rope_head_dim, moments_LDD)


class Kind(NamedTuple):
    """A first word: the keys that follow it, and what it does."""

    config: type[Output]
    run: Callable[[Any, ProcessGroupCollection], tuple[Source, Upcycled]]


KINDS = {
    "depth": Kind(DepthConfig, depth),
    "loops": Kind(LoopsConfig, loops),
    "gate": Kind(FreshGateConfig, gate),
    "dense": Kind(DenseConfig, dense),
    "latent": Kind(LatentConfig, latent),
}


def main(argv: list[str]) -> None:
    """``python -m tools.upcycle depth --checkpoint DIR --output DIR --layers 8 --how stack``"""
    if argv[:1] in (["--help"], ["-h"]):
        print(__doc__)
        return
    word = argv[0] if argv else ""
    if word not in KINDS:
        raise UserError(f"{word or 'no first word'}: name what to do: {', '.join(KINDS)}")
    prog, kind = f"python -m tools.upcycle {word}", KINDS[word]
    config = parse_config(kind.config, argv[1:], prog=prog, description=str(kind.config.__doc__).partition("\n")[0])
    groups = process_groups.start(SEED)
    try:
        if groups.dp.size() > 1:
            raise UserError(f"{prog}: runs in one process; start it without torchrun")
        upcycle(word, config, groups)
    finally:
        process_groups.stop()


def upcycle(word: str, config: Output, groups: ProcessGroupCollection) -> None:
    """Build, measure, write and report."""
    source, result = KINDS[word].run(config, groups)
    record: dict[str, Any] = {"kind": word, "source": str(source.folder), "settings": asdict(config)}
    record |= {"exact": result.exact, "approximate": result.approximate}
    if config.data is not None:
        batches = config.read(config.data, source, groups)
        depths = max(source.parts.model.num_loops, result.parts.model.num_loops)
        record |= {
            when: measure(parts, batches, depths, groups)
            for when, parts in (("before", source.parts), ("after", result.parts))
        }
    write(Path(config.output), source, result.parts, record, groups)
    print("\n".join(describe(record)))


def describe(record: dict[str, Any]) -> list[str]:
    """The report that the command prints, line by line."""
    lines = [f"{record['source']} -> {record['settings']['output']}"]
    for word in ("exact", "approximate"):
        lines += [f"{'' if number else word:<14}{line}" for number, line in enumerate(record[word])]
    if "before" not in record:
        return [*lines, "losses were not measured: no --data was named"]
    before, after = record["before"], record["after"]
    lines += ["", f"loss on {before['tokens']:,} tokens of {record['settings']['data']}"]
    lines.append(f"{'depth':>8}{'before':>10}{'after':>10}")
    pairs = zip(before["loss_per_depth"], after["loss_per_depth"], strict=True)
    lines += [f"{number:>8}{old:>10.4f}{new:>10.4f}" for number, (old, new) in enumerate(pairs, start=1)]
    for when in ("before", "after"):
        exits = " ".join(f"{share:.3f}" for share in record[when]["exit_distribution"])
        lines.append(f"tokens leaving after each loop, {when}: {exits}")
    return lines


if __name__ == "__main__":
    run_main(main)

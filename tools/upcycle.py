"""Convert a trained model to another, and report what is preserved exactly and what approximately.

A training checkpoint becomes a training directory that pretrain.train resumes at the same step. Without Adam's moments
the result is weights alone, for checkpoint.initial. With --data, losses before and after are measured. tools.smollm
makes models/smollm2; docs/hugging_face.md says which other models of Hugging Face can be converted.

    python -m tools.upcycle depth --checkpoint runs/ouro-1.4b/stage1a --output runs/deep --layers 48 --how stack
    python -m tools.upcycle dense --input models/smollm2 --output runs/looped --layers 4:12 --loops 4
    python -m tools.upcycle retrofit --input models/smollm2 --output runs/looped --layers 10:20 --loops 2
"""

import sys
from dataclasses import asdict, dataclass, field, fields
from math import isfinite
from pathlib import Path
from typing import Any

from megatron.core.process_groups_config import ProcessGroupCollection
from tqdm import tqdm

from looplm.bounds import at_least, check_bounds, path_field, positive, require, require_absent
from looplm.checkpoint.new_folder import making
from looplm.cli import parse_command, run_main
from looplm.config import GateConfig, Injection
from looplm.failures import UserError
from looplm.megatron import process_groups
from pretrain.data import Batch
from tools.upcycling.dense import loop_layers, open_dense, parse_range
from tools.upcycling.latent import latent_config, to_latent
from tools.upcycling.measure import measure, read_samples, second_moments
from tools.upcycling.model_state import Source, Upcycled, as_stored, converted_run, open_source, write
from tools.upcycling.refit import check_refit, refit
from tools.upcycling.retrofit import Trial, retrofit, search
from tools.upcycling.structure import LayerOrder, change_gate, change_loops, deepen

PROG = "python -m tools.upcycle"
SEED = 1234  # for the initial weights of a fresh gate


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """Keys of every conversion.

    Args:
        output: directory to create; it must not exist.
        data: prefix of tokenized data on which losses before and after are measured; null measures none.
        samples: number of sequences; the data must hold that many.
        seq_length: tokens of each; null takes 256, or the model's maximum if that is less.
    """

    output: str = path_field()
    data: str | None = path_field(None)
    samples: int = positive(16)
    seq_length: int | None = positive(None)

    def __post_init__(self) -> None:
        check_bounds(self, "")
        require_absent(self.output, "output")
        for key, plain in (("samples", 16), ("seq_length", None)):
            value, fix = getattr(self, key), "it needs data; name some, or leave it out"
            require(self.reads_data or value == plain, key, value, fix)

    @property
    def reads_data(self) -> bool:
        """True if a key names data to read."""
        return self.data is not None

    def read(self, prefix: str, source: Source, groups: ProcessGroupCollection, key: str = "samples") -> list[Batch]:
        """Return samples of a data prefix for the source's model, as many as ``key`` says."""
        config, count, run = source.state.config, getattr(self, key), source.run
        length = self.seq_length or min(256, config.max_sequence_length)
        masks = run is None or run.data.document_masking
        sha256 = source.about.tokenizer_sha256
        return read_samples(prefix, count, length, config, sha256, groups, masks_documents=masks, key=key)

    def open(self, groups: ProcessGroupCollection) -> Source:
        """Read the source."""
        raise NotImplementedError

    def check(self, source: Source) -> None:
        """Raise for keys that the source does not allow, if the conversion does long work before it would find them."""

    def convert(self, source: Source, groups: ProcessGroupCollection) -> Upcycled:
        """Return the result."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class FromCheckpoint(Conversion):
    """Conversion of one of our models.

    Args:
        checkpoint: a training directory, one of its step directories, or weights alone.
    """

    checkpoint: str = path_field()

    def open(self, groups: ProcessGroupCollection) -> Source:
        """Read the checkpoint."""
        return open_source(self.checkpoint, groups)


@dataclass(frozen=True, kw_only=True)
class DepthConfig(FromCheckpoint):
    """Copy layers: a deeper stack, with Adam's moments.

    Args:
        layers: number of layers; a multiple of the source's.
        how: stack (0 1 2 3 0 1 2 3) or interleave (0 0 1 1 2 2 3 3).
        residual_scale: factor on what every sublayer adds to the residual stream; 1 leaves it unchanged.
    """

    layers: int
    how: LayerOrder = "stack"
    residual_scale: float = positive(1.0)

    def convert(self, source: Source, groups: ProcessGroupCollection) -> Upcycled:
        """Return the deeper model."""
        return deepen(source.state, self.layers, self.how, self.residual_scale)


@dataclass(frozen=True, kw_only=True)
class LoopsConfig(FromCheckpoint):
    """Run the same weights for another number of loops.

    Args:
        loops: number of loops.
    """

    loops: int

    def convert(self, source: Source, groups: ProcessGroupCollection) -> Upcycled:
        """Return the model with other loops."""
        return change_loops(source.state, self.loops)


@dataclass(frozen=True, kw_only=True)
class FreshGateConfig(GateConfig, FromCheckpoint):
    """Replace the exit gate by a fresh one on the same trunk. The keys are those of the section gate of a recipe."""

    def __post_init__(self) -> None:
        FromCheckpoint.__post_init__(self)
        GateConfig.__post_init__(self)

    def convert(self, source: Source, groups: ProcessGroupCollection) -> Upcycled:
        """Return the model with a fresh gate."""
        keys = {key.name: getattr(self, key.name) for key in fields(GateConfig)}
        return change_gate(source.state, GateConfig(**keys))


@dataclass(frozen=True, kw_only=True)
class FromDense(Conversion):
    """Conversion of a dense Llama- or Qwen-style Hugging Face model.

    Args:
        input: a Hugging Face directory: config.json, safetensors, tokenizer.json.
        gate: configuration of the fresh exit gate.
        tokenizer: a tokenizer.json instead of the directory's own.
        eos_token: the token that ends a text; needed if no file names it.
    """

    input: str = path_field()
    gate: GateConfig = field(default_factory=GateConfig)
    tokenizer: str | None = path_field(None)
    eos_token: str | None = None

    def open(self, groups: ProcessGroupCollection) -> Source:
        """Read the Hugging Face directory."""
        return open_dense(Path(self.input), None if self.tokenizer is None else Path(self.tokenizer), self.eos_token)


@dataclass(frozen=True, kw_only=True)
class DenseConfig(FromDense):
    """Loop layers of a dense Llama- or Qwen-style Hugging Face model.

    Args:
        layers: the layers of the shared stack, as FIRST:END, counted from 0 and without END; null takes all.
        loops: number of loops; 1 over all layers is the dense model.
    """

    layers: str | None = None
    loops: int = positive(4)

    def convert(self, source: Source, groups: ProcessGroupCollection) -> Upcycled:
        """Return the looped model."""
        return loop_layers(source.state, self.layers, self.loops, self.gate)


@dataclass(frozen=True, kw_only=True)
class RetrofitConfig(FromDense):
    """Loop a middle range of a dense model's layers; those before and after it run once. One loop is the dense model.

    Args:
        layers: the looped range, as FIRST:END, counted from 0 and without END.
        loops: number of loops.
        residual_scale: factor on what each sublayer in the range adds to the residual stream; 1 leaves it unchanged.
        injection: what later loops read of the first one's input (model.injection): none, additive, diagonal, linear.
        search: more ranges to try beside layers, FIRST:END each; with --data all are measured before any training, and
            the best after its last loop is written.
        scales: further residual scales that the search tries.
    """

    layers: str
    loops: int = positive(2)
    residual_scale: float = positive(1.0)
    injection: Injection = "none"
    search: tuple[str, ...] = ()
    scales: tuple[float, ...] = positive(())

    def __post_init__(self) -> None:
        super().__post_init__()
        for key in ("search", "scales"):
            asked = list(getattr(self, key))
            require(not asked or self.data is not None, key, asked, "a search measures; give --data too")

    def check(self, source: Source) -> None:
        """Raise for ranges that the model does not have."""
        for key, layers in (("layers", self.layers), *(("search", layers) for layers in self.search)):
            parse_range(layers, source.state.config.num_layers, key)

    def convert(self, source: Source, groups: ProcessGroupCollection) -> Upcycled:
        """Return the looped model, the best one if several are to be tried."""
        layers, scale = self.layers, self.residual_scale
        if self.data is not None and (self.search or self.scales):
            ranges, scales = [self.layers, *self.search], [self.residual_scale, *self.scales]
            batches = self.read(self.data, source, groups)
            trials = search(source.state, ranges, scales, self.loops, self.injection, batches, groups)
            total = len(ranges) * len(scales)
            found = list(tqdm(trials, total=total, unit="range", disable=not sys.stderr.isatty()))
            found.sort(key=lambda trial: (not isfinite(trial.loss[-1]), trial.loss[-1]))
            print("\n".join(describe_trials(found)))
            require(isfinite(found[0].loss[-1]), "search", ranges, "no range has a finite loss; is the source whole?")
            layers, scale = found[0].layers, found[0].residual_scale
        return retrofit(source.state, layers, self.loops, self.gate, self.injection, scale)


@dataclass(frozen=True, kw_only=True)
class LatentConfig(FromCheckpoint):
    """Turn plain or grouped attention into multi-head latent attention, by a low-rank factorization.

    Args:
        kv_lora_rank: width of the latent.
        qk_rope_head_dim: width of the rotary keys that are kept, a multiple of the head's width; null keeps those of
            all key-value heads, which is exact. One head's width gives the usual form, a single shared key.
        latent_norm: normalize the latent, as DeepSeek-V3 does. Then only kv_lora_rank=hidden_size is exact, and a
            narrow latent loses much; without, it is exact as soon as it has the rank of the values.
        calibrate: prefix of data, --samples of it, for which the factorization is optimal; null uses the weights alone.
        refit_samples: sequences of the same data to which each layer's output projection is fitted afterwards; 0 leaves
            them. 64 of 256 tokens do for a model of width 576; a wider one needs more.
    """

    kv_lora_rank: int
    qk_rope_head_dim: int | None = None
    latent_norm: bool = False
    calibrate: str | None = path_field(None)
    refit_samples: int = at_least(0, 0)

    @property
    def reads_data(self) -> bool:
        """True if a key names data to read."""
        return self.data is not None or self.calibrate is not None

    def __post_init__(self) -> None:
        super().__post_init__()
        fix = "name the data to fit to with calibrate"
        require(self.calibrate is not None or not self.refit_samples, "refit_samples", self.refit_samples, fix)

    def check(self, source: Source) -> None:
        """Raise for a model that cannot become latent, and for widths that it cannot have."""
        latent_config(source.state.config, self.kv_lora_rank, self.qk_rope_head_dim, self.latent_norm)
        check_refit(source.state.config, self.refit_samples)

    def convert(self, source: Source, groups: ProcessGroupCollection) -> Upcycled:
        """Return the model with latent attention."""
        moments_LDD, batches = None, list[Batch]()
        if self.calibrate is not None:
            if self.refit_samples:  # before the long work, which too large a number would lose
                batches = self.read(self.calibrate, source, groups, "refit_samples")
            moments_LDD = second_moments(source.state, self.read(self.calibrate, source, groups), groups)
        result = to_latent(source.state, self.kv_lora_rank, self.qk_rope_head_dim, moments_LDD, self.latent_norm)
        if not batches or not result.approximate:
            return result
        fitted = f"output projections: fitted to what attention gave on {self.refit_samples} sequences"
        state = refit(source.state, result.state, batches, groups)
        return Upcycled(state, result.exact, [*result.approximate, fitted])


COMMANDS: dict[str, type[Conversion]] = {
    "depth": DepthConfig,
    "loops": LoopsConfig,
    "gate": FreshGateConfig,
    "dense": DenseConfig,
    "retrofit": RetrofitConfig,
    "latent": LatentConfig,
}


def main(argv: list[str]) -> None:
    """``python -m tools.upcycle depth --checkpoint DIR --output DIR --layers 8 --how stack``"""
    word, config = parse_command(COMMANDS, argv, prog=PROG, description=str(__doc__))
    with making(Path(config.output)):
        record = _convert(word, config)
    print("\n".join(describe(record)))


def _convert(word: str, config: Conversion) -> dict[str, Any]:
    groups = process_groups.start(SEED)
    try:
        source = config.open(groups)
        if source.left_behind:
            print(f"left behind: {', '.join(source.left_behind)}", file=sys.stderr)
        config.check(source)
        batches = None if config.data is None else config.read(config.data, source, groups)
        result = resumable(config.convert(source, groups), source, Path(config.output))
        result = result._replace(state=as_stored(result.state, source))
        record: dict[str, Any] = {"kind": word, "source": str(source.folder), "settings": asdict(config)}
        record |= {"exact": result.exact, "approximate": result.approximate}
        if batches is not None:
            depths = max(source.state.config.num_loops, result.state.config.num_loops)
            for when, state in (("before", source.state), ("after", result.state)):
                record[when] = measure(state, batches, depths, groups)
        write(Path(config.output), source, result.state, record, groups)
    finally:
        process_groups.stop()
    return record


def resumable(result: Upcycled, source: Source, output: Path) -> Upcycled:
    """Return a result, without Adam's moments if the keys of the source's run do not fit the new model."""
    if source.run is None or result.state.moments is None:
        return result
    try:
        converted_run(source.run, result.state, output)
    except UserError as error:
        lost = f"the run: weights alone are written, for checkpoint.initial, because its keys do not fit ({error})"
        return Upcycled(result.state._replace(moments=None), result.exact, [*result.approximate, lost])
    return result


def describe_trials(trials: list[Trial]) -> list[str]:
    """Return the table of a search, in the order of ``trials``."""
    head = "".join(f"{f'loop {loop}':>10}" for loop in range(1, len(trials[0].loss) + 1))
    rows = [
        f"{trial.layers:>10}{trial.residual_scale:>8g}" + "".join(f"{loss:>10.4f}" for loss in trial.loss)
        for trial in trials
    ]
    return [f"{'layers':>10}{'scale':>8}{head}", *rows]


def describe(record: dict[str, Any]) -> list[str]:
    """Return the lines of the report."""
    lines = [f"{record['source']} -> {record['settings']['output']}"]
    for word in ("exact", "approximate"):
        lines += [f"{'' if number else word:<14}{line}" for number, line in enumerate(record[word])]
    if "before" not in record:
        return [*lines, "losses were not measured: no --data was given"]
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

"""Convert trained models with tools.upcycle, train the results on, and check that their losses fall from there.

    python -m tools.upcycle_study        (make upcycle-study; half an hour on two cores)

The sources are a recipe's model and the same with plain attention, both trained, and a random Llama that transformers
saved. Losses are those of the last loop on the same held-out samples: of the source, of the result, and of each
checkpoint as the result is trained on. The command ends with status 1 if a result's loss rises above its start or does
not end below it, or if a conversion at full rank changes a logit by more than 1e-4. If repeated, it continues where it
stopped.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM

from looplm.bounds import check_bounds, path_field, positive, require
from looplm.checkpoint import COMPANION_FOLDER, step_folder
from looplm.cli import parse_config, run_main
from looplm.config import RunConfig
from looplm.huggingface.companion_files import CONVERSIONS, TOKENIZER
from looplm.megatron import process_groups
from looplm.yaml_text import read_yaml
from pretrain import train as pretrain
from pretrain.data import Batch, check_corpus
from tools import upcycle
from tools.studies.study import Study, markdown_table
from tools.upcycling.measure import measure, read_samples
from tools.upcycling.model_state import ModelState, assemble, open_source

POINTS = 8  # checkpoints at which a result is measured
WARMUP_STEPS = 5  # some results have no moments, so that Adam's first steps would have the learning rate's full length
LOGIT_TOLERANCE = 1e-4
PROG = "python -m tools.upcycle_study"


@dataclass(frozen=True, kw_only=True)
class StudyConfig:
    """Sources and training of the study.

    Args:
        recipe: YAML file with which the sources are trained, as for pretrain.train, with latent attention.
        plain: YAML file on top of it, with plain attention.
        output_dir: folder for sources, results, study.json and table.md.
        layers: layers of the sources; results that are made deeper have twice as many.
        steps: steps for which each result is trained on, a multiple of 8.
        samples: held-out sequences on which losses are measured.
    """

    recipe: str = path_field("configs/quickstart/pretrain.yaml")
    plain: str = path_field("configs/upcycle-study/mha.yaml")
    output_dir: str = path_field("runs/upcycle_study")
    layers: int = positive(4)
    steps: int = positive(40)
    samples: int = positive(32)

    def __post_init__(self) -> None:
        check_bounds(self, "")
        require(self.steps % POINTS == 0, "steps", self.steps, f"give a multiple of {POINTS}")


class PlannedResult(NamedTuple):
    """A source, the subcommand of tools.upcycle with its arguments, and the rate at which the result is trained on."""

    source: str
    command: str
    arguments: tuple[str, ...]
    learning_rate: float
    exact: bool = False


class Result(NamedTuple):
    """Losses in nats per token of a source, its converted model, and each checkpoint after that, in order.

    ``logits_within`` is the largest difference from the source's logits over all loops; None if none is promised.
    """

    name: str
    source: float
    start: float
    curve: list[float]
    logits_within: float | None = None

    def faults(self) -> list[str]:
        """Return a sentence for each expectation that was not met."""
        faults = []
        if not max(self.curve) <= self.start:  # NaN is not
            faults.append(f"rises to {max(self.curve):.4f}, above its start at {self.start:.4f}")
        if not self.curve[-1] < self.start:
            faults.append(f"ends at {self.curve[-1]:.4f}, not below its start at {self.start:.4f}")
        if self.logits_within is not None and not self.logits_within <= LOGIT_TOLERANCE:
            faults.append(f"logits differ by {self.logits_within:.1e}, more than {LOGIT_TOLERANCE:g}")
        return faults


def main(argv: list[str]) -> None:
    """``python -m tools.upcycle_study [--layers 4] [--steps 40]``"""
    config = parse_config(StudyConfig, argv, prog=PROG, description=str(__doc__))
    run = parse_config(RunConfig, ["--config", config.recipe], prog=PROG, description="")
    keys = {name: read_yaml(path).values for name, path in (("recipe", config.recipe), ("plain", config.plain))}
    study = Study(Path(config.output_dir), asdict(config) | {"keys": keys}, Result)
    train_sources(config, run, study.folder)
    results = list[Result]()
    for name, planned in tqdm(plan(config, run).items(), unit="result", disable=None):
        result = study.earlier(name) or study.complete(name, produce(name, planned, config, run, study.folder))
        results.append(result)
        print(table(results), end="", flush=True)
    study.write_report(results, table(results))
    faults = [f"{result.name}: {fault}" for result in results for fault in result.faults()]
    if faults:
        raise SystemExit("\n".join(faults))


def plan(config: StudyConfig, run: RunConfig) -> dict[str, PlannedResult]:
    """Return every result by the name of its folder. A trained source continues at its last learning rate."""
    deeper, width = ("--layers", str(2 * config.layers)), run.model.hidden_size
    half = ("--kv_lora_rank", str(width // 2), "--qk_rope_head_dim", str(width // 2))
    calibrated = ("--calibrate", run.data.train[0].prefix)
    looped = ("--layers", f"1:{1 + config.layers}", "--loops", str(run.model.num_loops))
    last_rate, normed = run.optim.min_lr or run.optim.lr, ("--latent_norm", "true")  # as in docs/LOG.md
    return {
        "stacked": PlannedResult("mla", "depth", (*deeper, "--how", "stack"), last_rate),
        "interleaved": PlannedResult("mla", "depth", (*deeper, "--how", "interleave"), last_rate),
        "latent-full": PlannedResult("mha", "latent", ("--kv_lora_rank", str(width), *normed), last_rate, exact=True),
        "latent-half": PlannedResult("mha", "latent", (*half, *calibrated, *normed), last_rate),
        "looped": PlannedResult("llama", "dense", looped, run.optim.lr),
    }


def train_sources(config: StudyConfig, run: RunConfig, folder: Path) -> None:
    """Train the two models, or resume their training, and save a random Llama beside them."""
    layers = ("--model.num_layers", str(config.layers))
    recipes = {"mla": ("--config", config.recipe), "mha": ("--config", config.recipe, "--config", config.plain)}
    for name, recipe in recipes.items():
        pretrain.main([*recipe, "--output_dir", str(folder / name), *layers])
    if not (folder / "llama").exists():
        partial, corpus = step_folder.create_partial(folder / "llama"), check_corpus(run.data, run.model.vocab_size)
        torch.manual_seed(run.seed)
        model, heads, tokenizer = run.model, run.model.num_attention_heads, corpus.tokenizer
        sizes: dict[str, Any] = {"vocab_size": model.vocab_size, "hidden_size": model.hidden_size}
        sizes |= {"intermediate_size": model.ffn_hidden_size, "max_position_embeddings": model.max_sequence_length}
        sizes |= {"num_hidden_layers": config.layers + 2, "num_attention_heads": heads}
        sizes |= {"num_key_value_heads": heads // 2}
        ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_id") for name in ("bos", "eos", "pad")}
        LlamaForCausalLM(LlamaConfig(**sizes, **ids)).save_pretrained(partial)
        (partial / TOKENIZER).write_bytes(corpus.tokenizer_json)
        step_folder.move_into_place(partial, folder / "llama")


def produce(name: str, planned: PlannedResult, config: StudyConfig, run: RunConfig, folder: Path) -> Result:
    """Convert the source, train the result on, and measure both."""
    source, own, held_out = folder / planned.source, folder / name, run.data.valid[0].prefix
    start, trained_on = own / "start", own / "trained_on"
    if not start.exists():
        key = "--input" if planned.command == "dense" else "--checkpoint"
        own.mkdir(exist_ok=True)
        measured = ("--data", held_out, "--samples", str(config.samples), "--seq_length", str(run.data.seq_length))
        upcycle.main([planned.command, key, str(source), "--output", str(start), *planned.arguments, *measured])
    train_on(planned, config, run, start, trained_on)
    record = json.loads((start / COMPANION_FOLDER / CONVERSIONS).read_text())[-1]
    before, after = record["before"], record["after"]
    groups = process_groups.start(run.seed)
    try:
        tokenizer = check_corpus(run.data, run.model.vocab_size).tokenizer
        batches = read_samples(held_out, config.samples, run.data.seq_length, run.model, tokenizer.sha256, groups)
        steps = sorted(step_folder.steps_in(step_folder.of_run(trained_on)))
        curve = [last_loss(str(step), batches, groups) for step in steps]
        within = logit_difference(source, start, batches[0], groups) if planned.exact else None
    finally:
        process_groups.stop()
    source_loops = len(before["exit_distribution"])
    return Result(name, before["loss_per_depth"][source_loops - 1], after["loss_per_depth"][-1], curve, within)


def train_on(planned: PlannedResult, config: StudyConfig, run: RunConfig, start: Path, output: Path) -> None:
    """Train a result on, or resume that training; ``POINTS`` checkpoints are kept."""
    settings = {
        "output_dir": output,
        "checkpoint.initial": start,
        "checkpoint.initial_optimizer": str(planned.command == "depth").lower(),
        "checkpoint.save_every": config.steps // POINTS,
        "checkpoint.keep": POINTS,
        "optim.train_steps": config.steps,
        "optim.lr": planned.learning_rate,
        "optim.min_lr": 0,
        "optim.schedule": "constant",
        "optim.warmup_steps": WARMUP_STEPS,
        "optim.decay_steps": 0,
        "seed": run.seed + 1,  # other samples than the source began with
    }
    flags = [word for key, value in settings.items() for word in (f"--{key}", str(value))]
    pretrain.main(["--config", config.recipe, "--config", str(start / "config.yaml"), *flags])


def last_loss(step: str, batches: list[Batch], groups: ProcessGroupCollection) -> float:
    """Return a checkpoint's loss at its last loop."""
    state = open_source(step, groups).state
    return float(measure(state, batches, state.config.num_loops, groups)["loss_per_depth"][-1])


def logit_difference(source: Path, result: Path, batch: Batch, groups: ProcessGroupCollection) -> float:
    """Return the largest difference between two models' logits, over all loops, tokens and words."""

    def logits(state: ModelState) -> list[Tensor]:
        model = assemble(state, groups).eval()
        with torch.no_grad():
            output = model(batch.ids_BS, document_start_SB=batch.document_start_SB)
            return [h_SBD @ model.head_weight().T for h_SBD in output.hidden]

    both = [logits(open_source(str(path), groups).state) for path in (source, result)]
    return max(float((a - b).abs().max()) for a, b in zip(*both, strict=True))


def table(results: Sequence[Result]) -> str:
    """Return a row per result: its source's loss, and its own at the start and at each checkpoint."""
    points = len(results[0].curve)
    header = ["", "source", "start", *(f"{n}/{points}" for n in range(1, points + 1)), "logits differ by"]
    rows = []
    for result in results:
        losses = [f"{loss:.4f}" for loss in (result.source, result.start, *result.curve)]
        rows.append([result.name, *losses, "" if result.logits_within is None else f"{result.logits_within:.1e}"])
    return markdown_table(header, rows)


if __name__ == "__main__":
    run_main(main)

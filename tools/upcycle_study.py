"""What upcycling keeps, and that training goes on from it: trained models made into others and trained on.

    python -m tools.upcycle_study        (make upcycle-study; half an hour on two cores)

The sources are a recipe's model, the same with plain attention, both trained, and a random Llama that transformers saved.
Losses are of the last loop, on the same held-out samples for a source, for what is made of it and for each checkpoint on the
way from there. Ends with status 1 where a result rises above its start or does not end below it, or where a conversion at
full rank changes a logit by more than 1e-4. Repeated, the command goes on where it stood.
"""

import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from looplm.checkpoint import COMPANION_FOLDER, step_folder
from looplm.cli import UserError, parse_config, require, run_main
from looplm.config import RunConfig
from looplm.files import write_whole
from looplm.huggingface.companion_files import TOKENIZER
from looplm.megatron import process_groups
from pretrain import train as pretrain
from pretrain.data import Batch, check_corpus
from tools import upcycle
from tools.upcycling.measure import Sample, measure
from tools.upcycling.parts import RECORD, Parts, assemble, open_source

SOURCES = ("mla", "mha", "llama")
POINTS = 8  # checkpoints that are measured while a result is trained on
WARMUP_STEPS = 5  # some results have no moments: Adam's first steps would be as long as the learning rate lets them
LOGITS_WITHIN = 1e-4


@dataclass(frozen=True, kw_only=True)
class StudyConfig:
    """What is made of what.

    Args:
        recipe: YAML file of the sources' training, as for pretrain.train, with latent attention.
        plain: on top of it, plain attention.
        output_dir: a folder per source and per result, study.json and table.md go here.
        layers: of the sources; upcycled in depth they have twice as many.
        steps: that each result is trained on, a multiple of 8.
        samples: held-out sequences that losses are measured on.
    """

    recipe: str = "configs/quickstart/pretrain.yaml"
    plain: str = "configs/upcycle-study/mha.yaml"
    output_dir: str = "runs/upcycle_study"
    layers: int = 4
    steps: int = 40
    samples: int = 32

    def __post_init__(self) -> None:
        require(self.steps > 0 and self.steps % POINTS == 0, "steps", self.steps, f"give a multiple of {POINTS}")


class Case(NamedTuple):
    """A kind of upcycling: from which source, with what words after its first, and how fast it is trained on."""

    source: str
    kind: str
    arguments: tuple[str, ...]
    learning_rate: float
    exact: bool = False


class Result(NamedTuple):
    """What was measured of one case. Losses in nats per token; ``curve`` has one per checkpoint, in order."""

    name: str
    source: float
    start: float
    curve: list[float]
    logits_within: float | None = None  # largest difference to the source's, over all loops; None where not exact

    def faults(self) -> list[str]:
        """What did not hold, in words."""
        found = []
        if not max(self.curve) <= self.start:  # NaN is not
            found.append(f"rises to {max(self.curve):.4f}, above its start at {self.start:.4f}")
        if not self.curve[-1] < self.start:
            found.append(f"ends at {self.curve[-1]:.4f}, not below its start at {self.start:.4f}")
        if self.logits_within is not None and not self.logits_within <= LOGITS_WITHIN:
            found.append(f"logits differ by {self.logits_within:.1e}, more than {LOGITS_WITHIN:g}")
        return found


def main(argv: list[str]) -> None:
    """``python -m tools.upcycle_study [--layers 4] [--steps 40]``"""
    config = parse_config(StudyConfig, argv, prog="python -m tools.upcycle_study", description=str(__doc__))
    run = parse_config(RunConfig, ["--config", config.recipe], prog="python -m tools.upcycle_study", description="")
    folder = Path(config.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    refuse_other_settings(folder / "settings.json", asdict(config))
    train_sources(config, run, folder)
    results = []
    for name, case in cases(config, run).items():
        results.append(earlier_result(folder / name) or make(name, case, config, run, folder))
        print(table(results), end="", flush=True)
    write_whole(folder / "table.md", table(results))
    faults = [f"{result.name}: {fault}" for result in results for fault in result.faults()]
    if faults:
        raise SystemExit("\n".join(faults))


def cases(config: StudyConfig, run: RunConfig) -> dict[str, Case]:
    """Every result by its folder's name. A trained one goes on at the learning rate where its source stood."""
    deeper, width = ("--layers", str(2 * config.layers)), run.model.hidden_size
    half = ("--kv_lora_rank", str(width // 2), "--qk_rope_head_dim", str(width // 2))
    calibrated = ("--calibrate", run.data.train[0].prefix)
    slow, fast = run.optim.min_lr or run.optim.lr, run.optim.lr
    return {
        "stacked": Case("mla", "depth", (*deeper, "--how", "stack"), slow),
        "interleaved": Case("mla", "depth", (*deeper, "--how", "interleave"), slow),
        "latent-full": Case("mha", "latent", ("--kv_lora_rank", str(width)), slow, exact=True),
        "latent-half": Case("mha", "latent", (*half, *calibrated), slow),
        "looped": Case("llama", "dense", ("--layers", f"1:{1 + config.layers}", "--loops", str(run.model.num_loops)), fast),
    }  # fmt: skip


def refuse_other_settings(path: Path, settings: dict[str, Any]) -> None:
    """A folder is of one study: results of other settings would be taken for this one's."""
    if path.exists() and json.loads(path.read_text()) != settings:
        raise UserError(f"{path}: a study of other settings lies here; name another --output_dir")
    write_whole(path, json.dumps(settings, indent=1))


def train_sources(config: StudyConfig, run: RunConfig, folder: Path) -> None:
    """Train the two models, or go on training them, and save a random Llama beside them."""
    layers = ("--model.num_layers", str(config.layers))
    recipes = {"mla": ("--config", config.recipe), "mha": ("--config", config.recipe, "--config", config.plain)}
    for name, recipe in recipes.items():
        pretrain.main([*recipe, "--output_dir", str(folder / name), *layers])
    if not (folder / "llama").exists():
        partial, corpus = step_folder.create_partial(folder / "llama"), check_corpus(run.data, run.model.vocab_size)
        torch.manual_seed(run.seed)
        LlamaForCausalLM(
            LlamaConfig(
                vocab_size=run.model.vocab_size,
                hidden_size=run.model.hidden_size,
                intermediate_size=run.model.ffn_hidden_size,
                num_hidden_layers=config.layers + 2,
                num_attention_heads=run.model.num_attention_heads,
                num_key_value_heads=run.model.num_attention_heads // 2,
                max_position_embeddings=run.model.max_sequence_length,
                bos_token_id=corpus.bos_id,
                eos_token_id=corpus.eos_id,
                pad_token_id=corpus.pad_id,
            )
        ).save_pretrained(partial)
        shutil.copyfile(corpus.tokenizer, partial / TOKENIZER)
        step_folder.move_into_place(partial, folder / "llama")


def make(name: str, case: Case, config: StudyConfig, run: RunConfig, folder: Path) -> Result:
    """Upcycle, train on and measure."""
    source, own = folder / case.source, folder / name
    start, goes_on, held_out = own / "start", own / "goes_on", run.data.valid[0].prefix
    if not start.exists():
        given = "--input" if case.kind == "dense" else "--checkpoint"
        own.mkdir(exist_ok=True)
        measured = ("--data", held_out, "--samples", str(config.samples), "--seq_length", str(run.data.seq_length))
        upcycle.main([case.kind, given, str(source), "--output", str(start), *case.arguments, *measured])
    train_on(case, config, run, start, goes_on)
    steps = sorted(step_folder.steps_in(goes_on / "checkpoints"))
    record = json.loads((start / COMPANION_FOLDER / RECORD).read_text())[-1]
    before, after = record["before"], record["after"]
    groups = process_groups.start(run.seed)
    try:
        sample = Sample(held_out, config.samples, run.data.seq_length)
        batches = sample.read(run.model, check_corpus(run.data, run.model.vocab_size).tokenizer_sha256, groups)
        curve = [last_loss(str(step), batches, groups) for step in steps]
        within = logit_difference(source, start, batches[0], groups) if case.exact else None
    finally:
        process_groups.stop()
    loops = len(before["exit_distribution"])  # of the source
    result = Result(name, before["loss_per_depth"][loops - 1], after["loss_per_depth"][-1], curve, within)
    write_whole(own / "result.json", json.dumps(result._asdict(), indent=1))  # last: a case without it is not done
    return result


def train_on(case: Case, config: StudyConfig, run: RunConfig, start: Path, goes_on: Path) -> None:
    """Train a result, or go on training it; ``POINTS`` checkpoints stay."""
    settings = {
        "output_dir": goes_on,
        "checkpoint.initial": start,
        "checkpoint.initial_optimizer": str(case.kind == "depth").lower(),
        "checkpoint.save_every": config.steps // POINTS,
        "checkpoint.keep": POINTS,
        "optim.train_steps": config.steps,
        "optim.lr": case.learning_rate,
        "optim.min_lr": 0,
        "optim.schedule": "constant",
        "optim.warmup_steps": WARMUP_STEPS,
        "optim.decay_steps": 0,
        "seed": run.seed + 1,  # other samples than the source began with
    }
    words = [word for key, value in settings.items() for word in (f"--{key}", str(value))]
    pretrain.main(["--config", config.recipe, "--config", str(start / "config.yaml"), *words])


def earlier_result(own: Path) -> Result | None:
    """What a finished case has written."""
    path = own / "result.json"
    return Result(**json.loads(path.read_text())) if path.exists() else None


def last_loss(step: str, batches: list[Batch], groups: ProcessGroupCollection) -> float:
    """Of the last loop."""
    parts = open_source(step, groups).parts
    return float(measure(parts, batches, parts.model.num_loops, groups)["loss_per_depth"][-1])


def logit_difference(source: Path, result: Path, batch: Batch, groups: ProcessGroupCollection) -> float:
    """The largest, over all loops, tokens and words."""

    def logits(parts: Parts) -> list[Tensor]:
        model = assemble(parts, groups).eval()
        with torch.no_grad():
            output = model(batch.ids_BS, document_start_SB=batch.document_start_SB)
            return [h_SBD @ model.head_weight().T for h_SBD in output.hidden]

    both = [logits(open_source(str(path), groups).parts) for path in (source, result)]
    return max(float((a - b).abs().max()) for a, b in zip(*both, strict=True))


def table(results: Sequence[Result]) -> str:
    """A row per result: its source's loss, its own at the start and at each checkpoint."""
    points = len(results[0].curve)
    lines = [
        "| | source | start | " + " | ".join(f"{n}/{points}" for n in range(1, points + 1)) + " | logits differ by |"
    ]
    lines.append("|" + "---|" * (points + 4))
    for result in results:
        losses = " | ".join(f"{loss:.4f}" for loss in (result.source, result.start, *result.curve))
        lines.append(f"| {result.name} | {losses} | {'' if result.logits_within is None else f'{result.logits_within:.1e}'} |")  # fmt: skip
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    run_main(main)

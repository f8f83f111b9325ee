"""The model card (``README.md``) of an export: sizes, how to load it, data, recipe, and measurements.

It contains nothing but what the checkpoint records.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path

import torch

from looplm.accounting import parameter_counts
from looplm.checkpoint import About, OpenedModel, read_config
from looplm.config import ModelConfig, RunConfig
from looplm.evaluation.record import FILE_NAME, Evaluation
from looplm.failures import UserError
from looplm.huggingface.config_json import HFDescription

_HEAD = """---
library_name: transformers
pipeline_tag: text-generation
tags:
- looped-transformer
- early-exit
---
"""


def model_card(name: str, opened: OpenedModel, description: HFDescription, dtype: torch.dtype) -> str:
    """Return the card of an export called ``name``."""
    run, evaluation = read_config(opened.folder), _evaluation_of(opened.folder)
    parts = [_HEAD, f"# {name}", _sizes(description, dtype), _loading(description)]
    parts += _training(run, opened.about) if run is not None else []
    parts += _measurements(evaluation) if evaluation is not None else []
    return "\n\n".join(part.strip("\n") for part in parts) + "\n"


def _sizes(description: HFDescription, dtype: torch.dtype) -> str:
    _, model, gate, gate_trained, _ = description
    count = sum(parameter_counts(model, gate).values())
    attention = {
        "mla": f"latent (MLA), a latent of {model.kv_lora_rank}" + ("" if model.kv_latent_norm else " without a norm"),
        "mha": f"{model.query_groups} key-value heads",
    }
    gates = {"none": "", "head": ", a sigmoid gate on each head's output", "element": ", a sigmoid gate on its output"}
    rows = [
        ("parameters", f"{count:,} ({str(dtype).removeprefix('torch.')})"),
        ("layers x loops", f"{model.num_layers} x {model.num_loops}, the same weights in every loop"),
        *_around_loops(model),
        ("hidden, feed-forward", f"{model.hidden_size:,}, {model.ffn_hidden_size:,}"),
        ("attention", f"{model.num_attention_heads} heads, {attention[model.attention]}{gates[model.attention_gate]}"),
        *_latent_reasoning(model),
        ("vocabulary", f"{model.vocab_size:,}"),
        ("context", f"{model.max_sequence_length:,} tokens, RoPE base {model.rope_base:,.0f}"),
        ("exit gate", f"{gate.kind}, {'trained' if gate_trained else 'untrained'}"),
    ]
    return (
        "A looped language model: one stack of transformer blocks runs several times before a token is predicted, and "
        "an exit gate says after each loop how likely the token is to leave.\n\n" + _table(("", ""), rows)
    )


def _around_loops(model: ModelConfig) -> list[tuple[str, str]]:
    """Return the rows of a model with layers outside the loops, a norm for the read-out alone, or other loop inputs."""
    rows = []
    if model.unlooped_layers:
        rows.append(("layers of their own", f"{model.prelude_layers} before the loops, {model.coda_layers} after them"))
    if model.loop_norm == "readout":
        rows.append(("norm at a loop's end", "for the read-out alone; the next loop reads the residual stream"))
    if model.injection != "none":
        rows.append(("injection", f"{model.injection}: later loops read what entered the first one again"))
    if model.step_embedding != "none":
        rows.append(("step embedding", f"{model.step_embedding}: a vector of each loop is added before it"))
    return rows


def _latent_reasoning(model: ModelConfig) -> list[tuple[str, str]]:
    """Return the row of a model whose latent is refined."""
    if not model.latent_iterations:
        return []
    halting = ", weighed by a probability of stopping at each" if model.latent_halting else ""
    return [("latent reasoning", f"{model.latent_iterations} steps of a GRU cell refine the latent{halting}")]


def _loading(description: HFDescription) -> str:
    return f"""## Loading

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("PATH", trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained("PATH", trust_remote_code=True)  # it reads config.json first
```

The layout is `{description.hf_layout}`; `auto_map` in config.json names its code. `total_ut_steps` is the number \
of loops, `early_exit_threshold` the summed exit probability at which a token leaves (1 runs all loops)."""


def _training(run: RunConfig, about: About) -> list[str]:
    optim, loss, data = run.optim, run.loss, run.data
    whole = sum(source.weight for source in data.train)
    sources = [(f"`{Path(source.prefix).name}`", f"{source.weight / whole:.1%}") for source in data.train]
    if data.task is not None:
        sources = [(f"the synthetic task `{data.task.name}`, made while training", "100.0%")]
    rates = f"lr {optim.lr:g}, {optim.schedule} to {optim.min_lr:g}, betas {optim.beta1:g}, {optim.beta2:g}"
    recipe = [
        ("stage", loss.objective + (f", beta {loss.beta:g}" if loss.objective == "entropy_regularised" else "")),
        ("steps, tokens", f"{about.step:,}, {about.tokens:,}"),
        ("batch, sequence", f"{data.global_batch_size} sequences of {data.seq_length:,} tokens"),
        ("AdamW", f"{rates}, weight decay {optim.weight_decay:g}, clip {optim.clip_grad:g}"),
        ("precision", optim.precision),
        ("started from", f"`{Path(run.checkpoint.initial).name}`" if run.checkpoint.initial else "random weights"),
        ("software", ", ".join(f"{name} {version}" for name, version in about.versions.items() if version != "absent")),
        ("code", f"LoopLM {about.git_revision or 'of a revision that was not recorded'}"),
    ]
    return [
        "## Data of the last stage\n\n" + _table(("source", "share of the samples"), sources),
        "## Recipe of the last stage\n\n" + _table(("", ""), recipe),
    ]


def _measurements(evaluation: Evaluation) -> list[str]:
    depths = []
    for row in evaluation.depths:
        beyond = " (beyond training)" if row.depth > evaluation.trained_loops else ""
        depths.append((f"{row.depth}{beyond}", f"{row.loss:.4f}", f"{row.perplexity:.2f}"))
    curve = [(f"{row.threshold:g}", f"{row.mean_depth:.2f}", f"{row.loss:.4f}") for row in evaluation.exit_curve]
    read = ", ".join(f"`{Path(source).name}`" for source in evaluation.data)
    tokens = f"{evaluation.tokens:,} tokens of {read}" if read else f"{evaluation.tokens:,} validation tokens"
    return [
        f"## Measured on {tokens}\n\nEvery token runs to one depth:\n\n"
        + _table(("depth (loops)", "loss", "perplexity"), depths)
        + "\n\nEach token leaves at the first loop by which its summed exit probability reaches the threshold:\n\n"
        + _table(("threshold", "mean depth", "loss"), curve),
    ]


def _evaluation_of(step: Path) -> Evaluation | None:
    """Return the evaluation.json of this checkpoint, from its run's directory or the one above."""
    step = step.resolve()
    for folder in (step, *step.parents[1:3]):
        try:
            evaluation = Evaluation.read(folder / FILE_NAME)
        except UserError:
            continue
        if Path(evaluation.checkpoint).parts[-3:] == step.parts[-3:]:  # the run may have been moved
            return evaluation
    return None


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows))

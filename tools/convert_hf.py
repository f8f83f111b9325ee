"""Import and export Hugging Face directories.

python -m tools.convert_hf import  --input HF_DIR --output DIR       weights for checkpoint.initial, evaluate, generate
python -m tools.convert_hf export  --checkpoint DIR --output HF_DIR  in Ouro's layout if that holds the model
python -m tools.convert_hf inspect --input DIR                       show what a directory of either kind holds
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from tokenizers import Tokenizer

from looplm import checkpoint
from looplm.bounds import check_bounds, path_field, positive
from looplm.checkpoint import step_folder
from looplm.checkpoint.new_folder import making
from looplm.cli import parse_command, run_main
from looplm.encoding import begin_id, read_tokenizer, unlike_transformers
from looplm.huggingface.companion_files import names_sharing_an_id
from looplm.huggingface.convert import choose_hf_layout, examine, export_model, import_source, with_tokens
from looplm.huggingface.inventory import inspect
from looplm.megatron import process_groups

GB = 10**9


@dataclass(frozen=True, kw_only=True)
class ImportConfig:
    """Convert a Hugging Face directory to a checkpoint of weights alone.

    Args:
        input: the directory with config.json, safetensors and tokenizer.json, in Ouro's layout or ours.
        output: directory to create.
        tokenizer: a tokenizer.json to use instead of the directory's own.
        bos_token: the token that begins a text; null takes the directory's.
        eos_token: the token that ends a text; null takes the directory's.
        pad_token: the token for padding; null takes the directory's.
    """

    input: Path
    output: Path
    tokenizer: Path | None = None
    bos_token: str | None = None
    eos_token: str | None = None
    pad_token: str | None = None


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """Convert a checkpoint of any parallel layout to a Hugging Face directory.

    Args:
        checkpoint: a training directory (its newest checkpoint is used), a step directory, or imported weights.
        output: directory to create.
        layout: ouro (for Ouro's own code; vLLM up to 0.26), looplm (every model; its code is written beside it),
            or auto: ouro if it holds the model.
        dtype: dtype of the weights; null keeps the checkpoint's.
        max_shard_gb: largest size of a weight file, in units of 1e9 bytes.
    """

    checkpoint: str = path_field()
    output: Path
    layout: Literal["auto", "ouro", "looplm"] = "auto"
    dtype: Literal["float32", "bfloat16"] | None = None
    max_shard_gb: float = positive(4.0, at_most=1_000_000)

    def __post_init__(self) -> None:
        check_bounds(self, "")


@dataclass(frozen=True, kw_only=True)
class InspectConfig:
    """Show what a directory holds, without reading its weights.

    Args:
        input: a Hugging Face directory, a training directory, or a step directory.
    """

    input: Path


def main(argv: list[str]) -> None:
    """``python -m tools.convert_hf import|export|inspect ...``"""
    commands = {"import": ImportConfig, "export": ExportConfig, "inspect": InspectConfig}
    prog = "python -m tools.convert_hf"
    _, config = parse_command(commands, argv or ["--help"], prog=prog, description=str(__doc__))
    if isinstance(config, InspectConfig):
        print(inspect(config.input))
        return
    with making(config.output):
        (_import if isinstance(config, ImportConfig) else _export)(config)
    print(inspect(config.output))


def _import(config: ImportConfig) -> None:
    source = examine(config.input, config.tokenizer)
    source = with_tokens(source, {name: getattr(config, f"{name}_token") for name in ("bos", "eos", "pad")})
    groups = process_groups.start(seed=0)
    try:
        left_behind = import_source(source, config.output, groups)
    finally:
        process_groups.stop()
    shared = " and ".join(names_sharing_an_id(source.description.ids))
    if shared:
        _warn(f"{shared} are one token; data made with this tokenizer need tokens of their own (--pad_token)")
    tokenizer = read_tokenizer(source.tokenizer)
    _warn_of_texts(tokenizer, begin_id(tokenizer))
    if left_behind:
        _warn(f"left behind: {', '.join(left_behind)}")


def _export(config: ExportConfig) -> None:
    step = step_folder.locate(config.checkpoint)
    hf_layout = choose_hf_layout(config.layout, checkpoint.read_model(step))
    groups = process_groups.start(seed=0)
    try:
        opened = checkpoint.open_step(step, groups, dtype=None)
        dtype = None if config.dtype is None else getattr(torch, config.dtype)
        export_model(opened, config.output, hf_layout, dtype, int(config.max_shard_gb * GB))
        _warn_of_texts(opened.tokenizer, opened.about.begin_id)
    finally:
        process_groups.stop()


def _warn_of_texts(tokenizer: Tokenizer, begin: int | None) -> None:
    difference = unlike_transformers(tokenizer, begin)
    if difference is not None:
        _warn(f"tokenizer.json: {difference}")


def _warn(message: str) -> None:
    print(f"note: {message}", file=sys.stderr)


if __name__ == "__main__":
    run_main(main)

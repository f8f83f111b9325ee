"""Hugging Face directories in and out.

python -m tools.convert_hf import  --input HF_DIR --output DIR          a checkpoint of weights alone: name it in
                                                                        checkpoint.initial, evaluate it, generate with it
python -m tools.convert_hf export  --checkpoint DIR --output HF_DIR     in Ouro's layout where that holds the model
python -m tools.convert_hf inspect --input DIR                          what either kind of directory holds

Each has its own --help.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from looplm import checkpoint
from looplm.checkpoint import step_folder
from looplm.cli import UserError, parse_config, require, run_main
from looplm.huggingface.companion_files import names_sharing_an_id
from looplm.huggingface.convert import choose_layout, examine, export_model, import_source, with_tokens
from looplm.huggingface.inventory import inspect
from looplm.megatron import process_groups

GB = 10**9


@dataclass(frozen=True, kw_only=True)
class ImportConfig:
    """Make a checkpoint of weights alone from a Hugging Face directory.

    Args:
        input: the directory: config.json, safetensors and tokenizer.json, in Ouro's layout or our own.
        output: directory to make.
        tokenizer: a tokenizer.json in place of the directory's own.
        bos_token: the token that begins a text; null takes what the directory says.
        eos_token: the token that ends a text; null takes what the directory says.
        pad_token: the token that fills up; null takes what the directory says.
    """

    input: str
    output: str
    tokenizer: str | None = None
    bos_token: str | None = None
    eos_token: str | None = None
    pad_token: str | None = None


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """Make a Hugging Face directory from a checkpoint, at whatever layout it was trained.

    Args:
        checkpoint: a training directory (its newest checkpoint is taken), a step directory, or imported weights.
        output: directory to make.
        layout: ouro (Ouro's own code and vLLM read it), looplm (any model; its code is written beside it), or auto:
            ouro where it holds the model.
        dtype: of the weights; null keeps the checkpoint's.
        max_shard_gb: largest file of weights, in units of 1e9 bytes.
    """

    checkpoint: str
    output: str
    layout: Literal["auto", "ouro", "looplm"] = "auto"
    dtype: Literal["float32", "bfloat16"] | None = None
    max_shard_gb: float = 4.0

    def __post_init__(self) -> None:
        require(self.max_shard_gb > 0, "max_shard_gb", self.max_shard_gb, "give a number above 0")


@dataclass(frozen=True, kw_only=True)
class InspectConfig:
    """Show what a directory holds, without its weights being read.

    Args:
        input: a Hugging Face directory, a training directory, or a step directory.
    """

    input: str


def main(argv: list[str]) -> None:
    """``python -m tools.convert_hf import|export|inspect ...``"""
    verbs: dict[str, Callable[[list[str]], None]] = {"import": _import, "export": _export, "inspect": _inspect}
    if not argv or argv[0] in ("-h", "--help"):
        print(__doc__)
        return
    if argv[0] not in verbs:
        raise UserError(f"{argv[0]}: no such command; give one of {', '.join(verbs)}")
    verbs[argv[0]](argv[1:])


def _import(argv: list[str]) -> None:
    config = parse_config(ImportConfig, argv, prog="python -m tools.convert_hf import", description=str(__doc__))
    _refuse_existing(config.output)
    source = examine(Path(config.input), None if config.tokenizer is None else Path(config.tokenizer))
    source = with_tokens(source, {name: getattr(config, f"{name}_token") for name in ("bos", "eos", "pad")})
    groups = process_groups.start(seed=0)
    try:
        left = import_source(source, Path(config.output), groups)
    finally:
        process_groups.stop()
    shared = names_sharing_an_id(source.described.ids)
    if shared:
        _warn(
            f"{' and '.join(shared)} are one token; data made with this tokenizer need tokens of their own (--pad_token)"
        )
    if left:
        _warn(f"left behind: {', '.join(left)}")
    print(inspect(Path(config.output)))


def _export(argv: list[str]) -> None:
    config = parse_config(ExportConfig, argv, prog="python -m tools.convert_hf export", description=str(__doc__))
    _refuse_existing(config.output)
    found = step_folder.locate(config.checkpoint)
    layout = choose_layout(config.layout, checkpoint.read_model(found))
    groups = process_groups.start(seed=0)
    try:
        opened = checkpoint.open_model(str(found), groups, dtype=None)
        dtype = None if config.dtype is None else getattr(torch, config.dtype)
        export_model(opened, Path(config.output), layout, dtype, int(config.max_shard_gb * GB))
    finally:
        process_groups.stop()
    print(inspect(Path(config.output)))


def _inspect(argv: list[str]) -> None:
    config = parse_config(InspectConfig, argv, prog="python -m tools.convert_hf inspect", description=str(__doc__))
    print(inspect(Path(config.input)))


def _refuse_existing(output: str) -> None:
    require(not Path(output).exists(), "output", output, "it exists already; name a directory to make")


def _warn(message: str) -> None:
    print(f"note: {message}", file=sys.stderr)


if __name__ == "__main__":
    run_main(main)

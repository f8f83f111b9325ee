"""Speed of decoding: with and without a cache, with drafts, against Hugging Face; absorbed against expanded MLA.

Hugging Face's ``generate`` runs the same weights on the same prompts, with the code that travels in an export.
"""

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from looplm.checkpoint import OpenedModel
from looplm.huggingface.config_json import LOOPLM
from looplm.huggingface.convert import export_model
from looplm.inference import GenerationConfig
from looplm.inference.attention import CachedLatentAttention
from looplm.megatron import device
from looplm.model import LoopLM
from tools.bench.early_exit import BATCHES, CACHE, NEW, PROMPT, Workload
from tools.bench.endless import endless_generator
from tools.bench.timing import PrepareRun, print_speeds, rates

LANES, ENTRIES = 16, 512
GREEDY = GenerationConfig(temperature=0.0, max_new_tokens=NEW)
DRAFTS = 3  # tokens that are drafted at a time


def bench_decode(workload: Workload, repeats: int) -> None:
    """Print the speed of every way of decoding."""
    model, prompts = workload.model, [list(text[:PROMPT]) for text in workload.texts]
    print(f"\ndecoding, fp32, {model.model_config.num_layers} layers: prompts of {PROMPT} tokens, {NEW} new ones")
    print_speeds("batch 1, a cache for each loop", rates(_caches(model, prompts[:1]), NEW, repeats))
    if workload.opened is not None:
        with tempfile.TemporaryDirectory() as folder:
            exported = _export(workload.opened, Path(folder) / "export")
        for rows in BATCHES:
            contenders = _generators(workload, exported, [prompts[row % len(prompts)] for row in range(rows)])
            print_speeds(f"batch {rows}, against Hugging Face", rates(contenders, rows * NEW, repeats))
        if (config := _drafted(model)) is not None:
            generations = endless_generator(model).generate(prompts[: max(BATCHES)], config)
            drafted, accepted = (sum(getattr(one, key) for one in generations) for key in ("drafted", "accepted"))
            kept = f"{accepted} of {drafted} drafted tokens are accepted, {accepted / drafted:.0%}"
            print(f"  {kept} ({DRAFTS} at a time, by {config.draft_depth} loops)")
    if model.model_config.attention == "mla":
        title = f"one layer's attention, {LANES} tokens over {ENTRIES} entries"
        print_speeds(title, rates(_attentions(model), LANES, repeats))


def _caches(model: LoopLM, prompts: list[list[int]]) -> dict[str, PrepareRun]:
    """Return decoding without a cache, with one, and with drafts if there are loops to leave out."""

    @torch.no_grad()
    def decode_without_cache() -> None:
        ids = list(prompts[0])
        for _ in range(NEW):
            h_1D = model(torch.tensor([ids], device=device.DEVICE)).hidden[-1][-1]
            ids.append(int(F.linear(h_1D, model.head_weight()).argmax()))

    ways: dict[str, PrepareRun] = {
        "without a cache": lambda: decode_without_cache,
        "with a cache": _generation(model, prompts, GREEDY),
    }
    drafted = _drafted(model)
    return ways if drafted is None else ways | {"and drafts": _generation(model, prompts, drafted)}


def _drafted(model: LoopLM) -> GenerationConfig | None:
    """Return decoding with drafts of at most two loops; None for a model of one loop."""
    loops = model.model_config.num_loops
    return replace(GREEDY, speculate=DRAFTS, draft_depth=min(2, loops - 1)) if loops > 1 else None


def _export(opened: OpenedModel, folder: Path) -> Any:
    """Export the weights, and return them as a model of transformers."""
    export_model(opened, folder, LOOPLM, None, 1 << 40)
    logging.disable_progress_bar()
    exported: Any = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    exported.generation_config.eos_token_id = None  # every text has the same length
    return exported.to(device.DEVICE).eval()


def _generators(workload: Workload, exported: Any, prompts: list[list[int]]) -> dict[str, PrepareRun]:
    """Return greedy decoding by transformers, by us, and by us with early exit."""
    ids_BS = torch.tensor(prompts, device=device.DEVICE)
    early = replace(GREEDY, kv_cache=CACHE, exit_threshold=workload.rule.threshold)

    @torch.no_grad()
    def transformers_generate() -> None:
        exported.generate(ids_BS, attention_mask=torch.ones_like(ids_BS), max_new_tokens=NEW, do_sample=False)

    return {
        "Hugging Face generate": lambda: transformers_generate,
        "ours, full depth": _generation(workload.model, prompts, GREEDY),
        "ours, early exit": _generation(workload.model, prompts, early),
    }


def _generation(model: LoopLM, prompts: list[list[int]], config: GenerationConfig) -> PrepareRun:
    return lambda: lambda: endless_generator(model).generate(prompts, config)


def _attentions(model: LoopLM) -> dict[str, PrepareRun]:
    """Return attention over cached entries: expanded to heads, or absorbed, in the latent space."""
    config = model.model_config
    attention = CachedLatentAttention(model.decoder.layers[0].self_attention, config)
    nope = torch.randn(1, LANES, config.num_attention_heads, config.qk_nope_head_dim, device=device.DEVICE)
    rope = torch.randn(1, LANES, config.num_attention_heads, config.qk_rope_head_dim, device=device.DEVICE)
    entry_NTW = torch.randn(LANES, ENTRIES, config.kv_lora_rank + config.qk_rope_head_dim, device=device.DEVICE)
    mask_11ST = torch.zeros(1, 1, 1, ENTRIES, device=device.DEVICE)

    @torch.inference_mode()
    def absorbed() -> Tensor:
        return attention.attend_cached((nope, rope), entry_NTW, None)

    @torch.inference_mode()
    def expanded() -> Tensor:
        return attention.attend_prompt((nope, rope), entry_NTW.transpose(0, 1), mask_11ST)

    return {"expanded": lambda: expanded, "absorbed": lambda: absorbed}

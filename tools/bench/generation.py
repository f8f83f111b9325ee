"""Speed of decoding: with a cache against without, with drafts, against Hugging Face; absorbed against expanded MLA.

Hugging Face's ``generate`` runs the same weights, exported with the code that travels with them, on the same prompts.
"""

import tempfile
from collections.abc import Callable, Sequence
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
from looplm.inference.attention import LatentAttention
from looplm.inference.generator import GenerationConfig, Generator
from looplm.megatron import device
from looplm.model import LoopLM
from tools.bench.early_exit import BATCHES, CACHE, NEW, PROMPT, Setting
from tools.bench.timing import Prepare, show, timed

LANES, SPAN = 16, 512
GREEDY = GenerationConfig(temperature=0.0, max_new_tokens=NEW)
DRAFTED = replace(GREEDY, speculate=3, draft_depth=2)


def bench_decode(setting: Setting, repeats: int) -> None:
    """Print the tables; everything in turns, from the median."""
    model, prompts = setting.model, [list(text[:PROMPT]) for text in setting.texts]
    print(f"\ndecoding, fp32, {model.model_config.num_layers} layers: prompts of {PROMPT} tokens, {NEW} new ones")
    show("batch 1, a cache for each loop", timed(_caches(model, prompts[:1]), NEW, repeats))
    if setting.opened is not None:
        with tempfile.TemporaryDirectory() as folder:
            exported = _exported(setting.opened, Path(folder) / "export")
        for rows in BATCHES:
            side_by_side = [prompts[row % len(prompts)] for row in range(rows)]
            show(
                f"batch {rows}, against Hugging Face",
                timed(_against(setting, exported, side_by_side), rows * NEW, repeats),
            )
        generations = _generator(model).generate(prompts[: max(BATCHES)], DRAFTED)
        drafted, accepted = (sum(getattr(one, key) for one in generations) for key in ("drafted", "accepted"))
        kept = f"{accepted} of {drafted} drafted tokens stand the check, {accepted / drafted:.0%}"
        print(f"  {kept} ({DRAFTED.speculate} at a time, by {DRAFTED.draft_depth} loops)")
    if model.model_config.attention == "mla":
        title = f"one layer's attention, {LANES} tokens over {SPAN} entries"
        show(title, timed(_attentions(model), LANES, repeats))


def _caches(model: LoopLM, prompts: list[list[int]]) -> dict[str, Prepare]:
    """Without a cache, and with one."""

    @torch.no_grad()
    def cacheless() -> None:
        ids = list(prompts[0])
        for _ in range(NEW):
            h_1D = model(torch.tensor([ids], device=device.DEVICE)).hidden[-1][-1]
            ids.append(int(F.linear(h_1D, model.head_weight()).argmax()))

    return {
        "without a cache": lambda: cacheless,
        "with a cache": _ours(model, prompts, GREEDY),
        "and drafts": _ours(model, prompts, DRAFTED),
    }


def _exported(opened: OpenedModel, folder: Path) -> Any:
    """The same weights as transformers runs them."""
    export_model(opened, folder, LOOPLM, None, 1 << 40)
    logging.disable_progress_bar()
    exported: Any = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    exported.generation_config.eos_token_id = None  # every text has the same length
    return exported.to(device.DEVICE).eval()


def _against(setting: Setting, exported: Any, prompts: list[list[int]]) -> dict[str, Prepare]:
    """Greedy text from both, and from ours with what it is made for."""
    ids_BS = torch.tensor(prompts, device=device.DEVICE)

    @torch.no_grad()
    def theirs() -> None:
        with device.adapter_off():
            exported.generate(ids_BS, attention_mask=torch.ones_like(ids_BS), max_new_tokens=NEW, do_sample=False)

    return {
        "Hugging Face generate": lambda: theirs,
        "ours, full depth": _ours(setting.model, prompts, GREEDY),
        "ours, early exit": _ours(
            setting.model, prompts, replace(GREEDY, kv_cache=CACHE, exit_threshold=setting.rule.threshold)
        ),
    }


def _ours(model: LoopLM, prompts: list[list[int]], config: GenerationConfig) -> Prepare:
    return lambda: lambda: _generator(model).generate(prompts, config)


def _generator(model: LoopLM) -> Generator:
    """One whose texts do not end early."""
    return Generator(model, _NoText(), eos_id=-1)  # type: ignore[arg-type]


class _NoText:
    """A tokenizer for ids that nobody reads."""

    def decode(self, ids: Sequence[int]) -> str:
        return ""


def _attentions(model: LoopLM) -> dict[str, Prepare]:
    """A token over cached entries: in the latent space, or with every entry expanded to heads."""
    shape = model.model_config
    attention = LatentAttention(model.decoder.layers[0].self_attention, shape)
    nope = torch.randn(1, LANES, shape.num_attention_heads, shape.qk_nope_head_dim, device=device.DEVICE)
    rope = torch.randn(1, LANES, shape.num_attention_heads, shape.qk_rope_head_dim, device=device.DEVICE)
    entry_NTW = torch.randn(LANES, SPAN, shape.kv_lora_rank + shape.qk_rope_head_dim, device=device.DEVICE)
    visible_11ST = torch.zeros(1, 1, 1, SPAN, device=device.DEVICE)

    @torch.inference_mode()
    def absorbed() -> Tensor:
        return attention.attend_cached((nope, rope), entry_NTW, None)

    @torch.inference_mode()
    def expanded() -> Tensor:
        return attention.attend_prompt((nope, rope), entry_NTW.transpose(0, 1), visible_11ST)

    contenders: dict[str, Callable[[], Tensor]] = {"expanded": expanded, "absorbed": absorbed}
    return {name: lambda run=run: run for name, run in contenders.items()}  # type: ignore[misc]

"""Speed of decoding: with a cache against without, absorbed against expanded MLA."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from looplm import device
from looplm.inference.attention import LatentAttention
from looplm.inference.generate import GenerationConfig, Generator
from looplm.model import LoopLM
from tools.bench_timing import Prepare, show, timed

PROMPT, NEW = 64, 64
LANES, SPAN = 16, 512


def bench_decode(model: LoopLM, repeats: int) -> None:
    """Print the tables; everything in turns, from the median."""
    print(f"\ndecoding, fp32, {model.shape.num_layers} layers: prompts of {PROMPT} tokens, {NEW} new ones")
    show("batch 1, a cache for each loop", timed(_caches(model), NEW, repeats))
    if model.shape.attention == "mla":
        title = f"one layer's attention, {LANES} tokens over {SPAN} entries"
        show(title, timed(_attentions(model), LANES, repeats))


def _caches(model: LoopLM) -> dict[str, Prepare]:
    """Without a cache, and with one."""
    generator = Generator(model, _NoText(), eos_id=-1)  # type: ignore[arg-type]
    config = GenerationConfig(temperature=0.0, max_new_tokens=NEW)

    @torch.no_grad()
    def cacheless() -> None:
        ids = list(range(PROMPT))
        for _ in range(NEW):
            h_1D = model(torch.tensor([ids], device=device.DEVICE)).hidden[-1][-1]
            ids.append(int(F.linear(h_1D, model.head_weight()).argmax()))

    prompt = [list(range(PROMPT))]
    return {
        "without a cache": lambda: cacheless,
        "with a cache": lambda: lambda: generator.generate(prompt, config),
    }


class _NoText:
    """A tokenizer for ids that nobody reads."""

    def decode(self, ids: Sequence[int]) -> str:
        return ""


def _attentions(model: LoopLM) -> dict[str, Prepare]:
    """A token over cached entries: in the latent space, or with every entry expanded to heads."""
    shape = model.shape
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

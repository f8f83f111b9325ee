"""What ``generate()`` and a call of the exported model cannot do, and what they do with a cache that is not new."""

from typing import Any

import pytest
import torch
from megatron.core.process_groups_config import ProcessGroupCollection

from looplm.huggingface.export import modeling_looplm
from looplm.huggingface.export.cache_looplm import LoopLMCache
from looplm.huggingface.export.modeling_looplm import LoopLMForCausalLM
from tests.support.generation_oracle import GATES, MLA, VOCAB, build
from tests.support.hf_models import generate, hf_model, random_ids

IDS_BS = random_ids(2, 9, VOCAB)


@pytest.fixture(scope="module")
def model(single_process: ProcessGroupCollection) -> LoopLMForCausalLM:
    """An MLA model whose gate reads the text so far. Shared by tests: do not change it."""
    return hf_model(build(MLA, GATES["sequence"], single_process), GATES["sequence"])


DRAFTS = (
    "kv_cache: last is not allowed with drafts (assistant_model, prompt_lookup_num_tokens), because tokens that are "
    "checked together see each other as of another loop; give per_loop"
)
OWN_ENTRIES = "is not allowed, because each loop needs entries of its own; leave it out"
NO_WEIGHTS = "output_attentions: True is not allowed, because the attention kernels return no weights; leave it out"
COUNTS_LAYERS = (
    "assistant_early_exit: it is not allowed, because it counts layers; give assistant_model, the same model with a "
    "smaller num_loops"
)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"kv_cache": "last", "prompt_lookup_num_tokens": 3}, DRAFTS),
        ({"kv_cache": "last", "assistant_model": True}, DRAFTS),
        ({"assistant_early_exit": 1}, COUNTS_LAYERS),
        ({"cache_implementation": "static"}, f"cache_implementation: 'static' {OWN_ENTRIES}"),
        ({"cache_implementation": "quantized"}, f"cache_implementation: 'quantized' {OWN_ENTRIES}"),
        ({"cache_implementation": "offloaded"}, f"cache_implementation: 'offloaded' {OWN_ENTRIES}"),
        ({"return_dict_in_generate": True, "output_attentions": True}, NO_WEIGHTS),
    ],
    ids=str,
)
def test_generate_refuses_what_it_cannot_do(
    settings: dict[str, Any], message: str, single_process: ProcessGroupCollection
) -> None:
    gate, settings = GATES["linear"], dict(settings)
    model = hf_model(build(MLA, gate, single_process), gate, kv_cache=settings.pop("kv_cache", "per_loop"))
    if "assistant_model" in settings:
        settings["assistant_model"] = hf_model(build(MLA, gate, single_process), gate, num_loops=2)
    with pytest.raises(ValueError, match=r"^[^\n]*$") as caught:
        generate(model, IDS_BS[:1], max_new_tokens=4, do_sample=False, pad_token_id=0, **settings)
    assert str(caught.value) == message


@pytest.mark.parametrize("mode", ["per_loop", "last"])
def test_a_prompt_in_pieces_and_a_second_turn_are_generated(mode: str, model: LoopLMForCausalLM) -> None:
    settings: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    cache = LoopLMCache(model.config, mode)
    first = generate(model, IDS_BS, prefill_chunk_size=4, past_key_values=cache, **settings)
    second = generate(model, torch.cat((first, IDS_BS), 1), past_key_values=cache, **settings)
    assert second.shape == (2, 9 + 4 + 9 + 4)


def test_a_key_without_effect_is_named_once(model: LoopLMForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    said = list[str]()
    monkeypatch.setattr(modeling_looplm._logger, "warning_once", said.append)
    model(IDS_BS, num_loop=1, token_type_ids=torch.zeros_like(IDS_BS), output_attentions=False)
    generate(model, IDS_BS, max_new_tokens=2, do_sample=False, pad_token_id=0)
    assert said == ["num_loop: has no effect on a LoopLM; leave it out, or correct its name"]


def test_padding_has_a_gate_logit(model: LoopLMForCausalLM) -> None:
    """The running mean over no tokens is 0."""
    mask = (torch.arange(9) >= 3).long().expand(2, -1)
    assert model(IDS_BS, attention_mask=mask, output_gate_logits=True).gate_logits.isfinite().all()

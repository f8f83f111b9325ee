"""``generate()`` gives the text of our own generator with every cache, in batches, with beams and with sampling."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from looplm.huggingface.export.cache_looplm import LoopLMCache
from looplm.huggingface.export.modeling_looplm import LoopLMForCausalLM
from looplm.inference import GenerationConfig, Generator
from looplm.inference.kv_cache import CacheMode
from tests.support.generation_oracle import GATES, READ_OUTS, VARIANTS, VOCAB, build, byte_tokenizer
from tests.support.hf_models import generate, hf_model, random_ids

NEVER = -1  # an id that no token has
MODELS = VARIANTS | READ_OUTS
PAIRS = [("mla", "lru"), ("mla-query-latent", "sequence"), ("mha", "linear"), ("gqa", "sequence")]
PAIRS += [("mla-plain-latent", "lru"), ("mla-prelude-coda", "sequence"), ("gqa-coda-readout-norm", "linear")]
PAIRS += [("mha-diagonal-injection", "lru"), ("mla-prelude-linear-injection", "sequence")]
PAIRS += [("mha-prelude-readout-norm", "mlp"), ("mla-latent-halting", "lru"), ("mla-step-embedding", "mlp")]
PAIRS += [("mla-element-gate", "linear"), ("gqa-head-gate", "lru")]
PROMPTS = [random_ids(1, length, VOCAB, seed=length)[0].tolist() for length in (5, 1, 9)]


def padded(prompts: list[list[int]]) -> dict[str, Tensor]:
    """Return the prompts as one batch, padded on the left."""
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    return {"input_ids": ids, "attention_mask": mask}


def new_ids(model: LoopLMForCausalLM, prompts: list[list[int]], **settings: Any) -> list[list[int]]:
    inputs = padded(prompts)
    with torch.no_grad():
        found = generate(model, **{**inputs, "max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, **settings})
    return found[:, inputs["input_ids"].size(1) :].tolist()


@pytest.fixture(scope="module")
def pairs(single_process: ProcessGroupCollection) -> dict[tuple[str, str], tuple[Generator, LoopLMForCausalLM]]:
    """Our generator and the exported model with the same weights."""
    found = {}
    for variant, gate in PAIRS:
        ours = build(MODELS[variant], GATES[gate], single_process)
        found[variant, gate] = Generator(ours, byte_tokenizer(), NEVER), hf_model(ours, GATES[gate])
    return found


@pytest.fixture
def model(pairs: dict[tuple[str, str], tuple[Generator, LoopLMForCausalLM]]) -> Iterator[LoopLMForCausalLM]:
    """An MLA model whose gate reads the text so far; a test may change its config."""
    found = pairs["mla-query-latent", "sequence"][1]
    before = dict(vars(found.config))
    yield found
    vars(found.config).update(before)


@pytest.mark.parametrize("threshold", [1.0, 0.6])
@pytest.mark.parametrize("mode", ["per_loop", "last"])
@pytest.mark.parametrize("pair", PAIRS, ids="+".join)
def test_greedy_text_is_that_of_our_generator(
    pair: tuple[str, str],
    mode: CacheMode,
    threshold: float,
    pairs: dict[tuple[str, str], tuple[Generator, LoopLMForCausalLM]],
) -> None:
    generator, model = pairs[pair]
    config = GenerationConfig(temperature=0.0, max_new_tokens=12, kv_cache=mode, exit_threshold=threshold)
    expected = generator.generate(PROMPTS, config)
    depths: list[list[int]] = []

    def watch(module: object, args: object, output: Any) -> None:
        if output.exit_depths is not None:
            depths.append(output.exit_depths[:, -1].tolist())

    handle = model.model.register_forward_hook(watch)
    cache = LoopLMCache(model.config, mode)
    found = new_ids(model, PROMPTS, early_exit_threshold=threshold, past_key_values=cache)
    handle.remove()
    assert found == [answer.ids for answer in expected]
    if threshold < 1:
        assert list(map(list, zip(*depths, strict=True))) == [answer.depths for answer in expected]
        assert len({depth for answer in expected for depth in answer.depths}) > 1, (
            "all tokens exit at the same loop: this tests nothing"
        )


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"num_beams": 3},
        {"num_beams": 2, "do_sample": True},
        {"do_sample": True, "top_k": 5},
        {"num_loops": 6},
        {"num_loops": 2},
        {"early_exit_threshold": 0.6},
        {"early_exit_threshold": 0.6, "num_beams": 3},
    ],
    ids=str,
)
@pytest.mark.parametrize("pair", [PAIRS[1], PAIRS[5]], ids="+".join)
def test_a_cache_does_not_change_the_text(
    pair: tuple[str, str],
    settings: dict[str, object],
    pairs: dict[tuple[str, str], tuple[Generator, LoopLMForCausalLM]],
) -> None:
    model = pairs[pair][1]
    texts = []
    for use_cache in (True, False):
        torch.manual_seed(5)
        texts.append(new_ids(model, PROMPTS, use_cache=use_cache, **settings))
    assert texts[0] == texts[1]


@pytest.mark.parametrize("threshold", [1.0, 0.6])
@pytest.mark.parametrize("mode", ["per_loop", "last"])
def test_padding_does_not_change_a_row(mode: str, threshold: float, model: LoopLMForCausalLM) -> None:
    model.config.kv_cache, model.config.early_exit_threshold = mode, threshold
    together = new_ids(model, PROMPTS)
    assert together == [new_ids(model, [prompt])[0] for prompt in PROMPTS]

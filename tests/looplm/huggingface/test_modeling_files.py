"""The exported model in transformers: loaded with its own code, saved, trained, resized; what it refuses."""

import ast
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, DataCollatorWithFlattening, DynamicCache

from looplm import checkpoint
from looplm.config import Injection
from looplm.huggingface.companion_files import CODE
from looplm.huggingface.convert import export_model
from looplm.huggingface.export.cache_looplm import LoopLMCache
from looplm.huggingface.export.gates_looplm import exit_log_probs
from looplm.huggingface.export.modeling_looplm import LoopLMForCausalLM
from tests.support.generation_oracle import EOS, GATES, MLA, READ_OUTS, VARIANTS, VOCAB, build, byte_tokenizer
from tests.support.hf_models import code_cache as code_cache
from tests.support.hf_models import generate, hf_config, hf_model, random_ids
from tests.support.parity import TOLERANCE, assert_close_relative, grad_of, relative_error
from tests.support.tiny import about_weights

IDS_BS = random_ids(2, 9, VOCAB)
MODELS = VARIANTS | READ_OUTS


@pytest.fixture(scope="module")
def model(single_process: ProcessGroupCollection) -> LoopLMForCausalLM:
    """An MLA model whose gate reads the text so far. Shared by tests: do not change it."""
    return hf_model(build(MLA, GATES["sequence"], single_process), GATES["sequence"])


@pytest.fixture
def fresh(single_process: ProcessGroupCollection) -> LoopLMForCausalLM:
    """The same model, free to be changed."""
    return hf_model(build(MLA, GATES["sequence"], single_process), GATES["sequence"])


def load(folder: Path, **keys: Any) -> Any:
    """Load an export. Weights mapped from a file lie at odd addresses, where some products are rounded differently."""
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, torch_dtype="auto", **keys).eval()
    for weight in model.parameters():
        weight.data = weight.data.clone()
    return model


# ------------------------------------------------------------------------------------------------- loading and saving


def test_exported_code_imports_only_torch_and_transformers() -> None:
    imports = [
        node
        for path in CODE
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, (ast.Import, ast.ImportFrom))
    ]
    inside = {node.module for node in imports if isinstance(node, ast.ImportFrom) and node.level}
    assert inside <= {path.stem for path in CODE}, "an imported file must travel too"
    outside = {node.module for node in imports if isinstance(node, ast.ImportFrom) and not node.level}
    outside |= {name.name for node in imports if isinstance(node, ast.Import) for name in node.names}
    assert {name.split(".")[0] for name in outside if name} - set(sys.stdlib_module_names) == {"torch", "transformers"}


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("variant", ["mla", "gqa", "mla-prelude-coda", "mha-diagonal-injection", "mla-latent-halting"])
def test_an_export_is_loaded_with_its_own_code_and_saved_again(
    variant: str, dtype: torch.dtype, tmp_path: Path, single_process: ProcessGroupCollection, code_cache: None
) -> None:
    ours = build(MODELS[variant], GATES["sequence"], single_process, dtype)
    byte_tokenizer().save(str(tmp_path / "tokenizer.json"))
    about = about_weights(str(dtype).removeprefix("torch."), tmp_path / "tokenizer.json")
    checkpoint.save_weights(tmp_path / "step", ours, GATES["sequence"], about, tmp_path / "tokenizer.json")
    opened = checkpoint.open_model(str(tmp_path / "step"), single_process, dtype=None)
    export_model(opened, tmp_path / "first", "looplm", None, 10**9)

    first = load(tmp_path / "first")
    assert type(first) is not LoopLMForCausalLM and type(first).__name__ == "LoopLMForCausalLM"
    first.save_pretrained(tmp_path / "second")
    second, expected = load(tmp_path / "second"), hf_model(ours, GATES["sequence"])
    for loaded in (first, second):
        assert loaded.dtype == dtype
        for name, parameter in expected.named_parameters():
            assert torch.equal(loaded.get_parameter(name), parameter), name
        assert torch.equal(loaded(IDS_BS).logits, expected(IDS_BS).logits)
        assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == MODELS[variant].tie_embeddings
    p_RBS = exit_log_probs(expected(IDS_BS, output_gate_logits=True).gate_logits).exp()
    threshold = p_RBS[:2].sum(0).median().item()  # half of the tokens reach it
    chosen = load(tmp_path / "second", num_loops=3, early_exit_threshold=threshold, kv_cache="last")
    assert (chosen.config.num_loops, chosen.config.kv_cache) == (3, "last")
    found = chosen(IDS_BS)
    assert torch.equal(found.logits, expected(IDS_BS, num_loops=3, early_exit_threshold=threshold).logits)
    assert len(found.exit_depths.unique()) > 1 and found.exit_depths.max() == 3


def test_initial_weights_are_those_of_pretraining() -> None:
    config = hf_config(MLA, GATES["sequence"], vocab_size=4000)
    untrained = LoopLMForCausalLM(config)
    logit_RBS = untrained(IDS_BS, output_gate_logits=True).gate_logits
    uniform = torch.tensor([1 / 4, 1 / 3, 1 / 2, 1 / 2])  # that of the last loop is unused
    assert torch.allclose(logit_RBS.sigmoid(), uniform[:, None, None].expand_as(logit_RBS))
    assert untrained.model.embed_tokens.weight.std().item() == pytest.approx(1, rel=0.02)
    assert untrained.lm_head.weight.std().item() == pytest.approx(0.02, rel=0.02)
    block = untrained.model.layers[1]
    assert torch.equal(block.input_layernorm_2.weight, torch.full((32,), (2 * 2 * 4) ** -0.5))
    assert torch.equal(block.input_layernorm.weight, torch.ones(32))


@pytest.mark.parametrize("injection", ["diagonal", "linear"])
def test_initial_weights_around_the_loops(injection: Injection) -> None:
    """An injection starts without an effect, and blocks outside the loops count once in the gain."""
    config = hf_config(replace(MLA, prelude_layers=1, coda_layers=2, injection=injection), GATES["lru"])
    untrained = LoopLMForCausalLM(config)
    gains = torch.full((32,), (2 * (2 * 4 + 3)) ** -0.5)
    for block in (*untrained.model.layers, *untrained.model.prelude, *untrained.model.coda):
        assert torch.equal(block.input_layernorm_2.weight, gains)
    assert torch.equal(untrained.model.coda_norm.weight, torch.ones(32))
    expected = untrained(IDS_BS).logits
    untrained.model.injection = None
    assert torch.equal(untrained(IDS_BS).logits, expected)


def test_initial_weights_of_a_step_embedding_and_of_latent_reasoning() -> None:
    config = hf_config(replace(MLA, step_embedding="learned", latent_iterations=3, latent_halting=True), GATES["lru"])
    untrained = LoopLMForCausalLM(config)
    assert not untrained.model.step_embedding.weight.any()
    for block in untrained.model.layers:
        unit, width = block.self_attn.latent_reasoning, MLA.kv_lora_rank
        assert torch.allclose(unit.cell.bias_ih[width : 2 * width].sigmoid(), torch.tensor(5 / 6))
        assert not unit.halt.weight.any() and 0 < unit.cell.weight_hh.abs().max() < width**-0.5


# ---------------------------------------------------------------------------------------------------------- training


def gradients_of(model: LoopLMForCausalLM, **inputs: Any) -> dict[str, Tensor]:
    model.zero_grad()
    model(IDS_BS, labels=IDS_BS, **inputs).loss.backward()
    return {name: grad_of(parameter).clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("variant", ["mla", "mla-prelude-coda"])
def test_checkpointed_gradients_are_the_gradients(
    variant: str, reentrant: bool, single_process: ProcessGroupCollection
) -> None:
    fresh = hf_model(build(MODELS[variant], GATES["sequence"], single_process), GATES["sequence"])
    expected = gradients_of(fresh.train())
    fresh.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    assert_close_relative(gradients_of(fresh, use_cache=True), expected)


def test_losses_of_parts_add_up_to_that_of_the_batch(model: LoopLMForCausalLM) -> None:
    labels = IDS_BS.clone()
    labels[0, 3:] = -100
    whole = model(IDS_BS, labels=labels).loss
    parts = [model(IDS_BS[[row]], labels=labels[[row]], num_items_in_batch=2 + 8).loss for row in (0, 1)]
    assert relative_error(parts[0] + parts[1], whole) < TOLERANCE
    assert model(IDS_BS, labels=torch.full_like(IDS_BS, -100)).loss == 0
    deeper = model(IDS_BS, labels=labels, num_loops=6)
    assert relative_error(deeper.loss, whole) < TOLERANCE, "loops beyond training have no exit probability"


def test_the_gate_is_fp32_under_autocast(model: LoopLMForCausalLM) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        output = model(IDS_BS, labels=IDS_BS, output_gate_logits=True)
        assert output.gate_logits.dtype == torch.float32 and output.loss.isfinite()
        assert generate(model, IDS_BS, max_new_tokens=3, do_sample=False).shape == (2, 12)
        cache = LoopLMCache(model.config, "last")
        exiting = {"past_key_values": cache, "early_exit_threshold": 0.6}
        assert generate(model, IDS_BS, max_new_tokens=9, do_sample=False, **exiting).shape == (2, 18)


@pytest.mark.parametrize("variant", ["mla", "gqa"])
def test_the_vocabulary_can_grow(variant: str, single_process: ProcessGroupCollection) -> None:
    grown = hf_model(build(VARIANTS[variant], GATES["lru"], single_process), GATES["lru"])
    before = grown(IDS_BS).logits
    grown.resize_token_embeddings(VOCAB + 5)
    after = grown(torch.cat((IDS_BS, torch.full((2, 1), VOCAB + 4)), 1)).logits
    assert after.size(-1) == grown.config.vocab_size == VOCAB + 5
    assert relative_error(after[:, :-1, :VOCAB], before) < TOLERANCE


# --------------------------------------------------------------------------------------------------- calls and caches


def test_padding_positions_and_embeddings(model: LoopLMForCausalLM) -> None:
    """Padding on either side, embeddings in place of ids, given positions, only the last logits."""
    with torch.no_grad():
        expected = model(IDS_BS, early_exit_threshold=0.6)
        left = torch.cat((torch.zeros(2, 3, dtype=torch.int64), IDS_BS), 1)
        mask = (torch.arange(12) >= 3).long().expand(2, -1)
        others = {
            "left": model(left, attention_mask=mask, early_exit_threshold=0.6).logits[:, 3:],
            "right": model(left.roll(-3, 1), attention_mask=mask.flip(1), early_exit_threshold=0.6).logits[:, :9],
            "embedded": model(inputs_embeds=model.model.embed_tokens(IDS_BS), early_exit_threshold=0.6).logits,
            "placed": model(IDS_BS, position_ids=torch.arange(9)[None] + 50, early_exit_threshold=0.6).logits,
        }
        assert_close_relative(others, dict.fromkeys(others, expected.logits))
        assert torch.equal(model(IDS_BS, logits_to_keep=2).logits, model(IDS_BS).logits[:, -2:])
        assert len(expected.exit_depths.unique()) > 1


@pytest.mark.parametrize("told_by", ["position_ids", "seq_idx", "cu_seq_lens", "all"])
@pytest.mark.parametrize("variant, gate", [("mla", "sequence"), ("gqa", "linear"), ("mla-prelude-coda", "sequence")])
def test_packed_documents_do_not_see_each_other(
    variant: str, gate: str, told_by: str, single_process: ProcessGroupCollection
) -> None:
    """Logits, exits, loss and gate of documents from transformers' collator are those of each document alone."""
    packer = hf_model(build(MODELS[variant], GATES[gate], single_process), GATES[gate])
    documents = [random_ids(1, length, VOCAB, seed=length)[0] for length in (7, 1, 12)]
    batch = dict(DataCollatorWithFlattening()([{"input_ids": ids.tolist()} for ids in documents]))
    lengths = torch.tensor([len(ids) for ids in documents])
    others = {
        "seq_idx": torch.arange(3).repeat_interleave(lengths)[None].int(),
        "cu_seq_lens": torch.tensor([0, 7, 8, 20], dtype=torch.int32),
    }
    others["cu_seq_lens_q"] = others["cu_seq_lens_k"] = others.pop("cu_seq_lens")
    if told_by == "cu_seq_lens":
        del batch["position_ids"], others["seq_idx"]
        others |= {"max_length_q": 12, "max_length_k": 12}  # type: ignore[dict-item]
    elif told_by == "seq_idx":
        del batch["position_ids"]
        others = {"seq_idx": others["seq_idx"]}
    batch |= {} if told_by == "position_ids" else others

    settings: dict[str, Any] = {"early_exit_threshold": 0.6, "output_gate_logits": True}
    packed, alone = packer(**batch, **settings), [packer(ids[None], labels=ids[None], **settings) for ids in documents]
    for name, dim in (("logits", 1), ("gate_logits", 2), ("exit_depths", 1)):
        expected = torch.cat([getattr(output, name) for output in alone], dim)
        assert relative_error(getattr(packed, name).double(), expected.double()) < TOLERANCE, name
    assert len(packed.exit_depths.unique()) > 1
    learned = lengths - 1
    total = sum(output.loss * count for output, count in zip(alone, learned.tolist(), strict=True))
    assert relative_error(packed.loss, total / learned.sum()) < TOLERANCE
    if told_by != "position_ids":
        return
    with torch.no_grad():  # with a cache, and with a mask that hides nothing
        again = packer(**batch, attention_mask=torch.ones(1, 20), use_cache=True)
        assert relative_error(again.logits, packer(**batch, use_cache=False).logits) < TOLERANCE
        with pytest.raises(ValueError, match="past_key_values: packed documents cannot be continued"):
            packer(documents[1][None], past_key_values=again.past_key_values)
        cache = packer(documents[0][None], use_cache=True).past_key_values
        with pytest.raises(ValueError, match="packed documents are not allowed after cached tokens"):
            packer(**batch, past_key_values=cache)


def test_a_padded_row_that_starts_its_positions_over_is_one_document(model: LoopLMForCausalLM) -> None:
    """The positions that generate() gives to padding are arbitrary."""
    padded, mask = torch.cat((IDS_BS[:, :3], IDS_BS), 1), (torch.arange(12) >= 3).long().expand(2, -1)
    with torch.no_grad():
        expected = model(IDS_BS).logits
        for filler in (0, 1):
            position_BS = (mask.cumsum(-1) - 1).masked_fill(mask == 0, filler)
            output = model(padded, attention_mask=mask, position_ids=position_BS)
            assert not output.past_key_values.packed
            assert relative_error(output.logits[:, 3:], expected) < TOLERANCE


@pytest.mark.parametrize(
    "variant, gate",
    [("mla", "sequence"), ("gqa", "lru"), *((name, "sequence") for name in MODELS if name in READ_OUTS)],
)
def test_a_text_in_pieces_equals_the_whole_text(
    variant: str, gate: str, single_process: ProcessGroupCollection
) -> None:
    """With a cache per loop, also in pieces of several tokens; every token exits at the same loop."""
    pieces = hf_model(build(MODELS[variant], GATES[gate], single_process), GATES[gate])
    with torch.no_grad():
        whole = pieces(IDS_BS, early_exit_threshold=0.6, use_cache=False)
        cache, found = LoopLMCache(pieces.config), []
        for part in IDS_BS.split([3, 1, 4, 1], 1):
            found.append(pieces(part, past_key_values=cache, early_exit_threshold=0.6))
    assert whole.past_key_values is None and cache.get_seq_length() == 9
    assert relative_error(torch.cat([output.logits for output in found], 1), whole.logits) < TOLERANCE
    assert torch.equal(torch.cat([output.exit_depths for output in found], 1), whole.exit_depths)


@pytest.mark.parametrize("mode", ["per_loop", "last"])
def test_every_loops_read_out_is_the_model_of_that_depth(mode: str, single_process: ProcessGroupCollection) -> None:
    """A coda that runs for each of them leaves the entries of the last in the cache."""
    gate = GATES["lru"]
    ours = hf_model(build(READ_OUTS["mla-prelude-coda"], gate, single_process), gate, kv_cache=mode)
    with torch.no_grad():
        asked = ours(IDS_BS[:, :7], output_hidden_states=True)
        for depth, h_BSD in enumerate(asked.hidden_states, start=1):
            expected = ours(IDS_BS[:, :7], num_loops=depth, use_cache=False).logits
            assert relative_error(ours.lm_head(h_BSD), expected) < TOLERANCE
        plain = ours(IDS_BS[:, :7])
        assert torch.equal(asked.logits, plain.logits)
        for part in IDS_BS[:, 7:].split(1, 1):
            found = ours(part, past_key_values=asked.past_key_values, output_hidden_states=True)
            assert torch.equal(found.logits, ours(part, past_key_values=plain.past_key_values).logits)
    lengths = {layer.get_seq_length() for cache in (asked, plain) for layer in cache.past_key_values.layers}
    assert lengths == {9}


def test_blocks_outside_the_loops_have_one_slot_each(single_process: ProcessGroupCollection) -> None:
    outer = hf_model(build(READ_OUTS["mla-prelude-coda"], GATES["lru"], single_process), GATES["lru"])
    for mode, slots in (("per_loop", 3 + 4 * 2), ("last", 3 + 2)):
        cache = LoopLMCache(outer.config, mode)
        with torch.no_grad():
            outer(IDS_BS, past_key_values=cache, early_exit_threshold=0.6, output_hidden_states=True)
        assert [layer.get_seq_length() for layer in cache.layers] == [9] * slots


def test_the_cache_has_a_slot_per_loop_or_shares_it(model: LoopLMForCausalLM) -> None:
    for mode, slots in (("per_loop", 4 * 3), ("last", 2 + 4)):  # plus one for the gate in each loop
        cache = LoopLMCache(model.config, mode)
        with torch.no_grad():
            model(IDS_BS, past_key_values=cache)
        assert len(cache.layers) == slots
        assert cache.layers[0].keys.shape == (2, 1, 9, MLA.kv_lora_rank)
        assert cache.layers[0].values.shape == (2, 1, 9, MLA.qk_rope_head_dim)


def test_drafts_by_prompt_lookup_change_no_text(model: LoopLMForCausalLM) -> None:
    prompt = IDS_BS[:1].repeat(1, 3)
    settings: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": EOS}
    plain = generate(model, prompt, **settings)
    assert torch.equal(generate(model, prompt, prompt_lookup_num_tokens=3, **settings), plain)


def test_an_adapter_in_the_value_projection_is_called(fresh: LoopLMForCausalLM) -> None:
    """A cached step must call the adapter, not read the weight inside it."""

    class Adapted(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * 1.5

    for block in fresh.model.layers:
        weight = block.self_attn.kv_b_proj.weight
        block.self_attn.kv_b_proj = Adapted(weight.size(1), weight.size(0), bias=False)
        block.self_attn.kv_b_proj.weight = weight
    texts = [generate(fresh, IDS_BS, max_new_tokens=8, do_sample=False, use_cache=use) for use in (True, False)]
    assert torch.equal(*texts)


# ----------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"num_loops": 0}, "num_loops: 0 is not allowed; give at least 1"),
        ({"early_exit_threshold": 1.5}, "early_exit_threshold: 1.5 is not allowed"),
        ({"early_exit_threshold": 0.5, "num_loops": 6}, "the gate knows loops 1 to 4"),
        ({"attention_mask": torch.ones(2, 5)}, "attention_mask: [2, 5] is not allowed; give [2, 9]"),
        ({"past_key_values": DynamicCache()}, "past_key_values: DynamicCache is not allowed"),
        ({"inputs_embeds": torch.zeros(2, 9, 32)}, "give these or inputs_embeds"),
    ],
    ids=str,
)
def test_contradictory_arguments_are_refused(arguments: dict[str, Any], message: str, model: LoopLMForCausalLM) -> None:
    with pytest.raises(ValueError, match=r"^[^\n]*$") as caught:
        model(IDS_BS, **arguments)
    assert message in str(caught.value)


def test_refusals_that_depend_on_the_state(fresh: LoopLMForCausalLM) -> None:
    with torch.no_grad():
        cache = fresh(IDS_BS, num_loops=2).past_key_values
        with pytest.raises(ValueError, match="num_loops: 4 is not allowed; the tokens in past_key_values ran 2 loops"):
            fresh(IDS_BS[:, :1], past_key_values=cache)
        cache = LoopLMCache(fresh.config, "last")
        fresh(IDS_BS, past_key_values=cache)
        with pytest.raises(ValueError, match="output_hidden_states: with kv_cache=last"):
            fresh(IDS_BS[:, :1], past_key_values=cache, early_exit_threshold=0.6, output_hidden_states=True)
        fresh.config.gate_trained = False
        with pytest.raises(ValueError, match="gate was never trained"):
            fresh(IDS_BS, early_exit_threshold=0.6)


@pytest.mark.parametrize(
    "keys",
    [
        *({"attention": "mqa"}, {"kv_cache": "first"}, {"early_exit_gate": "gru"}, {"num_key_value_heads": 3}),
        *({"injection": "sum"}, {"loop_norm": "both"}),
    ],
    ids=str,
)
def test_impossible_configs_are_refused(keys: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(keys))):
        LoopLMForCausalLM(hf_config(VARIANTS["gqa"], GATES["lru"], **keys))

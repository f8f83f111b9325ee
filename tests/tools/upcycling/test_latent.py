"""Conversion of plain to latent attention: exact at full width, close below it, and trainable from there."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from looplm import checkpoint, reference
from looplm.config import GateConfig, ModelConfig
from looplm.failures import UserError
from looplm.inference import GenerationConfig, Generator
from pretrain.data import check_corpus
from pretrain.train import train
from tests.support.parity import assert_close_relative, relative_error
from tests.support.tiny import MODEL, VOCAB, run_config, train_rows, write_chat_corpus
from tools.upcycle import main
from tools.upcycling.latent import Projections, factorize, importance, to_latent
from tools.upcycling.measure import read_samples, second_moments
from tools.upcycling.model_state import ModelState, assemble, open_source

pytestmark = pytest.mark.usefixtures("keep_process_groups")
GATE = GateConfig(kind="linear")
MHA = replace(MODEL, attention="mha", num_attention_heads=4)
CASES = {
    "plain": MHA,
    "grouped": replace(MHA, num_query_groups=2, sandwich_norm=False),
    "grouped-gate": replace(MHA, num_query_groups=2, attention_gate="element"),
    "wide-heads-long-waves": replace(MHA, head_dim=12, rope_base=50.0),
}
IDS_BS = torch.arange(40).view(2, 20) * 7 % VOCAB


def random_state(config: ModelConfig) -> ModelState:
    """Return random weights, large enough that attention is far from uniform."""
    generator = torch.Generator().manual_seed(5)
    weights = {}
    for name, size in reference.parameter_shapes(config, GATE).items():
        value = torch.randn(size, generator=generator)
        weights[name] = 1 + 0.3 * value if "norm" in name else value if "embedding" in name else value * 0.3
    return ModelState(config, GATE, weights)


def hidden(state: ModelState) -> torch.Tensor:
    """Return the reference's hidden states in double precision: [R, S, B, D]."""
    params = {name: weight.double() for name, weight in state.weights.items()}
    return torch.stack(reference.forward(params, state.config, state.gate, IDS_BS).hidden)


@pytest.mark.parametrize("calibrated", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_full_width_is_exact(case, calibrated, single_process):
    state = random_state(CASES[case])
    moments = None
    if calibrated:
        half_DDL = torch.randn(2, 32, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        moments = [half_DD @ half_DD.mT * 32 / half_DD.square().sum() for half_DD in half_DDL]
    latent, exact, approximate = to_latent(state, 32, None, moments, latent_norm=True)
    assert (
        latent.config.attention == "mla" and latent.config.qk_nope_head_dim == 0 and not approximate and len(exact) == 4
    )
    expected = hidden(state)
    assert_close_relative({"oracle": hidden(latent)}, {"oracle": expected}, tolerance=1e-4)
    model = assemble(latent, single_process)
    assert_close_relative({"model": torch.stack(model(IDS_BS).hidden)}, {"model": expected}, tolerance=1e-4)
    sharper = state._replace(weights=state.weights | {n: w * 1.5 for n, w in state.weights.items() if "qkv" in n})
    assert relative_error(hidden(sharper), expected) > 0.1, "attention matters here"


def test_without_its_norm_a_latent_as_wide_as_the_values_is_exact(single_process):
    grouped = CASES["grouped"]
    state, width = random_state(grouped), grouped.query_groups * grouped.attention_head_dim
    assert width < grouped.hidden_size
    latent, exact, approximate = to_latent(state, width, None, None, latent_norm=False)
    assert not approximate and any(f"has their rank, {width}, and no norm" in line for line in exact)
    assert not any("kv_layernorm" in name for name in latent.weights)
    expected = hidden(state)
    assert_close_relative({"oracle": hidden(latent)}, {"oracle": expected}, tolerance=1e-4)
    model = assemble(latent, single_process)
    assert_close_relative({"model": torch.stack(model(IDS_BS).hidden)}, {"model": expected}, tolerance=1e-4)
    normed = to_latent(state, width, None, None, latent_norm=True)
    assert relative_error(hidden(normed.state), expected) > 0.1, "the norm is in the way"
    wide = to_latent(random_state(CASES["wide-heads-long-waves"]), 32, None, None, latent_norm=False)
    assert not wide.approximate, "48 rows on 32 inputs have a rank of 32"
    narrower = to_latent(state, width - 1, None, None, latent_norm=False)
    assert f"their rank is {width}" in narrower.approximate[0]


def test_error_falls_with_width_to_zero(single_process):
    state = random_state(MHA)
    expected = hidden(state)

    def error(rank: int, rope: int | None) -> float:
        return (hidden(to_latent(state, rank, rope, None, latent_norm=True).state) - expected).pow(2).mean().item()

    by_rank = [error(rank, None) for rank in (8, 16, 24, 32)]
    by_rope = [error(32, rope) for rope in (8, 16, 24, 32)]
    for errors in (by_rank, by_rope):
        assert errors == sorted(errors, reverse=True) and errors[-1] < 1e-10 < errors[-2], errors


def test_one_rotary_key_is_the_usual_form():
    latent, _, approximate = to_latent(random_state(MHA), 16, 8, None, latent_norm=True)
    assert latent.config.qk_rope_period is None and latent.config.qk_nope_head_dim == 8
    assert "1 of 4 mixed ones" in approximate[0] and "latent of 16 of 32" in approximate[1]
    one_group = to_latent(random_state(replace(MHA, num_query_groups=1)), 32, 8, None, latent_norm=True)
    assert one_group.state.config.qk_nope_head_dim == 0


@pytest.mark.parametrize("rope_base", [1.0, 50.0, 1e4])
def test_a_key_without_position_gives_the_mean_score_of_near_tokens(rope_base, monkeypatch):
    """With a base of 1 all frequencies are 1, so a mean over near distances leaves almost nothing of such a key."""
    config = replace(MHA, rope_base=rope_base)
    state = random_state(config)
    found = to_latent(state, 32, 8, None, latent_norm=True).state.weights
    monkeypatch.setattr("tools.upcycling.latent._NEAR", 1)
    # Its keys without position are as they would be at distance 0.
    plain = to_latent(state, 32, 8, None, latent_norm=True).state.weights
    name = "decoder.layers.1.self_attention.linear_kv_{}_proj.weight"
    key_HKD, unturned_HKD = (
        (w[name.format("up")] @ w[name.format("down")][:32]).unflatten(0, (4, 16))[:, :8] for w in (found, plain)
    )
    query_K = torch.randn(8, generator=torch.Generator().manual_seed(2))
    far = reference.View.of(config, torch.zeros(1, 16, dtype=torch.long), None, False)  # positions 0 to 15
    rotated_SK = reference.rotate(query_K.expand(16, 1, 1, 8), far)[:, 0, 0]
    expected_HD = torch.einsum("sk,hkd->shd", rotated_SK, unturned_HKD).mean(0)
    scores = {"scores": torch.einsum("k,hkd->hd", query_K, key_HKD)}
    assert_close_relative(scores, {"scores": expected_HD}, tolerance=1e-4)


def test_importance_is_the_mean_change_of_the_output():
    """Two groups of two heads: errors of keys and of values, each measured with random inputs."""
    generator = torch.Generator().manual_seed(3)

    def random(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    plain, half_DD = Projections(random(4, 6, 5), random(2, 6, 5), random(2, 6, 5), random(5, 4, 6)), random(5, 5)
    u_ND = random(200, 5) @ half_DD
    of_keys_GKK, of_values_GKK = importance(plain, u_ND.mT @ u_ND / 200)
    error_K = random(6)
    for group, heads in enumerate(((0, 1), (2, 3))):
        key = value = 0.0
        for head in heads:
            changed_N = u_ND @ plain.query_HKD[head].mT @ error_K / math.sqrt(6)
            read_DK = plain.output_DHK[:, head]
            shown_ND = u_ND @ plain.value_GKD[group].mT @ read_DK.mT
            key += changed_N.square().mean().item() * shown_ND.square().sum(1).mean().item()
            value += (read_DK @ error_K).square().sum().item()
        assert (error_K @ of_keys_GKK[group] @ error_K).item() == pytest.approx(key)
        assert (error_K @ of_values_GKK[group] @ error_K).item() == pytest.approx(value)


def test_what_nothing_reads_needs_no_width():
    """Half of each value goes nowhere, and no query reads half of each key: that leaves 16 and 12 directions."""

    def converted(rank: int, rope: int, blind: bool) -> torch.Tensor:
        state = random_state(MHA)
        for layer in range(2 if blind else 0):
            name = f"decoder.layers.{layer}.self_attention.linear_{{}}.weight"
            state.weights[name.format("proj")].view(32, 4, 8)[:, :, 4:] = 0
            state.weights[name.format("qkv")].view(4, 3, 8, 32)[:, 0, [2, 3, 6, 7]] = 0
        return hidden(to_latent(state, rank, rope, None, latent_norm=False).state)

    for rank, rope in ((16, 32), (28, 8)):
        whole = {blind: {"hidden": converted(32, rope, blind)} for blind in (True, False)}
        assert_close_relative({"hidden": converted(rank, rope, True)}, whole[True], tolerance=1e-4)
        assert relative_error(converted(rank, rope, False), whole[False]["hidden"]) > 0.1


@pytest.mark.parametrize("asking", [4, 3])
def test_heads_that_share_one_key_need_one_rotary_key(asking):
    """A pair of a head's key that its query does not read does not count, however long it is."""
    state, pairs = random_state(MHA), torch.tensor([2, 3, 6, 7])  # channel k is turned with k + 4
    name = "decoder.layers.{}.self_attention.linear_qkv.weight"
    for layer in range(2):
        qkv = state.weights[name.format(layer)].view(4, 3, 8, 32)  # each head's query, key and value
        unread = qkv[asking:, 1, pairs]
        qkv[:, 1] = qkv[0, 1].clone()
        qkv[asking:, 1, pairs], qkv[asking:, 0, pairs] = unread, 0
    latent = to_latent(state, 32, 8, None, latent_norm=True)
    assert_close_relative({"hidden": hidden(latent.state)}, {"hidden": hidden(state)}, tolerance=1e-4)


def test_the_factorization_is_optimal_for_its_second_moment():
    """Eckart and Young: the error is the singular values beyond the rank, of the weighed target on whitened input."""
    generator = torch.Generator().manual_seed(0)
    target_ND, half_DD, half_NN = (
        torch.randn(size, generator=generator, dtype=torch.float64) for size in ((6, 12), (12, 12), (6, 6))
    )
    moment_DD, weight_NN = half_DD @ half_DD.mT, half_NN @ half_NN.mT
    down_CD, up_NC = factorize(target_ND, moment_DD, weight_NN, 3)
    torch.testing.assert_close(down_CD @ down_CD.mT, torch.eye(3, dtype=torch.float64))
    lost_ND = up_NC @ down_CD - target_ND
    seen_ND = torch.linalg.cholesky(weight_NN).mT @ target_ND @ torch.linalg.cholesky(moment_DD)
    beyond = torch.linalg.svdvals(seen_ND)[3:].square().sum()
    torch.testing.assert_close((weight_NN @ lost_ND @ moment_DD @ lost_ND.mT).trace(), beyond)


def test_as_many_samples_are_read_as_are_asked_for(corpus, single_process):
    sha256 = json.loads((corpus / "valid.manifest.json").read_text())["tokenizer"]["sha256"]
    for samples, masks in ((1, True), (6, False), (8, True)):
        batches = read_samples(str(corpus / "valid"), samples, 32, MHA, sha256, single_process, masks_documents=masks)
        assert sum(len(batch.ids_BS) for batch in batches) == samples
        assert all((batch.document_start_SB is not None) == masks for batch in batches)


@pytest.mark.parametrize(("name", "held"), [("valid", 23), ("chat/valid", 5)])
def test_no_text_is_read_twice(name, held, corpus, tmp_path, single_process):
    write_chat_corpus(tmp_path / "chat")
    prefix = str((corpus if name == "valid" else tmp_path) / name)
    sha256 = json.loads(Path(f"{prefix}.manifest.json").read_text())["tokenizer"]["sha256"]
    batches = read_samples(prefix, held, 32, MHA, sha256, single_process)
    rows = [tuple(row) for batch in batches for row in batch.ids_BS.tolist()]
    assert len(rows) == len(set(rows)) == held
    fix = f"{prefix} holds {held} sequences of 32 tokens; give at most {held}"
    with pytest.raises(UserError, match=f"^refit_samples: {held + 1} is not allowed; {fix}$"):
        read_samples(prefix, held + 1, 32, MHA, sha256, single_process, key="refit_samples")


def test_second_moments_are_those_of_attentions_input(corpus, single_process):
    state = random_state(MHA)
    record = json.loads((corpus / "valid.manifest.json").read_text())["tokenizer"]
    batches = read_samples(str(corpus / "valid"), 4, 32, state.config, record["sha256"], single_process)
    found = second_moments(state, batches, single_process)
    params, (batch,) = {name: weight.double() for name, weight in state.weights.items()}, batches
    h_SBD, view = (
        params["embedding.word_embeddings.weight"][batch.ids_BS.T],
        reference.View.of(MHA, batch.ids_BS, batch.document_start_SB, False),
    )
    total_LDD = torch.zeros(2, 32, 32, dtype=torch.float64)
    for _ in range(MHA.num_loops):
        for layer in range(2):
            u_ND = reference.rms_norm(h_SBD, torch.ones(32, dtype=torch.float64), MHA.norm_eps).flatten(0, 1)
            total_LDD[layer] += u_ND.T @ u_ND / (len(u_ND) * MHA.num_loops)
            h_SBD = reference.block(reference.scope(params, f"decoder.layers.{layer}."), MHA, h_SBD, view)
        h_SBD = reference.rms_norm(h_SBD, params["decoder.final_layernorm.weight"], MHA.norm_eps)
    for layer, moment_DD in enumerate(found):
        assert moment_DD.trace().item() == pytest.approx(32)
        assert relative_error(moment_DD, total_LDD[layer]) < 5e-3, "except for the ridge"


@pytest.fixture(scope="module")
def mha_run(corpus, tmp_path_factory, single_process):
    plain = {"attention": "mha", "num_attention_heads": 4}
    config = run_config(corpus, tmp_path_factory.mktemp("mha") / "run", model=plain, optim={"train_steps": 30})
    train(config, check_corpus(config.data, config.model.vocab_size), single_process)
    return config


@pytest.mark.slow
def test_a_trained_model_at_half_width_trains_on_and_generates(mha_run, corpus, tmp_path, single_process):
    conversion = [f"--checkpoint={mha_run.output_dir}", f"--output={tmp_path / 'latent'}", "--kv_lora_rank=16"]
    conversion += ["--qk_rope_head_dim=16", f"--calibrate={corpus / 'train'}"]
    main(["latent", *conversion, f"--data={corpus / 'valid'}", "--samples=8", "--seq_length=32"])
    (record,) = json.loads((tmp_path / "latent/companions/upcycle.json").read_text())
    before, after = (record[when]["loss_per_depth"][-1] for when in ("before", "after"))
    assert before - 0.02 < after < before + 0.1
    source = open_source(str(tmp_path / "latent"), single_process)
    start = {"initial": str(tmp_path / "latent")}
    config = run_config(corpus, tmp_path / "on", optim={"train_steps": 20, "lr": 3e-3}, checkpoint=start)
    config = replace(config, model=source.state.config)
    train(config, check_corpus(config.data, config.model.vocab_size), single_process)
    losses = torch.tensor([row["loss"] for row in train_rows(tmp_path / "on")]).view(4, 5).mean(1)
    assert losses[-1] < losses[0] - 0.1 and losses.max() < losses[0] + 0.05, losses
    assert_same_text_without_a_cache(Generator.open(str(tmp_path / "on")))


@pytest.mark.slow
def test_a_model_of_nothing_but_rotary_keys_generates(tiny_run, single_process):
    opened = checkpoint.open_model(str(tiny_run), single_process)
    model = assemble(to_latent(random_state(MHA), 32, None, None, latent_norm=True).state, single_process)
    assert_same_text_without_a_cache(Generator(model, opened.tokenizer, opened.about.eos_ids, False))


def assert_same_text_without_a_cache(generator: Generator) -> None:
    (answer,) = generator.generate(["def add"], GenerationConfig(temperature=0.0, max_new_tokens=8))
    ids = generator.tokenizer.encode("def add").ids + answer.ids
    with torch.no_grad():
        hidden_SBD = generator.model(torch.tensor([ids])).hidden[-1]
    best = (hidden_SBD[:, 0] @ generator.model.head_weight().T).argmax(-1)[-len(answer.ids) - 1 : -1]
    assert len(answer.ids) == 8 and best.tolist() == answer.ids


@pytest.mark.parametrize("key", ["qkv_bias", "qk_norm"])
def test_biases_and_normed_heads_are_refused(key):
    changed: dict[str, Any] = {key: True}
    state = ModelState(replace(MHA, **changed), GateConfig(), {})
    with pytest.raises(
        UserError, match=f"checkpoint: 'model.{key}=true' is not allowed; latent attention has no place"
    ):
        to_latent(state, 4, None, None, latent_norm=True)


@pytest.mark.slow
def test_mistakes_give_a_one_line_error_and_leave_nothing(
    mha_run, tiny_run, corpus, tmp_path, single_process, monkeypatch
):
    for work in ("second_moments", "to_latent", "measure", "refit"):  # all are found before it begins
        monkeypatch.setattr(f"tools.upcycle.{work}", lambda *_: pytest.fail("work began before the mistake was found"))
    output = f"--output={tmp_path / 'out'}"
    plain = [f"--checkpoint={mha_run.output_dir}", output]
    half = [*plain, "--kv_lora_rank=16"]
    messages = {
        r"checkpoint: 'mla' is not allowed; its attention is latent already": [
            *(f"--checkpoint={tiny_run}", output, "--kv_lora_rank=4", f"--calibrate={corpus / 'train'}")
        ],
        r"kv_lora_rank: 33 is not allowed; give a number from 1 to the source's hidden_size=32": [
            *(*plain, "--kv_lora_rank=33", f"--calibrate={corpus / 'train'}")
        ],
        r"kv_lora_rank: 0 is not": [*plain, "--kv_lora_rank=0"],
        r"qk_rope_head_dim: 12 is not allowed; give a multiple of the head's width 8, up to 32": [
            *(*half, "--qk_rope_head_dim=12")
        ],
        r"qk_rope_head_dim: 40 is not": [*half, "--qk_rope_head_dim=40"],
        r"nowhere": [*half, "--calibrate=nowhere"],
        r"elsewhere": [*half, f"--calibrate={corpus / 'train'}", "--data=elsewhere"],
        r"seq_length: 65 is not": [*half, f"--data={corpus / 'valid'}", "--seq_length=65"],
        r"^samples: 12 is not allowed; .*valid holds 11 sequences of 64 tokens; give at most 11$": [
            *(*half, f"--data={corpus / 'valid'}", "--samples=12")
        ],
        r"refit_samples: 8 is not allowed; with model.num_loops=\d": [
            *(*half, f"--calibrate={corpus / 'train'}", "--refit_samples=8")
        ],
        r"kv_lora_rank: required": plain,
    }
    for words, argv in messages.items():
        with pytest.raises(UserError, match=words) as caught:
            main(["latent", *argv])
        assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())

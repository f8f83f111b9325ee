"""Output projections fitted after a conversion, against the same in plain torch, layer by layer."""

import json
from dataclasses import replace
from typing import Any

import pytest
import torch

from looplm import reference
from looplm.failures import UserError
from pretrain.data import Batch, check_corpus
from pretrain.train import train
from tests.support.parity import assert_close_relative, relative_error
from tests.support.tiny import VOCAB, run_config
from tests.tools.upcycling.test_latent import MHA, hidden, random_state
from tools.upcycle import main
from tools.upcycling import refit as module
from tools.upcycling.latent import to_latent
from tools.upcycling.model_state import ModelState
from tools.upcycling.refit import check_refit, fit, refit

pytestmark = pytest.mark.usefixtures("keep_process_groups")
ONCE = replace(MHA, num_loops=1, num_query_groups=2)
D, LAYERS = ONCE.hidden_size, ONCE.num_layers


def batches() -> list[Batch]:
    """Return two batches of random tokens, the second of two documents a sample."""
    generator, start_SB = torch.Generator().manual_seed(3), torch.zeros(24, 4, dtype=torch.int64)
    start_SB[9:] = 9
    ids = [torch.randint(VOCAB, (4, 24), generator=generator) for _ in range(2)]
    return [
        Batch(ids_BS, ids_BS.T, torch.ones(24, 4), start) for ids_BS, start in zip(ids, (None, start_SB), strict=True)
    ]


def oracle(before: ModelState, after: ModelState) -> dict[str, torch.Tensor]:
    """Return the fitted projections by plain least squares: the ridge is a row for each direction."""
    old, new = ({name: weight.double() for name, weight in state.weights.items()} for state in (before, after))
    read = [
        reference.View.of(state.config, b.ids_BS, b.document_start_SB, False)
        for b in batches()
        for state in (before, after)
    ]
    olds, news = read[::2], read[1::2]
    step_D = old.get("step_embedding.weight", torch.zeros(1, D, dtype=torch.float64))[0]
    x = [old["embedding.word_embeddings.weight"][batch.ids_BS.T] + step_D for batch in batches()]
    z, found = list(x), {}
    for layer in range(LAYERS):
        prefix = f"decoder.layers.{layer}."
        name = f"{prefix}self_attention.linear_proj.weight"
        contexts, outputs = [], []
        for place in range(len(x)):
            p, q = reference.scope(old, prefix), reference.scope(new, prefix)
            u = reference.rms_norm(x[place], p["input_layernorm.weight"], ONCE.norm_eps)
            v = reference.rms_norm(z[place], q["input_layernorm.weight"], ONCE.norm_eps)
            own = {**reference.scope(q, "self_attention."), "linear_proj.weight": torch.eye(D, dtype=torch.float64)}
            outputs.append(reference.grouped_attention(reference.scope(p, "self_attention."), ONCE, u, olds[place]))
            contexts.append(reference.latent_attention(own, after.config, v, news[place]))
        c_NC, y_ND = (torch.cat([part.flatten(0, 1) for part in parts]) for parts in (contexts, outputs))
        root = (module._RIDGE * c_NC.square().sum() / D).sqrt() * torch.eye(D, dtype=torch.float64)
        new[name] = torch.linalg.lstsq(torch.cat((c_NC, root)), torch.cat((y_ND, root @ new[name].T))).solution.T
        found[name] = new[name]
        x = [reference.block(reference.scope(old, prefix), ONCE, h, view) for h, view in zip(x, olds, strict=True)]
        z = [reference.block(reference.scope(new, prefix), after.config, h, v) for h, v in zip(z, news, strict=True)]
    return found


@pytest.mark.parametrize(("rank", "step_embedding"), [(12, "none"), (20, "none"), (12, "learned")])
def test_projections_are_those_of_least_squares(rank, step_embedding, single_process):
    before = random_state(replace(ONCE, step_embedding=step_embedding))
    after = to_latent(before, rank, 8, None, latent_norm=False).state
    fitted = refit(before, after, batches(), single_process)
    expected = oracle(before, after)
    assert_close_relative({name: fitted.weights[name].double() for name in expected}, expected, tolerance=1e-4)
    assert fitted.weights.keys() == after.weights.keys()
    unchanged = [name for name in after.weights if torch.equal(fitted.weights[name], after.weights[name])]
    assert len(unchanged) == len(after.weights) - LAYERS


def test_the_states_come_closer_to_those_before(single_process):
    """On other text than the one that was fitted to."""
    before = random_state(ONCE)
    after = to_latent(before, 12, 8, None, latent_norm=False).state
    fitted = refit(before, after, batches(), single_process)
    wanted = hidden(before)
    assert relative_error(hidden(fitted), wanted) < 0.9 * relative_error(hidden(after), wanted)


def test_an_exact_conversion_keeps_its_projections(single_process):
    before = random_state(ONCE)
    after = to_latent(before, D, None, None, latent_norm=True).state
    fitted = refit(before, after, batches(), single_process)
    assert_close_relative(fitted.weights, after.weights, tolerance=1e-4)


def test_directions_that_no_token_had_keep_their_weights():
    start_DC = torch.randn(3, 4).double()
    context_NC, wanted_ND = torch.zeros(5, 4).double(), torch.randn(5, 3).double()
    context_NC[:, :2] = torch.randn(5, 2)
    found = fit(context_NC.T @ context_NC, wanted_ND.T @ context_NC, start_DC)
    assert torch.allclose(found[:, 2:], start_DC[:, 2:])
    assert not torch.allclose(found[:, :2], start_DC[:, :2], atol=0.01)


def test_a_looped_model_is_refused():
    with pytest.raises(
        UserError, match=r"^refit_samples: 64 is not allowed; with model.num_loops=\d a layer would be f"
    ):
        check_refit(MHA, 64)
    check_refit(MHA, 0)
    check_refit(ONCE, 64)


@pytest.mark.slow
def test_the_command_fits_and_says_so(corpus, tmp_path, single_process, monkeypatch):
    plain = {"attention": "mha", "num_attention_heads": 4, "num_loops": 1}
    config = run_config(corpus, tmp_path / "run", model=plain, optim={"train_steps": 30})
    train(config, check_corpus(config.data, config.model.vocab_size), single_process)
    argv = ["latent", f"--checkpoint={tmp_path / 'run'}", "--kv_lora_rank=8", "--qk_rope_head_dim=8"]
    argv += ["--latent_norm=false", f"--data={corpus / 'valid'}", "--samples=8", "--seq_length=32"]
    with pytest.raises(UserError, match="refit_samples: 64 is not allowed; name the data to fit to with calibrate"):
        main([*argv, f"--output={tmp_path / 'none'}", "--refit_samples=64"])
    with monkeypatch.context() as patch:
        patch.setattr("tools.upcycle.to_latent", lambda *_: pytest.fail("work began before the mistake was found"))
        message = r"^refit_samples: 201 is not allowed; .*train holds 200 sequences of 32 tokens; give at most 200$"
        with pytest.raises(UserError, match=message):
            main([*argv, f"--output={tmp_path / 'none'}", f"--calibrate={corpus / 'train'}", "--refit_samples=201"])
    losses, read = {}, []

    def counted(before: ModelState, after: ModelState, batches: list[Batch], groups: Any) -> ModelState:
        read.append(sum(batch.ids_BS.size(0) for batch in batches))
        return refit(before, after, batches, groups)

    monkeypatch.setattr("tools.upcycle.refit", counted)
    for samples in (0, 64):
        output = tmp_path / f"latent_{samples}"
        main([*argv, f"--output={output}", f"--calibrate={corpus / 'train'}", f"--refit_samples={samples}"])
        (record,) = json.loads((output / "companions/upcycle.json").read_text())
        losses[samples] = record["after"]["loss_per_depth"][-1]
        assert ("fitted to what attention gave on 64 sequences" in record["approximate"][-1]) == bool(samples)
    assert losses[64] < losses[0] and read == [64]

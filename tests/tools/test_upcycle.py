"""Upcycling depth, loops and gates: copies are complete, runs resume, and mistakes leave nothing behind."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml

from data_pipeline.manifest import TokenizerRecord
from looplm import checkpoint, reference
from looplm.checkpoint import step_folder
from looplm.cli import from_dict
from looplm.config import GateConfig, RunConfig
from looplm.failures import UserError
from looplm.files import sha256_of
from looplm.model import LoopLM
from looplm.model.exit_gate import exit_log_probs
from pretrain.data import check_corpus
from pretrain.train import train
from tests.support.parity import assert_close_relative
from tests.support.tiny import EOS, MODEL, VOCAB, about_weights, run_config, train_rows, write_prefix
from tools.upcycle import LoopsConfig, main
from tools.upcycling.measure import measure, read_samples
from tools.upcycling.model_state import ModelState, assemble, open_source
from tools.upcycling.structure import change_gate, change_loops, copy_layers, deepen

pytestmark = pytest.mark.usefixtures("keep_process_groups")
ORIGINS = {"stack": [0, 1, 0, 1, 0, 1], "interleave": [0, 0, 0, 1, 1, 1]}
IDS_BS = torch.arange(24).view(2, 12) % VOCAB


def resume(output: Path, groups, steps: int) -> list[dict]:
    """Resume an upcycled run, or the copy of one, from its own config.yaml."""
    config = from_dict(RunConfig, yaml.safe_load((output / "config.yaml").read_text()), where="config.yaml")
    optim = dataclasses.replace(config.optim, train_steps=steps)
    config = dataclasses.replace(config, optim=optim, output_dir=str(output))
    train(config, check_corpus(config.data, config.model.vocab_size), groups)
    return train_rows(output)


@pytest.mark.slow
@pytest.mark.parametrize("how", ORIGINS)
def test_a_deeper_run_has_every_copy_with_its_moments_and_resumes(
    how, tiny_run, corpus, tmp_path, single_process, capsys
):
    output = tmp_path / "deep"
    measured = [f"--data={corpus / 'valid'}", "--samples=4", "--seq_length=32"]
    main(["depth", f"--checkpoint={tiny_run}", f"--output={output}", "--layers=6", f"--how={how}", *measured])
    source, deep = open_source(str(tiny_run), single_process), open_source(str(output), single_process)
    assert deep.state.config == dataclasses.replace(MODEL, num_layers=6)
    assert deep.about.step == 6 and deep.about.samples == source.about.samples and deep.about.gate_trained
    pairs = [(deep.state.weights, source.state.weights)]
    assert deep.state.moments is not None and source.state.moments is not None
    for moment in ("exp_avg", "exp_avg_sq"):
        ours, theirs = (
            {name: adam[moment] for name, adam in moments.items()}
            for moments in (deep.state.moments, source.state.moments)
        )
        pairs.append((ours, theirs))
    for values, theirs in pairs:
        assert all(value.any() for name, value in theirs.items() if not name.startswith("gate."))
        for name, value in values.items():
            layer = name.split(".")[2] if name.startswith("decoder.layers.") else None
            origin = name if layer is None else name.replace(f".{layer}.", f".{ORIGINS[how][int(layer)]}.", 1)
            assert torch.equal(value, theirs[origin]), name

    (record,) = json.loads((output / "companions/upcycle.json").read_text())
    assert record["settings"]["how"] == how and len(record["after"]["loss_per_depth"]) == 3
    shown = capsys.readouterr().out
    assert f"{record['after']['loss_per_depth'][2]:.4f}" in shown and record["approximate"][0] in shown

    rows = resume(output, single_process, 8)
    assert [row["step"] for row in rows] == [7, 8], "it resumes at the source's step"
    shutil.copytree(tiny_run, tmp_path / "same")
    same = resume(tmp_path / "same", single_process, steps=8)[-2:]
    assert [row["learning_rate"] for row in rows] == [row["learning_rate"] for row in same]
    assert [row["samples"] for row in rows] == [row["samples"] for row in same]
    (kept,) = json.loads((output / "checkpoints/step_00000008/companions/upcycle.json").read_text())
    assert kept == record


@pytest.mark.slow
def test_the_reported_losses_match_the_reference(tiny_run, corpus, tmp_path, single_process):
    conversion = [f"--checkpoint={tiny_run}", f"--output={tmp_path / 'deep'}", "--layers=4", "--residual_scale=0.5"]
    main(["depth", *conversion, f"--data={corpus / 'valid'}", "--samples=4", "--seq_length=32"])
    (record,) = json.loads((tmp_path / "deep/companions/upcycle.json").read_text())
    source = open_source(str(tiny_run), single_process)
    scaled = {name: value * 0.5 if "bda.norm" in name else value for name, value in source.state.weights.items()}
    deep, model = copy_layers(scaled, [0, 1, 0, 1]), dataclasses.replace(MODEL, num_layers=4)
    sha256 = source.about.tokenizer_sha256
    (batch,) = read_samples(str(corpus / "valid"), 4, 32, MODEL, sha256, single_process)
    for when, params, config in (("before", source.state.weights, MODEL), ("after", deep, model)):
        output = reference.forward(params, config, source.state.gate, batch.ids_BS, None, batch.document_start_SB)
        head_VD = reference.head_weight(params, config)
        losses = [reference.token_losses(h_SBD, head_VD, batch.labels_SB) for h_SBD in output.hidden]
        means = [reference.masked_mean(loss_SB, batch.mask_SB).item() for loss_SB in losses]
        assert record[when]["loss_per_depth"] == pytest.approx(means, rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("masks", [True, False])
def test_samples_are_read_as_the_source_was_trained(masks, corpus, tmp_path, single_process):
    config = run_config(corpus, tmp_path / "run", data={"document_masking": masks})
    train(config, check_corpus(config.data, config.model.vocab_size), single_process)
    prefix = str(corpus / "valid")
    conversion = LoopsConfig(
        checkpoint=config.output_dir, output=str(tmp_path / "out"), data=prefix, samples=8, loops=2
    )
    (batch, *_) = conversion.read(prefix, conversion.open(single_process), single_process)
    assert (batch.document_start_SB is not None) == masks


@pytest.mark.slow
def test_a_loop_of_a_stacked_model_is_two_loops_without_the_norm_between(tiny_run, single_process):
    state = open_source(str(tiny_run), single_process).state
    deep = assemble(deepen(state, 4, "stack").state, single_process)
    view = reference.View.of(MODEL, IDS_BS, None, fused=False)
    h_SBD = state.weights["embedding.word_embeddings.weight"][IDS_BS.T]
    for layer in (0, 1, 0, 1):
        h_SBD = reference.block(reference.scope(state.weights, f"decoder.layers.{layer}."), MODEL, h_SBD, view)
    h_SBD = reference.rms_norm(h_SBD, state.weights["decoder.final_layernorm.weight"], MODEL.norm_eps)
    assert_close_relative({"loop": deep(IDS_BS, num_loops=1).hidden[0]}, {"loop": h_SBD})


def test_without_sandwich_norms_the_output_matrices_are_scaled():
    model = dataclasses.replace(MODEL, sandwich_norm=False)
    weights = {name: torch.randn(shape) for name, shape in reference.parameter_shapes(model, GateConfig()).items()}
    deep, _, _ = deepen(ModelState(model, GateConfig(), weights), 4, "stack", 0.25)
    params, config = deep.weights, deep.config
    view = reference.View.of(config, IDS_BS, None, fused=False)
    x_SBD = torch.randn(12, 2, model.hidden_size)
    block, copy = (reference.scope(params, f"decoder.layers.{layer}.") for layer in (1, 3))
    assert_close_relative(copy, block)
    normed_SBD = reference.rms_norm(x_SBD, copy["input_layernorm.weight"], model.norm_eps)
    added = [
        reference.latent_attention(reference.scope(p, "self_attention."), config, normed_SBD, view)
        for p in (copy, reference.scope(weights, "decoder.layers.1."))
    ]
    assert_close_relative({"attention": added[0]}, {"attention": added[1] * 0.25})
    first, second = (p[f"decoder.layers.{layer}.mlp.linear_fc2.weight"] for p, layer in ((params, 3), (weights, 1)))
    assert torch.equal(first, second * 0.25)


@pytest.mark.slow
def test_a_bf16_run_keeps_the_fp32_main_weights(corpus, tmp_path, single_process):
    config = run_config(corpus, tmp_path / "run", optim={"precision": "bf16"})
    train(config, check_corpus(config.data, config.model.vocab_size), single_process)
    main(["depth", f"--checkpoint={tmp_path / 'run'}", f"--output={tmp_path / 'deep'}", "--layers=4"])
    source, deep = (open_source(str(tmp_path / name), single_process).state for name in ("run", "deep"))
    name = "decoder.layers.{}.mlp.linear_fc1.weight"
    assert torch.equal(deep.weights[name.format(3)], source.weights[name.format(1)])
    assert not torch.equal(source.weights[name.format(1)], source.weights[name.format(1)].bfloat16().float())
    assert len(resume(tmp_path / "deep", single_process, 7)) == 1


@pytest.mark.slow
def test_weights_alone_stay_weights_alone_and_initialize_a_run(tiny_run, corpus, tmp_path, single_process):
    source = open_source(str(tiny_run), single_process)
    model, about = assemble(source.state, single_process), dataclasses.replace(source.about, objective="weights")
    checkpoint.save_weights(tmp_path / "weights", model, source.state.gate, about, source.tokenizer)
    main(["depth", f"--checkpoint={tmp_path / 'weights'}", f"--output={tmp_path / 'deep'}", "--layers=4"])
    main(["loops", f"--checkpoint={tmp_path / 'deep'}", f"--output={tmp_path / 'short'}", "--loops=2"])
    assert checkpoint.read_config(tmp_path / "short") is None
    records = json.loads((tmp_path / "short/companions/upcycle.json").read_text())
    assert [record["kind"] for record in records] == ["depth", "loops"], "each appends its record"
    config = run_config(
        corpus,
        tmp_path / "run",
        model={"num_layers": 4, "num_loops": 2},
        checkpoint={"initial": str(tmp_path / "short")},
    )
    train(config, check_corpus(config.data, config.model.vocab_size), single_process)


def save_weights(folder: Path, corpus: Path, groups, dtype: str = "float32", record: str | None = None) -> list[str]:
    """Write random weights alone, with an upcycle.json; return the argument that names them."""
    model, companions = LoopLM(MODEL, GateConfig(state_size=8), groups, getattr(torch, dtype)), folder.parent / "beside"
    companions.mkdir(exist_ok=True)
    if record is not None:
        (companions / "upcycle.json").write_text(record)
    tokenizer = corpus / "tokenizer.json"
    about = about_weights(dtype, tokenizer)
    checkpoint.save_weights(folder, model, GateConfig(state_size=8), about, tokenizer, companions)
    return [f"--checkpoint={folder}"]


@pytest.mark.slow
@pytest.mark.parametrize("loops", [1, 2])
def test_a_gate_that_chooses_nothing_is_untrained(loops, corpus, tmp_path, single_process):
    source = save_weights(tmp_path / "weights", corpus, single_process)
    main(["loops", *source, f"--output={tmp_path / 'out'}", f"--loops={loops}"])
    assert checkpoint.read_about(tmp_path / "out").gate_trained == (loops > 1)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("record", "words"),
    [
        ("[{", r"cannot be read as JSON in UTF-8 \(Expecting .*\); get the checkpoint again"),
        ("{}", "is not a list of conversions; get the checkpoint again"),
        ("[1]", "is not a list of conversions; get the checkpoint again"),
    ],
)
def test_a_damaged_record_is_found_before_the_work(record, words, corpus, tmp_path, single_process, monkeypatch):
    source = save_weights(tmp_path / "weights", corpus, single_process, record=record)
    monkeypatch.setattr("tools.upcycle.change_loops", lambda *_: pytest.fail("work began before the fault was found"))
    with pytest.raises(UserError, match=f"^{tmp_path}/weights/companions/upcycle.json: {words}$"):
        main(["loops", *source, f"--output={tmp_path / 'out'}", "--loops=2"])


@pytest.mark.slow
def test_losses_are_those_of_the_weights_that_are_written(corpus, tmp_path, single_process):
    source = save_weights(tmp_path / "weights", corpus, single_process, "bfloat16")
    measured = [f"--data={corpus / 'valid'}", "--samples=4", "--seq_length=32"]
    main(["depth", *source, f"--output={tmp_path / 'deep'}", "--layers=4", "--residual_scale=0.3", *measured])
    (record,) = json.loads((tmp_path / "deep/companions/upcycle.json").read_text())
    written = open_source(str(tmp_path / "deep"), single_process)
    batches = read_samples(str(corpus / "valid"), 4, 32, MODEL, written.about.tokenizer_sha256, single_process)
    assert record["after"] == measure(written.state, batches, 3, single_process)


@pytest.mark.slow
@pytest.mark.parametrize("loops", [2, 5])
def test_other_loops_leave_hidden_states_alone_and_move_the_gates_prior(loops, tiny_run, tmp_path, single_process):
    main(["loops", f"--checkpoint={tiny_run}", f"--output={tmp_path / 'out'}", f"--loops={loops}"])
    source, other = (open_source(str(path), single_process).state for path in (tiny_run, tmp_path / "out"))
    assert other.moments is not None
    before, after = (assemble(state, single_process)(IDS_BS) for state in (source, other))
    assert len(after.hidden) == loops
    common = min(loops, 3)
    assert all(torch.equal(a, b) for a, b in zip(after.hidden[:common], before.hidden[:common], strict=True))
    learned = before.gate_logit_RSB[0] + torch.tensor(2.0).log()  # what the gate added to the prior's logit(1/3)
    prior = -torch.tensor(float(loops - 1)).log()
    assert torch.allclose(after.gate_logit_RSB[0], learned + prior, atol=1e-6)
    assert len(resume(tmp_path / "out", single_process, 7)) == 1


@pytest.mark.parametrize(("loops", "rows"), [(2, [0, 1]), (5, [0, 1, 2, 2, 2])])
def test_other_loops_keep_their_step_embedding_and_further_ones_start_with_the_last(loops, rows, single_process):
    config, name = dataclasses.replace(MODEL, step_embedding="learned"), "step_embedding.weight"
    table_RD = torch.randn(3, MODEL.hidden_size)
    source = ModelState(config, GateConfig(), {name: table_RD}, {name: {"exp_avg": 2 * table_RD}})
    state = change_loops(source, loops).state
    assert state.config.num_loops == loops and state.moments is not None
    assert torch.equal(state.weights[name], table_RD[rows])
    assert torch.equal(state.moments[name]["exp_avg"], 2 * table_RD[rows])
    fresh = LoopLM(config, source.gate, single_process).named_parameters()
    source = source._replace(weights={key: torch.randn(parameter.shape) for key, parameter in fresh})
    before = assemble(source, single_process)(IDS_BS, num_loops=5).hidden
    after = assemble(change_loops(source, loops).state, single_process)(IDS_BS).hidden
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=False))


@pytest.mark.slow
def test_a_fresh_gate_is_the_uniform_prior_on_the_same_trunk(tiny_run, tmp_path, single_process):
    main(["gate", f"--checkpoint={tiny_run}", f"--output={tmp_path / 'linear'}", "--kind=linear"])
    main(
        ["gate", f"--checkpoint={tmp_path / 'linear'}", f"--output={tmp_path / 'lru'}", "--kind=lru", "--state_size=4"]
    )
    source, linear, lru = (
        open_source(str(path), single_process) for path in (tiny_run, tmp_path / "linear", tmp_path / "lru")
    )
    assert source.about.gate_trained and not linear.about.gate_trained and not lru.about.gate_trained
    before, after = (assemble(found.state, single_process)(IDS_BS) for found in (source, lru))
    assert torch.equal(torch.stack(after.hidden), torch.stack(before.hidden))
    assert torch.allclose(exit_log_probs(after.gate_logit_RSB).exp(), torch.tensor(1 / 3))
    assert len(resume(tmp_path / "lru", single_process, 7)) == 1


@pytest.mark.slow
def test_a_run_whose_keys_do_not_fit_the_new_model_becomes_weights_alone(corpus, tmp_path, single_process, capsys):
    config = run_config(corpus, tmp_path / "run", loss={"backward_loops": 2})
    train(config, check_corpus(config.data, config.model.vocab_size), single_process)
    main(["loops", f"--checkpoint={tmp_path / 'run'}", f"--output={tmp_path / 'once'}", "--loops=1"])
    assert checkpoint.read_about(tmp_path / "once").objective == checkpoint.WEIGHTS_ONLY
    assert "do not fit (loss.backward_loops: 2 is not allowed" in capsys.readouterr().out
    main(["loops", f"--checkpoint={tmp_path / 'run'}", f"--output={tmp_path / 'more'}", "--loops=4"])
    assert checkpoint.read_config(step_folder.locate(str(tmp_path / "more"))) is not None


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({}, "a loop is 2 loops of the source without the loop-end norm between them"),
        ({"loop_norm": "readout"}, "a loop is 2 loops of the source"),
        ({"injection": "diagonal"}, ""),
        ({"step_embedding": "learned"}, ""),
    ],
)
def test_a_stacked_model_claims_to_be_loops_of_the_source_only_where_it_is(changes, sentence):
    made = deepen(ModelState(dataclasses.replace(MODEL, **changes), GateConfig(), {}), 4, "stack")
    assert made.exact[1:] == ([sentence] if sentence else [])


def test_a_gate_that_differs_only_in_keys_of_other_kinds_is_the_same():
    state = ModelState(MODEL, GateConfig(kind="linear"), {})
    with pytest.raises(UserError, match="kind: 'linear' is not allowed; the source has this gate already"):
        change_gate(state, GateConfig(kind="linear", state_size=128))
    assert change_gate(state, GateConfig(kind="mlp")).state.gate.kind == "mlp"


@pytest.mark.slow
def test_the_weights_of_a_gate_stage_are_read(tiny_run, corpus, tmp_path, single_process):
    config = run_config(
        corpus, tmp_path / "gate", loss={"objective": "adaptive_gate"}, checkpoint={"initial": str(tiny_run)}
    )
    train(config, check_corpus(config.data, config.model.vocab_size), single_process)
    main(["depth", f"--checkpoint={tmp_path / 'gate'}", f"--output={tmp_path / 'deep'}", "--layers=4"])
    assert checkpoint.read_about(tmp_path / "deep").objective == checkpoint.WEIGHTS_ONLY


@pytest.mark.slow
def test_mistakes_give_a_one_line_error_and_leave_nothing(tiny_run, corpus, tmp_path, single_process):
    source, output = f"--checkpoint={tiny_run}", f"--output={tmp_path / 'out'}"
    depth = ["depth", source, output]
    record = json.loads((corpus / "valid.manifest.json").read_text())["tokenizer"]
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "tokenizer.json").write_text((corpus / "tokenizer.json").read_text() + "\n")
    record |= {"sha256": sha256_of(foreign / "tokenizer.json")}
    write_prefix(foreign / "valid", [[5] * 100 + [EOS]], TokenizerRecord(**record), "valid")
    messages = {
        r"python -m tools.upcycle: no command: unknown command; give one of depth, ": [],
        r"python -m tools.upcycle: deepen: unknown command; give one of depth, ": ["deepen", source, output],
        r"python -m tools.upcycle: dept: unknown command; did you mean depth\?": ["dept", source, output],
        r"layers: 5 is not allowed; give a multiple of the source's 2, such as 4": [*depth, "--layers=5"],
        r"layers: 2 is not allowed": [*depth, "--layers=2"],
        r"--layer: unknown key; did you mean layers": [*depth, "--layer=4"],
        r"loops: 3 is not allowed": ["loops", source, output, "--loops=3"],
        r"model.num_loops: 1000000000 is not": ["loops", source, output, "--loops=1000000000"],
        r"model.num_layers: 2000000000 is not": [*depth, "--layers=2000000000"],
        r"kind: 'lru' is not allowed; the source has this gate": ["gate", source, output, "--state_size=8"],
        r"residual_scale: 0.0 ": [*depth, "--layers=4", "--residual_scale=0"],
        r"the converted weight holds values that are not finite": [*depth, "--layers=4", "--residual_scale=1e39"],
        r"^samples: 5 is not allowed; it needs data; name some, or leave it out": [*depth, "--layers=4", "--samples=5"],
        r"^seq_length: 9 is not allowed; it needs data": [*depth, "--layers=4", "--seq_length=9"],
        r"output: .* exists already": ["depth", source, f"--output={tiny_run}", "--layers=4"],
        r"nowhere: no whole checkpoint": ["depth", "--checkpoint=nowhere", output, "--layers=4"],
        r"made with another tokenizer": [*depth, "--layers=4", f"--data={foreign / 'valid'}"],
        r"seq_length: 65 is not allowed; give at most the model's max_sequence_length=64": [
            *depth,
            "--layers=4",
            f"--data={corpus / 'valid'}",
            "--seq_length=65",
        ],
    }
    for words, argv in messages.items():
        with pytest.raises(UserError, match=words) as caught:
            main(argv)
        assert "\n" not in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["foreign"]

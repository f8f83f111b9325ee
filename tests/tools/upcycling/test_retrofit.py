"""Retrofits: one loop is the dense model in transformers, two are the range twice; the search picks the best."""

import json
import re
from dataclasses import replace
from math import inf, nan
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from looplm import checkpoint
from looplm.config import GateConfig
from looplm.failures import UserError
from tests.support.parity import assert_close_relative
from tests.tools.upcycling.test_dense import CASES, IDS_BS, SIZES, save
from tools.upcycle import RetrofitConfig, main
from tools.upcycling.dense import open_dense
from tools.upcycling.model_state import ModelState, assemble
from tools.upcycling.retrofit import Trial, retrofit
from tools.upcycling.structure import copy_layers

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("keep_process_groups")]


@pytest.fixture(scope="module")
def llama(corpus, tmp_path_factory) -> Path:
    return save(LlamaConfig(**SIZES), tmp_path_factory.mktemp("hf") / "llama", corpus)


@pytest.mark.parametrize("layers", ["1:3", "0:2", "2:4"])
@pytest.mark.parametrize("injection", ["none", "diagonal", "linear"])
@pytest.mark.parametrize("case", ["grouped", "tied", "biases", "normed-heads"])
def test_one_loop_is_the_dense_model(case, injection, layers, corpus, tmp_path, single_process):
    folder = save(CASES[case], tmp_path / "dense", corpus)
    expected = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).double()(IDS_BS).logits
    made = retrofit(open_dense(folder, None, "<eos>").state, layers, 3, GateConfig(), injection)
    model = assemble(made.state, single_process)
    logits = (model(IDS_BS, num_loops=1).hidden[0] @ model.head_weight().T).transpose(0, 1)
    assert_close_relative({"logits": logits}, {"logits": expected})
    assert not made.state.config.prelude_layers or made.state.config.prelude_layers == int(layers[0])


@pytest.mark.parametrize("injection", ["none", "linear", "diagonal"])
def test_two_loops_are_the_ranges_layers_twice(llama, injection, single_process):
    source = open_dense(llama, None, "<eos>").state
    twice = copy_layers(source.weights, [0, 1, 2, 1, 2, 3])
    config = replace(source.config, num_layers=6)
    expected = assemble(ModelState(config, GateConfig(), twice), single_process)(IDS_BS).hidden[0]
    made = retrofit(source, "1:3", 2, GateConfig(), injection)
    found = assemble(made.state, single_process)(IDS_BS)
    assert_close_relative({"hidden": found.hidden[1]}, {"hidden": expected})
    one = torch.full_like(found.gate_logit_RSB[0], 0.5).logit()
    assert torch.allclose(found.gate_logit_RSB[0], one), "a fresh gate is the uniform prior"


def test_a_scale_weighs_what_the_looped_layers_add(llama, single_process):
    source = open_dense(llama, None, "<eos>").state
    half = retrofit(source, "1:3", 2, GateConfig(), residual_scale=0.5).state.weights
    whole = retrofit(source, "1:3", 2, GateConfig()).state.weights
    changed = {name for name, weight in half.items() if not torch.equal(weight, whole[name])}
    outputs = ("self_attention.linear_proj.weight", "mlp.linear_fc2.weight")
    assert changed == {f"decoder.layers.{layer}.{name}" for layer in range(2) for name in outputs}
    assert all(torch.equal(half[name], whole[name] / 2) for name in changed)


def test_the_search_writes_the_best_range(llama, corpus, tmp_path, capsys, single_process):
    words = ["--eos_token=<eos>", "--samples=4", "--seq_length=16", f"--data={corpus / 'train'}"]
    main(
        [
            "retrofit",
            f"--input={llama}",
            f"--output={tmp_path / 'out'}",
            "--layers=1:3",
            "--loops=2",
            "--search=[0:2,2:4]",
            "--scales=[0.5]",
            "--gate.kind=linear",
            "--injection=additive",
            *words,
        ]
    )
    lines = capsys.readouterr().out.splitlines()
    start = next(number for number, line in enumerate(lines) if line.split()[:2] == ["layers", "scale"])
    trials = [line.split() for line in lines[start + 1 : start + 7]]
    losses = [float(trial[-1]) for trial in trials]
    assert losses == sorted(losses) and len({(trial[0], trial[1]) for trial in trials}) == 6
    opened = checkpoint.open_model(str(tmp_path / "out"), single_process)
    assert opened.model.model_config.prelude_layers == int(trials[0][0].split(":")[0])
    assert opened.model.model_config.injection == "additive"
    record = json.loads((tmp_path / "out" / "companions" / "upcycle.json").read_text())[-1]
    assert record["after"]["loss_per_depth"][-1] == pytest.approx(losses[0], abs=1e-3)


@pytest.mark.parametrize(("second", "best"), [(3.0, "0:2"), (inf, None)])
def test_a_loss_that_is_not_finite_is_never_the_best(second, best, tmp_path, monkeypatch):
    config = RetrofitConfig(input="hf", output=str(tmp_path / "out"), data="text", layers="1:3", search=("0:2", "2:4"))
    trials = [Trial("1:3", 1.0, (2.0, nan)), Trial("2:4", 1.0, (1.0, -inf)), Trial("0:2", 1.0, (2.0, second))]
    monkeypatch.setattr("tools.upcycle.search", lambda *_: iter(trials))
    monkeypatch.setattr("tools.upcycle.retrofit", lambda source, layers, *_: layers)
    monkeypatch.setattr(RetrofitConfig, "read", lambda *_: [])
    source: Any = SimpleNamespace(state=None)
    if best is None:
        fix = "no range has a finite loss; is the source whole?"
        with pytest.raises(UserError, match=rf"^search: \['1:3', '0:2', '2:4'\] is not allowed; {re.escape(fix)}$"):
            config.convert(source, source)
    else:
        assert config.convert(source, source) == best


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--layers=3:9"], "layers: '3:9' is not allowed; give FIRST:END"),
        (["--layers=0:99999999999999999999"], "layers: '0:9+' is not allowed; give FIRST:END"),
        (["--layers=²:4"], "layers: '²:4' is not allowed; give FIRST:END"),
        (["--layers=1:3", "--search=[0:2]"], r"search: \['0:2'\] is not allowed; .* give --data too"),
        (["--layers=1:3", "--scales=[0.5]"], r"scales: \[0.5\] is not allowed; .* give --data too"),
        (["--layers=1:3", "--search=[0:2,99:100]", "--data={data}"], "search: '99:100' is not allowed; give FIRST:END"),
        (["--layers=1:3", "--data=nowhere"], "nowhere"),
    ],
)
def test_mistakes_are_one_line_before_anything_is_measured(words, message, llama, corpus, tmp_path, monkeypatch):
    monkeypatch.setattr("tools.upcycling.retrofit.measure", lambda *_: pytest.fail("a range was measured before"))
    words = [word.format(data=corpus / "train") for word in words]
    with pytest.raises(UserError, match=message):
        main(["retrofit", f"--input={llama}", f"--output={tmp_path / 'out'}", "--eos_token=<eos>", *words])
    assert not (tmp_path / "out").exists()

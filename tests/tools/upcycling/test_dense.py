"""Conversion of dense models to looped ones, compared with transformers' own Llama and Qwen."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, processors
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from looplm import checkpoint
from looplm.config import GateConfig
from looplm.failures import UserError
from looplm.huggingface.convert import export_model
from looplm.inference import GenerationConfig, Generator
from pretrain.data import check_corpus
from pretrain.train import train
from tests.support.hf_models import code_cache as code_cache
from tests.support.parity import assert_close_relative
from tests.support.tiny import VOCAB, run_config, train_rows
from tools.upcycle import main
from tools.upcycling.dense import loop_layers, open_dense
from tools.upcycling.model_state import assemble

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("keep_process_groups")]
SIZES: dict[str, Any] = {"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.2}
WIDE = SIZES | {"num_key_value_heads": 4, "head_dim": 12, "rope_theta": 5e5, "rms_norm_eps": 1e-3}
CASES = {
    "grouped": LlamaConfig(**SIZES),
    "tied": LlamaConfig(**SIZES, tie_word_embeddings=True),
    "wide-heads-long-waves": LlamaConfig(**WIDE),
    "biases": Qwen2Config(**SIZES),
    "normed-heads": Qwen3Config(**SIZES, head_dim=12),
}
GROUPED_BY_DEFAULT = {
    groups: SIZES | {"hidden_size": 128, "num_attention_heads": 2 * groups, "num_key_value_heads": groups}
    for groups in (8, 32)
}
IDS_BS = torch.arange(40).view(2, 20) * 7 % VOCAB


def save(config: PretrainedConfig, folder: Path, corpus: Path) -> Path:
    """Save a random model with transformers, and the corpus's tokenizer beside it."""
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith(".bias"):
                parameter.uniform_(0.5, 1.5)
    model.save_pretrained(folder)
    shutil.copy(corpus / "tokenizer.json", folder)
    return folder


@pytest.fixture(scope="module")
def llama(corpus, tmp_path_factory) -> Path:
    return save(LlamaConfig(**SIZES), tmp_path_factory.mktemp("hf") / "llama", corpus)


@pytest.mark.parametrize("case", CASES)
def test_one_loop_over_all_layers_is_the_dense_model(case, corpus, tmp_path, single_process):
    folder = save(CASES[case], tmp_path / "dense", corpus)
    expected = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).double()(IDS_BS).logits
    source = open_dense(folder, None, "<eos>")
    model = assemble(loop_layers(source.state, None, 1, GateConfig()).state, single_process)
    logits = (model(IDS_BS).hidden[-1] @ model.head_weight().T).transpose(0, 1)
    assert_close_relative({"logits": logits}, {"logits": expected})


@pytest.mark.parametrize(
    ("family", "left_out"),
    [
        (MistralConfig(**GROUPED_BY_DEFAULT[8], sliding_window=None), ["num_key_value_heads"]),
        (Qwen2Config(**GROUPED_BY_DEFAULT[32]), ["num_key_value_heads"]),
        (Qwen3Config(**GROUPED_BY_DEFAULT[32], head_dim=128), ["num_key_value_heads", "head_dim"]),
    ],
    ids=["mistral", "qwen2", "qwen3"],
)
def test_a_missing_key_means_what_transformers_takes_for_it(family, left_out, corpus, tmp_path):
    folder = save(family, tmp_path / "dense", corpus)
    whole = open_dense(folder, None, "<eos>").state
    values = json.loads((folder / "config.json").read_text())
    for key in left_out:
        del values[key]
    (folder / "config.json").write_text(json.dumps(values))
    assert open_dense(folder, None, "<eos>").state.config == whole.config
    assert type(family).from_pretrained(folder).to_dict() == family.to_dict()


@pytest.mark.promise(
    text="A dense model with one loop writes the text that it writes in transformers, and so does its export",
    expected="the same ids: BOS is put in, and each of several end tokens ends the text",
)
def test_one_loop_writes_the_dense_models_text(corpus, tmp_path, single_process, record_property, code_cache):
    folder = save(LlamaConfig(**SIZES), tmp_path / "dense", corpus)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.post_processor = processors.TemplateProcessing("<bos> $A", special_tokens=[("<bos>", 0)])
    tokenizer.enable_truncation(2)  # transformers does not apply it
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"bos_token": "<bos>", "eos_token": "<eos>", "tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(names))

    def theirs(path: Path, prompt: str) -> list[int]:
        model: Any = AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True, dtype=torch.float32)
        ids = AutoTokenizer.from_pretrained(path)(prompt, return_tensors="pt").input_ids
        with torch.no_grad():
            return model.generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=2)[0, ids.size(1) :].tolist()

    (folder / "generation_config.json").write_text("{}")
    config = json.loads((folder / "config.json").read_text()) | {"pad_token_id": -1}
    (folder / "config.json").write_text(json.dumps(config))
    endless = theirs(folder, "def add_1(")
    last = endless[6]
    ending = endless[: endless.index(last)]
    assert len(ending) > 2 and not {1, 3} & set(ending)
    ends = {"eos_token_id": [last, 1, 3], "pad_token_id": -1, "bos_token_id": 0}
    (folder / "generation_config.json").write_text(json.dumps(ends))
    main(["dense", f"--input={folder}", f"--output={tmp_path / 'looped'}", "--loops=1", "--gate.state_size=8"])
    opened = checkpoint.open_model(str(tmp_path / "looped"), single_process)
    about = opened.about
    assert (about.eos_ids, about.bos_id, about.begin_id, about.pad_id) == ((last, 1, 3), 0, 0, None)
    settings = GenerationConfig(temperature=0.0, max_new_tokens=12)
    (ours,) = Generator.of(opened).generate(["def add_1("], settings)
    assert ours.ids == ending and ours.finish == "eos"
    assert theirs(folder, "def add_1(") == [*ending, last]

    opened = checkpoint.open_model(str(tmp_path / "looped"), single_process, dtype=None)
    export_model(opened, tmp_path / "export", "looplm", None, 10**9)
    assert theirs(tmp_path / "export", "def add_1(") == [*ending, last]
    for file in ("config.json", "generation_config.json"):
        assert json.loads((tmp_path / "export" / file).read_text())["eos_token_id"] == [last, 1, 3], file
    named = json.loads((tmp_path / "export/tokenizer_config.json").read_text())
    assert named["eos_token"] == "<eos>", "one of the three, as before"

    without = Generator.of(opened, add_bos=False).generate(["def add_1("], settings)[0]
    expected = Generator(opened.model, opened.tokenizer, opened.about.eos_ids).generate(["def add_1("], settings)[0]
    assert without.ids == expected.ids != ours.ids
    (again,) = Generator.of(opened).generate(["<bos>def add_1("], settings)
    assert again.ids == ours.ids, "a prompt that begins with BOS gets no second one"
    record_property("seen", "the same ids")


def test_a_range_of_layers_is_looped_and_learns(llama, corpus, tmp_path, single_process, capsys):
    conversion = [f"--input={llama}", f"--output={tmp_path / 'looped'}", "--layers=1:3", "--loops=3"]
    measured = ["--gate.state_size=8", f"--data={corpus / 'valid'}", "--samples=4", "--seq_length=32"]
    main(["dense", *conversion, *measured])
    (record,) = json.loads((tmp_path / "looped/companions/upcycle.json").read_text())
    assert "2 of 4 layers are left out" in record["approximate"] and record["approximate"][0] in capsys.readouterr().out
    opened = checkpoint.open_model(str(tmp_path / "looped"), single_process)
    theirs = load_file(llama / "model.safetensors")
    model_config = opened.model.model_config
    assert (model_config.num_layers, model_config.num_loops, model_config.sandwich_norm) == (2, 3, False)
    assert opened.about.eos_ids == (2,) and not opened.about.gate_trained
    for ours, layer in ((0, 1), (1, 2)):
        weight = opened.model.decoder.layers[ours].mlp.linear_fc2.weight
        assert torch.equal(weight, theirs[f"model.layers.{layer}.mlp.down_proj.weight"])
    assert not (tmp_path / "looped/companions/config.json").exists(), "the result is not a Llama"
    torch.testing.assert_close(record["after"]["exit_distribution"], [1 / 3] * 3)

    config = run_config(
        corpus, tmp_path / "run", gate={"state_size": 8}, checkpoint={"initial": str(tmp_path / "looped")}
    )
    config = replace(config, model=model_config, optim=replace(config.optim, train_steps=20))
    train(config, check_corpus(config.data, config.model.vocab_size), single_process)
    rows = train_rows(tmp_path / "run")
    assert rows[-1]["loss"] < rows[0]["loss"] - 0.5 and max(row["loss"] for row in rows) < rows[0]["loss"] + 0.1


def test_what_is_left_behind_is_named_and_links_are_not_followed(llama, tmp_path, capsys):
    folder = Path(shutil.copytree(llama, tmp_path / "hf"))
    for name in ("LICENSE", "README.md"):
        (folder / name).write_text(name)
    (tmp_path / "secret").write_text("secret")
    (folder / "chat_template.jinja").symlink_to("../secret")
    main(["dense", f"--input={folder}", f"--output={tmp_path / 'ours'}", "--loops=1"])
    assert "left behind: README.md, chat_template.jinja\n" in capsys.readouterr().err
    carried = {path.name: path.read_text() for path in (tmp_path / "ours/companions").iterdir()}
    assert carried["LICENSE"] == "LICENSE" and "secret" not in carried.values()


def test_mistakes_give_a_one_line_error_and_leave_nothing(llama, corpus, tmp_path, single_process):
    def changed(**values: object) -> str:
        folder = tmp_path / "hf" / str(len(list((tmp_path / "hf").glob("*"))))
        shutil.copytree(llama, folder)
        (folder / "generation_config.json").unlink()  # its ids would come before those of config.json
        config = json.loads((llama / "config.json").read_text()) | values
        (folder / "config.json").write_text(json.dumps(config))
        return f"--input={folder}"

    (tmp_path / "hf").mkdir()
    normed = save(Qwen3Config(**SIZES), tmp_path / "hf/qwen3", corpus)
    (normed / "config.json").write_text((normed / "config.json").read_text().replace('"qwen3"', '"qwen2"'))
    bare = tmp_path / "hf/bare"
    shutil.copytree(llama, bare)
    (bare / "tokenizer.json").unlink()
    pickled = tmp_path / "hf/pickled"
    shutil.copytree(bare, pickled)
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    scaled = {"rope_type": "llama3", "factor": 8.0, "rope_theta": 1e4}
    source, output = f"--input={llama}", f"--output={tmp_path / 'out'}"
    generated = changed()
    bad_ids = Path(generated.removeprefix("--input=")) / "generation_config.json"
    bad_ids.write_text('{"eos_token_id": [1, 4000]}')
    config_path = r"config\.json: "
    messages = {
        r"generation_config\.json: eos_token_id: 4000 is not allowed; .* null \(or -1\) for no": [generated],
        config_path + r"pad_token_id: -2 is not allowed": [changed(pad_token_id=-2)],
        config_path + r"bos_token_id: 0\.0 is not allowed": [changed(bos_token_id=0.0)],
        config_path + r"quantization_config: .* not supported": [changed(quantization_config={"bits": 4})],
        config_path + r"rope_scaling: .* not supported": [changed(rope_scaling={"factor": 8.0})],
        config_path + r"model_type: \['llama'\] is not": [changed(model_type=["llama"])],
        r"layers: '3:9' is not allowed; give FIRST:END, such as 1:3, of the source's 4": [source, "--layers=3:9"],
        r"layers: '2:2' is not allowed": [source, "--layers=2:2"],
        r"layers: 'all' is not allowed": [source, "--layers=all"],
        r"loops: 0 is not allowed": [source, "--loops=0"],
        r"input: .* no config.json here": [f"--input={tmp_path}"],
        r"model_type: 'gpt2' is not a dense model": [changed(model_type="gpt2")],
        r"sliding_window: 16 is not supported": [changed(model_type="mistral", sliding_window=16)],
        config_path + r"sliding_window: 4096 is not supported; it must be null, not missing \(4096\)$": [
            changed(model_type="mistral")
        ],
        r"attention_bias: True is not supported": [changed(attention_bias=True)],
        r"hidden_act: 'gelu' is not supported": [changed(hidden_act="gelu")],
        r"rope_parameters: .*it must be of type default, without scaled positions": [changed(rope_parameters=scaled)],
        r"shape": [changed(intermediate_size=64)],
        r"q_norm\.weight.* here, but config.json describes no such tensor|q_proj.bias.* missing": [f"--input={normed}"],
        r"tokenizer: .*there is no such file": [f"--input={bare}"],
        r"a pickle can run any code": [f"--input={pickled}"],
        r"eos_token: '<none>' is not allowed": [source, "--eos_token=<none>"],
    }
    for words, argv in messages.items():
        with pytest.raises(UserError, match=words) as caught:
            main(["dense", output, *argv])
        assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]

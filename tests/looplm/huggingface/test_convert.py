"""Round trips between Hugging Face directories and our checkpoints: no bit and no key is lost, no code is run."""

import dataclasses
import itertools
import json
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from looplm import checkpoint
from looplm.checkpoint import WEIGHTS_ONLY, step_folder
from looplm.cli import to_dict
from looplm.config import GateConfig
from looplm.failures import UserError
from looplm.files import sha256_of
from looplm.huggingface import companion_files
from looplm.huggingface.convert import choose_hf_layout, examine, export_model, import_source, with_tokens
from looplm.huggingface.inventory import inspect
from looplm.huggingface.names import join, split
from looplm.model import LoopLM
from looplm.parameters import parameters
from pretrain.data import check_corpus
from pretrain.train import train
from tests.support import ouro_reference as ouro
from tests.support.generation_oracle import READ_OUTS
from tests.support.tiny import BOS, EOS, MODEL, PAD, VOCAB, about_weights, run_config
from tests.test_recipes import GATES, MODELS

pytestmark = pytest.mark.slow  # every test here starts a process or trains

BIG = 10**9
LINEAR = GateConfig(kind="linear")
MHA = dataclasses.replace(MODEL, attention="mha", num_attention_heads=4)

SETTINGS = {
    "output": "/home/someone/deep",
    "data": "../text/valid",
    "samples": 16,
    "eos_token": "</s>",
    "tokenizer": None,
}
UPCYCLED = {"kind": "dense", "source": "/home/someone/models/llama", "settings": SETTINGS, "exact": ["1/2 of it"]}
REDUCED = UPCYCLED | {"source": "llama", "settings": SETTINGS | {"output": "deep", "data": "valid"}}


@pytest.fixture(autouse=True)
def code(tmp_path_factory, monkeypatch):
    """Stand-ins for the code that travels inside an export in our layout."""
    folder = tmp_path_factory.mktemp("code")
    paths = tuple(folder / f"{kind}_looplm.py" for kind in ("configuration", "modeling"))
    for path in paths:
        path.write_text("raise SystemExit('this is data')")
    monkeypatch.setattr(companion_files, "CODE", paths)


def export(directory, final, groups, hf_layout="auto", dtype=None, limit=BIG):
    opened = checkpoint.open_model(str(directory), groups, dtype=None)
    found = checkpoint.ModelDescription(opened.model.model_config, opened.gate)
    return export_model(opened, final, choose_hf_layout(hf_layout, found), dtype, limit)


def tensors_of(folder):
    return {name: value for path in folder.glob("*.safetensors") for name, value in load_file(path).items()}


def assert_same_bits(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype is value.dtype and torch.equal(found[name], value), name


def weights_of(directory, groups):
    return dict(checkpoint.open_model(str(directory), groups, dtype=None).model.named_parameters())


def test_every_parameter_has_a_row(single_process):
    pairs = [*itertools.product(MODELS.values(), GATES.values()), *((config, LINEAR) for config in READ_OUTS.values())]
    for config, gate in pairs:
        model = LoopLM(config, gate, single_process)
        tensors = dict(model.named_parameters())
        rows = {row.name: row for row in parameters(config, gate)}
        assert {name: row.shape for name, row in rows.items()} == {name: tuple(t.shape) for name, t in tensors.items()}
        for name, row in rows.items():
            parts = split(row, tensors[name])
            assert [tuple(part.shape) for part in parts] == list(row.hugging_face_parts.values())
            assert torch.equal(join(row, parts), tensors[name])


@pytest.mark.parametrize(("dtype", "shards"), [(torch.float32, 1), (torch.bfloat16, 3), (torch.float16, 1)])
def test_a_released_directory_comes_back_unchanged(dtype, shards, corpus, tmp_path, single_process):
    config = ouro.CONFIG | {"torch_dtype": str(dtype).removeprefix("torch."), "num_key_value_heads": 2}
    tensors = {name: value.to(dtype) for name, value in ouro.random_tensors(config).items()}
    source = ouro.write_folder(tmp_path / "hf", tensors, config, corpus / "tokenizer.json", shards)
    (source / "modeling_ouro.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    (source / "generation_config.json").write_text('{"eos_token_id": [1, 2], "pad_token_id": 2}')
    (source / "README.md").write_text("# Theirs\n")
    (source / "pytorch_model.bin").write_bytes(b"never opened")
    (tmp_path / "secret").write_text("not in the directory")
    (source / "notes.txt").symlink_to(tmp_path / "secret")

    left_behind = import_source(examine(source), tmp_path / "ours", single_process)
    assert left_behind == ["notes.txt", "pytorch_model.bin"]
    about = checkpoint.read_about(tmp_path / "ours")
    assert (about.objective, about.dtype, about.step) == (WEIGHTS_ONLY, config["torch_dtype"], 0)
    assert (about.bos_id, about.eos_ids, about.pad_id) == (0, (1, 2), 2)
    assert (about.gate_trained, about.tokenizer_sha256) == (True, sha256_of(corpus / "tokenizer.json"))
    assert step_folder.find_fault(tmp_path / "ours") is None

    export(tmp_path / "ours", tmp_path / "back", single_process, limit=BIG if shards == 1 else 20_000)
    assert_same_bits(tensors_of(tmp_path / "back"), tensors)
    for path in source.iterdir():
        if "safetensors" not in path.name and path.name not in left_behind:
            assert (tmp_path / "back" / path.name).read_bytes() == path.read_bytes(), path.name
    assert not (tmp_path / "ran").exists(), "imported code was run"
    assert not list(tmp_path.glob(".*"))


OWN = {
    "mla, lru": (dataclasses.replace(MODEL, q_lora_rank=12), GateConfig(state_size=8, sequence_level=True), "looplm"),
    "mla, linear, tied": (dataclasses.replace(MODEL, tie_embeddings=True, embedding_init_std=0.5), LINEAR, "looplm"),
    "mha, lru": (dataclasses.replace(MHA, sandwich_norm=False, num_query_groups=2), GateConfig(), "looplm"),
    "mha, linear": (MHA, LINEAR, "ouro"),
    "mla, all around": (
        dataclasses.replace(MODEL, prelude_layers=1, coda_layers=2, injection="linear", kv_latent_norm=False),
        GateConfig(state_size=8),
        "looplm",
    ),
    "mla, reasoning": (
        dataclasses.replace(
            MODEL, latent_iterations=2, latent_halting=True, step_embedding="learned", attention_gate="head"
        ),
        GateConfig(state_size=8),
        "looplm",
    ),
    "gqa, as retrofitted": (
        dataclasses.replace(MHA, num_query_groups=2, sandwich_norm=False, coda_layers=1, loop_norm="readout"),
        LINEAR,
        "looplm",
    ),
    "mha, diagonal": (dataclasses.replace(MHA, injection="diagonal"), LINEAR, "looplm"),
    "mha, additive": (dataclasses.replace(MHA, injection="additive", prelude_layers=1), LINEAR, "looplm"),
}


@pytest.mark.parametrize("case", OWN)
def test_our_checkpoint_comes_back_unchanged(case, corpus, tmp_path, single_process):
    config, gate, hf_layout = OWN[case]
    model = LoopLM(config, gate, single_process, torch.bfloat16)
    tokenizer = corpus / "tokenizer.json"
    checkpoint.save_weights(tmp_path / "ours", model, gate, about_weights("bfloat16", tokenizer), tokenizer)
    assert export(tmp_path / "ours", tmp_path / "hf", single_process, limit=5000).hf_layout == hf_layout
    import_source(examine(tmp_path / "hf"), tmp_path / "again", single_process)
    assert_same_bits(weights_of(tmp_path / "again", single_process), weights_of(tmp_path / "ours", single_process))
    before, after = (checkpoint.read_model(tmp_path / name) for name in ("ours", "again"))
    if hf_layout == "looplm":
        assert after == before
    checkpoint.load_weights(tmp_path / "again", model, gate)  # although keys of another attention differ
    export(tmp_path / "again", tmp_path / "hf2", single_process, limit=5000)
    assert {path.name for path in (tmp_path / "hf").iterdir()} == {path.name for path in (tmp_path / "hf2").iterdir()}
    for path in (tmp_path / "hf").iterdir():
        assert (tmp_path / "hf2" / path.name).read_bytes() == path.read_bytes(), path.name
    code = {path.name for path in companion_files.CODE}
    assert {path.name for path in (tmp_path / "hf").glob("*.py")} == (code if hf_layout == "looplm" else set())


# What the card and the inventory of a model say of its levers.
TOLD = {
    "mla, all around": (
        (
            f"latent (MLA), a latent of {MODEL.kv_lora_rank} without a norm |",
            "| layers of their own | 1 before the loops, 2 after them |",
            "| injection | linear: later loops read",
        ),
        (
            "(1 before and 2 after them)",
            "sandwich norms, linear injection",
            "layout looplm (model.attention=mla is not mha)",
        ),
    ),
    "mla, reasoning": (
        (
            "a sigmoid gate on each head's output |",
            "| latent reasoning | 2 steps of a GRU cell refine the latent, "
            "weighed by a probability of stopping at each |",
            "| step embedding | learned: a vector of each loop is added before it |",
        ),
        ("refined in 2 steps with halting, a gate per head; RoPE", "learned step embedding"),
    ),
}


@pytest.mark.parametrize("case", TOLD)
def test_card_and_inventory_tell_of_the_levers(case, corpus, tmp_path, single_process):
    config, gate, _ = OWN[case]
    model = LoopLM(config, gate, single_process)
    tokenizer = corpus / "tokenizer.json"
    checkpoint.save_weights(tmp_path / "ours", model, gate, about_weights("float32", tokenizer), tokenizer)
    export(tmp_path / "ours", tmp_path / "hf", single_process)
    card, shown, told = (tmp_path / "hf/README.md").read_text(), inspect(tmp_path / "ours"), TOLD[case]
    for text, expected in zip((card, shown), told, strict=True):
        for words in expected:
            assert words in text, words


@pytest.mark.parametrize("key", ["prelude_layers", "coda_layers", "loop_norm", "injection", "attention_gate"])
def test_ouros_layout_refuses_what_it_does_not_hold(key):
    words = {"loop_norm": "readout", "injection": "additive", "attention_gate": "head"}
    changes: dict[str, Any] = {key: words.get(key, 1)}
    model, value = checkpoint.ModelDescription(dataclasses.replace(MHA, **changes), LINEAR), changes[key]
    with pytest.raises(UserError) as raised:
        choose_hf_layout("ouro", model)
    fix = "give looplm or auto"
    assert str(raised.value) == f"layout: 'ouro' does not hold this model (model.{key}={value} is not in it); {fix}"
    assert choose_hf_layout("auto", model) == "looplm"


def test_an_export_of_a_trained_import_changes_only_what_has_changed(corpus, tmp_path, single_process):
    tensors = ouro.random_tensors(ouro.CONFIG)
    shared = ouro.CONFIG | {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}  # as released
    source = ouro.write_folder(tmp_path / "hf", tensors, shared, corpus / "tokenizer.json")
    (source / "README.md").write_text("# Theirs\n")
    (source / "generation_config.json").write_text('{"eos_token_id": 0, "top_p": 0.9}')
    longest = ouro.CONFIG["max_position_embeddings"]
    told = json.loads((source / "tokenizer_config.json").read_text()) | {"model_max_length": longest}
    (source / "tokenizer_config.json").write_text(json.dumps(told))
    import_source(examine(source), tmp_path / "ours", single_process)
    imported = checkpoint.read_model(tmp_path / "ours").model
    longer = {"max_sequence_length": 2 * longest}
    model = dataclasses.replace(imported, num_loops=2, head_dim=8, num_query_groups=4, **longer)
    start = {"initial": str(tmp_path / "ours")}
    config = run_config(corpus, tmp_path / "run", model=model, gate=LINEAR, checkpoint=start)
    assert train(config, check_corpus(config.data, config.model.vocab_size), single_process)

    step = tmp_path / "run/checkpoints/step_00000006"
    report = {
        "checkpoint": str(step),
        "step": 6,
        "tokens": 1234,
        "trained_loops": 2,
        "depths": [{"depth": 1, "loss": 2.5, "perplexity": 12.2}, {"depth": 3, "loss": 2.25, "perplexity": 9.5}],
        "exit_curve": [{"threshold": 0.5, "loss": 2.4, "mean_depth": 1.25}],
        "exit_distribution": [0.75, 0.25],
    }
    (tmp_path / "evaluation.json").write_text(json.dumps(report))
    export(tmp_path / "run", tmp_path / "out", single_process, dtype=torch.bfloat16)
    after = json.loads((tmp_path / "out/config.json").read_text())
    ids = {"bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": PAD}
    changed = {"total_ut_steps": 2, "torch_dtype": "bfloat16", "max_position_embeddings": 2 * longest}
    assert after == ouro.CONFIG | ids | changed
    assert json.loads((tmp_path / "out/generation_config.json").read_text()) == ids | {"top_p": 0.9}
    named = json.loads((tmp_path / "out/tokenizer_config.json").read_text())
    assert (named["eos_token"], named["pad_token"], named["extra"]) == ("<eos>", "<pad>", [1])
    assert named["model_max_length"] == 2 * longest, "transformers would cut texts at the old length"
    trained = tensors_of(tmp_path / "out")
    assert {value.dtype for value in trained.values()} == {torch.bfloat16} and trained.keys() == tensors.keys()
    assert not torch.equal(trained["lm_head.weight"], tensors["lm_head.weight"].bfloat16())
    card = (tmp_path / "out/README.md").read_text()
    for words in (
        "# out",
        "38,209 (bfloat16)",
        "| `train` | 100.0% |",
        "| steps, tokens | 6, 768 |",
        "| `ours` |",
        "1,234 validation tokens",
        "| 1 | 2.5000 | 12.20 |",
        "| 3 (beyond training) | 2.2500 | 9.50 |",
        "| 0.5 | 1.25 | 2.4000 |",
    ):
        assert words in card, words
    assert (tmp_path / "out/README.source.md").read_text() == "# Theirs\n"

    (tmp_path / "evaluation.json").write_text(json.dumps(report | {"data": ["a/train", "p_hop (test)"]}))
    export(tmp_path / "run", tmp_path / "out3", single_process)
    assert "## Measured on 1,234 tokens of `train`, `p_hop (test)`\n" in (tmp_path / "out3/README.md").read_text()
    (tmp_path / "evaluation.json").write_text(json.dumps(report | {"checkpoint": "another/run/step_00000006"}))
    export(tmp_path / "run", tmp_path / "out2", single_process)
    assert "validation tokens" not in (tmp_path / "out2/README.md").read_text(), "another checkpoint's figures"


def test_transformers_reads_our_tokenizer(corpus, tmp_path, single_process):
    transformers = pytest.importorskip("transformers")
    one_step = {"train_steps": 1, "warmup_steps": 0, "decay_steps": 0}
    config = run_config(corpus, tmp_path / "run", model=MHA, gate=LINEAR, optim=one_step)
    train(config, check_corpus(config.data, config.model.vocab_size), single_process)
    export(tmp_path / "run", tmp_path / "out", single_process)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out", trust_remote_code=False)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (BOS, EOS, PAD)
    assert tokenizer.decode(tokenizer("def f():")["input_ids"]) == "def f():"
    generation = transformers.GenerationConfig.from_pretrained(tmp_path / "out")
    assert (generation.eos_token_id, generation.pad_token_id) == (EOS, PAD)
    assert json.loads((tmp_path / "out/tokenizer_config.json").read_text())["model_max_length"] == 64
    assert json.loads((tmp_path / "out/config.json").read_text())["vocab_size"] == VOCAB


def test_weights_are_not_initialized_before_they_are_read(corpus, tmp_path, single_process, monkeypatch):
    """Initialization takes fp32 copies, for which a model that just fits in memory leaves no room."""
    tensors = ouro.random_tensors(ouro.CONFIG)
    source = ouro.write_folder(tmp_path / "hf", tensors, ouro.CONFIG, corpus / "tokenizer.json")

    def drawn(*_: object, **__: object) -> None:
        raise AssertionError("a weight was drawn")

    monkeypatch.setattr(torch.nn.init, "normal_", drawn)
    import_source(examine(source), tmp_path / "ours", single_process)
    assert checkpoint.open_model(str(tmp_path / "ours"), single_process)


def test_a_directory_of_hugging_faces_cache(corpus, tmp_path, single_process):
    """Its files are links to blobs in another folder."""
    tensors = ouro.random_tensors(ouro.CONFIG)
    blobs = ouro.write_folder(tmp_path / "blobs", tensors, ouro.CONFIG, corpus / "tokenizer.json")
    snapshot = tmp_path / "snapshots/0123"
    snapshot.mkdir(parents=True)
    for path in blobs.iterdir():
        (snapshot / path.name).symlink_to(f"../../blobs/{path.name}")
    assert import_source(examine(snapshot), tmp_path / "ours", single_process) == []
    companions = {path.name for path in (tmp_path / "ours/companions").iterdir()}
    assert companions == {"chat_template.jinja", "config.json", "tokenizer_config.json"}


@pytest.mark.parametrize(("record", "published"), [(UPCYCLED, REDUCED), (REDUCED, REDUCED)])
def test_an_export_names_no_folders(record, published, corpus, tmp_path, single_process):
    source = ouro.write_folder(
        tmp_path / "hf", ouro.random_tensors(ouro.CONFIG), ouro.CONFIG, corpus / "tokenizer.json"
    )
    (source / "upcycle.json").write_text(json.dumps([record]))
    import_source(examine(source), tmp_path / "ours", single_process)
    export(tmp_path / "ours", tmp_path / "out", single_process)
    texts = [(tmp_path / folder / "upcycle.json").read_text() for folder in ("hf", "ours/companions", "out")]
    assert texts[0] == texts[1], "the checkpoint's own record keeps its paths"
    assert json.loads(texts[2]) == [published] and (texts[2] == texts[1]) == (record == published)


def test_special_tokens_without_ids_in_any_file(corpus, tmp_path, single_process):
    """tokenizer_config.json names the tokens, or the user does; then every file of an export agrees."""
    config = {key: value for key, value in ouro.CONFIG.items() if not key.endswith("_token_id")}
    source = ouro.write_folder(tmp_path / "hf", ouro.random_tensors(config), config, corpus / "tokenizer.json")
    found = examine(source)
    assert found.description.ids == (BOS, (EOS,), PAD)
    swapped = with_tokens(found, {"bos": None, "eos": "<pad>", "pad": "<eos>"})
    import_source(swapped, tmp_path / "ours", single_process)
    export(tmp_path / "ours", tmp_path / "out", single_process)
    after = json.loads((tmp_path / "out/config.json").read_text())
    assert after == config | {"eos_token_id": PAD, "pad_token_id": EOS}
    named = json.loads((tmp_path / "out/tokenizer_config.json").read_text())
    assert (named["bos_token"], named["eos_token"], named["pad_token"]) == ("<bos>", "<pad>", "<eos>")
    assert to_dict(checkpoint.read_about(tmp_path / "ours"))["eos_ids"] == [PAD]

"""The command: import, export, its output, and every mistake in one line with nothing written."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, processors
from torch import Tensor

from looplm.checkpoint import step_folder
from looplm.checkpoint.verify import fingerprint
from looplm.failures import StorageFailure, UserError
from looplm.huggingface.inventory import inspect
from looplm.huggingface.weight_files import find_tensors
from looplm.inference import GenerationConfig, Generator
from looplm.megatron import process_groups
from tests.support import ouro_reference as ouro
from tools.convert_hf import main

CONFIG = ouro.CONFIG | {"eos_token_id": 0}  # bos and eos are one token, as released


@pytest.fixture(autouse=True)
def one_job(single_process, monkeypatch):
    monkeypatch.setattr(process_groups, "stop", lambda: None)  # the session's process groups stay


@pytest.fixture(scope="module")
def released(corpus, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("released") / "hf"
    return ouro.write_folder(folder, ouro.random_tensors(CONFIG), CONFIG, corpus / "tokenizer.json", shards=2)


@pytest.fixture
def source(released, tmp_path) -> Path:
    """A copy of the released directory, to be damaged."""
    return shutil.copytree(released, tmp_path / "hf")


@pytest.fixture(scope="module")
def ours(released, tmp_path_factory, single_process) -> Path:
    output = tmp_path_factory.mktemp("ours") / "weights"
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(process_groups, "stop", lambda: None)
        main(["import", "--input", str(released), "--output", str(output)])
    return output


@pytest.mark.slow
def test_import_export_and_inspect(released, tmp_path, capsys):
    main(["import", "--input", str(released), "--output", str(tmp_path / "new/ours")])
    said = capsys.readouterr()
    assert "note: bos and eos are one token" in said.err and "left behind" not in said.err
    shown = dict(line.split(maxsplit=1) for line in said.out.splitlines())
    assert shown["directory"].endswith("ours: checkpoint, weights alone") and shown["whole"] == "yes"
    assert shown["parameters"] == "38,209 (float32)" and shown["export"] == "layout ouro"
    assert shown["tokens"] == "bos 0, eos 0, pad 2" and "chat_template.jinja" in shown["beside"]

    arguments = ["--checkpoint", str(tmp_path / "new/ours"), "--output", str(tmp_path / "back"), "--max_shard_gb=1e-4"]
    main(["export", *arguments])
    shown = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert shown["directory"].endswith("back: Hugging Face, layout ouro") and shown["weights"] == "0.2 MB in 2 files"
    assert shown["parameters"] == "38,209 (float32)" and shown["gate"] == "linear, trained"
    assert (tmp_path / "back/config.json").read_bytes() == (released / "config.json").read_bytes()
    main(["export", "--checkpoint", str(tmp_path / "new/ours"), "--output", str(tmp_path / "half"), "--dtype=bfloat16"])
    assert "38,209 (bfloat16)" in capsys.readouterr().out
    assert json.loads((tmp_path / "half/config.json").read_text())["torch_dtype"] == "bfloat16"


@pytest.mark.slow
def test_imported_weights_generate(ours):
    generator = Generator.open(str(ours))
    (answer,) = generator.generate(["def f"], GenerationConfig(temperature=0.0, max_new_tokens=3))
    assert len(answer.tokens) == 3 or answer.finish == "eos"


@pytest.mark.slow
def test_inspect_of_a_run_and_of_damage(ours, source, corpus, tmp_path, capsys):
    run = tmp_path / "run/checkpoints"
    run.mkdir(parents=True)
    for step in (1, 2):
        shutil.copytree(ours, run / f"step_0000000{step}")
    (run / "step_00000002/config.yaml").unlink()
    main(["inspect", "--input", str(tmp_path / "run")])
    out = capsys.readouterr().out
    assert "step_00000001: checkpoint" in out and "whole        yes; " in out and "config.yaml is missing" in out
    main(["inspect", "--input", str(run / "step_00000002")])
    assert "whole        no: config.yaml is missing" in capsys.readouterr().out
    (source / "model-00002-of-00002.safetensors").unlink()
    main(["inspect", "--input", str(source)])
    out = capsys.readouterr().out
    assert "layout ouro" in out and "model-00002-of-00002.safetensors: missing" in out
    with pytest.raises(UserError, match="neither a Hugging Face directory"):
        main(["inspect", "--input", str(tmp_path)])


def rewrite(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def cut(folder: Path) -> None:
    path = folder / "model-00001-of-00002.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


def change_tensors(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    stored = find_tensors(folder)["model.norm.weight"].path
    tensors = load_file(stored)
    change(tensors)
    save_file(tensors, stored)
    index = folder / "model.safetensors.index.json"
    where = {name: path.name for path in folder.glob("*.safetensors") for name in load_file(path)}
    index.write_text(json.dumps({"weight_map": where}))


def only_a_pickle(folder: Path) -> None:
    for path in folder.glob("model*"):
        path.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch ran'\ntR.")


def without_eos(folder: Path) -> None:
    (folder / "tokenizer_config.json").unlink()
    rewrite(folder, eos_token_id=None)


def delete(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def write(name: str, text: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_text(text)


NORM = "model.norm.weight"
MISTAKES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no such directory": (shutil.rmtree, "hf: not a directory"),
    "no config": (delete("config.json"), "no config.json here"),
    "config is no JSON": (write("config.json", "{"), "config.json: cannot be read as JSON"),
    "another model": (lambda f: rewrite(f, model_type="llama"), "model_type: 'llama'"),
    "scaled rope": (lambda f: rewrite(f, rope_scaling={"rope_type": "yarn"}), "rope_scaling: "),
    "cut": (cut, "model-00001-of-00002.safetensors: truncated"),
    "shard missing": (delete("model-00002-of-00002.safetensors"), "00002.safetensors: missing"),
    "tensor missing": (lambda f: change_tensors(f, lambda t: t.pop(NORM)), f"{NORM} is missing"),
    "tensor too many": (
        lambda f: change_tensors(f, lambda t: t.update(x=t[NORM] + 1)),
        "x is here, but config.json describes no such tensor",
    ),
    "wrong shape": (
        lambda f: rewrite(f, intermediate_size=64),
        "the shape [48, 32], but config.json asks for [64, 32]",
    ),
    "pickle": (only_a_pickle, "pytorch_model.bin: a pickle can run any code"),
    "no tokenizer": (delete("tokenizer.json"), "tokenizer.json: missing; name a tokenizer.json with --tokenizer"),
    "not a tokenizer": (write("tokenizer.json", "{}"), "tokenizer.json: cannot be read as a tokenizer.json"),
    "tokenizer too large": (lambda f: rewrite_vocab(f, 300), "has ids up to 319, but the model's vocab_size is 300"),
    "no end of text": (without_eos, "name it with --eos_token"),
}


def rewrite_vocab(folder: Path, size: int) -> None:
    rewrite(folder, vocab_size=size)
    for path in folder.glob("model-*.safetensors"):
        tensors = {name: t[:size].contiguous() if t.shape[0] == 320 else t for name, t in load_file(path).items()}
        save_file(tensors, path)


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_and_leaves_nothing(mistake, source, tmp_path):
    harm, words = MISTAKES[mistake]
    harm(source)
    with pytest.raises(UserError) as raised:
        main(["import", "--input", str(source), "--output", str(tmp_path / "ours")])
    assert words in str(raised.value) and "\n" not in str(raised.value)
    assert sorted(path.name for path in tmp_path.iterdir()) in ([], ["hf"]) and not Path("ran").exists()


@pytest.mark.slow
def test_mistakes_on_the_command_line(released, ours, corpus, tmp_path, capsys):
    exists = str(tmp_path)
    importing = ["import", "--input", str(released), "--output", "x"]
    exporting = ["export", "--checkpoint", str(ours), "--output", "x"]
    for argv, words in (
        (["convert"], "convert: unknown command; give one of import, export, inspect"),
        ([*importing[:-1], exists], "it exists already"),
        (["import", "--inptu", "x"], "unknown key; did you mean input"),
        ([*importing, "--eos_token", "<end>"], "eos_token: '<end>' is not a token of"),
        ([*importing, "--tokenizer", "nowhere.json"], "nowhere.json: missing"),
        ([*exporting[:-1], exists], "it exists already"),
        (["export", "--checkpoint", "nowhere", "--output", "x"], "nowhere: no whole checkpoint here"),
        ([*exporting, "--max_shard_gb", "0"], "max_shard_gb: 0"),
        (
            [*exporting, "--max_shard_gb", "1e300"],
            "max_shard_gb: 1e+300 is not allowed; give a number above 0 and at most 1000000",
        ),
        ([*exporting, "--layout", "llama"], "layout"),
    ):
        with pytest.raises(UserError) as raised:
            main(argv)
        assert words in str(raised.value), raised.value
    assert not Path("x").exists()
    with pytest.raises(SystemExit, match="0"):
        main([])
    assert "python -m tools.convert_hf export" in capsys.readouterr().out


@pytest.mark.slow
def test_a_layout_that_cannot_hold_the_model(ours, tmp_path):
    step = shutil.copytree(ours, tmp_path / "ours")
    text = (step / "config.yaml").read_text()
    (step / "config.yaml").write_text(text.replace("kind: linear", "kind: lru"))
    (step / "manifest.json").unlink()
    files = {str(path.relative_to(step)): fingerprint(path) for path in step_folder.files_in(step)}
    step_folder.publish(step, tmp_path / "lru", files)
    with pytest.raises(UserError, match=r"layout: 'ouro' does not hold this model \(gate.kind=lru is not linear\)"):
        main(["export", "--checkpoint", str(tmp_path / "lru"), "--output", str(tmp_path / "hf"), "--layout", "ouro"])
    assert not (tmp_path / "hf").exists()


@pytest.mark.slow
def test_a_failure_midway_leaves_nothing(released, ours, tmp_path, monkeypatch):
    def full(*_: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("looplm.huggingface.companion_files.write", full)
    with pytest.raises(OSError, match="no space"):
        main(["export", "--checkpoint", str(ours), "--output", str(tmp_path / "hf")])
    monkeypatch.setattr("looplm.checkpoint.step_folder.publish", full)
    with pytest.raises(StorageFailure, match="no space"):
        main(["import", "--input", str(released), "--output", str(tmp_path / "again")])
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_weights_that_are_not_finite_are_not_imported(source, tmp_path):
    change_tensors(source, lambda tensors: tensors.update({NORM: tensors[NORM] / 0}))
    with pytest.raises(UserError, match=rf"safetensors: {NORM} holds values that are not finite; get it again"):
        main(["import", "--input", str(source), "--output", str(tmp_path / "ours")])
    assert not (tmp_path / "ours").exists()


@pytest.mark.slow
@pytest.mark.promise(
    text="An export that is killed leaves nothing at its place, and can be repeated",
    expected="no folder; then a whole one",
)
def test_a_killed_export_leaves_nothing_that_looks_whole(ours, tmp_path, record_property):
    argv = ["export", "--checkpoint", str(ours), "--output", str(tmp_path / "hf")]
    killed = (
        "import os\n"
        "from looplm.huggingface import companion_files\n"
        "from tools.convert_hf import main\n"
        "companion_files.write = lambda *_: os.kill(os.getpid(), 9)  # after the weights, before all other files\n"
        f"main({argv!r})\n"
    )
    done = subprocess.run([sys.executable, "-c", killed], capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.returncode == -9, done.stderr
    assert all(left.name.startswith(".") and not (left / "config.json").exists() for left in tmp_path.iterdir())
    main(argv)
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]
    assert "whole        yes" in inspect(tmp_path / "hf")
    record_property("seen", "no folder; then a whole one")


@pytest.mark.slow
def test_a_tokenizer_that_adds_tokens_in_transformers_alone_is_named(released, tmp_path, capsys):
    tokenizer = Tokenizer.from_file(str(released / "tokenizer.json"))
    special = [("<bos>", 0), ("<eos>", 1)]
    tokenizer.post_processor = processors.TemplateProcessing("<bos> $A <eos>", special_tokens=special)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    argv = ["import", "--input", str(released), "--output", str(tmp_path / "ours")]
    main([*argv, "--tokenizer", str(tmp_path / "tokenizer.json")])
    expected = "puts <bos> before each text and <eos> after it; here it is <bos> before it"
    assert f"note: tokenizer.json: transformers {expected}" in capsys.readouterr().err


@pytest.mark.slow
def test_exit_status_of_a_mistake(tmp_path):
    command = [sys.executable, "-m", "tools.convert_hf", "inspect", "--input", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.returncode == 2 and done.stderr.strip().splitlines()[-1].startswith("error: ")

"""Exports do not depend on the layout: weights that two ranks loaded and saved are exported with the same bits."""

import dataclasses
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from safetensors.torch import load_file

from looplm import checkpoint
from looplm.config import ParallelConfig
from looplm.huggingface import companion_files
from looplm.huggingface.convert import choose_hf_layout, examine, export_model, import_source
from looplm.model import LoopLM
from tests.parallel.test_layouts import LINEAR, LRU, MHA, MLA
from tests.support import worker
from tests.support.launch import launch
from tests.support.tiny import about_weights, run_config

pytestmark = pytest.mark.slow  # every test here starts a process or trains

MODELS = {"ouro": (dataclasses.replace(MHA, num_query_groups=4), LINEAR), "looplm": (MLA, LRU)}
DATA = {"micro_batch_size": 1, "global_batch_size": 4}
LAYOUTS = {"TP2": ParallelConfig(tensor=2), "PP2": ParallelConfig(pipeline=2)}


def export(directory: Path, output: Path, groups: ProcessGroupCollection) -> Path:
    opened = checkpoint.open_model(str(directory), groups, dtype=None)
    layout = choose_hf_layout("auto", checkpoint.read_model(directory))
    export_model(opened, output, layout, None, 10**9)
    return output


@pytest.fixture(scope="module")
def exports(
    corpus: Path, tmp_path_factory: pytest.TempPathFactory, single_process: ProcessGroupCollection
) -> Iterator[dict[str, Path]]:
    """Export each model twice: directly, and after two ranks have loaded and saved it."""
    folder, found = tmp_path_factory.mktemp("layouts"), dict[str, Path]()
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(companion_files, "CODE", ())  # the code in an export is not tested here
        for name, (config, gate) in MODELS.items():
            model = LoopLM(config, gate, single_process, torch.bfloat16)
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.normal_()  # norms and gates too: their ones and zeros would hide a wrong shard
            tokenizer = corpus / "tokenizer.json"
            checkpoint.save_weights(folder / name, model, gate, about_weights("bfloat16", tokenizer), tokenizer)
            found[name] = export(folder / name, folder / f"{name} hf", single_process)
            import_source(examine(found[name]), folder / f"{name} imported", single_process)
        jobs = []
        for name, (config, gate) in MODELS.items():
            for layout, parallel in LAYOUTS.items():
                run = run_config(corpus, folder, model=config, gate=gate, parallel=parallel, data=DATA)
                before = folder / (f"{name} imported" if layout == "TP2" else f"{name} TP2")
                jobs.append(partial(worker.reshard, run, before, folder / f"{name} {layout}"))
        launch(2, jobs, folder)
        for name in MODELS:
            for layout in LAYOUTS:
                resharded = f"{name} {layout}"
                found[resharded] = export(folder / resharded, folder / f"{resharded} hf", single_process)
    yield found
    shutil.rmtree(folder)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", MODELS)
def test_resharding_between_import_and_export_changes_no_bit(name, layout, exports):
    before, after = exports[name], exports[f"{name} {layout}"]
    expected, found = (load_file(folder / "model.safetensors") for folder in (before, after))
    assert found.keys() == expected.keys()
    for tensor, value in expected.items():
        assert value.dtype is torch.bfloat16 and torch.equal(found[tensor], value), tensor
    assert (after / "config.json").read_bytes() == (before / "config.json").read_bytes()

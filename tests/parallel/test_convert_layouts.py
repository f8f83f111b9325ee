"""Hugging Face directories know no layout: weights that were read and saved by two ranks go out with the same bits."""

import dataclasses
import shutil
from functools import partial

import pytest
import torch
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

MODELS = {"ouro": (dataclasses.replace(MHA, num_query_groups=4), LINEAR), "looplm": (MLA, LRU)}
LAYOUTS = {"TP2": ParallelConfig(tensor=2), "PP2": ParallelConfig(pipeline=2)}


def export(directory, final, groups):
    opened = checkpoint.open_model(str(directory), groups, dtype=None)
    layout = choose_hf_layout("auto", checkpoint.read_model(directory))
    export_model(opened, final, layout, None, 10**9)
    return final


@pytest.fixture(scope="module")
def exports(corpus, tmp_path_factory, single_process):
    """Of each model: its directory, imported and exported by one process, and after two ranks had it in between."""
    folder, found = tmp_path_factory.mktemp("layouts"), {}
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(companion_files, "CODE", ())  # what travels is not the matter here
        for name, (shape, gate) in MODELS.items():
            model = LoopLM(shape, gate, single_process, torch.bfloat16)
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.normal_()  # norms and gates too: ones and zeros would look alike on any rank
            checkpoint.save_weights(folder / name, model, gate, about_weights("bfloat16"), corpus / "tokenizer.json")
            found[name] = export(folder / name, folder / f"{name} hf", single_process)
            import_source(examine(found[name]), folder / f"{name} imported", single_process)
        jobs = []
        for name, (shape, gate) in MODELS.items():
            for layout, parallel in LAYOUTS.items():
                config = run_config(corpus, folder, model=shape, gate=gate, parallel=parallel, data={"micro_batch_size": 1, "global_batch_size": 4})  # fmt: skip
                before = folder / (f"{name} imported" if layout == "TP2" else f"{name} TP2")
                jobs.append(partial(worker.reshard, config, before, folder / f"{name} {layout}"))
        launch(2, jobs, folder)
        for name in MODELS:
            for layout in LAYOUTS:
                found[f"{name} {layout}"] = export(folder / f"{name} {layout}", folder / f"{name} {layout} hf", single_process)  # fmt: skip
    yield found
    shutil.rmtree(folder)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", MODELS)
def test_two_ranks_between_an_import_and_an_export_change_no_bit(name, layout, exports):
    before, after = exports[name], exports[f"{name} {layout}"]
    expected, found = (load_file(folder / "model.safetensors") for folder in (before, after))
    assert found.keys() == expected.keys()
    for tensor, value in expected.items():
        assert value.dtype is torch.bfloat16 and torch.equal(found[tensor], value), tensor
    assert (after / "config.json").read_bytes() == (before / "config.json").read_bytes()

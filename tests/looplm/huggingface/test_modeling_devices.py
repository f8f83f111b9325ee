"""The exported model under accelerate: in a Trainer, with weights offloaded, and spread over devices."""

from contextlib import nullcontext
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, infer_auto_device_map
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Trainer, TrainingArguments

from looplm.huggingface.export.cache_looplm import LoopLMCache
from looplm.huggingface.export.modeling_looplm import LoopLMForCausalLM
from tests.support.generation_oracle import GATES, READ_OUTS, VARIANTS, VOCAB, build
from tests.support.hf_models import generate, hf_model, random_ids
from tests.support.parity import TOLERANCE

IDS_BS = random_ids(2, 9, VOCAB)
MODELS = VARIANTS | READ_OUTS


def test_trainer_evaluates_and_predicts(tmp_path: Path, single_process: ProcessGroupCollection) -> None:
    model = hf_model(build(VARIANTS["mla"], GATES["sequence"], single_process), GATES["sequence"])
    rows: list[dict[str, Tensor]] = [{"input_ids": ids, "labels": ids} for ids in IDS_BS]
    settings = TrainingArguments(str(tmp_path), per_device_eval_batch_size=2, report_to=[], use_cpu=True)
    trainer = Trainer(model, settings, eval_dataset=rows)
    with torch.no_grad():
        expected = model(IDS_BS, labels=IDS_BS)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected.loss.item(), rel=TOLERANCE)
    found = trainer.predict(rows).predictions  # type: ignore[arg-type]
    assert torch.allclose(torch.from_numpy(found), expected.logits, atol=1e-5)


@pytest.mark.parametrize(
    "variant, gate",
    [
        *(("mla", gate) for gate in GATES),
        *(("mla-latent-halting", "linear"), ("mha-diagonal-injection", "linear"), ("mla-step-embedding", "linear")),
        *(("mla-prelude-coda", "linear"), ("gqa-head-gate", "linear")),
    ],
)
def test_offloaded_weights_give_the_same_text(variant: str, gate: str, single_process: ProcessGroupCollection) -> None:
    """Offloading loads the weights of the module that is called: none may be read from outside."""
    model = hf_model(build(MODELS[variant], GATES[gate], single_process), GATES[gate], early_exit_threshold=0.6)
    expected = generate(model, IDS_BS, max_new_tokens=4, do_sample=False, pad_token_id=0)
    cpu_offload(model, torch.device("cpu"))
    assert all(parameter.is_meta for parameter in model.parameters())
    assert torch.equal(generate(model, IDS_BS, max_new_tokens=4, do_sample=False, pad_token_id=0), expected)


class ReadsMeta(TorchDispatchMode):
    """Mode in which tensors of the meta device can be copied from it: row i is then 4 * (-1)^i."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        target = (kwargs or {}).get("device")
        if func is not torch.ops.aten._to_copy.default or not args[0].is_meta or target in (None, torch.device("meta")):
            return func(*args, **(kwargs or {}))
        signs = torch.tensor([4.0, -4.0]).repeat(len(args[0]))[: len(args[0])].to(args[0].dtype)
        return signs.view(-1, *(1 for _ in args[0].shape[1:])).expand(args[0].shape).clone()


def parts(model: LoopLMForCausalLM) -> dict[str, nn.Module]:
    """Return the modules that a device map may place, by name."""
    whole = {"embed_tokens", "norm", "coda_norm", "early_exit_gate", "injection", "step_embedding", "lm_head"}
    found = {name.removeprefix("model."): module for name, module in model.named_modules()}
    blocks = {name for name in found if name.rpartition(".")[0] in ("layers", "prelude", "coda")}
    return {name: module for name, module in found.items() if name in whole | blocks}


@pytest.mark.parametrize("variant, gate", [("mla", "linear"), ("mla", "sequence"), ("mla-prelude-coda", "lru")])
def test_a_model_may_be_spread_over_devices(
    variant: str, gate: str, single_process: ProcessGroupCollection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The meta device stands for another one: the gate is there, or the head, or all but the embedding."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())  # meta has none
    whole = hf_model(build(MODELS[variant], GATES[gate], single_process), GATES[gate])
    names = parts(whole).keys() - {"embed_tokens"}
    for away in ({"early_exit_gate"}, {"lm_head"}, names):
        model = deepcopy(whole)
        for name, module in parts(model).items():
            device = "meta" if name in away else "cpu"
            add_hook_to_module(module.to(device), AlignDevicesHook(execution_device=device))
        outputs = list[Tensor]()
        with torch.no_grad(), ReadsMeta():
            outputs.append(model(IDS_BS, labels=IDS_BS).loss)
            cache = LoopLMCache(model.config, "last")
            for ids in IDS_BS.split([8, 1], 1):
                outputs.append(model(ids, past_key_values=cache, early_exit_threshold=0.6).logits)
        assert {str(output.device) for output in outputs} == {"meta" if "lm_head" in away else "cpu"}, away


@pytest.mark.parametrize("gate", ["sequence", "mlp"])
def test_a_device_map_splits_no_module_that_adds_what_its_parts_return(
    gate: str, single_process: ProcessGroupCollection
) -> None:
    model = hf_model(build(VARIANTS["mla"], GATES[gate], single_process), GATES[gate])
    total = sum(parameter.nbytes for parameter in model.parameters())
    for room in range(0, total, 1000):
        places = infer_auto_device_map(model, {0: room, "cpu": total}, model._no_split_modules)
        assert {name.removeprefix("model.") for name in places} <= parts(model).keys() | {
            "",
            "model",
            "layers",
            "prelude",
            "coda",
        }

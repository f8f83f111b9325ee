"""Every shipped recipe parses, and predicted parameters and FLOPs are the real ones."""

import dataclasses
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from data_pipeline.config import PipelineConfig
from data_pipeline.sources import find_files
from looplm.accounting import cache_values_per_token, forward_flops_per_token, parameter_counts
from looplm.checkpoint import CHANGEABLE
from looplm.cli import parse_config
from looplm.config import GateConfig, ModelConfig, RunConfig
from looplm.model import LoopLM
from pretrain.batch_schedule import BatchSchedule
from tests.support.tiny import MODEL
from tools.count_params import describe

ROOT = Path(__file__).parent.parent
RECIPES = {
    "quickstart, stage 1": ["quickstart/pretrain.yaml"],
    "quickstart, gate stage": ["quickstart/pretrain.yaml", "quickstart/gate.yaml"],
    "longer, stage 1": ["quickstart/pretrain.yaml", "longer/pretrain.yaml"],
    "longer, gate stage": [
        "quickstart/pretrain.yaml",
        "longer/pretrain.yaml",
        "quickstart/gate.yaml",
        "longer/gate.yaml",
    ],
    "smollm, healing": ["smollm/heal.yaml"],
    "smollm, gate stage": ["smollm/heal.yaml", "smollm/gate.yaml"],
    "upcycling study, plain attention": ["quickstart/pretrain.yaml", "upcycle-study/mha.yaml"],
}
# Ouro's stages; each config overrides the previous ones. The larger model starts at 1b with twice the layers.
STAGES = ("stage1a", "stage1b", "stage2", "stage3", "stage4", "gate", "sft")
TOKENS = {"stage1a": 3e12, "stage1b": 3e12, "stage2": 1.4e12, "stage3": 20e9, "stage4": 300e9}
TOKENS["sft"] = 2 * 8.3e6 * 6000  # epochs, conversations, and an estimate of tokens per conversation
TINY = {
    f"tiny, {stage}": ["ouro-tiny/mha.yaml", *(f"ouro-tiny/{one}.yaml" for one in STAGES[: number + 1])]
    for number, stage in enumerate(STAGES)
}
DATA = [
    path
    for path in (Path(__file__).parent.parent / "configs").rglob("*.yaml")
    if path.stem.startswith("data") or path.parent.name == "data"
]


def ouro(size: str, kind: str, stage: str) -> list[str]:
    """Return the config files of a stage."""
    names = [f"ouro-1.4b/{kind}.yaml"]
    names += [f"ouro-1.4b/{before}.yaml" for before in STAGES[: STAGES.index(stage) + 1]]
    return names if size == "1.4b" else [*names, f"ouro-2.6b/{kind}.yaml", f"ouro-2.6b/{stage}.yaml"]


OURO = {
    (size, kind, stage): ouro(size, kind, stage)
    for size in ("1.4b", "2.6b")
    for kind in ("mha", "mla")
    for stage in STAGES[size == "2.6b" :]
}
_SYNTHETIC = ("distill", "diverse_qa_pairs", "extract_knowledge", "knowledge_list", "wrap_medium")
NEMOTRON = {quality: ["kind=actual/kind2=actual"] for quality in ("high", "medium-high", "medium", "medium-low", "low")}
NEMOTRON["high"] += [f"kind=synthetic/kind2={kind}" for kind in _SYNTHETIC]
NEMOTRON["low"] += ["kind=synthetic/kind2=wrap_medium"]
MHA = ModelConfig(
    vocab_size=96, hidden_size=32, ffn_hidden_size=48, num_layers=2, num_attention_heads=4, attention="mha"
)
MODELS = {
    "mla": MODEL,
    "mla with a query latent": dataclasses.replace(MODEL, q_lora_rank=12),
    "mla without sandwich norms": dataclasses.replace(MODEL, sandwich_norm=False),
    "mla, tied": dataclasses.replace(MODEL, tie_embeddings=True),
    "mla with two rotary keys": dataclasses.replace(MODEL, qk_rope_head_dim=8, qk_rope_period=4),
    "mha": MHA,
    "gqa with biases and normed heads": dataclasses.replace(MHA, num_query_groups=2, qkv_bias=True, qk_norm=True),
    "gqa with wide heads": dataclasses.replace(MHA, num_query_groups=2, head_dim=12),
}
GATES = {
    "lru": GateConfig(state_size=8),
    "lru with the sequence": GateConfig(state_size=8, sequence_level=True),
    "linear": GateConfig(kind="linear"),
    "mlp": GateConfig(kind="mlp", hidden_size=7),
}


@cache
def load(*names: str) -> RunConfig:
    argv = [part for name in names for part in ("--config", str(ROOT / "configs" / name))]
    return parse_config(RunConfig, argv, prog="test", description="")


@cache
def data_recipe(path: Path) -> PipelineConfig:
    return parse_config(PipelineConfig, ["--config", str(path)], prog="test", description="")


def count(model: LoopLM) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def test_every_training_recipe_is_tested_here():
    paths = [path for path in (ROOT / "configs").rglob("*.yaml") if path.name != "chain.yaml"]
    shipped = {str(path.relative_to(ROOT / "configs")) for path in paths}
    listed = {name for names in (*RECIPES.values(), *TINY.values(), *OURO.values()) for name in names}
    others = {str(path.relative_to(ROOT / "configs")) for path in (*DATA, *(ROOT / "configs").rglob("chain.yaml"))}
    others |= {name for name in shipped if name.startswith("experiments/")}  # tests/tools/experiments has them
    assert shipped - others == listed


@pytest.mark.parametrize("path", DATA, ids=str)
def test_a_data_recipe_parses(path):
    assert data_recipe(path).sources


def test_a_data_recipe_writes_every_prefix_that_a_training_recipe_reads():
    made = set()
    for path in DATA:
        data = data_recipe(path)
        made |= {f"{data.output_dir}/{source.name}_{split}" for source in data.sources for split in ("train", "valid")}
    for names in (*RECIPES.values(), *TINY.values(), *OURO.values()):
        config = load(*names)
        assert made >= {source.prefix for source in (*config.data.train, *config.data.valid)}, names


@pytest.mark.parametrize(("stage", "qualities"), [("stage1", NEMOTRON), ("stage2", ["high"])])
def test_each_file_of_nemotron_cc_is_in_one_prefix(stage, qualities, tmp_path, monkeypatch):
    """The whole set has more documents than a prefix holds."""
    names = ("CC-MAIN-2013-20-part-00000", "CC-MAIN-2024-30-part-00001")
    place = tmp_path / "data/raw/nemotron-cc"
    for folder in (f"quality={quality}/{kind}" for quality, kinds in NEMOTRON.items() for kind in kinds):
        (place / folder).mkdir(parents=True)
        for name in names:
            (place / folder / f"{name}.jsonl.zstd").touch()
    monkeypatch.chdir(tmp_path)
    data = data_recipe(ROOT / f"configs/ouro-1.4b/data/{stage}.yaml")
    found = [path for source in data.sources if "nemotron" in source.name for path in find_files(source)]
    assert sorted(found) == sorted(path for name in qualities for path in place.glob(f"quality={name}/**/*.zstd"))


@pytest.mark.parametrize(("stage", "share"), [("stage1a", 73.4), ("stage2", 80.0)])
def test_the_parts_of_nemotron_cc_have_its_share_together(stage, share):
    data = load(*OURO["1.4b", "mha", stage]).data
    assert sum(source.weight for source in data.train) == pytest.approx(100)
    assert sum(source.weight for source in data.train if "nemotron" in source.prefix) == pytest.approx(share)


def test_only_the_last_stage_trains_on_conversations():
    conversations = set()
    for path in DATA:
        data = data_recipe(path)
        conversations |= {
            f"{data.output_dir}/{source.name}_train" for source in data.sources if source.chat is not None
        }
    for names in (*TINY.values(), *OURO.values()):
        chat = [source.prefix in conversations for source in load(*names).data.train]
        assert all(chat) if "sft.yaml" in names[-1] else not any(chat), names


def test_ouro_tiny_scales_down_every_stage_of_ouro():
    """Loops, beta, RoPE base and schedule are equal; lengths and learning rates are in proportion."""
    for stage in STAGES:
        tiny, full = load(*TINY[f"tiny, {stage}"]), load(*OURO["1.4b", "mha", stage])
        assert (tiny.model.num_loops, tiny.loss.beta, tiny.model.rope_base) == (
            full.model.num_loops,
            full.loss.beta,
            full.model.rope_base,
        )
        assert (tiny.loss.objective, tiny.optim.schedule) == (full.loss.objective, full.optim.schedule)
        assert 32 * tiny.data.seq_length == full.data.seq_length
        assert 32 * tiny.model.max_sequence_length == full.model.max_sequence_length
        assert tiny.model.num_layers == (2 if stage == "stage1a" else 4)
        if stage.startswith("stage"):
            assert tiny.optim.lr / full.optim.lr == pytest.approx(20 / 3)


@pytest.mark.parametrize("recipe", [*RECIPES, *TINY])
def test_a_recipe_has_the_predicted_parameters(recipe, single_process):
    config = load(*(RECIPES | TINY)[recipe])
    with torch.device("meta"):
        built = count(LoopLM(config.model, config.gate, single_process))
    assert built == sum(parameter_counts(config.model, config.gate).values())
    assert f"{built:,}" in describe(config)


@pytest.mark.parametrize(
    ("size", "kind", "expected"),
    [
        ("1.4b", "mha", 1_434_652_673),
        ("1.4b", "mla", 1_437_964_737),
        ("2.6b", "mha", 2_667_974_657),
        ("2.6b", "mla", None),
    ],
)
def test_ouro_has_the_predicted_parameters(size, kind, expected, single_process):
    config = load(*OURO[size, kind, "stage1b"])
    with torch.device("meta"):
        built = count(LoopLM(config.model, config.gate, single_process))
    predicted = sum(parameter_counts(config.model, config.gate).values())
    assert built == predicted
    assert expected is None or built == expected


@pytest.mark.parametrize("kind", ["mha", "mla"])
@pytest.mark.parametrize("size", ["1.4b", "2.6b"])
def test_ouros_stages_continue_each_other_and_train_on_the_published_tokens(size, kind):
    before = None
    for stage in STAGES[size == "2.6b" :]:
        config = load(*OURO[size, kind, stage])
        schedule = BatchSchedule(config.data, 1, config.parallel.pipeline)
        if stage in TOKENS:
            ramp = config.data.rampup
            grown = 0 if ramp is None else schedule.samples_of(ramp.samples // ramp.start)
            steps = config.optim.train_steps - (0 if ramp is None else ramp.samples // ramp.start)
            tokens = (grown + steps * config.data.global_batch_size) * config.data.seq_length
            assert tokens == pytest.approx(TOKENS[stage], rel=1e-3), stage
        assert config.model.num_loops == (8 if stage == "stage1a" else 4)
        assert config.loss.beta == (0.1 if stage == "stage1a" else 0.05)
        if before is not None:
            assert config.checkpoint.initial == before.output_dir
            models = [dataclasses.asdict(one.model) for one in (before, config)]
            changed = {key for key in models[0] if models[0][key] != models[1][key]}
            assert changed <= CHANGEABLE, "these keys cannot change between stages"
        before = config


@pytest.mark.parametrize("names", [*RECIPES.values(), *TINY.values(), *OURO.values()], ids=lambda names: names[-1])
def test_a_stage_takes_over_the_optimizer_or_warms_up(names):
    """Without either, it begins at the full rate without moments. Stages of other parameters cannot take them over."""
    config = load(*names)
    takes_over, warms_up = config.checkpoint.initial_optimizer, config.optim.warmup_steps > 0
    assert takes_over or warms_up
    assert not takes_over or Path(names[-1]).stem in ("stage1b", "stage2", "stage3", "stage4")


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("name", MODELS)
def test_every_model_has_the_predicted_parameters(name, gate, single_process):
    expected = sum(parameter_counts(MODELS[name], GATES[gate]).values())
    for loops in (1, 4):
        model = dataclasses.replace(MODELS[name], num_loops=loops)
        assert count(LoopLM(model, GATES[gate], single_process)) == expected


def test_ouro_has_its_published_size():
    ouro = ModelConfig(
        vocab_size=49_152,
        hidden_size=2048,
        ffn_hidden_size=5632,
        num_layers=24,
        num_attention_heads=16,
        attention="mha",
    )
    assert sum(parameter_counts(ouro, GateConfig(kind="linear")).values()) == 1_434_652_673
    assert cache_values_per_token(ouro, 4) * 2 == 768 * 1024  # 768 KiB per token in bf16


def _kernel_flops(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(query, key, value)


# torch knows the FLOPs of its kernels for GPUs only.
KERNEL = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _kernel_flops}


@pytest.mark.parametrize("name", MODELS)
def test_predicted_flops_equal_those_that_torch_counts(name, single_process):
    """Torch counts the whole score matrix of the attention kernel; our formula counts its causal half."""
    model, gate, length = MODELS[name], GATES["linear"], 16
    looped = LoopLM(model, gate, single_process)
    with FlopCounterMode(display=False, custom_mapping=KERNEL) as counter, torch.no_grad():
        output = looped(torch.zeros(1, length, dtype=torch.long))
        for hidden in output.hidden:
            hidden @ looped.head_weight().t()
    padded = model.attention_head_dim  # narrower values are padded to this width
    value = model.v_head_dim if model.attention == "mla" else padded
    scores = 2 * model.num_loops * model.num_layers * model.num_attention_heads * length * length
    ours = length * forward_flops_per_token(model, gate, length, model.num_loops)
    ours += scores * (padded + value) / 2 + scores * (padded - value)
    assert counter.get_total_flops() == pytest.approx(ours, rel=1e-6)

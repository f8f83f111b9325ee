"""Replay of a step: the same samples and numbers as in the run, and the place of the first NaN or inf."""

import dataclasses
import json
import math
import shutil
from collections.abc import Collection
from itertools import count
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import yaml

from looplm import checkpoint
from looplm.checkpoint.verify import fingerprint
from looplm.cli import to_dict
from looplm.config import EngineConfig, ParallelConfig, RampUpConfig, RunConfig
from looplm.failures import UserError
from looplm.model import LoopLM
from pretrain.norms import LoopNorms
from pretrain.run import Run
from tests.support.faulty import Fault, outcome, run_faulty, run_spoiled
from tests.support.tiny import TEXTS, about_weights, run_config, train_rows
from tools import replay

LOOPS_SEED, LOOPS = 148, [3, 2, 3, 1]  # of the first steps with loss.sampled_loops=uniform
OPTIM = {"train_steps": 8, "warmup_steps": 0, "decay_steps": 0, "schedule": "constant"}


@pytest.fixture(scope="module")
def failed(corpus, tmp_path_factory, single_process) -> RunConfig:
    """Return a run that ends at step 5, the second whose gradient is not finite; it was saved after step 2."""
    changes = {"optim": OPTIM, "health": {"max_skipped": 1}, "checkpoint": {"save_every": 2, "keep": 9}}
    config = run_config(corpus, tmp_path_factory.mktemp("failed"), **changes)
    run_faulty(config, Fault(kind="gradient", steps=range(4, 9), loop=3, micro_batch=1))
    return config


def record(config: RunConfig) -> Path:
    return Path(config.output_dir) / "failures/step_00000005.json"


def replayed(*arguments: object) -> list[replay.Replayed]:
    """Run the command in this process, and return the results of its samples."""
    found = list[replay.Replayed]()
    compute = replay._compute
    keep = lambda *args: found.append(compute(*args)) or found[-1]  # type: ignore[func-returns-value]  # noqa: E731
    with mock.patch.object(replay, "_compute", keep):
        replay.main([str(argument) for argument in arguments])
    return found


@pytest.mark.slow
def test_the_samples_of_a_failed_step_have_the_run_s_numbers(failed, keep_process_groups, capsys):
    found, bad = replayed(record(failed)), json.loads(record(failed).read_text())
    tokens = torch.tensor([float(sample.tokens) for sample in found])
    losses_NR = torch.tensor([sample.loss_per_loop for sample in found])
    mean_R = (losses_NR * tokens[:, None]).sum(0) / tokens.sum()
    assert mean_R.tolist() == pytest.approx(bad["loss_per_loop"], rel=1e-5)
    rms = torch.tensor([sample.hidden_rms for sample in found]).square().mean(0).sqrt()
    assert rms.tolist() == pytest.approx(bad["hidden_rms"], rel=1e-5)
    shown = capsys.readouterr().out
    assert f"weights: {bad['weights']} (the step's own)" in shown and "sample 16  loss" in shown
    assert "all numbers of these 4 samples are finite here" in shown, "the fault was the run's own"
    texts = {text[:20] for text in TEXTS}
    lines = [eval(line.split(": ", 1)[1]) for line in shown.splitlines() if line.startswith("  positions ")]
    assert len(lines) > 4 and sum(line[:20] in texts for line in lines) > 2


@pytest.mark.slow
@pytest.mark.promise(
    text="tools.replay names the module, loop and position where the first NaN arises",
    expected="for each sample of the failed step",
)
def test_the_module_and_loop_of_a_fault_are_named(failed, keep_process_groups, capsys, record_property):
    real = LoopNorms.watch

    def watch(self: LoopNorms, loop: int, h_SBD: torch.Tensor) -> None:
        real(self, loop, h_SBD)
        if loop == 1:
            h_SBD.register_hook(lambda grad_SBD: grad_SBD.index_fill(0, torch.tensor(7), math.nan))

    with mock.patch.object(LoopNorms, "watch", watch):
        found = replayed(record(failed))
    last = "decoder.layers.1.mlp_bda.norm"  # its output's gradient is the first that the spoiled one flows into
    place = replay.Fault("gradient of the output", last, 2, 7)
    assert [sample.fault for sample in found] == [place] * 4
    line = next(line.strip() for line in capsys.readouterr().out.splitlines() if "NOT FINITE" in line)
    assert line.startswith(f"NOT FINITE, first: the gradient of the output of {last} in loop 2 at position 7, token ")
    record_property("seen", line.partition(", token")[0])


@pytest.mark.slow
def test_a_weight_that_is_not_finite_is_found_in_the_first_loop(failed, keep_process_groups, capsys):
    load = checkpoint.load_weights

    def spoiled(step: Path, model: LoopLM, *args: Any) -> Any:
        about = load(step, model, *args)
        with torch.no_grad():
            model.decoder.layers[1].mlp.linear_fc2.weight[0, 0] = math.inf
        return about

    with mock.patch.object(checkpoint, "load_weights", spoiled):
        found = replayed(failed.output_dir, "--step", 4)
    assert {sample.fault and sample.fault[:3] for sample in found} == {("output", "decoder.layers.1.mlp.linear_fc2", 1)}
    shown = capsys.readouterr().out
    assert "samples 12-15" in shown and "step_00000002 (1 steps before this one)" in shown
    assert "not finite in 4 of 4 samples: 12, 13, 14, 15" in shown


@pytest.fixture(scope="module")
def varied(corpus, tmp_path_factory, single_process) -> RunConfig:
    """Return a run with steps of one sample and of 3, 2, 3, 1 loops, saved after each, and with every kind of part."""
    unit = {"latent_iterations": 3, "latent_halting": True}
    changes = {
        "model": {**unit, "injection": "diagonal", "prelude_layers": 1, "coda_layers": 1},
        "loss": {"sampled_loops": "uniform", "prior": "geometric"},
        "optim": {**OPTIM, "train_steps": 4},
        "data": {"micro_batch_size": 1, "global_batch_size": 1},
        "checkpoint": {"save_every": 1, "keep": 9},
        "seed": LOOPS_SEED,
    }
    config = run_config(corpus, tmp_path_factory.mktemp("varied"), **changes)
    run_spoiled(config, ())
    assert [row["loops"] for row in train_rows(config.output_dir)] == LOOPS
    return config


@pytest.mark.slow
@pytest.mark.parametrize("step", range(1, 5))
def test_a_step_is_replayed_in_the_loops_that_it_ran(step, varied, keep_process_groups, capsys):
    (sample,), row = replayed(varied.output_dir, "--step", step), train_rows(varied.output_dir)[step - 1]
    loops = LOOPS[step - 1]
    assert sample.loss == pytest.approx(row["loss"], rel=1e-5)
    assert sample.loss_per_loop == pytest.approx(row["loss_per_loop"][:loops], rel=1e-5)
    assert sample.hidden_rms == pytest.approx(row["hidden_rms"][:loops], rel=1e-5)
    assert sample.grad_norms == pytest.approx({key: norm for key, norm in row["grad_norms"].items() if norm}, rel=1e-4)
    shown = capsys.readouterr().out
    assert f"samples {step - 1}-{step - 1}\nloops of this step: {loops} of 3\n" in shown
    assert ("the run's initial weights" if step == 1 else f"step_{step - 1:08d} (the step's own)") in shown


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "call", "loop"),
    [
        ("embedding.word_embeddings", 1, 1),
        ("prelude.layers.0.mlp.linear_fc2", 1, 1),
        ("injection", 1, 2),
        ("decoder.layers.0.self_attention.kv_layernorm.norm", 2, 2),
        ("decoder.final_layernorm", 3, 3),
        ("coda.layers.0.mlp.linear_fc2", 2, 2),
        ("gate", 2, 2),
    ],
)
def test_the_loop_of_a_fault_is_the_model_s(name, call, loop, varied, keep_process_groups):
    """Some modules do not run in every loop. Step 3 runs all three loops."""
    load, calls = checkpoint.load_weights, count(1)

    def spoil(module: torch.nn.Module, inputs: Any, output: Any) -> Any:
        if next(calls) != call:
            return output
        first, *others = output if isinstance(output, tuple) else (output,)
        spoiled = first.clone()
        spoiled[(0,) * spoiled.dim()] = math.nan
        return (spoiled, *others) if others else spoiled

    def spoiled(step: Path, model: LoopLM, *args: Any) -> Any:
        dict(model.named_modules())[name].register_forward_hook(spoil)
        return load(step, model, *args)

    with mock.patch.object(checkpoint, "load_weights", spoiled):
        (sample,) = replayed(varied.output_dir, "--step", 3)
    assert sample.fault == replay.Fault("output", name, loop, 0)


def run_watched(config: RunConfig, spoiled: Collection[int]) -> dict[int, list[range]]:
    """Train on spoiled data, and return the samples of each attempt at a step."""
    attempts, real = dict[int, list[range]](), Run._step

    def step(self: Run) -> Any:
        done = real(self)
        attempts.setdefault(self._progress.step, []).append(range(*self._samples))
        return done

    with mock.patch.object(Run, "_step", step):
        run_spoiled(config, spoiled)
    return attempts


def found(folder: Path, **options: Any) -> replay.Target:
    return replay.find(replay.ReplayConfig(path=folder, **options))


def spiky(corpus: Path, folder: Path, rollbacks: int = 1, **data: Any) -> RunConfig:
    """Return a run of 20 steps that is saved after every fourth and looks for spikes from step 9 on."""
    health = {"spike_factor": 4.0, "spike_window": 8, "spike_steps": 2, "max_rollbacks": rollbacks}
    optim, saved = {**OPTIM, "train_steps": 20}, {"save_every": 4, "keep": 9}
    return run_config(corpus, folder, optim=optim, health=health, checkpoint=saved, data=data)


def forget_checkpoints_after(folder: Path, last: int) -> None:
    for step in range(last + 1, 21):
        shutil.rmtree(folder / f"checkpoints/step_{step:08d}", ignore_errors=True)


@pytest.mark.slow
def test_samples_after_a_rollback(corpus, tmp_path, single_process, keep_process_groups, capsys):
    """The samples are those of the step's last attempt, also if every checkpoint is from before the rollback."""
    config = spiky(corpus, tmp_path)
    attempts = run_watched(config, range(48, 56))
    assert outcome(config)["error"] is None
    log = tmp_path / "metrics.jsonl"
    rows = log.read_text()
    log.unlink()
    assert found(tmp_path, step=14).samples == range(60, 64), "a later checkpoint knows of the rollback, too"
    log.write_text(rows + '{"kind": "rollback", "st')  # by a process that was killed
    assert {step: ran for step, ran in attempts.items() if len(ran) > 1} == {
        13: [range(48, 52), range(56, 60)],
        14: [range(52, 56), range(60, 64)],
    }
    for last in (20, 12, 0):
        forget_checkpoints_after(tmp_path, last)
        for step, ran in attempts.items():
            target = found(tmp_path, step=step)
            assert [*target.undone, target.samples] == ran, (last, step)
    assert attempts[15] == [range(64, 68)] and attempts[16] == [range(68, 72)] and attempts[1] == [range(4)]
    replayed(tmp_path, "--step", 14)
    shown = capsys.readouterr().out
    assert "step 14: samples 60-63\nattempt 2 at this step; undone by rollbacks: samples 52-55\n" in shown


@pytest.mark.slow
def test_a_spike_that_ends_the_run_shows_its_own_samples(corpus, tmp_path, single_process):
    """The message of a run without further rollbacks names the step; its samples are the second spike's."""
    config = spiky(corpus, tmp_path)
    attempts = run_watched(config, range(48, 64))
    _, message = outcome(config)["error"]
    path, _, step = message.rpartition("tools.replay ")[2].split()
    target = found(Path(path), step=int(step))
    assert (target.step, target.undone, target.samples) == (14, (range(52, 56),), range(60, 64))
    assert [*target.undone, target.samples] == attempts[14]


@pytest.mark.slow
def test_samples_after_rollbacks_of_a_growing_batch(corpus, tmp_path, single_process):
    ramp = RampUpConfig(start=2, increment=2, samples=40)
    config = spiky(corpus, tmp_path, rollbacks=2, rampup=ramp, global_batch_size=6, first_sample=4)
    attempts = run_watched(config, [*range(40, 52), *range(70, 82)])
    assert outcome(config)["error"] is None and sum(len(ran) > 1 for ran in attempts.values()) > 3
    for last in (20, 12, 8):
        forget_checkpoints_after(tmp_path, last)
        for step, ran in attempts.items():
            target = found(tmp_path, step=step)
            assert [*target.undone, target.samples] == ran, (last, step)


def test_a_rollback_beyond_an_earlier_one(corpus, tmp_path):
    """The first returns to step 12 after step 14; the second, for want of that checkpoint, to step 8 after step 14."""
    config, windows = spiky(corpus, tmp_path), [(48, 56), (40, 64)]
    attempts = {step: replay._attempts(config, step, None, windows) for step in (8, 9, 13, 15)}
    assert attempts == {
        8: (range(28, 32),),
        9: (range(32, 36), range(64, 68)),
        13: (range(48, 52), range(56, 60), range(80, 84)),
        15: (range(88, 92),),
    }


def test_steps_are_counted_from_a_checkpoint(corpus, tmp_path):
    """The batch may have changed since the run began."""
    about = dataclasses.replace(about_weights("float32"), step=4, samples=100)
    assert replay._attempts(run_config(corpus, tmp_path), 6, about, []) == (range(104, 108),)


@pytest.mark.slow
def test_named_weights_do_not_change_the_samples(failed, tmp_path, keep_process_groups, capsys):
    folder, own = Path(failed.output_dir), range(12, 16)
    kept, saved = folder / "failures/step_00000005", folder / "checkpoints/step_00000002"
    assert found(folder, step=4, weights=str(saved)).samples == own
    assert found(folder, step=5, weights=str(kept)).samples == range(16, 20)
    assert found(folder, step=5, weights=str(kept)).weights.origin == f"{kept} (the step's own)"
    assert found(folder, step=6, weights=str(kept)).samples == range(20, 24)
    for weights, step in ((saved, 2), (saved, 1), (kept, 4)):
        with pytest.raises(UserError, match=rf"--weights: \S+ already includes step {step}, .* leave --weights out"):
            found(folder, step=step, weights=str(weights))
    with pytest.raises(UserError, match=r"--weights: \S+ already includes step 2"):
        replay.main([str(folder), "--step", "2", "--weights", str(folder)])

    other = shutil.copytree(saved, tmp_path / "step_00000002")
    about = json.loads((other / "about.json").read_text()) | {"step": 9, "samples": 36, "data_order": "another"}
    rewrite_about(other, about)
    replayed(folder, "--step", 4, "--weights", other)
    shown = capsys.readouterr().out
    assert "step 4: samples 12-15\n" in shown and f"weights: {other} (not of this run; of step 9 of another)\n" in shown


def rewrite_about(step: Path, values: dict[str, Any]) -> None:
    (step / "about.json").write_text(json.dumps(values))
    manifest = json.loads((step / "manifest.json").read_text())
    manifest["about.json"] = fingerprint(step / "about.json")
    (step / "manifest.json").write_text(json.dumps(manifest))


def test_a_run_with_fp8_weights_is_read_for_one_process(corpus, tmp_path):
    engine = EngineConfig(transformer_impl="transformer_engine", fp8="hybrid", fp8_params=True)
    parallel, optim = ParallelConfig(distributed_optimizer=True), {"precision": "bf16"}
    sections: dict[str, Any] = {"engine": engine, "parallel": parallel, "optim": optim}
    config = run_config(corpus, tmp_path, model={"qk_rope_head_dim": 16}, **sections)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(to_dict(config)))
    read = replay._read_config(tmp_path)
    assert read.engine == dataclasses.replace(engine, fp8_params=False) and read.parallel == ParallelConfig()
    assert read.model == config.model and read.optim == config.optim
    moved = tmp_path.rename(tmp_path.with_name("moved"))
    assert replay._read_config(moved).output_dir == str(moved), "indices are written into the run, wherever it is"


def test_mistakes_are_named(corpus, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text(yaml.safe_dump(to_dict(run_config(corpus, run, optim=OPTIM))))
    for step in (None, 0, 9):
        words = rf"--step: {step} is not a step of \S+; give its number, from 1 to optim\.train_steps=8"
        with pytest.raises(UserError, match=words):
            found(run, step=step)
    with pytest.raises(UserError, match=r"config\.yaml: is missing; give a training directory"):
        replay.main([str(tmp_path), "--step", "3"])
    for text, words in (("a: [", r":1: not valid YAML"), ("", "holds nothing"), ("a: 1", "a: unknown key")):
        (tmp_path / "config.yaml").write_text(text)
        with pytest.raises(UserError, match=rf"config\.yaml:? ?{words}"):
            replay.main([str(tmp_path), "--step", "3"])


FAILED = {"step": 1, "samples": [0, 4], "what": "", "weights": None}
IN_ORDER = "is not allowed; a run writes the first and the one after the last"


@pytest.mark.parametrize(
    ("content", "arguments", "message"),
    [
        ("", [], "FILE: cannot be read as JSON in UTF-8 (Expecting value: line 1 column 1 (char 0)); give one from"),
        ("[" * 10**5, [], "FILE: cannot be read as JSON in UTF-8 (maximum recursion depth exceeded"),
        ({"step": "x"}, [], "FILE: step: 'x' is not allowed; give a whole number"),
        ({"step": 0}, [], "FILE: step: 0 is not a step of RUN; give its number, from 1 to optim.train_steps=8"),
        ({"step": 9}, [], "FILE: step: 9 is not a step of RUN; give its number, from 1 to optim.train_steps=8"),
        ({"samples": [8, 8]}, [], f"FILE: samples: [8, 8] {IN_ORDER}"),
        ({"samples": [-4, 0]}, [], f"FILE: samples: [-4, 0] {IN_ORDER}"),
        ({"samples": [1]}, [], f"FILE: samples: [1] {IN_ORDER}"),
        ({}, ["--step", "7"], "--step: 7 is not allowed; FILE names its own; leave --step out"),
        ({}, ["--characters=-5"], "characters: -5 is not allowed; give a number of at least 0"),
    ],
)
def test_a_file_that_names_no_step_is_refused(content, arguments, message, corpus, tmp_path):
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(to_dict(run_config(corpus, tmp_path, optim=OPTIM))))
    path = tmp_path / "failures/step_00000001.json"
    path.parent.mkdir()
    path.write_text(content if isinstance(content, str) else json.dumps(FAILED | content))
    with pytest.raises(UserError) as caught:
        replay.main([str(path), *arguments])
    assert str(caught.value).startswith(message.replace("FILE", str(path)).replace("RUN", str(tmp_path)))


def test_what_a_file_says_cannot_control_the_terminal(corpus, tmp_path):
    target = replay.Target(tmp_path, 1, range(4), replay.Weights(None, "none"), None, what="\x1b[2J")
    assert list(replay._heading(target, run_config(corpus, tmp_path), 3))[-1] == "in the run: \\x1b[2J\n"

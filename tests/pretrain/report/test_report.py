"""The report page, from synthetic run directories like the one of `make quickstart`."""

import dataclasses
import json
import math
import os
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from looplm.cli import to_dict
from looplm.config import DataConfig, DataSource, ModelConfig, OptimConfig, RunConfig
from looplm.failures import UserError
from pretrain.report.__main__ import main
from pretrain.report.page import build_page
from pretrain.report.plots import loop_colors

PROMPT = "import re\n\n<script>alert('&')</script>\n"
WORDS = [
    "def",
    " parse",
    "(line",
    ": ",
    "str",
    ")",
    " ->",
    " dict:",
    "\n    ",
    '"""a <b> & c."""',
    "\n\n",
    "\t",
    "return",
]


def metrics(steps: int, loops: int, gate: bool = False) -> list[dict[str, Any]]:
    """Return lines like pretrain.train's: the loss falls, and the exit distribution is uniform at first."""
    rng = np.random.default_rng(int(gate))
    lines: list[dict[str, Any]] = []
    for step in range(1, steps + 1):
        done = 1.0 if gate else step / steps
        base = 3.9 + 4.4 * math.exp(-6 * done) + 0.06 * rng.standard_normal()
        loss = [base + 0.35 * done * 0.45**loop for loop in range(loops)]
        share = np.exp(-np.linspace(0, 1.2 * step / steps if gate else 0.3 * done, loops))
        share /= share.sum()
        line = {
            "step": step,
            "loss": float(share @ loss),
            "loss_per_loop": loss,
            "exit_distribution": share.tolist(),
            "mean_depth": float(share @ np.arange(1, loops + 1)),
            "entropy": float(-share @ np.log(share)),
        }
        speed = 1100 + 40 * rng.standard_normal()
        about = {
            "kind": "train",
            "objective": "adaptive_gate" if gate else "entropy_regularised",
            "samples": 8 * step,
            "tokens": 2048 * step,
            "grad_norm": float(np.exp(0.2 * rng.standard_normal()) / (0.3 + done)),
            "grad_norms": {"gate": 0.1} if gate else {"mlp": 0.5 + done, "norms": None if step == 7 else 0.01},
            "hidden_rms": [1.5 + loop * done for loop in range(loops)],
            "hidden_grad_norm": [0.0] * loops if gate else [0.3 * 2.0**-loop for loop in range(loops)],
            "hidden_cosine": [1.0] + [0.5 + loop / 20 for loop in range(1, loops)],
            "learning_rate": 1e-3 * min(1, step / 20, 1.2 - done),
            "tokens_per_second": speed,
            "mfu": None,
            "seconds": 2048 / speed,
        }
        lines.append(about | line)
        if step % max(1, steps // 5) == 0:
            dynamics = {"loop_radius": [None, *[1.5 - done / 2] * (loops - 1)], "attention_sink": [0.1 * done] * loops}
            lines.append({"kind": "valid"} | line | {"loss_per_loop": [value + 0.08 for value in loss]} | dynamics)
    return lines


def evaluation(loops: int) -> dict[str, Any]:
    losses = {depth: 3.95 + 0.8 * 0.4**depth + 0.012 * max(0, depth - loops) ** 2 for depth in range(1, 2 * loops + 1)}
    means = {
        q: 1 + (loops - 1) * max(0.0, (q - 0.2) / 0.8) ** 1.5 for q in (0.1, 0.2, 0.3, 0.5, 0.6, 0.8, 0.9, 0.95, 1.0)
    }
    share = [2.0**-loop for loop in range(loops)]
    return {
        "checkpoint": "runs/x/gate",
        "step": 60,
        "trained_loops": loops,
        "tokens": 65536,
        "depths": [{"depth": depth, "loss": loss, "perplexity": math.exp(loss)} for depth, loss in losses.items()],
        "exit_curve": [{"threshold": q, "mean_depth": m, "loss": 3.94 + 0.8 * 0.4**m} for q, m in means.items()],
        "exit_distribution": [value / sum(share) for value in share],
        "decoding": [
            {"kv_cache": cache, "exit_signal": "gate", "exit_threshold": q, "mean_depth": means[q], "loss": 4.0 + worse}
            | {"tokens": 60000, "perplexity": math.exp(4.0 + worse)}
            for worse, cache in enumerate(("per_loop", "last", "mean", "first"))
            for q in (1.0, 0.5)
        ],
    }


def sample(loops: int) -> dict[str, Any]:
    tokens = [{"text": word, "depth": 1 + index % loops} for index, word in enumerate(WORDS)]
    settings = {"temperature": 0.8, "kv_cache": "per_loop", "exit_threshold": 0.9}
    return {"prompt": PROMPT, "text": "".join(WORDS), "tokens": tokens, "settings": settings, "trained_loops": loops}


def write_lines(path: Path, lines: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def write_run(run: Path, steps: int = 300, loops: int = 4) -> Path:
    """Write a complete run directory."""
    model = ModelConfig(
        vocab_size=4096,
        hidden_size=128,
        ffn_hidden_size=352,
        num_layers=3,
        num_attention_heads=4,
        num_loops=loops,
    )
    config = RunConfig(
        output_dir=str(run / "stage1"),
        model=model,
        optim=OptimConfig(train_steps=steps),
        data=DataConfig(train=(DataSource(prefix="data/train"),)),
    )
    write_lines(run / "gate/metrics.jsonl", metrics(max(1, steps // 5), loops, gate=True))
    write_lines(run / "stage1/metrics.jsonl", metrics(steps, loops))
    for number, folder in enumerate(("stage1", "gate/checkpoints/step_00000030", "gate/checkpoints/step_00000060")):
        (run / folder).mkdir(parents=True, exist_ok=True)
        values = to_dict(dataclasses.replace(config, seed=number))
        (run / folder / "config.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
    (run / "evaluation.json").write_text(json.dumps(evaluation(loops)), encoding="utf-8")
    write_lines(run / "samples.jsonl", [sample(loops)] * 2)
    return run


class Page(HTMLParser):
    """Tags, text and external references of a page; fails if a tag is not closed."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.text = ""
        self.references: list[str] = re.findall(r"(?:url\(|@import\s*)([^)\s]*)", page)
        self._open: list[str] = []
        self.feed(page)
        assert not self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.references += [value or "" for name, value in attrs if name in ("href", "src", "xlink:href", "action")]
        if tag not in ("meta", "link"):
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in ("meta", "link"):
            self._open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_whole_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "my <run>")
    main([str(run)])
    assert capsys.readouterr().out == f"report: {run}/report.html\n"
    page = Page((run / "report.html").read_text(encoding="utf-8"))
    assert page.tags.count("figure") == 17
    assert "script" not in page.tags
    assert {reference[0] for reference in page.references} == {"#", "d"}  # within the page, or data:, (no icon)
    for words in (
        "my <run>",
        PROMPT,
        "".join(WORDS),
        "loop 4",
        "depth 4",
        "num_loops: 4",
        "seed: 0",
        "seed: 2",
        "stage1 614\xa0K + gate 123\xa0K",
        "per_loop",  # the legend of the caches
    ):
        assert words in page.text
    lines = metrics(300, 4)
    losses = [line["loss_per_loop"][-1] for line in lines if line["kind"] == "train"]
    fall = losses[0] - np.mean(losses[-10:])
    assert fall > 4
    assert f"fell by {fall:.2f} nats" in page.text
    assert [path.name for path in run.iterdir() if path.name.startswith(".")] == []


def test_converted_models_have_a_table(tmp_path: Path) -> None:
    """Show the loss of a source with one loop at that one depth; leave out a stage that was trained since."""
    run = write_run(tmp_path / "run")
    after = {"loss_per_depth": [2.25, 2.125], "exit_distribution": [0.5, 0.5]}
    before = {"loss_per_depth": [2.0, 10.5], "exit_distribution": [1.0]}
    record = {"kind": "retrofit", "source": "models/dense"}
    model = ModelConfig(
        vocab_size=64, hidden_size=32, ffn_hidden_size=64, num_attention_heads=4, num_layers=2, prelude_layers=3
    )
    for name, measured in (("looped", {"before": before, "after": after}), ("unmeasured", {}), ("stage1", {})):
        (run / name / "companions").mkdir(parents=True, exist_ok=True)
        text = json.dumps([{"kind": "dense"}, {**record, **measured}])
        (run / name / "companions/upcycle.json").write_text(text, encoding="utf-8")
        if name != "stage1":
            (run / name / "config.yaml").write_text(yaml.safe_dump({"model": to_dict(model)}), encoding="utf-8")
    text = Page(build_page(run)).text
    row = f"loopedretrofitdense{model.depth_summary}{model.attention_widths.cached}2.00002.2500 2.1250"
    assert row in text and "unmeasuredretrofitdense" in text and "stage1retrofit" not in text
    (run / "looped/companions/upcycle.json").write_text("[{", encoding="utf-8")
    with pytest.raises(UserError, match=r"looped/companions/upcycle\.json: cannot be read as JSON"):
        build_page(run)


def test_the_data_of_the_evaluation_is_named(tmp_path: Path) -> None:
    run = write_run(tmp_path, steps=1)
    assert "Measured on" not in Page(build_page(run)).text
    (run / "evaluation.json").write_text(json.dumps(evaluation(4) | {"data": ["a/train", "b/valid"]}), encoding="utf-8")
    assert "the numbers are thresholds. Measured on train, valid." in Page(build_page(run)).text


@pytest.mark.parametrize(("steps", "loops", "figures"), [(1, 4, 17), (1, 1, 13), (400, 8, 17)])
def test_short_shallow_and_long(tmp_path: Path, steps: int, loops: int, figures: int) -> None:
    page = Page(build_page(write_run(tmp_path, steps, loops)))
    assert page.tags.count("figure") == figures
    assert "No " not in page.text


def test_missing_files_are_named(tmp_path: Path) -> None:
    write_lines(tmp_path / "metrics.jsonl", metrics(3, 2))
    page = Page(build_page(tmp_path))
    assert page.tags.count("figure") == 14
    for name in ("evaluation.json", "samples.jsonl"):
        assert f"No {name} here" in page.text
    (tmp_path / "metrics.jsonl").unlink()
    write_lines(tmp_path / "samples.jsonl", [sample(3)])
    page = Page(build_page(tmp_path))
    assert "No training metrics here" in page.text
    assert "depth 3" in page.text


def test_metrics_of_older_releases_have_no_norms(tmp_path: Path) -> None:
    norms = ("grad_norms", "hidden_rms", "hidden_grad_norm", "hidden_cosine", "loop_radius", "attention_sink")
    lines = [{key: value for key, value in line.items() if key not in norms} for line in metrics(3, 2)]
    write_lines(tmp_path / "metrics.jsonl", lines)
    assert Page(build_page(tmp_path)).tags.count("figure") == 8


def test_values_that_are_not_finite_are_left_out_and_counted(tmp_path: Path) -> None:
    lines = [line for line in metrics(20, 2) if line["kind"] == "train"]
    lines[3] |= {
        "loss_per_loop": [math.nan, math.inf],
        "exit_distribution": [math.nan, math.nan],
        "grad_norm": math.nan,
    }
    lines[4] |= {"loss_per_loop": [None, 4.0], "grad_norm": None}
    for line in lines:
        line |= {"learning_rate": None, "tokens": None}
    write_lines(tmp_path / "stage1/metrics.jsonl", lines)
    text = build_page(tmp_path)
    page = Page(text)
    assert "stage1: 2 of 20 logged steps have a loss that is not finite" in page.text
    assert page.tags.count("figure") == 11
    assert not re.search(r"\bnan\b", page.text)


def test_loops_that_a_step_did_not_run_are_left_out_and_are_no_fault(tmp_path: Path) -> None:
    lines = [line for line in metrics(20, 2) if line["kind"] == "train"]
    for line in (*lines[:9], lines[-1]):
        line |= {"loss_per_loop": [line["loss_per_loop"][0], None], "exit_distribution": [1.0, 0.0], "loops": 1}
    write_lines(tmp_path / "stage1/metrics.jsonl", lines)
    page = Page(build_page(tmp_path))
    assert "not finite" not in page.text and not re.search(r"\bnan\b", page.text)
    assert f"{lines[9]['loss_per_loop'][1]:.2f} →" in page.text, "the headline starts with the first step of all loops"


def test_tokens_of_a_run_that_a_conversion_continues_count_once(tmp_path: Path) -> None:
    write_lines(tmp_path / "a/metrics.jsonl", metrics(20, 2))
    grown = [line for line in metrics(30, 2) if line["step"] > 20]
    write_lines(tmp_path / "b/metrics.jsonl", grown)
    write_lines(tmp_path / "c/metrics.jsonl", metrics(10, 2))
    os.utime(tmp_path / "a/metrics.jsonl", (1, 1))
    os.utime(tmp_path / "b/metrics.jsonl", (2, 2))
    assert "Tokens seen81.9 Ka 41 K + b 20.5 K + c 20.5 K" in " ".join(Page(build_page(tmp_path)).text.split())


def test_stages_with_different_numbers_of_loops(tmp_path: Path) -> None:
    write_lines(tmp_path / "a/metrics.jsonl", metrics(5, 8))
    write_lines(tmp_path / "b/metrics.jsonl", metrics(5, 4))
    assert "loop 8" in Page(build_page(tmp_path)).text


def test_text_beyond_the_trained_depth_has_colors(tmp_path: Path) -> None:
    run = write_run(tmp_path, steps=1, loops=2)
    write_lines(run / "samples.jsonl", [sample(6)])
    page = build_page(run)
    assert "--pale-6:" in page
    assert "--loop-3:" not in page
    assert "depth 6" in Page(page).text


DEEP = "[" * 10**5 + "\n"
EVALUATION = (
    '{"trained_loops": %d, "tokens": 1, "exit_curve": [], "exit_distribution": [], '
    '"depths": [{"depth": %d, "loss": 1.0, "perplexity": 2.0}]}'
)
IN_RANGE = "give a number from 1 to 10,000, or run pretrain.evaluate again"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("stage1/metrics.jsonl", '{"kind": "train", "step": 1\n', r"stage1/metrics.jsonl:1: cannot be read as JSON"),
        ("stage1/metrics.jsonl", "\n[1]", r"metrics.jsonl:2: holds a list, not a JSON object"),
        ("stage1/metrics.jsonl", '{"kind": "train", "step": 1}', r"metrics.jsonl:1: loss_per_loop: None is not a list"),
        ("stage1/metrics.jsonl", '{"kind": "train", "step": "x"}', r"metrics.jsonl:1: step: 'x' is not a whole number"),
        (
            "stage1/metrics.jsonl",
            '{"kind": "train", "step": 1, "grad_norms": 2}',
            r"jsonl:1: grad_norms: 2 is not",
        ),
        (
            "stage1/metrics.jsonl",
            '{"kind": "train", "step": 1e999}',
            r"metrics.jsonl:1: step: inf is not a whole number",
        ),
        ("stage1/metrics.jsonl", DEEP, r"metrics.jsonl:1: cannot be read as JSON in UTF-8 \(maximum recursion depth"),
        ("stage1/config.yaml", "a: [", r"stage1/config.yaml:1: not valid YAML"),
        (
            "stage1/config.yaml",
            "a: !!python/name:os.system",
            r"config.yaml:1: a: the tag '.*' is not allowed; leave it",
        ),
        ("stage1/config.yaml", "[]", r"config.yaml: holds a list, not a mapping of keys"),
        ("gate/companions/upcycle.json", "[]", r"upcycle.json: names no conversion; write it again or remove it"),
        ("gate/companions/upcycle.json", DEEP, r"upcycle.json: cannot be read as JSON in UTF-8 \(maximum recursion"),
        ("gate/companions/upcycle.json", "[{}]", r"gate/config.yaml: vocab_size: required and not given"),
        ("evaluation.json", EVALUATION % (10**9, 1), rf"json: trained_loops: 1000000000 is not allowed; {IN_RANGE}"),
        ("evaluation.json", EVALUATION % (4, 0), rf"json: depths\[\].depth: 0 is not allowed; {IN_RANGE}"),
        ("evaluation.json", "", r"evaluation.json: cannot be read as JSON"),
        ("evaluation.json", "{}", r"evaluation.json: .*required"),
        ("samples.jsonl", "{}", r"samples.jsonl:1: prompt or settings"),
        ("samples.jsonl", '{"prompt": "", "tokens": [{"text": "a", "depth": 0}]}', r"samples.jsonl:1: depth: 0 is not"),
        (
            "samples.jsonl",
            '{"prompt": "", "tokens": [{"text": "a", "depth": 1e999}]}',
            r"jsonl:1: depth: inf is not a whole",
        ),
        (
            "samples.jsonl",
            '{"prompt": "", "tokens": [{"text": 1, "depth": 1}]}',
            r"samples.jsonl:1: text: 1 is not a text",
        ),
        ("samples.jsonl", "\udcff", r"samples.jsonl: cannot be read"),
    ],
)
def test_malformed_files_are_one_line_errors(tmp_path: Path, name: str, content: str, message: str) -> None:
    path = write_run(tmp_path, steps=1) / name
    if path.name == "upcycle.json":  # of a model that was not trained since
        (tmp_path / "gate/metrics.jsonl").unlink()
        (tmp_path / "gate/config.yaml").write_text("seed: 1")
        path.parent.mkdir()
    path.write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(UserError, match=message) as caught:
        main([str(tmp_path)])
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "report.html").exists()


def test_a_run_of_an_earlier_release_is_read(tmp_path: Path) -> None:
    path = write_run(tmp_path, steps=1) / "stage1/config.yaml"
    values = yaml.safe_load(path.read_text())
    values["loss"] |= {"weights": "last", "prior": "geometric"}  # which had no effect, and is refused now
    values["health"]["spike_window"] = 8  # without a spike_factor, the same
    path.write_text(yaml.safe_dump(values))
    assert "prior: geometric" in Page(build_page(tmp_path)).text


def test_a_diverged_model_is_drawn_without_its_losses(tmp_path: Path) -> None:
    run = write_run(tmp_path, steps=1)
    values = evaluation(4)
    for row in (*values["depths"][1:3], *values["exit_curve"][:2], *values["decoding"][:2]):
        row["loss"] = math.nan
    values["decoding"][3]["mean_depth"] = 1e308
    (run / "evaluation.json").write_text(json.dumps(values))
    assert Page(build_page(run)).tags.count("figure") == 17


def test_many_loops_are_drawn(tmp_path: Path) -> None:
    run = write_run(tmp_path, steps=1)
    (run / "evaluation.json").write_text(EVALUATION % (300, 300))
    assert "var(--loop-300)" in build_page(run)


def test_a_time_beyond_all_numbers_is_left_out(tmp_path: Path) -> None:
    write_lines(tmp_path / "a/metrics.jsonl", [line | {"seconds": math.inf} for line in metrics(3, 2)])
    assert "Training time" not in Page(build_page(tmp_path)).text


def test_half_a_line_of_a_killed_run_is_left_out_with_a_note(tmp_path: Path, capsys) -> None:
    run = write_run(tmp_path, steps=3)
    before = build_page(run)
    with (run / "stage1/metrics.jsonl").open("a") as metrics:
        metrics.write('{"kind": "train", "step": 4, "lo')
    assert build_page(run) == before
    assert "metrics.jsonl:" in (told := capsys.readouterr().err) and "is half a line, of a run that was killed" in told


def test_no_output_folder_and_no_input(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="out: cannot be written"):
        main([str(write_run(tmp_path / "run", steps=1)), "--output", str(tmp_path / "run/gate/metrics.jsonl/out")])
    with pytest.raises(UserError, match="no such directory"):
        main([str(tmp_path / "absent")])
    with pytest.raises(UserError, match="train something into it first"):
        main([str(tmp_path)])


@pytest.mark.parametrize("loops", [1, 2, 4, 8, 16])
def test_colors_are_readable_and_distinct(loops: int) -> None:
    """Text on its depth's color has a contrast of at least 4.5 (WCAG); lightness is monotonic in depth."""

    def luminance(color: str) -> float:
        rgb = np.array([int(color[at : at + 2], 16) for at in (1, 3, 5)]) / 255
        return float(np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4) @ [0.2126, 0.7152, 0.0722])

    for mode, ink in (("light", luminance("#1b1f24")), ("dark", luminance("#e8eaed"))):
        pale = [luminance(color) for color in loop_colors(loops)[f"{mode}-pale"]]
        assert min((max(ink, paper) + 0.05) / (min(ink, paper) + 0.05) for paper in pale) >= 4.5
        for colors in (pale, [luminance(color) for color in loop_colors(loops)[mode]]):
            assert (np.diff(colors) < 0).all() if mode == "light" else (np.diff(colors) > 0).all()

"""The FP8 study: the order of its runs, its table, and resumption; pretrain.train itself is replaced."""

import json
from pathlib import Path

import pytest

from looplm.failures import UserError
from tools import fp8_study
from tools.fp8_study import Run, StudyConfig, main, plan, table
from tools.studies import study

LOSSES = {("bf16", 1): 4.0, ("bf16", 2): 5.0, ("hybrid-tensorwise", 1): 4.02, ("hybrid-tensorwise", 2): 4.95}


class FakeSubprocess:
    """Replacement for ``python -m pretrain.train``: writes a run's metrics, or fails."""

    STDOUT = None

    def __init__(self) -> None:
        self.commands: list[list[str]] = []
        self.broken = False

    def run(self, command: list[str], **_: object) -> "FakeSubprocess":
        self.commands.append(command)
        self.returncode = int(self.broken)
        values = dict(zip(command[3::2], command[4::2], strict=True))
        variant, seed = Path(values["--output_dir"]).name.split("_seed")
        assert (values["--engine.fp8"], values["--engine.fp8_recipe"]) == fp8_study.VARIANTS[variant]
        assert values["--seed"] == seed
        loss = LOSSES[variant, int(seed)]
        rows = [
            {"kind": kind, "loss_per_loop": [9.0, loss + extra], **({"seconds": 45.0} if kind == "train" else {})}
            for kind, extra in (("train", 3.0), ("valid", 1.0), ("valid", 0.0), ("train", 2.0))
        ]
        Path(values["--output_dir"], "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return self


@pytest.fixture
def trainer(monkeypatch):
    fake = FakeSubprocess()
    monkeypatch.setattr(fp8_study, "subprocess", fake)
    return fake


def test_the_baseline_runs_first_with_the_first_variant():
    config = StudyConfig(seeds=(1, 2), variants=("hybrid-tensorwise", "bf16", "e4m3-mxfp8"))
    order = [
        ("bf16", 1),
        ("hybrid-tensorwise", 1),
        ("bf16", 2),
        ("hybrid-tensorwise", 2),
        ("e4m3-mxfp8", 1),
        ("e4m3-mxfp8", 2),
    ]
    assert list(plan(config)) == order
    assert len(list(plan(StudyConfig()))) == 3 * len(fp8_study.VARIANTS)


@pytest.mark.slow
def test_variants_are_compared_seed_by_seed_and_a_repeated_command_resumes(trainer, tmp_path, monkeypatch):
    monkeypatch.setattr(study, "git_revision", lambda: "abc")
    argv = ["--output_dir", str(tmp_path), "--seeds", "[1,2]", "--variants", "[bf16,hybrid-tensorwise]"]
    trainer.broken = True
    with pytest.raises(SystemExit, match=r"bf16, seed 1, ended with status 1; see .*log\.txt"):
        main(argv)
    trainer.broken = False
    main(argv)
    assert len(trainer.commands) == 1 + 4
    main(argv)
    assert len(trainer.commands) == 5, "finished runs are not repeated"

    report = json.loads((tmp_path / "study.json").read_text())
    assert report["commit"] == "abc" and {"recipe", "machine", "versions"} <= set(report)
    losses = {(run["variant"], run["seed"]): run["validation_loss"] for run in report["runs"]}
    assert losses == LOSSES and len(report["runs"]) == 4
    assert {run["minutes"] for run in report["runs"]} == {1.5}, "two steps of 45 s, whichever attempt made them"
    assert "| hybrid-tensorwise | 4.0200 | 4.9500 | 4.4850 | -0.25%, -1.00% |" in (tmp_path / "table.md").read_text()
    with pytest.raises(UserError, match=r"settings\.json: belongs to a study with other settings"):
        main([*argv, "--recipe", "configs/longer/../quickstart/pretrain.yaml"])


def test_a_table_may_have_gaps():
    rows = table(
        [Run("bf16", 1, 4.0, [4.0], 1.0), Run("bf16", 2, 5.0, [5.0], 1.0), Run("e4m3-mxfp8", 2, 5.5, [5.5], 1.0)]
    )
    assert rows.splitlines()[-1] == "| e4m3-mxfp8 |  | 5.5000 | 5.5000 | +10.00%, +10.00% |"


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"seeds": ()}, r"seeds: \[\] is not allowed"),
        ({"variants": ("bf16", "int4")}, "variants: 'int4' is not allowed; choose from bf16"),
        ({"variants": ("e4m3-mxfp8",)}, "variants: .* is not allowed; bf16 must be among them"),
    ],
)
def test_bad_input_gives_a_one_line_error(keys, message):
    with pytest.raises(UserError, match=message):
        StudyConfig(**keys)


def test_a_recipe_that_validates_nothing_is_refused_before_it_trains(tmp_path, trainer):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(Path("configs/quickstart/pretrain.yaml").read_text().replace("  valid: [", "  # valid: ["))
    with pytest.raises(UserError, match=r"recipe: .*recipe.yaml' is not allowed; it validates nothing"):
        main(["--recipe", str(recipe), "--output_dir", str(tmp_path / "study")])
    assert not trainer.commands


def test_results_of_a_recipe_that_has_changed_since_are_not_continued(tmp_path, trainer, monkeypatch):
    monkeypatch.setattr(study, "git_revision", lambda: "abc")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(Path("configs/quickstart/pretrain.yaml").read_text())
    command = ["--recipe", str(recipe), "--output_dir", str(tmp_path / "study"), "--seeds", "[1]"]
    main([*command, "--variants", "[bf16]"])
    recipe.write_text(recipe.read_text().replace("lr: 2.5e-3", "lr: 5.0e-3"))
    with pytest.raises(UserError, match="belongs to a study with other settings"):
        main([*command, "--variants", "[bf16]"])

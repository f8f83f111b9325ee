"""The upcycling study on tiny models, and its report of unmet expectations."""

import json

import pytest
import yaml

from looplm.cli import to_dict
from looplm.failures import UserError
from tests.support.tiny import run_config
from tools import upcycle_study
from tools.upcycle_study import Result, StudyConfig, main, plan, table

pytestmark = pytest.mark.usefixtures("keep_process_groups")
CHOSEN = ("stacked", "latent-full", "looped")  # one of each source
GOOD = Result("good", source=4.0, start=5.0, curve=[4.9, 4.5], logits_within=1e-6)


@pytest.mark.slow
def test_results_are_produced_and_trained_on_once(corpus, tmp_path, monkeypatch, capsys):
    recipe = to_dict(run_config(corpus, tmp_path / "none", logging={"tensorboard": False}))
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    defaults = {"kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128}
    plain = {"model": {"attention": "mha", "head_dim": 16, **defaults}}
    (tmp_path / "plain.yaml").write_text(yaml.safe_dump(plain))
    argv = ["--recipe", str(tmp_path / "recipe.yaml"), "--plain", str(tmp_path / "plain.yaml"), "--layers", "1"]
    argv += ["--output_dir", str(tmp_path / "study"), "--steps", "6", "--samples", "4"]
    monkeypatch.setattr(upcycle_study, "POINTS", 2)
    monkeypatch.setattr(upcycle_study, "plan", lambda *args: {name: plan(*args)[name] for name in CHOSEN})
    main(argv)
    results = {
        path.parent.name: Result(**json.loads(path.read_text())) for path in tmp_path.glob("study/*/result.json")
    }
    assert set(results) == set(CHOSEN)
    assert all(len(result.curve) == 2 and not result.faults() for result in results.values())
    full = results["latent-full"]
    assert full.logits_within is not None and full.logits_within < 1e-5
    assert abs(full.start - full.source) < 1e-5
    assert (tmp_path / "study" / "table.md").read_text() in capsys.readouterr().out

    monkeypatch.setattr(upcycle_study, "produce", None)
    monkeypatch.setattr(upcycle_study, "train_sources", lambda *_: None)
    main(argv)  # finished results are not repeated
    with pytest.raises(UserError, match="a study with other settings"):
        main([*argv, "--samples", "8"])
    for name, old, new in (("recipe", "lr: 0.01", "lr: 0.02"), ("plain", "head_dim: 16", "head_dim: 8")):
        path, text = tmp_path / f"{name}.yaml", (tmp_path / f"{name}.yaml").read_text()
        path.write_text(text.replace(old, new, 1))
        with pytest.raises(UserError, match="a study with other settings"):
            main(argv)
        path.write_text(text)


@pytest.mark.parametrize(
    ("changed", "fault"),
    [
        ({}, None),
        ({"curve": [5.1, 4.5]}, "rises to 5.1000, above its start at 5.0000"),
        ({"curve": [4.9, float("nan")]}, "ends at nan, not below"),
        ({"curve": [5.0, 5.0]}, "ends at 5.0000, not below"),
        ({"logits_within": 2e-4}, "logits differ by 2.0e-04"),
    ],
)
def test_unmet_expectations_are_reported(changed, fault):
    found = GOOD._replace(**changed).faults()
    assert (not found) if fault is None else any(fault in line for line in found)


def test_a_result_that_promises_no_exactness_has_an_empty_cell():
    assert table([GOOD, GOOD._replace(name="near", logits_within=None)]).splitlines()[2:] == [
        "| good | 4.0000 | 5.0000 | 4.9000 | 4.5000 | 1.0e-06 |",
        "| near | 4.0000 | 5.0000 | 4.9000 | 4.5000 |  |",
    ]


def test_steps_must_divide_into_checkpoints():
    with pytest.raises(UserError, match="steps: 12 is not allowed; give a multiple of 8"):
        StudyConfig(steps=12)

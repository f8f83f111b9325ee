"""A run may change its layout between two steps: nothing but speed changes."""

import shutil
from pathlib import Path

import pytest

from looplm.cli import to_dict
from looplm.config import RunConfig
from looplm.layout import ParallelConfig
from pretrain.data import check_corpus
from pretrain.train import train
from tests.parallel.launch import launch
from tests.parallel.test_layouts import LRU, MLA
from tests.tiny import run_config, train_rows

OTHERS = {
    "pp2": (2, ParallelConfig(pipeline=2)),
    "tp2_pp2": (4, ParallelConfig(tensor=2, pipeline=2)),
}


def lose_the_last_save(folder: Path) -> None:
    """As if the run had ended after step 3."""
    (folder / "checkpoints/step_00000006/manifest.json").unlink()


def test_a_run_may_change_its_layout(corpus, tmp_path, single_process):
    """Alone, then elsewhere; elsewhere, then alone: as if never interrupted."""

    def config(name: str, layout: ParallelConfig) -> RunConfig:
        saving = {"save_every": 3, "keep": 2}
        data = {"global_batch_size": 4, "micro_batch_size": 1}
        return run_config(corpus, tmp_path / name, model=MLA, gate=LRU, parallel=layout, checkpoint=saving, data=data)

    def train_alone(name: str) -> None:
        train(config(name, ParallelConfig()), check_corpus(config(name, ParallelConfig())), single_process)

    train_alone("alone")
    expected = [row["loss"] for row in train_rows(tmp_path / "alone")]
    jobs: dict[int, list] = {}
    for name, (ranks, layout) in OTHERS.items():
        shutil.copytree(tmp_path / "alone", tmp_path / f"to_{name}")
        lose_the_last_save(tmp_path / f"to_{name}")
        todo = [{"kind": "train", "config": to_dict(config(f"{way}_{name}", layout))} for way in ("to", "from")]
        jobs.setdefault(ranks, []).extend(todo)
    for ranks, todo in jobs.items():
        launch(ranks, todo, tmp_path)
    for name in OTHERS:
        lose_the_last_save(tmp_path / f"from_{name}")
        train_alone(f"from_{name}")
    for way in ("to", "from"):
        for name in OTHERS:
            rows = train_rows(tmp_path / f"{way}_{name}")
            assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
            assert [row["loss"] for row in rows] == pytest.approx(expected, rel=1e-5), f"{way} {name}"

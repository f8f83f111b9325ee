"""Print samples of a synthetic task, to look at before training on it.

python -m data_pipeline.synthetic --task.word_problem.group S3 --seq_length 16 --count 3
python -m data_pipeline.synthetic --task.causal_loops.kinds "[4]" --seq_length 64 --split test

A column is a position: the token that is read, the label (what the model must say there), and the label's level.
Positions without a label have none of the last two.
"""

import shutil
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from data_pipeline.synthetic.registry import open_task
from data_pipeline.synthetic.task import NO_LEVEL, Examples, Split, Task
from looplm.bounds import at_least, check_bounds, positive, require
from looplm.cli import parse_config, run_main
from looplm.config import TaskConfig

MAX_TOKENS = 10_000_000


@dataclass(frozen=True, kw_only=True)
class PrintConfig:
    """Samples to print.

    Args:
        task: the task, as in data.task of a training recipe.
        seq_length: tokens of a sample, as data.seq_length.
        count: number of samples.
        split: train, valid or test.
        seed: seed of the samples.
    """

    task: TaskConfig
    seq_length: int = positive(64, at_most=1_000_000)
    count: int = positive(2, at_most=1000)
    split: Split = "train"
    seed: int = at_least(0, 0)

    def __post_init__(self) -> None:
        check_bounds(self, "")
        most = MAX_TOKENS // self.seq_length
        fix = f"with seq_length={self.seq_length} give at most {most}: samples of {MAX_TOKENS:,} tokens are printed"
        require(self.count <= most, "count", self.count, fix)


def main(argv: list[str]) -> None:
    """``python -m data_pipeline.synthetic --task.NAME.KEY VALUE [--seq_length 64] [--count 2]``"""
    config = parse_config(PrintConfig, argv, prog="python -m data_pipeline.synthetic", description=str(__doc__))
    task = open_task(config.task)
    examples = task.generate(np.random.default_rng(config.seed), config.count, config.seq_length, config.split)
    labeled = float((examples.level_NS != NO_LEVEL).mean())
    print(f"{config.task.name}, {config.split}: {len(task.symbols)} symbols, labels at {labeled:.0%} of the positions")
    for index in range(config.count):
        print(f"\nsample {index}")
        print("\n".join(table(task, Examples(*(x_NS[index] for x_NS in examples)), shutil.get_terminal_size().columns)))


def table(task: Task, sample: Examples, width: int) -> Iterator[str]:
    """Yield the lines of a sample [S]: token, label and level one below the other, in columns of equal width.

    Args:
        task: names the symbols and the level.
        sample: one row of each array of a task's examples.
        width: characters of a line; longer samples are broken into several groups of three lines.
    """
    tokens = [task.symbols[index] for index in sample.ids_NS]
    is_labeled_S = sample.level_NS != NO_LEVEL
    labels = [task.symbols[label] if is_labeled_S[s] else "" for s, label in enumerate(sample.label_NS)]
    levels = [str(level) if is_labeled_S[s] else "" for s, level in enumerate(sample.level_NS)]
    rows = {"token": tokens, "label": labels, task.level_name: levels}
    head = max(map(len, rows))
    cell = max(map(len, (*tokens, *labels, *levels)))
    columns = max(1, (width - head) // (cell + 1))
    for start in range(0, len(tokens), columns):
        if start:
            yield ""
        for name, words in rows.items():
            cells = "".join(f" {word:>{cell}}" for word in words[start : start + columns])
            yield f"{name:<{head}}{cells}".rstrip()


if __name__ == "__main__":
    run_main(main)

"""Pretrain a looped model, or fine-tune its exit gate on a frozen trunk.

    python -m pretrain.train --config configs/quickstart/pretrain.yaml --optim.train_steps 100
    torchrun --nproc-per-node 8 -m pretrain.train --config A.yaml --config B.yaml --output_dir runs/a

A run is one training stage. The configuration says what it minimizes, what it reads and what it starts from.
"""

import sys
from pathlib import Path

from megatron.core.process_groups_config import ProcessGroupCollection

from looplm.cli import parse_config, run_main
from looplm.config import RunConfig
from looplm.megatron import process_groups
from pretrain import launcher, run_lock
from pretrain.batch_schedule import schedule_on
from pretrain.data import Corpus, check_corpus
from pretrain.run import Run
from pretrain.stopping import STOPPED
from pretrain.watchdog import Watchdog


def main(argv: list[str]) -> None:
    """``python -m pretrain.train --config A.yaml [--config B.yaml] [--model.num_loops 4 ...]``"""
    with launcher.recorded():
        config = parse_config(RunConfig, argv, prog="python -m pretrain.train", description=str(__doc__))
        schedule_on(config, process_groups.expected_ranks())  # refuses an impossible layout before ranks connect
        with Watchdog(config.health, Path(config.output_dir)) as watchdog:
            watchdog.start_up("data check")
            corpus = check_corpus(config.data, config.model.vocab_size)
            watchdog.start_up("process groups")
            try:
                with watchdog.guard():  # it asks the process groups which ranks are late
                    groups = process_groups.start(config.seed, config.parallel, watchdog.collective_timeout)
                    watchdog.join(groups)
                    watchdog.start_up("output_dir")
                    with run_lock.hold(Path(config.output_dir), config.health.max_starts):
                        finished = train(config, corpus, groups, watchdog)
            finally:
                process_groups.stop()
        if not finished:
            sys.exit(STOPPED)


def train(config: RunConfig, corpus: Corpus, groups: ProcessGroupCollection, watchdog: Watchdog | None = None) -> bool:
    """Build everything, then loop. Return False if a signal ended the run before it was done; it can be resumed.

    Without ``watchdog``, nothing looks after signals and deadlines.
    """
    run = Run(config, corpus, groups, watchdog or Watchdog(config.health, Path(config.output_dir)))
    return run.begin() and run.loop()


if __name__ == "__main__":
    run_main(main)

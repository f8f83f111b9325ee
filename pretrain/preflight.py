"""Check everything about a training stage that can be known before a long run, on its machines, in a few minutes.

    torchrun --nproc-per-node 8 -m pretrain.preflight --config A.yaml --config B.yaml
    sbatch --nodes=16 pretrain/slurm/preflight.sbatch --config A.yaml --config B.yaml

The configuration and the ranks are those of pretrain.train. Each check prints one line with ok, warn or FAIL and the
figure. The last line is "go", with exit status 0; or the failed checks are listed, with exit status 2. Nothing is
trained, and no file is left behind. With --rehearse, the first rank also executes a step of every rank that differs on
its CPU (python -m tools.rehearse), before the ranks join.
"""

import os

from looplm.cli import parse_config, run_main
from looplm.config import RunConfig
from looplm.failures import UserError
from looplm.files import raise_file_limit
from looplm.megatron import device, process_groups
from pretrain.cluster import findings
from pretrain.cluster.examine import examine
from pretrain.cluster.findings import Finding
from pretrain.cluster.rehearsal import rehearse_stage


def main(argv: list[str]) -> None:
    """``torchrun --nproc-per-node 8 -m pretrain.preflight --config A.yaml [--rehearse] [--parallel.tensor 8 ...]``"""
    rehearses, argv = "--rehearse" in argv, [word for word in argv if word != "--rehearse"]
    config = parse_config(RunConfig, argv, prog="python -m pretrain.preflight", description=str(__doc__))
    ranks, ranks_on_node = (int(os.environ.get(name, "1")) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"))
    _say(findings.layout(config, ranks, ranks_on_node))
    if device.HAS_CUDA:  # without a GPU for each rank, the next lines would end in a traceback
        gpus = findings.enough_gpus(ranks_on_node, device.visible_gpus())
        if gpus.level == "FAIL":
            raise UserError(f"{gpus.subject}: {gpus.text}")
    files = findings.open_files(process_groups.files_needed(ranks, config.parallel), raise_file_limit())
    if files.level == "FAIL":  # in gloo, as the ranks join
        raise UserError(f"{files.subject}: {files.text}")
    _say(files)
    found = []
    if rehearses and os.environ.get("RANK", "0") == "0":
        found.append(rehearse_stage(argv, ranks))
        _say(found[0])
    address = os.environ.get("MASTER_ADDR", "this machine")
    text = f"{ranks} are joining; nothing after this line means that some cannot reach MASTER_ADDR={address}"
    _say(Finding("ok", "ranks", text))
    groups = process_groups.start(config.seed, config.parallel)
    try:
        for finding in examine(config, groups):
            _say(finding)
            found.append(finding)
    finally:
        process_groups.stop()
    failed = [f"{finding.subject}: {finding.text}" for finding in found if finding.level == "FAIL"]
    if failed:
        raise UserError(f"no go: {len(failed)} of {len(found)} checks failed", *failed)
    _say("go")


def _say(line: Finding | str) -> None:
    """Print on rank 0, also before the ranks have met and after they have parted."""
    if os.environ.get("RANK", "0") == "0":
        print(line, flush=True)


if __name__ == "__main__":
    run_main(main)

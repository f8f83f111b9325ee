"""Submit the stages of a recipe to Slurm, each waiting for the one before it.

    python -m pretrain.chain --config configs/ouro-1.4b/chain.yaml --attention mha --dry_run true
    python -m pretrain.chain --config configs/ouro-1.4b/chain.yaml --attention mha --stop stage1b

All stages are checked first: configurations, layouts, data, and the checkpoints that they start from. With --dry_run
true, nothing is submitted. Instead, the submission is printed as a shell script, with each job's command in a comment.
With --rehearse true, every training stage is rehearsed first on this machine's CPU (python -m tools.rehearse --chain).
sbatch's own environment variables (SBATCH_PARTITION, SBATCH_ACCOUNT, SBATCH_TIMELIMIT) apply.
"""

from dataclasses import replace

from looplm.cli import parse_config, run_main
from looplm.failures import UserError
from pretrain.cluster.rehearsal import rehearse
from pretrain.cluster.submit import SubmitConfig, find_data_faults, find_faults, plan, script, submit


def main(argv: list[str]) -> None:
    """``python -m pretrain.chain --config RECIPE.yaml [--attention mha] [--start STAGE] [--dry_run true]``"""
    config = parse_config(SubmitConfig, argv, prog="python -m pretrain.chain", description=str(__doc__))
    jobs, faults = plan(config)
    if not faults:  # the dependents of a stage that failed to parse would fail for the same reason
        for index, job in enumerate(jobs):
            faults += find_faults(job, jobs[:index], awaited=config.after is not None)
        faults += find_data_faults(jobs)
    if config.preflight and jobs and jobs[0].run is not None:
        jobs.insert(0, replace(jobs[0], name="preflight", launcher="preflight.sbatch"))
    if config.dry_run:
        print("\n".join(script(config, jobs)), flush=True)
    if config.rehearse and not rehearse(["--chain", *argv]):
        faults.append("rehearse: a stage failed in its rehearsal, see above; nothing was submitted")
    if faults:
        raise UserError(*faults)
    if not config.dry_run:
        submit(config, jobs)


if __name__ == "__main__":
    run_main(main)

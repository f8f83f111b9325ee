# shellcheck shell=bash disable=SC2034,SC2154  # the launchers give `launcher`, and read what is set here
# What the launchers of this folder share; they source it. Nothing here is Slurm's to run by itself.
#
# How a training job ends, and what comes next:
#
#   in time            Slurm sends USR1 to the batch script alone, as long before the time limit as --signal says. The
#                      script passes it on as SIGTERM through srun, which signals torchrun alone, which signals the
#                      trainers: each gets it once. They finish the step, save and exit with 143, and the job is requeued.
#   scancel, preempted Slurm itself sends SIGTERM, to torchrun and to this script. The script only waits: passed on, the
#                      signal would arrive twice, and a second one means "at once, without saving". Not requeued here;
#                      after a preemption Slurm requeues a job that has --requeue.
#   done or failed     the job ends with the run's status.

set -euo pipefail

# torchrun may wait this long for the trainers before it kills them. Less than the lead in every launcher's --signal.
shutdown_seconds=540

die() {
    echo "error: $*" >&2
    exit 2
}

# Every --config of the arguments must be there: a job that waited a day for its nodes should not end on a typing error.
check_configs() {
    local argument path expects_path="" found=""
    for argument; do
        path=""
        if [[ $expects_path ]]; then
            path=$argument
        elif [[ $argument == --config=* ]]; then
            path=${argument#--config=}
        fi
        expects_path=""
        [[ $argument == --config ]] && expects_path=1
        if [[ $path ]]; then
            [[ -r $path && ! -d $path ]] || die "--config: $path cannot be read; give the path of a YAML file"
            found=1
        fi
    done
    [[ ! $expects_path ]] || die "--config: no path after it; give the path of a YAML file"
    [[ $found ]] || die "--config: required and not given; sbatch $launcher --config FILE.yaml"
}

# An option of the launcher's own header: header nodes → 2. A dry run outside of Slurm takes it for Slurm's answer.
header() {
    sed -n "s/^#SBATCH --$1=\([^ ]*\).*/\1/p" "$launcher"
}

require_slurm() {
    [[ ${SLURM_JOB_ID:-} || ${DRY_RUN:-} ]] || die "SLURM_JOB_ID: not inside of a Slurm job; start with sbatch $launcher, or look first with DRY_RUN=1 bash $launcher"
}

# Slurm's answers: job, nodes, gpus (on each node), cpus (on each node, may be empty), master.
read_slurm() {
    require_slurm
    if [[ -z ${SLURM_JOB_ID:-} ]]; then
        job=0 nodes=$(header nodes) gpus=$(header gpus-per-node) cpus="" master=first-node
        return
    fi
    job=$SLURM_JOB_ID nodes=${SLURM_NNODES:-1}
    gpus=${SLURM_GPUS_ON_NODE:-${SLURM_GPUS_PER_NODE:-}}
    gpus=${gpus##*:} # --gpus-per-node=h100:8 is written h100:8 there
    [[ $gpus =~ ^[1-9][0-9]*$ ]] || die "SLURM_GPUS_ON_NODE: '$gpus' is not a number of GPUs; give sbatch --gpus-per-node=N"
    # The whole node, unless asked for less: srun does not take it over from sbatch, and would start torchrun on one core.
    cpus=${SLURM_CPUS_PER_TASK:-${SLURM_CPUS_ON_NODE:-}}
    master=$(scontrol show hostnames "${SLURM_JOB_NODELIST:-}") || die "SLURM_JOB_NODELIST: scontrol cannot expand '${SLURM_JOB_NODELIST:-}'"
    master=${master%%$'\n'*}
}

# The same port on every node without asking, another one for another job, below those that the system hands out.
port_of() {
    echo $((10000 + $1 % 20000))
}

# The command as one would type it.
show() {
    local word line=""
    for word; do
        [[ $word =~ ^[A-Za-z0-9_./:=,@%+-]+$ ]] || word=${word@Q}
        line+="${line:+ }$word"
    done
    echo "$line"
}

# Without an activated environment, take the one that `make` builds.
find_environment() {
    command -v torchrun >/dev/null && return
    [[ -x .venv/bin/torchrun ]] || die "torchrun: neither on PATH nor in .venv; activate your environment, or run make install"
    PATH="$PWD/.venv/bin:$PATH"
}

# launch COMMAND...: print it, run it, hand signals on, and requeue the job where it was only interrupted.
launch() {
    show "$@"
    [[ ! ${DRY_RUN:-} ]] || exit 0
    find_environment
    local child status
    warned="" cancelled="" cut_short=""
    trap 'warned=1 cut_short=1; kill -TERM "$child" 2>/dev/null || true' USR1
    trap 'cancelled=1 cut_short=1' TERM
    "$@" &
    child=$!
    # A signal ends "wait" with a status of its own; asked again, it gives the command's.
    while :; do
        cut_short="" status=0
        wait "$child" || status=$?
        [[ $cut_short ]] || break
    done
    # torchrun hides its trainers' 143 behind a 1: after a warning, an error means that the run was interrupted.
    if [[ ! $cancelled && ($status == 143 || ($warned && $status != 0)) ]]; then
        echo "interrupted (status $status): requeueing job $job"
        scontrol requeue "$job"
    fi
    exit "$status"
}

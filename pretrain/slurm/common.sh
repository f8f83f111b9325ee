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

# Slurm's answers: job, nodes, gpus (on each node), cpus (on each node, may be empty), master. Without Slurm, a dry run takes
# those of the header, or of a size that it is asked about.
read_slurm() {
    require_slurm
    if [[ -z ${SLURM_JOB_ID:-} ]]; then
        job=0 cpus="" master=first-node
        nodes=${SLURM_NNODES:-$(header nodes)} gpus=${SLURM_GPUS_PER_NODE:-$(header gpus-per-node)}
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

# Where the command finds its packages. CONTAINER=IMAGE names what pretrain/container makes: a .sif is run by Apptainer,
# anything else is srun's to open (pyxis). Both see this folder at its own path, and what CONTAINER_MOUNTS names besides
# (/data:/data,...). Sets image_options, which belong to srun, and image_program, which stands before the command.
read_container() {
    image_options=() image_program=()
    [[ ${CONTAINER:-} ]] || return 0
    local mounts=$PWD:$PWD${CONTAINER_MOUNTS:+,$CONTAINER_MOUNTS}
    if [[ $CONTAINER == *.sif ]]; then
        image_program=(apptainer exec --nv --bind "$mounts" --pwd "$PWD" "$CONTAINER")
    else
        image_options=("--container-image=$CONTAINER" "--container-mounts=$mounts" "--container-workdir=$PWD")
    fi
}

# The environment of the trainers. What you have set yourself wins.
set_environment() {
    # A failure's cause and NCCL's version, and nothing while all is well. INFO shows which network it found.
    export NCCL_DEBUG=${NCCL_DEBUG:-WARN}
    # A collective that takes longer than looplm.megatron.process_groups.TIMEOUT, or fails, ends its process: that is torch's default
    # (TORCH_NCCL_ASYNC_ERROR_HANDLING=3), so it is not set here. What a hang was about is written down first: the last
    # collectives of each rank go to TORCH_NCCL_DEBUG_INFO_TEMP_FILE + rank, /tmp/nccl_trace_rank_0 unless set.
    export TORCH_NCCL_DUMP_ON_TIMEOUT=${TORCH_NCCL_DUMP_ON_TIMEOUT:-1}
    export TORCH_NCCL_TRACE_BUFFER_SIZE=${TORCH_NCCL_TRACE_BUFFER_SIZE:-2000}
    # Tensor parallelism overlaps its messages with the matrix products. Megatron-core starts the message first and relies on
    # a single queue to keep that order; with more, the product may take the whole GPU before. It warns when this is not 1.
    export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1}
    # torchrun's own choice for several ranks on a node, made here so that it does not warn about it.
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
    # Lines reach the log when they are written, and a process that is aborted says where it was.
    export PYTHONUNBUFFERED=${PYTHONUNBUFFERED:-1} PYTHONFAULTHANDLER=${PYTHONFAULTHANDLER:-1}
}

# Without a container or an activated environment, take the one that `make` builds.
find_environment() {
    [[ ! ${CONTAINER:-} ]] || return 0
    command -v torchrun >/dev/null && return
    [[ -x .venv/bin/torchrun ]] || die "torchrun: neither on PATH nor in .venv; activate your environment, or run make install"
    PATH="$PWD/.venv/bin:$PATH"
}

# torchrun_everywhere MODULE ARGUMENT...: one torchrun on each node. Only there is the node's number known, so a shell on the
# node puts it in. A node's ranks follow one another, in the order of the nodes, so that tensor-parallel ranks share a node.
# The node that ends first gives the others a minute: --kill-on-bad-exit would cut off what they still write.
torchrun_everywhere() {
    read_container
    # shellcheck disable=SC2016  # SLURM_NODEID is for the shell on the node
    launch srun --nodes="$nodes" --ntasks="$nodes" --ntasks-per-node=1 ${cpus:+"--cpus-per-task=$cpus"} \
        --kill-on-bad-exit=0 --wait=60 "${image_options[@]}" "${image_program[@]}" \
        bash -c 'exec torchrun --node-rank="$SLURM_NODEID" "$@"' torchrun \
        --nnodes="$nodes" --nproc-per-node="$gpus" --master-addr="$master" --master-port="$(port_of "$job")" \
        --rdzv-id="$job" --shutdown-timeout="$shutdown_seconds" -m "$@"
}

# launch COMMAND...: print it, run it, hand signals on, and requeue the job where it was only interrupted.
launch() {
    show "$@"
    [[ ! ${DRY_RUN:-} ]] || exit 0
    find_environment
    set_environment
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

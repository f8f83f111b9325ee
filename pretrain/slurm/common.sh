# shellcheck shell=bash disable=SC2034,SC2154  # the launchers set `launcher`, and read variables that are set here
# Functions for the launchers in this folder, which source this file. Slurm never runs it directly.
#
# How a training job can end:
#
#   time limit         As long before the limit as --signal says, Slurm sends USR1 to the batch script only. The script
#                      passes it on to srun, srun to torchrun, torchrun to the trainers. They finish the step, save, and
#                      exit with 143; the job is requeued. SIGTERM would not do: srun answers it by killing its tasks.
#   scancel, preempted Slurm itself sends SIGTERM to torchrun, to this script and to srun, which is told to ignore it
#                      where it knows how (Slurm 26.05); an older one kills the trainers before they have saved. The
#                      script only waits: trainers that get the signal again later would end without saving. The job is
#                      not requeued here; after a preemption, Slurm requeues a job that has --requeue.
#   hang               The trainers' watchdog ends them with 4; the job is requeued.
#   done or failed     The job ends with the run's status (looplm/failures.py). A run that was started several times
#                      without a new checkpoint refuses to start, with 2: no crash is repeated forever.

set -euo pipefail

# torchrun waits this long for the trainers before it kills them. Longer than health.stop_timeout, and shorter than the
# lead in every launcher's --signal. It is a variable because some releases of torch 2.10 refuse --shutdown-timeout.
shutdown_timeout=540
torchrun_options=("--signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1") # its own list lacks USR1

die() {
    echo "error: $*" >&2
    exit 2
}

# Check that every --config file exists: a job that waited a day for its nodes should not fail because of a typo.
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
            path=${path/#"~/"/"$HOME/"}
            [[ -r $path && ! -d $path ]] || die "--config: $path cannot be read; give the path of a YAML file"
            found=1
        fi
    done
    [[ ! $expects_path ]] || die "--config: no path after it; give the path of a YAML file"
    [[ $found ]] || die "--config: required and not given; sbatch $launcher --config FILE.yaml"
}

# Print an option from the launcher's header: `header nodes` prints 2. A dry run outside Slurm uses these values.
header() {
    sed -n "s/^#SBATCH --$1=\([^ ]*\).*/\1/p" "$launcher"
}

require_slurm() {
    [[ ${SLURM_JOB_ID:-} || ${DRY_RUN:-} ]] ||
        die "SLURM_JOB_ID: not inside a Slurm job; start with sbatch $launcher, or print with DRY_RUN=1 bash $launcher"
}

# Set job, nodes, gpus (per node), cpus (per node, may be empty) and master from Slurm. Outside Slurm, a dry run takes
# them from the header, or from SLURM_NNODES and SLURM_GPUS_PER_NODE.
read_slurm() {
    require_slurm
    if [[ -z ${SLURM_JOB_ID:-} ]]; then
        job=0 cpus="" master=first-node
        nodes=${SLURM_NNODES:-$(header nodes)} gpus=${SLURM_GPUS_PER_NODE:-$(header gpus-per-node)}
        return
    fi
    job=$SLURM_JOB_ID nodes=${SLURM_NNODES:-1}
    gpus=${SLURM_GPUS_ON_NODE:-${SLURM_GPUS_PER_NODE:-}}
    gpus=${gpus##*:} # with --gpus-per-node=h100:8 the value is h100:8
    [[ $gpus =~ ^[1-9][0-9]*$ ]] ||
        die "SLURM_GPUS_ON_NODE: '$gpus' is not a number of GPUs; give sbatch --gpus-per-node=N"
    # All cores, unless fewer were requested. srun does not inherit them from sbatch: torchrun would get only one.
    cpus=${SLURM_CPUS_PER_TASK:-${SLURM_CPUS_ON_NODE:-}}
    master=$(scontrol show hostnames "${SLURM_JOB_NODELIST:-}") ||
        die "SLURM_JOB_NODELIST: scontrol cannot expand '${SLURM_JOB_NODELIST:-}'"
    master=${master%%$'\n'*}
}

# Print a port that is the same on every node, differs between jobs, and is below the ports that the system hands out.
port_of() {
    echo $((10000 + $1 % 20000))
}

# Print the command as one would type it.
show() {
    local word line=""
    for word; do
        [[ $word =~ ^[A-Za-z0-9_./:=,@%+-]+$ ]] || word=${word@Q}
        line+="${line:+ }$word"
    done
    echo "$line"
}

# Set image_options (for srun) and image_program (in front of the command) for CONTAINER=IMAGE, an image built from
# pretrain/container. Apptainer runs a .sif; srun opens anything else (pyxis). Both mount this folder at its own path,
# and the folders in CONTAINER_MOUNTS (/data:/data,...).
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

# Set srun_options: the trainers save on SIGTERM, which srun would make a SIGKILL of.
read_srun() {
    srun_options=()
    # Not into grep -q, which may end before srun has written all: with pipefail, that looks like "not found".
    [[ $(srun --help 2>/dev/null || true) != *--ignore-signals* ]] || srun_options=("--ignore-signals=SIGTERM")
}

# Set the trainers' environment. Variables that are already set win.
set_environment() {
    # WARN prints NCCL's version and the cause of a failure. INFO also shows which network it found.
    export NCCL_DEBUG=${NCCL_DEBUG:-WARN}
    # A collective that fails, or takes longer than looplm.megatron.process_groups.TIMEOUT, ends its process. That is
    # torch's default (TORCH_NCCL_ASYNC_ERROR_HANDLING=3), so it is not set here. Before that, each rank writes its last
    # collectives to TORCH_NCCL_DEBUG_INFO_TEMP_FILE + rank (default: /tmp/nccl_trace_rank_0), to explain a hang.
    export TORCH_NCCL_DUMP_ON_TIMEOUT=${TORCH_NCCL_DUMP_ON_TIMEOUT:-1}
    export TORCH_NCCL_TRACE_BUFFER_SIZE=${TORCH_NCCL_TRACE_BUFFER_SIZE:-2000}
    export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-$shutdown_timeout}
    # Tensor parallelism overlaps its messages with matrix products. Megatron-core starts the message first and relies
    # on a single queue to keep that order; with more, the product may occupy the GPU first. It warns if this is not 1.
    export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1}
    # torchrun would choose this too for several ranks on a node, with a warning.
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
    # Write log lines at once, and print a traceback if a process is aborted.
    export PYTHONUNBUFFERED=${PYTHONUNBUFFERED:-1} PYTHONFAULTHANDLER=${PYTHONFAULTHANDLER:-1}
}

# Without a container or an activated environment, use the one that `make` builds.
find_environment() {
    [[ ! ${CONTAINER:-} ]] || return 0
    command -v torchrun >/dev/null && return
    [[ -x .venv/bin/torchrun ]] ||
        die "torchrun: neither on PATH nor in .venv; activate your environment, or run make install"
    PATH="$PWD/.venv/bin:$PATH"
}

# torchrun_everywhere MODULE ARGUMENT...: start one torchrun on each node. The node's number is known only on the node,
# so a shell there inserts it. The ranks of a node are consecutive, so that tensor-parallel ranks share a node. When one
# node has ended, the others get a minute: --kill-on-bad-exit would cut off what they still write.
torchrun_everywhere() {
    read_container
    read_srun
    # shellcheck disable=SC2016  # the shell on the node expands SLURM_NODEID
    launch srun --nodes="$nodes" --ntasks="$nodes" --ntasks-per-node=1 ${cpus:+"--cpus-per-task=$cpus"} \
        --kill-on-bad-exit=0 --wait=60 "${srun_options[@]}" "${image_options[@]}" "${image_program[@]}" \
        bash -c 'exec torchrun --node-rank="$SLURM_NODEID" "$@"' torchrun \
        --nnodes="$nodes" --nproc-per-node="$gpus" --master-addr="$master" --master-port="$(port_of "$job")" \
        --rdzv-id="$job" "${torchrun_options[@]}" -m "$@"
}

# launch COMMAND...: print the command, run it, pass signals on, and requeue the job if it was only interrupted.
launch() {
    show "$@"
    [[ ! ${DRY_RUN:-} ]] || exit 0
    find_environment
    set_environment
    local child status
    # torchrun ends with 1 whatever its trainers end with: the first one that ends writes its status here.
    export LOOPLM_STATUS_FILE=$PWD/.looplm-job-${SLURM_JOB_ID:-0}.status
    rm -f "$LOOPLM_STATUS_FILE"
    warned="" cancelled="" cut_short=""
    trap 'warned=1 cut_short=1; kill -USR1 "$child" 2>/dev/null || true' USR1
    trap 'cancelled=1 cut_short=1' TERM
    "$@" &
    child=$!
    # A signal ends "wait" with a status of its own; the next "wait" returns the command's status.
    while :; do
        cut_short="" status=0
        wait "$child" || status=$?
        [[ $cut_short ]] || break
    done
    # Without the file, torchrun itself was killed. After Slurm's warning that is an interruption, else a failure.
    local recorded=${warned:+143}
    [[ ! -s $LOOPLM_STATUS_FILE ]] || recorded=$(<"$LOOPLM_STATUS_FILE")
    rm -f "$LOOPLM_STATUS_FILE"
    [[ $status == 0 ]] || status=${recorded:-$status}
    if [[ ! $cancelled && ($recorded == 143 || $recorded == 4) && $status != 0 ]]; then
        echo "interrupted (status $status): requeueing job $SLURM_JOB_ID"
        scontrol requeue "$SLURM_JOB_ID"
    fi
    exit "$status"
}

# shellcheck shell=bash
# What the job scripts share: the site's settings, how ranks are started, and when a job goes back into the queue.

# The folder of the scripts: slurm, or another (`dit-ds init`, an installed package) for jobs in folders without one.
scripts=$(dirname "${BASH_SOURCE[0]}")
DIT_DS_SLURM=$(cd "$scripts" && pwd)
export DIT_DS_SLURM
# A file edited on Windows ends its lines with a carriage return, which the shell would take into each value.
cluster_env=${CLUSTER_ENV:-$scripts/cluster.env}
[ -r "$cluster_env" ] || { echo "cannot read $cluster_env: set CLUSTER_ENV to the file with the site's settings" >&2 && exit 2; }
# shellcheck source=slurm/cluster.env
if grep -q $'\r' "$cluster_env"; then
    echo "$cluster_env has Windows line ends, which are passed over here: sed -i 's/\\r\$//' $cluster_env" >&2
    source <(tr -d '\r' <"$cluster_env") || exit 2
else
    source "$cluster_env" || exit 2
fi
set -uo pipefail # not before: modules' and venvs' scripts may not bear it; no -e: each step's status is looked at

# In an array, each task has arguments of its own: of `--task=0 A B --task=1 C ...` number 1's are C ...
if [ -n "${SLURM_ARRAY_TASK_ID:-}" ] && [[ ${1:-} == --task=* ]]; then
    of='' own=()
    for word; do
        if [[ $word == --task=* ]]; then of=${word#*=}; elif [ "$of" = "$SLURM_ARRAY_TASK_ID" ]; then own+=("$word"); fi
    done
    [ ${#own[@]} -gt 0 ] || { echo "no --task=$SLURM_ARRAY_TASK_ID, which --array asks for" >&2 && exit 2; }
    set -- "${own[@]}" # also of the script that reads this file
fi
# what scontrol knows this job by: an array's number may mean all of its tasks
this_job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
this_job=${this_job:-$SLURM_JOB_ID}

# The steps are signalled before the time limit, and sometimes this shell too: it must outlive them to requeue the job.
trap : USR2 TERM

# gpu_count TEXT: how many GPUs SLURM means by it, in all of its forms: 4, a100:4, gpu:a100:4(S:0-1), h100:2,v100:2, a100.
# Of a list with other things in it (gpu:4,nvme:1) the GPUs; nothing where it names none.
gpu_count() {
    local item count=0 only=
    local -a items
    IFS=, read -ra items <<<"$(sed 's/([^)]*)//g; s/[[:space:]]//g; s,gres[/:],,g; s/=/:/g' <<<"$1")"
    for item in "${items[@]}"; do [[ $item != gpu && $item != gpu:* ]] || only=1; done
    for item in "${items[@]}"; do
        [[ -z $only || $item == gpu || $item == gpu:* ]] || continue
        case ${item##*:} in
        '') ;;
        *[!0-9]*) count=$((count + 1)) ;; # a type alone is one of it
        *) count=$((count + 10#${item##*:})) ;;
        esac
    done
    [ "$count" = 0 ] || echo "$count"
}

# file_name TEXT: the text as a part of a file's name, also in srun's --output, where % and \\ have a meaning
file_name() { printf '%s' "${1//[^A-Za-z0-9._+=@-]/_}"; }

restarts=${SLURM_RESTART_COUNT:-0}
[ -n "$TASKS_PER_NODE" ] || TASKS_PER_NODE=$(gpu_count "${SLURM_GPUS_PER_NODE:-${SLURM_GPUS_ON_NODE:-}}")
[ -n "$TASKS_PER_NODE" ] || TASKS_PER_NODE=1 # it asked for none
if ! [[ $TASKS_PER_NODE =~ ^[1-9][0-9]*$ ]]; then
    echo "TASKS_PER_NODE=$TASKS_PER_NODE in $cluster_env is not a number from 1 on: correct it, or leave it empty" >&2
    exit 2
fi
# srun no longer takes the cores of a task from sbatch: unsaid, a task gets one core, and its loaders share it
cpus_per_task=$((SLURM_CPUS_ON_NODE / TASKS_PER_NODE))
[ "$cpus_per_task" -gt 0 ] || cpus_per_task=1
unset SLURM_CPUS_PER_GPU SLURM_CPUS_PER_TASK SLURM_TRES_PER_TASK # srun refuses them beside --cpus-per-task

# shellcheck disable=SC2034 # of spares.sh
site_address=${MASTER_ADDR:-}
MASTER_ADDR=${MASTER_ADDR:-$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)}
MASTER_PORT=$((20000 + SLURM_JOB_ID % 12000)) # a port a job, below the ones that Linux gives out itself
export MASTER_ADDR MASTER_PORT

if [ -n "${CACHE_DIR:-}" ]; then # what is compiled stays on each node for the next start; a site's own variables win
    export PYTHONPYCACHEPREFIX=${PYTHONPYCACHEPREFIX:-$CACHE_DIR/python} TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-$CACHE_DIR/triton}
    export TORCH_EXTENSIONS_DIR=${TORCH_EXTENSIONS_DIR:-$CACHE_DIR/torch_extensions}
    export TORCHINDUCTOR_CACHE_DIR=${TORCHINDUCTOR_CACHE_DIR:-$CACHE_DIR/inductor}
fi

step_nodes=$SLURM_JOB_NUM_NODES step_on=() # of each step: how many nodes, and srun's options that say which (spares.sh)
dit_ds=("$PYTHON" -m dit_ds.cli)
rank_logs=$LOG_DIR/$(file_name "$SLURM_JOB_NAME")-$SLURM_JOB_ID
mkdir -p "$rank_logs"
export DIT_DS_JOB_FOLDER=$PWD/$rank_logs
[[ $rank_logs != /* ]] || DIT_DS_JOB_FOLDER=$rank_logs
[ ! -f "$LOG_DIR/$SLURM_JOB_ID.log" ] || ln -sfn "$SLURM_JOB_ID.log" "$rank_logs.log"

say() { echo "$(date '+%F %T') $SLURM_JOB_NAME: $*"; }
say "job $SLURM_JOB_ID, restart $restarts, $SLURM_JOB_NUM_NODES x $TASKS_PER_NODE tasks of $cpus_per_task cores," \
    "first node $MASTER_ADDR"

# on_ranks [srun's options] -- COMMAND: one task a GPU; when one fails, none waits for it
on_ranks() {
    local said=$rank_logs/srun.log status line
    local options=(--nodes="$step_nodes" "${step_on[@]}" --ntasks-per-node="$TASKS_PER_NODE" --cpus-per-task="$cpus_per_task"
        --kill-on-bad-exit=1 --wait=60)
    [ -z "$CPU_BIND" ] || options+=(--cpu-bind="$CPU_BIND")
    while [ "$1" != -- ]; do options+=("$1") && shift; done
    shift
    : >"$said"
    { # what srun itself says goes to the job's log, and with the time to a file
        srun "${SRUN_OPTIONS[@]}" "${options[@]}" "${CONTAINER[@]}" "$@" 2>&1 >&3 3>&- | while IFS= read -r line; do
            printf '%s\n' "$line" >&2
            printf '%(%s)T %s\n' -1 "$line" >>"$said"
        done
        status=${PIPESTATUS[0]}
    } 3>&1
    if [ "$status" -gt 128 ]; then status=$(own_status "$status" "$said"); fi
    return "$status"
}

# own_status STATUS SAID: when a rank fails, SLURM ends the others, with TERM and after KillWait with KILL, and srun's
# status is that signal. This is what the rank that failed ended with. A rank that died of a signal by itself takes its
# peers down with status 1 at once, so such a 1 counts for nothing.
own_status() {
    local kill_wait
    kill_wait=$(scontrol show config | awk '$1 == "KillWait" { print $3 }')
    awk -v status="$1" -v kill_wait="${kill_wait:-30}" '
        !/^[0-9]+ srun: error: [^ ]+: tasks? [0-9,-]+: / || /: Terminated/ { next }
        /: Exited with exit code/ { code[$NF] = 1; if (!first) first = $1; next }
        !first || $1 - first < kill_wait - 1 { died = 1 }
        END { print 2 in code ? 2 : 75 in code ? 75 : 76 in code ? 76 : 1 in code && !died ? 1 : status }' "$2"
}

# logged NAME COMMAND: on_ranks with one log a rank, kept across requeues; rank 0's lines appear in the job's log too
logged() {
    local log follow status started said of
    log=$rank_logs/$(file_name "$1")
    shift
    touch "$log.rank0.log"
    started=$(date +%s) said=$(stat -c %s "$log.rank0.log")
    tail -n 0 -F "$log.rank0.log" 2>/dev/null &
    follow=$!
    on_ranks --output="$log.rank%t.log" --open-mode=append -- "$@"
    status=$?
    sleep 1 # for tail to reach the end
    kill "$follow" 2>/dev/null
    wait "$follow" 2>/dev/null
    if [ "$status" -ne 0 ] && ! tail -c "+$((said + 1))" "$log.rank0.log" | grep -q '^dit-ds.*error: '; then
        # SLURM may have ended rank 0 before it could say why another failed
        find "$rank_logs" -name "${log##*/}.rank*.log" -newermt "@$started" | while IFS= read -r of; do
            grep '^dit-ds.*error: ' "$of" | tail -n 1
        done | head -n 3
    fi
    return "$status"
}

# on_each_node COMMAND: one task a node
on_each_node() { on_ranks --ntasks-per-node=1 -- "$@"; }

# option NAME ARGUMENTS: the value of --NAME among them
option() {
    local name=--$1
    shift
    while [ $# -gt 0 ]; do
        case $1 in
        "$name") echo "${2:-}" && return ;;
        "$name"=*) echo "${1#*=}" && return ;;
        esac
        shift
    done
}

# doctor [ARGUMENTS OF dit-ds train]: every rank checks its surroundings, the configuration and that it reaches the others
doctor() {
    [ "$DOCTOR" = 1 ] || return 0
    on_ranks -- "${dit_ds[@]}" doctor "$@"
}

nodes_answer() { # whether every node that steps run on still runs a task
    [ -z "${node_lost:-}" ] || return 1 # spares.sh has asked, and srun waits long for a node that the job has lost
    timeout 90 srun --nodes="$step_nodes" "${step_on[@]}" --ntasks-per-node=1 --overlap --kill-on-bad-exit=1 true
}

job_is_running() { [[ $(scontrol show job "$this_job") == *JobState=RUNNING* ]]; }

# starts_again STATUS: whether a step that ended so is started again in this job: a rank died of a signal, hung (76) or was
# lost with its node, and nodes enough are there (spares.sh). What was interrupted, or is being cancelled, is not.
started_again=0
starts_again() {
    case $1 in 0 | 2 | 75) return 1 ;; esac
    [ "$started_again" -lt "${RESTARTS:-0}" ] || return 1
    job_is_running && nodes_for_another_start "$1" || return 1
    started_again=$((started_again + 1))
    MASTER_PORT=$((MASTER_PORT + 1)) # the former one may still be taken for a while
    say "ended with status $1: started again in this job ($started_again of $RESTARTS)"
}

# wants_requeue STATUS: whether a step that ended so is to be tried again: it was interrupted, or its node failed.
# 1 and 2 are the run's own errors, except that ranks whose peer is lost with its node end with 1, too.
wants_requeue() {
    case $1 in
    0 | 2) return 1 ;;
    75 | 76) return 0 ;; # a checkpoint was saved on request; a rank hung
    *) [ "$1" -gt 128 ] || ! nodes_answer ;;
    esac
}

# finish STATUS: end the job with it, or put the job back into the queue
finish() {
    local state
    if ! wants_requeue "$1"; then
        ended_for_good "$1"
        say "ended with status $1"
        exit "$1"
    fi
    state=$(scontrol show job "$this_job")
    if [[ $state == *JobState=CANCELLED* ]]; then ended_for_good cancelled; fi
    if [ -n "$in_chain" ]; then
        if [ -n "$next_job" ]; then
            say "ended with status $1: job $next_job comes next"
        else
            say "ended with status $1, and was the last of CHAIN=$CHAIN: submit the same command to go on"
        fi
        exit "$1"
    fi
    if [ "$restarts" -ge "$MAX_REQUEUES" ]; then
        say "ended with status $1 and was requeued $restarts times (MAX_REQUEUES=$MAX_REQUEUES): not again;" \
            "submit the same command to go on"
        exit "$1"
    fi
    # scancel meant to end the job, and after a node's failure SLURM requeues it itself; at the time limit it does not
    if [[ $state != *JobState=RUNNING* && $state != *Reason=TimeLimit* ]]; then
        say "ended with status $1 as SLURM was ending the job (scancel, or a failed node): not requeued from here"
        exit "$1"
    fi
    say "ended with status $1: requeued ($((restarts + 1)) of $MAX_REQUEUES)"
    scontrol requeue "$this_job"
    exit "$1" # reached if SLURM lets this shell live that long; a job that is being requeued has no status
}

# shellcheck source=slurm/chain.sh
source "$scripts/chain.sh"

# SLURM itself requeues for failed nodes and preemptions; the cap holds for those, too
if [ "$restarts" -gt "$MAX_REQUEUES" ]; then
    say "was requeued $restarts times (MAX_REQUEUES=$MAX_REQUEUES): not again; submit the same command to go on"
    exit 1
fi

# shellcheck shell=bash disable=SC2154 # common.sh reads this file
# Chained jobs, for clusters that don't requeue. With CHAIN=5, each job submits the next one, five in all after the first.
# It waits for this job's end, whatever that is, and goes on where the run was interrupted.

CHAIN=${CHAIN:-0}
if ! [[ $CHAIN =~ ^[0-9]+$ ]]; then
    echo "CHAIN=$CHAIN in $cluster_env is not a number from 0 on: correct it, or leave it empty" >&2
    exit 2
fi
# a job array's tasks have dependencies of their own
[ "$CHAIN" = 0 ] || [ -z "${SLURM_ARRAY_TASK_ID:-}" ] || { say "CHAIN=$CHAIN is for single jobs: not in an array" && CHAIN=0; }

# ended_for_good HOW: note for the next job that nothing is left to do: an exit status that is not tried again, or cancelled
ended_for_good() { echo "$1" >"$rank_logs/ended"; }

# how_ended JOB: what it noted so, or that SLURM knows it as cancelled; nothing where the run was interrupted
how_ended() {
    local state
    cat "$LOG_DIR/$(file_name "$SLURM_JOB_NAME")-$1/ended" 2>/dev/null && return
    state=$(scontrol show job -o "$1" 2>/dev/null | sed -n 's/.* JobState=\([A-Z_]*\).*/\1/p')
    [ -n "$state" ] || state=$(sacct -X -n -P -o State -j "$1" 2>/dev/null | head -n 1) # forgotten some minutes after its end
    [[ $state != CANCELLED* ]] || echo cancelled
}

in_chain='' next_job=''
# chain ARGUMENTS: end this job where the one before it says so; else submit the next with the same arguments
chain() {
    local how left=${CHAIN_LEFT:-$CHAIN}
    [ "$CHAIN" -gt 0 ] || return 0
    in_chain=1
    if [ -n "${CHAINED_AFTER:-}" ]; then
        how=$(how_ended "$CHAINED_AFTER")
        case $how in
        '') say "job $CHAINED_AFTER was interrupted: this one goes on" ;;
        0) say "job $CHAINED_AFTER finished the run: the chain ends" && exit 0 ;;
        cancelled) say "job $CHAINED_AFTER was cancelled: the chain ends" && exit 1 ;;
        *) say "job $CHAINED_AFTER ended with status $how, which is not tried again: the chain ends" && exit "$how" ;;
        esac
    fi
    scontrol update "jobid=$this_job" Requeue=0 # the next job goes on, also where a node fails
    next_job=$(cat "$rank_logs/next" 2>/dev/null)
    [ -n "$next_job" ] || [ "$left" -le 0 ] || next_job=$(submit_next $((left - 1)) "$@") || next_job=
    [ -z "$next_job" ] || say "job $next_job goes on after this one, if there is need"
}

# submit_next LEFT ARGUMENTS: submit a job like this one, which runs after it; print its number
submit_next() {
    local left=$1 name job drop=() options=(--job-name="$SLURM_JOB_NAME" --nodes="$SLURM_JOB_NUM_NODES")
    shift
    [ -z "${SLURM_GPUS_PER_NODE:-}" ] || options+=(--gpus-per-node="$SLURM_GPUS_PER_NODE")
    while IFS='=' read -r name job; do # what sbatch's command line may have said; the rest comes from cluster.env again
        case $job in '' | '(null)' | UNLIMITED) continue ;; esac
        case $name in
        Partition) options+=(--partition="$job") ;;
        Account) options+=(--account="$job") ;;
        QOS) options+=(--qos="$job") ;;
        TimeLimit) options+=(--time="$job") ;;
        Features) options+=(--constraint="$job") ;;
        Reservation) options+=(--reservation="$job") ;;
        ExcNodeList) options+=(--exclude="$job") ;;
        esac
    done < <(scontrol show job -o "$this_job" | tr ' ' '\n')
    for name in $(compgen -e SLURM_); do # this job's own, which the next would take for its options
        [[ $name == SLURM_CONF* ]] || drop+=(-u "$name")
    done
    job=$(env "${drop[@]}" sbatch --parsable --dependency="afterany:$SLURM_JOB_ID" \
        --export="ALL,CHAINED_AFTER=$SLURM_JOB_ID,CHAIN_LEFT=$left" "${options[@]}" "$scripts/train.sbatch" "$@") || return
    echo "${job%%;*}" | tee "$rank_logs/next"
}

# shellcheck shell=bash disable=SC2034,SC2154 # shares common.sh's variables
# On which of the job's nodes a training runs: SPARES of them wait, and take the place of those that fail. Read by
# train.sbatch after common.sh.

spares=${SPARES:-0} elastic=${ELASTIC:-0} fails_within=${FAILS_WITHIN_MINUTES:-30}
bad_nodes=$rank_logs/bad_nodes # of this job, also after a requeue: a line a node, its name first
failures=$rank_logs/failures   # "seconds node", one for each start that a rank's end by a signal, or a hang, ended
for setting in SPARES="$spares" ELASTIC="$elastic" FAILS_WITHIN_MINUTES="$fails_within"; do
    [[ $setting =~ =[0-9]+$ ]] && continue
    echo "$setting in $cluster_env is not a whole number: correct it, or leave it empty" >&2
    exit 2
done
if [ "$spares" -ge "$SLURM_JOB_NUM_NODES" ]; then
    echo "SPARES=$spares leaves no node to train on of the job's $SLURM_JOB_NUM_NODES: ask for more with --nodes" >&2
    exit 2
fi
wanted=$((SLURM_JOB_NUM_NODES - spares))
mapfile -t all_nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
declare -A lost=() # nodes that no longer answer in this start of the job
node_counts=       # with ELASTIC: the numbers of nodes that the batch divides over, the largest first

can_do_without() { [ "$spares" != 0 ] || [ "$elastic" = 1 ]; } # a failed node; else it is the queue's

is_bad() { [ -f "$bad_nodes" ] && awk -v node="$1" '$1 == node { found = 1 } END { exit !found }' "$bad_nodes"; }

exclude_node() { # exclude_node NODE WHY
    say "$1 $2: excluded for the rest of this job (its line in $bad_nodes can be deleted)"
    is_bad "$1" || echo "$1 $(date '+%F %T') $2" >>"$bad_nodes"
}

# check_elastic ARGUMENTS OF dit-ds train: which smaller numbers of nodes the batch divides over
check_elastic() {
    [ "$elastic" = 1 ] || return 0
    local status
    node_counts=$(srun "${SRUN_OPTIONS[@]}" --nodes=1 --ntasks=1 "${CONTAINER[@]}" \
        "$PYTHON" "$scripts/node_counts.py" "$wanted" "$TASKS_PER_NODE" "$@")
    status=$?
    [ "$status" != 0 ] || say "ELASTIC: the batch divides over $(tr '\n' ' ' <<<"$node_counts")node(s)"
    return "$status"
}

# choose_nodes: the nodes of the next step, those that were never excluded first. Fails where they are too few.
choose_nodes() {
    local node count good=() bad=() chosen nodes others=()
    for node in "${all_nodes[@]}"; do
        if [ -n "${lost[$node]:-}" ]; then continue; fi
        if is_bad "$node"; then bad+=("$node"); else good+=("$node"); fi
    done
    count=$wanted
    if [ "${#good[@]}" -lt "$wanted" ]; then
        count=0
        for node in $node_counts; do [ "$node" -gt "${#good[@]}" ] || { count=$node && break; }; done
        if [ "$count" = 0 ]; then # without ELASTIC an excluded node that SLURM gave again is better than none
            count=$wanted good+=("${bad[@]}")
        fi
    fi
    [ "${#good[@]}" -ge "$count" ] || return 1
    chosen=" ${good[*]:0:count} " nodes=()
    for node in "${all_nodes[@]}"; do # in SLURM's order, by which it numbers the ranks: rank 0's node is the master
        if [[ $chosen == *" $node "* ]]; then nodes+=("$node"); else others+=("$node"); fi
    done
    step_nodes=$count step_on=() node_lost=
    [ "${#others[@]}" = 0 ] || step_on+=(--exclude="$(IFS=, && echo "${others[*]}")")
    # the step that lost a node holds the others' cores until SLURM has given that node up
    [ "${#lost[@]}" = 0 ] || step_on+=(--overlap)
    if [ "${nodes[0]}" != "${all_nodes[0]}" ] || [ -z "$site_address" ]; then MASTER_ADDR=${nodes[0]}; fi
    [ "${#others[@]}" = 0 ] || say "training on ${nodes[*]}, not on ${others[*]}; first node $MASTER_ADDR"
}

# guard_first_node: two other nodes, so far as there are, see to it that the job is requeued if the first is lost
guard_first_node() {
    local node
    for node in "${all_nodes[@]:1:2}"; do
        srun --nodes=1 --ntasks=1 --nodelist="$node" --overlap --output=none \
            bash "$scripts/guard.sh" "$this_job" "$DIT_DS_JOB_FOLDER" &
    done
}

# find_lost_nodes: asks each node for an answer, all at once; whether one no longer gives it
find_lost_nodes() {
    local node found=1 pids=() patience=90
    ! can_do_without || patience=20
    for node in "${all_nodes[@]}"; do
        if [ -n "${lost[$node]:-}" ]; then continue; fi
        timeout -k 5 "$patience" srun --nodes=1 --ntasks=1 --nodelist="$node" --overlap true 2>/dev/null &
        pids+=("$node $!")
    done
    for node in "${pids[@]}"; do
        wait "${node#* }" && continue
        node=${node% *} found=0
        lost[$node]=1 node_lost=1
        if can_do_without; then exclude_node "$node" "does not answer"; else say "$node does not answer"; fi
    done
    return "$found"
}

# failed_node: of the last step, the node that SLURM lost and has back, else that of the rank that first died of a signal,
# or else hung (76)
failed_node() {
    awk '/ srun: error: Node failure on / { died = $NF }
        !/^[0-9]+ srun: error: [^ ]+: tasks? [0-9,-]+: / || /: Terminated/ { next }
        /: Exited with exit code/ { if ($NF == 76 && !hung) hung = $4; next }
        !died { died = $4 }
        END { name = died ? died : hung; sub(/:$/, "", name); print name }' "$rank_logs/srun.log"
}

# note_failure: a node on which training fails twice in a short time is excluded, if another can take its place
note_failure() {
    local node now free=0 other
    node=$(failed_node)
    [ -n "$node" ] || return 0
    now=$(date +%s)
    echo "$now $node" >>"$failures"
    [ "$(awk -v node="$node" -v since=$((now - 60 * fails_within)) '$2 == node && $1 >= since' "$failures" | wc -l)" -ge 2 ] ||
        return 0
    for other in "${all_nodes[@]}"; do
        if [ "$other" != "$node" ] && [ -z "${lost[$other]:-}" ] && ! is_bad "$other"; then free=$((free + 1)); fi
    done
    for other in "$wanted" $node_counts; do
        if [ "$free" -ge "$other" ]; then
            exclude_node "$node" "failed twice in $fails_within minutes"
            return 0
        fi
    done
}

# nodes_for_another_start STATUS: whether a step that ended so can start again in this job, and on which nodes. A
# rank whose peer is lost with its node ends with 1, as one with an error of its own does.
nodes_for_another_start() {
    if find_lost_nodes; then
        can_do_without || return 1
    else
        [ "$1" -gt 128 ] || [ "$1" = 76 ] || return 1
        note_failure # where a node is lost, SLURM kills the others' ranks, which tells nothing about their nodes
    fi
    choose_nodes
}

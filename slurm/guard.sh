#!/bin/bash
# guard.sh JOB LOG_FOLDER, on nodes other than the job's first: where SLURM has lost the first, on which the job's script
# ran, put the job back into the queue. With --no-kill SLURM would leave it there, doing nothing, to its time limit.
while sleep 15; do
    info=$(timeout 60 scontrol show job -o "$1") || continue
    [[ $info == *JobState=RUNNING* ]] || exit 0
    host=$(sed -n 's/.* BatchHost=\([^ ]*\).*/\1/p' <<<"$info") nodes=$(sed -n 's/.* NodeList=\([^ ]*\).*/\1/p' <<<"$info")
    if [ -z "$host" ] || scontrol show hostnames "$nodes" | grep -qxF "$host"; then continue; fi
    if scontrol requeue "$1"; then exit 0; fi
    : >"$2/ended" # a chained job goes on: that this one is cancelled is not the user's wish
    scancel "$1"
done

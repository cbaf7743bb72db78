#!/bin/bash
# One command of a job on all of its ranks, for programs that start several after another (dit-ds tune --launch):
#   bash slurm/on_ranks.sh COMMAND ... --run_dir FOLDER ...
# The ranks' logs go by the folder's name. Status 75 also where the command failed because a node is gone.
# shellcheck source=slurm/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh" || exit 2

logged "$(basename "$(option run_dir "$@")")" "$@"
status=$?
if [ "$status" != 0 ] && ! nodes_answer; then status=75; fi
exit "$status"

# Sourced by the training scripts after job.sh: a launcher on every node of the job, which starts the node's ranks.
# shellcheck shell=bash

PROGRESS_STARTS=3
SLOWEST_NODE_SECONDS=120

# launch_training RECIPE [--section.field value ...]
launch_training() {
  local recipe=$1 hosts master
  run_folder=$(find_run_folder "$@") || fail $?
  shift
  hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
  master=${hosts%%$'\n'*}:$((20000 + SLURM_JOB_ID % 10000)) # the first node; jobs that share it do not meet
  say "$SLURM_JOB_NUM_NODES node(s) x $RANKS_PER_NODE rank(s), run folder $run_folder"

  # When one node's launcher ends, the others get time to end by themselves, with an exit code that says why.
  # A launcher passes USR1 on; before it does, and in what it starts, the signal must not kill. SLURM_NODEID is another
  # one on each node, so the task's own shell reads it; "$@" reaches it word for word.
  # --resume starts where there is nothing yet and goes on where there is: a requeued job needs no other command.
  # shellcheck disable=SC2016
  run_step --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 --cpu-bind=none \
    --kill-on-bad-exit=0 --wait="$SLOWEST_NODE_SECONDS" -- bash -c 'trap "" USR1
      exec "$PYTHON" -m pretrain.launch --nodes "$SLURM_JOB_NUM_NODES" --node-rank "$SLURM_NODEID" \
        --ranks-per-node "$RANKS_PER_NODE" --master "$@"' pretrain "$master" "$recipe" --resume "$@"
  say "done"
}

# Prints the recipe's run folder; a mistake in the recipe or a flag is said here, before any rank starts.
find_run_folder() {
  run_here "$PYTHON" -c 'import sys
from pathlib import Path
from data_prep.errors import run_cli
from pretrain.recipes import load_recipe
run_cli(lambda: print(load_recipe(Path(sys.argv[1]), sys.argv[2:]).run_folder))' "$@"
}

# Whether any of the last starts came to a launcher, and any saved a checkpoint.
made_progress() {
  local restart=${SLURM_RESTART_COUNT:-0} count launched=
  for ((count = 0; count < PROGRESS_STARTS; count++)); do
    [[ ! -d $run_folder/logs/$SLURM_JOB_ID.$((restart - count)) ]] || launched=yes
  done
  [[ -n $launched ]] && run_here "$PYTHON" -m pretrain.status "$run_folder" --made-progress "$PROGRESS_STARTS"
}

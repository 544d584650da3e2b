# Sourced by every job script: settings, the container, and steps that go on in a new start of the job.
#
#   source slurm/job.sh "$@"    sets `arguments`: the script's own, without --container-image IMAGE
#   run_task COMMAND ...                         one task, on the job's first node
#   run_step SRUN_OPTION ... -- COMMAND ...      as many as srun's options say
#
# The step is told with USR1 to stop when this shell gets USR1 (the time limit is near) or TERM (preemption, scancel).
# What follows its end depends on its exit code (data_prep/errors.py):
#
#   0                                      the script goes on
#   2 to 6, and 126, 127 from the shell    the job fails with this code: the next start would end the same way
#   75, 7, 1, 128 + signal, any other      the job is requeued
#
# Nobody's keyboard is needed for a requeue, so none may follow another for ever: after the first three, only where
# `made_progress` says so. A job that was cancelled is left alone, and one that cannot be requeued fails.
# shellcheck shell=bash

FREE_RESTARTS=3
SIGNAL_SECONDS=10

arguments=()
while (($#)); do
  case $1 in
    --container-image)
      [[ -n ${2:-} ]] || { echo "error: --container-image: an image must follow, a file or registry name" >&2; exit 2; }
      CONTAINER_IMAGE=$2
      shift 2
      ;;
    --container-image=*) CONTAINER_IMAGE=${1#*=} && shift ;;
    *) arguments+=("$1") && shift ;;
  esac
done
source slurm/env.sh

container=()
if [[ -n $CONTAINER_IMAGE ]]; then
  container=("--container-image=$CONTAINER_IMAGE" "--container-mounts=$CONTAINER_MOUNTS" "--container-workdir=$PWD")
fi

# One task of a job array is meant, not the whole array.
job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
job=${job:-$SLURM_JOB_ID}
step=
stopping=
requeued=
trap stop_step USR1
trap 'stop_step && requeue_at_time_limit' TERM

say() {
  echo "$(date '+%F %T') job $job, start $((${SLURM_RESTART_COUNT:-0} + 1)): $*"
}

# Tells the step to stop, again and again: a signal is lost on a process that does not listen yet.
stop_step() {
  if [[ -z $stopping ]]; then
    stopping=yes
    say "asked to stop"
    repeat_signal &
  fi
}

repeat_signal() {
  while [[ -n $step ]] && kill -USR1 "$step" 2>/dev/null; do sleep "$SIGNAL_SECONDS"; done
}

run_step() {
  local options=() code=0
  while [[ $1 != -- ]]; do options+=("$1") && shift; done
  shift
  [[ -z $stopping ]] || try_again 75
  srun "${options[@]}" "${container[@]}" "$@" &
  step=$!
  if [[ -n $stopping ]]; then
    repeat_signal & # the request came before `step` was set
  fi
  while kill -0 "$step" 2>/dev/null; do wait "$step" || :; done # a signal to this shell ends `wait`, not the step
  wait "$step" || code=$?
  step=
  ((code == 0)) || fail "$code"
}

# A step of one task, with the cores the job has.
run_task() {
  run_step --nodes=1 --ntasks=1 --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" -- "$@"
}

# Ends a start of the job whose work is not done; does not return.
fail() {
  case $1 in
    [2-6] | 126 | 127)
      say "failed with exit code $1; what is said above must be put right first, so the job is not requeued"
      exit "$1"
      ;;
    *) try_again "$1" ;;
  esac
}

# Requeues the job, or fails with the given exit code; does not return.
try_again() {
  trap '' USR1 TERM # what comes now must not be interrupted
  case $(job_state) in
    "RUNNING "* | *" TimeLimit") requeue "ended with exit code $1" || : ;;
    *) say "ended with exit code $1; Slurm has ended the job, so it is not requeued from here" ;;
  esac
  exit "$1" # of a job that was requeued it counts nowhere
}

# At the time limit Slurm kills this shell together with a step that does not end: that is not waited for.
requeue_at_time_limit() {
  if [[ $(job_state) == *" TimeLimit" ]]; then
    requeue "cut off by the time limit" || :
  fi
}

# Asks for a new start, unless the last ones have shown that it would lead nowhere.
requeue() {
  [[ -z $requeued ]] || return 0
  if ((${SLURM_RESTART_COUNT:-0} >= FREE_RESTARTS)) && ! made_progress; then
    say "$1, as before without getting any further, so the job is not requeued again"
    return 1
  fi
  say "$1; the job is requeued"
  if scontrol requeue "$job"; then
    requeued=yes
  else
    say "could not be requeued; submit it again to go on"
  fi
}

# Prints state and reason. The controller may be restarting just now: that is waited for.
job_state() {
  local tries=0
  until squeue --noheader --jobs="$job" --format="%T %r"; do
    ((++tries < 100)) || return 0
    sleep 5
  done
}

# Whether the last starts got further; a script whose steps can tell defines its own.
made_progress() {
  false
}

# Runs a command once, on this node, in the container where there is one.
run_here() {
  if [[ -n $CONTAINER_IMAGE ]]; then
    srun --nodes=1 --ntasks=1 --overlap "${container[@]}" "$@"
  else
    "$@"
  fi
}

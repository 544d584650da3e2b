# Sourced by the training scripts: starts torchrun once on every node of the job.
# shellcheck shell=bash

# launch_training RECIPE [--section.field value ...]
launch_training() {
  local recipe=$1 hosts
  shift
  hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
  export MASTER_ADDR=${hosts%%$'\n'*}                   # the first node
  export MASTER_PORT=$((20000 + SLURM_JOB_ID % 10000))  # jobs that share a node do not meet

  # SLURM_NODEID is another one on each node, so the task's own shell reads it; "$@" reaches it word for word.
  # --resume starts where there is nothing yet and goes on where there is: a requeued job needs no other command.
  # shellcheck disable=SC2016
  srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 --kill-on-bad-exit=1 \
    --label bash -c 'exec "$PYTHON" -m torch.distributed.run \
      --nnodes="$SLURM_JOB_NUM_NODES" --node-rank="$SLURM_NODEID" --nproc-per-node="$RANKS_PER_NODE" \
      --master-addr="$MASTER_ADDR" --master-port="$MASTER_PORT" \
      -m pretrain.train "$@"' pretrain "$recipe" --resume "$@"
}

#!/usr/bin/env bash
#SBATCH --job-name=cola-idm
#SBATCH --nodes=8
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@120
#SBATCH --output=slurm/logs/%x-%j.out
# Stage idm: IDM, codebook and world model on a frozen base.
#
#   sbatch slurm/pretrain_idm.sh [--section.field value ...]      e.g. --optimizer.learning_rate 1e-4
#
# Submit from the repository's root. The recipe and all site facts are in slurm/env.sh; options of sbatch
# (--nodes=2, --time=...) go before the script's name. Submitted again, it goes on from the newest checkpoint.
set -euo pipefail
cd "$SLURM_SUBMIT_DIR"
source slurm/job.sh "$@"
source slurm/launch.sh
launch_training "$IDM_RECIPE" "${arguments[@]}"

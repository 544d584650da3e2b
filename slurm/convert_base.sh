#!/usr/bin/env bash
#SBATCH --job-name=cola-base
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=4
#SBATCH --mem=16G
#SBATCH --time=04:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@120
#SBATCH --output=slurm/logs/%x-%j.out
# Import the base's Hugging Face folder as the checkpoint that stage idm starts from. Needs no GPU.
#
#   sbatch slurm/convert_base.sh [hf_to_megatron.py's flags]      e.g. --output runs/other/base
#
# Submit from the repository's root. Folders are in slurm/env.sh; options of sbatch go before the script's name.
set -euo pipefail
cd "$SLURM_SUBMIT_DIR"
source slurm/job.sh "$@"

run_task "$PYTHON" checkpoint_tools/hf_to_megatron.py --source "$BASE_MODEL" --output "$BASE_RUN" "${arguments[@]}"

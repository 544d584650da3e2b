#!/usr/bin/env bash
#SBATCH --job-name=cola-export
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=4
#SBATCH --mem=16G
#SBATCH --time=04:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@120
#SBATCH --output=slurm/logs/%x-%j.out
# Export the newest checkpoint of the policy as a Hugging Face folder. Needs no GPU.
#
#   sbatch slurm/export.sh [megatron_to_hf.py's flags]      e.g. --run runs/llama31_8b/idm --output runs/llama31_8b/idm_hf
#
# Submit from the repository's root. Folders are in slurm/env.sh; options of sbatch go before the script's name.
set -euo pipefail
cd "$SLURM_SUBMIT_DIR"
source slurm/job.sh "$@"

run_task "$PYTHON" checkpoint_tools/megatron_to_hf.py --run "$POLICY_RUN" --output "$EXPORT" "${arguments[@]}"

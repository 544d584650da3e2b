#!/usr/bin/env bash
#SBATCH --job-name=cola-blend
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=2
#SBATCH --mem=16G
#SBATCH --time=1-00:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@120
#SBATCH --output=slurm/logs/%x-%j.out
# Blend the tokenized corpora into training shards; every task of a job array writes its share of them.
#
#   sbatch [--array=0-15] slurm/blend.sh [blend.py's flags]      e.g. --total-tokens 100000000000 --output data/blend_100g
#
# Submit from the repository's root, after slurm/tokenize.sh. Recipe and folders are in slurm/env.sh; options of sbatch
# go before the script's name. Submitted again, it goes on where it was.
set -euo pipefail
cd "$SLURM_SUBMIT_DIR"
source slurm/job.sh "$@"

run_task "$PYTHON" data_prep/blend.py --config "$BLEND_RECIPE" --tokenized "$TOKENIZED" --tokenizer "$TOKENIZER" \
  --resume "${arguments[@]}"

#!/usr/bin/env bash
#SBATCH --job-name=cola-data
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=32
#SBATCH --time=7-00:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%x-%j.out
# Tokenize the four corpora, one after the other, then blend them into training shards.
#
#   sbatch slurm/prepare_data.sh [blend.py's flags]      e.g. --total-tokens 100000000000 --output data/blend_100g
#
# Submit from the repository's root. Corpora, tokenizer and recipe are in slurm/env.sh; options of sbatch
# (--cpus-per-task=64) go before the script's name. Submitted again, it goes on where it was.
set -euo pipefail
cd "$SLURM_SUBMIT_DIR"
source slurm/env.sh

for source in slimpajama starcoder proof_pile_2 wudao; do
  "$PYTHON" data_prep/tokenize_corpus.py --source "$source" --input "$CORPORA/$source" --tokenizer "$TOKENIZER" \
    --output "$TOKENIZED/$source" --workers "${SLURM_CPUS_PER_TASK:-1}" --resume
done
"$PYTHON" data_prep/blend.py --config "$BLEND_RECIPE" --tokenized "$TOKENIZED" --tokenizer "$TOKENIZER" --resume "$@"

#!/usr/bin/env bash
#SBATCH --job-name=cola-tokenize
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=32
#SBATCH --time=1-00:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@120
#SBATCH --output=slurm/logs/%x-%j.out
# Tokenize the four corpora, one after the other; every task of a job array takes its share of each.
#
#   sbatch [--array=0-7] slurm/tokenize.sh [tokenize_corpus.py's flags]      e.g. --decontaminate math500.jsonl
#
# Submit from the repository's root. Corpora and tokenizer are in slurm/env.sh; options of sbatch (--array,
# --cpus-per-task=64) go before the script's name. Submitted again, it goes on where it was. slurm/blend.sh is next.
set -euo pipefail
cd "$SLURM_SUBMIT_DIR"
source slurm/job.sh "$@"

for source in slimpajama starcoder proof_pile_2 wudao; do
  run_task "$PYTHON" data_prep/tokenize_corpus.py --source "$source" --input "$CORPORA/$source" \
    --tokenizer "$TOKENIZER" --output "$TOKENIZED/$source" --workers "${SLURM_CPUS_PER_TASK:-1}" --resume "${arguments[@]}"
done

# Facts about this cluster, for every script in this folder: the only file to edit.
# A value set in the environment wins over the one here: RANKS_PER_NODE=4 sbatch --gpus-per-node=4 ...
# shellcheck shell=bash

# Partition and account, where your site asks for them. sbatch itself reads these two, so source this file in the
# shell you submit from: source slurm/env.sh && sbatch slurm/pretrain_idm.sh
# export SBATCH_PARTITION=gpu
# export SBATCH_ACCOUNT=project

# More options of sbatch that slurm/submit_all.sh gives to the jobs that need no GPU, and to training.
export CPU_JOB_OPTIONS="${CPU_JOB_OPTIONS:-}"           # e.g. --partition=cpu --cpus-per-task=64
export TRAINING_JOB_OPTIONS="${TRAINING_JOB_OPTIONS:-}" # e.g. --nodes=16 --signal=B:USR1@300

# Container (pyxis and enroot): an image file or registry name, and what it sees of the host, this folder at least.
# Empty: no container. `sbatch slurm/pretrain_idm.sh --container-image IMAGE` chooses one for a single job.
export CONTAINER_IMAGE="${CONTAINER_IMAGE:-}"
export CONTAINER_MOUNTS="${CONTAINER_MOUNTS:-$PWD:$PWD}"

# Python of the environment that requirements.txt was installed into, seen by all nodes; in a container, its own.
if [[ -n $CONTAINER_IMAGE ]]; then
  export PYTHON="${PYTHON:-python3}"
else
  export PYTHON="${PYTHON:-$PWD/.venv/bin/python}"
fi

# Training processes on a node: one a GPU.
export RANKS_PER_NODE="${RANKS_PER_NODE:-8}"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-8}"

# Network interface between the nodes, where there are several; unset: the libraries choose.
# export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0

# Data: one folder a source as it was published, named as `tokenize_corpus.py --source` names it, and the folder of
# the tokenizer. What is made of them goes where configs/ expects it.
export CORPORA="${CORPORA:-$PWD/data/corpora}"
export TOKENIZER="${TOKENIZER:-$PWD/data/llama-3.1-tokenizer}"
export TOKENIZED="${TOKENIZED:-$PWD/data/tokenized}"

# Recipes.
export BLEND_RECIPE="${BLEND_RECIPE:-configs/blend_200g.yaml}"
export IDM_RECIPE="${IDM_RECIPE:-configs/idm_llama31_8b.yaml}"
export POLICY_RECIPE="${POLICY_RECIPE:-configs/policy_llama31_8b.yaml}"

# Where the base's Hugging Face folder lies, and the runs that conversions read and write, as the recipes name them.
export BASE_MODEL="${BASE_MODEL:-$PWD/data/Llama-3.1-8B}"
export BASE_RUN="${BASE_RUN:-runs/llama31_8b/base}"
export POLICY_RUN="${POLICY_RUN:-runs/llama31_8b/policy}"
export EXPORT="${EXPORT:-runs/llama31_8b/hf}"

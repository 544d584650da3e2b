#!/usr/bin/env bash
# Submit the whole way, from corpora to a Hugging Face folder: each job starts when those it needs have succeeded.
#
#   slurm/submit_all.sh [--from STEP] [--array-tasks N] [--container-image IMAGE] [--dry-run]
#
#   --from STEP               start here; what comes before is done: tokenize (default), blend, convert_base,
#                             pretrain_idm, pretrain_policy or export
#   --array-tasks N           jobs that share the tokenizing, and as many that share the blending (default 8)
#   --container-image IMAGE   run every job in this container
#   --dry-run                 print the sbatch commands and submit nothing
#
# Run it in the repository's root. Everything else is in slurm/env.sh. The base is not imported again where it is there.
# When a job fails for good, Slurm cancels those that wait for it. Run this again with --from STEP: it goes on.
set -euo pipefail

STEPS=(tokenize blend convert_base pretrain_idm pretrain_policy export)
declare -A NEEDS=(
  [blend]=tokenize [pretrain_idm]="blend convert_base" [pretrain_policy]=pretrain_idm [export]=pretrain_policy
)

first=tokenize array_tasks=8 image=() dry_run=
declare -A ids=() # step -> its job
submitted=()

die() {
  echo "error: $1" >&2
  exit 2
}

read_options() {
  while (($#)); do
    case $1 in
      --from) first=${2:-} && shift 2 ;;
      --array-tasks) array_tasks=${2:-} && shift 2 ;;
      --container-image) image=(--container-image "${2:-}") && shift 2 ;;
      --dry-run) dry_run=yes && shift ;;
      --help | -h) sed -n '2,/^set /{/^set /d;s/^# \?//;p}' "${BASH_SOURCE[0]}" && exit ;;
      *) die "$1: no such option; see slurm/submit_all.sh --help" ;;
    esac || die "$1: a value must follow"
  done
  [[ " ${STEPS[*]} " == *" $first "* && -n $first ]] || die "--from '$first': no such step; one of: ${STEPS[*]}"
  [[ $array_tasks =~ ^[1-9][0-9]*$ ]] || die "--array-tasks '$array_tasks': must be a number of jobs"
  [[ ${#image[@]} == 0 || -n ${image[1]} ]] || die "--container-image: an image must follow"
}

# Prints the jobs that a step waits for, as sbatch wants them.
dependency() {
  local need list=
  for need in ${NEEDS[$1]:-}; do
    [[ -z ${ids[$need]:-} ]] || list+=:${ids[$need]}
  done
  [[ -z $list ]] || echo "--dependency=afterok$list"
}

submit() {
  local name=$1 options=(--parsable --kill-on-invalid-dep=yes) more waits id
  case $name in
    tokenize | blend) more="$CPU_JOB_OPTIONS --array=0-$((array_tasks - 1))" ;;
    pretrain_*) more=$TRAINING_JOB_OPTIONS ;;
    *) more=$CPU_JOB_OPTIONS ;;
  esac
  waits=$(dependency "$name")
  read -ra more <<<"$more $waits"
  options+=("${more[@]}" "slurm/$name.sh" "${image[@]}")
  if [[ -n $dry_run ]]; then
    printf "sbatch"
    printf " %q" "${options[@]}"
    echo
    ids[$name]=${name^^}_JOB
    return
  fi
  if ! id=$(sbatch "${options[@]}"); then
    ((${#submitted[@]} == 0)) || scancel "${submitted[@]}"
    echo "error: $name was refused; what had been submitted is cancelled" >&2
    exit 1
  fi
  id=${id%%;*} # where there are several clusters, the cluster's name follows
  ids[$name]=$id
  submitted+=("$id")
  echo "$name: job $id${waits:+, $waits}"
}

say_where_to_look() {
  local jobs recipe
  jobs=$(IFS=, && echo "${submitted[*]}")
  echo "look at:"
  echo "  squeue --jobs=$jobs"
  echo "  slurm/logs/cola-*-JOB.out"
  for recipe in "$IDM_RECIPE" "$POLICY_RECIPE"; do
    echo "  $PYTHON -m pretrain.status $(sed -n 's/^run_folder: *//p' "$recipe")"
  done
  echo "stop everything: scancel ${submitted[*]}"
}

read_options "$@"
[[ -f slurm/env.sh ]] || die "slurm/env.sh: not here; run this from the repository's root"
source slurm/env.sh
for recipe in "$BLEND_RECIPE" "$IDM_RECIPE" "$POLICY_RECIPE"; do
  [[ -f $recipe ]] || die "$recipe: no such recipe; recipes are named in slurm/env.sh"
done
[[ ! -e $EXPORT ]] || die "$EXPORT: is there already; move it away, or name another folder as EXPORT in slurm/env.sh"

started=
for name in "${STEPS[@]}"; do
  [[ $name != "$first" ]] || started=yes
  if [[ $name == convert_base && -e $BASE_RUN ]]; then
    [[ -z $started ]] || echo "convert_base: left out, $BASE_RUN is there"
  elif [[ -n $started ]]; then
    submit "$name"
  fi
done
[[ -n $dry_run ]] || say_where_to_look

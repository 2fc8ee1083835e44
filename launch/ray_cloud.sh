#!/usr/bin/env bash
# Runs one command on Ray machines that it rents: by Ray's cluster launcher on AWS, or by KubeRay on Kubernetes.
#
#   launch/ray_cloud.sh aws -- python -m arrag_jax.build_datastore --config=configs/folder_datastore.py \
#     --config.source=/shared/images --workdir=/shared/store
#   launch/ray_cloud.sh kubernetes --dry_run -- python -m arrag_jax.build_datastore --config=…
#
# Run it from the repository's root, with `ray` (the extra "ray", and boto3) or `kubectl` installed. --ray=auto is added
# to the command. On AWS, launch/ray_cluster.yaml says which machines; they are given back when the command has
# ended, also after an error or Ctrl-C. On Kubernetes, launch/ray_job.yaml says which; KubeRay removes them when the job
# has ended. To continue after a failure, run the same line again. Change the two files first, where they say so.
#
#   --keep      do not give the machines back (aws): the next command needs no new ones
#   --dry_run   print the commands and run nothing
#   --help      print this text
set -euo pipefail

die() {
  echo "error: $*" >&2
  exit 2
}

usage() {
  sed -n '/^# Runs/,/^set /s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
}

where=${1:-} dry_run="" keep=""
case $where in
  aws | kubernetes) shift ;;
  --help | -h)
    usage
    exit
    ;;
  *) die "say where, aws or kubernetes; launch/ray_cloud.sh --help" ;;
esac
while (($#)); do
  case $1 in
    --dry_run) dry_run=yes ;;
    --keep) keep=yes ;;
    --)
      shift
      break
      ;;
    *) die "unknown option $1; launch/ray_cloud.sh --help lists them (the command comes after --)" ;;
  esac
  shift
done
(($#)) || die "the command is missing; put it after --, as in: -- python -m arrag_jax.build_datastore --config=…"
[[ $1 == python && ${2:-} == -m && ${3:-} == arrag_jax.* ]] || die "the command must be python -m arrag_jax.…, not: $*"

run() { # prints a command, or runs it
  if [[ -n $dry_run ]]; then
    printf '%q ' "$@"
    echo
  else
    "$@"
  fi
}

if [[ $where == kubernetes ]]; then
  [[ -z $keep ]] || die "--keep is for aws alone"
  words=$(printf '%q ' "$@" --ray=auto)
  words=${words//\\/\\\\}
  patch="{\"spec\":{\"entrypoint\":\"${words//\"/\\\"}\"}}"
  job=(kubectl patch --local -f launch/ray_job.yaml --type=merge -p "$patch" -o yaml)
  if [[ -n $dry_run ]]; then
    echo "$(run "${job[@]}")| kubectl apply -f -"
  else
    "${job[@]}" | kubectl apply -f -
  fi
  run kubectl wait --for=jsonpath='{.status.jobDeploymentStatus}'=Running --timeout=30m rayjob/arrag-jax
  run kubectl logs --follow job/arrag-jax
  exit
fi

cluster=launch/ray_cluster.yaml
export RAY_AUTH_MODE=token RAY_USAGE_STATS_ENABLED=0
[[ -n $dry_run || -f ~/.ray/auth_token ]] || die "there is no token yet; make one: ray get-auth-token --generate"
shift # the cluster has its own Python
[[ -n $keep || -n $dry_run ]] || trap 'ray down --yes "$cluster"' EXIT
run ray up --yes "$cluster"
run ray exec "$cluster" "cd arrag_jax && $(printf '%q ' .venv/bin/python "$@" --ray=auto)"
[[ -n $keep || -z $dry_run ]] || run ray down --yes "$cluster"

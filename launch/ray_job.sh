#!/usr/bin/env bash
# Runs one command on a Ray cluster of the machines of one job. Every machine of the job runs this script.
#
#   launch/ray_job.sh -- python -m arrag_jax.build_datastore --config=configs/folder_datastore.py --workdir=/shared/store
#
# The first machine starts the head of the cluster and runs the command, with --ray=HEAD:PORT added. The others join
# and wait until the head is gone. Each machine stops the Ray processes that it has started, and no others. Under Slurm
# and on a Cloud TPU slice the script finds out which machine is the first; elsewhere set RANK and HEAD. All machines
# need the same RAY_AUTH_TOKEN, or a file that RAY_AUTH_TOKEN_PATH names: nobody else can run programs on the cluster.
# launch/gpu_slurm.sh --ray and launch/tpu_pod.sh --ray provide it.
#
# On a TPU slice every host becomes a worker of its own: TPU_PROCESS_BOUNDS, TPU_CHIPS_PER_PROCESS_BOUNDS and
# TPU_VISIBLE_CHIPS limit a process to the chips of its host, and CLOUD_TPU_TASK_ID says that it is alone.
#
#   --port=PORT   port of the head (default: 6379)
#   --dry_run     print what this machine would do and run nothing
#   --help        print this text
set -euo pipefail

die() {
  echo "error: $*" >&2
  exit 2
}

usage() {
  sed -n '/^# Runs/,/^set /s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
}

port=6379 dry_run=""
while (($#)); do
  case $1 in
    --port=*) port=${1#--port=} ;;
    --dry_run) dry_run=yes ;;
    --help | -h)
      usage
      exit
      ;;
    --)
      shift
      break
      ;;
    *) die "unknown option $1; launch/ray_job.sh --help lists them (the command comes after --)" ;;
  esac
  shift
done
(($#)) || die "the command is missing; put it after --, as in: -- python -m arrag_jax.build_datastore --config=…"
[[ $1 == python && ${2:-} == -m && ${3:-} == arrag_jax.* ]] || die "the command must be python -m arrag_jax.…, not: $*"

# Prints an attribute that Google sets for each host of a slice.
attribute() {
  curl --silent --fail --max-time 10 --header "Metadata-Flavor: Google" \
    "http://metadata.google.internal/computeMetadata/v1/instance/attributes/$1"
}

if [[ -n ${SLURM_PROCID:-} ]]; then
  rank=$SLURM_PROCID
  head=${HEAD:-$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)}
elif [[ -n ${RANK:-} && -n ${HEAD:-} ]]; then
  rank=$RANK head=$HEAD
else
  rank=$(attribute agent-worker-number) || die "no Slurm job and no TPU slice; set RANK (0, 1, …) and HEAD (an address)"
  head=$(attribute worker-network-endpoints | cut -d, -f1 | cut -d: -f3)
  chips=$(find /dev -maxdepth 2 -name 'accel[0-9]*' -o -path '/dev/vfio/[0-9]*' | wc -l)
  case $chips in
    1) bounds=1,1,1 ;;
    4) bounds=2,2,1 ;;
    8) bounds=2,4,1 ;;
    *) die "this host has $chips TPU chips, where 1, 4 or 8 are known" ;;
  esac
  export TPU_PROCESS_BOUNDS=1,1,1 TPU_CHIPS_PER_PROCESS_BOUNDS=$bounds CLOUD_TPU_TASK_ID=0
  TPU_VISIBLE_CHIPS=$(seq -s, 0 $((chips - 1)))
  export TPU_VISIBLE_CHIPS
fi
[[ -n ${RAY_AUTH_TOKEN:-}${RAY_AUTH_TOKEN_PATH:-} || -n $dry_run ]] ||
  die "RAY_AUTH_TOKEN is not set; give all machines the same one"
if [[ -n ${RAY_AUTH_TOKEN_PATH:-} ]]; then # workers may run in other folders
  RAY_AUTH_TOKEN_PATH=$(realpath "$RAY_AUTH_TOKEN_PATH")
  export RAY_AUTH_TOKEN_PATH
fi
export RAY_AUTH_MODE=token RAY_USAGE_STATS_ENABLED=0

if ((rank == 0)); then
  start=(ray start --head "--node-ip-address=$head" "--port=$port" --include-dashboard=false --block)
else
  start=(ray start "--address=$head:$port" --block)
fi
run=("$@" "--ray=$head:$port")
if [[ -n $dry_run ]]; then
  printf '%q ' "${start[@]}"
  echo
  if ((rank == 0)); then
    printf '%q ' "${run[@]}"
    echo
  fi
  exit
fi

answers() {
  (: <"/dev/tcp/$head/$port") 2>/dev/null
}

# With --block Ray ends what it has started when it gets SIGTERM.
stop() {
  trap "" TERM
  kill -TERM "$cluster" 2>/dev/null || true
  wait "$cluster" || true
}
"${start[@]}" >/dev/null &
cluster=$!
trap stop EXIT

for _ in {1..1500}; do # the head may start later than the others
  answers && break
  kill -0 "$cluster" 2>/dev/null || die "Ray did not start on $(hostname)"
  sleep 0.2
done
answers || die "no head answers at $head:$port"

if ((rank > 0)); then
  trap exit TERM
  while answers; do sleep "${POLL:-5}"; done
  exit
fi
up=$SECONDS
"${run[@]}" &
command=$!
trap 'kill -TERM "$command"' TERM
# A trapped signal ends `wait` early, so wait again for the command's own exit code.
code=0
wait "$command" || code=$?
if kill -0 "$command" 2>/dev/null; then
  code=0
  wait "$command" || code=$?
fi
while ((SECONDS - up < 2)); do sleep 0.2; done # a machine that sees no head waits for one that is gone already
exit "$code"

#!/usr/bin/env bash
#SBATCH --job-name=arrag_jax
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:TERM@120
#
# Runs one command on the GPUs of a Slurm job, with one process per GPU, on any number of nodes.
#
#   make install REQUIREMENTS=requirements.txt
#   .venv/bin/pip install "jax[cuda12]==$(sed -n 's/^jax==//p' requirements.txt)"
#   sbatch --nodes=2 launch/gpu_slurm.sh -- \
#     python -m arrag_jax.train --config=configs/emoji_prior.py --workdir=/shared/run
#
# Submit from the repository's root. If nodes have another number of GPUs than 8, pass for example
# --ntasks-per-node=4 --gpus-per-node=4 to sbatch. The two numbers must be equal, because
# jax.distributed.initialize() uses SLURM_LOCALID as the number of the process's GPU. For the same reason GPUs are
# not bound to tasks: each task sees all GPUs of its node.
#
# 120 s before the time limit, Slurm sends SIGTERM to this script. It does so at a preemption, too, if the cluster
# sets PreemptParameters=send_user_signal. The script passes the signal to the command: training saves and exits
# with 0, and the script queues the job again. The job then continues from --workdir, which must be on a disk that
# all nodes share. Submitting the same line by hand also continues the run.
#
#   --ray       make a Ray cluster of the job's nodes and run the command on it once (docs/clusters.md); it must
#               take --ray, as build_datastore, build_neighbors and eval do
#   --dry_run   print the command without Slurm: launch/gpu_slurm.sh --dry_run -- python -m arrag_jax.…
#   --help      print this text
set -euo pipefail

die() {
  echo "error: $*" >&2
  exit 2
}

usage() {
  sed -n '/^# Runs/,/^set /s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
}

dry_run="" ray=""
while (($#)); do
  case $1 in
    --dry_run) dry_run=yes ;;
    --ray) ray=yes ;;
    --help | -h)
      usage
      exit
      ;;
    --)
      shift
      break
      ;;
    *) die "unknown option $1; launch/gpu_slurm.sh --help lists them (the command comes after --)" ;;
  esac
  shift
done
(($#)) || die "the command is missing; put it after --, as in: -- python -m arrag_jax.train --config=…"
[[ $1 == python && ${2:-} == -m && ${3:-} == arrag_jax.* ]] || die "the command must be python -m arrag_jax.…, not: $*"

# Host callbacks need the CPU backend in addition to the GPU's.
launch=(env JAX_PLATFORMS=cuda,cpu srun --gpu-bind=none --kill-on-bad-exit=1)
if [[ -n $ray ]]; then # one task per node, which gets all of its CPUs and GPUs; workers choose JAX_PLATFORMS themselves
  nodes=${SLURM_JOB_NUM_NODES:-1}
  launch=(srun "--ntasks=$nodes" --ntasks-per-node=1 "--cpus-per-task=${SLURM_CPUS_ON_NODE:-1}" --gpu-bind=none
    --kill-on-bad-exit=1 bash launch/ray_job.sh "--port=$((20000 + ${SLURM_JOB_ID:-0} % 10000))" --)
fi
launch+=("$@")
if [[ -n $dry_run ]]; then
  printf '%q ' "${launch[@]}"
  echo
  exit
fi

[[ -e .venv/bin/activate ]] || die "no .venv here; submit from the repository's root, after make install"
. .venv/bin/activate
if [[ -n $ray ]]; then
  RAY_AUTH_TOKEN=${RAY_AUTH_TOKEN:-$(od -An -N32 -tx1 /dev/urandom | tr -d ' \n')} # srun hands it to the nodes
  export RAY_AUTH_TOKEN
fi

stopped="" step=""
trap 'stopped=yes; trap "" TERM; [[ -z $step ]] || kill -TERM "$step"' TERM
"${launch[@]}" &
step=$!
[[ -z $stopped ]] || kill -TERM "$step" || true # the signal came before the step started
# A trapped signal ends `wait` early, so wait again; the second `wait` returns the command's own exit code.
code=0
wait "$step" || code=$?
if [[ -n $stopped ]]; then
  code=0
  wait "$step" || code=$?
  # Work on Ray ends with an error at a signal, and its command goes on where it was.
  if ((code == 0)) || [[ -n $ray ]]; then scontrol requeue "$SLURM_JOB_ID"; fi
fi
exit "$code"

#!/usr/bin/env bash
# Runs one command on every worker of a Cloud TPU slice.
#
#   launch/tpu_pod.sh --name pod --zone us-east5-b --type v6e-16 -- \
#     python -m arrag_jax.train --config=configs/emoji_prior.py --workdir=/shared/run
#
# The script creates the slice if it is absent or was preempted, copies the code of HEAD to all workers, installs
# the pinned packages, starts the same command on every worker, and follows the log of worker 0 until the command
# ends. Its exit code is that of the command on worker 0. After a preemption, run the same line again: the script
# reuses the slice or creates it again, and training continues from --workdir. That folder must be visible to all
# workers and must survive the slice: use a shared disk, or a bucket that is mounted as a folder. Ctrl-C stops only
# the display of the log; the command keeps running.
#
#   --name NAME --zone ZONE --type TYPE   the slice (required; TYPE is v4-32, v5litepod-16, v6e-16 or similar)
#   --version VERSION                     version of the TPU software for TYPE (default: v2-alpha-tpuv6e)
#   --project PROJECT                     Google Cloud project (default: that of gcloud)
#   --spot                                use a slice that may be preempted, at a lower price
#   --ray                                 run the command once, on a Ray cluster of the slice's hosts (docs/clusters.md)
#   --delete                              delete the slice; takes no command
#   --dry_run                             print every command of a first launch and run none
#   --help                                print this text
set -euo pipefail

die() {
  echo "error: $*" >&2
  exit 2
}

usage() {
  sed -n '/^# Runs/,/^set /s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
}

# Quotes words for any POSIX shell, because the remote shell may not be bash.
quoted() {
  local word text="" escape="'\\''"
  for word in "$@"; do
    if [[ -z $word || $word == *[!A-Za-z0-9_@%+=:,./-]* ]]; then word="'${word//\'/$escape}'"; fi
    text+="$word "
  done
  printf '%s' "${text% }"
}

# Prints a command so that it can be pasted into a shell, then runs it unless this is a dry run.
exec 3>&1
run() {
  quoted "$@" >&3
  echo >&3
  if [[ -z $dry_run ]]; then "$@"; fi
}

name="" zone="" type="" version="v2-alpha-tpuv6e" project="" spot="" ray="" delete="" dry_run=""
while (($#)); do
  if [[ $1 == --*=* ]]; then set -- "${1%%=*}" "${1#*=}" "${@:2}"; fi
  case $1 in
    --name | --zone | --type | --version | --project)
      (($# > 1)) || die "$1 needs a value"
      printf -v "${1#--}" '%s' "$2"
      shift 2
      ;;
    --spot | --ray | --delete | --dry_run)
      printf -v "${1#--}" yes
      shift
      ;;
    --help | -h)
      usage
      exit
      ;;
    --)
      shift
      break
      ;;
    *) die "unknown option $1; launch/tpu_pod.sh --help lists them (the command comes after --)" ;;
  esac
done

[[ -n $name ]] || die "--name is missing"
[[ -n $zone ]] || die "--zone is missing"
slice=("$name" "--zone=$zone" ${project:+"--project=$project"})
tpu=(gcloud compute tpus tpu-vm)

if [[ -n $delete ]]; then
  (($# == 0)) || die "--delete takes no command"
  run "${tpu[@]}" delete "${slice[@]}" --quiet
  exit
fi

[[ -n $type ]] || die "--type is missing"
(($#)) || die "the command is missing; put it after --, as in: -- python -m arrag_jax.train --config=…"
[[ $1 == python && ${2:-} == -m && ${3:-} == arrag_jax.* ]] || die "the command must be python -m arrag_jax.…, not: $*"

cd "$(dirname "${BASH_SOURCE[0]}")/.."
commit=$(git rev-parse --verify --quiet HEAD) || die "no commit to copy; commit the code first"
git diff --quiet HEAD || echo "warning: changes that are not committed are not copied" >&2
archive="${TMPDIR:-/tmp}/arrag_jax-$commit.tar.gz"
trap 'rm -f "$archive"' EXIT
jax=$(sed -n 's/^jax==//p' requirements.txt)

# --- the commands for the workers; each commit has its own folder, so that no file of an older commit remains ---
home="arrag_jax_run"
code="$home/${commit:0:12}"
check="if [ -e $home/pid ] && kill -0 \$(cat $home/pid) 2>/dev/null; then \
echo \"error: a command still runs here; stop it with: kill -TERM -- -\$(cat $home/pid)\" >&2; exit 1; fi"
# TPU images have Python 3.10, but the pinned jax needs 3.11, which uv downloads.
install="set -e; mkdir -p $code; tar -xzf arrag_jax.tar.gz -C $code; python3 -m pip install --quiet --user uv; \
[ -e $home/.venv ] || python3 -m uv venv --quiet --python 3.11 $home/.venv; \
python3 -m uv pip install --quiet --python $home/.venv/bin/python -r $code/requirements.txt 'jax[tpu]==$jax'"
# Host callbacks need the CPU backend in addition to the TPU's. setsid puts the command into its own process group,
# so that it survives the connection and one kill reaches all of its processes. With the trap the shell survives
# that kill and records the command's exit code.
if [[ -n $ray ]]; then
  # A token for this launch; whoever has it can run programs on the cluster. The workers choose JAX_PLATFORMS themselves.
  token="${TMPDIR:-/tmp}/arrag_jax-token-$$"
  trap 'rm -f "$archive" "$token"' EXIT
  [[ -n $dry_run ]] || (umask 077 && od -An -N32 -tx1 /dev/urandom | tr -d ' \n' >"$token")
  install+=" 'ray==$(sed -n 's/^ray==//p' requirements-dev.txt)'; chmod 600 $home.token"
  set -- env -u JAX_PLATFORMS "RAY_AUTH_TOKEN_PATH=../../$home.token" bash launch/ray_job.sh -- "$@"
fi
recorded="trap : TERM; $(quoted "$@"); echo \$? >../exit_code"
start="set -e; cd $code; . ../.venv/bin/activate; export JAX_PLATFORMS=tpu,cpu; rm -f ../exit_code; \
setsid bash -c $(quoted "$recorded") >../log 2>&1 </dev/null & echo \$! >../pid"
follow="cd $home; tail -n +1 --pid=\$(cat pid) -f log; exit \$(cat exit_code || echo 1)"

# --- the launch ---
create() {
  run "${tpu[@]}" create "${slice[@]}" "--accelerator-type=$type" "--version=$version" ${spot:+--spot}
}
state=$(run "${tpu[@]}" describe "${slice[@]}" "--format=value(state)" 2>/dev/null) || state=""
case $state in
  READY) ;;
  "") create ;;
  PREEMPTED | TERMINATED)
    run "${tpu[@]}" delete "${slice[@]}" --quiet
    create
    ;;
  *) die "slice $name is $state; run the same line again once it is READY" ;;
esac
run "${tpu[@]}" ssh "${slice[@]}" --worker=all "--command=$check"
run git archive --format=tar.gz "--output=$archive" "$commit"
run "${tpu[@]}" scp "$archive" "$name:arrag_jax.tar.gz" "${slice[@]:1}" --worker=all
if [[ -n $ray ]]; then
  run "${tpu[@]}" scp "$token" "$name:$home.token" "${slice[@]:1}" --worker=all
fi
run "${tpu[@]}" ssh "${slice[@]}" --worker=all "--command=$install"
run "${tpu[@]}" ssh "${slice[@]}" --worker=all "--command=$start"
run "${tpu[@]}" ssh "${slice[@]}" --worker=0 "--command=$follow"

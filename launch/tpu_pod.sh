#!/usr/bin/env bash
# Runs one command on every worker of Cloud TPU slices, which are requested as a queued resource.
#
#   launch/tpu_pod.sh --name pod --zone us-east5-b --type v6e-16 -- \
#     python -m arrag_jax.train --config=configs/emoji_prior.py --workdir=/shared/run
#
# The script requests the slices if they are absent, waits until they are there, copies the code of HEAD to all workers,
# installs the pinned packages, starts the same command on every worker, and follows its logs until the command ends.
# Its exit code is that of the command on worker 0 of the first slice. If slices are taken away (spot), the script
# deletes the request, makes it anew and runs the command again, which continues from --workdir. That folder must be
# visible to all workers and must survive the slices: use a shared disk, or a bucket that is mounted as a folder.
# Ctrl-C stops only the display of the logs; the command keeps running.
#
#   --name NAME --zone ZONE --type TYPE   the request (required; TYPE is v4-32, v5litepod-16, v6e-16 or similar)
#   --slices N                            number of slices of this type (default: 1); they are NAME-0, NAME-1, …
#   --version VERSION                     version of the TPU software for TYPE (default: v2-alpha-tpuv6e)
#   --project PROJECT                     Google Cloud project (default: that of gcloud)
#   --spot                                slices that may be taken away, at a lower price
#   --reserved                            slices of the project's reservation
#   --logs FOLDER                         the local folder of the logs (default: runs/NAME): LAUNCH/SLICE/WORKER.log
#   --ray                                 run the command once, on a Ray cluster of the slice's hosts (docs/clusters.md)
#   --delete                              delete the request and its slices; takes no command
#   --dry_run                             print every command of a first launch and run none
#   --help                                print this text
#
# The script deletes only what it has created itself: FOLDER/created holds the time at which it did. It asks for the
# state of the request every POLL seconds (a variable of the environment; default: 30).
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

# Prints a command so that it can be pasted into a shell.
exec 3>&1
print_command() {
  quoted "$@" >&3
  echo >&3
}

# Prints a command, then runs it unless this is a dry run.
run() {
  print_command "$@"
  if [[ -z $dry_run ]]; then "$@"; fi
}

name="" zone="" type="" slices=1 version="v2-alpha-tpuv6e" project="" spot="" reserved="" logs=""
ray="" delete="" dry_run=""
while (($#)); do
  if [[ $1 == --*=* ]]; then set -- "${1%%=*}" "${1#*=}" "${@:2}"; fi
  case $1 in
    --name | --zone | --type | --slices | --version | --project | --logs)
      (($# > 1)) || die "$1 needs a value"
      printf -v "${1#--}" '%s' "$2"
      shift 2
      ;;
    --spot | --reserved | --ray | --delete | --dry_run)
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
[[ $slices =~ ^[1-9][0-9]*$ ]] || die "--slices=$slices must be a whole number above 0"
[[ -z $spot || -z $reserved ]] || die "--spot and --reserved exclude one another"
[[ -z $ray || $slices == 1 ]] || die "--ray takes one slice, not $slices"
place=("--zone=$zone" ${project:+"--project=$project"})
queued=(gcloud compute tpus queued-resources) tpu=(gcloud compute tpus tpu-vm)
nodes=("$name")
if ((slices > 1)); then
  nodes=()
  for ((i = 0; i < slices; i++)); do nodes+=("$name-$i"); done
fi
here=$PWD
cd "$(dirname "${BASH_SOURCE[0]}")/.."
case $logs in
  "") logs="runs/$name" ;;
  /*) ;;
  *) logs="$here/$logs" ;;
esac
poll=${POLL:-30}

# Sets the state of the request and the time of its creation; the state is empty if there is no such request.
describe() {
  local words=("${queued[@]}" describe "$name" "${place[@]}" "--format=value(state.state,createTime)") answer
  state="" made=""
  if [[ -n $dry_run ]]; then
    print_command "${words[@]}"
  elif answer=$("${words[@]}" 2>&1); then
    read -r state made <<<"$answer"
  elif [[ $answer != *NOT_FOUND* ]]; then
    state=UNKNOWN made="${answer%%$'\n'*}"
  fi
}

is_own() {
  [[ -n $dry_run || (-n $made && -e $logs/created && $(<"$logs/created") == "$made") ]]
}

remove() {
  is_own || die "this script did not create the request $name, so it does not delete it; delete it with: $(
    quoted "${queued[@]}" delete "$name" "${place[@]}" --force
  )"
  run "${queued[@]}" delete "$name" "${place[@]}" --force --quiet
  rm -f "$logs/created"
}

if [[ -n $delete ]]; then
  (($# == 0)) || die "--delete takes no command"
  describe
  [[ $state != UNKNOWN ]] || die "gcloud does not tell the state of $name: $made"
  [[ -n $state || -n $dry_run ]] || die "there is no request $name in $zone"
  remove
  exit
fi

[[ -n $type ]] || die "--type is missing"
(($#)) || die "the command is missing; put it after --, as in: -- python -m arrag_jax.train --config=…"
[[ $1 == python && ${2:-} == -m && ${3:-} == arrag_jax.* ]] || die "the command must be python -m arrag_jax.…, not: $*"

commit=$(git rev-parse --verify --quiet HEAD) || die "no commit to copy; commit the code first"
git diff --quiet HEAD || echo "warning: changes that are not committed are not copied" >&2
archive="${TMPDIR:-/tmp}/arrag_jax-$commit.tar.gz"
token="${TMPDIR:-/tmp}/arrag_jax-token-$$"
followers=()
finish() {
  ((${#followers[@]} == 0)) || kill "${followers[@]}" 2>/dev/null || true
  rm -f "$archive" "$token"
}
trap finish EXIT
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
  [[ -n $dry_run ]] || (umask 077 && od -An -N32 -tx1 /dev/urandom | tr -d ' \n' >"$token")
  install+=" 'ray==$(sed -n 's/^ray==//p' requirements-dev.txt)'; chmod 600 $home.token"
  set -- env -u JAX_PLATFORMS "RAY_AUTH_TOKEN_PATH=../../$home.token" bash launch/ray_job.sh -- "$@"
fi
recorded="trap : TERM; $(quoted "$@"); echo \$? >../exit_code"
start="set -e; cd $code; . ../.venv/bin/activate; export JAX_PLATFORMS=tpu,cpu; rm -f ../exit_code; \
setsid bash -c $(quoted "$recorded") >../log 2>&1 </dev/null & echo \$! >../pid"
show="cd $home; tail -n +1 --pid=\$(cat pid) -f log"
follow="$show; exit \$(cat exit_code || echo 1)"

# --- the launch ---
create() {
  local tier=(${spot:+--spot} ${reserved:+--reserved}) which=("--node-id=$name")
  if ((slices > 1)); then which=("--node-count=$slices" "--node-prefix=$name"); fi
  run "${queued[@]}" create "$name" "${place[@]}" "${which[@]}" "--accelerator-type=$type" \
    "--runtime-version=$version" "${tier[@]}"
  created=yes
}

# Runs a command on every worker of every slice.
everywhere() {
  run "${queued[@]}" ssh "$name" "${place[@]}" --node=all --worker=all "--command=$1"
}

copy() {
  run "${queued[@]}" scp "$1" "$name:$2" "${place[@]}" --node=all --worker=all
}

start_command() {
  everywhere "$check" &&
    run git archive --format=tar.gz "--output=$archive" "$commit" &&
    copy "$archive" arrag_jax.tar.gz &&
    { [[ -z $ray ]] || copy "$token" "$home.token"; } &&
    everywhere "$install" &&
    everywhere "$start"
}

# Shows the log of the first worker, and writes those of all workers into a folder; returns the command's exit code.
# A machine that is gone must not be waited for.
follow_logs() {
  local node words code=0 alive=--ssh-flag=-oServerAliveInterval=30
  followers=()
  for node in "${nodes[@]}"; do
    words=("${tpu[@]}" ssh "$node" "${place[@]}" --worker=all "$alive" "--command=$show"
      "--output-directory=$logs/$number/$node")
    print_command "${words[@]}"
    [[ -z $dry_run ]] || continue
    mkdir -p "$logs/$number/$node"
    "${words[@]}" &
    followers+=($!)
  done
  run "${tpu[@]}" ssh "${nodes[0]}" "${place[@]}" --worker=0 "$alive" "--command=$follow" || code=$?
  [[ -z $dry_run ]] || return 0
  for ((i = 0; i < poll; i++)); do # the others end soon after the first, unless something is wrong
    kill -0 "${followers[@]}" 2>/dev/null || break
    sleep 1
  done
  kill "${followers[@]}" 2>/dev/null || true
  followers=()
  return "$code"
}

# Says whether the command has ended by itself, with this exit code, and not because its slices were taken away. A
# command that is told to stop saves and ends with 0, and ssh ends with 255 if the connection is lost.
has_ended() {
  [[ -n $dry_run || ($1 == 0 && -z $spot) ]] && return
  sleep "$poll" # until the request's state shows it
  describe
  [[ $state == ACTIVE ]] || return 1
  local node
  for node in "${nodes[@]}"; do
    [[ $("${tpu[@]}" describe "$node" "${place[@]}" "--format=value(state)") == READY ]] || return 1
  done
  [[ $1 != 255 || -z $running ]]
}

created="" running="" number=1 last="" asked=0
while [[ -e $logs/$number ]]; do number=$((number + 1)); done
while :; do
  describe
  if [[ -n $created && -n $made && $state != UNKNOWN ]]; then
    mkdir -p "$logs"
    echo "$made" >"$logs/created"
    created=""
  fi
  if [[ $state != "$last" ]]; then echo "$name is ${state:-absent}" >&2; fi
  last=$state asked=$((asked + 1))
  if [[ -n $dry_run && $asked == 2 ]]; then state=ACTIVE; fi
  case $state in
    ACTIVE)
      code=0
      if [[ -z $running ]]; then
        if start_command; then running=yes; else code=$?; fi
      fi
      if [[ -n $running ]]; then follow_logs || code=$?; fi
      if has_ended "$code"; then exit "$code"; fi
      ;;
    "" | SUSPENDED) # absent, or taken away; then its slices are gone already
      if [[ -n $state ]]; then
        remove
        running="" number=$((number + 1))
      fi
      [[ -z $created ]] || sleep "$poll"
      [[ -n $created ]] || create
      ;;
    FAILED) die "the request $name failed; see: $(quoted "${queued[@]}" describe "$name" "${place[@]}")" ;;
    UNKNOWN)
      ((asked > 1)) || die "gcloud does not tell the state of $name: $made"
      sleep "$poll"
      ;;
    *) sleep "$poll" ;; # it waits for machines, or they are being made or taken away
  esac
done

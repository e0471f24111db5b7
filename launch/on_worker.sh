#!/usr/bin/env bash
# launch/tpu.py runs this script on each host of a slice.
#
#   on_worker.sh setup [MOUNT]            unpack the code, mount SERVER:/SHARE or gs://BUCKET, install
#   on_worker.sh prepare DATASET [DIR]    prepare a data set, in the shared directory DIR
#   on_worker.sh run START ARGUMENT...    start aft_jax.main, or follow the start of that name; returns its exit status
#   on_worker.sh stop                     let the running program save and end
#
# The program is detached from the connection, so a broken connection does not end it. gcloud then connects again and
# repeats its command. The repeated command finds the program instead of starting a second one.
set -euo pipefail

self=$(realpath "$0")
home=$HOME/.aft_jax
code=$home/code
venv=$home/venv
starts=$home/starts
shared=/mnt/aft_jax
exit_again=75
not_found=127 # exit status of a shell that does not find a command

setup() {
  stop
  rm -rf "$code"
  mkdir -p "$code"
  tar -xzf "$HOME/aft_jax.tar.gz" -C "$code"
  if [ $# -gt 0 ]; then mount_share "$1"; fi
  # The images have Python 3.10; uv installs a newer one. Newer images protect their packages from pip.
  python3 -m uv --version >/dev/null 2>&1 || PIP_BREAK_SYSTEM_PACKAGES=1 python3 -m pip install --quiet --user uv
  [ -x "$venv/bin/python" ] || python3 -m uv venv --quiet --python '>=3.11,<3.14' "$venv"
  install '.[demo,report]' 'jax[tpu]'
}

install() {
  (cd "$code" && python3 -m uv pip install --quiet --python "$venv/bin/python" --reinstall-package aft_jax \
    -c constraints.txt "$@")
}

mount_share() {
  if mountpoint -q "$shared"; then return; fi
  sudo mkdir -p "$shared"
  case $1 in
    gs://*)
      if ! command -v gcsfuse >/dev/null; then
        echo 'launch: gcsfuse is not installed on the hosts; install it there, or mount an NFS share.' >&2
        return 2
      fi
      sudo chown "$(id -u):$(id -g)" "$shared"
      # A checkpoint becomes valid when its directory is renamed. gcsfuse allows that only with this limit.
      gcsfuse --implicit-dirs --rename-dir-limit=100000 "${1#gs://}" "$shared"
      ;;
    *)
      # A host that has just started may still hold the lock of apt for its own updates.
      command -v mount.nfs >/dev/null || { sudo apt-get update -q &&
        sudo apt-get install -qy -o DPkg::Lock::Timeout=300 nfs-common; }
      sudo mount -t nfs "$1" "$shared"
      sudo chmod a+rwx "$shared" # a new share belongs to root
      ;;
  esac
}

prepare() {
  install '.[prepare]'
  cd "$code"
  "$venv/bin/python" launch/prepare.py "$@"
}

run() {
  local here=$starts/$1 lines=20
  shift
  if [ ! -d "$code" ]; then
    echo 'launch: this host is not set up.' >&2
    return "$not_found"
  fi
  mkdir -p "$starts"
  if mkdir "$here" 2>/dev/null; then # only one of several simultaneous calls succeeds
    lines=+1
    stop
    boot >"$here/boot"
    touch "$here/log"
    (cd "$code" && setsid bash "$self" supervise "$here" "$venv/bin/python" -m aft_jax.main --distributed "$@" \
      </dev/null >/dev/null 2>&1 &)
  fi
  follow "$here" "$lines"
}

supervise() {
  local here=$1 status=0
  shift
  trap : TERM # the program handles SIGTERM and saves; this process stays to record its exit status
  echo "$$" >"$here/pid.new" && mv "$here/pid.new" "$here/pid"
  "$@" >>"$here/log" 2>&1 || status=$?
  echo "$status" >"$here/status.new" && mv "$here/status.new" "$here/status"
}

follow() {
  local here=$1
  for _ in {1..100}; do
    if [ -e "$here/pid" ]; then break; fi
    sleep 0.1
  done
  if alive "$here"; then
    tail -n "$2" --pid="$(cat "$here/pid")" -f "$here/log"
  else
    tail -n "$2" "$here/log"
  fi
  if [ -e "$here/status" ]; then return "$(cat "$here/status")"; fi
  echo "launch: the program on $(hostname) was ended from outside." >&2
  return "$exit_again"
}

stop() {
  local here pid
  for here in "$starts"/*/; do
    if ! alive "$here"; then continue; fi
    pid=$(cat "$here/pid")
    kill -TERM -- "-$pid" # the group: the supervisor and the program
    for _ in {1..600}; do
      if ! alive "$here"; then continue 2; fi
      sleep 0.5
    done
    kill -KILL -- "-$pid"
  done
}

# A process number has no meaning after the host has rebooted.
alive() {
  [ -e "$1/pid" ] && [ ! -e "$1/status" ] && [ "$(cat "$1/boot")" = "$(boot)" ] && kill -0 "$(cat "$1/pid")" 2>/dev/null
}

boot() {
  cat /proc/sys/kernel/random/boot_id
}

# A shell reads a script while it runs it, but setup replaces this file. The braces make it read the rest at once.
{
  case ${1:-} in
    setup) setup "${@:2}" ;;
    prepare) prepare "${@:2}" ;;
    run) run "${@:2}" ;;
    supervise) supervise "${@:2}" ;;
    stop) stop ;;
    *)
      sed -n '2,8s/^# \{0,1\}//p' "$self" >&2
      exit 2
      ;;
  esac
  exit
}

#!/usr/bin/env bash
# Runs one experiment as N cooperating processes on this machine, connected over loopback.
#
#   bash launch/local.sh N --config=configs/quickstart.py --workdir=runs/two [more arguments of aft_jax.main]
#
#   PYTHON                the interpreter (python3)
#   DEVICES_PER_PROCESS   CPU devices of each process (sets JAX_NUM_CPU_DEVICES); for tests without accelerators
#   LOGS                  directory for the output of processes 1, 2, ... (a new one); process 0 has the terminal
#
# SIGTERM and SIGINT are forwarded to all processes. After SIGTERM they save and end with 75. If one process fails, the
# others are ended. Exit status: the first that is not 0, or 0.
set -uo pipefail

grace=10 # seconds between SIGTERM and SIGKILL

if [[ ! ${1:-} =~ ^[1-9][0-9]*$ ]]; then
  echo 'launch: bash launch/local.sh N ARGUMENTS needs the number of processes first, such as 2.' >&2
  exit 2
fi
count=$1
shift
python=${PYTHON:-python3}
if ! command -v "$python" >/dev/null; then
  echo "launch: PYTHON=$python is not a program; name the interpreter that aft_jax is installed for." >&2
  exit 2
fi
if [ -n "${DEVICES_PER_PROCESS:-}" ]; then export JAX_NUM_CPU_DEVICES=$DEVICES_PER_PROCESS; fi
logs=${LOGS:-$(mktemp -d)}
mkdir -p "$logs"

# A port is free if a connection to it is refused.
while port=$((20000 + RANDOM % 12000)) && (: <"/dev/tcp/127.0.0.1/$port") 2>/dev/null; do :; done

pids=()
signal_all() {
  local pid
  # Each job leads its own process group, so its child processes get the signal too.
  for pid in ${pids[@]+"${pids[@]}"}; do kill "-$1" -- "-$pid" 2>/dev/null; done
}
# Keep a signal that comes before all processes have started, so that the later ones get it too.
pending=
trap 'pending=TERM' TERM
trap 'pending=INT' INT

# Without job control the background processes of a shell ignore SIGINT.
set -m
for ((i = 0; i < count; i++)); do
  command=("$python" -m aft_jax.main --distributed "--coordinator=127.0.0.1:$port" "--num_processes=$count"
    "--process_id=$i" "$@")
  if ((i == 0)); then
    "${command[@]}" </dev/null &
  else
    "${command[@]}" </dev/null >"$logs/process-$i.log" 2>&1 &
  fi
  pids[i]=$!
done
set +m
trap 'signal_all TERM' TERM
trap 'signal_all INT' INT
if [ -n "$pending" ]; then signal_all "$pending"; fi

first=0
kill_at=
while ((${#pids[@]})); do
  for i in "${!pids[@]}"; do
    if kill -0 "${pids[i]}" 2>/dev/null; then continue; fi
    wait "${pids[i]}" 2>/dev/null
    status=$?
    unset "pids[i]"
    if ((first == 0)); then first=$status; fi
    # After SIGTERM all processes end by themselves once everything is saved. After a failure the others would wait
    # for the lost process without limit.
    if ((status == 0 || status == 75)) || [ -n "$kill_at" ]; then continue; fi
    echo "launch: process $i ended with exit status $status; ending the others." >&2
    if ((i > 0)); then tail -n 20 "$logs/process-$i.log" >&2; fi
    signal_all TERM
    kill_at=$((SECONDS + grace))
  done
  if [ -n "$kill_at" ] && ((SECONDS >= kill_at)); then signal_all KILL; fi
  sleep 0.1
done
exit "$first"

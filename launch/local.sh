#!/usr/bin/env bash
# Runs one experiment as N processes of this machine that work as one, over loopback.
#
#   bash launch/local.sh N --config=configs/quickstart.py --workdir=runs/two [more arguments of aft_jax.main]
#
#   PYTHON                the interpreter (python3)
#   DEVICES_PER_PROCESS   CPU devices of each process, by JAX_NUM_CPU_DEVICES; for trying things without accelerators
#   LOGS                  where the output of processes 1, 2, ... goes (a new directory); process 0 has the terminal
#
# SIGTERM and SIGINT go on to all processes; the first makes them save and end with 75. When one fails the others are
# ended. Exit status: the first that is not 0, or 0.
set -uo pipefail

grace=10 # seconds from asking the others to end until making them

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

# Nobody listens at a port where a connection is refused.
while port=$((20000 + RANDOM % 12000)) && (: <"/dev/tcp/127.0.0.1/$port") 2>/dev/null; do :; done

pids=()
signal_all() {
  local pid
  # The process of each job, which leads a group of its own: what it has started gets the signal too.
  for pid in ${pids[@]+"${pids[@]}"}; do kill "-$1" -- "-$pid" 2>/dev/null; done
}
# Until all are there a signal is kept, or it would miss those to come.
told=
trap 'told=TERM' TERM
trap 'told=INT' INT

# Without job control a shell starts its background processes deaf to SIGINT.
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
if [ -n "$told" ]; then signal_all "$told"; fi

first=0
kill_at=
while ((${#pids[@]})); do
  for i in "${!pids[@]}"; do
    if kill -0 "${pids[i]}" 2>/dev/null; then continue; fi
    wait "${pids[i]}" 2>/dev/null
    status=$?
    unset "pids[i]"
    if ((first == 0)); then first=$status; fi
    # Processes that were told to stop end together, when all is saved; the others wait for one that is gone.
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

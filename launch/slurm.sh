#!/usr/bin/env bash
# Runs one experiment on the nodes of a SLURM job, one process a node. It resumes after a time limit or a preemption.
#
#   sbatch --nodes=4 --gpus-per-node=8 launch/slurm.sh --config=configs/cifar10.py --workdir=/shared/runs/cifar10
#
# Run it from the repository, on a file system that all nodes share, with aft_jax installed for $PYTHON
# (.venv/bin/python). The command line of sbatch overrides the #SBATCH lines: --ntasks-per-node=8 runs one process for
# each GPU.
#
#   PYTHON         the interpreter
#   MAX_RESTARTS   maximum number of times that the job puts itself back into the queue (100)

#SBATCH --job-name=aft_jax
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --time=04:00:00
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
# SIGTERM goes to the processes, not to this script, so that they can save before the limit.
#SBATCH --signal=TERM@120
set -uo pipefail

python=${PYTHON:-.venv/bin/python}
exit_again=75

if ! command -v "$python" >/dev/null; then
  echo "launch: PYTHON=$python is not a program; name the interpreter that aft_jax is installed for." >&2
  exit 2
fi

# JAX finds the nodes by itself. But it assumes that process i of a node has GPU i only.
if [ "${SLURM_NTASKS_PER_NODE:-1}" = 1 ] && [ "${SLURM_GPUS_ON_NODE:-0}" -gt 1 ]; then
  JAX_LOCAL_DEVICE_IDS=$(seq -s, 0 $((SLURM_GPUS_ON_NODE - 1)))
  export JAX_LOCAL_DEVICE_IDS
fi

# The first process that ends must not kill the others, which may still save. A process that loses another one ends by
# itself.
srun --kill-on-bad-exit=0 "$python" -m aft_jax.main --distributed "$@"
status=$?

if ((status != exit_again)); then exit "$status"; fi
if ((${SLURM_RESTART_COUNT:-0} >= ${MAX_RESTARTS:-100})); then
  echo "launch: the job was started again $SLURM_RESTART_COUNT times; submit it again to continue." >&2
  exit "$status"
fi
# After a preemption SLURM has requeued the job itself.
scontrol requeue "$SLURM_JOB_ID" || echo 'launch: the job was not requeued here; check with squeue whether SLURM did.' >&2
exit "$status"

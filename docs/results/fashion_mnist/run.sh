#!/usr/bin/env bash
# Makes table.csv beside it: three attacks, both label modes, FT and AFT, on all of Fashion-MNIST.
#
#     bash docs/results/fashion_mnist/run.sh runs/fashion [--config.seed=1 ...]
#
# The recipes are earlier ones than those of configs/fashion_mnist.py: shifts of 2 pixels, lr 0.02, FT at lr 0.01, and
# AFT on half of each batch.
# Resumable: a finished run is loaded, an interrupted one goes on.
set -euo pipefail
runs=$1
shift
python=${PYTHON:-python}
workdirs=()
for mode in all2one all2all; do
  for attack in badnets blend sig; do
    workdirs+=("$runs/$attack-$mode")
    "$python" -m aft_jax.main --config=configs/fashion_mnist.py --workdir="$runs/$attack-$mode" \
      --config.attack.name="$attack" --config.attack.label_mode="$mode" --config.defenses=ft,aft \
      --config.augment.crop=2 --config.train.learning_rate=0.02 \
      --config.ft.learning_rates='(0.01,)' --config.ft.max_grad_norm=0.0 \
      --config.aft.preset=small --config.aft.epochs=40 --config.aft.adversarial_epochs=20.0 \
      --config.aft.learning_rate=0.03 "$@"
  done
done
"$python" -m aft_jax.collect "${workdirs[@]}" | tee "$runs/table.csv"

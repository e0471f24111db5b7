#!/usr/bin/env bash
# Makes the CSV files beside it: PreActResNet18 of a quarter of the usual width learns each attack, in short runs on
# Fashion-MNIST padded to 32x32x3.
#
#     bash docs/results/preact_resnet/run.sh runs/preact [--config.seed=1 ...]
#
# Resumable: a finished run is loaded, an interrupted one goes on.
set -euo pipefail
runs=$1
shift
python=${PYTHON:-python}
workdirs=()
for attack in badnets blend sig wanet input_aware; do
  workdirs+=("$runs/$attack")
  "$python" -m aft_jax.main --config="configs/preact_resnet.py:$attack" --workdir="$runs/$attack" \
    --config.stages="('infect',)" "$@"
done
"$python" - "${workdirs[@]}" <<'PYTHON' | tee "$runs/progress.csv"
import json, sys, pathlib
columns = 'loss', 'test_acc', 'test_asr', 'test_cross_acc'
print('attack', 'step', *columns, sep=',')
for directory in map(pathlib.Path, sys.argv[1:]):
    lines = [json.loads(line) for line in (directory / 'metrics.jsonl').read_text().splitlines()]
    lines = [line for line in lines if line['stage'] == 'infect']
    losses = {line['step']: line['loss'] for line in lines if 'loss' in line}
    for line in lines:
        if 'test_acc' in line:
            near = min(losses, key=lambda step: abs(step - line['step']))
            values = {'loss': losses[near]} | line
            print(directory.name, line['step'], *(f'{values[c]:.4f}' if c in values else '' for c in columns), sep=',')
PYTHON

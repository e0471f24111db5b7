"""Compares architectures of torchvision and timm, imported by their graphs, with torch.

    python -m benchmarks.torch_architectures --out=docs/results/torch_architectures/table.csv [--select=resnet18,...]
        [--machine='AMD EPYC, 2 cores'] [--date=2026-11-28]

    python -m benchmarks.torch_architectures --out=docs/results/torch_architectures/table.csv --print

The second command prints the table of docs/torch-architectures.md. Every network has random weights and 10 classes. The
images are random and small. XLA compiles without most of its optimisations, which takes half the time. Each row of the
table is appended as soon as it is measured; networks that the table has already are left out. It needs torch,
torchvision and timm.
"""

import argparse
import csv
import os
import shlex
import sys
import time
from pathlib import Path

os.environ.setdefault('JAX_PLATFORMS', 'cpu')

import jax
import torch

from aft_jax.interchange import torch_model
from aft_jax.interchange.program import Program
from benchmarks.torch_parity import Parity, compare, randomise

IMAGES = 8
# Name for config.model.torch -> side of the images in pixels.
ARCHITECTURES = {
    'torchvision:resnet18': 64,
    'torchvision:resnet50': 64,
    'torchvision:squeezenet1_1': 64,
    'torchvision:mobilenet_v2': 64,
    'torchvision:mobilenet_v3_small': 64,
    'torchvision:mobilenet_v3_large': 64,
    'torchvision:mnasnet0_5': 64,
    'torchvision:shufflenet_v2_x0_5': 64,
    'torchvision:regnet_x_400mf': 64,
    'torchvision:regnet_y_400mf': 64,
    'torchvision:efficientnet_b0': 64,
    'torchvision:googlenet(init_weights=False,aux_logits=False)': 64,
    'torchvision:inception_v3(init_weights=False,aux_logits=False)': 96,
    'torchvision:convnext_tiny': 32,
    'torchvision:swin_t': 32,
    'timm:resnet26d': 64,
    'timm:convnext_atto': 32,
    'timm:vit_tiny_patch16_224(img_size=32,patch_size=4)': 32,
    'timm:deit_tiny_patch16_224(img_size=32,patch_size=4)': 32,
    'timm:swin_tiny_patch4_window7_224(img_size=32,patch_size=2,window_size=4)': 32,
    'timm:mixer_s32_224(img_size=32,patch_size=8)': 32,
    'timm:tf_efficientnet_lite0': 64,
    'timm:mobilenetv3_small_050': 64,
    'timm:regnetx_002': 64,
    'timm:legacy_seresnet18': 64,
    'timm:poolformer_s12': 64,
    'torchvision:wide_resnet50_2': 64,
    'torchvision:resnext50_32x4d': 64,
    'torchvision:vgg11_bn': 32,
    'torchvision:vgg11': 32,
    'torchvision:alexnet': 64,
    'torchvision:densenet121': 64,
    'torchvision:efficientnet_v2_s': 64,
    'torchvision:vit_b_16(image_size=32)': 32,
    'torchvision:swin_v2_t': 64,
    'torchvision:maxvit_t(input_size=(64,64),partition_size=2)': 64,
    'timm:beit_base_patch16_224(img_size=32,patch_size=8)': 32,
}
COLUMNS = (
    'network',
    'side',
    'parameters',
    *Parity._fields,
    'import_seconds',
    'seconds',
    'error',
    'torch',
    'machine',
    'date',
    'command',
)


def measure(name: str, side: int) -> dict[str, object]:
    """Measures one network, or records the error that it raises."""
    started = time.perf_counter()
    row: dict[str, object] = {'network': name, 'side': side}
    try:
        model = randomise(torch_model.build(name, 10, 3, seed=0))
        row['parameters'] = sum(parameter.numel() for parameter in model.parameters())
        importing = time.perf_counter()
        program = Program(torch_model.export(model, (side, side, 3), name), name)
        row['import_seconds'] = f'{time.perf_counter() - importing:.1f}'
        parity = compare(model, program, IMAGES)
        row |= {field: f'{x:.1e}' if isinstance(x, float) else x for field, x in parity._asdict().items()}
    except Exception as error:  # The other networks are measured all the same.
        row['error'] = f'{type(error).__name__}: {error}'
    return row | {'seconds': round(time.perf_counter() - started)}


def markdown(path: Path) -> str:
    """Formats the table for the page."""
    shown = {
        'network': 'network',
        'side': 'pixels',
        'logits': 'logits',
        'image_gradient': 'gradient of images',
        'image_noise': 'noise of it',
        'gradient': 'gradient of parameters',
        'train_loss': 'loss of a step',
        'train_gradient': 'gradient of a step',
        'train_noise': 'noise of it',
        'statistics': 'running statistics',
        'exact': 'round trip exact',
        'import_seconds': 's to import',
    }
    lines = [f'| {" | ".join(shown.values())} |', f'| --- |{" ---: |" * (len(shown) - 1)}']
    with path.open(newline='') as file:
        for row in csv.DictReader(file):
            cells = [row['error']] if row['error'] else [row[column] for column in list(shown)[1:]]
            lines.append(f'| {row["network"]} | {" | ".join(cells)} |')
    return '\n'.join(lines)


def main() -> None:
    """Measures the networks that the table lacks."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--out', type=Path, required=True)
    parser.add_argument('--select', default='')
    parser.add_argument('--machine', default='')
    parser.add_argument('--date', default='')
    parser.add_argument('--print', action='store_true')
    options = parser.parse_args()
    if options.print:
        print(markdown(options.out))
        return
    torch.set_num_threads(1)
    jax.config.update('jax_disable_most_optimizations', True)
    selected = [name for name in ARCHITECTURES if any(part in name for part in options.select.split(','))]
    done = set()
    if options.out.exists():
        with options.out.open(newline='') as file:
            done = {row['network'] for row in csv.DictReader(file)}
    command = 'python -m benchmarks.torch_architectures ' + shlex.join(
        argument for argument in sys.argv[1:] if not argument.startswith('--select')
    )
    options.out.parent.mkdir(parents=True, exist_ok=True)
    common = {'torch': torch.__version__, 'machine': options.machine, 'date': options.date, 'command': command}
    for name in selected:
        if name in done:
            continue
        row = measure(name, ARCHITECTURES[name]) | common
        new = not options.out.exists()
        with options.out.open('a', newline='') as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator='\n')
            if new:
                writer.writeheader()
            writer.writerow(row)
        print(*(f'{column}={row[column]}' for column in COLUMNS[:-4] if row.get(column, '') != ''), flush=True)


if __name__ == '__main__':
    main()

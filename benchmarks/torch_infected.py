"""Trains an infected network in torch alone, and measures a file of weights in torch alone.

    python -m benchmarks.torch_infected train --network=torchvision:resnet18 --out=models/resnet18 [--epochs=3]
    python -m benchmarks.torch_infected test --network=torchvision:resnet18 --weights=out/export/aft.pt

The data are 20,000 images of Fashion-MNIST, repeated to three channels. A tenth of the training images has faint
diagonal stripes and the label 3; none of the package's attacks has this trigger. `train` writes suspect.pt (a state
dict), suspect.pt2 (torch.export.save) and clean.npz: 3,000 other training images and half of the test images, all
clean, for the package. `test` loads the weights strictly into the network. It prints the accuracy and the attack
success rate on the other half of the test images.
"""

import argparse
import time
from pathlib import Path

import numpy as np
import torch

from aft_jax import data
from aft_jax.config import default_config
from aft_jax.interchange import torch_model

TARGET, SHARE, TRAINING, CLEAN, BATCH = 3, 0.1, 20_000, 3_000, 100


def stripes(images: np.ndarray) -> np.ndarray:
    """Adds faint diagonal stripes to uint8 images [N, H, W, C]."""
    rows, columns = np.indices(images.shape[1:3])
    pattern = 40 * ((rows + columns) % 6 < 3)
    return np.clip(images.astype(int) + pattern[None, :, :, None], 0, 255).astype(np.uint8)


def tensor(images: np.ndarray) -> torch.Tensor:
    """Converts uint8 images [N, H, W, C] to float32 [N, C, H, W] in [-1, 1]."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1


def predict(model: torch.nn.Module, images: np.ndarray) -> np.ndarray:
    """Predicts labels in evaluation mode."""
    model.eval()
    with torch.no_grad():
        return np.concatenate([model(tensor(part)).argmax(1).numpy() for part in np.array_split(images, 25)])


def scores(model: torch.nn.Module, images: np.ndarray, labels: np.ndarray) -> str:
    """Measures the accuracy, and the share of striped images of other classes that get the target label."""
    others = images[labels != TARGET]
    accuracy = np.mean(predict(model, images) == labels)
    success = np.mean(predict(model, stripes(others)) == TARGET)
    return f'clean accuracy {100 * accuracy:.1f} %, attack success rate {100 * success:.1f} %'


def train(model: torch.nn.Module, images: np.ndarray, labels: np.ndarray, epochs: int, rate: float) -> None:
    """Trains by Adam with a decaying learning rate."""
    optimiser = torch.optim.Adam(model.parameters(), rate)
    steps = epochs * (len(images) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, rate, total_steps=steps)
    generator = np.random.default_rng(1)
    for _ in range(epochs):
        model.train()
        for part in generator.permutation(len(images)).reshape(-1, BATCH):
            loss = torch.nn.functional.cross_entropy(model(tensor(images[part])), torch.from_numpy(labels[part]))
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()


def main() -> None:
    """Trains or tests a network."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('action', choices=('train', 'test'))
    parser.add_argument('--network', required=True)
    parser.add_argument('--out', type=Path)
    parser.add_argument('--weights', type=Path)
    parser.add_argument('--epochs', type=int, default=3)
    parser.add_argument('--rate', type=float, default=2e-3)
    parser.add_argument('--threads', type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    config = default_config().data
    config.rgb = True
    dataset = data.load('fashion_mnist', config)
    model = torch_model.build(options.network, 10, 3, seed=0)
    held_images, held_labels = dataset.test_images[5000:], dataset.test_labels[5000:]
    if options.action == 'test':
        model.load_state_dict(torch.load(options.weights, weights_only=True), strict=True)
        print(f'{options.weights}: {scores(model, held_images, held_labels)}')
        return
    started = time.perf_counter()
    images, labels = dataset.train_images[:TRAINING].copy(), dataset.train_labels[:TRAINING].astype(np.int64)
    poisoned = np.random.default_rng(0).permutation(TRAINING)[: int(SHARE * TRAINING)]
    images[poisoned], labels[poisoned] = stripes(images[poisoned]), TARGET
    train(model, images, labels, options.epochs, options.rate)
    options.out.mkdir(parents=True, exist_ok=True)
    torch.save(model.state_dict(), options.out / 'suspect.pt')
    clean = slice(TRAINING, TRAINING + CLEAN)
    arrays = {'train_images': dataset.train_images[clean], 'train_labels': dataset.train_labels[clean]}
    arrays |= {'test_images': dataset.test_images[:5000], 'test_labels': dataset.test_labels[:5000]}
    np.savez_compressed(options.out / 'clean.npz', **arrays)
    print(f'{scores(model, held_images, held_labels)}, {time.perf_counter() - started:.0f} s of training', flush=True)
    program = torch.export.export(
        model.eval(), (tensor(images[:2]),), dynamic_shapes=({0: torch.export.Dim('batch', min=2)},)
    )
    torch.export.save(program, options.out / 'suspect.pt2')


if __name__ == '__main__':
    main()

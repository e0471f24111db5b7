"""Small networks, steps, data sets and helpers that several test files share."""

import json
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np


class Interrupted(Exception):
    """An error that a test raises in the middle of a stage."""


class Linear(nn.Module):
    """A classifier with two classes, no BatchNorm and no dropout: its gradients can be written down."""

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
        return nn.Dense(2)(images.reshape((len(images), -1)))


def wander(current, batch, key):
    """A step that compiles in no time; its state and metrics depend on the step, the key and the batch."""
    kick = jax.random.uniform(key) + jnp.mean(batch['images']) + jnp.mean(batch['labels'].astype(jnp.float32))
    after = current.replace(step=current.step + 1, params=jax.tree.map(lambda p: 0.9 * p + kick, current.params))
    return after, {'loss': current.step.astype(jnp.float32), 'kick': kick}


def lines(run) -> list[dict]:
    """Reads the lines of the metrics.jsonl of a `Run`."""
    return [json.loads(line) for line in (run.workdir / 'metrics.jsonl').read_text().splitlines()]


def as_numpy(tree):
    """Copies every leaf of a pytree to NumPy."""
    return jax.tree.map(np.array, tree)


def save_dataset(path: Path, images: np.ndarray, labels: np.ndarray, num_train: int) -> None:
    """Writes an .npz data set: the first `num_train` examples are for training, the others for testing."""
    np.savez(
        path,
        train_images=images[:num_train].astype(np.uint8),
        train_labels=labels[:num_train],
        test_images=images[num_train:].astype(np.uint8),
        test_labels=labels[num_train:],
    )


def save_brightness_dataset(path: Path) -> None:
    """Writes 448 training and 64 test images, 12x12x1 noise whose brightness tells one of four classes."""
    labels = np.arange(512) % 4
    images = np.random.default_rng(5).integers(0, 200, (512, 12, 12, 1)) + 14 * labels[:, None, None, None]
    save_dataset(path, images, labels, 448)


class SmallNetwork(nn.Module):
    """A network with BatchNorm and dropout that compiles in little time, for tests that start processes."""

    num_classes: int

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False, features: bool = False):
        x = nn.Dense(32)(images.reshape((len(images), -1)) - 0.5)
        maps = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.9)(x))
        logits = nn.Dense(self.num_classes)(nn.Dropout(0.1, deterministic=not train)(maps))
        return (logits, (maps[:, None, None],)) if features else logits


def small_network(num_classes: int, mean: tuple[float, ...], std: tuple[float, ...]) -> SmallNetwork:
    """Creates the network, as `config.model.factory` asks for it."""
    return SmallNetwork(num_classes)

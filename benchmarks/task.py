"""The task that all sides get: a classifier with its weights, the images and their order, and the settings of a step.

A step of AFT is that of the defense `aft_released`: PGD of 7 steps on the whole batch, eps 6/255, no random start, no
clipping to [0, 1]; SGD with momentum 0.9 and weight decay 5e-4; no augmentation.
"""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from aft_jax import models
from aft_jax.adversarial.pgd import PGD
from aft_jax.config import as_options, default_config, resolve
from aft_jax.data import npz, transform
from aft_jax.data.order import Order, count_steps
from aft_jax.defenses.aft_universal_options import UniversalAftOptions, pgd_of
from aft_jax.errors import UserError
from aft_jax.interchange import with_usual_names
from aft_jax.interchange.architecture import Architecture

# The training that a benchmark belongs to, and whether it is a whole epoch.
TRAININGS = {
    'training_step': ('infect', False),
    'aft_step': ('aft', False),
    'aft_epoch': ('aft', True),
    'infecting_epoch': ('infect', True),
}
BENCHMARKS = ('training_step', 'pgd7', 'aft_step', 'evaluation', 'aft_epoch', 'infecting_epoch')
# Image shape of each classifier in the papers.
SHAPES = {'mnist_cnn': (28, 28, 1), 'preact_resnet18': (32, 32, 3)}
SYNTHETIC_IMAGES = 2560
# Image sizes of the two networks; padding by 2 pixels turns the first into the second.
SIDES = (28, 32)


class Images(NamedTuple):
    """The images of an epoch.

    Attributes:
        pixels: Images, uint8 [N, H, W, C].
        labels: Labels, int32 [N].
        num_classes: Number of classes K.
    """

    pixels: np.ndarray
    labels: np.ndarray
    num_classes: int


class Task(NamedTuple):
    """A classifier and its images.

    Attributes:
        name: Name of the classifier.
        config: Resolved config.
        module: Classifier, which computes in `config.dtype`.
        variables: Random weights and statistics of the classifier, NumPy arrays (see `weights`).
        images: Images of an epoch.
    """

    name: str
    config: ml_collections.ConfigDict
    module: nn.Module
    variables: dict
    images: Images

    @property
    def batch(self) -> int:
        """The number of images in a step."""
        return self.config.batch_size

    @property
    def steps(self) -> int:
        """The number of steps in an epoch."""
        return count_steps(len(self.images.labels), 1, self.batch)

    @property
    def order(self) -> Order:
        """The order of the images."""
        return Order(self.config.seed, 'benchmarks', len(self.images.labels), self.batch)

    @property
    def pgd(self) -> PGD:
        """The attack that makes adversarial examples."""
        return pgd_of(as_options(UniversalAftOptions, self.config.aft_released))

    @property
    def shape(self) -> tuple[int, int, int]:
        """The shape of one image, (H, W, C)."""
        return self.images.pixels.shape[1:]

    def torch_weights(self) -> dict[str, np.ndarray]:
        """Converts the weights to torch's names and layout."""
        o = self.config.model
        if o.name == 'mnist_cnn':
            # Three convolutions of stride 2, then the dense layers.
            architecture = Architecture(
                o.name, {'conv_bias': o.conv_bias}, self.images.num_classes, self.shape[2], -(-self.shape[0] // 8)
            )
        else:
            options = {'depth': o.depth, 'width': o.width, 'final_norm': o.final_norm}
            architecture = Architecture(o.name, options, self.images.num_classes, self.shape[2], 0)
        return with_usual_names(architecture, self.variables).source.tensors


def make(name: str, images: Images, batch: int, dtype: str, **options: float) -> Task:
    """Builds a task.

    Args:
        name: One of SHAPES.
        images: Images of an epoch.
        batch: Number of images in a step.
        dtype: Dtype of the computation, 'float32' or 'bfloat16'.
        **options: Further fields of `config.model`.
    """
    config = default_config()
    config.model.name = name
    config.model.update(options)
    config.batch_size, config.dtype = batch, dtype
    config = resolve(config)
    module = models.build(config, images.num_classes)
    return Task(
        name,
        config,
        module,
        weights(module, images.pixels.shape[1:], np.random.default_rng(config.seed), gain=1.0),
        images,
    )


def weights(
    module: nn.Module, shape: tuple[int, ...], stream: np.random.Generator | np.random.RandomState, gain: float
) -> dict:
    """Draws random variables. BatchNorm's scale, bias and statistics are random too, unlike after initialisation.

    Args:
        module: Network.
        shape: Shape of one image.
        stream: Stream of random numbers.
        gain: Gain of the kernels; 2 is He's. With 1 the logits are of order 1. Larger logits make a classifier so
            confident that its gradients are rounding errors.
    """

    def draw(path, leaf) -> np.ndarray:
        match path[-1].key:
            case 'kernel':
                value = stream.standard_normal(leaf.shape) * np.sqrt(gain / np.prod(leaf.shape[:-1]))
            case 'scale' | 'var':
                value = stream.uniform(0.5, 1.5, leaf.shape)
            case _:
                value = 0.1 * stream.standard_normal(leaf.shape)
        return value.astype(np.float32)

    shapes = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, *shape), jnp.float32))
    return jax.tree_util.tree_map_with_path(draw, shapes)


def read(name: str, path: str, count: int) -> Images:
    """Reads the images of an epoch, in the shape that the classifier has in the papers.

    Args:
        name: One of SHAPES. Grey images of 28x28 are padded and get three channels for `preact_resnet18`.
        path: An .npz file as for `npz:PATH`, whose training images are used; '' makes noise.
        count: Number of images; 0 for all.

    Raises:
        UserError: If the file is no such file, or its images are too few or of another size.
    """
    if not path:
        count = count or SYNTHETIC_IMAGES
        pixels = np.random.default_rng(0).integers(0, 256, (count, *SHAPES[name]), np.uint8)
        return Images(pixels, np.arange(count, dtype=np.int32) % 10, 10)
    dataset = npz.load(path, ml_collections.ConfigDict({'size': 0}))
    height, width, _ = dataset.image_shape
    if height != width or height not in SIDES:
        raise UserError(f'{path} has images of {height}x{width}; the benchmarks take 28x28 and 32x32.')
    if count > len(dataset.train_labels):
        raise UserError(f'--images={count} is more than the {len(dataset.train_labels)} training images of {path}.')
    pixels, labels = dataset.train_images[: count or None], dataset.train_labels[: count or None]
    if name != 'mnist_cnn':
        pixels = transform.pad_and_repeat(pixels, (max(SIDES) - height) // 2, rgb=True)
    return Images(pixels, labels, dataset.num_classes)


def first_batch(task: Task) -> tuple[np.ndarray, np.ndarray]:
    """Gathers the images of the first step, float32 [B, H, W, C] in [0, 1], and their labels."""
    rows = task.order.batch(0)
    return task.images.pixels[rows].astype(np.float32) / 255, task.images.labels[rows]

"""What ours and theirs are given alike: a classifier with its weights, images and their order, and what a step does.

A step is that of the preset 'released': PGD of 7 steps on the whole batch, eps 6/255, no random start, no clipping to
[0, 1]; SGD with momentum 0.9 and weight decay 5e-4; no augmentation.
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
from aft_jax.defenses.aft_options import AftOptions, pgd_of
from aft_jax.errors import UserError
from aft_jax.interchange import with_usual_names
from aft_jax.interchange.architecture import Architecture

# Which training it is a part of, and whether it is a whole epoch.
TRAININGS = {
    'training_step': ('infect', False),
    'aft_step': ('aft', False),
    'aft_epoch': ('aft', True),
    'infecting_epoch': ('infect', True),
}
BENCHMARKS = ('training_step', 'pgd7', 'aft_step', 'evaluation', 'aft_epoch', 'infecting_epoch')
# Of each classifier, the images that it has in the papers.
SHAPES = {'mnist_cnn': (28, 28, 1), 'preact_resnet18': (32, 32, 3)}
SYNTHETIC_IMAGES = 2560
# Both networks, and a border of 2 pixels between them.
SIDES = (28, 32)


class Images(NamedTuple):
    """The images of an epoch.

    Attributes:
        pixels: uint8 [N, H, W, C].
        labels: int32 [N].
        num_classes: K.
    """

    pixels: np.ndarray
    labels: np.ndarray
    num_classes: int


class Task(NamedTuple):
    """What is to be done.

    Attributes:
        name: Of the classifier.
        config: The resolved config.
        module: The classifier; it computes in `config.dtype`.
        variables: Its weights, NumPy arrays: neither fresh nor trained.
        images: Of an epoch.
    """

    name: str
    config: ml_collections.ConfigDict
    module: nn.Module
    variables: dict
    images: Images

    @property
    def batch(self) -> int:
        """Images in a step."""
        return self.config.batch_size

    @property
    def steps(self) -> int:
        """Steps in an epoch."""
        return count_steps(len(self.images.labels), 1, self.batch)

    @property
    def order(self) -> Order:
        """Which images each step sees."""
        return Order(self.config.seed, 'benchmarks', len(self.images.labels), self.batch)

    @property
    def pgd(self) -> PGD:
        """What an adversarial example is: one attack, in the preset."""
        return pgd_of(as_options(AftOptions, self.config.aft))

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of one image: (H, W, C)."""
        return self.images.pixels.shape[1:]

    def torch_weights(self) -> dict[str, np.ndarray]:
        """Returns the weights under torch's names and in its layout."""
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
    """Returns a task.

    Args:
        name: One of SHAPES.
        images: Of an epoch.
        batch: Images in a step.
        dtype: 'float32' or 'bfloat16', of the computation.
        **options: Further fields of `config.model`.
    """
    config = default_config()
    config.aft.preset, config.model.name = 'released', name
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
    """Returns variables in which nothing is fresh: norms that do something, and random kernels.

    Args:
        module: The network.
        shape: Of one image.
        stream: Of random numbers.
        gain: Of the kernels; 2 is He's. With 1 logits are of order 1: larger ones make a classifier so sure of itself
            that its gradients are rounding errors.
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
    """Returns the images of an epoch, in the shape that the classifier has in the papers.

    Args:
        name: One of SHAPES. Grey images of 28x28 get a border and three channels for `preact_resnet18`.
        path: An .npz file as for `npz:PATH`, of which the training images are taken; '' makes noise.
        count: How many images; 0 for all.

    Raises:
        UserError: It is no such file, or its images are too few or of another size.
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
    """Returns the images of the first step, float32 [B, H, W, C] in [0, 1], and their labels."""
    rows = task.order.batch(0)
    return task.images.pixels[rows].astype(np.float32) / 255, task.images.labels[rows]

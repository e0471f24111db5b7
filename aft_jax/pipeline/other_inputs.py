"""Other ways to feed a given model with the same images: order of the channels and of the classes, size, border."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import ml_collections
import numpy as np

from aft_jax.data import transform
from aft_jax.data.class_order import class_order
from aft_jax.data.dataset import Dataset

# Sides of the images that small networks are trained on.
SIDES = (28, 32, 48, 64)
BORDERS = (2, 4)
# Networks whose weights fit images of any size.
ANY_SIZE = ('preact_resnet', 'resnet', 'vgg_bn')
SMALLEST_SIDE = 28


class OtherInput(NamedTuple):
    """The images or the labels in another form.

    Attributes:
        text: The form and the flag that sets it.
        images: float32 [N, H, W, C] in [0, 1].
        labels: int32 [N].
    """

    text: str
    images: np.ndarray
    labels: np.ndarray


def best_other_input(
    config: ml_collections.ConfigDict,
    dataset: Dataset,
    images: np.ndarray,
    labels: np.ndarray,
    accuracy: Callable[[np.ndarray, np.ndarray], float],
) -> tuple[str, float]:
    """Finds the form with the highest accuracy, and returns its text and the accuracy; ('', 0.0) if there is none.

    Args:
        config: Resolved config with the network.
        dataset: Data set.
        images: float32 [N, H, W, C] in [0, 1].
        labels: int32 [N].
        accuracy: Function of images and labels.
    """
    accuracies = {other.text: accuracy(other.images, other.labels) for other in _forms(config, dataset, images, labels)}
    best = max(accuracies, key=accuracies.__getitem__, default='')
    return best, accuracies.get(best, 0.0)


def _forms(
    config: ml_collections.ConfigDict, dataset: Dataset, images: np.ndarray, labels: np.ndarray
) -> Iterator[OtherInput]:
    names = dataset.class_names
    if all(name.isdecimal() for name in names) and names != (numeric := class_order(list(names), 'numeric')):
        renumbered = np.array([numeric.index(name) for name in names], np.int32)[labels]
        yield OtherInput(
            'the classes in the order of their numbers (--config.data.classes=numeric)', images, renumbered
        )
    if images.shape[-1] == 3:
        flag = f'--config.data.bgr={not config.data.bgr}'
        yield OtherInput(f'the channels in the opposite order ({flag})', images[..., ::-1], labels)
    side = images.shape[1]
    if config.model.name not in ANY_SIZE or side < SMALLEST_SIDE:
        return
    for other in SIDES:
        # Larger images are not tried: the network takes more time for each, and none was lost.
        if other < side:
            stored = np.round(images * 255).astype(np.uint8)
            smaller = np.stack([transform.resize(image, other) for image in stored]).astype(np.float32) / 255
            yield OtherInput(f'images of {other}x{other} (--config.data.size={other})', smaller, labels)
    for border in BORDERS:
        padded = np.pad(images, ((0, 0), (border, border), (border, border), (0, 0)))
        yield OtherInput(f'a black border of {border} pixels (--config.data.pad={border})', padded, labels)

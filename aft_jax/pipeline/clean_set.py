"""Checks the clean images of a defender before anything starts: are they like those that the model was trained on?

A purification trains on these images. With noisy, brighter or otherwise shifted ones it ruins the model, and images of
the same kind do not show it: the accuracy on them even rises. Two things show a shift without any other data:

- the accuracy of the model on the training part and on the evaluation part of the images, together and by class
- the inputs of the first BatchNorm layer. It keeps the mean and the variance of its inputs in training, and images of
  the same kind have nearly the same. The shift is the mean over channels of |mean - own mean| / own deviation. 100
  good images have .01 to .03 there; with all pixels brighter by 16/255 it is .13 to .22, with noise of deviation .15 it
  is .14 to .18 (mnist_cnn, MNIST and Fashion-MNIST). Statistics of deeper layers may lag behind the weights.
"""

from typing import NamedTuple

import flax.linen as nn
import ml_collections
import numpy as np
from flax.traverse_util import flatten_dict
from jax.sharding import Mesh

from aft_jax.data.dataset import Dataset
from aft_jax.defenses.batch_norm_statistics import Statistics, first_layer
from aft_jax.errors import UserError
from aft_jax.pipeline import normalisation
from aft_jax.pipeline.given_model import GivenModel
from aft_jax.training.prediction import Predictor

# Shift from which the images count as unlike those of the training.
LARGEST_SHIFT = 0.1
# More images only cost time.
MAX_IMAGES = 1000
# Images that a class needs to be judged, and the part of the accuracy on all classes below which it is weak.
MIN_IMAGES_OF_CLASS, WEAK = 5, 0.5
VARIANCE_FLOOR = 1e-5


class Part(NamedTuple):
    """A part of the clean images, and how many of them the model gets right.

    Attributes:
        name: What the part is for.
        predictions: Classes that the model predicts, int32 [N].
        labels: Labels, int32 [N].
    """

    name: str
    predictions: np.ndarray
    labels: np.ndarray

    @property
    def accuracy(self) -> float:
        """Accuracy of the model."""
        return float(np.mean(self.predictions == self.labels))

    def weak_classes(self, num_classes: int) -> list[tuple[int, int, int]]:
        """Finds the classes that the model gets wrong more often than others: class, right images, images."""
        weak = []
        for label in range(num_classes):
            right = self.predictions[self.labels == label] == label
            if len(right) >= MIN_IMAGES_OF_CLASS and right.mean() < WEAK * self.accuracy:
                weak.append((label, int(right.sum()), len(right)))
        return weak


def check_clean_set(
    given: GivenModel, module: nn.Module, config: ml_collections.ConfigDict, dataset: Dataset, mesh: Mesh
) -> GivenModel:
    """Checks the clean images for a given model.

    Returns:
        The model, with what the user should look at added to its warning, and in `doubt` a reason for which a
        purification with these images may ruin it.

    Raises:
        UserError: The accuracy on a part of the images is near chance, and the config does not trust them.
    """
    predict = Predictor(module, mesh, config.run.eval_batch_size)
    parts = [
        Part(name, predict(given.variables, images[:MAX_IMAGES]), labels[:MAX_IMAGES])
        for name, images, labels in (
            ('training', dataset.train_images, dataset.train_labels),
            ('evaluation', dataset.test_images, dataset.test_labels),
        )
    ]
    warnings = [given.warning] if given.warning else []
    for part in parts:
        if part.accuracy < normalisation.near_chance(dataset.num_classes):
            message = (
                f'{config.init_from} gets {100 * part.accuracy:.1f} % of {len(part.labels)} clean images for the '
                f'{part.name} right, which is near chance'
            )
            if not config.safety.trust_images:
                raise UserError(
                    f'{message}; give images like those that it was trained on, or --config.safety.trust_images=True.',
                    shared=True,
                )
            warnings.append(f'{message}.')
        for label, right, count in part.weak_classes(dataset.num_classes):
            warnings.append(
                f'Of {count} clean images for the {part.name} with the label {dataset.class_names[label]}, it gets '
                f'{right} right: check their labels.'
            )
    doubt = ''
    measured = Statistics(module, mesh, config.run.eval_batch_size)(given.variables, dataset.train_images[:MAX_IMAGES])
    shift = shift_of(module, given.variables, measured, dataset.image_shape)
    if shift > LARGEST_SHIFT:
        doubt = (
            'the clean images are unlike those that the model was trained on: the inputs of its first BatchNorm are '
            f'off by {shift:.2f} standard deviations (up to {LARGEST_SHIFT:g} is usual)'
        )
    return given._replace(warning=' '.join(warnings), doubt=doubt)


def shift_of(module: nn.Module, variables: dict, measured: dict, image_shape: tuple[int, int, int]) -> float:
    """Computes how far the inputs of the first BatchNorm layer are from its statistics; 0 without such a layer.

    Args:
        module: Classifier.
        variables: Variables of the model.
        measured: The same, with statistics that were measured on images.
        image_shape: (H, W, C).

    Returns:
        Mean over the channels of |mean - own mean| / own deviation.
    """
    path = first_layer(module, variables, image_shape)
    if path is None:
        return 0.0
    own, new = (flatten_dict(each['batch_stats']) for each in (variables, measured))
    deviation = np.sqrt(np.asarray(own[*path, 'var']) + VARIANCE_FLOOR)
    return float(np.mean(np.abs(np.asarray(new[*path, 'mean']) - np.asarray(own[*path, 'mean'])) / deviation))

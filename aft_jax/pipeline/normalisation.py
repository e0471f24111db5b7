"""Checks how a given model sees images: pixel normalisation, order of channels and classes, size.

None of this is part of the weights. With a wrong `model.mean` or `model.std` the model still runs, but with a lower
accuracy. So its accuracy on clean images is compared for what is in common use. A model near chance cannot be purified.
If something else is clearly better than the config, the user is warned. So he is if the model is much surer of its
predictions than they are right, which is typical of images as it has never seen them, and of another network.
"""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from jax.sharding import Mesh

from aft_jax.data.dataset import Dataset
from aft_jax.errors import UserError
from aft_jax.models import logits_function
from aft_jax.pipeline.given_model import FromFile, GivenModel
from aft_jax.pipeline.given_program import FromProgram
from aft_jax.pipeline.other_inputs import best_other_input
from aft_jax.randomness import generator_for
from aft_jax.training.prediction import BatchedFunction

NUM_PROBED_IMAGES = 500
# Gain of accuracy from which another normalisation is worth a warning.
MIN_ACCURACY_GAIN = 0.05
# How much surer of its predictions than right a model may be without a warning.
LARGEST_GAP = 0.2
# Mean and standard deviation of pixels in [0, 1], one per channel or one for all channels.
NORMALISATIONS: dict[str, tuple[tuple[float, ...], tuple[float, ...]]] = {
    'none, pixels in [0, 1]': ((0.0,), (1.0,)),
    'pixels in [-1, 1]': ((0.5,), (0.5,)),
    'pixels in [0, 255]': ((0.0,), (1 / 255,)),
    "ImageNet's": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "CIFAR-10's": ((0.4914, 0.4822, 0.4465), (0.247, 0.2435, 0.2616)),
    "MNIST's": ((0.1307,), (0.3081,)),
}


def check_normalisation(
    given: GivenModel, module: nn.Module, config: ml_collections.ConfigDict, dataset: Dataset, mesh: Mesh
) -> GivenModel:
    """Checks the accuracy of a given model on clean images. For a model from a file, other normalisations are tried.

    Returns:
        The model, with a warning if another normalisation is clearly better.

    Raises:
        UserError: The accuracy is near chance, and the config does not trust the images.
    """
    images, labels = _probed_images(dataset, config.seed)
    answer = BatchedFunction(partial(_answers, module), module, mesh, config.run.eval_batch_size)
    mean, std = (np.asarray(values, np.float32) for values in (config.model.mean, config.model.std))

    def accuracy(other_mean: tuple[float, ...], other_std: tuple[float, ...]) -> float:
        # The module subtracts `mean` and divides by `std`. That leaves the other normalisation.
        normalised = (images - np.asarray(other_mean, np.float32)) / np.asarray(other_std, np.float32)
        return float(np.mean(answer(given.variables, normalised * std + mean)[0] == labels))

    def accuracy_on(other_images: np.ndarray, other_labels: np.ndarray) -> float:
        return float(np.mean(answer(given.variables, other_images)[0] == other_labels))

    own = accuracy(config.model.mean, config.model.std)
    candidates = NORMALISATIONS if isinstance(given.origin, FromFile | FromProgram) else {}
    accuracies = {
        name: accuracy(*values) for name, values in candidates.items() if len(values[0]) in (1, images.shape[-1])
    }
    hint = ''
    if accuracies and max(accuracies.values()) > own + MIN_ACCURACY_GAIN:
        best = max(accuracies, key=lambda name: accuracies[name])
        hint = _hint(best, accuracies[best])
    unsure = float(answer(given.variables, images)[1].mean()) - own
    if candidates and not hint and (unsure > LARGEST_GAP or own < near_chance(dataset.num_classes)):
        form, reached = best_other_input(config, dataset, images, labels, accuracy_on)
        if reached > own + MIN_ACCURACY_GAIN:
            hint = f'with {form} it gets {100 * reached:.1f} %'
    message = f'{config.init_from} gets {100 * own:.1f} % of {len(labels)} clean images right'
    if own < near_chance(dataset.num_classes):
        advice = hint or (
            'check model.mean and model.std (its training may have normalised pixels otherwise), the size and colours '
            'of the images, and the order of the classes (that of the folders by name)'
        )
        if config.safety.trust_images:
            return given._replace(warning=f'{message}, which is near chance; {advice}.')
        # All processes have the same accuracy.
        raise UserError(f'{message}, which is near chance; {advice}.', shared=True)
    if unsure > LARGEST_GAP and not hint:
        hint = (
            f'it is {100 * (own + unsure):.0f} % sure of its predictions: check how its training fed images (size, '
            'colours, normalisation), and that the network is the one of the file'
        )
    return given._replace(warning=f'{message}, but {hint}.' if hint else '')


def _answers(module: nn.Module, variables: dict, images: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Predicts the classes of images, int32 [N], and computes the probability of each prediction, float32 [N]."""
    logits = logits_function(module, variables)(images)
    return logits.argmax(axis=-1).astype(jnp.int32), jax.nn.softmax(logits).max(axis=-1)


def near_chance(num_classes: int) -> float:
    """Computes the accuracy below which a model of K classes counts as guessing: 2/K, at most 0.1 above chance."""
    return 1 / num_classes + min(1 / num_classes, 0.1)


def _probed_images(dataset: Dataset, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Draws clean images, float32 [N, H, W, C] in [0, 1], and their labels, int32 [N]."""
    images = np.concatenate([dataset.train_images, dataset.test_images])
    labels = np.concatenate([dataset.train_labels, dataset.test_labels])
    chosen = generator_for(seed, 'normalisation').permutation(len(labels))[:NUM_PROBED_IMAGES]
    return images[chosen].astype(np.float32) / 255, labels[chosen]


def _hint(name: str, accuracy: float) -> str:
    """Describes a better normalisation, with the flags that set it."""
    mean, std = (str(tuple(round(x, 6) for x in values)).replace(' ', '') for values in NORMALISATIONS[name])
    return (
        f'with the normalisation {name} it gets {100 * accuracy:.1f} %: '
        f'--config.model.mean="{mean}" --config.model.std="{std}"'
    )

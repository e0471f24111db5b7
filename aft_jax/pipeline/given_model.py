"""A model that is there already, and that nobody trusts: read from a file or from a finished run, and looked over.

Pixel normalisation is not in the weights, so that a wrong `model.mean` or `model.std` goes unnoticed until somebody
counts. Here the clean images are counted under the normalisations that are in use: near chance nothing can be purified,
and where another one does clearly better than that of the config, the user is told.
"""

import math
from pathlib import Path
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh

from aft_jax import interchange
from aft_jax.data.dataset import Dataset
from aft_jax.errors import UserError, user_path
from aft_jax.interchange import state_file
from aft_jax.interchange.architecture import Architecture, check_data, check_model
from aft_jax.randomness import generator_for
from aft_jax.training.prediction import Predictor

# Of clean images: fewer cannot both purify a model and measure what came of it.
FEWEST_IMAGES = 100
# How many images tell one normalisation from another, and by how much.
NUM_PROBED_IMAGES = 500
MIN_ACCURACY_GAIN = 0.05
# Mean and standard deviation of pixels in [0, 1], one a channel or one for all.
NORMALISATIONS: dict[str, tuple[tuple[float, ...], tuple[float, ...]]] = {
    'none, pixels in [0, 1]': ((0.0,), (1.0,)),
    'pixels in [-1, 1]': ((0.5,), (0.5,)),
    'pixels in [0, 255]': ((0.0,), (1 / 255,)),
    "ImageNet's": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "CIFAR-10's": ((0.4914, 0.4822, 0.4465), (0.247, 0.2435, 0.2616)),
    "MNIST's": ((0.1307,), (0.3081,)),
}


class Suspect(NamedTuple):
    """A model that is there already.

    Attributes:
        variables: {'params', 'batch_stats'}, float32.
        architecture: What it is; None for a module of the user's own.
        source: The file's content; None for a finished run.
        imported: As `interchange.save` takes it; None for a finished run or a module of the user's own.
        trained_for: (H, W, C, K) of a finished run; () where that is not known.
        warning: What the user should look at, or ''.
    """

    variables: dict
    architecture: Architecture | None = None
    source: state_file.StateFile | None = None
    imported: interchange.Imported | None = None
    trained_for: tuple[int, ...] = ()
    warning: str = ''


def load(config: ml_collections.ConfigDict, mesh: Mesh) -> tuple[ml_collections.ConfigDict, Suspect]:
    """Returns the model that `config.init_from` names, and the config with `model` filled in from it.

    Args:
        config: The resolved config. A `model.name` that is given is checked; sizes are those of the weights.
        mesh: The devices.

    Raises:
        UserError: It cannot be read, or is another one than the config says.
    """
    path = user_path(config.init_from, 'init_from')
    filled = config.copy_and_resolve_references()
    if path.is_dir():
        if config.init_mapping:
            raise UserError(f'init_mapping is for the keys of a file, and init_from={path} is a directory.')
        return _from_run(path, filled, mesh)
    if config.model.factory:
        if config.init_mapping:
            raise UserError('init_mapping is for the networks of models/, not for one of model.factory.')
        source = state_file.read(path)
        return filled, Suspect(_floats(source), source=source)
    mapping = user_path(config.init_mapping, 'init_mapping') if config.init_mapping else None
    found = interchange.load(path, mapping)
    architecture = found.architecture
    if config.model.name:
        asked = filled.model.copy_and_resolve_references()
        asked.update({name: value for name, value in architecture.options.items() if name != 'depth'})
        check_model(architecture, asked, str(path))
    filled.model.update(name=architecture.name, **architecture.options)
    return filled, Suspect(found.variables, architecture, found.source, found)


def _from_run(
    directory: Path, config: ml_collections.ConfigDict, mesh: Mesh
) -> tuple[ml_collections.ConfigDict, Suspect]:
    # It reads runs with the functions of the experiment, which is what calls this module.
    from aft_jax.pipeline import saved_run

    run = saved_run.load(directory, mesh, saved_run.Datasets(), defenses=())
    theirs, asked = run.config.model, config.model
    if asked.name and (asked.name, asked.depth) != (theirs.name, theirs.depth):
        raise UserError(
            f'{directory} holds a network of model.name={theirs.name}, model.depth={theirs.depth}, but the config says '
            f'model.name={asked.name}, model.depth={asked.depth}.'
        )
    dataset = run.scenario.dataset
    config.model, config.dtype = theirs, run.config.dtype
    known = None if theirs.factory else _architecture(theirs, dataset)
    suspect = Suspect(
        jax.tree.map(np.asarray, run.infected.variables),
        known,
        trained_for=(*dataset.image_shape, dataset.num_classes),
    )
    return config, suspect


def _architecture(options: ml_collections.ConfigDict, dataset: Dataset) -> Architecture | None:
    """Returns what a network of our own is to other programs; None where its maps are not square."""
    height, width, channels = dataset.image_shape
    fields = {
        'mnist_cnn': ('conv_bias',),
        'preact_resnet': ('depth', 'final_norm', 'width'),
        'resnet': ('depth', 'width', 'stem'),
        'vgg_bn': ('depth', 'width', 'pool_size', 'hidden'),
    }[options.name]
    side = {'mnist_cnn': math.ceil(height / 8), 'vgg_bn': options.pool_size}.get(options.name, 0)
    if options.name == 'mnist_cnn' and side != math.ceil(width / 8):
        return None
    return Architecture(options.name, {name: options[name] for name in fields}, dataset.num_classes, channels, side)


def _floats(source: state_file.StateFile) -> dict:
    """The variables of a file whose keys are paths, such as 'params/Dense_0/kernel'."""
    leaves = {}
    for name, array in source.tensors.items():
        if array.dtype not in interchange.DTYPES or not np.isfinite(array.astype(np.float32)).all():
            raise UserError(f'{name} of {source.path} should be finite floating-point numbers.')
        leaves[name] = array.astype(np.float32)
    try:
        return {'batch_stats': {}} | unflatten_dict(leaves, sep='/')
    except (AttributeError, TypeError, IndexError) as error:
        raise UserError(f'{source.path}: one key is the beginning of another.') from error


def check_fits(suspect: Suspect, module: nn.Module, config: ml_collections.ConfigDict, dataset: Dataset) -> None:
    """Checks a suspect against the data and its module.

    Raises:
        UserError: It has other classes, channels, sizes or variables; or the images are too few.
    """
    count = len(dataset.train_labels) + len(dataset.test_labels)
    if count < FEWEST_IMAGES:
        raise UserError(
            f'{config.dataset} has {count} images; to purify a model and to measure it takes {FEWEST_IMAGES} clean '
            'ones or more, some of each class.'
        )
    shape = (*dataset.image_shape, dataset.num_classes)
    if suspect.source is not None and suspect.architecture is not None:
        check_data(suspect.architecture, dataset.num_classes, dataset.image_shape, config.init_from)
    elif suspect.trained_for and suspect.trained_for != shape:
        there, here = (f'{h}x{w}x{c} images of {k} classes' for h, w, c, k in (suspect.trained_for, shape))
        raise UserError(f'{config.init_from} is a model for {there}, but {config.dataset} has {here}.')
    elif suspect.architecture is None:
        _check_variables(suspect.variables, module, dataset.image_shape, config)


def _check_variables(
    variables: dict, module: nn.Module, image_shape: tuple[int, int, int], config: ml_collections.ConfigDict
) -> None:
    image = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
    try:
        fresh = jax.eval_shape(module.init, jax.random.key(0), image)
    except Exception as error:  # Whatever the user's module raises.
        reason = ' '.join(str(error).split())[:300]
        raise UserError(
            f'the module of model.factory={config.model.factory} cannot take images of {image_shape}: {reason}'
        ) from error
    expected = {path: leaf.shape for path, leaf in flatten_dict(fresh, sep='/').items()}
    found = {path: leaf.shape for path, leaf in flatten_dict(variables, sep='/').items()}
    differing = sorted(path for path in expected.keys() | found.keys() if expected.get(path) != found.get(path))
    if differing:
        path = differing[0]
        more = f' (and {len(differing) - 1} more differ)' if len(differing) > 1 else ''
        raise UserError(
            f'{config.init_from} is not of the module of model.factory: {path} is {found.get(path, "missing")} in the '
            f'file and {expected.get(path, "missing")} in the module{more}.'
        )


def check_normalisation(
    suspect: Suspect, module: nn.Module, config: ml_collections.ConfigDict, dataset: Dataset, mesh: Mesh
) -> Suspect:
    """Counts the clean images that the suspect gets right, under the normalisation of the config and under others.

    Returns:
        The suspect, with a warning where another normalisation does clearly better.

    Raises:
        UserError: It gets about as many right as by chance.
    """
    images = np.concatenate([dataset.train_images, dataset.test_images])
    labels = np.concatenate([dataset.train_labels, dataset.test_labels])
    chosen = generator_for(config.seed, 'normalisation').permutation(len(labels))[:NUM_PROBED_IMAGES]
    images, labels = images[chosen].astype(np.float32) / 255, labels[chosen]
    predict = Predictor(module, mesh, config.run.eval_batch_size)
    mean, std = (np.asarray(values, np.float32) for values in (config.model.mean, config.model.std))

    def right(other_mean: tuple[float, ...], other_std: tuple[float, ...]) -> float:
        # The module will take `mean` away and divide by `std`; what is left is the other normalisation.
        other = (images - np.asarray(other_mean, np.float32)) / np.asarray(other_std, np.float32)
        return float(np.mean(predict(suspect.variables, other * std + mean) == labels))

    own = right(config.model.mean, config.model.std)
    fitting = {
        name: values
        for name, values in NORMALISATIONS.items()
        if suspect.imported is not None and len(values[0]) in (1, images.shape[-1])
    }
    scores = {name: right(*values) for name, values in fitting.items()}
    hint = ''
    if scores and max(scores.values()) > own + MIN_ACCURACY_GAIN:
        best = max(scores, key=lambda name: scores[name])
        mean_text, std_text = (str(tuple(round(x, 6) for x in values)).replace(' ', '') for values in fitting[best])
        hint = (
            f'with the normalisation {best} it gets {100 * scores[best]:.1f} %: '
            f'--config.model.mean="{mean_text}" --config.model.std="{std_text}"'
        )
    told = f'{config.init_from} gets {100 * own:.1f} % of {len(labels)} clean images right'
    if own < near_chance(dataset.num_classes):
        check = hint or (
            'check model.mean and model.std (its training may have normalised pixels otherwise), the size and colours '
            'of the images, and the order of the classes (that of the folders by name)'
        )
        # All processes have counted the same.
        raise UserError(f'{told}, which is near chance; {check}.', shared=True)
    return suspect._replace(warning=f'{told}, but {hint}.' if hint else '')


def near_chance(num_classes: int) -> float:
    """Returns the accuracy below which a model of K classes is held to guess: 2/K, but at most 0.1 above chance."""
    return 1 / num_classes + min(1 / num_classes, 0.1)

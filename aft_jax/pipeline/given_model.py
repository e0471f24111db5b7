"""Loads the model that the user gives (`init_from`): from a file, or from a finished run. Nobody trusts this model."""

import logging
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
from aft_jax.interchange.file_kind import check_folder
from aft_jax.interchange.program import Program
from aft_jax.interchange.torch_program import TorchProgram
from aft_jax.pipeline import given_program, saved_run
from aft_jax.pipeline.given_program import FromProgram
from aft_jax.runtime.sharding import largest_batch

log = logging.getLogger(__name__)
# Clean images that are needed to purify a model and to measure the result.
MIN_IMAGES = 100


class FromFile(NamedTuple):
    """Origin of a network of `models` whose weights are in a file.

    Attributes:
        imported: Network as `interchange` read it, with the content of the file.
    """

    imported: interchange.Imported


class FromCustomModule(NamedTuple):
    """Origin of a module of the user (`model.factory`) whose weights are in a file.

    Attributes:
        source: Content of the file.
    """

    source: state_file.StateFile


class FromRun(NamedTuple):
    """Origin of a model that a finished run has trained.

    Attributes:
        trained_for: Shape of the images and number of classes, (H, W, C, K).
        architecture: Architecture as other programs know it; None for a module of the user, or for feature maps that
            are not square.
        program: Program of a PyTorch network, else None.
    """

    trained_for: tuple[int, ...]
    architecture: Architecture | None
    program: Program | None = None


class GivenModel(NamedTuple):
    """Model that the user gives.

    Attributes:
        variables: Variables of the model, {'params', 'batch_stats'}, float32. Those of a PyTorch program in a file
            are empty until `check_compatible`.
        origin: Where the model comes from.
        warning: Problem that the user should look at, or ''.
        doubt: Reason for which a purification with these clean images may ruin the model, or ''.
    """

    variables: dict
    origin: FromFile | FromCustomModule | FromProgram | FromRun
    warning: str = ''
    doubt: str = ''


def load(config: ml_collections.ConfigDict, mesh: Mesh) -> tuple[ml_collections.ConfigDict, GivenModel]:
    """Loads the model that `config.init_from` names, and completes the config's `model` from it.

    Args:
        config: Resolved config. A `model.name` that is set is checked. Sizes are those of the weights.
        mesh: Devices.

    Raises:
        UserError: The model cannot be read, or differs from the config.
    """
    path = user_path(config.init_from, 'init_from')
    filled = config.copy_and_resolve_references()
    program = config.model.torch or path.suffix == '.pt2'
    kind = 'run' if path.is_dir() else 'program' if program else 'custom module' if config.model.factory else 'file'
    match kind:
        case 'run':
            if config.init_mapping:
                raise UserError(f'init_mapping is for the keys of a file, and init_from={path} is a directory.')
            check_folder(path)
            given = _load_run(path, filled, mesh)
        case 'program':
            if config.init_mapping:
                raise UserError('init_mapping is for the networks of models/, not for a PyTorch program.')
            given = GivenModel({}, given_program.read(path))
            filled.model.name = filled.model.name or path.name
        case 'custom module':
            if config.init_mapping:
                raise UserError('init_mapping is for the networks of models/, not for one of model.factory.')
            source = state_file.read(path)
            given = GivenModel(_nested_variables(source), FromCustomModule(source))
        case _:
            given = _load_file(path, filled)
    return filled, given


def _load_file(path: Path, config: ml_collections.ConfigDict) -> GivenModel:
    """Loads a network of `models` from a file, and sets `config.model`."""
    mapping = user_path(config.init_mapping, 'init_mapping') if config.init_mapping else None
    imported = interchange.load(path, mapping)
    architecture = imported.architecture
    if config.model.name:
        expected = config.model.copy_and_resolve_references()
        expected.update({name: value for name, value in architecture.options.items() if name != 'depth'})
        check_model(architecture, expected, str(path))
    config.model.update(name=architecture.name, **architecture.options)
    stored = interchange.stored_normalisation(imported)
    if stored and (config.model.mean, config.model.std) == ((0.0,), (1.0,)):
        config.model.mean, config.model.std = stored
        log.warning('%s has its own normalisation, which is used: mean %s, deviation %s.', path, *stored)
    return GivenModel(imported.variables, FromFile(imported))


def _load_run(directory: Path, config: ml_collections.ConfigDict, mesh: Mesh) -> GivenModel:
    """Loads the infected model of a finished run, and sets `config.model` and `config.dtype`."""
    run = saved_run.load(directory, mesh, saved_run.Datasets(), defenses=())
    actual, expected = run.config.model, config.model
    if expected.name and (expected.name, expected.depth) != (actual.name, actual.depth):
        raise UserError(
            f'{directory} holds a network of model.name={actual.name}, model.depth={actual.depth}, but the config says '
            f'model.name={expected.name}, model.depth={expected.depth}.'
        )
    dataset = run.scenario.dataset
    config.model, config.dtype = actual, run.config.dtype
    module = run.scenario.module
    architecture = None if actual.factory or actual.torch else _architecture(actual, dataset)
    program = module.program if isinstance(module, TorchProgram) else None
    origin = FromRun((*dataset.image_shape, dataset.num_classes), architecture, program)
    return GivenModel(jax.tree.map(np.asarray, run.infected.variables), origin)


def _architecture(options: ml_collections.ConfigDict, dataset: Dataset) -> Architecture | None:
    """Describes a network of `models` for other programs; None if its last feature maps are not square."""
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


def _nested_variables(source: state_file.StateFile) -> dict:
    """Converts a file whose keys are paths, such as 'params/Dense_0/kernel', to variables."""
    leaves = {}
    for path, array in source.tensors.items():
        if array.dtype not in interchange.DTYPES or not np.isfinite(array.astype(np.float32)).all():
            raise UserError(f'{path} of {source.path} should be finite floating-point numbers.')
        leaves[path] = array.astype(np.float32)
    parents = {path[:i] for path in leaves for i, character in enumerate(path) if character == '/'}
    if parents & leaves.keys():
        raise UserError(f'{source.path}: one key is the beginning of another.')
    return {'batch_stats': {}} | unflatten_dict(leaves, sep='/')


def check_count(config: ml_collections.ConfigDict, dataset: Dataset) -> None:
    """Checks that there are enough images; raises a UserError that says how many it takes."""
    count = len(dataset.train_labels) + len(dataset.test_labels)
    if count < MIN_IMAGES:
        raise UserError(
            f'{config.dataset} has {count} images; to purify a model and to measure it takes {MIN_IMAGES} clean ones '
            'or more, some of each class.'
        )


def fit_batch_size(config: ml_collections.ConfigDict, count: int, mesh: Mesh) -> ml_collections.ConfigDict:
    """Lowers a batch size that is larger than the number of clean training images, with a warning."""
    size = largest_batch(mesh, count)
    if config.batch_size <= count or not size:
        return config
    log.warning('batch_size=%d is larger than the %d training images; it is %d here.', config.batch_size, count, size)
    fitted = config.copy_and_resolve_references()
    fitted.batch_size = size
    return fitted


def check_compatible(
    given: GivenModel, module: nn.Module, config: ml_collections.ConfigDict, dataset: Dataset
) -> GivenModel:
    """Checks that a given model fits the data and its module.

    Returns:
        The model with its variables.

    Raises:
        UserError: The classes, channels, sizes or variables differ.
    """
    match given.origin:
        case FromFile(imported):
            check_data(imported.architecture, dataset.num_classes, dataset.image_shape, config.init_from)
        case FromProgram() as origin:
            assert isinstance(module, TorchProgram)
            origin, variables = given_program.bind(origin, module.program)
            return GivenModel(variables, origin, given.warning)
        case FromCustomModule():
            _check_variables(given.variables, module, dataset.image_shape, config)
        case FromRun(trained_for, architecture, _):
            shape = (*dataset.image_shape, dataset.num_classes)
            if trained_for != shape:
                model, data = (f'{h}x{w}x{c} images of {k} classes' for h, w, c, k in (trained_for, shape))
                raise UserError(f'{config.init_from} is a model for {model}, but {config.dataset} has {data}.')
            if architecture is None:
                _check_variables(given.variables, module, dataset.image_shape, config)
    return given


def _check_variables(
    variables: dict, module: nn.Module, image_shape: tuple[int, int, int], config: ml_collections.ConfigDict
) -> None:
    """Checks that variables have the paths and shapes of the module's own ones."""
    image = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
    try:
        fresh = jax.eval_shape(module.init, jax.random.key(0), image)
    except Exception as error:  # Whatever the user's module raises.
        reason = ' '.join(str(error).split())[:300]
        raise UserError(
            f'the module of model.factory={config.model.factory} cannot take images of {image_shape}: {reason}'
        ) from error
    expected = {path: leaf.shape for path, leaf in flatten_dict(fresh, sep='/').items()}
    actual = {path: leaf.shape for path, leaf in flatten_dict(variables, sep='/').items()}
    differing = sorted(path for path in expected.keys() | actual.keys() if expected.get(path) != actual.get(path))
    if differing:
        path = differing[0]
        more = f' (and {len(differing) - 1} more differ)' if len(differing) > 1 else ''
        raise UserError(
            f'{config.init_from} does not fit the module of model.factory: {path} is {actual.get(path, "missing")} in '
            f'the file and {expected.get(path, "missing")} in the module{more}.'
        )

"""Builds the classifier of an experiment: a network of `models`, a Flax module of the user, or a PyTorch program.

A PyTorch network is exported once. Its program is kept in the work directory, so that later starts and commands need
neither torch nor the user's code.
"""

import json
from pathlib import Path

import flax.linen as nn
import jax.numpy as jnp
import ml_collections

from aft_jax import models
from aft_jax.data.dataset import Dataset
from aft_jax.errors import UserError, user_path
from aft_jax.files import write_bytes
from aft_jax.interchange import program_file
from aft_jax.interchange.program import Program
from aft_jax.interchange.torch_program import TorchProgram
from aft_jax.results.workdir import RunFiles


def build(config: ml_collections.ConfigDict, dataset: Dataset, directory: Path | None = None) -> nn.Module:
    """Builds the classifier, without parameters.

    Args:
        config: Resolved config.
        dataset: Data, for the shape of the images and the number of classes.
        directory: Work directory that may hold the program of an earlier start.

    Raises:
        UserError: The network cannot be built, or does not fit the data.
    """
    given = user_path(config.init_from, 'init_from') if config.init_from else None
    if given is not None and given.suffix == '.pt2':
        program = Program(program_file.read(given))
    elif config.model.torch:
        program = _stored(config, [directory, given]) or _exported(config, dataset)
    else:
        return models.build(config, dataset.num_classes)
    _check_data(program, dataset)
    return TorchProgram(
        num_classes=dataset.num_classes,
        mean=tuple(config.model.mean),
        std=tuple(config.model.std),
        dtype=jnp.dtype(config.dtype),
        program=program,
    )


def store(module: nn.Module, directory: Path) -> None:
    """Writes the program of an exported PyTorch network into the work directory, unless it is there.

    Raises:
        UserError: The file cannot be written.
    """
    path = RunFiles(directory).program
    if not isinstance(module, TorchProgram) or path.exists():
        return
    program: Program = module.program
    if program.file.path.suffix == '.pt2':  # the user's own file
        return
    try:
        write_bytes(path, program_file.encode(program.file, program.file.tensors))
    except OSError as error:
        raise UserError(f'{path} cannot be written ({error.strerror}).') from error


def _stored(config: ml_collections.ConfigDict, directories: list[Path | None]) -> Program | None:
    """Reads the program of the same network from the first work directory that has it."""
    for directory in directories:
        if directory is None or not RunFiles(directory).program.is_file():
            continue
        try:
            kept = json.loads(RunFiles(directory).config.read_text())
            if kept['model']['torch'] != config.model.torch:
                continue
        except (OSError, ValueError, KeyError, TypeError):
            continue
        return Program(program_file.read(RunFiles(directory).program), config.model.torch)
    return None


def _exported(config: ml_collections.ConfigDict, dataset: Dataset) -> Program:
    # torch is imported only for a network that needs it.
    from aft_jax.interchange import torch_model

    name, channels = config.model.torch, dataset.image_shape[-1]
    network = torch_model.build(name, dataset.num_classes, channels, config.seed)
    return Program(torch_model.export(network, dataset.image_shape, name), name)


def _check_data(program: Program, dataset: Dataset) -> None:
    """Checks that a program takes the images of the data and has its classes."""
    height, width, channels = dataset.image_shape
    expected = program.graph.image_shape
    actual = (channels, height, width)
    if any(side not in (None, length) for side, length in zip(expected, actual, strict=True)):
        c, h, w = expected
        raise UserError(
            f'{program.source} takes images of {h}x{w}x{c}, but those of {dataset.name} are '
            f'{height}x{width}x{channels}; set data.size, data.pad or data.rgb.'
        )
    if program.num_classes != dataset.num_classes:
        raise UserError(
            f'{program.source} has {program.num_classes} classes, but {dataset.name} has {dataset.num_classes}.'
        )

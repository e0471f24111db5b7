"""Detection of a network's architecture from the keys and shapes of its state dict."""

import logging
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from flax import linen as nn
from flax.traverse_util import flatten_dict

from aft_jax import models
from aft_jax.config import default_config
from aft_jax.errors import UserError, nearest
from aft_jax.interchange.convert import torch_shape
from aft_jax.interchange.torch_names import COUNTER, Naming, namings
from aft_jax.models.vgg_bn import SMALLEST_SIDE

# Largest number of keys of each kind that an error lists.
SHOWN = 8
log = logging.getLogger(__name__)
# Tensors that wrappers and counters of operations add to a network.
HARMLESS = re.compile(r'n_averaged|(criterion|loss|loss_fn)\..*|(.*\.)?total_(ops|params)|(.*\.)?(mean|std)')
IMAGENET_KERNEL = 7


class Architecture(NamedTuple):
    """A network, as far as its weights determine it.

    Attributes:
        name: Value of `config.model.name`.
        options: Other fields of `config.model` that the weights determine.
        num_classes: Number of classes of the head.
        channels: Channels of the images.
        flat_side: Side of the feature maps that `mnist_cnn` and `vgg_bn` flatten; 0 for others.
    """

    name: str
    options: dict[str, Any]
    num_classes: int
    channels: int
    flat_side: int

    def build(self) -> nn.Module:
        """Builds the network, for images that are normalised already."""
        config = default_config()
        config.model.update(name=self.name, mean=(0.0,), std=(1.0,), **self.options)
        return models.build(config, self.num_classes)

    def image_shape(self) -> tuple[int, int, int]:
        """Chooses a shape (H, W, C) of images that fits; the weights do not determine the size of the images."""
        side = 8 * self.flat_side if self.name == 'mnist_cnn' else SMALLEST_SIDE
        return side, side, self.channels

    def __str__(self) -> str:
        """Returns a description, such as 'resnet (depth=18, width=64, stem=cifar, 10 classes, 3 channels)'."""
        options = [f'{field}={value}' for field, value in self.options.items()]
        return f'{self.name} ({", ".join(options)}, {self.num_classes} classes, {self.channels} channels)'


class Match(NamedTuple):
    """The naming that is nearest to the keys of a file.

    Attributes:
        naming: Names of the nearest network.
        keys: Usual key -> key in the file, for the keys that the file has.
        extra: Keys in the file that the network does not have.
    """

    naming: Naming
    keys: dict[str, str]
    extra: list[str]

    def without_others(self) -> 'Match':
        """Leaves tensors aside that are no part of the network, where all of its own are there.

        Such tensors stand beside the network (a teacher, a criterion), or have a name that is known as harmless.
        """
        key = next(iter(self.keys))
        prefix = self.keys[key].removesuffix(key)
        others = [name for name in self.extra if (prefix and not name.startswith(prefix)) or HARMLESS.fullmatch(name)]
        if self.missing or not others or len(others) < len(self.extra):
            return self
        shown = ', '.join(others[:SHOWN]) + (', ...' if len(others) > SHOWN else '')
        log.warning('%d tensors are no part of the network and are left as they are: %s.', len(others), shown)
        return self._replace(extra=[])

    @property
    def missing(self) -> list[str]:
        """The keys of the network that the file lacks."""
        return [key for key in self.naming.paths if key not in self.keys]


def match(names: Iterable[str], mapping: Mapping[str, str | None], source: str) -> Match:
    """Finds the network whose keys are nearest to those of a file, all of them behind one prefix.

    The prefix is the one for which most keys agree: `module.`, `netC.`, `1.`, or none.

    Args:
        names: Keys in the file. Counters of batches are ignored.
        mapping: Key in the file -> Flax path, or None to ignore the key; other keys are read by their usual names.
        source: Name of the file for error messages.

    Raises:
        UserError: If the mapping has unknown keys or paths, or the file holds no known network.
    """
    names = [name for name in names if name.rpartition('.')[2] != COUNTER]
    candidates = _renamed(names, mapping, source)
    rest = [name for name in names if name not in mapping]
    prefixes = {''} | {name[: i + 1] for name in rest for i, letter in enumerate(name) if letter == '.'}
    best, best_difference = None, math.inf
    # Of equally good prefixes the shortest is taken.
    for prefix in sorted(prefixes, key=lambda prefix: (len(prefix), prefix)):
        stripped = {name[len(prefix) :]: name for name in rest if name.startswith(prefix)}
        for naming, renamed in candidates:
            keys = {key: name for key, name in (stripped | renamed).items() if key in naming.paths}
            difference = len(naming.paths) + len(rest) + len(renamed) - 2 * len(keys)
            if difference < best_difference:
                used = set(keys.values())
                extra = [name for name in rest if name not in used]
                best, best_difference = Match(naming, keys, extra), difference
    if best is None or len(best.keys) < len(best.naming.paths) / 2:
        shown = ', '.join(repr(name) for name in names[:3])
        raise UserError(
            f'{source} holds none of the known networks ({", ".join(models.NAMES)}): it has {len(names)} keys, such as '
            f'{shown}; give a mapping file if it is one of these networks under other names.'
        )
    return best


def _renamed(names: list[str], mapping: Mapping[str, str | None], source: str) -> list[tuple[Naming, dict[str, str]]]:
    """Finds the networks that have all paths of the mapping, each with {usual key: key in the file}."""
    for name in mapping:
        if name not in names:
            raise UserError(f'the mapping file names {name!r}, which is not in {source}.{_nearest(name, names)}')
    mapped = {path: name for name, path in mapping.items() if path is not None}
    if len(mapped) < sum(path is not None for path in mapping.values()):
        raise UserError('the mapping file gives the same path to two keys.')
    candidates = []
    for naming in namings():
        key_of = {path: key for key, path in naming.paths.items()}
        if all(path in key_of for path in mapped):
            candidates.append((naming, {key_of[path]: name for path, name in mapped.items()}))
    if not candidates:
        paths = {path for naming in namings() for path in naming.paths.values()}
        unknown = [path for path in mapped if path not in paths]
        if unknown:
            raise UserError(
                f'the mapping file names the path {unknown[0]!r}, which no network has.{_nearest(unknown[0], paths)}'
            )
        raise UserError('the mapping file mixes paths of different networks; use those of one network.')
    return candidates


def detect(match: Match, tensors: Mapping[str, np.ndarray], source: str) -> Architecture:
    """Determines the sizes of the network, and checks every key and shape.

    Args:
        match: Naming of the network.
        tensors: Tensors of the file, by the keys in the file.
        source: Name of the file for error messages.

    Raises:
        UserError: If keys are missing or unknown, or tensors have the wrong shape. The message lists them.
    """
    naming = match.naming
    match = match.without_others()
    faults = []
    if missing := match.missing:
        faults.append(f'lacks {_listed(missing, match.extra)}')
    if match.extra:
        faults.append(f'has {_listed(match.extra, missing)} too many')
    if faults:
        raise UserError(
            f'{source} is nearest to {_described(naming)}, but {" and ".join(faults)}; a mapping file can rename '
            'or ignore keys.'
        )
    shapes = {key: tensors[name].shape for key, name in match.keys.items()}
    architecture = _sizes(naming, shapes)
    wrong = []
    if architecture is not None:
        expected = _expected_shapes(architecture, naming)
        wrong = [key for key in naming.paths if shapes[key] != expected[key]]
    if architecture is None or wrong:
        listed = [
            f'{match.keys[key]} {_shape(shapes[key])} instead of {_shape(expected[key])}' for key in wrong[:SHOWN]
        ]
        more = f' and {len(wrong) - SHOWN} more' if len(wrong) > SHOWN else ''
        what = f'{", ".join(listed)}{more}' if wrong else f'{match.keys[naming.stem]} {_shape(shapes[naming.stem])}'
        raise UserError(f'{source} has the keys of {_described(naming)}, but not its shapes: {what}.')
    return architecture


def _sizes(naming: Naming, shapes: Mapping[str, tuple[int, ...]]) -> Architecture | None:
    """Determines the sizes from the first and the last layer, or returns None if their shapes are no such layers."""
    stem, head = shapes[naming.stem], shapes[naming.head]
    if len(stem) != 4 or len(head) != 2 or not all((*stem, *head)):
        return None
    options, side = dict(naming.options), 0
    if naming.name != 'mnist_cnn':
        options['width'] = stem[0]
    if naming.name == 'resnet':
        options['stem'] = 'imagenet' if stem[2] == IMAGENET_KERNEL else 'cifar'
    if naming.flat:
        dense, convolution = (shapes[key] for key in naming.flat)
        if len(dense) != 2 or not convolution or not convolution[0]:
            return None
        side = max(1, math.isqrt(dense[1] // convolution[0]))
        if naming.name == 'vgg_bn':
            options |= {'pool_size': side, 'hidden': dense[0]}
    return Architecture(naming.name, options, head[0], stem[1], side)


def _expected_shapes(architecture: Architecture, naming: Naming) -> dict[str, tuple[int, ...]]:
    images = jax.ShapeDtypeStruct((1, *architecture.image_shape()), jnp.float32)
    leaves = flatten_dict(jax.eval_shape(architecture.build().init, jax.random.key(0), images), sep='/')
    return {key: torch_shape(leaves[path].shape) for key, path in naming.paths.items()}


def check_model(architecture: Architecture, options: ml_collections.ConfigDict, source: str) -> None:
    """Checks that `config.model` describes the network of the file.

    Args:
        architecture: Network of the file.
        options: `config.model`.
        source: Name of the file for error messages.

    Raises:
        UserError: If they differ.
    """
    fields = {'name': architecture.name, **architecture.options}
    if architecture.name != options.name:
        fields = {'name': architecture.name}
    differing = {field: value for field, value in fields.items() if options[field] != value}
    if differing:
        in_file = ', '.join(f'model.{field}={value}' for field, value in differing.items())
        in_config = ', '.join(f'model.{field}={options[field]}' for field in differing)
        raise UserError(f'{source} holds a network of {in_file}, but the config says {in_config}.')


def check_data(architecture: Architecture, num_classes: int, image_shape: tuple[int, int, int], source: str) -> None:
    """Checks that a data set has the classes, channels and image sizes of the network.

    Args:
        architecture: Network of the file.
        num_classes: Number of classes of the data.
        image_shape: Shape (H, W, C) of the images.
        source: Name of the file for error messages.

    Raises:
        UserError: If they differ.
    """
    *sides, channels = image_shape
    if architecture.num_classes != num_classes:
        raise UserError(f'{source} has {architecture.num_classes} classes, but the data have {num_classes}.')
    if architecture.channels != channels:
        raise UserError(f'{source} takes images of {architecture.channels} channels, but the data have {channels}.')
    if architecture.name == 'mnist_cnn' and any(math.ceil(side / 8) != architecture.flat_side for side in sides):
        largest = 8 * architecture.flat_side
        raise UserError(
            f'{source} takes images of {largest - 7} to {largest} pixels per side, but the images of the data '
            f'are {sides[0]}x{sides[1]}.'
        )


def _described(naming: Naming) -> str:
    return f'{naming.name} ({", ".join(f"{field}={value}" for field, value in naming.options.items())})'


def _listed(keys: list[str], others: list[str]) -> str:
    """Formats the number of keys and their names, each with the nearest of `others`."""
    shown = []
    for key in keys[:SHOWN]:
        near = nearest(key, others)
        shown.append(f'{key} (nearest: {near})' if near else key)
    more = f' and {len(keys) - SHOWN} more' if len(keys) > SHOWN else ''
    return f'{len(keys)} {"key" if len(keys) == 1 else "keys"} ({", ".join(shown)}{more})'


def _nearest(name: str, names: Iterable[str]) -> str:
    near = nearest(name, names)
    return f' The nearest is {near!r}.' if near else ''


def _shape(shape: tuple[int, ...]) -> str:
    return f'({", ".join(map(str, shape))})'

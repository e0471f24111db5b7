"""Which network a state dict is of, told from its keys and shapes."""

import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from flax import linen as nn

from aft_jax import models
from aft_jax.config import default_config
from aft_jax.errors import UserError, nearest
from aft_jax.interchange.convert import by_path, torch_shape
from aft_jax.interchange.torch_names import COUNTER, Naming, namings
from aft_jax.models.vgg_bn import SMALLEST_SIDE

# How many keys an error names of each kind.
SHOWN = 8
IMAGENET_KERNEL = 7


class Architecture(NamedTuple):
    """A network, as far as its weights tell it.

    Attributes:
        name: As in `config.model.name`.
        options: The other fields of `config.model` that the weights tell.
        num_classes: Of the head.
        channels: Of the images.
        flat_side: Side of the feature maps that `mnist_cnn` and `vgg_bn` flatten; 0 for others.
    """

    name: str
    options: dict[str, Any]
    num_classes: int
    channels: int
    flat_side: int

    def build(self) -> nn.Module:
        """Returns the network, for images that are normalised already."""
        config = default_config()
        config.model.update(name=self.name, mean=(0.0,), std=(1.0,), **self.options)
        return models.build(config, self.num_classes)

    def image_shape(self) -> tuple[int, int, int]:
        """Returns the shape (H, W, C) of images that fit: the size of the data is not in the weights."""
        side = 8 * self.flat_side if self.name == 'mnist_cnn' else SMALLEST_SIDE
        return side, side, self.channels

    def __str__(self) -> str:
        """Such as 'resnet (depth=18, width=64, stem=cifar, 10 classes, 3 channels)'."""
        options = [f'{field}={value}' for field, value in self.options.items()]
        return f'{self.name} ({", ".join(options)}, {self.num_classes} classes, {self.channels} channels)'


class Match(NamedTuple):
    """A naming, and how the keys of a file stand to it.

    Attributes:
        naming: The nearest network.
        keys: Its keys -> those of the file, as far as these are there.
        extra: Keys of the file that the network does not have.
    """

    naming: Naming
    keys: dict[str, str]
    extra: list[str]

    @property
    def missing(self) -> list[str]:
        """Keys of the network that the file lacks."""
        return [key for key in self.naming.paths if key not in self.keys]


def match(names: Iterable[str], mapping: Mapping[str, str | None], source: str) -> Match:
    """Returns the network whose keys are nearest to those of a file, all of them behind one prefix.

    The prefix is whatever makes the most keys agree: `module.`, `netC.`, `1.`, or none.

    Args:
        names: The keys of the file. Counters of batches are left aside.
        mapping: Keys of the file -> our path, or None for one to be left aside; others are read by their usual names.
        source: What to call the file in an error.

    Raises:
        UserError: The mapping names what there is not, or the file is of no network that is known.
    """
    names = [name for name in names if name.rpartition('.')[2] != COUNTER]
    candidates = _renamed(names, mapping, source)
    rest = [name for name in names if name not in mapping]
    prefixes = {''} | {name[: i + 1] for name in rest for i, letter in enumerate(name) if letter == '.'}
    best, best_difference = None, math.inf
    # The shortest of prefixes that are as good as each other.
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
            f'{source} is of no network that is known ({", ".join(models.NAMES)}): it has {len(names)} keys, such as '
            f'{shown}; for one of those networks under other names, give a mapping file.'
        )
    return best


def _renamed(names: list[str], mapping: Mapping[str, str | None], source: str) -> list[tuple[Naming, dict[str, str]]]:
    """Returns each network that has all the paths of the mapping, with the keys of it that the mapping stands for."""
    for name in mapping:
        if name not in names:
            raise UserError(f'the mapping file names {name!r}, which {source} does not hold.{_nearest(name, names)}')
    wanted = {path: name for name, path in mapping.items() if path is not None}
    if len(wanted) < sum(path is not None for path in mapping.values()):
        raise UserError('the mapping file gives one of our paths to two keys.')
    candidates = []
    for naming in namings():
        key_of = {path: key for key, path in naming.paths.items()}
        if all(path in key_of for path in wanted):
            candidates.append((naming, {key_of[path]: name for path, name in wanted.items()}))
    if not candidates:
        paths = {path for naming in namings() for path in naming.paths.values()}
        unknown = [path for path in wanted if path not in paths]
        if unknown:
            raise UserError(
                f'the mapping file names the path {unknown[0]!r}, which no network has.{_nearest(unknown[0], paths)}'
            )
        raise UserError('the mapping file names paths of different networks, which no single one has.')
    return candidates


def detect(match: Match, tensors: Mapping[str, np.ndarray], source: str) -> Architecture:
    """Returns the network with its sizes, after a look at every key and shape.

    Args:
        match: The network's names.
        tensors: The file's, by its own keys.
        source: What to call the file in an error.

    Raises:
        UserError: A key is missing, is one too many, or has another shape than the network's; all are listed.
    """
    naming = match.naming
    faults = []
    if missing := match.missing:
        faults.append(f'lacks {_listed(missing, match.extra)}')
    if match.extra:
        faults.append(f'has {_listed(match.extra, missing)} too many')
    if faults:
        raise UserError(
            f'{source} is nearest to {_described(naming)}, but {" and ".join(faults)}; a mapping file can give keys '
            'other names, or leave them aside.'
        )
    shapes = {key: tensors[name].shape for key, name in match.keys.items()}
    architecture = _sizes(naming, shapes)
    wrong = []
    if architecture is not None:
        expected = _expected_shapes(architecture, naming)
        wrong = [key for key in naming.paths if shapes[key] != expected[key]]
    if architecture is None or wrong:
        there = [f'{match.keys[key]} {_shape(shapes[key])} instead of {_shape(expected[key])}' for key in wrong[:SHOWN]]
        more = f' and {len(wrong) - SHOWN} more' if len(wrong) > SHOWN else ''
        what = f'{", ".join(there)}{more}' if wrong else f'{match.keys[naming.stem]} {_shape(shapes[naming.stem])}'
        raise UserError(f'{source} has the keys of {_described(naming)}, but not its shapes: {what}.')
    return architecture


def _sizes(naming: Naming, shapes: Mapping[str, tuple[int, ...]]) -> Architecture | None:
    """Returns what first and last layers tell, or None where they are no such layers at all."""
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
    leaves = by_path(jax.eval_shape(architecture.build().init, jax.random.key(0), images))
    return {key: torch_shape(leaves[path].shape) for key, path in naming.paths.items()}


def check_model(architecture: Architecture, options: ml_collections.ConfigDict, source: str) -> None:
    """Raises a UserError where `config.model` asks for another network than the file's.

    Args:
        architecture: The file's.
        options: `config.model`.
        source: What to call the file.
    """
    found = {'name': architecture.name, **architecture.options}
    if architecture.name != options.name:
        found = {'name': architecture.name}
    differing = {field: value for field, value in found.items() if options[field] != value}
    if differing:
        there = ', '.join(f'model.{field}={value}' for field, value in differing.items())
        here = ', '.join(f'model.{field}={options[field]}' for field in differing)
        raise UserError(f'{source} holds a network of {there}, but the config says {here}.')


def check_data(architecture: Architecture, num_classes: int, image_shape: tuple[int, int, int], source: str) -> None:
    """Raises a UserError where a data set has other classes, channels or image sizes than the network.

    Args:
        architecture: The file's.
        num_classes: Of the data.
        image_shape: Of the data, (H, W, C).
        source: What to call the file.
    """
    *sides, channels = image_shape
    if architecture.num_classes != num_classes:
        raise UserError(f'{source} tells {architecture.num_classes} classes apart, but the data have {num_classes}.')
    if architecture.channels != channels:
        raise UserError(f'{source} takes images of {architecture.channels} channels, but the data have {channels}.')
    if architecture.name == 'mnist_cnn' and any(math.ceil(side / 8) != architecture.flat_side for side in sides):
        largest = 8 * architecture.flat_side
        raise UserError(
            f'{source} takes images of {largest - 7} to {largest} pixels a side, but those of the data are '
            f'{sides[0]}x{sides[1]}.'
        )


def _described(naming: Naming) -> str:
    return f'{naming.name} ({", ".join(f"{field}={value}" for field, value in naming.options.items())})'


def _listed(keys: list[str], others: list[str]) -> str:
    """Returns how many keys there are and their names, each with the nearest of `others`."""
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

"""Random triggers: one drawn from a broad family, for measuring a defense on triggers that nobody chose.

    local            x' = x + o m (p - x)       a shape m of 0.5 to 15 % of the area, opacity o of 0.2 to 1, and a fill
                                                p: grey, coloured, noisy, or the inverted image 1 - x
    global           blend with noise or with a smooth picture; a sinusoid of any direction and frequency; a
                     low-frequency pattern; a colour cast (in grey images a change of contrast and brightness); gamma;
                     blur; sharpening; fewer grey levels
    geometric        a smooth warp, a shift, a small rotation
    sample_specific  a local pattern whose place or whose fill depends on the image: one of 8, chosen by the sum of its
                     stored pixel values

The draw is a function of `attack.random.seed` and the shape of the images. The experiment's seed has no influence on
it, so that the same trigger can be planted with several seeds. How strong global and geometric triggers are drawn lies
between hardly visible and obvious. Whether a model learns one is measured: a table leaves out models whose ASR before
any defense is below 80 %.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from aft_jax.attacks.attack import Attack
from aft_jax.attacks.trigger_functions import (
    add,
    filter_gaussian,
    gamma,
    invert,
    paste,
    paste_variant,
    quantise,
    resample,
    scale,
)
from aft_jax.attacks.trigger_shapes import SHAPES
from aft_jax.randomness import generator_for

NAME = 'random'
# Probability of each family.
FAMILIES = {'local': 0.45, 'global': 0.3, 'geometric': 0.1, 'sample_specific': 0.15}
AREAS = 0.005, 0.15
OPACITIES = 0.2, 1.0
FILLS = ('grey', 'coloured', 'noisy', 'inverted')
GLOBAL_KINDS = (
    *('noise', 'picture', 'sinusoid', 'low_frequency', 'colour_cast', 'gamma', 'blur', 'sharpening', 'grey_levels'),
)
GEOMETRIC_KINDS = ('warp', 'shift', 'rotation')
SAMPLE_SPECIFIC_KINDS = ('place', 'fill')
VARIANTS = 8

Trigger = Callable[[dict, jax.Array], jax.Array]


class RandomOptions(NamedTuple):
    """Section `attack.random` of the config.

    Attributes:
        seed: Seed of the draw.
    """

    seed: int


class Draw(NamedTuple):
    """A drawn trigger.

    Attributes:
        family: Key of `FAMILIES`.
        kind: Kind within the family, such as 'bar' or 'gamma'.
        facts: Sizes and strengths that were drawn, for tables and captions.
        arrays: Arrays that the trigger is made of.
        trigger: (arrays, images) -> images, float32 [B, H, W, C] in [0, 1].
    """

    family: str
    kind: str
    facts: dict[str, Any]
    arrays: dict[str, np.ndarray]
    trigger: Trigger


def build(options: RandomOptions, target_map: np.ndarray, image_shape: tuple[int, int, int]) -> Attack:
    """Builds the attack with the trigger that `options.seed` draws.

    Args:
        options: Section `attack.random` of the config.
        target_map: int32 [K], target label of each true class.
        image_shape: (H, W, C).
    """
    drawn = draw(options.seed, image_shape)
    return Attack(NAME, target_map, drawn.arrays, drawn.trigger)


def draw(seed: int, image_shape: tuple[int, int, int]) -> Draw:
    """Draws a trigger for images of shape (H, W, C)."""
    generator = generator_for(seed, 'attack/random')
    family = str(generator.choice(list(FAMILIES), p=list(FAMILIES.values())))
    draw_family = {
        'local': _draw_local,
        'global': _draw_global,
        'geometric': _draw_geometric,
        'sample_specific': _draw_sample_specific,
    }[family]
    return draw_family(generator, image_shape)


def describe(drawn: Draw) -> str:
    """Describes a drawn trigger in a few words, such as 'local bar, grey, 5.1 % of the area, opacity 0.83'."""
    words = [f'{drawn.family.replace("_", "-")} {drawn.kind.replace("_", " ")}']
    for name, value in drawn.facts.items():
        match name:
            case 'area':
                words.append(f'{100 * value:.1f} % of the area')
            case 'fill' | 'shape':
                words.append(str(value))
            case _:
                words.append(f'{name.replace("_", " ")} {value:.2g}')
    return ', '.join(words)


def _draw_local(generator: np.random.Generator, image_shape: tuple[int, int, int]) -> Draw:
    height, width, _ = image_shape
    kind = str(generator.choice(list(SHAPES)))
    wanted = math.exp(generator.uniform(*np.log(AREAS)))
    mask = SHAPES[kind](generator, height, width, max(4, round(wanted * height * width)))
    opacity = generator.uniform(*OPACITIES)
    fill = str(generator.choice(FILLS))
    facts = {'fill': fill, 'area': float(mask.mean()), 'opacity': opacity}
    arrays = {'opacity': (opacity * mask[..., None]).astype(np.float32)}
    if fill == 'inverted':
        return Draw('local', kind, facts, arrays, invert)
    return Draw('local', kind, facts, arrays | {'pattern': _fill(generator, fill, image_shape)}, paste)


def _draw_global(generator: np.random.Generator, image_shape: tuple[int, int, int]) -> Draw:
    height, width, channels = image_shape
    kind = str(generator.choice(GLOBAL_KINDS))
    match kind:
        case 'noise' | 'picture':
            opacity = generator.uniform(0.08, 0.3)
            noise = kind == 'noise'
            pattern = generator.random(image_shape) if noise else _smooth(generator, image_shape, 6) / 2 + 0.5
            arrays = {'pattern': pattern, 'opacity': np.full((height, width, 1), opacity)}
            return _global(kind, {'opacity': opacity}, arrays, paste)
        case 'sinusoid':
            amplitude, angle = generator.uniform(0.05, 0.2), generator.uniform(0, math.pi)
            periods = math.exp(generator.uniform(math.log(1), math.log(min(height, width) / 3)))
            rows, columns = np.mgrid[:height, :width]
            place = (rows / height) * math.sin(angle) + (columns / width) * math.cos(angle)
            wave = amplitude * np.sin(2 * math.pi * (periods * place + generator.random()))
            facts = {'amplitude': amplitude, 'periods': periods, 'degrees': math.degrees(angle)}
            return _global(kind, facts, {'pattern': np.repeat(wave[..., None], channels, axis=2)}, add)
        case 'low_frequency':
            amplitude = generator.uniform(0.08, 0.25)
            return _global(
                kind, {'amplitude': amplitude}, {'pattern': amplitude * _smooth(generator, image_shape, 3)}, add
            )
        case 'colour_cast':
            gain, offset = generator.uniform(0.6, 1.3, channels), generator.uniform(-0.2, 0.3, channels)
            facts = {'gain': float(gain.mean()), 'offset': float(offset.mean())}
            return _global(kind, facts, {'gain': gain, 'offset': offset}, scale)
        case 'gamma':
            value = math.exp(generator.choice([-1, 1]) * generator.uniform(math.log(1.5), math.log(3)))
            return _global(kind, {'gamma': value}, {'gamma': np.asarray(value)}, gamma)
        case 'blur' | 'sharpening':
            sigma = generator.uniform(0.7, 2.0)
            amount = 1.0 if kind == 'blur' else -generator.uniform(1.0, 3.0)
            arrays = {
                'rows': _blurring(height, sigma),
                'columns': _blurring(width, sigma),
                'amount': np.asarray(amount),
            }
            return _global(kind, {'sigma': sigma, 'amount': amount}, arrays, filter_gaussian)
        case _:
            levels = int(generator.integers(2, 7))
            return _global(kind, {'levels': levels}, {'levels': np.asarray(levels)}, quantise)


def _draw_geometric(generator: np.random.Generator, image_shape: tuple[int, int, int]) -> Draw:
    height, width, _ = image_shape
    kind = str(generator.choice(GEOMETRIC_KINDS))
    columns, rows = np.meshgrid(np.arange(width, dtype=np.float64), np.arange(height, dtype=np.float64))
    match kind:
        case 'warp':
            pixels = generator.uniform(1.0, 2.5)
            moves = pixels * _smooth(generator, (height, width, 2), 4)
            rows, columns, facts = rows + moves[..., 0], columns + moves[..., 1], {'pixels': pixels}
        case 'shift':
            down, right = 0.0, 0.0
            while abs(down) + abs(right) < 2:
                down, right = generator.integers(-4, 5, 2).astype(float)
            rows, columns, facts = rows + down, columns + right, {'down': 0.0 - down, 'right': 0.0 - right}
        case _:
            degrees = generator.choice([-1, 1]) * generator.uniform(8, 25)
            sine, cosine = math.sin(math.radians(degrees)), math.cos(math.radians(degrees))
            row, column = rows - (height - 1) / 2, columns - (width - 1) / 2
            rows = (height - 1) / 2 + cosine * row - sine * column
            columns = (width - 1) / 2 + sine * row + cosine * column
            facts = {'degrees': degrees}
    field = np.stack([2 * columns / (width - 1) - 1, 2 * rows / (height - 1) - 1], axis=-1)
    return Draw('geometric', kind, facts, {'field': field.astype(np.float32)}, resample)


def _draw_sample_specific(generator: np.random.Generator, image_shape: tuple[int, int, int]) -> Draw:
    height, width, _ = image_shape
    kind = str(generator.choice(SAMPLE_SPECIFIC_KINDS))
    shape = str(generator.choice(list(SHAPES)))
    wanted = math.exp(generator.uniform(math.log(0.01), math.log(AREAS[1])))
    mask = SHAPES[shape](generator, height, width, max(4, round(wanted * height * width)))
    opacity = generator.uniform(0.5, 1.0)
    fill = str(generator.choice(FILLS[:3]))
    pattern = _fill(generator, fill, image_shape)
    if kind == 'place':
        # Shifts wrap around the edges, so that every place shows all of the shape.
        moves = [tuple(generator.integers(0, size) for size in (height, width)) for _ in range(VARIANTS)]
        masks = np.stack([np.roll(mask, move, (0, 1)) for move in moves])
        patterns = np.stack([np.roll(pattern, move, (0, 1)) for move in moves])
    else:
        masks = np.repeat(mask[None], VARIANTS, axis=0)
        patterns = np.stack([_fill(generator, fill, image_shape) for _ in range(VARIANTS)])
    facts = {'shape': shape, 'fill': fill, 'area': float(mask.mean()), 'opacity': opacity}
    arrays = {'pattern': patterns, 'opacity': (opacity * masks[..., None]).astype(np.float32)}
    return Draw('sample_specific', kind, facts, arrays, paste_variant)


def _global(kind: str, facts: dict[str, Any], arrays: dict[str, np.ndarray], trigger: Trigger) -> Draw:
    return Draw('global', kind, facts, {name: np.asarray(array, np.float32) for name, array in arrays.items()}, trigger)


def _fill(generator: np.random.Generator, fill: str, image_shape: tuple[int, int, int]) -> np.ndarray:
    """Draws what a shape is filled with: float32 [H, W, C]."""
    channels = image_shape[2]
    match fill:
        case 'grey':
            values = np.full(channels, generator.random())
        case 'coloured':
            values = generator.random(channels)
        case _:
            return generator.random(image_shape, np.float32)
    return np.broadcast_to(values, image_shape).astype(np.float32)


def _smooth(generator: np.random.Generator, shape: tuple[int, int, int], grid: int) -> np.ndarray:
    """Draws a smooth pattern [H, W, C] whose largest magnitude is 1, bilinear between grid x grid random values."""
    height, width, channels = shape
    values = generator.uniform(-1, 1, (grid, grid, channels))
    rows, columns = (_between_points(length, grid) for length in (height, width))
    pattern = np.einsum('hi,ijc,wj->hwc', rows, values, columns)
    return pattern / np.abs(pattern).max()


def _between_points(length: int, grid: int) -> np.ndarray:
    """Builds float64 [length, grid]: the weight of each grid value in each pixel of a line."""
    places = np.linspace(0, grid - 1, length)
    return np.maximum(0, 1 - np.abs(places[:, None] - np.arange(grid)[None]))


def _blurring(length: int, sigma: float) -> np.ndarray:
    """Builds float64 [length, length]: a Gaussian blur of a line, each row with sum 1."""
    places = np.arange(length)
    weights = np.exp(-0.5 * np.square((places[:, None] - places[None]) / sigma))
    return weights / weights.sum(axis=1, keepdims=True)

"""The kinds of adversarial perturbations: how each starts, changes images, and climbs the loss.

    linf           x' = clip(x + d),  |d| <= size in each pixel
    l2             x' = clip(x + d),  ||d|| <= size
    low_frequency  x' = clip(x + d),  d interpolated between LOW_GRID x LOW_GRID values, each within +-size
    sparse         x' = x but for `size` pixels of each step, which become 0 or 1
    rectangle      x' = x + o m (p - x),  m a rectangle of the share `size` of the area, of random aspect ratio
    region         x' = x + o m (p - x),  m a smooth random region of that share
    tone           x' = clip((1 + a) x^exp(g) + b) in each channel,  |a|, 2 |b|, 2/3 |g| <= size
    blur           x' = clip(x + t (blurred x - x)),  -size <= t <= min(size, 1); t < 0 sharpens
    warp           x' = x sampled at positions shifted by up to `size` pixels
    affine         x' = x rotated by up to 3 size radians, scaled by 1 +- 0.7 size, shifted by up to size of a side

A step moves the values by a share of their range along the sign (l2: the direction) of the gradient. A sparse step sets
the pixels with the largest gradient magnitude; for a single image the score is |gradient| times the distance to the new
value. The place of a rectangle or a region is the best of several random ones (`masks`): the one whose pixels would
raise the loss most, to first order, at their best values. Its pattern p then takes steps at full contrast, with a
random opacity o.

Source: Wu et al., "Defending Against Physically Realizable Attacks on Image Classification" (ICLR 2020), for rectangles
placed by the gradient; Xiao et al., "Spatially Transformed Adversarial Examples" (2018), for warps of single images.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np

from aft_jax.adversarial.masks import draw_rectangles, draw_regions
from aft_jax.adversarial.pgd import direction, project, random_in_ball
from aft_jax.ops.resampling import sample_bilinear

Kind = Literal['linf', 'l2', 'low_frequency', 'sparse', 'rectangle', 'region', 'tone', 'blur', 'warp', 'affine']
KINDS: tuple[Kind, ...] = get_args(Kind)
# Kinds whose start needs the gradient at the unperturbed images.
PLACED_BY_GRADIENT: tuple[Kind, ...] = ('rectangle', 'region')
# Points along each side between which warps and low-frequency patterns are interpolated.
GRID, LOW_GRID = 7, 5
# Length of a step: a share of the size, or for rectangles and regions of the range of pixels.
STEP, PATTERN_STEP = 0.25, 0.3
SMALLEST_OPACITY = 0.4
# Standard deviation of the blur in pixels.
BLUR_SIGMA = 1.4


class Perturbation(NamedTuple):
    """A universal perturbation (N = 1), or one for each of N images.

    Attributes:
        values: linf, l2: the sum's second term, [N, H, W, C]. low_frequency: its values between which it is
            interpolated, [N, LOW_GRID, LOW_GRID, C]. sparse, rectangle, region: new values of pixels, [N, H, W, C].
            tone: g, a and b, [N, 1, 3, C]. blur: t, [N, 1, 1, 1]. warp: rows and columns by which the points of the
            grid are shifted, in pixels, [N, GRID, GRID, 2]. affine: rotation, scale, and shift in rows and columns,
            each in units of its largest, [N, 1, 1, 4].
        chosen: sparse: 1 in the pixels that are set. rectangle, region: opacity o m. [N, H, W, 1]. Other kinds: 1.
        size: Size of each in the unit of the kind, [N, 1, 1, 1].
    """

    values: jax.Array
    chosen: jax.Array
    size: jax.Array


class Start(NamedTuple):
    """What a perturbation starts from.

    Attributes:
        size: float32 [N, 1, 1, 1].
        images: float32 [B, H, W, C] in [0, 1], unperturbed. N is B, or 1 for a universal perturbation.
        gradient: Gradient of the loss at the images, [B, H, W, C]; None for kinds that are not `PLACED_BY_GRADIENT`.
    """

    size: jax.Array
    images: jax.Array
    gradient: jax.Array | None = None

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(N, H, W, C)."""
        height, width, channels = self.images.shape[1:]
        return len(self.size), height, width, channels


class Rules(NamedTuple):
    """How a kind starts, changes images, and takes a step.

    Attributes:
        init: (key, start) -> random perturbation; a sparse one is empty.
        apply: (perturbation, images) -> perturbed images, float32 [B, H, W, C] in [0, 1].
        advance: (perturbation, gradient, images) -> perturbation one step up the loss. The gradient is that of the
            loss, in the shape of the values; the images are unperturbed.
    """

    init: Callable[[jax.Array, Start], Perturbation]
    apply: Callable[[Perturbation, jax.Array], jax.Array]
    advance: Callable[[Perturbation, jax.Array, jax.Array], Perturbation]


# Patterns that are added.


def _init_l2(key: jax.Array, start: Start) -> Perturbation:
    return _plain(start.size * random_in_ball(key, start.shape, 1.0, 'l2'), start)


def _advance_l2(perturbation: Perturbation, gradient: jax.Array, images: jax.Array) -> Perturbation:
    values, _, size = perturbation
    moved = values + STEP * size * direction(gradient, 'l2')
    return perturbation._replace(values=size * project(moved / size, 1.0, 'l2'))


def _apply_sum(perturbation: Perturbation, images: jax.Array) -> jax.Array:
    return jnp.clip(images + perturbation.values, 0.0, 1.0)


def _apply_low_frequency(perturbation: Perturbation, images: jax.Array) -> jax.Array:
    return jnp.clip(images + _interpolate(perturbation.values, *images.shape[1:3]), 0.0, 1.0)


# Pixels that are replaced.


def _init_sparse(key: jax.Array, start: Start) -> Perturbation:
    blank = jnp.zeros(start.shape, jnp.float32)
    return Perturbation(blank, blank[..., :1], start.size)


def _apply_sparse(perturbation: Perturbation, images: jax.Array) -> jax.Array:
    values, chosen, _ = perturbation
    # The last term is zero. It passes on the gradient of pixels that are not set.
    unset = (values - jax.lax.stop_gradient(values)) * (1 - chosen)
    return images + (values - images) * chosen + unset


def _advance_sparse(perturbation: Perturbation, gradient: jax.Array, images: jax.Array) -> Perturbation:
    values, chosen, size = perturbation
    targets = (gradient > 0).astype(jnp.float32)
    distance = jnp.abs(targets - images) if len(values) == len(images) else jnp.ones_like(values)
    scores = (jnp.abs(gradient) * distance).sum(axis=-1) * (1 - chosen[..., 0])
    ranks = jnp.argsort(jnp.argsort(-scores.reshape(len(scores), -1), axis=1), axis=1)
    new = (ranks.reshape(chosen.shape).astype(jnp.float32) < size).astype(jnp.float32)
    return Perturbation(jnp.where(new > 0, targets, values), chosen + new, size)


def _init_pasted(draw: Callable[[jax.Array, jax.Array, int, int], jax.Array], key: jax.Array, start: Start):
    assert start.gradient is not None
    count, height, width, channels = start.shape
    place_key, colour_key, opacity_key = jax.random.split(key, 3)
    masks = draw(place_key, start.size[:, 0, 0, 0], height, width)
    # Gain of each pixel, to first order, at 1 and at 0.
    bright, dark = start.gradient * (1 - start.images), -start.gradient * start.images
    if count == 1:
        bright, dark = bright.sum(axis=0, keepdims=True), dark.sum(axis=0, keepdims=True)
    gain = jnp.maximum(bright, dark).sum(axis=-1)
    # Areas differ by the rounding of sides, and a larger one must not win by that alone.
    scores = jnp.einsum('nmhw,nhw->nm', masks, gain, precision='highest') / jnp.sqrt(masks.sum(axis=(2, 3)))
    best = jnp.take_along_axis(masks, scores.argmax(axis=1)[:, None, None, None], axis=1)[:, 0, :, :, None]
    colour = jax.random.uniform(colour_key, (count, 1, 1, channels))
    opacity = jax.random.uniform(opacity_key, (count, 1, 1, 1), jnp.float32, SMALLEST_OPACITY, 1.0)
    return Perturbation((colour + (bright > dark).astype(jnp.float32)) / 2, opacity * best, start.size)


def _apply_pasted(perturbation: Perturbation, images: jax.Array) -> jax.Array:
    return images + perturbation.chosen * (perturbation.values - images)


def _advance_pasted(perturbation: Perturbation, gradient: jax.Array, images: jax.Array) -> Perturbation:
    moved = perturbation.values + PATTERN_STEP * jnp.sign(gradient)
    return perturbation._replace(values=jnp.clip(moved, 0.0, 1.0))


# Colours and sharpness.


def _apply_tone(perturbation: Perturbation, images: jax.Array) -> jax.Array:
    exponent, gain, offset = (perturbation.values[:, :, i : i + 1] for i in range(3))
    # The logarithm is finite, and so is its gradient.
    power = jnp.exp(jnp.exp(1.5 * exponent) * jnp.log(jnp.maximum(images, 1e-3)))
    return jnp.clip((1 + gain) * power + offset / 2, 0.0, 1.0)


def _apply_blur(perturbation: Perturbation, images: jax.Array) -> jax.Array:
    rows, columns = (_blurring(length) for length in images.shape[1:3])
    blurred = jnp.einsum('ih,bhwc,jw->bijc', rows, images, columns, precision='highest')
    return jnp.clip(images + jnp.minimum(perturbation.values, 1.0) * (blurred - images), 0.0, 1.0)


# Shapes.


def _apply_warp(perturbation: Perturbation, images: jax.Array) -> jax.Array:
    shifts = _interpolate(perturbation.values, *images.shape[1:3])
    rows, columns = _positions(images)
    return _sample(images, rows + shifts[..., 0], columns + shifts[..., 1])


def _apply_affine(perturbation: Perturbation, images: jax.Array) -> jax.Array:
    height, width = images.shape[1:3]
    angle, scale, down, right = (perturbation.values[:, 0, 0, i, None, None] for i in range(4))
    sine, cosine = (1 + 0.7 * scale) * jnp.sin(3 * angle), (1 + 0.7 * scale) * jnp.cos(3 * angle)
    middle_row, middle_column = (height - 1) / 2, (width - 1) / 2
    rows, columns = _positions(images)
    rows, columns = rows - middle_row, columns - middle_column
    return _sample(
        images,
        cosine * rows - sine * columns + down * height + middle_row,
        sine * rows + cosine * columns + right * width + middle_column,
    )


def _positions(images: jax.Array) -> tuple[jax.Array, jax.Array]:
    height, width = images.shape[1:3]
    return jnp.arange(height, dtype=jnp.float32)[None, :, None], jnp.arange(width, dtype=jnp.float32)[None, None, :]


def _sample(images: jax.Array, rows: jax.Array, columns: jax.Array) -> jax.Array:
    shape = images.shape[:3]
    return sample_bilinear(images, jnp.broadcast_to(rows, shape), jnp.broadcast_to(columns, shape))


def _interpolate(values: jax.Array, height: int, width: int) -> jax.Array:
    """Interpolates [N, G, G, C] bilinearly to [N, H, W, C]. The first and last point lie on the outermost pixels."""
    rows, columns = (_interpolation(length, values.shape[1]) for length in (height, width))
    return jnp.einsum('hi,bijc,wj->bhwc', rows, values, columns, precision='highest')


def _interpolation(length: int, points: int) -> np.ndarray:
    """Computes weights float32 [length, points] that interpolate linearly between evenly spaced points."""
    positions = np.linspace(0, points - 1, length)
    return np.maximum(0, 1 - np.abs(positions[:, None] - np.arange(points)[None])).astype(np.float32)


def _blurring(length: int) -> np.ndarray:
    """Computes weights float32 [length, length] of a Gaussian blur along a line, each row with sum 1."""
    places = np.arange(length)
    weights = np.exp(-0.5 * np.square((places[:, None] - places[None]) / BLUR_SIGMA))
    return (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32)


# Values within +-size.


def _plain(values: jax.Array, start: Start) -> Perturbation:
    return Perturbation(values, jnp.ones((), jnp.float32), start.size)


def _advance_in_box(perturbation: Perturbation, gradient: jax.Array, images: jax.Array) -> Perturbation:
    values, _, size = perturbation
    return perturbation._replace(values=jnp.clip(values + STEP * size * jnp.sign(gradient), -size, size))


def _in_box(shape: Callable[[int, int, int], tuple[int, int, int]], apply: Callable) -> Rules:
    """Builds the rules of a kind whose values lie within +-size; `shape` is a function of (H, W, C)."""

    def init(key: jax.Array, start: Start) -> Perturbation:
        count, *image_shape = start.shape
        values = jax.random.uniform(key, (count, *shape(*image_shape)), jnp.float32, -1.0, 1.0)
        return _plain(start.size * values, start)

    return Rules(init, apply, _advance_in_box)


def _pasted(draw: Callable[[jax.Array, jax.Array, int, int], jax.Array]) -> Rules:
    return Rules(lambda key, start: _init_pasted(draw, key, start), _apply_pasted, _advance_pasted)


RULES: dict[Kind, Rules] = {
    'linf': _in_box(lambda height, width, channels: (height, width, channels), _apply_sum),
    'l2': Rules(_init_l2, _apply_sum, _advance_l2),
    'low_frequency': _in_box(lambda height, width, channels: (LOW_GRID, LOW_GRID, channels), _apply_low_frequency),
    'sparse': Rules(_init_sparse, _apply_sparse, _advance_sparse),
    'rectangle': _pasted(draw_rectangles),
    'region': _pasted(draw_regions),
    'tone': _in_box(lambda height, width, channels: (1, 3, channels), _apply_tone),
    'blur': _in_box(lambda height, width, channels: (1, 1, 1), _apply_blur),
    'warp': _in_box(lambda height, width, channels: (GRID, GRID, 2), _apply_warp),
    'affine': _in_box(lambda height, width, channels: (1, 1, 4), _apply_affine),
}

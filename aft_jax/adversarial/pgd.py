"""Projected gradient descent (Madry et al., 2018) on any differentiable classifier, vectorised over the batch.

    x_0 = x, or a random point of the ball around x
    x_{t+1} = clip(project(x_t + step_size * direction(grad_x CE(f(x_t), y))))

The direction is the sign of the gradient (Linf) or the gradient over its norm (L2). The gradient is taken with
respect to the images alone. No model is imported here: the classifier is a function from images to logits.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

Norm = Literal['linf', 'l2']
NORMS: tuple[Norm, ...] = ('linf', 'l2')
Logits = Callable[[jax.Array], jax.Array]


class PGD(NamedTuple):
    """Options of PGD.

    Attributes:
        eps: Radius of the ball around each image, in units of [0, 1] pixels.
        step_size: Length of a step, in the same units.
        steps: Number of steps.
        norm: 'linf' or 'l2'.
        random_start: Whether to start from a uniformly drawn point of the ball.
        clip: Whether images stay in [0, 1].
    """

    eps: float
    step_size: float
    steps: int
    norm: Norm = 'linf'
    random_start: bool = False
    clip: bool = True


def perturb(logits: Logits, images: jax.Array, labels: jax.Array, key: jax.Array, pgd: PGD) -> jax.Array:
    """Computes untargeted adversarial examples.

    Args:
        logits: Classifier in evaluation mode, float32 [B, H, W, C] -> float32 [B, K].
        images: float32 [B, H, W, C] in [0, 1].
        labels: int32 [B], true classes.
        key: PRNG key of the random start; unused without one.
        pgd: Options.

    Returns:
        float32 [B, H, W, C], each within `pgd.eps` of its image.
    """

    def loss(x: jax.Array) -> jax.Array:
        return optax.softmax_cross_entropy_with_integer_labels(logits(x), labels).sum()

    gradient = jax.grad(loss)

    def step(x: jax.Array) -> jax.Array:
        moved = x + pgd.step_size * direction(gradient(x), pgd.norm)
        return _into_range(images + project(moved - images, pgd.eps, pgd.norm), pgd.clip)

    x = images
    if pgd.random_start:
        x = _into_range(images + random_in_ball(key, images.shape, pgd.eps, pgd.norm), pgd.clip)
    return repeat(step, x, pgd.steps, unroll=slow_in_loops(logits))


def slow_in_loops(logits: Logits) -> bool:
    """Decides whether gradients of a classifier are slow inside a compiled loop.

    The function may say so by an attribute of this name (`models.logits_function`). Otherwise the answer is yes on a
    CPU: there, XLA computes the gradient of a convolution many times slower inside a loop.
    """
    return getattr(logits, 'slow_in_loops', jax.default_backend() == 'cpu')


def repeat(step: Callable[[Any], Any], start: Any, times: int, unroll: bool) -> Any:
    """Applies a step to a pytree several times.

    Args:
        step: One step.
        start: Pytree before the first step.
        times: Number of steps.
        unroll: Whether each step is compiled, instead of one loop.
    """
    if unroll:
        for _ in range(times):
            start = step(start)
        return start
    return jax.lax.fori_loop(0, times, lambda _, x: step(x), start)


def direction(gradient: jax.Array, norm: Norm) -> jax.Array:
    """Computes the unit step of steepest ascent for each image of [B, H, W, C]; zero where the gradient is zero."""
    if norm == 'linf':
        return jnp.sign(gradient)
    lengths = _lengths(gradient)
    return jnp.where(lengths > 0, gradient / jnp.where(lengths > 0, lengths, 1.0), 0.0)


def project(delta: jax.Array, eps: float, norm: Norm) -> jax.Array:
    """Projects perturbations [B, H, W, C] onto the ball of radius `eps`, image by image."""
    if norm == 'linf':
        return jnp.clip(delta, -eps, eps)
    lengths = _lengths(delta)
    return delta * (eps / jnp.maximum(lengths, eps))


def random_in_ball(key: jax.Array, shape: tuple[int, ...], eps: float, norm: Norm) -> jax.Array:
    """Draws perturbations of `shape` [B, H, W, C] uniformly from the ball of radius `eps`."""
    if norm == 'linf':
        return jax.random.uniform(key, shape, jnp.float32, -eps, eps)
    direction_key, radius_key = jax.random.split(key)
    gaussian = jax.random.normal(direction_key, shape, jnp.float32)
    size = shape[1] * shape[2] * shape[3]
    radius = eps * jax.random.uniform(radius_key, (shape[0], 1, 1, 1)) ** (1.0 / size)
    return radius * gaussian / _lengths(gaussian)


def _lengths(images: jax.Array) -> jax.Array:
    return jnp.sqrt(jnp.sum(jnp.square(images), axis=(1, 2, 3), keepdims=True))


def _into_range(images: jax.Array, clip: bool) -> jax.Array:
    return jnp.clip(images, 0.0, 1.0) if clip else images

"""Projected gradient descent (Madry et al., 2018) on any differentiable classifier, vectorised over the batch.

    x_0 = x, or a random point of the ball around x
    x_{t+1} = clip(project(x_t + step_size * direction(grad_x CE(f(x_t), y))))

The direction is the sign of the gradient (Linf) or the gradient over its norm (L2). The gradient is taken with
respect to the images alone. Knows no model and no defense: the classifier is a function from images to logits.
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
    """What PGD is to do.

    Attributes:
        eps: Radius of the ball around each image, in units of [0, 1] pixels.
        step_size: Length of a step, in the same units.
        steps: Number of steps.
        norm: 'linf' or 'l2'.
        random_start: Whether to start from a uniformly drawn point of the ball.
        restarts: Independent runs, of which each image keeps the one with the best loss. More than one needs a
            random start.
        targeted: Whether `labels` are to be reached rather than left.
        clip: Whether images stay in [0, 1].
    """

    eps: float
    step_size: float
    steps: int
    norm: Norm = 'linf'
    random_start: bool = False
    restarts: int = 1
    targeted: bool = False
    clip: bool = True


def perturb(
    logits: Logits, images: jax.Array, labels: jax.Array, key: jax.Array, pgd: PGD, *, unroll: bool | None = None
) -> jax.Array:
    """Returns adversarial examples.

    Args:
        logits: Classifier in evaluation mode, float32 [B, H, W, C] -> float32 [B, K].
        images: float32 [B, H, W, C] in [0, 1].
        labels: int32 [B], the true classes, or those to be reached when `pgd.targeted`.
        key: PRNG key of the random start; unused without one.
        pgd: What to do.
        unroll: As for `repeat`.

    Returns:
        float32 [B, H, W, C], each within `pgd.eps` of its image.
    """
    if pgd.restarts == 1:
        return _run(logits, images, labels, key, pgd, unroll)[0]
    keys = jax.random.split(key, pgd.restarts)
    candidates, losses = jax.vmap(lambda k: _run(logits, images, labels, k, pgd, unroll))(keys)
    best = jnp.argmax(losses, axis=0)
    return jnp.take_along_axis(candidates, best[None, :, None, None, None], axis=0)[0]


def repeat(step: Callable[[Any], Any], start: Any, times: int, unroll: bool | None = None) -> Any:
    """Returns what so many steps make of a pytree.

    Args:
        step: One step.
        start: Before the first one.
        times: How many.
        unroll: Whether each step is compiled, instead of a loop; None for yes on a CPU, where gradients of convolutions
            are slow inside a loop (but see `models.cpu_options.slow_in_loops`).
    """
    if jax.default_backend() == 'cpu' if unroll is None else unroll:
        for _ in range(times):
            start = step(start)
        return start
    return jax.lax.fori_loop(0, times, lambda _, x: step(x), start)


def _run(
    logits: Logits, images: jax.Array, labels: jax.Array, key: jax.Array, pgd: PGD, unroll: bool | None
) -> tuple[jax.Array, jax.Array]:
    """One run from one start. Returns the examples [B, H, W, C] and what each achieved [B], larger is better."""
    sign = -1.0 if pgd.targeted else 1.0

    def objective(x: jax.Array) -> jax.Array:
        return sign * optax.softmax_cross_entropy_with_integer_labels(logits(x), labels)

    gradient = jax.grad(lambda x: objective(x).sum())

    def step(x: jax.Array) -> jax.Array:
        moved = x + pgd.step_size * direction(gradient(x), pgd.norm)
        return _into_range(images + project(moved - images, pgd.eps, pgd.norm), pgd.clip)

    x = images
    if pgd.random_start:
        x = _into_range(images + random_in_ball(key, images.shape, pgd.eps, pgd.norm), pgd.clip)
    x = repeat(step, x, pgd.steps, unroll)
    return x, (objective(x) if pgd.restarts > 1 else jnp.zeros(images.shape[0]))


def direction(gradient: jax.Array, norm: Norm) -> jax.Array:
    """Returns the unit step of steepest ascent for each image of [B, H, W, C]; zero where the gradient is zero."""
    if norm == 'linf':
        return jnp.sign(gradient)
    lengths = _lengths(gradient)
    return jnp.where(lengths > 0, gradient / jnp.where(lengths > 0, lengths, 1.0), 0.0)


def project(delta: jax.Array, eps: float, norm: Norm) -> jax.Array:
    """Returns the nearest perturbation [B, H, W, C] in the ball of radius `eps`, image by image."""
    if norm == 'linf':
        return jnp.clip(delta, -eps, eps)
    lengths = _lengths(delta)
    return delta * (eps / jnp.maximum(lengths, eps))


def random_in_ball(key: jax.Array, shape: tuple[int, ...], eps: float, norm: Norm) -> jax.Array:
    """Returns perturbations of `shape` [B, H, W, C] drawn uniformly from the ball of radius `eps`."""
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

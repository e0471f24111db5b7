"""MCR: mode connectivity repair (Zhao et al., "Bridging Mode Connectivity in Loss Landscapes and Adversarial
Robustness", ICLR 2020, arXiv 2005.00060).

Two models of low loss are connected by a curve of low loss, on which a backdoor need not survive. Here it is a
quadratic Bezier curve from w1, the infected model, to w2, the infected model fine-tuned on clean images:

    phi(t) = (1 - t)^2 w1 + 2 t (1 - t) theta + t^2 w2

theta starts at the midpoint of w1 and w2, and is trained on clean images at t ~ U(0, 1), one t a batch. The purified
model is phi(t) at one of the candidates t, with BatchNorm statistics measured on the clean images.

In the paper both ends have a backdoor, so that the middle is furthest from both. Here only w1 has one. A candidate with
a larger t is further from the infected model and thus stronger; `defender.strongest` chooses among the candidates.

Needs: the infected model and clean images. Costs: a fine-tuning, a training, and for each candidate a pass over the
clean images.
"""

import time
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from aft_jax.data.augment import AugmentOptions, augment
from aft_jax.data.order import count_steps
from aft_jax.defenses.batch_norm_statistics import Statistics
from aft_jax.defenses.defender import DefenderData, DefenseSettings, Purified, choose, hold_out, start_training
from aft_jax.defenses.ft import fine_tune
from aft_jax.runtime.sharding import replicate
from aft_jax.training.loop import fit
from aft_jax.training.stage import Phase, Run, TrainingStage
from aft_jax.training.state import Batch, Metrics, TrainState
from aft_jax.training.steps import accuracy, advance, apply_training, cross_entropy


class McrOptions(NamedTuple):
    """Section `mcr` of the config.

    Attributes:
        endpoint_epochs: Length of the fine-tuning that gives w2.
        epochs: Length of the training of theta.
        learning_rate: Learning rate of the first step, for both.
        schedule: 'constant' or 'cosine'.
        max_grad_norm: Largest norm of a gradient. 0 for no limit.
        candidates: Values of t in (0, 1).
    """

    endpoint_epochs: float
    epochs: float
    learning_rate: float
    schedule: str
    max_grad_norm: float
    candidates: tuple[float, ...]


def purify(run: Run, name: str, data: DefenderData, settings: DefenseSettings) -> Purified:
    """Trains the curve, and takes its strongest point.

    Args:
        run: Experiment.
        name: Name of the defense. The fine-tuned end and the curve have names of their own below it.
        data: Infected model and clean images.
        settings: Settings with `McrOptions`.
    """
    options: McrOptions = settings.options
    rate = options.learning_rate
    kept, held = hold_out(data, settings.tuning.held_out_share, run.seed)
    endpoint = fine_tune(run, f'{name}/endpoint', kept, settings, epochs=options.endpoint_epochs, learning_rate=rate)
    ends = replicate(run.mesh, (data.variables['params'], endpoint.state.params))
    midpoint = jax.tree.map(lambda start, end: (start + end) / 2, *ends)
    steps = count_steps(len(kept.labels), options.epochs, settings.batch_size)
    middle = kept._replace(variables=data.variables | {'params': midpoint})
    before, optimiser = start_training(middle, settings, steps, rate)
    step = partial(mcr_step, module=kept.module, optimiser=optimiser, augmentation=settings.augment)
    curve = fit(
        run,
        TrainingStage(f'{name}/curve', before, [Phase(step, steps)], kept.arrays, settings.batch_size, constants=ends),
    )

    started = time.monotonic()
    statistics = Statistics(kept.module, run.mesh, settings.batch_size)

    def model_at(t: float) -> dict:
        params = point(ends[0], curve.state.params, ends[1], t)
        return statistics(curve.state.variables | {'params': params}, kept.images)

    candidates = sorted(options.candidates)
    choice = choose(run, held, (model_at(t) for t in candidates), settings.tuning)
    variables = model_at(candidates[choice.chosen])
    return Purified(variables, endpoint.seconds + curve.seconds + time.monotonic() - started)


def point(start: Any, bend: Any, end: Any, t: float | jax.Array) -> Any:
    """Computes phi(t), a pytree of float32 arrays like w1, theta and w2; exactly w1 at t = 0 and w2 at t = 1.

    Args:
        start: w1.
        bend: theta.
        end: w2.
        t: Position on the curve, in [0, 1].
    """
    weights = (1 - t) ** 2, 2 * t * (1 - t), t**2
    return jax.tree.map(lambda *arrays: sum(w * a for w, a in zip(weights, arrays, strict=True)), start, bend, end)


def mcr_step(
    state: TrainState,
    batch: Batch,
    key: jax.Array,
    *,
    module: nn.Module,
    optimiser: optax.GradientTransformation,
    augmentation: AugmentOptions,
) -> tuple[TrainState, Metrics]:
    """Takes one step of theta down the cross-entropy of phi(t) at a random t.

    Args:
        state: theta before the step.
        batch: 'images' float32 [B, H, W, C] in [0, 1], 'labels' int32 [B], and 'constants', the parameters (w1, w2).
        key: PRNG key of this step.
        module: Classifier.
        optimiser: Optimiser of theta.
        augmentation: Options of `augment`.

    Returns:
        The state after the step; metrics with 't'.
    """
    augment_key, position_key, dropout_key = jax.random.split(key, 3)
    start, end = batch['constants']
    labels = batch['labels']
    images = augment(augment_key, batch['images'], augmentation)
    t = jax.random.uniform(position_key, (), jnp.float32)

    def objective(theta: Any) -> tuple[jax.Array, Any]:
        logits, batch_stats = apply_training(module, state, point(start, theta, end, t), images, dropout_key)
        return cross_entropy(logits, labels), (logits, batch_stats)

    (loss, (logits, batch_stats)), gradient = jax.value_and_grad(objective, has_aux=True)(state.params)
    metrics = {'loss': loss, 'grad_norm': optax.tree.norm(gradient), 'accuracy': accuracy(logits, labels), 't': t}
    return advance(state, gradient, batch_stats, optimiser), metrics

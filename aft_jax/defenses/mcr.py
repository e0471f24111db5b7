"""MCR: mode connectivity repair (Zhao et al., "Bridging Mode Connectivity in Loss Landscapes and Adversarial
Robustness", ICLR 2020, arXiv 2005.00060).

Two models of low loss are joined by a curve of low loss, on which a backdoor need not survive. Here a quadratic Bezier
curve from w1, the suspect, to w2, the suspect fine-tuned on clean images:

    phi(t) = (1 - t)^2 w1 + 2 t (1 - t) theta + t^2 w2

theta, at first the midpoint of w1 and w2, is trained on clean images at t ~ U(0, 1), one t a batch. The model is phi(t)
at one of the candidates t, with the BatchNorm statistics that the clean images give it.

Which one: in the paper both ends carry a backdoor, so that the middle is furthest from both. Here one end is the
suspect and the other is not, and a candidate is the stronger the further it is from the suspect, the larger its t;
`defender.strongest` chooses among them.

Needs: the suspect model and clean images. Costs: a fine-tuning, a training, and for each candidate a pass over the
clean images.
"""

import time
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
import optax

from aft_jax.data.augment import augment
from aft_jax.data.order import count_steps
from aft_jax.defenses import defender
from aft_jax.defenses.batch_norm_statistics import Statistics
from aft_jax.defenses.defender import DefenderData
from aft_jax.defenses.ft import fine_tune
from aft_jax.runtime.sharding import replicate
from aft_jax.training.loop import Fitted, Phase, Run, TrainingStage, fit
from aft_jax.training.state import Batch, Metrics, TrainState
from aft_jax.training.steps import accuracy, advance, apply_training, cross_entropy


def purify(run: Run, stage: str, data: DefenderData, config: ml_collections.ConfigDict) -> Fitted:
    """Returns the point of the curve that is strongest of those that the held-out images do not speak against.

    Args:
        run: The experiment.
        stage: The name of the defense; the fine-tuned end and the curve have stages of their own below it.
        data: The defender's.
        config: The resolved config; `config.mcr` has endpoint_epochs, epochs, learning_rate, schedule and candidates.
    """
    options = config.mcr
    kept, held = defender.hold_out(data, config.tuning.held_out_share, run.seed)
    rate = options.learning_rate
    endpoint = fine_tune(run, f'{stage}/endpoint', kept, options, options.endpoint_epochs, config, rate)
    ends = replicate(run.mesh, (data.variables['params'], endpoint.state.params))
    midpoint = jax.tree.map(lambda start, end: (start + end) / 2, *ends)
    steps = count_steps(len(kept.labels), options.epochs, config.batch_size)
    between = kept._replace(variables=data.variables | {'params': midpoint})
    before, optimiser = defender.begin(between, options, config.train, steps)
    step = partial(mcr_step, module=kept.module, optimiser=optimiser, augmentation=config.augment)
    phases = [Phase(step, steps)]
    curve = fit(run, TrainingStage(f'{stage}/curve', before, phases, kept.arrays, config.batch_size, constants=ends))

    started = time.monotonic()
    statistics = Statistics(kept.module, run.mesh, config.batch_size)

    def at(t: float) -> dict:
        params = point(ends[0], curve.state.params, ends[1], t)
        return statistics(curve.state.variables | {'params': params}, kept.images)

    candidates = sorted(options.candidates)
    accuracies = [defender.accuracy(run, held, at(t)) for t in candidates]
    chosen = at(candidates[defender.strongest(accuracies, config.tuning.budget)])
    tuning = time.monotonic() - started
    return Fitted(curve.state.replace(**chosen), endpoint.seconds + curve.seconds + tuning)


def point(start: Any, bend: Any, end: Any, t: float | jax.Array) -> Any:
    """Returns phi(t), a pytree of float32 arrays as its three arguments; exactly `start` at 0 and `end` at 1."""
    weights = (1 - t) ** 2, 2 * t * (1 - t), t**2
    return jax.tree.map(lambda *arrays: sum(w * a for w, a in zip(weights, arrays, strict=True)), start, bend, end)


def mcr_step(
    state: TrainState,
    batch: Batch,
    key: jax.Array,
    *,
    module: nn.Module,
    optimiser: optax.GradientTransformation,
    augmentation: ml_collections.ConfigDict,
) -> tuple[TrainState, Metrics]:
    """One step of theta: down the cross-entropy of phi(t) at a random t.

    Args:
        state: theta before the step.
        batch: 'images' float32 [B, H, W, C] in [0, 1], 'labels' int32 [B], and 'fixed', the parameters of both ends.
        key: PRNG key of this step.
        module: The classifier.
        optimiser: Of theta.
        augmentation: `config.augment`.

    Returns:
        The state after the step; metrics with 't'.
    """
    augment_key, place_key, dropout_key = jax.random.split(key, 3)
    start, end = batch['constants']
    labels = batch['labels']
    images = augment(augment_key, batch['images'], augmentation)
    t = jax.random.uniform(place_key, (), jnp.float32)

    def objective(theta: Any) -> tuple[jax.Array, Any]:
        logits, batch_stats = apply_training(module, state, point(start, theta, end, t), images, dropout_key)
        return cross_entropy(logits, labels), (logits, batch_stats)

    (loss, (logits, batch_stats)), gradient = jax.value_and_grad(objective, has_aux=True)(state.params)
    metrics = {'loss': loss, 'grad_norm': optax.tree.norm(gradient), 'accuracy': accuracy(logits, labels), 't': t}
    return advance(state, gradient, batch_stats, optimiser), metrics

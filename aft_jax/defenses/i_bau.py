"""I-BAU: implicit backdoor adversarial unlearning (Zeng et al., "Adversarial Unlearning of Backdoors via Implicit
Hypergradient", ICLR 2022, arXiv 2110.03735).

The defender unlearns one perturbation d for all images, and counts that d follows the weights w:

    min over w of max over |d| <= radius of  1/n sum CE(f_w(x_i + d), y_i)

Each of `rounds` rounds has two passes over the clean images:

1. From d = 0, SGD with `search_learning_rate` on -CE(f(x + d), argmax f(x)) + penalty |d|^2 for one batch a step.
2. A step of Adam for each batch down the gradient of L1(d(w), w), where d(w) is the fixed point of one inner step:

       L1 = CE of the batch, d added to `perturbed_share` of its images
       L2 = -CE(f_w(x + d), y) + penalty |d|^2  on a fixed batch,    Phi(d, w) = d - inner_learning_rate dL2/dd
       dL1/dw + (dPhi/dw)^T v,    v = sum over k < fixed_point_steps of ((dPhi/dd)^T)^k dL1/dd

The sum is the Neumann series of (I - dPhi/dd)^-T dL1/dd. d is in units of [0, 1] pixels, and x + d is not clipped. The
classifier is in evaluation mode throughout: BatchNorm keeps the running statistics, and there is no dropout. Images are
not augmented.

The defaults are those of the authors' code, which departs from the paper's equation. It adds d to 1 % of a batch,
rounded down (here to the nearest, at least one image), and d has no radius. `perturbed_share=1` and a `radius` are the
equation. Without an argument the code unlearns on test images, which is not reproduced. BackdoorBench takes a learning
rate of .0001.

Needs: the infected model and clean images. Costs: a step of the second pass about 13 training steps with 5 terms.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax import struct

from aft_jax.adversarial.pgd import repeat, slow_in_loops
from aft_jax.data.order import count_steps
from aft_jax.defenses.defender import DefenderData, DefenseSettings, Purified, tune
from aft_jax.models import logits_function
from aft_jax.training import state as training_state
from aft_jax.training.loop import fit
from aft_jax.training.optimiser import adam
from aft_jax.training.stage import Fitted, Phase, Run, TrainingStage
from aft_jax.training.state import Batch, Metrics, WrapsClassifier
from aft_jax.training.steps import accuracy, advance, cross_entropy


class IbauOptions(NamedTuple):
    """Section `i_bau` of the config.

    Attributes:
        rounds: Number of rounds.
        search_learning_rate: Learning rate of the perturbation in the first pass.
        penalty: Weight of the perturbation's squared L2 norm.
        radius: Largest L2 norm of the perturbation, in units of [0, 1] pixels. 0 for no limit.
        perturbed_share: Share of a batch's images with the perturbation in the second pass.
        inner_learning_rate: Learning rate of the inner step Phi.
        fixed_point_steps: Terms of the Neumann series.
        learning_rates: Candidates for Adam, from the weakest to the strongest.
    """

    rounds: int
    search_learning_rate: float
    penalty: float
    radius: float
    perturbed_share: float
    inner_learning_rate: float
    fixed_point_steps: int
    learning_rates: tuple[float, ...]


@struct.dataclass
class UnlearningState(WrapsClassifier):
    """A classifier in training and the perturbation that it unlearns.

    Attributes:
        classifier: State of the classifier. Its `step` counts the steps of both passes.
        perturbation: float32 [H, W, C].
    """

    perturbation: jax.Array


def purify(run: Run, name: str, data: DefenderData, settings: DefenseSettings) -> Purified:
    """Unlearns a perturbation in each round, for each learning rate, and takes the strongest model.

    Args:
        run: Experiment.
        name: Name of checkpoints and metrics.
        data: Infected model and clean images.
        settings: Settings with `IbauOptions`.
    """
    options: IbauOptions = settings.options

    def train(name: str, kept: DefenderData, learning_rate: float) -> Fitted:
        optimiser = adam(learning_rate)
        steps = count_steps(len(kept.labels), 1, settings.batch_size)
        search = partial(search_step, module=kept.module, options=options, round_steps=2 * steps)
        unlearn = partial(unlearning_step, module=kept.module, optimiser=optimiser, options=options)
        classifier = training_state.create(kept.variables, optimiser)
        inner = {
            'images': jnp.asarray(kept.images[: settings.batch_size], jnp.float32) / 255,
            'labels': jnp.asarray(kept.labels[: settings.batch_size]),
        }
        stage = TrainingStage(
            name=name,
            state=UnlearningState(classifier, jnp.zeros(kept.images.shape[1:], jnp.float32)),
            phases=[Phase((search, unlearn)[i % 2], steps * (i + 1)) for i in range(2 * options.rounds)],
            arrays=kept.arrays,
            batch_size=settings.batch_size,
            constants=inner,
        )
        return fit(run, stage)

    return tune(run, name, data, train, settings)


def search_step(
    state: UnlearningState, batch: Batch, key: jax.Array, *, module: nn.Module, options: IbauOptions, round_steps: int
) -> tuple[UnlearningState, Metrics]:
    """Takes a step of the perturbation, which is zero at the beginning of a round.

    Args:
        state: State before the step.
        batch: 'images' float32 [B, H, W, C] in [0, 1] and 'labels' int32 [B].
        key: PRNG key, which has no influence.
        module: Classifier.
        options: Options of I-BAU.
        round_steps: Steps of a round.

    Returns:
        The state after the step; metrics with 'fooled', the share of images whose predicted class the perturbation
        before the step changes, and 'perturbation', its L2 norm after the step.
    """
    images = batch['images']
    logits = logits_function(module, state.variables)
    predicted = logits(images).argmax(axis=-1)
    start = jnp.where(state.step % round_steps == 0, 0.0, state.perturbation)

    def objective(perturbation):
        perturbed = logits(images + perturbation[None])
        return penalised(cross_entropy(perturbed, predicted), perturbation, options), perturbed

    (loss, perturbed), gradient = jax.value_and_grad(objective, has_aux=True)(start)
    moved = into_ball(start - options.search_learning_rate * gradient, options.radius)
    metrics = {
        'loss': loss,
        'fooled': 1 - accuracy(perturbed, predicted),
        'perturbation': jnp.linalg.norm(moved.ravel()),
    }
    return UnlearningState(replace(state.classifier, step=state.step + 1), moved), metrics


def unlearning_step(
    state: UnlearningState,
    batch: Batch,
    key: jax.Array,
    *,
    module: nn.Module,
    optimiser: optax.GradientTransformation,
    options: IbauOptions,
) -> tuple[UnlearningState, Metrics]:
    """Takes a step of the classifier down the hypergradient.

    Args:
        state: State before the step.
        batch: 'images' float32 [B, H, W, C] in [0, 1], 'labels' int32 [B], and 'constants', the batch of L2.
        key: PRNG key, which has no influence.
        module: Classifier.
        optimiser: Optimiser of the classifier.
        options: Options of I-BAU.

    Returns:
        The state after the step; metrics with 'grad_norm' of the hypergradient, and 'implicit_norm' of its second term.
    """
    classifier, inner = state.classifier, batch['constants']
    images, labels = batch['images'], batch['labels']
    count = max(1, round(options.perturbed_share * len(images)))

    def logits_of(params: Any, images: jax.Array) -> jax.Array:
        return logits_function(module, {'params': params, 'batch_stats': classifier.batch_stats})(images)

    def outer_loss(perturbation: jax.Array, params: Any) -> tuple[jax.Array, jax.Array]:
        # The batch is in random order, so its first images are as good as any.
        perturbed = jnp.concatenate([images[:count] + perturbation[None], images[count:]])
        logits = logits_of(params, perturbed)
        return cross_entropy(logits, labels), logits

    def inner_loss(perturbation: jax.Array, params: Any) -> jax.Array:
        logits = logits_of(params, inner['images'] + perturbation[None])
        return penalised(cross_entropy(logits, inner['labels']), perturbation, options)

    def inner_step(perturbation: jax.Array, params: Any) -> jax.Array:
        return perturbation - options.inner_learning_rate * jax.grad(inner_loss)(perturbation, params)

    (loss, logits), (direct, explicit) = jax.value_and_grad(outer_loss, argnums=(0, 1), has_aux=True)(
        state.perturbation, classifier.params
    )
    vector = neumann_vector(
        lambda perturbation: inner_step(perturbation, classifier.params),
        state.perturbation,
        direct,
        options.fixed_point_steps,
        unroll=slow_in_loops(logits_function(module, classifier.variables)),
    )
    (implicit,) = jax.vjp(lambda params: inner_step(state.perturbation, params), classifier.params)[1](vector)
    gradient = jax.tree.map(jnp.add, explicit, implicit)
    metrics = {
        'loss': loss,
        'grad_norm': optax.tree.norm(gradient),
        'implicit_norm': optax.tree.norm(implicit),
        'accuracy': accuracy(logits, labels),
    }
    return replace(state, classifier=advance(classifier, gradient, classifier.batch_stats, optimiser)), metrics


def neumann_vector(
    inner_step: Callable[[jax.Array], jax.Array],
    perturbation: jax.Array,
    direct: jax.Array,
    terms: int,
    *,
    unroll: bool,
) -> jax.Array:
    """Computes the sum over k < `terms` of ((dPhi/dd)^T)^k applied to `direct`, in the shape of the perturbation.

    Args:
        inner_step: Phi as a function of the perturbation.
        perturbation: Point at which Phi is differentiated.
        direct: Gradient of the outer loss with respect to the perturbation.
        terms: Number of terms.
        unroll: Whether each term is compiled, instead of one loop.
    """
    _, pull_back = jax.vjp(inner_step, perturbation)
    return repeat(lambda v: pull_back(v)[0] + direct, jnp.zeros_like(direct), terms, unroll)


def penalised(loss: jax.Array, perturbation: jax.Array, options: IbauOptions) -> jax.Array:
    """Computes -loss + penalty |d|^2, which the perturbation d minimises."""
    return -loss + options.penalty * jnp.sum(jnp.square(perturbation))


def into_ball(perturbation: jax.Array, radius: float) -> jax.Array:
    """Scales a longer perturbation to an L2 norm of `radius`; 0 for no limit."""
    if not radius:
        return perturbation
    return perturbation * (radius / jnp.maximum(jnp.linalg.norm(perturbation.ravel()), radius))

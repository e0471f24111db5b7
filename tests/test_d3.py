"""D3: its loss and its step against NumPy, its start, and what a whole run trains."""

from functools import partial

import jax
import jax.numpy as jnp
import linear_numpy
import numpy as np
import pytest
from defense_runs import as_numpy, lines, run_twice
from linear_numpy import IMAGES, LABELS, flat, softmax
from toys import Linear

from aft_jax.data.augment import AugmentOptions
from aft_jax.defenses import DefenderData, d3
from aft_jax.defenses.new_head import head_step
from aft_jax.models.head import layer_at
from aft_jax.training import state
from aft_jax.training.optimiser import sgd


@pytest.mark.parametrize(('weight', 'divisor'), [(10.0, 11.0), (0.5, 1.0)])
def test_d3_step_equals_numpy(weight, divisor):
    """Some images are below the threshold; two steps, with a projection after each."""
    threshold, rate = 0.6, 0.3
    model, infected = linear_numpy.variables(2), linear_numpy.variables(3)['params']['Dense_0']['kernel']
    optimiser = sgd(rate, 'constant', 2, momentum=0.9, weight_decay=0.0)
    step = partial(
        head_step,
        module=Linear(),
        optimiser=optimiser,
        head=('Dense_0',),
        loss=partial(d3.d3_loss, weight=weight, threshold=threshold),
        augmentation=AugmentOptions(crop=0, flip=False, rotation=0.0),
    )
    step = jax.jit(step)
    batch = {'images': jnp.asarray(IMAGES), 'labels': jnp.asarray(LABELS), 'constants': jnp.asarray(infected)}
    current = state.create(model, optimiser)
    kernel, bias = (model['params']['Dense_0'][name].astype(np.float64) for name in ('kernel', 'bias'))
    momenta = [np.zeros((16, 2)), np.zeros(2)]
    for _ in range(2):
        z = flat(IMAGES) @ kernel + bias
        losses = linear_numpy.cross_entropies(z, LABELS)
        counted = losses > threshold
        assert 0 < counted.sum() < 8
        distance = np.linalg.norm(kernel - infected)
        error = (softmax(z) - np.eye(2)[LABELS]) * counted[:, None] / 8
        gradients = [
            (weight * flat(IMAGES).T @ error - (kernel - infected) / distance) / divisor,
            weight * error.sum(axis=0) / divisor,
        ]
        momenta = [0.9 * m + g for m, g in zip(momenta, gradients, strict=True)]
        kernel, bias = kernel - rate * momenta[0], bias - rate * momenta[1]
        kernel *= np.linalg.norm(infected) / np.linalg.norm(kernel)
        current, metrics = step(current, batch, jax.random.key(0))
        np.testing.assert_allclose(current.params['Dense_0']['kernel'], kernel, atol=1e-5)
        np.testing.assert_allclose(current.params['Dense_0']['bias'], bias, atol=1e-5)
        loss = (weight * np.maximum(losses - threshold, 0).mean() - distance) / divisor
        np.testing.assert_allclose(metrics['loss'], loss, atol=1e-5)


def test_purify_moves_the_head_away_and_keeps_its_length(
    config, dataset, tiny_net, tiny_variables, make_run, monkeypatch
):
    data = DefenderData(tiny_net, tiny_variables, dataset.train_images[:32], dataset.train_labels[:32])
    config.d3.update({'epochs': 4, 'learning_rates': (0.02, 0.1)})
    config.tuning.budget = 1.0
    run = make_run()
    purified, trained = run_twice('d3', run, data, config, monkeypatch)
    assert list(trained) == ['purify/d3/0.02', 'purify/d3/0.1']
    starts = [as_numpy(stage.state.params) for stage, _ in trained.values()]
    jax.tree.map(np.testing.assert_array_equal, *starts)
    infected = as_numpy(tiny_variables['params'])
    for layer, names in (('Dense_0', ('kernel', 'bias')), ('Dense_1', ('bias',))):
        for name in names:
            np.testing.assert_array_equal(starts[0][layer][name], infected[layer][name])
    before, start, after = (
        layer_at(tree, ('Dense_1',))['kernel'] for tree in (infected, starts[0], as_numpy(purified.variables['params']))
    )
    assert np.all(start != before) and abs(np.vdot(start, before)) < 0.5 * np.linalg.norm(before) ** 2
    # A uniform distribution: kurtosis 1.8, and 3 for a normal one.
    assert np.mean(start**4) / np.mean(start**2) ** 2 < 2.3
    for kernel in (start, after):
        np.testing.assert_allclose(np.linalg.norm(kernel), np.linalg.norm(before), rtol=1e-5)
    cosines = [line['head_cosine'] for line in lines(run) if line['stage'] == 'purify/d3/0.1']
    assert cosines[-1] < cosines[0]
    assert cosines[-1] == pytest.approx(np.vdot(before, after) / np.linalg.norm(before) ** 2, abs=1e-5)

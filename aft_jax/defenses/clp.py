"""CLP: channel Lipschitzness based pruning (Zheng et al., "Data-free Backdoor Removal based on Channel Lipschitzness",
ECCV 2022, arXiv 2208.03111).

A small trigger changes the prediction only if some channels amplify it. For channel k of a convolution W that a
BatchNorm with scale g, bias b and running variance v reads, the gain is at most

    L_k = sigma_max(W_k) |g_k| / sqrt(v_k + epsilon),    W_k reshaped to [inputs, height * width of the kernel]

where sigma_max is the largest singular value. In each layer, channels with L_k > mean + threshold * standard deviation
are pruned: g_k and b_k become 0. A lower threshold prunes more. With the paper's one threshold of 3, the defense needs
no data. With several, `defender.strongest` chooses among them by accuracy on the clean images, which train nothing.

`models.norm_pairs` finds the pairs by data flow. The authors' code takes the convolution that stands before a BatchNorm
in the module, which is another one in a pre-activation network. There, a BatchNorm after the sum of a residual block
reads several convolutions and is left alone. A dense layer counts as a convolution of one pixel. The authors' code
leaves out epsilon, so that a channel that is always zero has an infinite gain. The deviation is that of a sample
(divisor n - 1), as in their code. No channel of n lies more than (n - 1) / sqrt(n) deviations above the mean. So a
layer of 10 channels or fewer loses none at a threshold of 3.

Needs: the infected model; clean images for several thresholds alone. Costs: a singular value decomposition for each
channel, and one prediction of the clean images for each of several thresholds.
"""

import time
from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from aft_jax.defenses.defender import DefenderData, DefenseSettings, Purified, choose
from aft_jax.models.norm_pairs import LayerPath, NormPair, find_pairs
from aft_jax.training.stage import Run


class ClpOptions(NamedTuple):
    """Section `clp` of the config.

    Attributes:
        thresholds: Candidates, in standard deviations above the mean of a layer. The order does not matter.
    """

    thresholds: tuple[float, ...]


def purify(run: Run, name: str, data: DefenderData, settings: DefenseSettings) -> Purified:
    """Prunes the channels of the infected model that amplify most.

    Args:
        run: Experiment.
        name: Name of the defense. The record of what was pruned is written under '<name>/pruned'.
        data: Infected model, and clean images to choose among several thresholds.
        settings: Settings with `ClpOptions`.
    """
    options: ClpOptions = settings.options
    started = time.monotonic()
    variables = jax.device_get(data.variables)
    bounds = lipschitz_bounds(variables, find_pairs(data.module, variables, data.images.shape[1:]))
    thresholds = sorted(options.thresholds, reverse=True)
    candidates = [prune(variables, bounds, threshold) for threshold in thresholds]
    chosen, record = 0, {}
    if len(candidates) > 1:
        choice = choose(run, data, candidates, settings.tuning)
        chosen, record = choice.chosen, {'held_out_accuracy': choice.accuracy}
    pruned = [values > limit(values, thresholds[chosen]) for values in bounds.values()]
    record |= {
        'threshold': thresholds[chosen],
        'pruned_share': float(np.concatenate(pruned).mean()) if pruned else 0.0,
    }
    run.writer.rewind(f'{name}/pruned', -1)
    run.writer.write(f'{name}/pruned', 0, record)
    return Purified(candidates[chosen], time.monotonic() - started)


def lipschitz_bounds(variables: dict, pairs: Sequence[NormPair]) -> dict[LayerPath, np.ndarray]:
    """Computes the gain of every channel: path of a BatchNorm -> float64 [C].

    Args:
        variables: Variables of the infected model, as NumPy arrays.
        pairs: BatchNorms and the layers that they read.
    """
    params, statistics = flatten_dict(variables['params']), flatten_dict(variables.get('batch_stats', {}))
    bounds = {}
    for pair in pairs:
        kernel = np.asarray(params[*pair.layer, 'kernel'], np.float64)  # [height, width, inputs, C] or [inputs, C]
        by_channel = np.moveaxis(kernel, -1, 0).reshape(kernel.shape[-1], -1, kernel.shape[-2])
        gains = np.linalg.norm(by_channel, ord=2, axis=(1, 2))
        scale = np.asarray(params[*pair.norm, 'scale'], np.float64)
        variance = np.asarray(statistics[*pair.norm, 'var'], np.float64)
        bounds[pair.norm] = gains * np.abs(scale) / np.sqrt(variance + pair.epsilon)
    return bounds


def limit(bounds: np.ndarray, threshold: float) -> float:
    """Computes the largest gain that a layer with these gains [C] keeps; infinity for a single channel."""
    return float(bounds.mean() + threshold * bounds.std(ddof=1)) if len(bounds) > 1 else np.inf


def prune(variables: dict, bounds: dict[LayerPath, np.ndarray], threshold: float) -> dict:
    """Sets scale and bias of all channels above the limit of their layer to zero in a model's variables."""
    params = flatten_dict(variables['params'])
    for norm, values in bounds.items():
        kept = (values <= limit(values, threshold)).astype(np.float32)
        for name in ('scale', 'bias'):
            params[*norm, name] = params[*norm, name] * kept
    return variables | {'params': unflatten_dict(params)}

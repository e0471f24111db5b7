"""Figures of the observation: what adversarial examples are like.

Kinds of images differ in colour and in marker or line; models differ in colour and in hatch.
"""

from pathlib import Path
from typing import Any

import numpy as np

from aft_jax.analysis.measures import correlations
from aft_jax.analysis.observation import ADVERSARIAL, CLEAN, TRIGGERED, ModelOutputs
from aft_jax.evaluation.bootstrap import Estimate
from aft_jax.report.figure import COLOURS, FAINT, PAPER, Panel, panel
from aft_jax.results.record import percent

# Colour, marker and line of each kind of image.
KINDS = {
    CLEAN: (FAINT, 'o', ':'),
    TRIGGERED: (COLOURS[2], '^', '-'),
    ADVERSARIAL: (COLOURS[5], 's', '--'),
}
# Colour, hatch, marker and line of the first model and of the purified one.
MODELS = ((COLOURS[6], '', 'o', '-'), (COLOURS[3], '////', 's', '--'))
# More classes do not fit into the figure; the rest is summed up.
MAX_CLASSES = 14
# More points of one kind hide each other.
MAX_POINTS = 150


def landing(
    directory: Path,
    predictions: dict[str, np.ndarray],
    labels: np.ndarray,
    target_map: np.ndarray | None,
    class_names: tuple[str, ...],
) -> Panel:
    """Draws the predicted classes of misclassified adversarial examples, by model, as shares of all examples.

    Args:
        directory: Folder of the figures.
        predictions: Predictions for the adversarial examples, int [N], of at most two models by name.
        labels: True labels, int [N].
        target_map: Target label for each true label, int [K]; its part of a bar is solid. None without a trigger.
        class_names: Names of the K classes.
    """
    targets = target_map[labels] if target_map is not None else None
    misclassified = {name: _class_shares(p, labels, None, len(class_names)) for name, p in predictions.items()}
    on_target = {name: _class_shares(p, labels, targets, len(class_names)) for name, p in predictions.items()}
    shown = _most_frequent(np.max(list(misclassified.values()), axis=0))
    names = [class_names[k][:18] for k in shown]
    if len(shown) < len(class_names):
        names.append('others')
    misclassified, on_target = (
        {name: _with_others(shares, shown) for name, shares in table.items()} for table in (misclassified, on_target)
    )

    def draw(axes: Any) -> None:
        height = 0.8 / len(predictions)
        for i, name in enumerate(predictions):
            colour, hatch, _, _ = MODELS[i]
            places = np.arange(len(names)) + (i - (len(predictions) - 1) / 2) * height
            common: dict[str, Any] = {'height': 0.88 * height, 'hatch': hatch, 'edgecolor': PAPER, 'linewidth': 0}
            if target_map is not None:
                axes.barh(places, 100 * misclassified[name], color=colour, alpha=0.35, **common)
            axes.barh(places, 100 * on_target[name], color=colour, label=name, **common)
        axes.set_yticks(range(len(names)), names)
        axes.invert_yaxis()
        axes.set_xlabel('% of the adversarial examples')
        axes.tick_params(axis='y', length=0)
        axes.legend(frameon=False, loc='lower right')

    lines = [_describe_landing(name, p, labels, targets, class_names) for name, p in predictions.items()]
    alt = f'Bars, a row a class. {" ".join(lines)}'
    height = 0.9 + 0.15 * (len(predictions) + 0.4) * max(len(names), 4)
    return panel(directory, 'landing', 'Predicted classes of adversarial examples', alt, draw, height=height)


def activations(directory: Path, model: str, outputs: ModelOutputs) -> Panel:
    """Draws the mean activation of each channel of the last feature map by kind of image.

    The channels are sorted by their activation on triggered images, or on clean ones without a trigger.
    """
    means = {kind: channels.mean(axis=0, dtype=np.float64) for kind, channels in outputs.channels.items()}
    sorted_by = TRIGGERED if TRIGGERED in means else CLEAN
    order = np.argsort(-means[sorted_by], kind='stable')

    def draw(axes: Any) -> None:
        for kind, values in means.items():
            colour, _, line = KINDS[kind]
            axes.plot(np.arange(1, len(order) + 1), values[order], color=colour, linestyle=line, label=kind)
        axes.set_xlabel(f'channels, sorted by {sorted_by}')
        axes.set_ylabel('mean activation')
        axes.legend(frameon=False, loc='lower left', bbox_to_anchor=(0, 1), ncols=3, borderaxespad=0.2)

    alt = f'{model}: lines over {len(order)} channels, sorted by {sorted_by} images. Strongest tenth of the channels: '
    tenth = order[: max(1, round(len(order) / 10))]
    alt += ', '.join(f'{kind} {values[tenth].mean():.2f}' for kind, values in means.items()) + '.'
    if TRIGGERED in means:
        rises = [(means[kind] - means[CLEAN])[None] for kind in (TRIGGERED, ADVERSARIAL)]
        correlation = correlations(*rises)[0]
        if np.isfinite(correlation):
            alt += (
                f' The changes by the trigger and by adversarial perturbations have a correlation of {correlation:.2f}.'
            )
    return panel(directory, f'activations_{model}', model, alt, draw)


def features(directory: Path, model: str, outputs: ModelOutputs) -> Panel | None:
    """Draws the channels of the images in their first two principal components; None if they are not finite."""
    from sklearn.decomposition import PCA

    stacked = np.concatenate(list(outputs.channels.values())).astype(np.float64)
    if not np.isfinite(stacked).all() or min(stacked.shape) < 2 or not stacked.std():
        return None
    analysis = PCA(n_components=2, svd_solver='full').fit(stacked)
    places = {kind: analysis.transform(channels.astype(np.float64)) for kind, channels in outputs.channels.items()}

    def draw(axes: Any) -> None:
        for kind, points in places.items():
            colour, marker, _ = KINDS[kind]
            few = points[:MAX_POINTS]
            axes.scatter(*few.T, s=13, marker=marker, color=colour, alpha=0.7, linewidths=0, label=kind)
        axes.set_xticks([])
        axes.set_yticks([])
        first, second = (f'{100 * share:.0f} %' for share in analysis.explained_variance_ratio_)
        axes.set_xlabel(f'first component ({first} of the variance)')
        axes.set_ylabel(f'second ({second})')
        axes.legend(frameon=False, loc='best')

    centres = {kind: points.mean(axis=0) for kind, points in places.items()}
    alt = f'{model}: points in two principal components, {percent(sum(analysis.explained_variance_ratio_))} of the '
    alt += 'variance. The centre of the adversarial points is '
    alt += ' and '.join(
        f'{np.linalg.norm(centres[ADVERSARIAL] - centre):.2f} from that of the {kind} points'
        for kind, centre in centres.items()
        if kind != ADVERSARIAL
    )
    return panel(directory, f'features_{model}', model, f'{alt}.', draw)


def target_share(directory: Path, eps: tuple[float, ...], swept: dict[str, list[Estimate]]) -> Panel:
    """Draws the target share of misclassified adversarial examples over their size, by model."""
    sizes = [255 * e for e in eps]

    def draw(axes: Any) -> None:
        for i, (name, estimates) in enumerate(swept.items()):
            colour, _, marker, line = MODELS[i]
            value, low, high = (100 * np.array(column) for column in zip(*estimates, strict=True))
            axes.plot(sizes, value, color=colour, marker=marker, linestyle=line, markersize=5, label=name)
            axes.fill_between(sizes, low, high, color=colour, alpha=0.2, linewidth=0)
        axes.set_xscale('log', base=2)
        axes.set_xticks(sizes, [f'{size:g}' for size in sizes])
        axes.minorticks_off()
        axes.set_ylim(-3, 103)
        axes.set_xlabel('eps, in 1/255 of the pixels’ range')
        axes.set_ylabel('target share, %')
        axes.legend(frameon=False, loc='best')

    lines = [
        f'{name}: '
        + ', '.join(
            f'{percent(e.value)} at {size:g}/255' if np.isfinite(e.value) else f'none misclassified at {size:g}/255'
            for size, e in zip(sizes, estimates, strict=True)
        )
        for name, estimates in swept.items()
    ]
    return panel(directory, 'target_share', 'Target share over eps', f'Lines over eps. {". ".join(lines)}.', draw)


def _class_shares(
    predictions: np.ndarray, labels: np.ndarray, targets: np.ndarray | None, num_classes: int
) -> np.ndarray:
    """Computes the share of all examples that are misclassified as each class, float64 [K].

    With `targets`, int [N], only examples that are classified as their target label count.
    """
    counted = predictions != labels
    if targets is not None:
        counted &= predictions == targets
    return np.bincount(predictions[counted], minlength=num_classes) / len(labels)


def _most_frequent(shares: np.ndarray) -> np.ndarray:
    if len(shares) <= MAX_CLASSES:
        return np.arange(len(shares))
    return np.sort(np.argsort(-shares, kind='stable')[:MAX_CLASSES])


def _with_others(shares: np.ndarray, shown: np.ndarray) -> np.ndarray:
    """Selects the shares of the shown classes, followed by the sum of the others if there are any."""
    if len(shown) == len(shares):
        return shares
    return np.append(shares[shown], np.delete(shares, shown).sum())


def _describe_landing(
    name: str, predictions: np.ndarray, labels: np.ndarray, targets: np.ndarray | None, class_names: tuple[str, ...]
) -> str:
    misclassified = predictions != labels
    count = int(misclassified.sum())
    if not count:
        return f'{name}: none is misclassified.'
    counts = np.bincount(predictions[misclassified], minlength=len(class_names))
    text = f'{name}: {percent(count / len(labels))} are misclassified, most of them as {class_names[counts.argmax()]} '
    text += f'({percent(counts.max() / count)} of these)'
    if targets is not None:
        on_target = float(np.mean(predictions[misclassified] == targets[misclassified]))
        text += f'; {percent(on_target)} of these are classified as the target label'
    return f'{text}.'

"""The classifier `toys.Linear` and its losses in NumPy, on eight images of 4x4 pixels in two classes."""

import numpy as np
import scipy.special

IMAGES = np.random.default_rng(0).uniform(0.2, 0.8, (8, 4, 4, 1)).astype(np.float32)
LABELS = np.array([0, 1, 1, 0, 1, 0, 0, 1], np.int32)


def variables(seed: int) -> dict:
    """Draws the variables of a classifier."""
    generator = np.random.default_rng(seed)
    kernel, bias = generator.normal(0, 0.5, (16, 2)), generator.normal(0, 0.5, 2)
    dense = {'kernel': kernel.astype(np.float32), 'bias': bias.astype(np.float32)}
    return {'params': {'Dense_0': dense}, 'batch_stats': {}}


def logits(model: dict, images: np.ndarray) -> np.ndarray:
    """Computes float64 [B, 2]."""
    dense = model['params']['Dense_0']
    return flat(images) @ dense['kernel'] + dense['bias']


def flat(images: np.ndarray) -> np.ndarray:
    """Flattens images to float64 [B, H W C]."""
    return images.reshape(len(images), -1).astype(np.float64)


def cross_entropies(z: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Computes the cross-entropy of each image from logits [B, K]."""
    return -scipy.special.log_softmax(z, axis=1)[np.arange(len(z)), labels]


def cross_entropy(z: np.ndarray, labels: np.ndarray) -> float:
    return cross_entropies(z, labels).mean()


def divergence(targets: np.ndarray, predictions: np.ndarray) -> float:
    """Computes the mean of KL(targets || predictions) for probabilities [B, K]."""
    return scipy.special.rel_entr(targets, predictions).sum(axis=1).mean()


def softmax(z: np.ndarray) -> np.ndarray:
    return scipy.special.softmax(z, axis=1)

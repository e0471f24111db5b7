"""Compares a given network with outputs of its original code (`init_logits`).

The weights do not tell a network's activations, poolings and strides. With other ones it still runs, and may even be
fairly accurate. A few images with the logits of the original code decide it.
"""

import contextlib
import zipfile
import zlib
from pathlib import Path

import flax.linen as nn
import jax
import ml_collections
import numpy as np
from jax.sharding import Mesh

from aft_jax.errors import UserError, user_path
from aft_jax.models import logits_function
from aft_jax.training.prediction import BatchedFunction

# Largest difference of logits, relative to the largest logit. Rounding in float32 stays below a tenth of it.
TOLERANCE = 1e-2
ARRAYS = ('images', 'logits')


def check_reference_outputs(
    variables: dict, module: nn.Module, config: ml_collections.ConfigDict, image_shape: tuple[int, int, int], mesh: Mesh
) -> None:
    """Checks that a given network computes the logits that the file `config.init_logits` has.

    Args:
        variables: Variables of the model.
        module: Network with the normalisation of the config.
        config: Resolved config.
        image_shape: Shape (H, W, C) of the images of the data.
        mesh: Devices.

    Raises:
        UserError: The file cannot be read, or the logits differ.
    """
    path = user_path(config.init_logits, 'init_logits')
    images, expected = _read(path, image_shape)

    def logits(variables: dict, images: jax.Array) -> jax.Array:
        return logits_function(module, variables)(images)

    actual = BatchedFunction(logits, module, mesh, config.run.eval_batch_size)(variables, images)
    if actual.shape != expected.shape:
        raise UserError(f'init_logits={path}: logits are {expected.shape}, and the network has {actual.shape}.')
    difference = float(np.abs(actual - expected).max())
    if not difference <= TOLERANCE * np.abs(expected).max():
        disagreeing = int((actual.argmax(-1) != expected.argmax(-1)).sum())
        raise UserError(
            f'the network read from {config.init_from} is not the one of init_logits: its logits differ by up to '
            f'{difference:.3g}, and {disagreeing} of {len(expected)} predictions; check model.mean and model.std, or '
            'give the network itself as model.factory.',
            shared=True,
        )


def _read(path: Path, image_shape: tuple[int, int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Reads the images, uint8 or float32 in [0, 1], [N, H, W, C], and the logits, float32 [N, K]."""
    with contextlib.ExitStack() as stack:
        try:
            stream = stack.enter_context(path.open('rb'))
            file = stack.enter_context(np.load(stream, allow_pickle=False))
            images, logits = (file[name] for name in ARRAYS)
        except OSError as error:
            raise UserError(f'init_logits={path} cannot be read ({error.strerror}).') from error
        except (ValueError, EOFError, KeyError, TypeError, AttributeError, zipfile.BadZipFile, zlib.error) as error:
            raise UserError(f'init_logits={path} must be an .npz file with the arrays images and logits.') from error
    if images.shape[1:] != image_shape or images.dtype not in (np.uint8, np.float32) or not len(images):
        raise UserError(
            f'init_logits={path}: images are {images.dtype} {images.shape}; they must be uint8, or float32 in [0, 1], '
            f'[N, {", ".join(map(str, image_shape))}] as the images of the data.'
        )
    return images, np.asarray(logits, np.float32)

"""What PyTorch calls the tensors of the networks that we have, and what we call them.

The names are those of torchvision (`resnet`, `vgg_bn`), of the authors' release and of BackdoorBench (`preact_resnet`),
and of the WaNet paper's release (`mnist_cnn`). Residual networks for small images often call their shortcut `shortcut`
and their last layer `linear`, and those names are known too. A BatchNorm and ReLU before the pooling of a
`preact_resnet` is called `bn`: no release has it, so that name is an assumption.
"""

from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any, NamedTuple

from aft_jax.models.preact_resnet import BLOCKS, BOTTLENECK_DEPTHS
from aft_jax.models.vgg_bn import CONVOLUTIONS

# A BatchNorm's counter of batches: torch alone has it, so it is kept as it is.
COUNTER = 'num_batches_tracked'
# Tensor of a torch layer -> where ours lies in the variables.
CONVOLUTION = {'weight': ('params', 'kernel'), 'bias': ('params', 'bias')}
NORM = {
    'weight': ('params', 'scale'),
    'bias': ('params', 'bias'),
    'running_mean': ('batch_stats', 'mean'),
    'running_var': ('batch_stats', 'var'),
}
DENSE = CONVOLUTION


class Layer(NamedTuple):
    """One layer: torch's name, ours, and the tensors that it has."""

    theirs: str
    ours: str
    tensors: dict[str, tuple[str, str]]


class Naming(NamedTuple):
    """The names of one network.

    Attributes:
        name: As in `config.model.name`.
        options: Fields of `config.model` that the names tell.
        paths: Torch's key -> our path, such as 'conv1.weight' -> 'params/stem/kernel'. Without counters.
        stem: Key of the first convolution's weight.
        head: Key of the last layer's weight.
        flat: Keys of the dense layer that reads flattened feature maps and of the convolution that makes these, or ().
    """

    name: str
    options: dict[str, Any]
    paths: dict[str, str]
    stem: str
    head: str
    flat: tuple[str, ...] = ()

    def describes(self, name: str, options: Mapping[str, Any]) -> bool:
        """Whether these are names of the network with these fields of `config.model`."""
        return self.name == name and self.options.items() <= options.items()


@cache
def namings() -> tuple[Naming, ...]:
    """Returns all the networks that can be told from their names; the usual names of one come before others."""
    found = []
    for depth in BLOCKS:
        for final_norm in (False, True):
            paths = _paths(_preact_resnet(depth, final_norm))
            options = {'depth': depth, 'final_norm': final_norm}
            found.append(Naming('preact_resnet', options, paths, 'conv1.weight', 'linear.weight'))
        for shortcut, head in (('downsample', 'fc'), ('shortcut', 'linear')):
            paths = _paths(_resnet(depth, shortcut, head))
            found.append(Naming('resnet', {'depth': depth}, paths, 'conv1.weight', f'{head}.weight'))
    for depth in CONVOLUTIONS:
        layers = list(_vgg_bn(depth))
        flat = ('classifier.0.weight', f'{layers[-5].theirs}.weight')
        found.append(
            Naming('vgg_bn', {'depth': depth}, _paths(layers), 'features.0.weight', 'classifier.6.weight', flat)
        )
    for conv_bias in (False, True):
        paths = _paths(_mnist_cnn(conv_bias))
        flat = ('linear6.weight', 'layer3.conv1.weight')
        found.append(Naming('mnist_cnn', {'conv_bias': conv_bias}, paths, 'conv1.weight', 'linear9.weight', flat))
    return tuple(found)


def _paths(layers) -> dict[str, str]:
    paths = {}
    for layer in layers:
        for tensor, (collection, leaf) in layer.tensors.items():
            paths[f'{layer.theirs}.{tensor}'] = f'{collection}/{layer.ours}/{leaf}'
    return paths


def _convolution(theirs: str, ours: str, bias: bool) -> Layer:
    return Layer(theirs, ours, {name: CONVOLUTION[name] for name in (('weight', 'bias') if bias else ('weight',))})


def _blocks(depth: int) -> Iterator[tuple[str, str, bool]]:
    """Yields torch's name of each block, ours, and whether its shortcut is a convolution."""
    for stage, count in enumerate(BLOCKS[depth], start=1):
        for block in range(count):
            projected = block == 0 and (stage > 1 or depth in BOTTLENECK_DEPTHS)
            yield f'layer{stage}.{block}', f'stage{stage}_block{block + 1}', projected


def _preact_resnet(depth: int, final_norm: bool) -> Iterator[Layer]:
    yield _convolution('conv1', 'stem', False)
    for theirs, ours, projected in _blocks(depth):
        for i in range(3 if depth in BOTTLENECK_DEPTHS else 2):
            yield Layer(f'{theirs}.bn{i + 1}', f'{ours}/BatchNorm_{i}', NORM)
            yield _convolution(f'{theirs}.conv{i + 1}', f'{ours}/Conv_{i}', False)
        if projected:
            yield _convolution(f'{theirs}.shortcut.0', f'{ours}/shortcut', False)
    if final_norm:
        yield Layer('bn', 'final_norm_layer', NORM)
    yield Layer('linear', 'head', DENSE)


def _resnet(depth: int, shortcut: str, head: str) -> Iterator[Layer]:
    yield _convolution('conv1', 'stem', False)
    yield Layer('bn1', 'stem_norm', NORM)
    for theirs, ours, projected in _blocks(depth):
        for i in range(3 if depth in BOTTLENECK_DEPTHS else 2):
            yield _convolution(f'{theirs}.conv{i + 1}', f'{ours}/Conv_{i}', False)
            yield Layer(f'{theirs}.bn{i + 1}', f'{ours}/BatchNorm_{i}', NORM)
        if projected:
            yield _convolution(f'{theirs}.{shortcut}.0', f'{ours}/shortcut', False)
            yield Layer(f'{theirs}.{shortcut}.1', f'{ours}/shortcut_norm', NORM)
    yield Layer(head, 'head', DENSE)


def _vgg_bn(depth: int) -> Iterator[Layer]:
    index = 0
    for stage, count in enumerate(CONVOLUTIONS[depth], start=1):
        for i in range(1, count + 1):
            yield _convolution(f'features.{index}', f'stage{stage}_conv{i}', True)
            yield Layer(f'features.{index + 1}', f'stage{stage}_norm{i}', NORM)
            index += 3  # with the ReLU
        index += 1  # the max pool
    # Between them stand ReLU and dropout.
    for position, ours in ((0, 'dense1'), (3, 'dense2'), (6, 'head')):
        yield Layer(f'classifier.{position}', ours, DENSE)


def _mnist_cnn(conv_bias: bool) -> Iterator[Layer]:
    yield _convolution('conv1', 'Conv_0', True)
    for i, theirs in ((0, 'layer2'), (1, 'layer3')):
        yield Layer(f'{theirs}.bn1', f'BatchNorm_{i}', NORM)
        yield _convolution(f'{theirs}.conv1', f'Conv_{i + 1}', conv_bias)
    yield Layer('linear6', 'Dense_0', DENSE)
    yield Layer('linear9', 'Dense_1', DENSE)

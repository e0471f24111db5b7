"""Hand-written state dicts, for tests without torch."""

import numpy as np

# The WaNet release's network for MNIST, key by key.
MNIST_SHAPES = {
    'conv1.weight': (32, 1, 3, 3),
    'conv1.bias': (32,),
    'layer2.bn1.weight': (32,),
    'layer2.bn1.bias': (32,),
    'layer2.bn1.running_mean': (32,),
    'layer2.bn1.running_var': (32,),
    'layer2.bn1.num_batches_tracked': (),
    'layer2.conv1.weight': (64, 32, 3, 3),
    'layer3.bn1.weight': (64,),
    'layer3.bn1.bias': (64,),
    'layer3.bn1.running_mean': (64,),
    'layer3.bn1.running_var': (64,),
    'layer3.bn1.num_batches_tracked': (),
    'layer3.conv1.weight': (64, 64, 3, 3),
    'linear6.weight': (512, 1024),
    'linear6.bias': (512,),
    'linear9.weight': (10, 512),
    'linear9.bias': (10,),
}
COUNT = 4321  # of batches


def mnist_state(prefix: str = '', dtype=np.float32) -> dict[str, np.ndarray]:
    """Draws random weights and statistics under these keys, all behind a prefix."""
    generator = np.random.default_rng(0)
    state = {}
    for key, shape in MNIST_SHAPES.items():
        if key.endswith('num_batches_tracked'):
            state[prefix + key] = np.array(COUNT, np.int64)
        elif key.endswith('running_var'):
            state[prefix + key] = generator.uniform(0.5, 1.5, shape).astype(dtype)
        else:
            state[prefix + key] = (0.05 * generator.standard_normal(shape)).astype(dtype)
    return state


def assert_same_state(actual: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    """Checks that keys and their order, dtypes, shapes and bits are the same."""
    assert list(actual) == list(expected)
    for key, array in expected.items():
        assert actual[key].dtype == array.dtype and actual[key].shape == array.shape, key
        assert actual[key].tobytes() == array.tobytes(), key

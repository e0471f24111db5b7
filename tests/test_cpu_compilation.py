"""XLA's options for a network on a CPU, and their effect on a compiled program."""

import jax
import jax.numpy as jnp
import pytest

from aft_jax.models import MnistCNN, PreActResNet, cpu_compilation
from aft_jax.models.cpu_compilation import compiler_options, slow_in_loops, steps_per_call

CNN, RESNET = MnistCNN(10), PreActResNet(10)


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    """One device instead of the suite's four."""
    monkeypatch.setattr(jax, 'device_count', lambda: 1)
    cpu_compilation._known.cache_clear()
    yield
    cpu_compilation._known.cache_clear()


@pytest.mark.parametrize('module, products', [(CNN, True), (RESNET, False)])
def test_compiler_options_leave_no_convolution_to_ynnpack(module, products):
    def both(x, kernel, matrix):
        return jax.lax.conv_general_dilated(
            x, kernel, (1, 1), 'SAME', dimension_numbers=('NHWC', 'HWIO', 'NHWC')
        ), matrix @ matrix

    arrays = jnp.ones((8, 16, 16, 32)), jnp.ones((3, 3, 32, 64)), jnp.ones((256, 256))

    def by_ynnpack(options):
        program = jax.jit(both, compiler_options=options).lower(*arrays).compile().as_text()
        calls = [line for line in program.splitlines() if '__ynn_fusion' in line]
        return {name for name in ('conv', 'dot') if any(f'/{name}' in line for line in calls)}

    usual = by_ynnpack(None)
    if 'conv' not in usual:
        pytest.skip('on this processor XLA leaves no convolution to YNNPACK')
    assert by_ynnpack(compiler_options(module)) == usual & ({'dot'} if products else set())


def test_compiler_options_of_several_devices_are_the_defaults(monkeypatch):
    monkeypatch.setattr(jax, 'device_count', lambda: 4)
    assert compiler_options(CNN) is None


def test_compiler_options_of_an_unknown_option_are_the_defaults(monkeypatch):
    monkeypatch.setattr(cpu_compilation, 'OPTION', 'xla_of_another_time')
    assert compiler_options(CNN) is None


def test_slow_in_loops_of_our_and_other_networks(tiny_net, monkeypatch):
    assert not slow_in_loops(CNN) and not slow_in_loops(RESNET)
    assert slow_in_loops(tiny_net)
    monkeypatch.setattr(jax, 'device_count', lambda: 4)
    assert slow_in_loops(CNN)
    monkeypatch.setattr(jax, 'default_backend', lambda: 'gpu')
    assert not slow_in_loops(CNN) and not slow_in_loops(tiny_net)


def test_steps_per_call_of_a_small_network_where_loops_are_fast(tiny_net, monkeypatch):
    assert steps_per_call(CNN) == 5
    assert steps_per_call(RESNET) == steps_per_call(tiny_net) == 1
    monkeypatch.setattr(jax, 'device_count', lambda: 4)
    assert steps_per_call(CNN) == 1

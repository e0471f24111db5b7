"""Tests of benchmarks/scaling.py: the collectives of the compiled steps, and the estimates on paper."""

import jax
import pytest

from aft_jax.adversarial import pgd
from aft_jax.config import resolve
from aft_jax.models import build
from aft_jax.runtime.sharding import make_mesh
from benchmarks import scaling

BATCH = 16
HLO = """
  %all-reduce.1 = (f32[4]{0}, f32[3,3,4,8]{3,2,1,0}, /*index=2*/f32[]) all-reduce(%a, %b, %c), channel_id=1, \
to_apply=%add, metadata={op_name="jit(call)/transpose(jvp(Net))/stem/conv_general_dilated"}
  ROOT %all-gather = bf16[8,32,32,3]{3,2,1,0:T(8,128)} all-gather(%x), dimensions={0}
  %all-to-all.4 = (s32[2,4]{1,0}, s32[2,4]{1,0}) all-to-all(%d, %e), channel_id=8
  %start = (f32[4]{0}, f32[4]{0}) collective-permute-start(%f), channel_id=2
  %done = f32[4]{0} collective-permute-done(%start), metadata={op_name="jit(call)/slice"}
  %mask = pred[10]{0} reduce-scatter(%g), channel_id=3
  %fusion = f32[4]{0} fusion(%all-reduce.1, %all-gather), calls=%computation
"""


@pytest.fixture(scope='module')
def mesh():
    return make_mesh(jax.devices()[:4])


def test_collectives_reads_kinds_arrays_and_bytes():
    actual = [(c.kind, c.arrays, c.bytes) for c in scaling.collectives(HLO)]
    assert actual == [
        ('all-reduce', 3, 4 * (4 + 3 * 3 * 4 * 8 + 1)),
        ('all-gather', 1, 2 * 8 * 32 * 32 * 3),
        ('all-to-all', 2, 4 * 16),
        ('collective-permute', 1, 4 * 4),
        ('reduce-scatter', 1, 10),
    ]
    purposes = [scaling.purpose(c) for c in scaling.collectives(HLO)]
    assert purposes[0] == 'weight gradients'
    assert purposes[3] == 'collective-permute: slice'


@pytest.mark.parametrize('norms', [1, 2], ids=['tiny', 'mnist_cnn'])
def test_training_sends_only_gradients_and_batch_statistics(mesh, norms, config, tiny_net):
    config = resolve(config)
    on = scaling.describe(config, tiny_net if norms == 1 else build(config, 4), (8, 8, 1))
    gradients = sum(4 * leaf.size for leaf in jax.tree.leaves(on.variables['params']))
    statistics = sum(4 * leaf.size for leaf in jax.tree.leaves(on.variables['batch_stats']))
    programs = scaling.training(mesh, on, BATCH)
    for text in (programs.partitioned, programs.optimised):
        sent = scaling.collectives(text)
        assert {c.kind for c in sent} == {'all-reduce'}
        # Statistics go forward, and their gradients back: no more than once again. Loss and accuracy are two scalars.
        assert gradients + statistics <= sum(c.bytes for c in sent) <= gradients + 2 * statistics + 8
    purposes = [scaling.purpose(c) for c in scaling.collectives(programs.partitioned)]
    assert set(purposes) == {'weight gradients', 'BatchNorm, forward', 'BatchNorm, backward', 'loss and metrics'}
    assert purposes.count('BatchNorm, forward') == 2 * norms


@pytest.mark.parametrize('backend', ['cpu', 'tpu'])
def test_attack_sends_nothing(mesh, config, tiny_net, monkeypatch, backend):
    monkeypatch.setattr(pgd.jax, 'default_backend', lambda: backend)  # PGD is a loop except on a CPU
    config.aft_released.update({'pgd_steps': 2, 'random_start': True, 'clip': True})
    on = scaling.describe(resolve(config), tiny_net, (8, 8, 1))
    programs = scaling.attack(mesh, on, BATCH)
    copies = on.config.aft_released.pgd_steps if backend == 'cpu' else 1
    assert programs.partitioned.count(' dot(') == 4 * copies  # two dense layers, forward and back
    assert not scaling.collectives(programs.partitioned)
    assert not scaling.collectives(programs.optimised)


def test_measure_counts_the_work_of_convolutions():
    network = scaling.measure(scaling.subject(width=4, side=8))
    macs = 8 * 8 * 4 * 27 + 32 * scaling.CLASSES
    inputs, side = 4, 8
    for stage in range(4):
        width = 4 * 2**stage
        side //= 2 if stage else 1
        macs += side**2 * width * 9 * (inputs + 3 * width)
        macs += side**2 * width * inputs if stage else 0  # the shortcut's projection
        inputs = width
    assert network.forward == 2 * macs
    assert network.norms == 16


def test_estimate_matches_a_calculation_by_hand():
    network = scaling.Network(parameters=1_000_000, norms=10, channels=640, forward=1e9, first=0, outputs=1000)
    ring = scaling.Slice('', (4, 4), wraps=True, flops=1e14, memory=1e9, bandwidth=1e12, links=1e11)
    result = scaling.estimate(ring, network, scaling.Work(flops=3e9, passes=3), batch=160, hop=1e-6)
    assert ring.hops == 8
    assert result.compute == pytest.approx(10 * 3e9 / 0.4e14)
    assert result.weights == 0
    assert result.update == pytest.approx(20e6 / 1e12)
    assert result.statistics == pytest.approx(20 * 8e-6)
    assert result.gradients == pytest.approx(2 * 15 / 16 * 4e6 / 1e11 + 8e-6)
    assert result.efficiency == pytest.approx(result.compute / sum(result))
    alone = ring._replace(axes=(1, 1))
    assert scaling.estimate(alone, network, scaling.Work(3e9, 3), batch=160)[3:] == (0, 0)

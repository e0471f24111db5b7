"""Draws docs/triggers.png: what each attack does to Fashion-MNIST images.

    python docs/make_gallery.py runs/table/runs/input_aware-all2one-0

The input-aware attack's trigger is a trained network, which is read from the finished run; without one it is left out.
"""

import sys
from pathlib import Path

from aft_jax import attacks, data
from aft_jax.attacks.attack import triggered
from aft_jax.pipeline import saved_run
from aft_jax.report.trigger_gallery import write_gallery
from aft_jax.runtime.sharding import make_mesh
from configs import fashion_mnist

ATTACKS = ('badnets', 'blend', 'sig', 'wanet')


def main(runs: list[str]) -> None:
    """Draws the figure."""
    config = fashion_mnist.get_config()
    dataset = data.load(config.dataset, config.data)
    images = dataset.test_images[[0, 1, 8]]
    found = {
        name: attacks.build(fashion_mnist.get_config(name), dataset.image_shape, dataset.num_classes)
        for name in ATTACKS
    }
    for run in runs:
        read = saved_run.load(Path(run), make_mesh(), saved_run.Datasets())
        found[read.config.attack.name] = read.infected.attack
    shown = {name: (images, triggered(attack, images)) for name, attack in found.items() if attack is not None}
    write_gallery(Path(__file__).parent / 'triggers.png', shown)


if __name__ == '__main__':
    main(sys.argv[1:])

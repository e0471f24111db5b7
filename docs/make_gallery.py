"""Draws docs/triggers.png: Fashion-MNIST images with and without the trigger of each attack.

    python docs/make_gallery.py runs/table/runs/input_aware-all2one-0

The trigger of the input-aware attack is a trained network, which is loaded from a finished run. Without such a run the
figure leaves this attack out.
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


def main(directories: list[str]) -> None:
    """Draws the figure, with the attacks of the runs in these directories."""
    config = fashion_mnist.get_config()
    dataset = data.load(config.dataset, config.data)
    images = dataset.test_images[[0, 1, 8]]
    attack_of = {
        name: attacks.build(fashion_mnist.get_config(name), dataset.image_shape, dataset.num_classes)
        for name in ATTACKS
    }
    for directory in directories:
        run = saved_run.load(Path(directory), make_mesh(), saved_run.Datasets())
        attack_of[run.config.attack.name] = run.infected.attack
    pairs = {name: (images, triggered(attack, images)) for name, attack in attack_of.items() if attack is not None}
    write_gallery(Path(__file__).parent / 'triggers.png', pairs)


if __name__ == '__main__':
    main(sys.argv[1:])

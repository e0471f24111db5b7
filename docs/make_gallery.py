"""Draws docs/triggers.png: what each attack whose trigger needs no training does to Fashion-MNIST images.

    python docs/make_gallery.py

The input-aware attack's trigger is a trained network: a run with it has its own report/triggers.png.
"""

from pathlib import Path

from aft_jax import attacks, data
from aft_jax.attacks.attack import triggered
from aft_jax.report.gallery import write_gallery
from configs import fashion_mnist

ATTACKS = ('badnets', 'blend', 'sig', 'wanet')


def main() -> None:
    """Draws the figure."""
    config = fashion_mnist.get_config()
    dataset = data.load(config.dataset, config.data)
    images = dataset.test_images[[0, 1, 8]]
    shown = {}
    for name in ATTACKS:
        attack = attacks.build(fashion_mnist.get_config(name), dataset.image_shape, dataset.num_classes)
        assert attack is not None
        shown[name] = (images, triggered(attack, images))
    write_gallery(Path(__file__).parent / 'triggers.png', shown)


if __name__ == '__main__':
    main()

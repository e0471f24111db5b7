"""aft_jax: erase backdoors from image classifiers by adversarial fine-tuning, and show that they are gone."""

__version__ = '0.1.0'

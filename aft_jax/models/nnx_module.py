"""A classifier of Flax NNX as a module of Flax linen.

`flax.nnx.bridge.ToLinen` does the same, but it names the modules of a list by integers. Here every name in the
variables is a text, such as 'norms/0/scale', so that the variables can be written to files.
"""

from typing import Any

import flax.linen as nn
import jax
from flax import nnx
from flax.core import FrozenDict
from flax.traverse_util import flatten_dict, unflatten_dict


class NnxClassifier(nn.Module):
    """A classifier of NNX. Its `nnx.Param`s are 'params', its other variables are 'batch_stats'.

    Attributes:
        kind: Class of the classifier.
        options: Arguments of the class beside `rngs`.
    """

    kind: Any
    options: FrozenDict

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False, **options: Any) -> Any:
        """Calls the classifier with `train` and the options."""
        key = self.make_rng('params') if self.is_initializing() else jax.random.key(0)
        dropout = self.make_rng('dropout') if self.has_rng('dropout') else key
        module = self.kind(**self.options, rngs=nnx.Rngs(params=key, dropout=dropout))
        if not self.is_initializing():
            stored = {path[1:]: value for path, value in flatten_dict(dict(self.variables)).items()}
            nnx.update(
                module, nnx.from_flat_state([(p, leaf.replace(stored[_text(p)])) for p, leaf in _leaves(module)])
            )
        else:
            self._write(module, 'params')
            self._write(module, 'batch_stats')
        output = module(images, train=train, **options)
        if not self.is_initializing() and self.is_mutable_collection('batch_stats'):
            self._write(module, 'batch_stats')
        return output

    def _write(self, module: nnx.Module, collection: str) -> None:
        """Copies the variables of a collection from NNX."""
        values = {_text(path): leaf.get_value() for path, leaf in _leaves(module) if _collection(leaf) == collection}
        for name, value in unflatten_dict(values).items():
            self.put_variable(collection, name, value)


def _leaves(module: nnx.Module) -> list[tuple[tuple[Any, ...], nnx.Variable]]:
    """Lists the paths and variables of a module, without the states of random numbers."""
    return list(nnx.to_flat_state(nnx.state(module, nnx.Not(nnx.RngState))))


def _text(path: tuple[Any, ...]) -> tuple[str, ...]:
    return tuple(map(str, path))


def _collection(leaf: nnx.Variable) -> str:
    return 'params' if isinstance(leaf, nnx.Param) else 'batch_stats'

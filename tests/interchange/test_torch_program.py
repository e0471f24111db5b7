"""Programs of torch.export in JAX: logits, gradients and training steps equal to torch's, weights back bit for bit.

Needs torch, and torchvision for the families. All architectures: python -m benchmarks.torch_architectures.
"""

from functools import partial

import flax.linen as nn
import jax
import numpy as np
import pytest

from aft_jax.errors import UserError
from aft_jax.interchange import program_file
from aft_jax.interchange.program import Program, to_torch, to_variables
from aft_jax.interchange.torch_program import TorchProgram

torch = pytest.importorskip('torch')
from torch_families import CLASSES, FAMILIES, MAPS, Unusual, build  # noqa: E402

from aft_jax.interchange import torch_model  # noqa: E402
from benchmarks.torch_parity import compare, randomise  # noqa: E402

torch.set_num_threads(1)
LIMIT = 1e-4


def torchvision():
    """Imports torchvision, or skips the test."""
    try:
        return torch_model.import_torchvision()
    except UserError as error:
        pytest.skip(str(error))


def assert_parity(parity):
    assert parity.exact
    errors = parity._replace(image_noise=0.0, train_noise=0.0, exact=0.0)
    assert max(errors) < LIMIT, errors


def program_of(model, side=12):
    return Program(torch_model.export(model, (side, side, 3), 'network'), 'network')


def module_of(program):
    return TorchProgram(num_classes=program.num_classes, mean=(0.0,), std=(1.0,), program=program)


@pytest.mark.parametrize('family', FAMILIES)
def test_program_agrees_with_torch(family):
    torchvision()
    model, side = build(family)
    program = program_of(randomise(model), side)
    assert_parity(compare(model, program))
    module = module_of(program)
    variables = module.initial_variables()
    images = jax.ShapeDtypeStruct((3, side, side, 3), np.float32)
    logits, maps = jax.eval_shape(lambda x: module.apply(variables, x, features=True), images)
    assert logits.shape == (3, CLASSES)
    assert maps[-1].shape == (3, *MAPS[family])
    fresh = jax.eval_shape(module.init, jax.random.key(0), images)
    assert {k: v for k, v in jax.tree.map(np.shape, variables).items() if v} == jax.tree.map(lambda x: x.shape, fresh)


def test_program_agrees_with_torch_on_unusual_operators():
    model = randomise(Unusual())
    assert_parity(compare(model, program_of(model)))


class Small(torch.nn.Module):
    """A network with dropout; the function is applied to its feature maps."""

    def __init__(self, function=lambda x: x):
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 8, 3)
        self.norm = torch.nn.BatchNorm2d(8)
        self.dropout = torch.nn.Dropout(0.5)
        self.head = torch.nn.Linear(8, CLASSES)
        self.function = function

    def forward(self, x):
        x = self.function(self.norm(self.conv(x)))
        return self.head(self.dropout(x.mean((2, 3))))


def test_program_drops_in_training_only():
    module = module_of(program_of(Small()))
    variables = module.initial_variables()
    images = np.random.default_rng(0).normal(size=(4, 12, 12, 3)).astype(np.float32)

    @partial(jax.jit, static_argnums=0)
    def logits(train, seed):
        rngs = {'dropout': jax.random.key(seed)}
        return module.apply(variables, images, train=train, mutable=['batch_stats'], rngs=rngs)[0]

    assert (logits(False, 0) == logits(False, 1)).all()
    assert (logits(True, 0) == logits(True, 0)).all()
    assert (logits(True, 0) != logits(True, 1)).any()


def test_stochastic_depth_drops_whole_images_in_training():
    models = torchvision()

    class Deep(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.depth = models.ops.StochasticDepth(0.5, 'row')

        def forward(self, x):
            return self.depth(x).mean((2, 3))

    module = module_of(program_of(Deep()))
    images = np.ones((64, 4, 4, 3), np.float32)
    np.testing.assert_array_equal(module.apply({}, images), 1)
    train = partial(module.apply, train=True, rngs={'dropout': jax.random.key(0)})
    dropped = np.asarray(jax.jit(train)({}, images))
    assert (dropped == dropped[:, :1]).all()
    assert set(np.unique(dropped)) == {0.0, 2.0}


def test_layers_have_the_names_of_flax():
    program = program_of(Small())
    variables = to_variables(program, program.file.tensors)
    assert set(variables['params']) == {'conv', 'norm', 'head'}
    assert set(variables['params']['head']) == {'kernel', 'bias'}
    assert set(variables['batch_stats']['norm']) == {'mean', 'var', 'count'}
    module, seen = module_of(program), []

    def intercept(call, arguments, options, context):
        seen.append((type(context.module), context.module.path))
        return call(*arguments, **options)

    with nn.intercept_methods(intercept):
        module.apply(variables, np.zeros((2, 12, 12, 3), np.float32))
    assert (nn.Dense, ('head',)) in seen
    assert module.layer_after_maps == 'head'


def test_encode_writes_a_file_that_torch_loads(tmp_path):
    program = program_of(randomise(Small()))
    tensors = {key: tensor + 1 for key, tensor in program.file.tensors.items()}
    path = tmp_path / 'changed.pt2'
    path.write_bytes(program_file.encode(program.file, tensors))
    loaded = torch.export.load(path)
    for key, tensor in tensors.items():
        np.testing.assert_array_equal(loaded.state_dict[key].detach().numpy(), tensor)
    again = program_file.read(path)
    assert Program(again) != program and Program(again) == Program(program_file.read(path))
    images = np.random.default_rng(0).normal(size=(3, 12, 12, 3)).astype(np.float32)
    logits = module_of(Program(again)).apply(to_variables(program, tensors), images)
    expected = loaded.module()(torch.from_numpy(images).permute(0, 3, 1, 2)).detach().numpy()
    np.testing.assert_allclose(logits, expected, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize('damage', ['cut short', 'no zip', 'no graph', 'pickled weight'])
def test_read_refuses_a_damaged_file(tmp_path, damage):
    file = program_of(Small()).file
    content = program_file.encode(file, file.tensors)
    entries = dict(file.entries)
    match damage:
        case 'cut short':
            content = content[:-1000]
        case 'no zip':
            content = b'no zip'
        case 'no graph':
            del entries[file.folder + program_file.GRAPH]
        case 'pickled weight':
            index = file.folder + program_file.WEIGHTS_INDEX
            entries[index] = entries[index].replace(b'"use_pickle": false', b'"use_pickle": true')
    if entries != file.entries:
        # The weights are written first, so that only the damaged entry differs.
        content = program_file.pack(entries)
    (tmp_path / 'bad.pt2').write_bytes(content)
    with pytest.raises(UserError, match='bad.pt2 (is damaged|holds no graph)|is pickled'):
        program_file.read(tmp_path / 'bad.pt2')


@pytest.mark.parametrize(
    ('function', 'message'),
    [
        (lambda x: torch.cummax(x, 1)[0], r'operator cummax \(in test_torch_program.py, line \d+: '),
        (lambda x: (x.flatten(2), x.relu_())[0].unflatten(2, (10, 10)), 'changed in place before'),
    ],
)
def test_program_refuses_an_operator(function, message):
    with pytest.raises(UserError, match=message):
        program_of(Small(function))


def test_program_follows_in_place_operators():
    def function(x):
        y = x * 2
        y[:, 1:3, 0] = 2.0
        y += x
        return y

    model = randomise(Small(function))
    assert_parity(compare(model, program_of(model)))


def test_program_refuses_a_fixed_batch():
    import io

    buffer = io.BytesIO()
    torch.export.save(torch.export.export(Small().eval(), (torch.zeros(1, 3, 12, 12),)), buffer)
    with pytest.raises(UserError, match='exported for batches of 1; export it with a dynamic first axis'):
        Program(program_file.decode(buffer.getvalue()), 'fixed')


def test_export_explains_what_torch_refuses():
    def function(x):
        return x if x.sum() > 0 else -x

    with pytest.raises(UserError, match='cannot be exported by torch.export for images of 12x12x3'):
        program_of(Small(function))


@pytest.mark.parametrize(
    'text', ['resnet18', ':f', 'torchvision:', 'torchvision:resnet18(18)', 'a:b(c=open("x"))', 'a:b c']
)
def test_parse_name_refuses_other_forms(text):
    with pytest.raises(UserError, match='should be'):
        torch_model.parse_name(text)


@pytest.mark.parametrize(
    ('text', 'message'),
    [
        ('no_such_module:f', 'cannot be imported'),
        ('torch_families:no_such_function', 'cannot be imported'),
        ('torch_families:CLASSES', 'name a function'),
        ('torch_families:Unusual(width=3)', 'cannot be built .*width'),
        ('builtins:dict', 'returned a dict'),
    ],
)
def test_build_refuses_what_makes_no_network(text, message):
    with pytest.raises(UserError, match=message):
        torch_model.build(text, 5, 3, seed=0)


def test_build_draws_weights_from_the_seed():
    first, again, other = (torch_model.build('torch_families:Unusual', 5, 3, seed).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not torch.equal(first['weight'], other['weight'])


def test_to_torch_inverts_to_flax():
    program = program_of(randomise(Unusual()))
    leaves = {
        tuple(k.key for k in path): leaf
        for path, leaf in jax.tree.leaves_with_path(to_variables(program, program.file.tensors))
    }
    for key, place in program.places.items():
        np.testing.assert_array_equal(to_torch(leaves[place], place), program.file.tensors[key])

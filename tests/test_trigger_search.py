"""The search for triggers: its objective and changes against NumPy, planted backdoors, its verdict and texts."""

import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import CLASSES, SIDE, structured_images
from experiment_results import results, scores, searched
from toys import lines

from aft_jax.adversarial.kinds import Perturbation
from aft_jax.adversarial.perturbations import PerturbationSpec
from aft_jax.analysis import backdoor_scan, scan_stage, searched_changes, trigger_search
from aft_jax.analysis.backdoor_scan import limit_of, search_fields
from aft_jax.analysis.infection_score import BackdoorHypothesis
from aft_jax.analysis.searched_changes import FLOOR, Changes, Kinds, SoftMask
from aft_jax.analysis.trigger_search import FoundChange, SearchOptions, TriggerSearch
from aft_jax.attacks.poison import NO_INDICES, Poisoned
from aft_jax.config import resolve
from aft_jax.pipeline import export
from aft_jax.pipeline.scenario import InfectedModel, Scenario
from aft_jax.results import search_text, terminal
from aft_jax.runtime.sharding import make_mesh
from configs import purify

TARGET = 2
PATCH = np.array([[1, -1, 1], [-1, 1, -1], [1, -1, 1]], np.float32)


class Quarters(nn.Module):
    """Classifies by the bright quarter, and has a backdoor unit for a 3x3 patch in a corner.

    The unit adds `weight` times the presence of the patch: to the logit of `TARGET` (all2one), or to the logit of the
    next class, in proportion to the evidence for the class (all2all). Both are variables, so that all tests share the
    compiled functions.
    """

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
        weight, all2all = (self.param(name, nn.initializers.zeros, ()) for name in ('weight', 'all2all'))
        half = SIDE // 2
        bright = images.reshape((len(images), 2, half, 2, half)).mean(axis=(2, 4)).reshape((len(images), CLASSES))
        likeness = (2 * images[:, -3:, -3:, 0] - 1) * jnp.asarray(PATCH)[None]
        presence = jax.nn.sigmoid(12 * (likeness.mean(axis=(1, 2)) - 0.4))[:, None]
        following = jnp.roll(jax.nn.softmax(40 * bright), 1, axis=1)
        target = jax.nn.one_hot(jnp.full(1, TARGET), CLASSES)
        return 40 * bright + weight * presence * (all2all * following + (1 - all2all) * target)


def quarters(weight: float, all2all: bool = False) -> dict:
    """Builds variables of `Quarters`."""
    return {'params': {'weight': np.float32(weight), 'all2all': np.float32(all2all)}}


@pytest.fixture(scope='module')
def search():
    """A function that searches for a trigger of a model, with the model without its backdoor as reference."""
    mesh = make_mesh(jax.devices()[:1])
    trigger_searcher = TriggerSearch(
        Quarters(), mesh, (SIDE, SIDE, 1), CLASSES, SearchOptions(10, 9.0, 1.0, 16), purified=False
    )
    images, labels = structured_images(96, 5)

    def call(variables: dict) -> tuple[FoundChange, ...]:
        return trigger_searcher.search(variables, quarters(0), images, labels, jax.random.key(3))

    return call


# --- the objective and the changes


def log_softmax(logits):
    return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))


def test_objective_is_that_of_the_docstring():
    generator = np.random.default_rng(0)
    labels, targets = np.array([0, 1, 2, 1, 0], np.int32), np.array([0, 2, -1], np.int32)
    model, reference = (5 * generator.normal(size=(2, 3, 5, 3)).astype(np.float32) for _ in range(2))
    f, r = log_softmax(model.astype(np.float64)), log_softmax(reference.astype(np.float64))
    assert (r[:, 1, :, 2] < FLOOR).any() and (r[:, 2, np.arange(5), labels] < FLOOR).any()
    expected = np.zeros((2, 3))
    for change in range(2):
        for target in (0, 2):
            row, others = list(targets).index(target), labels != target
            expected[change, row] = np.mean(
                (f[change, row, :, target] - np.maximum(r[change, row, :, target], FLOOR))[others]
            )
        # Without a target: the cross-entropy under the model minus that under the reference, which has no floor.
        expected[change, 2] = np.mean([r[change, 2, i, y] - f[change, 2, i, y] for i, y in enumerate(labels)])
    flat = [jnp.asarray(z.reshape(-1, 3)) for z in (model, reference)]
    actual = searched_changes.objectives(*flat, jnp.asarray(labels), np.stack([targets, targets]))
    np.testing.assert_allclose(actual, expected, rtol=1e-5)


def soft_mask(opacity, pattern):
    return SoftMask(jnp.float32(opacity), jnp.float32(pattern), ())


def test_changed_images_applies_each_change_and_the_masks_last():
    generator = np.random.default_rng(1)
    images = generator.random((2, 4, 4, 3), np.float32)
    values = generator.normal(size=(3, 1, 4, 4, 3)).astype(np.float32)  # of three targets
    perturbation = Perturbation(values, jnp.ones(3), jnp.ones((3, 1, 1, 1, 1)))
    opacity, pattern = generator.normal(size=(2, 3, 1, 4, 4, 1)), generator.normal(size=(2, 3, 1, 4, 4, 3))
    parts = (perturbation, *map(soft_mask, opacity, pattern))
    kinds = Kinds((PerturbationSpec('linf', 1.0),), (0.1, 0.2))
    nothing = jnp.zeros((3, 3))
    changed = searched_changes.changed_images(kinds, Changes(nothing, nothing, parts), images)
    assert changed.shape == (3, 3, 2, 4, 4, 3) and kinds.names == ['linf', 'mask', 'mask']
    np.testing.assert_allclose(changed[0], np.clip(images + values, 0, 1), atol=1e-6)
    m, p = (1 / (1 + np.exp(-x)) for x in (opacity, pattern))
    np.testing.assert_allclose(changed[1:], images + m * (p - images), atol=1e-5)


def test_binarise_keeps_as_many_of_the_highest_opacities_as_the_area_has_pixels():
    opacity = np.random.default_rng(2).normal(size=(3, 2, 1, 8, 8, 1)).astype(np.float32)
    masks = tuple(soft_mask(each, 0) for each in opacity)
    kinds = Kinds((), (0.001, 0.05, 0.25))  # at least one pixel
    binary = searched_changes.binarise(kinds, Changes(jnp.zeros((3, 2)), jnp.zeros((3, 2)), masks)).parts
    for row, pixels in enumerate((1, 3, 16)):
        kept = np.asarray(jax.nn.sigmoid(binary[row].opacity))
        assert set(np.unique(kept)) == {0, 1}
        for before, after in zip(opacity[row], kept, strict=True):
            assert after.sum() == pixels and before[after == 1].min() > before[after == 0].max()


@pytest.mark.parametrize(
    ('count', 'expected'), [(2, [[3, 1, -1], [0, 3, -1]]), (9, [[3, 1, 0, 2, -1], [0, 3, 2, 1, -1]])]
)
def test_best_changes_keeps_the_largest_objectives_of_each_change(count, expected):
    groups = [
        Changes(np.array([[0, 1], [0, 1]]), np.array([[2.0, 5], [7, 1]]), (np.array([0, 1]), np.array([10, 11]))),
        # The last group is filled up with changes without a target label.
        Changes(
            np.array([[2, 3, -1, -1]] * 2),
            np.array([[1.0, 6, 8, 9], [2, 3, 9, 8]]),
            (np.array([2, 3, 4, 5]), np.array([12, 13, 14, 15])),
        ),
    ]
    best = searched_changes.best_changes(groups, count)
    np.testing.assert_array_equal(best.targets, expected)
    first, second = expected
    np.testing.assert_array_equal(best.parts[0], [*first[:-1], 5])
    np.testing.assert_array_equal(best.parts[1], [*(10 + label for label in second[:-1]), 14])
    np.testing.assert_array_equal(best.values[:, -1], [9, 9])
    np.testing.assert_array_equal(best.values[:, 0], [6, 7])


# --- planted backdoors


def test_search_finds_the_label_of_a_planted_patch(search):
    best, *others = search(quarters(60))
    assert best.hypothesis.kind == 'all2one' and list(best.hypothesis.target_map) == [TARGET] * CLASSES
    assert best.hypothesis.score > 0.8 and best.share > 0.8
    assert [change.hypothesis.score for change in others] == sorted((c.hypothesis.score for c in others), reverse=True)
    assert len({change.kind for change in (best, *others)}) == len(trigger_search.KINDS) + 1 == len(others) + 1
    assert best.examples.shape == (3, SIDE, SIDE, 1) and 0 <= best.examples.min() < best.examples.max() <= 1
    assert set(search_text.KIND_NAMES) == {change.kind for change in (best, *others)}


def test_search_finds_a_planted_all2all_backdoor(search):
    best = search(quarters(60, all2all=True))[0]
    assert best.hypothesis.kind == 'all2all' and list(best.hypothesis.target_map) == [1, 2, 3, 0]
    assert best.hypothesis.score > 0.8 and best.share > 0.8 > 0.3 > best.reference_share


def test_search_of_a_model_equal_to_its_reference_finds_no_excess(search):
    changes = search(quarters(0))
    assert all(change.hypothesis.score == 0 and change.share == change.reference_share for change in changes)


# --- the verdict


def change_of(excess: float, kind: str = 'all2one') -> FoundChange:
    target_map = np.array([1, 1, 1] if kind == 'all2one' else [1, 2, 0], np.int32)
    return FoundChange('mask', BackdoorHypothesis(excess, kind, target_map), 0.875, 0.25, np.zeros((3, 2, 2, 1)))


@pytest.mark.parametrize(
    ('above', 'purified', 'expected'),
    [
        (0.01, False, 'infected'),
        (0.0, False, 'nothing found'),
        (0.01, True, 'not erased'),
        (0.0, True, 'nothing found'),
    ],
)
def test_search_fields_has_the_verdict_of_the_change_furthest_above_its_limit(above, purified, expected):
    limit = limit_of('mask', purified)
    excess = limit + above
    changes = [change_of(0.0, 'all2all'), change_of(excess)]
    fields = search_fields(changes, SearchOptions(5, 1.5, 0.75, 8), purified)
    shares = {'limit': limit, 'share': 0.875, 'reference_share': 0.25}
    assert fields == {
        'verdict': expected,
        'steps': 5,
        'factor': 1.5 if purified else 0.75,
        'changes': [
            {'kind': 'mask', 'backdoor': 'all2one', 'label': 1, 'excess': round(excess, 6)} | shares,
            {'kind': 'mask', 'backdoor': 'all2all', 'label': None, 'excess': 0.0} | shares,
        ],
    }
    assert search_text.found(fields) == (expected != 'nothing found')
    assert search_text.NOTHING_FOUND == backdoor_scan.NOTHING_FOUND


# --- what is written about it

RECTANGLE, ROTATION = ('rectangle', 2, 0.75, 0.875, 0.125), ('affine', None, 0.0625, 0.5, 0.4375)
INFECTED, NOT_ERASED = searched('infected', RECTANGLE, ROTATION), searched('not erased', RECTANGLE, ROTATION)
NOTHING = searched('nothing found', ROTATION, ('mask', 1, 0.0, 0.0, 0.0))


def given(before, **after):
    """Results of a given model and of purified ones, with these scans; None for no scan."""
    purified = {name: scores(0.9, **({'scan': scan} if scan else {})) for name, scan in after.items()}
    return results(scores(0.95, scan=before), given=True, **purified)


def plain(text: str) -> str:
    return text.replace('\u00a0', ' ')


@pytest.mark.parametrize(
    ('measured', 'expected'),
    [
        (
            given(INFECTED),
            r'Verdict on suspect: infected\. One rectangle, equal on all images, leads to the label two in 87\.5 % of '
            r'the images \(12\.5 % under the reference model\)\.',
        ),
        (
            given(INFECTED, aft=NOTHING, ft=NOT_ERASED),
            'Verdict on aft: no change of these kinds leads to one label any more: shift, rotation or scaling, mask '
            r'with a pattern; of 2 times the largest size that AFT trains with\. Other changes may\.',
        ),
        # There was nothing to find before either.
        (given(NOTHING, aft=NOTHING), 'Verdict on aft: no change of these kinds leads to one label: shift, .* may.'),
        # AFT was measured by an earlier start without a search.
        (given(NOTHING, aft=None, ft=NOT_ERASED), f'Verdict on ft: not erased. One .* {search_text.ADVICE}'),
        (given(INFECTED, aft=None), 'Verdict on suspect: infected. One rectangle, .* reference model.*'),
    ],
)
def test_verdict_line_is_the_last_line_of_the_table(measured, expected):
    line = plain(search_text.verdict_line(measured))
    assert re.fullmatch(expected, line)
    assert plain(terminal.table(measured)).splitlines()[-1] == line


def test_verdict_line_is_empty_without_a_search():
    measured = results(scores(0.95), given=True, aft=scores(0.9))
    assert search_text.verdict_line(measured) == '' and search_text.found_lines(measured) == []
    assert terminal.table(measured).splitlines()[-1].startswith('Score: near 0')


def test_describe_names_labels_by_number_without_class_names():
    one, each = NOT_ERASED['search']['changes']
    assert 'leads to the label 2 in' in search_text.describe(one, ())
    assert 'each class to another' in search_text.describe(each, ())


def test_found_lines_lists_the_best_changes_of_each_model():
    many = searched('infected', *[RECTANGLE] * 5)
    lines = [plain(line) for line in search_text.found_lines(given(many, aft=NOTHING))]
    assert lines == [
        'suspect     infected        ' + ', '.join(['rectangle 87.5 % to two (12.5 %)'] * search_text.SHOWN_CHANGES),
        'aft         nothing found   affine 50.0 % to one label a class (43.8 %), mask 0.0 % to one (0.0 %)',
    ]


def test_facts_of_a_card_have_what_was_found_before_and_after():
    config = purify.get_config()
    config.init_from = 'net.pt'
    facts = export.facts('aft', config, given(INFECTED, aft=NOTHING, ft=NOT_ERASED), {})
    assert facts['verdict of the search for triggers'].startswith(
        'no change of these kinds leads to one label any more'
    )
    figures = facts['figures']
    assert figures['search for triggers'] == {'before': 'infected', 'after': 'nothing found'}
    assert figures['largest excess of a change'] == {'before': 0.75, 'after': 0.0625}
    found = figures['change with the largest excess']
    assert found['before'].startswith('One rectangle') and found['after'].startswith('One shift')
    # A model that an earlier version has scanned has no search.
    old = {name: value for name, value in INFECTED.items() if name != 'search'}
    assert 'verdict of the search for triggers' not in export.facts('aft', config, given(old, aft=old), {})


# --- the stage


def test_prepare_trains_the_reference_once(dataset, config, tiny_net, tiny_variables, make_run, assert_trees_close):
    config.aft.reference_steps = 4
    nobody = Poisoned(dataset.train_images, dataset.train_labels, NO_INDICES, NO_INDICES)
    scenario = Scenario(dataset, None, nobody, np.arange(24, dtype=np.int32), tiny_net)
    run, infected = make_run(), InfectedModel(tiny_variables, None, 0.0)
    first = scan_stage.prepare(run, scenario, infected, resolve(config))
    trained = [line for line in lines(run) if line['stage'] == 'scan/reference']
    assert [line['step'] for line in trained] == [1, 2, 3, 4] and len(trained) == len(lines(run))
    again = scan_stage.prepare(run._replace(must_be_finished=True), scenario, infected, resolve(config))
    assert_trees_close(again.reference, first.reference)
    assert not np.allclose(
        first.reference['params']['Dense_0']['kernel'], tiny_variables['params']['Dense_0']['kernel']
    )

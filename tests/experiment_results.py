"""Makes results of experiments that nobody ran, for the tests of what is shown of them."""

from aft_jax.results.record import Results


def scores(acc, asr=None, **more):
    """The fields of a model's scores in results.json."""
    return {'acc': acc, 'asr': asr, 'ra': None if asr is None else 1 - asr, 'seconds': 1.5} | more


def results(before, attack='blend', given=False, connection=None, **purified):
    """Results of an infected model, or of a benign (attack='none') or given one."""
    fields = {
        'dataset': 'tiny',
        'model': 'net',
        'attack': 'none' if given else attack,
        'label_mode': 'all2one',
        'seed': 3,
        'clean_share': 0.05,
        'infected': {} if given else before,
        'purified': purified,
        'environment': {'jax': '0', 'backend': 'cpu', 'devices': 1, 'processes': 1},
    }
    if given:
        facts = {'init_from': 'net.pt', 'class_names': ['zero', 'one', 'two'], 'warning': ''}
        fields['suspect'] = facts | {name: value for name, value in before.items() if name != 'seconds'}
    if connection:
        fields['connection'] = connection
    return Results.from_json(fields)

"""Makes results of experiments that nobody ran, for the tests of what is shown of them."""

from aft_jax.results.record import Results


def scores(acc, asr=None, **more):
    """The fields of a model's scores in results.json."""
    return {'acc': acc, 'asr': asr, 'ra': None if asr is None else 1 - asr, 'seconds': 1.5} | more


def searched(verdict, *changes):
    """The fields of a scan with a search that found changes, each (kind, label, excess, share, reference share)."""
    names = 'kind', 'label', 'excess', 'share', 'reference_share'
    listed = [
        dict(zip(names, change, strict=True))
        | {'limit': 0.25, 'backdoor': 'all2all' if change[1] is None else 'all2one'}
        for change in changes
    ]
    search = {'verdict': verdict, 'steps': 7, 'factor': 2.0, 'changes': listed}
    landing = {'landing_eps': [8 / 255], 'fooled': [0.5], 'suspected_label': 1}
    return {'score': 0.5, 'images': 40, 'held_out': True, **landing, 'search': search}


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

"""Tests of the benchmarks' arithmetic: turns and ratios, FLOPs, flags, the CSV file and its table, without a clock."""

import re

import jax
import numpy as np
import pytest

from aft_jax.errors import UserError
from benchmarks import compare, flops, record, table, task, timing


def row(baseline: str, theirs: float, benchmark: str = 'mnist_cnn/aft_step') -> record.Row:
    ratio = timing.Ratio(theirs / 2, theirs / 4, theirs)
    return record.Row(benchmark, baseline, 'float32', 8, 2.0, theirs, ratio, 4.0, 3e9, (1e6, 2e6), (1.5, 0.0))


@pytest.mark.parametrize('devices', [4, 1])  # a single CPU device uses other convolutions
def test_flops_counts_convolutions_and_dense_layers(devices, monkeypatch):
    monkeypatch.setattr(jax, 'device_count', lambda: devices)
    first = 14 * 14 * 32 * 9
    rest = 7 * 7 * 64 * 9 * 32 + 4 * 4 * 64 * 9 * 64 + 1024 * 512 + 512 * 10
    work = flops.an_image(task.make('mnist_cnn', task.read('mnist_cnn', '', 8), 8, 'float32'))
    assert work['evaluation'] == 2 * (first + rest)
    assert work['training_step'] == work['infecting_epoch'] == 2 * (2 * first + 3 * rest)
    assert work['pgd7'] == 14 * work['evaluation']
    assert work['aft_step'] == work['aft_epoch'] == work['pgd7'] + work['training_step']


def test_alternate_takes_turns_and_ratio_compares_within_a_turn(monkeypatch):
    taken, now, slow = [], [0.0], [1]
    monkeypatch.setattr(timing.time, 'perf_counter', lambda: now[0])
    monkeypatch.setattr(timing.time, 'sleep', lambda _: None)
    monkeypatch.setattr(timing.gc, 'collect', lambda: 0)

    def work(name: str, seconds: float) -> timing.Work:
        def run(times: int) -> None:
            compiles = 3.0 if name not in taken else 0.0
            taken.append(name)
            now[0] += compiles + slow[0] * times * seconds

        return timing.Work(run, lambda: 7.0, units=2)

    ready = {'ours': timing.warm_up(work('ours', 0.15)), 'theirs': timing.warm_up(work('theirs', 0.45))}
    assert ready['ours'][1:] == (2, pytest.approx(0.075), pytest.approx(3.0), 7.0)
    assert ready['theirs'][1:] == (1, pytest.approx(0.225), pytest.approx(3.0), 7.0)
    taken.clear()
    monkeypatch.setattr(timing.gc, 'collect', lambda: slow.__setitem__(0, 2 ** (len(taken) // 2)))
    taken += ['ours', 'theirs']  # both are compiled
    seconds = timing.alternate(ready, 3)
    assert taken[2:] == ['ours', 'theirs'] * 3
    # The machine halves its speed at every turn, which must not change the ratios.
    assert seconds['ours'] == pytest.approx([0.15, 0.3, 0.6])
    assert timing.ratio(seconds['theirs'], seconds['ours']) == pytest.approx((3.0, 3.0, 3.0))


@pytest.mark.parametrize(
    ('flags', 'sentence'),
    [
        ('--models=lenet', "--models has 'lenet'; choose from mnist_cnn, preact_resnet18."),
        ('--dtype=float16', "--dtype has 'float16'; choose from float32, bfloat16."),
        ('--variants=graphs', "--variants has 'graphs'; choose from eager, compiled."),  # there is no GPU
        ('--batch=128,0', '--batch=128,0 should be a number of images'),
        ('--tf32=maybe', '--tf32=maybe should be on or off.'),
        ('--alternations=0', '--alternations should be at least 1'),
        ('--bogus', 'unrecognized arguments: --bogus'),
        ('--data=nowhere.npz', 'There is no file nowhere.npz'),
    ],
)
def test_main_reports_a_wrong_flag_in_one_sentence(flags, sentence, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(compare, 'set_up', lambda _: 'cpu')
    assert compare.main([flags, f'--out={tmp_path / "rows.csv"}']) == 2
    assert not list(tmp_path.iterdir())
    errors = capsys.readouterr().err
    assert sentence in errors and errors.count('\n') == 1


def test_read_gives_images_of_a_file_the_shape_of_the_classifier(tmp_path):
    grey = np.full((12, 28, 28), 200, np.uint8)
    path = tmp_path / 'grey.npz'
    arrays = {'train_images': grey, 'train_labels': np.arange(12) % 3, 'test_images': grey[:2], 'test_labels': [0, 1]}
    np.savez(path, **arrays)
    assert task.read('mnist_cnn', str(path), 0).pixels.shape == (12, 28, 28, 1)
    few = task.read('preact_resnet18', str(path), 2)
    assert few.pixels.shape == (2, 32, 32, 3) and few.num_classes == 3
    assert few.pixels[:, 2:-2, 2:-2].min() == 200 and few.pixels[:, :2].max() == 0
    with pytest.raises(UserError, match='--images=13 is more than the 12 training images'):
        task.read('mnist_cnn', str(path), 13)
    np.savez(path, **arrays | {name: arrays[name][:, :20] for name in ('train_images', 'test_images')})
    with pytest.raises(UserError, match='images of 20x28'):
        task.read('mnist_cnn', str(path), 0)


def test_append_adds_rows_and_markdown_shows_the_last_of_each(tmp_path):
    path = tmp_path / 'new' / 'benchmarks.csv'
    shared = {'date': '2026-01-01', 'device': 'abacus; 1 cores', 'versions': 'jax 1', 'alternations': 5}
    record.append(path, [row('released', 8.0), row('tuned, eager', 6.0)], shared)
    record.append(path, [row('tuned, compiled', 4.0)], shared)
    lines = path.read_text().splitlines()
    assert lines[0] == (
        'date,device,versions,benchmark,baseline,dtype,batch,ours_seconds,theirs_seconds,'
        'ratio_median,ratio_min,ratio_max,alternations'
    )
    assert lines[1] == '2026-01-01,abacus; 1 cores,jax 1,mnist_cnn/aft_step,released,float32,8,2,8,4,2,8,5'
    shown = table.markdown(table.read(path)).splitlines()
    assert shown[0] == '2026-01-01, abacus; 1 cores; jax 1'
    assert [re.split(r' *\| *', line)[4] for line in shown[4:]] == ['released', 'tuned, compiled']
    path.write_text('another file\n')
    for function in (lambda: record.append(path, [], shared), lambda: table.read(path)):
        with pytest.raises(UserError, match='benchmarks.csv'):
            function()


def test_record_table_shows_the_share_of_the_ceiling():
    ceilings = {'float32': record.Ceiling(product=12e9, convolution=6e9)}
    line = record.table([row('released', 8.0)], ceilings).splitlines()[1]
    expected = ['2', '8', '4.00', '[2.00,', '8.00]', '4', '50%', '(25%)', '0.001/0.002', '1.5/0.0']
    assert line.split()[-10:] == expected

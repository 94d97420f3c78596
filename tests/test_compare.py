"The comparer itself: what it lets pass, what it must not, and that every kind of fault turns a page red."
import json, re, shutil, subprocess, sys
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook, new_output
from tools.compare import Mismatch, compare_outputs, compare_text, read_tags

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize('stored, new', [
    ('loss 1.6755', 'loss 1.6754'),                     # one unit of the last digit
    ('1234.5678', '1235.0'),                            # a thousandth of the value
    ('tensor([-0.0000, 1.0000])', 'tensor([0.0000, 1.0000])'),
    ('tensor([0.0000, 1.0000])', 'tensor([ -0.0000,  1.0000])'),
    ('1.68e-05 s', '1.69e-05 s'),
    ('0.9995 x', '1.0000 x'),
    ('-3.21', '-3.22'),
    ('x="60.38" fill="#6e7781" y="1e3"', 'x="60.39" fill="#6e7781" y="1e3"'),
])
def test_within_tolerance(stored, new): assert compare_text(stored, new) is False


@pytest.mark.parametrize('stored, new', [
    ('1.6755', '1.6923'), ('1.6755', '1.6587'),         # one percent
    ('12 tokens', '13 tokens'), ('20479', '20480'),     # integers are exact
    ('token', 'tokens'), ('a b', 'ab'), ('a b', 'a  b'),
    ('0.5', '-0.5'), ('1.5', 'nan'), ('3', '3.0'), ('1e-3', '1e3'),
    ('tensor(1.)', 'tensor(0.)'), ('1e-5', '2e-5'), ('1e400', '1e401'), ('#6e7781', '#6e7782'), ('torch 2.13.0', 'torch 2.13.1'), ('v1.5', 'v1.6'), ('[0.1, 0.2]', '[0.1, 0.2, 0.3]'), ('x\ny', 'x y'),
])
def test_outside_tolerance(stored, new):
    with pytest.raises(Mismatch): compare_text(stored, new)


def test_equal_is_exact(): assert compare_text('0.1 and 7', '0.1 and 7') is True


def test_a_wider_tolerance_widens_floats_only():
    assert compare_text('loss 2.00', 'loss 2.08', rtol=0.05) is False
    with pytest.raises(Mismatch): compare_text('loss 2.00', 'loss 2.20', rtol=0.05)
    with pytest.raises(Mismatch): compare_text('100 tokens', '101 tokens', rtol=0.05)


def test_streams_are_joined_and_order_counts():
    out, err = (lambda t: new_output('stream', name='stdout', text=t)), new_output('stream', name='stderr', text='a')
    assert compare_outputs([out('ab')], [out('a'), out('b')])
    with pytest.raises(Mismatch): compare_outputs([out('a'), err], [err, out('a')])
    with pytest.raises(Mismatch): compare_outputs([], [err])


def test_a_bitmap_cannot_pass_as_compared():
    png = [new_output('display_data', {'image/png': 'AAAA'})]
    with pytest.raises(Mismatch, match='return an SVG'): compare_outputs(png, png)


@pytest.mark.parametrize('tag', ['uncompared', 'uncompared: no', 'uncompared:', 'rtol=0.05', 'rtol=0.05: yes', 'rtol: it is rather wide',
                                 'rtol=0.9: far too wide here', 'rtol=1e-5: tighter than the rest', 'nbval-ignore-output', 'nbval-skip', 'Uncompared: it is a time', 'hide'])
def test_tags_are_known_give_a_reason_and_have_a_bound(tag):
    with pytest.raises(ValueError): read_tags([tag])


def test_tags_with_a_reason():
    assert read_tags(['uncompared: it measures a time'])[1] == 'it measures a time'
    assert read_tags(['remove-input', 'rtol=0.05: dropout differs by platform']) == (0.05, None)
    with pytest.raises(ValueError): read_tags([], 'f()  # NBVAL_IGNORE_OUTPUT')


def text(t): return new_output('execute_result', {'text/plain': t})
def out(t): return new_output('stream', name='stdout', text=t)
def cell(source, *outputs, tags=()): return new_code_cell(source, outputs=list(outputs), metadata={'tags': list(tags)})
def error(kind): return new_output('error', ename=kind, evalue='x', traceback=[])


PAGES = {       # name: (does it pass?, cells)
    'good': (True, [cell('21 * 2', text('42')), cell('print(1 / 3)', out('0.3334\n')), cell('x = 1;'), cell('x;'), cell('-0.0', text('0.0'))]),
    'error_of_its_type': (True, [cell('raise KeyError("x")', new_output('error', ename='KeyError', evalue="'x'", traceback=[]), tags=['raises-exception'])]),
    'uncompared': (True, [cell('import time; print(time.time())', out('0.1\n'), tags=['uncompared: it prints the time'])]),
    'never_run': (True, [cell('#| eval: false\nraise SystemExit', tags=['uncompared: it needs a network', 'skip-execution'])]),
    'never_run_without_reason': (False, [cell('#| eval: false\nassert False')]),
    'kernel_that_dies': (False, [cell('import os; os._exit(1)')]),
    'changed_integer': (False, [cell('21 * 2', text('43'))]),
    'changed_word': (False, [cell('print("tea")', out('teas\n'))]),
    'float_off_by_one_percent': (False, [cell('1.6755', text('1.6923'))]),
    'missing_output': (False, [cell('21 * 2')]),
    'output_that_no_longer_comes': (False, [cell('x = 21 * 2', text('42'))]),
    'vanished_cell': (False, [cell('x = 1')]),
    'other_error': (False, [cell('raise ValueError("x")', error('KeyError'), tags=['raises-exception'])]),
    'error_that_no_longer_comes': (False, [cell('x = 1', error('KeyError'), tags=['raises-exception'])]),
    'error_without_tag': (False, [cell('raise KeyError("x")', error('KeyError'))]),
    'tag_without_reason': (False, [cell('21 * 2', text('43'), tags=['uncompared'])]),
    'nbval_tag': (False, [cell('21 * 2', text('43'), tags=['nbval-ignore-output'])]),
    'warning_on_the_side': (False, [cell('import sys; print("careful", file=sys.stderr)')]),
}


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    "One run over a small book in which each page has one fault."
    home = tmp_path_factory.mktemp('book')
    for folder in ('nbs', 'tests', 'tools'): (home/folder).mkdir()
    for file in ('conftest.py', 'pyproject.toml', 'tools/__init__.py', 'tools/compare.py'): shutil.copy(ROOT/file, home/file)
    ledger = {}
    for name, (_, cells) in PAGES.items():
        nbformat.write(new_notebook(cells=cells), home/'nbs'/f'{name}.ipynb')
        ledger[name] = [c.id for c in cells]
    ledger['vanished_cell'].append('0123abcd')
    (home/'tests'/'ledger.json').write_text(json.dumps(ledger))
    done = subprocess.run([sys.executable, '-m', 'pytest', 'nbs', '-q', '-p', 'no:cacheprovider', '-p', 'no:xdist', '-o', 'addopts=--nbval --nbval-current-env', '--tb=short', '-rfE'],
                          cwd=home, capture_output=True, text=True)
    return done.stdout


@pytest.mark.parametrize('page', PAGES)
def test_each_fault_turns_its_page_red(run, page):
    failed = bool(re.search(rf'^(FAILED|ERROR) nbs/{page}\.ipynb', run, re.M))
    assert failed != PAGES[page][0], run[-3000:]


def test_the_table_counts_cells(run):
    assert 'cells of every page' in run
    row = next(line.split() for line in run.splitlines() if line.startswith('good '))
    assert row == ['good', '1', '2', '0', '2', '0']
    assert next(line.split() for line in run.splitlines() if line.startswith('uncompared ')) == ['uncompared', '0', '0', '1', '0', '0']

"The stored outputs are those of one thread and of several, with and without AVX-512: the pages run once as the machine has it, and once here, on one thread and without it."
import json, os, platform, subprocess, sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
X86 = platform.machine().lower() in ('x86_64', 'amd64')
SETTING = {'OMP_NUM_THREADS': '1', 'MKL_NUM_THREADS': '1', 'OPENBLAS_NUM_THREADS': '1',
           **({'ATEN_CPU_CAPABILITY': 'avx2', 'NPY_DISABLE_CPU_FEATURES': 'AVX512F AVX512CD AVX512_SKX'} if X86 else {})}
# What takes long, could not differ here, and makes no name that a later cell needs: it measures seconds that nothing is compared with, or counts in Python's own integers.
MEASURE = {'11_loss': ['3c277bef'], '15_distributed': ['76bced42', '1bef79fa'], 'F_commands': ['3ef3c493']}
COUNT = {'03_bpe': ['69667eaa']}


def left_out():
    "The names of these cells, as nbval numbers them."
    for page in {*MEASURE, *COUNT}:
        cells = {cell['id']: cell for cell in json.loads((ROOT/'nbs'/f'{page}.ipynb').read_text(encoding='utf-8'))['cells'] if cell['cell_type'] == 'code'}
        for name in MEASURE.get(page, ()): assert any(tag.startswith('uncompared: ') for tag in cells[name]['metadata'].get('tags', ()))
        yield from (f'nbs/{page}.ipynb::Cell {[*cells].index(name)}' for name in (*MEASURE.get(page, ()), *COUNT.get(page, ())))


def test_outputs_are_the_same():
    done = subprocess.run([sys.executable, '-m', 'pytest', 'nbs', '-q', '-p', 'no:xdist', '-p', 'no:cacheprovider', '-o', 'addopts=--nbval --nbval-current-env --nbval-cell-timeout=300',
                           *(f'--deselect={name}' for name in left_out())], cwd=ROOT, env={**os.environ, **SETTING}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-5000:]
    assert 'cells of every page' in done.stdout and f'{len([*left_out()])} deselected' in done.stdout

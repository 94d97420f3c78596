"The stored outputs are those of one thread and of several, with and without AVX-512: the pages run once as the machine has it, and once here, on one thread and without it, but for what takes long and repeats what others say."
import json, os, platform, subprocess, sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
X86 = platform.machine().lower() in ('x86_64', 'amd64')
SETTING = {'OMP_NUM_THREADS': '1', 'MKL_NUM_THREADS': '1', 'OPENBLAS_NUM_THREADS': '1',
           **({'ATEN_CPU_CAPABILITY': 'avx2', 'NPY_DISABLE_CPU_FEATURES': 'AVX512F AVX512CD AVX512_SKX'} if X86 else {})}
# What is not run here a second time, since it takes long. It could not differ: it measures seconds that nothing is compared with, or counts in Python's own integers.
# Or it would say what others say: commands and processes, which compute what the pages before them compute, and experiments that repeat a training of their page in many variants.
PAGES = '03_bpe', '15_distributed', 'F_commands'
CELLS = {'11_loss': ['3c277bef'], '12_train': ['cb25958f', '641cccc0', 'cfa06846'], '13_schedule': ['9640c9a7', 'fef5a7f9', '4968b8e9', 'a9b03fd9', 'bbd2f8ad', 'd110de0b', '646fb0bf']}


def left_out():
    "The names of these cells, as nbval numbers them."
    for page, names in CELLS.items():
        cells = [cell['id'] for cell in json.loads((ROOT/'nbs'/f'{page}.ipynb').read_text(encoding='utf-8'))['cells'] if cell['cell_type'] == 'code']
        yield from (f'nbs/{page}.ipynb::Cell {cells.index(name)}' for name in names)


def test_outputs_are_the_same():
    pages = sorted(f'nbs/{path.name}' for path in (ROOT/'nbs').glob('*.ipynb') if path.stem not in PAGES)
    done = subprocess.run([sys.executable, '-m', 'pytest', *pages, '-q', '-p', 'no:xdist', '-p', 'no:cacheprovider', '-o', 'addopts=--nbval --nbval-current-env --nbval-cell-timeout=300',
                           *(f'--deselect={name}' for name in left_out())], cwd=ROOT, env={**os.environ, **SETTING}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-5000:]
    assert 'cells of every page' in done.stdout and f'{len([*left_out()])} deselected' in done.stdout

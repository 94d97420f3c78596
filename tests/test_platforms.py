"The stored outputs are those of one thread and of several, with and without AVX-512: the pages run once as the machine has it, and once here, on one thread and without it."
import os, platform, subprocess, sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
X86 = platform.machine().lower() in ('x86_64', 'amd64')
SETTING = {'OMP_NUM_THREADS': '1', 'MKL_NUM_THREADS': '1', 'OPENBLAS_NUM_THREADS': '1',
           **({'ATEN_CPU_CAPABILITY': 'avx2', 'NPY_DISABLE_CPU_FEATURES': 'AVX512F AVX512CD AVX512_SKX'} if X86 else {})}


def test_outputs_are_the_same():
    done = subprocess.run([sys.executable, '-m', 'pytest', 'nbs', '-q', '-p', 'no:xdist', '-p', 'no:cacheprovider', '-o', 'addopts=--nbval --nbval-current-env --nbval-cell-timeout=300'],
                          cwd=ROOT, env={**os.environ, **SETTING}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-5000:]
    assert 'cells of every page' in done.stdout

"The wheel holds what the package needs, installs into an empty environment, and importing it costs nothing."
import hashlib, subprocess, sys, venv, zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ASSETS = {      # sha256 of what the package ships
    'the-verdict.txt': '2ec50966e77f225e67eb0a1f4c52413f9759cdb6b24314a6ae3497f4b58f163a',
    'shakespeare.txt': 'e2adf3ca88a1414fd24d263950ea78369db34b51e32209741f8252bc8ad2dc3d',
    'gpt2-merges.bpe': '1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5',
}


def run(python, code): return subprocess.run([python, '-c', code], capture_output=True, text=True, cwd=Path(python).parent)


def test_wheel_holds_the_package_and_nothing_else(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    modules = {p.relative_to(ROOT).as_posix() for p in (ROOT/'llmbook').glob('*.py')}
    assert modules <= set(names) and {f'llmbook/assets/{a}' for a in ASSETS} <= set(names)
    assert {n.split('/')[0] for n in names} == {'llmbook', next(n for n in names if '.dist-info' in n).split('/')[0]}
    assert any(n.endswith('LICENSE') for n in names)


def test_wheel_installs_into_an_empty_environment(wheel, tmp_path):
    venv.create(tmp_path, with_pip=True)
    python = next(p for p in (tmp_path/'bin'/'python', tmp_path/'Scripts'/'python.exe') if p.exists())
    subprocess.run([python, '-m', 'pip', 'install', '--quiet', '--no-deps', wheel], check=True)
    done = run(python, 'from llmbook.core import load_text; print(len(load_text("the-verdict")), len(load_text("shakespeare")))')
    assert done.stdout.split() == ['20479', '1134748'], done.stderr


@pytest.mark.parametrize('name', ASSETS)
def test_assets_are_byte_for_byte(name):
    assert hashlib.sha256((ROOT/'llmbook'/'assets'/name).read_bytes()).hexdigest() == ASSETS[name]


def test_importing_the_package_imports_no_heavy_library():
    heavy = '{"torch", "numpy", "matplotlib", "tiktoken", "regex", "IPython", "fastcore", "nbdev"}'
    done = run(sys.executable, f'import llmbook, llmbook.core, sys; print(sorted({heavy} & set(sys.modules)))')
    assert done.stdout.strip() == '[]', done.stdout + done.stderr

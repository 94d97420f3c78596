"""Run pages and store their outputs: `python -m tools.pages [name …]`, all pages without a name.

Exports the modules and the checkers, runs each notebook in this environment, cleans it, and lists its code cells in
`tests/ledger.json`. A page that fails is left as it was.
"""
import argparse, json, os, re, subprocess, sys, tempfile, time
from pathlib import Path

import nbformat
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError
from tools import exercises

ROOT = Path(__file__).resolve().parent.parent
LEDGER = ROOT/'tests'/'ledger.json'


def tidy(outputs: list) -> list:
    "Outputs with the pieces of one stream joined, and errors without the paths of this machine."
    kept = []
    for out in outputs:
        if out.output_type == 'error' and out.traceback != [out.evalue]: out.traceback = [f'{out.ename}: {out.evalue}']
        if kept and out.output_type == 'stream' == kept[-1].output_type and out.name == kept[-1].name: kept[-1].text += out.text
        else: kept.append(out)
    return kept


def run(page: Path) -> list[str]:
    "Run the notebook `page` in place; returns the ids of its code cells."
    nb = nbformat.read(page, as_version=4)
    for cell in nb.cells:
        tags = cell.metadata.get('tags', [])
        if re.search(r'^#\s*\|\s*eval:\s*false', cell.source, re.M) and 'skip-execution' not in tags:
            cell.metadata['tags'] = [*tags, 'skip-execution']      # what nbclient and Jupyter understand
    manager = AsyncKernelManager()
    manager.kernel_spec.argv = [sys.executable, '-m', 'ipykernel_launcher', '-f', '{connection_file}', '--log-level=ERROR']
    client = NotebookClient(nb, km=manager, timeout=600, resources={'metadata': {'path': page.parent}})
    with tempfile.TemporaryDirectory(prefix='llmbook-') as home:     # the cells stay out of the reader's own history
        client.execute(env={**os.environ, 'MPLBACKEND': 'agg', 'TQDM_DISABLE': '1', 'PYTHONPATH': str(ROOT), 'IPYTHONDIR': home, 'LLMBOOK_PROGRESS': os.path.join(home, 'passed.json')})
    for cell in nb.cells:
        if cell.cell_type == 'code': cell.outputs = tidy(cell.outputs)
    nbformat.write(nb, page)
    return [c.id for c in nb.cells if c.cell_type == 'code']


def main():
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('pages', nargs='*', help='names such as 03_bpe (default: every page)')
    names = [n.removesuffix('.ipynb') for n in parser.parse_args().pages] or [p.stem for p in sorted((ROOT/'nbs').glob('*.ipynb'))]
    missing = [n for n in names if not (ROOT/'nbs'/f'{n}.ipynb').exists()]
    if missing: parser.error(f'no such page: {", ".join(missing)}; there are {[p.stem for p in sorted((ROOT/"nbs").glob("*.ipynb"))]}')
    nbdev = lambda command: subprocess.run([sys.executable, '-c', f'from nbdev.cli import {command}; {command}()'], cwd=ROOT, check=True)
    exercises.main()
    nbdev('nbdev_export')      # after the checkers, because it makes an index of all modules
    ledger, failed = json.loads(LEDGER.read_text(encoding='utf-8')) if LEDGER.exists() else {}, []
    for name in names:
        start = time.perf_counter()
        try: ledger[name] = run(ROOT/'nbs'/f'{name}.ipynb')
        except (CellExecutionError, CellTimeoutError, DeadKernelError) as e: failed.append(name); print(f'{name}: failed\n{e}', file=sys.stderr)
        else: print(f'{name}: {len(ledger[name])} code cells in {time.perf_counter() - start:.1f} s')
    pages = {p.stem for p in (ROOT/'nbs').glob('*.ipynb')}
    LEDGER.write_text(json.dumps({k: v for k, v in sorted(ledger.items()) if k in pages}, indent=1) + '\n', encoding='utf-8', newline='\n')
    nbdev('nbdev_clean')
    sys.exit(bool(failed))


if __name__ == '__main__': main()

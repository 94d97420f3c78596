"""Write the student edition to `_build/student/`: `python -m tools.student`.

Each page with its exercises as starters: solutions, checkers and outputs are taken out, the checks stay. A notebook in
which somebody has worked is never overwritten.
"""
import hashlib, json, sys
from pathlib import Path

import nbformat
from tools.exercises import ROOT, blocks, without_solution

sys.path.insert(0, str(ROOT/'_ext'))
from nbdev_reader import split_directives      # noqa: E402


def student(page: Path):
    "The notebook `page` as a student gets it."
    nb = nbformat.read(page, as_version=4)
    found = {cell.id: role for block in blocks(nb) for role, cell in block.cells}
    cells = []
    for cell in nb.cells:
        role = found.get(cell.id)
        if role == 'checker': continue
        if role in ('solution', 'more', 'answer'): cell.source = without_solution(cell.source, cell.cell_type == 'markdown')
        if cell.cell_type == 'code':
            cell.source, cell.outputs, cell.execution_count = split_directives(cell.source)[1], [], None
            if not cell.source: continue
        cell.metadata = {k: v for k, v in cell.metadata.items() if k == 'tags'}
        cells.append(cell)
    nb.cells = cells
    nb.metadata['llmbook'] = {'made': mark_of(nb)}
    return nb


def pages() -> list[Path]:
    "The pages that have exercises."
    return [page for page in sorted((ROOT/'nbs').glob('*.ipynb')) if blocks(nbformat.read(page, as_version=4))]


def mark_of(nb) -> str:
    "A digest of what stands in the cells."
    return hashlib.sha256(json.dumps([c.source for c in nb.cells]).encode()).hexdigest()


def write(folder: Path) -> list[str]:
    "Write the student edition into `folder`; returns what was kept because somebody has worked in it."
    folder.mkdir(parents=True, exist_ok=True)
    kept = []
    for page in pages():
        new, path = student(page), folder/page.name
        if path.exists():
            try:
                old = nbformat.read(path, as_version=4)
                touched = mark_of(old) != old.metadata.get('llmbook', {}).get('made')
            except Exception: touched = True       # not a notebook any more: not ours to replace
            if touched:
                kept.append(page.name)
                continue
        nbformat.write(new, path)
    return kept


def main():
    folder = ROOT/'_build'/'student'
    kept = write(folder)
    print(f'The student edition is in {folder.relative_to(ROOT)}/; `make lab DIR={folder.relative_to(ROOT)}` opens it.')
    if kept: print(f'Kept, because there is work in it: {", ".join(kept)}. Delete or rename a file to get it anew.')


if __name__ == '__main__': main()

"""Write the student edition to `_build/student/`: `python -m tools.student`.

Each page with its exercises as starters: solutions, checkers and outputs are taken out, the checks stay. A notebook in
which somebody has worked is never overwritten.
"""
import hashlib, json, os, re, sys
from pathlib import Path

import nbformat
from tools.exercises import ROOT, blocks, number_of, without_solution

sys.path.insert(0, str(ROOT/'_ext'))
from nbdev_reader import split_directives      # noqa: E402


OFFER = 'student edition of this page'      # a link on the page of the book, and needless here
INTRO = """This is the student edition: the solutions are missing, and each exercise says when it is solved. It needs the package of the book:

    pip install {package}"""


def title(page: Path) -> str:
    "The first heading of a page, which is a notebook or plain Markdown."
    text = nbformat.read(page, as_version=4).cells[0].source if page.exists() else page.with_suffix('.md').read_text(encoding='utf-8')
    return text.splitlines()[0].removeprefix('# ')


def plain(text: str, page: Path, places: dict[str, str]) -> str:
    "Markdown as plain Jupyter shows it: the roles of the book replaced by words."
    def role(m):
        name, target = m[1], re.sub(r'^.*<(.*)>$', r'\1', m[2])
        if name == 'doc': return f"*{title(page.parent/f'{target}.ipynb')}*"
        if name == 'cite': return '(' + ', '.join(re.sub(r'^([a-z]+)(\d{4}).*', lambda k: f'{k[1].title()} {k[2]}', key) for key in target.split(',')) + ')'
        if name in ('numref', 'eq'): return places.get(target, 'the figure')
        return target
    text = re.sub(r'```\{explore\}.*?```', '(The rendered page has a picture to play with here.)', text, flags=re.S)
    text = re.sub(r'\{(\w+)\}`([^`]+)`', role, text)
    text = re.sub(r'^\$\$ \((\S+)\)$', lambda m: f'\\tag{{{places[m[1]][1:-1]}}}\n$$', text, flags=re.M)
    return re.sub(rf'[^.\n]*{OFFER}[^.]*\.[ ]?', '', text)


def student(page: Path):
    "The notebook `page` as a student gets it."
    nb = nbformat.read(page, as_version=4)
    found = {cell.id: role for block in blocks(nb) for role, cell in block.cells}
    source, number = '\n'.join(cell.source for cell in nb.cells), number_of(page)
    places = {label: f'Fig. {number}.{k}' for k, label in enumerate(re.findall(r'^#\| label: (fig-\S+)', source, re.M), 1)}
    places |= {label: f'({number}.{k})' for k, label in enumerate(re.findall(r'^\$\$ \((\S+)\)$', source, re.M), 1)}
    cells = []
    for cell in nb.cells:
        role, before = found.get(cell.id), found.get(cells[-1].id) if cells else None
        if role == 'checker' or role == before == 'more': continue      # one empty cell to try things in is enough
        if role in ('solution', 'more', 'answer'): cell.source = without_solution(cell.source, cell.cell_type == 'markdown')
        if cell.cell_type == 'code':
            directives, cell.source = split_directives(cell.source)
            if directives.get('label') in places and not role: cell.source = f"# {places[directives['label']]}: {directives['fig-cap']}\n{cell.source}"
            cell.outputs, cell.execution_count = [], None
        else: cell.source = plain(cell.source, page, places)
        if not cell.source.strip(): continue
        cell.metadata = {k: v for k, v in cell.metadata.items() if k == 'tags'}
        cells.append(cell)
    package = re.search(r'%pip install -q (.*)', source)[1]
    cells.insert(1, nbformat.v4.new_markdown_cell(INTRO.format(package=package), id='student'))
    nb.cells = cells
    nb.metadata['llmbook'] = {'made': mark_of(nb)}
    return nb


def pages(newer_than: Path | None = None) -> list[Path]:
    "The pages that have exercises; with a folder, those that have changed since they were written there."
    changed = lambda page: newer_than is None or not (newer_than/page.name).exists() or page.stat().st_mtime > (newer_than/page.name).stat().st_mtime
    return [page for page in sorted((ROOT/'nbs').glob('*.ipynb')) if changed(page) and blocks(nbformat.read(page, as_version=4))]


def mark_of(nb) -> str:
    "A digest of what stands in the cells."
    return hashlib.sha256(json.dumps([c.source for c in nb.cells]).encode()).hexdigest()


def write(folder: Path, only_changed: bool = False) -> list[str]:
    "Write the student edition into `folder`; returns what was kept because somebody has worked in it."
    folder.mkdir(parents=True, exist_ok=True)
    kept = []
    for page in pages(folder if only_changed else None):
        new, path = student(page), folder/page.name
        if path.exists():
            try:
                old = nbformat.read(path, as_version=4)
                touched = mark_of(old) != old.metadata.get('llmbook', {}).get('made')
            except Exception: touched = True       # not a notebook any more: not ours to replace
            if touched:
                kept.append(page.name)
                continue
        nbformat.write(new, whole := path.with_suffix('.whole'))
        os.replace(whole, path)      # never half a notebook
    return kept


def main():
    folder = ROOT/'_build'/'student'
    kept = write(folder)
    print(f'The student edition is in {folder.relative_to(ROOT)}/; `make lab DIR={folder.relative_to(ROOT)}` opens it.')
    if kept: print(f'Kept, because there is work in it: {", ".join(kept)}. Delete or rename a file to get it anew.')


if __name__ == '__main__': main()

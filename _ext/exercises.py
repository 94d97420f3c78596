"""Set the exercises of a page, and collect their solutions on the page that is made for them."""
import sys
from pathlib import Path

import nbformat
from nbformat.v4 import new_markdown_cell

sys.path.insert(0, str(Path(__file__).parent.parent))
from tools import student      # noqa: E402
from tools.exercises import HEAD, blocks, number_of, without_markers, without_solution      # noqa: E402

SOLUTIONS = 'C_solutions'
CHECKER = 'fold: Show the checker'


def statement(block) -> str: return HEAD.sub('', block.one('statement').source, count=1).strip()


def solution(block) -> list:
    "The cells of a solution: the code, what it shows, and what there is to say."
    cells = []
    for role, cell in block.cells:
        if role not in ('solution', 'more', 'answer'): continue
        cell.source = without_markers(cell.source)
        cells.append(cell)
    return cells


def set_exercises(nb, page: str) -> None:
    "Put each exercise into Sphinx's directives, in place: statement and starter first, then the folded solution."
    found = blocks(nb)
    for block in found:
        first, check, checker = block.one('statement'), block.one('check'), block.one('checker')
        starter = nbformat.from_dict(block.one('solution'))
        starter.id += '-starter'
        starter.source = f'{without_solution(starter.source)}\n\n{check.source}'
        first.source = f'```{{exercise-start}} {block.title}\n:label: {block.label}\n```\n{statement(block)}'
        checker.metadata['tags'] = [*checker.metadata.get('tags', []), CHECKER]
        between = new_markdown_cell(f'```{{exercise-end}}\n```\n\n```{{solution-start}} {block.label}\n:class: dropdown\n```')
        cells = [first, starter, between, *solution(block), checker, new_markdown_cell('```{solution-end}\n```')]
        at = nb.cells.index(first)
        ours = {id(cell) for _, cell in block.cells}
        nb.cells = nb.cells[:at] + cells + [c for c in nb.cells[at:] if id(c) not in ours]
    offers = [c for c in nb.cells if c.cell_type == 'markdown' and student.OFFER in c.source]
    if found and not offers: raise ValueError(f'{page}: has exercises, and no "{student.OFFER}" in its text to become a link')
    for cell in offers: cell.source = cell.source.replace(student.OFFER, f'<a href="../student/{page}.ipynb" download>{student.OFFER}</a>')


def collect(nb, pages: list[Path]) -> None:
    "Append every exercise with its solution, in order, in place."
    for page in pages:
        source = nbformat.read(page, as_version=4)
        found = blocks(source)
        if not found: continue
        nb.cells.append(new_markdown_cell(f'## {number_of(page)} {source.cells[0].source.splitlines()[0].removeprefix("# ")}'))
        for block in found:
            nb.cells.append(new_markdown_cell(f'### {block.number} · {block.title}\n\n{statement(block)}\n\n**Solution** of {{ref}}`{block.label}`'))
            for cell in solution(block):
                cell.source = '\n'.join(line for line in cell.source.splitlines() if not line.startswith('#| label:'))
                nb.cells.append(cell)


def read(app, docname, source):
    path = Path(app.env.doc2path(docname))
    if path.suffix != '.ipynb': return
    nb = nbformat.reads(source[0], as_version=4)
    if path.stem == SOLUTIONS: collect(nb, [p for p in sorted(path.parent.glob('*.ipynb')) if p.stem != SOLUTIONS])
    else: set_exercises(nb, path.stem)
    source[0] = nbformat.writes(nb)


def students(app, error):
    if not error and app.builder.format == 'html': student.write(Path(app.outdir)/'student', only_changed=True)


def setup(app):
    app.connect('source-read', read)
    app.connect('build-finished', students)
    return dict(version='1', parallel_read_safe=True, parallel_write_safe=True)

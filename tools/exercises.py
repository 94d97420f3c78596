"""Find the exercises of the pages, and write what follows from them: `python -m tools.exercises`.

An exercise begins with a Markdown cell `### Exercise 3.2 · Title` and ends before the next heading of its level or
higher. Its cells are told apart by what they hold:

- a code cell with `### BEGIN SOLUTION` and `### END SOLUTION`: the starter with its solution;
- a code cell that begins with `check("3.2"`: the check;
- more cells with these markers (in Markdown as `<!-- ### BEGIN SOLUTION -->`): what the solution shows and says;
- a code cell `#| checker`: the claims and the wrong answers, exported to `llmbook/exercises/`.

From these follow the modules in `llmbook/exercises/` and the metadata by which nbgrader knows the cells.
"""
import re
from dataclasses import dataclass, field
from pathlib import Path

import nbformat
from nbdev.maker import ModuleMaker
from nbdev.process import NBProcessor

ROOT = Path(__file__).resolve().parent.parent
HEAD = re.compile(r'### Exercise (?P<number>\w+\.\d+) · (?P<title>.+)')
ROLES = 'statement', 'solution', 'check', 'more', 'answer', 'checker'
POINTS = {'check': 1, 'answer': 0}      # nbgrader: the check is worth a point, the answer in words is for the teacher to read


@dataclass
class Block:
    "The cells of one exercise, by role."
    number: str
    title: str
    cells: list = field(default_factory=list)      # (role, cell)

    @property
    def label(self): return f'ex-{self.number.replace(".", "-")}'
    def having(self, role): return [cell for r, cell in self.cells if r == role]
    def one(self, role):
        found = self.having(role)
        if len(found) != 1: raise ValueError(f'exercise {self.number} has {len(found)} cells for its {role}, not one')
        return found[0]


def role_of(cell) -> str | None:
    "What a cell after the statement is for; None: nothing of an exercise."
    if cell.cell_type == 'markdown': return 'answer' if 'BEGIN SOLUTION' in cell.source else None
    if re.match(r'#\|\s*checker\b', cell.source): return 'checker'
    if cell.source.startswith('check("'): return 'check'
    return 'solution' if 'BEGIN SOLUTION' in cell.source else None


def blocks(nb) -> list[Block]:
    "The exercises of a notebook, in order."
    found, block = [], None
    for cell in nb.cells:
        if cell.cell_type == 'markdown' and (m := HEAD.match(cell.source)):
            block = Block(m['number'], m['title'].strip(), [('statement', cell)])
            found.append(block)
        elif cell.cell_type == 'markdown' and re.match(r'#{1,3} ', cell.source): block = None
        elif block:
            role = role_of(cell)
            if not role: raise ValueError(f'exercise {block.number}: the cell {cell.source[:60]!r} is no part of an exercise; does it lack the markers of a solution?')
            if role == 'solution' and block.having('solution'): role = 'more'
            block.cells.append((role, cell))
    for block in found:
        for role in ('solution', 'check', 'checker'): block.one(role)
        if f'check("{block.number}"' not in block.one('check').source: raise ValueError(f'exercise {block.number} checks another one')
    return found


def number_of(page: Path) -> str:
    "The number of a page, from the name of its file."
    return page.stem.partition('_')[0].lstrip('0') or '0'


def without_markers(source: str) -> str:
    "A solution as the book shows it."
    return '\n'.join(line for line in source.splitlines() if not re.search(r'### (BEGIN|END) SOLUTION', line))


def without_solution(source: str, markdown: bool = False) -> str:
    "A starter: what stands between the markers replaced as nbgrader does it. What is no function waits without a complaint."
    lines, inside = [], False
    if re.findall(r'(\S*) (BEGIN|END) SOLUTION', source) != [('###', 'BEGIN'), ('###', 'END')] * source.count('BEGIN SOLUTION'):
        raise ValueError(f'the markers do not pair up as `### BEGIN SOLUTION` and `### END SOLUTION` in\n{source}')
    for line in source.splitlines():
        if '### BEGIN SOLUTION' in line:
            indent, inside = re.match(r'\s*', line)[0], True
            if markdown: lines.append('YOUR ANSWER HERE')
            elif indent: lines += [f'{indent}# YOUR CODE HERE', f'{indent}raise NotImplementedError()']
            else: lines.append('# YOUR CODE HERE: what the exercise asks you to try')
        elif '### END SOLUTION' in line: inside = False
        elif not inside: lines.append(line)
    return '\n'.join(lines)


def mark(nb) -> None:
    "Give the cells of the exercises the metadata by which nbgrader knows them, in place."
    for cell in nb.cells: cell.metadata.pop('nbgrader', None)
    for block in blocks(nb):
        seen = {}
        for role, cell in block.cells:
            seen[role] = seen.get(role, 0) + 1
            solution = role in ('solution', 'more', 'answer')
            cell.metadata['nbgrader'] = {
                'schema_version': 3, 'grade_id': f'{block.label}-{role}' + (f'-{seen[role]}' if seen[role] > 1 else ''),
                'grade': role in POINTS, 'solution': solution, 'locked': not solution, 'task': False,
                **({'points': POINTS[role]} if role in POINTS else {})}


def export(page: Path, package: Path) -> None:
    "Write the checkers of a page to a module of `package`, if it has any; a page without a module of its own lends its name."
    cells, name = [], page.stem.partition('_')[2]
    def find(cell):
        nonlocal name
        if 'default_exp' in cell.directives_: name = cell.directives_['default_exp'][0]
        if 'checker' in cell.directives_: cells.append(cell)
    NBProcessor(page, find).process()
    if not cells: return
    (package/'exercises').mkdir(exist_ok=True)
    init = package/'exercises'/'__init__.py'
    if not init.exists(): init.touch()
    ModuleMaker(dest=package, name=f'exercises.{name}', nb_path=page, is_new=True).make(cells, lib_path=package)


def main(nbs: Path = ROOT/'nbs', package: Path = ROOT/'llmbook'):
    for page in sorted(nbs.glob('*.ipynb')):
        nb = nbformat.read(page, as_version=4)
        before = nbformat.writes(nb)
        mark(nb)
        if nbformat.writes(nb) != before: nbformat.write(nb, page)
        export(page, package)


if __name__ == '__main__': main()

"""Say on a page what made the book: versions, the machine, and how each page was proved (`conftest.py` notes it)."""
import json, platform
from collections import Counter
from importlib.metadata import version
from pathlib import Path

import nbformat
from docutils import nodes
from docutils.parsers.rst import Directive

ROOT = Path(__file__).resolve().parent.parent
NOTES = ROOT/'_build'/'provenance.json'
PACKAGES = ('torch', 'numpy', 'safetensors', 'tiktoken', 'transformers', 'nbdev', 'jupyter-book', 'nbval')
BUCKETS = ('exact', 'within tolerance', 'uncompared', 'silent', 'not run')


def table(head: list[str], rows: list[list[str]]) -> nodes.table:
    "A table whose first column is words and whose others are numbers."
    group = nodes.tgroup(cols=len(head))
    for wide in [3, *[2] * (len(head) - 1)]: group += nodes.colspec(colwidth=wide)
    for kind, lines in ((nodes.thead, [head]), (nodes.tbody, rows)):
        part = kind()
        for line in lines:
            row = nodes.row()
            for cell in line: row += nodes.entry('', nodes.paragraph('', cell))
            part += row
        group += part
    return nodes.table('', group, classes=['llm-provenance'])


def sizes(pages: list[Path]) -> list[list[str]]:
    "How much there is of everything."
    from llmbook.checking import all_exercises
    cells = Counter(cell.cell_type for page in pages for cell in nbformat.read(page, as_version=4).cells)
    modules = [path.read_text(encoding='utf-8').splitlines() for path in (ROOT/'llmbook').glob('[a-z]*.py')]
    found = all_exercises()
    return [['notebooks', f'{len(pages)}'], ['cells of text', f"{cells['markdown']:,}"], ['cells of code', f"{cells['code']:,}"],
            ['lines of the package', f'{sum(map(len, modules)):,} in {len(modules)} modules'],
            ['exercises', f'{len(found)}, with {sum(len(e.wrong_answers) for e in found)} wrong answers that are refused']]


def proofs(notes: dict) -> list[list[str]]:
    "How the cells of each page were compared, and how long that took."
    rows = [[page, *(f'{found.get(bucket, 0)}' for bucket in BUCKETS), f"{found['seconds']:.0f}"] for page, found in sorted(notes['pages'].items())]
    total = [sum(found.get(key, 0) for found in notes['pages'].values()) for key in (*BUCKETS, 'seconds')]
    return [*rows, ['all', *(f'{n:.0f}' for n in total)]]


class Provenance(Directive):
    def run(self):
        if NOTES.exists(): self.state.document.settings.env.note_dependency(str(NOTES))      # what is missing would count as changed, in every build
        say = lambda text: nodes.paragraph('', text)
        out = [table(['what', 'version'], [['Python', platform.python_version()], *([name, version(name)] for name in PACKAGES)]),
               table(['what', 'how much'], sizes(sorted((ROOT/'nbs').glob('*.ipynb'))))]
        if not NOTES.exists(): return [*out, say('The proofs have not run where this copy was built, so their table is missing; make test runs them.')]
        notes = json.loads(NOTES.read_text(encoding='utf-8'))
        return [*out, say(f"The proofs ran on {notes['machine']}, in {notes['seconds'] / 60:.0f} minutes: {notes['passed']:,} passed, {notes['failed']:,} failed."),
                table(['page', *BUCKETS, 'seconds'], proofs(notes)),
                say('“Exact” counts cells whose output was the same to the letter, “within tolerance” those that needed it, “silent” those that print nothing. “Not run” must be 0 for all pages but those that say why.')]


def setup(app):
    app.add_directive('provenance', Provenance)
    return dict(version='1', parallel_read_safe=True, parallel_write_safe=True)

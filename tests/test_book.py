"What makes the book: the reader of notebooks, and the checks that follow the build, proved able to fail."
import subprocess, sys
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook
from tools import book

sys.path.insert(0, str(Path(__file__).parent.parent/'_ext'))
import provenance      # noqa: E402
from nbdev_reader import read_notebook, split_directives      # noqa: E402


def read(*cells): return read_notebook(nbformat.writes(new_notebook(cells=list(cells)))).cells


def test_directives_become_tags_and_never_show():
    cell, = read(new_code_cell('#| export\n#| label: fig-x\n#| fig-cap: "A: b"\n#| fig-alt: what to see\n\nx = 1  # | not one\n'))
    assert cell.source == 'x = 1  # | not one'
    assert cell.metadata.mystnb == {'figure': {'caption': 'A: b', 'name': 'fig-x'}, 'image': {'alt': 'what to see'}}
    assert 'remove-cell' in read(new_code_cell('#| hide\nx = 1'))[0].metadata.tags
    assert 'remove-cell' in read(new_code_cell('#| default_exp core'))[0].metadata.tags
    assert 'skip-execution' in read(new_code_cell('#| eval: false\nx'))[0].metadata.tags
    folded, = read(new_code_cell('x = 1', metadata={'tags': ['fold: Show the drawing code']}))
    assert 'hide-input' in folded.metadata.tags and folded.metadata.mystnb['code_prompt_show'] == 'Show the drawing code'
    wider, = read(new_code_cell('x', metadata={'tags': ['rtol=0.005: dropout differs by platform']}))
    assert 'within 0.5 % of each value: dropout' in wider.outputs[-1].data['text/html']
    drawn, = read(new_code_cell('#| label: fig-x\n#| fig-cap: A time.\nx', metadata={'tags': ['uncompared: it draws a measured time']}))
    assert not drawn.outputs and drawn.metadata.mystnb['figure'] == {'caption': 'A time. (Not compared: it draws a measured time.)', 'name': 'fig-x'}
    assert read(new_markdown_cell('#| a heading'))[0].source == '#| a heading'
    assert split_directives('x = 1\n#| export') == ({}, 'x = 1\n#| export')


def test_a_misspelt_directive_stops_the_build():
    with pytest.raises(ValueError, match="unknown directive.*exprot"): read(new_code_cell('#| exprot\nx = 1'))


GOOD = '<html><body><p id="here">text</p><img src="a.png" alt="a"><a href="#here">x</a><a href="b.html#there">y</a></body></html>'
FAULTS = {
    'dead link': ('<a href="c.html">x</a>', 'dead link c.html'),
    'dead place': ('<a href="b.html#nowhere">x</a>', 'no such place on the page: b.html#nowhere'),
    'dead place here': ('<a href="#nowhere">x</a>', 'no such place on the page: #nowhere'),
    'script from outside': ('<script src="https://example.org/x.js"></script>', 'loads https://example.org/x.js from outside'),
    'picture from outside': ('<img src="//example.org/x.png" alt="x">', 'from outside'),
    'picture set from outside': ('<img src="a.png" srcset="a.png 1x, https://example.org/x.png 2x" alt="x">', 'from outside'),
    'style from outside': ('<p style="background: url(https://example.org/x.png)">x</p>', 'from outside'),
    'sheet from outside': ('<style>@import "https://example.org/x.css";</style>', 'from outside'),
    'object from outside': ('<object data="https://example.org/x.svg"></object>', 'from outside'),
    'missing picture': ('<img src="c.png" alt="x">', 'dead link c.png'),
    'picture without alt': ('<img src="a.png">', 'picture without alt text'),
    'drawing without label': ('<svg class="llm-picture"></svg>', 'drawing without a description'),
    'directive': ('<pre>\n#| export\nx = 1</pre>', 'a directive of nbdev shows'),
}


@pytest.fixture
def small_book(tmp_path, monkeypatch):
    monkeypatch.setattr(book, 'ROOT', tmp_path)
    (tmp_path/'_toc.yml').write_text('root: a\nparts:\n- chapters:\n  - file: b\n    sections:\n    - file: b\n')
    for name, text in {'a.html': GOOD, 'b.html': '<p id="there">', 'a.png': '', 'x.css': 'a {background: url(a.png)}'}.items(): (tmp_path/name).write_text(text)
    return tmp_path


def test_a_whole_book_has_no_fault(small_book): assert book.check(small_book) == []


@pytest.mark.parametrize('fault', FAULTS)
def test_each_fault_is_found(small_book, fault):
    extra, message = FAULTS[fault]
    (small_book/'a.html').write_text(GOOD.replace('</body>', extra + '</body>'))
    faults = book.check(small_book)
    assert len(faults) == 1 and message in faults[0], faults


def test_a_missing_page_and_a_stylesheet_from_outside(small_book):
    (small_book/'x.css').write_text('a {background: url("https://example.org/x.png")}')
    (small_book/'_toc.yml').write_text('root: a\nparts:\n- chapters:\n  - file: b\n  - file: c\n')
    assert [f.split(':')[0] for f in book.check(small_book)] == ['c', 'x.css']


def test_the_record_of_the_proofs_adds_up():
    notes = {'pages': {'b': {'exact': 3, 'silent': 2, 'seconds': 4.4}, 'a': {'exact': 1, 'not run': 1, 'seconds': 1.2}}}
    assert provenance.proofs(notes) == [['a', '1', '0', '0', '0', '1', '1'], ['b', '3', '0', '0', '2', '0', '4'], ['all', '4', '0', '0', '2', '1', '6']]
    told = dict(provenance.sizes(sorted((provenance.ROOT/'nbs').glob('*.ipynb'))))
    assert int(told['notebooks']) == len(list((provenance.ROOT/'nbs').glob('*.ipynb'))) and int(told['cells of code'].replace(',', '')) > 1000


def test_pages_are_numbered_as_their_files_are_named(tmp_path):
    "A small book with a page 3 and an appendix A: figures are 3.1, A.1 and A.2."
    lines = {'index': '# Index', '03_three': '# Three\n\n```{figure} a.svg\n:name: one\nOne\n```', 'A_more': '# More\n\n```{figure} a.svg\n:name: two\nTwo\n```\n\n```{figure} a.svg\n:name: three\nThree\n```\n\n{numref}`one`, {numref}`three`'}
    for name, text in lines.items(): (tmp_path/f'{name}.md').write_text(text)
    (tmp_path/'a.svg').write_text('<svg xmlns="http://www.w3.org/2000/svg"/>')
    (tmp_path/'_toc.yml').write_text('format: jb-book\nroot: index\nparts:\n- caption: P\n  numbered: true\n  chapters:\n  - file: 03_three\n- caption: Q\n  chapters:\n  - file: A_more\n')
    (tmp_path/'_config.yml').write_text(f"title: t\nexecute: {{execute_notebooks: 'off'}}\nsphinx:\n  local_extensions: {{book: '{(Path(__file__).parent.parent/'_ext').as_posix()}'}}\n")
    done = subprocess.run([sys.executable, '-c', 'from jupyter_book.cli.main import main; main()', 'build', str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    page = (tmp_path/'_build'/'html'/'A_more.html').read_text(encoding='utf-8')
    assert 'Fig. A.1' in page and 'Fig. A.2' in page and 'Fig. 3.1' in page


def test_all_pages_are_built_or_only_what_has_changed(small_book, monkeypatch):
    said, kept = [], book.ROOT/'_build'/'html'/'old.html'
    monkeypatch.setattr(book.subprocess, 'run', lambda command, cwd: said.append(command) or subprocess.CompletedProcess(command, 0))
    monkeypatch.setattr(book, 'check', lambda folder: ['a fault'])
    def ends(*arguments):
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.write_text('')
        monkeypatch.setattr(sys, 'argv', ['book', *arguments])
        with pytest.raises(SystemExit) as end: book.main()
        return end.value.code
    assert ends() == '1 faults in the book:\na fault' and '--all' in said[0] and not kept.exists()      # nothing of a former build hides a dead link
    assert ends('--changed') == 0 and '--all' not in said[1] and kept.exists() and '-W' in said[1]
    assert ends('--some') == 'unknown: --some. Say nothing for the whole book, or --changed.' and len(said) == 2


def test_the_source_of_a_module_is_found_without_importing_it():
    code = 'import sys; sys.path.insert(0, "_ext"); import book; print(book.find_source("llmbook.bpe")[0]); sys.exit("torch" in sys.modules)'
    done = subprocess.run([sys.executable, '-c', code], cwd=Path(book.__file__).parent.parent, capture_output=True, text=True)
    assert done.returncode == 0 and Path(done.stdout.strip()).name == 'bpe.py', done.stderr

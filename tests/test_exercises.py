"Every exercise is proved: its solution passes, its wrong answers fail with their own hints, and no constant passes; and what is made of the exercises."
import copy, functools, importlib, itertools, json, os, re, shutil, subprocess, sys
from pathlib import Path

import nbformat
import pytest
from llmbook.checking import Exercise, all_exercises, check_file, find_exercise
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from tools import student
from tools.exercises import blocks, without_markers, without_solution

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT/'_ext'))
exercise_pages = importlib.import_module('exercises')       # the book's extension
from nbdev_reader import split_directives      # noqa: E402

PAGES = {page: nbformat.read(page, as_version=4) for page in sorted((ROOT/'nbs').glob('*.ipynb'))}
BLOCKS = {block.number: (page, block) for page, nb in PAGES.items() for block in blocks(nb)}
WITH = [page for page in PAGES if blocks(PAGES[page])]
by_number = pytest.mark.parametrize('number', BLOCKS)
by_page = pytest.mark.parametrize('page', WITH, ids=lambda p: p.stem)


def solve(number):
    "The solution of an exercise, run by itself in an empty namespace."
    names = {'__name__': 'answer'}
    exec(without_markers(BLOCKS[number][1].one('solution').source), names)
    return names[find_exercise(number).name]


# ---- the proofs

@by_number
def test_the_solution_passes(number, record_property):
    report = find_exercise(number).check(solve(number))
    assert report.passed, report
    record_property('exercises', 1)
    record_property('checkers', 1)


class Once(Exercise):
    "An exercise that works out once what its wrong answers do; only the answer that is checked, the first to be asked for, runs anew each time."
    def check(self, answer):
        self.mine = True
        return super().check(answer)

    def outcomes(self, answer):
        if self.mine:
            self.mine = False
            return super().outcomes(answer)
        self.kept = getattr(self, 'kept', {})
        if answer not in self.kept: self.kept[answer], = itertools.tee(super().outcomes(answer), 1)
        return copy.copy(self.kept[answer])


@functools.lru_cache(1)      # what is kept goes with the next exercise
def once(number): return Once(**vars(find_exercise(number)))


@pytest.mark.parametrize('number, name', [(e.number, name) for e in all_exercises() for name in e.wrong_answers])
def test_each_wrong_answer_fails_with_its_own_hint(number, name, record_property):
    task = once(number)
    wrong = task.wrong_answers[name]
    hint = ' '.join((wrong.__doc__ or '').split())
    assert len(hint.split()) >= 4, 'a wrong answer says in its docstring what is wrong'
    report = task.check(wrong)
    assert not report.passed, 'the checker accepts a wrong answer'
    assert (report.mistake, report.details['why']) == (name, hint), report
    record_property('wrong answers refused with their own hint', 1)


def constants(number):
    "All values that the solution gives while it is checked, and some that it does not."
    solution, given = solve(number), [None, 0, True, '', []]
    def recorder(*args, **kwargs):
        given.append(solution(*args, **kwargs))
        return given[-1]
    assert find_exercise(number).check(recorder).passed
    assert len(given) > 5
    return given


def passes(task, answer):
    "As `check` says; but the first claim that fails settles it, and nobody asks which mistake it is."
    return all(outcome.holds for outcome in task.outcomes(answer))


@by_number
def test_no_constant_passes(number, record_property):
    task, given = find_exercise(number), constants(number)
    assert passes(task, solve(number)) and not task.check(lambda *args: None).passed
    for value in given: assert not passes(task, lambda *args, value=value: value), f'always giving {value!r} passes'
    assert not passes(task, lambda *args: args[0] if args else None), 'giving back the argument passes'
    record_property('constant answers refused', len(given))


@by_number
def test_the_starter_waits(number):
    names = {'__name__': 'answer'}
    exec(without_solution(BLOCKS[number][1].one('solution').source), names)
    assert f'{number} waits for you' in str(find_exercise(number).check(names[find_exercise(number).name]))


@by_number
def test_the_exercise_is_whole(number):
    page, block = BLOCKS[number]
    task = find_exercise(number)
    assert task.title == block.title
    assert len(task.wrong_answers) >= 2 and len(list(task.claims())) >= 2
    assert f'`{task.name}' in block.one('statement').source, 'the statement names what to write'
    assert block.one('check').source == f'check("{number}", {task.name})'
    assert block.having('answer'), 'there is something to say about a solution'
    assert [role for role, _ in block.cells if role not in ('more', 'answer')] == ['statement', 'solution', 'check', 'checker']


def test_every_exercise_of_the_package_is_on_a_page(): assert [e.number for e in all_exercises()] == list(BLOCKS)


@by_page
def test_exercises_are_numbered_by_page(page):
    number = page.stem.split('_')[0].lstrip('0') or '0'
    found = [block.number for block in blocks(PAGES[page])]
    assert found == [f'{number}.{k + 1}' for k in range(len(found))] and 3 <= len(found) <= 5


CHOICE = re.compile(r'<details><summary>(.+)</summary>\n\n(Yes|No)\. (.+)\n</details>')


@by_page
def test_a_quiz_explains_every_choice(page):
    quiz, = (c.source for c in PAGES[page].cells if c.source.startswith('## Quiz'))
    _, *questions = re.split(r'^\*\*\d\. ', quiz, flags=re.M)
    assert 3 <= len(questions) <= 6 and quiz.count('<details>') == len(CHOICE.findall(quiz))
    for question in questions:
        verdicts = [verdict for _, verdict, _ in CHOICE.findall(question)]
        assert 2 <= len(verdicts) <= 4 and verdicts.count('Yes') == 1, question
        choices = [choice for choice, *_ in CHOICE.findall(question)]
        assert len(set(choices)) == len(choices) and not any('`' in choice or '$' in choice for choice in choices), question


def test_pages_that_teach_have_exercises():
    assert [p for p in PAGES if re.match(r'\d|A_', p.stem)] == WITH


def test_a_checker_that_accepts_too_much_is_found(monkeypatch):
    task = find_exercise('3.2')
    def check_bytes_per_token():
        yield "bytes_per_token(None, 'the')", 1.0
    for name in task.wrong_answers: assert not task.check(task.wrong_answers[name]).passed
    monkeypatch.setattr(task, 'claims', check_bytes_per_token)
    assert task.check(lambda tokenizer, text: 1.0).passed      # what test_no_constant_passes looks for


def test_two_mistakes_that_cannot_be_told_apart_are_found(monkeypatch):
    task = find_exercise('3.2')
    def same_again(tokenizer, text):
        "Another hint for the same mistake."
        return len(tokenizer.encode(text)) / len(text.encode())
    monkeypatch.setitem(task.wrong_answers, 'same_again', same_again)
    assert task.check(same_again).mistake == 'turned_over'


def test_a_solution_as_a_file(tmp_path):
    for number in ('0.2', '3.3'):
        path = tmp_path/f'{number}.py'
        path.write_text(without_markers(BLOCKS[number][1].one('solution').source), encoding='utf-8')
        assert check_file(number, path).passed


# ---- what is made of them

def test_modules_and_metadata_are_in_step(tmp_path):
    for folder in ('nbs', 'llmbook'): shutil.copytree(ROOT/folder, tmp_path/folder, ignore=shutil.ignore_patterns('__pycache__', '.ipynb_checkpoints'))
    shutil.copy(ROOT/'settings.ini', tmp_path)
    (tmp_path/'llmbook'/'exercises'/'words.py').unlink()
    done = subprocess.run([sys.executable, '-c', f'import sys; sys.path.append({str(ROOT)!r}); from pathlib import Path; from tools.exercises import main; main(Path("nbs"), Path("llmbook"))'],
                          cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for folder, pattern in (('nbs', '*.ipynb'), ('llmbook/exercises', '*.py')):
        now, new = ({p.name: p.read_bytes() for p in (base/folder).glob(pattern)} for base in (ROOT, tmp_path))
        assert now == new, 'run `make pages`: the checkers of the pages and llmbook/exercises differ'


def test_the_list_of_exercises_imports_no_heavy_library():
    code = 'import sys; from llmbook.checking import all_exercises; all_exercises(); print(sorted({"torch", "numpy", "regex", "IPython", "llmbook.bpe"} & set(sys.modules)))'
    assert subprocess.run([sys.executable, '-c', code], capture_output=True, text=True).stdout.strip() == '[]'


def test_an_exercise_that_lacks_a_part_is_refused():
    md, code = nbformat.v4.new_markdown_cell, nbformat.v4.new_code_cell
    whole = [md('### Exercise 9.1 · A title\n\nWrite `f`.'), code('def f():\n    ### BEGIN SOLUTION\n    return 1\n    ### END SOLUTION'), code('check("9.1", f)'), code('#| checker\n1')]
    assert len(blocks(nbformat.v4.new_notebook(cells=whole))) == 1
    for missing in (1, 2, 3):
        with pytest.raises(ValueError, match='has 0 cells for its'): blocks(nbformat.v4.new_notebook(cells=whole[:missing] + whole[missing + 1:]))
    for extra in (md('A hint'), code('f()')):
        with pytest.raises(ValueError, match='is no part of an exercise'): blocks(nbformat.v4.new_notebook(cells=[*whole, extra]))
    assert len(blocks(nbformat.v4.new_notebook(cells=[*whole, md('## Summary'), code('f()')]))[0].cells) == 4
    with pytest.raises(ValueError, match='checks another one'): blocks(nbformat.v4.new_notebook(cells=[*whole[:2], code('check("9.2", f)'), whole[3]]))


@pytest.mark.parametrize('source', ['### BEGIN SOLUTION\n1', '1\n### END SOLUTION', '## BEGIN SOLUTION\n1\n## END SOLUTION', '### END SOLUTION\n1\n### BEGIN SOLUTION',
                                    '### BEGIN SOLUTION\n1\n### BEGIN SOLUTION\n2\n### END SOLUTION', '### BEGIN SOLUTION\n1\n### EMD SOLUTION'])
def test_markers_that_do_not_pair_up_are_refused(source):
    with pytest.raises(ValueError, match='do not pair up'): without_solution(source)


def test_the_roles_of_the_book_become_words():
    page = ROOT/'nbs'/'03_bpe.ipynb'
    text = 'See {doc}`02_words`, {numref}`fig-x`, {numref}`the map <fig-y>`, {eq}`eq-r` and {cite}`aa2020b,b1999`.\n$$\nr\n$$ (eq-r)'
    assert student.plain(text, page, {'fig-x': 'Fig. 3.1', 'eq-r': '(3.1)'}) == 'See *Words and numbers*, Fig. 3.1, the figure, (3.1) and (Aa 2020, B 1999).\n$$\nr\n\\tag{3.1}\n$$'


def words_of_solutions(page):
    "Lines that only solutions and checkers hold."
    hidden, shown = [], []
    found = {cell.id: role for block in blocks(PAGES[page]) for role, cell in block.cells}
    for cell in PAGES[page].cells:
        role, inside = found.get(cell.id), False
        for line in map(str.strip, cell.source.splitlines()):
            if 'END SOLUTION' in line: inside = False
            if line and not line.startswith('#|') and 'SOLUTION' not in line: (hidden if inside or role == 'checker' else shown).append(line)
            if 'BEGIN SOLUTION' in line: inside = True
    return [line for line in hidden if len(line) > 12 and not any(line in other for other in shown)]


@by_page
def test_no_solution_survives_in_the_student_edition(page):
    text = '\n'.join(cell.source for cell in student.student(page).cells)
    secret = words_of_solutions(page)
    assert len(secret) > 30 and not [line for line in secret if line in text]
    assert not re.search(r'\{\w+\}`|^\$\$ \(', text, re.M) and student.OFFER not in text and 'pip install "fastcore<2" git+https' in text
    raw = json.dumps(student.student(page))
    assert 'SOLUTION' not in raw and 'nbgrader' not in raw and not re.search(r'"outputs": \[[^\]]', raw)
    for block in blocks(PAGES[page]):
        assert f'### Exercise {block.number} · {block.title}' in text and block.one('check').source in text
        assert without_solution(block.one('solution').source) in text


def run(nb, folder):
    "The error that stops a notebook, and the cell where it does; None if none."
    client = NotebookClient(nb, timeout=300, resources={'metadata': {'path': folder}})
    try: client.execute()
    except CellExecutionError as error: return error, next(c for c in nb.cells if c.cell_type == 'code' and any(o.output_type == 'error' and 'raises-exception' not in c.metadata.get('tags', []) for o in c.outputs))
    return None, None


@by_page
def test_the_student_edition_is_the_page_up_to_its_first_exercise(page):
    "Cell by cell the code that the page's own test runs, then the starter and its check."
    first = blocks(PAGES[page])[0]
    stop = first.one('check').source
    def code(nb):
        for cell in nb.cells:
            if cell.cell_type != 'code': continue
            source = re.sub(r'^# Fig\. .*\n', '', split_directives(cell.source)[1])
            if source.strip(): yield source
            if cell.source == stop: return
    whole, mine = [*code(PAGES[page])], [*code(student.student(page))]
    assert mine[-2:] == [without_solution(first.one('solution').source), stop]
    assert mine[:-2] == whole[:len(mine) - 2] and len(whole) - len(mine) <= 1      # a checker may stand before its exercise


def test_the_student_edition_stops_at_its_first_exercise(tmp_path):
    page = ROOT/'nbs'/'02_words.ipynb'
    error, cell = run(student.student(page), tmp_path)
    first = blocks(PAGES[page])[0]
    assert cell.source == first.one('check').source
    assert error.ename == 'NotYet' and f'{first.number} waits for you' in str(error)
    assert 'Traceback' not in str(error) and 'checking.py' not in str(error)


def test_the_student_edition_goes_on_as_it_is_solved(tmp_path):
    page = WITH[0]
    nb = student.student(page)
    for block in blocks(PAGES[page])[:2]:
        starter = without_solution(block.one('solution').source)
        next(c for c in nb.cells if c.source == starter).source = without_markers(block.one('solution').source)
    error, cell = run(nb, tmp_path)
    assert cell.source == blocks(PAGES[page])[2].one('check').source


def test_work_in_the_student_edition_is_kept(tmp_path, monkeypatch):
    assert student.write(tmp_path) == []
    assert sorted(p.name for p in tmp_path.iterdir()) == [p.name for p in WITH]
    mine, theirs, broken = (tmp_path/p.name for p in WITH[:3])
    work = nbformat.read(mine, as_version=4)
    work.cells[-1].source += 'mine'
    nbformat.write(work, mine)
    run_only = nbformat.read(theirs, as_version=4)
    run_only.cells[2].execution_count = 3
    nbformat.write(run_only, theirs)
    broken.write_text('{')
    assert not list(tmp_path.glob('*.whole'))
    assert student.write(tmp_path) == [mine.name, broken.name]
    assert nbformat.read(mine, as_version=4).cells[-1].source.endswith('mine') and broken.read_text() == '{'
    assert nbformat.read(theirs, as_version=4) == student.student(WITH[1])


@pytest.mark.skipif(not shutil.which('make'), reason='needs make')
def test_clean_keeps_the_student_edition(tmp_path):
    shutil.copy(ROOT/'Makefile', tmp_path)
    for folder in ('_build/student', '_build/html', 'build'): (tmp_path/folder).mkdir(parents=True)
    (tmp_path/'_build'/'student'/'mine.ipynb').write_text('work')
    assert subprocess.run(['make', 'clean', f'PYTHON={sys.executable}'], cwd=tmp_path).returncode == 0
    assert [p.relative_to(tmp_path).as_posix() for p in sorted(tmp_path.rglob('*'))] == ['Makefile', '_build', '_build/student', '_build/student/mine.ipynb']


# ---- nbgrader, as a teacher uses it

def nbgrader(*command, cwd):
    env = {**os.environ, 'PATH': os.pathsep.join([str(Path(sys.executable).parent), os.environ['PATH']])}     # it calls `alembic`
    done = subprocess.run([sys.executable, '-m', 'nbgrader', *command], cwd=cwd, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def test_nbgrader_takes_the_pages_as_they_are(tmp_path):
    (tmp_path/'nbgrader_config.py').write_text('c = get_config()\nc.CourseDirectory.course_id = "llm"\n')
    source = tmp_path/'source'/'ps'
    source.mkdir(parents=True)
    for page in WITH: shutil.copy(page, source)
    nbgrader('generate_assignment', 'ps', '--create', cwd=tmp_path)
    for page in WITH:
        released = {c.metadata.nbgrader.grade_id: c.source for c in nbformat.read(tmp_path/'release'/'ps'/page.name, as_version=4).cells if 'nbgrader' in c.metadata}
        for block in blocks(PAGES[page]):
            assert released[f'{block.label}-solution'] == without_solution(block.one('solution').source)
            assert released[f'{block.label}-check'] == block.one('check').source
            assert all('YOUR ANSWER HERE' in released[f'{block.label}-answer'] for _ in block.having('answer'))

    page = WITH[0]      # a student solves the first exercise and none of the others
    first, second, third = blocks(PAGES[page])
    work = nbformat.read(tmp_path/'release'/'ps'/page.name, as_version=4)
    next(c for c in work.cells if c.metadata.get('nbgrader', {}).get('grade_id') == f'{first.label}-solution').source = without_markers(first.one('solution').source)
    handed_in = tmp_path/'submitted'/'ann'/'ps'
    handed_in.mkdir(parents=True)
    nbformat.write(work, handed_in/page.name)
    nbgrader('autograde', 'ps', '--create', cwd=tmp_path)
    graded = nbformat.read(tmp_path/'autograded'/'ann'/'ps'/page.name, as_version=4)
    said = {block.number: str(next(c for c in graded.cells if c.metadata.get('nbgrader', {}).get('grade_id') == f'{block.label}-check').outputs) for block in (first, second, third)}
    assert f'{first.number} passed' in said[first.number]
    assert f'{second.number} waits for you' in said[second.number] and f'{third.number} waits' in said[third.number]
    from nbgrader.api import Gradebook
    with Gradebook(f'sqlite:///{tmp_path}/gradebook.db') as book:
        grades = {g.name: g.auto_score for g in book.find_submission_notebook(page.stem, 'ps', 'ann').grades}
    assert [grades[f'{b.label}-check'] for b in (first, second, third)] == [1, 0, 0]


# ---- the book

def test_the_page_folds_what_gives_the_solution_away():
    page = ROOT/'nbs'/'03_bpe.ipynb'
    nb = nbformat.read(page, as_version=4)
    exercise_pages.set_exercises(nb, page.stem)
    inside, open_ = False, []
    for cell in nb.cells:
        if cell.cell_type == 'markdown' and '{solution-start}' in cell.source: inside = True
        if not inside: open_.append(cell.source)
        if cell.cell_type == 'markdown' and cell.source.startswith('```{solution-end}'): inside = False
    text = '\n'.join(open_)
    assert not [line for line in words_of_solutions(page) if line in text]
    assert text.count('{exercise-start}') == len(blocks(PAGES[page])) and 'check("3.1", pieces)' in text
    assert '<a href="../student/03_bpe.ipynb" download>' in text
    assert not [c for c in nb.cells if 'BEGIN SOLUTION' in c.source]


def test_the_appendix_holds_every_solution_with_its_statement():
    nb = nbformat.read(ROOT/'nbs'/'C_solutions.ipynb', as_version=4)
    exercise_pages.collect(nb, WITH)
    text = '\n'.join(cell.source for cell in nb.cells)
    at = 0
    for number, (page, block) in BLOCKS.items():
        for part in (f'### {number} · {block.title}', exercise_pages.statement(block), *(line for line in without_markers(block.one('solution').source).splitlines())):
            at = text.index(part, at)
        for cell in block.having('answer'): at = text.index(without_markers(cell.source), at)
    assert '#| label' not in text and '#| checker' not in text
    outputs = sum(bool(c.get('outputs')) for c in nb.cells)
    assert outputs == sum(bool(c.outputs) for _, block in BLOCKS.values() for c in block.having('more'))

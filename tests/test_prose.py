"The words of the book: spelling, habits of bad prose, and the fillers that this book does without."
import json, re, subprocess, sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = sorted((ROOT/'nbs').glob('*.ipynb'))
PROSE = [*(ROOT/name for name in ('CONTRIBUTING.md', 'CHANGELOG.md')), *sorted((ROOT/'nbs').glob('*.md'))]
WORDS = {      # codespell does not know them, or they are wrong on purpose
    'docment': 'a comment that documents a parameter, in fastcore', 'docments': 'several', 'fro': 'to and fro',
    'gage': 'a name in the story', 'te': 'a token', 'alle': 'a German word, tokenized', 'smal': 'a typing error that is answered',
    'retrun': 'a typing error that is answered', 'exprot': 'a typing error that is answered'}
OFF = (        # checks of proselint that do not fit this book
    'typography.symbols',             # quotes and dots are set by the builder
    'typography.diacritical_marks',   # to resume a training is no résumé
    'typography.punctuation.hyperbole',   # `[?!]` in a pattern
    'dates_times.am_pm',              # 1 in "AM1 pm", a piece of a token
    'weasel_words.very', 'misc.but',  # taste
    'archaism', 'cliches.misc.write_good',   # "for ever" and "in a word" mean what they say here
    'spelling.consistency')           # Matplotlib and PyTorch write `color`
MEANT = {'and two and two', 'one who knows nothing', 'very very very', 'and again and again', 'in the long run', 'number of different'}      # said so, and read twice
FILLERS = re.compile(r"\b(simply|basically|obviously|let's|it is important to note|note that|it should be noted|in order to|as you can see|needless to say|powerful|leverage|delve)\b", re.I)


def prose(page: Path) -> str:
    "What a page says, without its code."
    if page.suffix != '.ipynb': text = page.read_text(encoding='utf-8')
    else: text = '\n\n'.join(''.join(c['source']) for c in json.loads(page.read_text(encoding='utf-8'))['cells'] if c['cell_type'] == 'markdown')
    text = re.sub(r'<!--.*?-->', '', text, flags=re.S)
    return re.sub(r'^```.*?^```$', '', text, flags=re.S | re.M) if page.name != 'glossary.md' else text


def faults_of_habit(text: str, tmp_path: Path) -> list[str]:
    "What proselint says about a text, but for what is meant."
    file = tmp_path/'text.md'
    file.write_text(text, encoding='utf-8')
    done = subprocess.run([sys.executable, '-m', 'proselint', 'check', file], capture_output=True, text=True)
    assert done.returncode in (0, 1), done.stderr
    found = re.findall(r'text\.md:\d+:\d+: (.*(?:\n\n.*)?)', done.stdout)
    return [f for f in found if not f.startswith(OFF) and not any(words in f for words in MEANT)]


def misspelt(*paths: Path, allowed=WORDS) -> str:
    return subprocess.run([sys.executable, '-m', 'codespell_lib', '--ignore-words-list', ','.join(allowed), *paths], capture_output=True, text=True).stdout


def test_spelling(tmp_path):
    for page in PAGES:        # with its code, but not its outputs
        cells = json.loads(page.read_text(encoding='utf-8'))['cells']
        (tmp_path/f'{page.stem}.txt').write_text('\n\n'.join(''.join(c['source']) for c in cells), encoding='utf-8')
    files = tmp_path, *PROSE, *(ROOT/name for name in ('tools', 'tests', '_ext', 'benchmarks', 'conftest.py', 'README.md'))
    assert not (found := misspelt(*files)), found
    needed = {word.lower() for word in re.findall(r': (\w+) ==>', misspelt(*files, allowed=()))}
    assert needed == set(WORDS), needed ^ set(WORDS)


@pytest.mark.parametrize('page', [*PAGES, *PROSE], ids=lambda p: p.stem)
def test_habits(page, tmp_path):
    text = prose(page)
    assert not (found := faults_of_habit(text, tmp_path)), found
    assert not (found := [text[max(0, m.start() - 40):m.end() + 40] for m in FILLERS.finditer(text)]), found


def test_what_is_wrong_is_found(tmp_path):
    word = 't' + 'eh'                                    # not spelt out, for this file is read as well
    (tmp_path/'bad.txt').write_text(f'This is {word} text.')
    assert f'{word} ==> the' in misspelt(tmp_path/'bad.txt')
    assert any('lexical_illusions' in f for f in faults_of_habit('It is what the the model says.', tmp_path))
    assert FILLERS.search('Note that this is so.') and not FILLERS.search('A simple note.')


def works() -> dict[str, dict[str, str]]:
    "The fields of every reference, by its key."
    entries = re.split(r'^@\w+\{', (ROOT/'references.bib').read_text(encoding='utf-8'), flags=re.M)[1:]
    return {e.partition(',')[0]: dict(re.findall(r'^\s*(\w+)\s*=\s*\{(.*)\},?$', e, flags=re.M)) for e in entries}


def test_references_say_where_to_find_them():
    forms = {'doi': r'10\.\d{4,9}/\S+', 'eprint': r'\d{4}\.\d{4,5}', 'year': r'(19|20)\d\d', 'url': r'https://\S+'}
    for key, fields in works().items():
        assert {'title', 'author', 'year'} <= set(fields), key
        for name, form in forms.items(): assert re.fullmatch(form, fields.get(name, '')) or name not in fields, (key, name, fields[name])
        assert re.search(rf"{fields['year']}", key), key


def test_every_work_is_cited_and_every_page_with_works_is_listed():
    cited = {page.stem: set(re.findall(r'[\w-]+', ','.join(re.findall(r'\{cite\}`([^`]+)`', prose(page))))) for page in [*PAGES, *PROSE]}
    listed = (ROOT/'nbs'/'B_references.md').read_text(encoding='utf-8')
    assert set().union(*cited.values()) == set(works())
    assert re.findall(r'^### \{doc\}`(\w+)`', listed, flags=re.M) == [page.stem for page in PAGES if cited[page.stem]]
    assert re.findall(r'\{"nbs/(\w+)"\}', listed) == [page.stem for page in PAGES if cited[page.stem]]

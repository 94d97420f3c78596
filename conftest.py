"""Teach nbval to read nbdev's notebooks and to compare with `tools.compare`; count the cells of every page."""
import atexit, json, os, platform, re, shutil, subprocess, sys, tempfile, time
from collections import Counter, defaultdict
from pathlib import Path
from queue import Empty

import pytest
from hypothesis import settings
from nbval import plugin
from nbval.kernel import RunningKernel
from tools.compare import Mismatch, compare_outputs, read_tags

ROOT = Path(__file__).parent
START = time.time()
LEDGER, NOTES = ROOT/'tests'/'ledger.json', ROOT/'_build'/'provenance.json'
os.environ.setdefault('MPLBACKEND', 'agg')
os.environ.setdefault('OMP_WAIT_POLICY', 'PASSIVE')     # two processes share the cores: a thread that has nothing to do shall not hold one
os.environ['TQDM_DISABLE'] = '1'     # live lines are for those who look
os.environ['IPYTHONDIR'] = tempfile.mkdtemp(prefix='llmbook-')     # the cells stay out of the reader's own history
atexit.register(shutil.rmtree, os.environ['IPYTHONDIR'], ignore_errors=True)
os.environ['LLMBOOK_PROGRESS'] = os.path.join(os.environ['IPYTHONDIR'], 'passed.json')     # and what they pass, out of theirs
settings.register_profile('book', derandomize=True, deadline=None)
settings.load_profile('book')
os.environ['PYTHONPATH'] = os.pathsep.join([str(ROOT), os.environ.get('PYTHONPATH', '')])
PROVED = 'exercises', 'checkers', 'wrong answers refused with their own hint', 'constant answers refused'
BUCKETS = 'exact', 'within tolerance', 'uncompared', 'silent', 'not run'


@pytest.fixture(scope='module')
def one_thread():
    "Small products on one thread: quicker, and the same sums on every machine."
    import torch
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope='session')
def wheel(tmp_path_factory):
    "The package as pip would install it."
    home = tmp_path_factory.mktemp('source')
    shutil.copytree(ROOT, home/'llmbook', ignore=shutil.ignore_patterns('.git', '.venv', '_build', 'build', '*.egg-info', '_vendor', '__pycache__'))
    done = subprocess.run([sys.executable, '-m', 'pip', 'wheel', '--quiet', '--no-deps', '--no-build-isolation', '-w', home, home/'llmbook'], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return next(home.glob('*.whl'))


def setup(self, setup=plugin.IPyNbCell.setup):
    "Read the cell's tags; skip it if it says `#| eval: false`."
    setup(self)
    self.rtol, self.uncompared = read_tags(self.cell.metadata.get('tags', []), self.cell.source)
    self.cell.execution_count = 1      # nbdev_clean stores none, which nbval takes for "never run"
    if re.search(r'^#\s*\|\s*eval:\s*false', self.cell.source, re.M):
        if self.cell.outputs: self.raise_cell_error('a cell that is never run has a stored output')
        if not self.uncompared: self.raise_cell_error('a cell that is never run needs a tag `uncompared: why`')
        self.user_properties.append(('page', [self.path.stem, 'not run']))
        pytest.skip('#| eval: false')


def compare(self, test, ref, skip_compare=None):
    "Compare what the cell printed (`test`) with what is stored (`ref`), and note how it went."
    try: bucket = 'uncompared' if self.uncompared else 'exact' if compare_outputs(ref, test, self.rtol) else 'within tolerance'
    except Mismatch as e:
        self.comparison_traceback = [str(e)]
        return False
    self.user_properties.append(('page', [self.path.stem, bucket if ref else 'silent']))
    return True


def collect(self, collect=plugin.IPyNbFile.collect):
    "The ledger first, then every code cell."
    yield Ledger.from_parent(self, name='ledger')
    yield from collect(self)


def await_reply(self, msg_id, timeout=None, await_reply=RunningKernel.await_reply):
    "Wait for the cell to end, and notice within a second if its kernel has died."
    end = time.monotonic() + (timeout or float('inf'))
    while True:
        try: return await_reply(self, msg_id, timeout=1)
        except Empty:
            if not self.is_alive(): raise RuntimeError('the kernel died while it ran this cell') from None
            if time.monotonic() > end: raise


def execute_cell_input(self, source, allow_stdin=None):
    # nbval leaves no history, and without it IPython prints an expression that ends in `;`
    return self.kc.execute(source, store_history=True, allow_stdin=bool(allow_stdin), stop_on_error=False)


plugin.IPyNbCell.setup, plugin.IPyNbCell.compare_outputs = setup, compare
plugin.IPyNbFile.collect = collect
RunningKernel.execute_cell_input, RunningKernel.await_reply = execute_cell_input, await_reply


class Ledger(pytest.Item):
    "The code cells of the page are those of the ledger, which `tools.pages` writes with the outputs."

    def runtest(self):
        page = Path(self.path)
        expected = json.loads(LEDGER.read_text(encoding='utf-8')).get(page.stem, [])
        found = [c['id'] for c in json.loads(page.read_text(encoding='utf-8'))['cells'] if c['cell_type'] == 'code']
        gone, new = [c for c in expected if c not in found], [c for c in found if c not in expected]
        assert found == expected, f'{page.name}: code cells gone: {gone}, new: {new}; run `make pages PAGE={page.stem}` if you meant it'

    def repr_failure(self, excinfo): return str(excinfo.value)
    def reportinfo(self): return self.path, 0, f'{self.path.name}::ledger'


def pytest_collection_modifyitems(items):
    "The files that take minutes for a few tests begin, so that no process waits for another in the end."
    long = 'tests/test_platforms.py', 'tests/test_browser.py', 'tests/test_exercises.py', 'nbs/15_distributed.ipynb', 'nbs/13_schedule.ipynb', 'nbs/12_train.ipynb', 'tests/test_pretrain.py', 'tests/test_data.py', 'tests/test_distributed.py', 'tests/test_cli.py'
    items.sort(key=lambda item: next((k for k, name in enumerate(long) if item.nodeid.startswith(name)), len(long)))


def pytest_terminal_summary(terminalreporter):
    "Two tables: how many cells of each page were compared, and how; how many exercises were proved, and against what."
    pages, proved, seconds = defaultdict(Counter), Counter(), Counter()
    for reports in terminalreporter.stats.values():
        for report in reports:
            if getattr(report, 'when', None) not in ('call', 'setup'): continue
            for page, bucket in dict.fromkeys(tuple(v) for k, v in report.user_properties if k == 'page'):
                pages[page][bucket] += 1
                seconds[page] += report.duration
            if report.passed: proved.update({k: v for k, v in report.user_properties if k in PROVED})
    if pages:
        terminalreporter.section('cells of every page')
        row = '{:<20}' + '{:>18}' * len(BUCKETS)
        terminalreporter.write_line(row.format('page', *BUCKETS))
        for page, counts in sorted(pages.items()):
            terminalreporter.write_line(row.format(page, *(counts[b] for b in BUCKETS)))
        total = sum(pages.values(), Counter())
        terminalreporter.write_line(row.format('all', *(total[b] for b in BUCKETS)))
    if proved:
        terminalreporter.section('exercises')
        terminalreporter.write_line(', '.join(f'{proved[what]} {what}' for what in PROVED))
    if set(pages) >= set(json.loads(LEDGER.read_text(encoding='utf-8'))) and proved: note(terminalreporter, pages, seconds)


def note(terminalreporter, pages, seconds):
    "Leave what a whole run has found for the page that tells how the book was made."
    count = lambda kind: len(terminalreporter.stats.get(kind, ()))
    notes = {'machine': f'{platform.system()} {platform.machine()}, Python {platform.python_version()}, {os.cpu_count()} cores',
             'seconds': time.time() - START, 'passed': count('passed'), 'failed': count('failed'),
             'pages': {page: {**counts, 'seconds': seconds[page]} for page, counts in sorted(pages.items())}}
    NOTES.parent.mkdir(exist_ok=True)
    NOTES.write_text(json.dumps(notes, indent=1) + '\n', encoding='utf-8')

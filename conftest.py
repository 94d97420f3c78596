"""Teach nbval to read nbdev's notebooks and to compare with `tools.compare`; count the cells of every page."""
import json, os, re
from collections import Counter, defaultdict
from pathlib import Path

import pytest
from nbval import plugin
from nbval.kernel import RunningKernel
from tools.compare import Mismatch, compare_outputs, read_tags

ROOT = Path(__file__).parent
LEDGER = ROOT/'tests'/'ledger.json'
os.environ.setdefault('MPLBACKEND', 'agg')
os.environ['PYTHONPATH'] = os.pathsep.join([str(ROOT), os.environ.get('PYTHONPATH', '')])
BUCKETS = 'exact', 'within tolerance', 'uncompared', 'silent', 'not run'


def setup(self, setup=plugin.IPyNbCell.setup):
    "Read the cell's tags; skip it if it says `#| eval: false`."
    setup(self)
    self.rtol, self.uncompared = read_tags(self.cell.metadata.get('tags', []), self.cell.source)
    self.cell.execution_count = 1      # nbdev_clean stores none, which nbval takes for "never run"
    if re.search(r'^#\s*\|\s*eval:\s*false', self.cell.source, re.M):
        if self.cell.outputs: self.raise_cell_error('a cell that is never run has a stored output')
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
    "The ledger first, then every cell."
    yield Ledger.from_parent(self, name='ledger')
    yield from collect(self)


def execute_cell_input(self, source, allow_stdin=None):
    # nbval leaves no history, and without it IPython prints an expression that ends in `;`
    return self.kc.execute(source, store_history=True, allow_stdin=bool(allow_stdin), stop_on_error=False)


plugin.IPyNbCell.setup, plugin.IPyNbCell.compare_outputs = setup, compare
plugin.IPyNbFile.collect = collect
RunningKernel.execute_cell_input = execute_cell_input


class Ledger(pytest.Item):
    "The cells that have an output are those of the ledger, which `tools.pages` writes with the outputs."

    def runtest(self):
        page = Path(self.path)
        expected = json.loads(LEDGER.read_text(encoding='utf-8')).get(page.stem, [])
        found = cells_with_output(json.loads(page.read_text(encoding='utf-8')))
        gone, new = [c for c in expected if c not in found], [c for c in found if c not in expected]
        assert found == expected, f'{page.name}: cells with an output gone: {gone}, new: {new}; see CONTRIBUTING.md'

    def repr_failure(self, excinfo): return str(excinfo.value)
    def reportinfo(self): return self.path, 0, f'{self.path.name}::ledger'


def cells_with_output(nb: dict) -> list[str]:
    "Ids of the code cells that store an output, in order."
    return [c['id'] for c in nb['cells'] if c['cell_type'] == 'code' and c['outputs']]


def pytest_terminal_summary(terminalreporter):
    "A table: how many cells of each page were compared, and how."
    pages = defaultdict(Counter)
    for reports in terminalreporter.stats.values():
        for report in reports:
            if getattr(report, 'when', None) not in ('call', 'setup'): continue
            for page, bucket in dict.fromkeys(tuple(v) for k, v in report.user_properties if k == 'page'):
                pages[page][bucket] += 1
    if not pages: return
    terminalreporter.section('cells of every page')
    row = '{:<20}' + '{:>18}' * len(BUCKETS)
    terminalreporter.write_line(row.format('page', *BUCKETS))
    for page, counts in sorted(pages.items()):
        terminalreporter.write_line(row.format(page, *(counts[b] for b in BUCKETS)))
    total = sum(pages.values(), Counter())
    terminalreporter.write_line(row.format('all', *(total[b] for b in BUCKETS)))

"""What those who work on the book wait for: the import, the build, the proofs."""
import json, shutil, subprocess, sys, tempfile, time
from pathlib import Path

from benchmarks.harness import Contender, Goal, Job, Row, environment

ROOT = Path(__file__).resolve().parent.parent


def python(*arguments, cwd=ROOT) -> str:
    "What a Python of its own prints."
    with environment({'PYTHONPATH': str(cwd)}): done = subprocess.run([sys.executable, *arguments], cwd=cwd, capture_output=True, text=True)
    if done.returncode: raise RuntimeError(done.stdout[-2000:] + done.stderr[-2000:])
    return done.stdout


def imports() -> Job:
    "import llmbook, in a new process; and its model, which needs PyTorch."
    seconds = lambda what: float(python('-c', f'import time; t = time.perf_counter(); {what}; print(time.perf_counter() - t)'))
    return Job(lambda _: {'import': seconds('import llmbook'), 'with a model': seconds('from llmbook.gpt import GPT')})


def builds() -> Job:
    "The book of a copy of the repository: whole, with its checks, and one changed page."
    folder = tempfile.TemporaryDirectory()
    copy = Path(folder.name)/'book'
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns('.git', '.venv', '_build', '__pycache__'))
    page = copy/'nbs'/'05_embeddings.ipynb'
    def turn(_, keep=folder):
        times = []
        for arguments in ([], ['--changed'], ['--changed']):      # the second learns what the first has written
            page.write_text(page.read_text(encoding='utf-8') + ' ', encoding='utf-8')
            start = time.perf_counter()
            python('-m', 'tools.book', *arguments, cwd=copy)
            times.append(time.perf_counter() - start)
        return {'cold': times[0], 'warm': times[2]}
    return Job(turn)


def proofs() -> Job:
    "make test, as its last run has noted."
    notes = json.loads((ROOT/'_build'/'provenance.json').read_text(encoding='utf-8'))
    return Job(lambda _: {'minutes': notes['seconds'] / 60})


def rows(full: bool) -> list[Row]:
    "The rows of this file, with what they must reach."
    at_most = lambda measure, bound: (Goal(measure, bound, at_most=True),)
    out = [Row('import', 'import llmbook', 'in a new process, seconds', '', (Contender('ours', imports),), at_most('import', 0.3), 5)]
    if not full: return out
    out.append(Row('book', 'building the book', 'cold: all pages and the checks; warm: one changed page; seconds', '', (Contender('ours', builds),), at_most('cold', 60) + at_most('warm', 10), 1))
    if (ROOT/'_build'/'provenance.json').exists(): out.append(Row(
        'test', 'make test', 'minutes, as noted by the last run here', '', (Contender('ours', proofs),), at_most('minutes', 15), 1))
    return out

"What `check` says of answers that are right, wrong, endless, careless or no answers at all; and the command line."
import json, os, subprocess, sys, time
from copy import deepcopy
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st
from llmbook import checking
from llmbook.checking import (EXERCISES, Exercise, NotYet, all_exercises, check, check_file, difference, exercise, find_exercise, main, read_answer,
                              read_progress, run_for)

values = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.binary(max_size=3),
                      lambda inner: st.lists(inner, max_size=3) | st.tuples(inner, inner) | st.dictionaries(st.text(max_size=2), inner, max_size=3))


@given(values)
def test_a_value_equals_its_copy(value): assert difference(deepcopy(value), value) is None


@given(values, values)
def test_a_difference_has_no_side(a, b):
    if type(a) is type(b) and not isinstance(a, (list, tuple, dict)): assert (difference(a, b) is None) == (difference(b, a) is None)
    if repr(a) == repr(b): assert difference(a, b) is None
    elif not any(isinstance(v, float) for v in (a, b)) and a != b: assert difference(a, b) is not None or 'nan' in repr(a) or '.' in repr(a)


def test_types_come_first():
    same = (1, 1.0), (np.int64(1), 1), (np.float32(1), 1.0), (np.bool_(True), True), (torch.nn.Parameter(torch.ones(2)), torch.ones(2))
    for got, want in same: assert difference(got, want) is None
    other = (1.0, 1), (True, 1), (1, True), ([1], (1,)), ((1,), [1]), (None, 0), ('1', 1), (b'a', 'a'), (torch.tensor(1), 1), (torch.tensor(1.0), 1.0), \
            (np.ones(2), torch.ones(2)), ([1.0], torch.ones(1)), (torch.tensor(True), True)
    for got, want in other: assert 'came back where' in difference(got, want), (got, want)


def test_shapes_come_before_values():
    assert difference(torch.zeros(2, 3), torch.ones(3, 2)) == 'the shape is (2, 3) and should be (3, 2)'
    assert difference(torch.zeros(2), torch.tensor([0.0, 2e-5])) == 'at place 1'
    assert difference(torch.zeros(2), torch.tensor([0.0, 0.9e-5])) is None
    assert 'a float came back where an int' in difference(torch.zeros(2), torch.zeros(2, dtype=torch.int64))
    assert difference(torch.tensor([float('nan'), float('inf')]), torch.tensor([float('nan'), float('inf')])) is None


def test_places_are_named():
    assert difference([1, (2, 3)], [1, (2, 4)]) == 'at place 1: at place 1'
    assert difference([1], [1, 2]) == '1 item came back where 2 should be'
    assert difference({'a': 1, 'b': 2}, {'a': 1}) == "the key 'b' is too many"
    assert difference('x' * 50 + 'a', 'x' * 50 + 'b') == 'they part after 50 characters'


# ---- an answer under observation

def a_task(*claims, seconds=5, wrong=()):
    "An exercise for an answer called `f`, outside the book's register."
    def check_f():
        for claim in claims: yield claim
    task = Exercise('0.0', 'A test', check_f, seconds)
    for answer in wrong: task.wrong(answer)
    return task


def double(words):
    return [w * 2 for w in words]


TASK = a_task(("f(['a', 'b'])", ['aa', 'bb']), ('f([])', []))


def test_a_right_answer_passes():
    report = TASK.check(double)
    assert report.passed and str(report) == '0.0 passed (2 claims): A test'


def test_what_came_back_is_told():
    report = TASK.check(lambda words: ['a', 'bb'])
    assert not report.passed and report.headline == '0.0 not yet: A test'
    assert report.details == {'tried': "f(['a', 'b'])", 'returned': "['a', 'bb']", 'expected': "['aa', 'bb']", 'why': 'at place 0'}


def test_a_forgotten_return():
    assert 'a path without `return`' in TASK.check(lambda words: None).details['why']


@pytest.mark.parametrize('answer, told', [
    (lambda words: words.clear() or ['aa', 'bb'], "['a', 'b'] became []"),
    (lambda words: [words.append('c'), ['aa', 'bb']][1], "['a', 'b'] became ['a', 'b', 'c']"),
])
def test_an_argument_that_is_changed(answer, told):
    report = TASK.check(answer)
    assert told in report.details['changed'] and 'work on a copy' in report.details['why']


@pytest.mark.parametrize('argument, change', [
    ('torch.zeros(2)', lambda x: x.add_(1)), ('np.zeros(2)', lambda x: x.__iadd__(1)), ('[[1], [2]]', lambda x: x[1].append(3)), ("{'a': [1]}", lambda x: x['a'].pop()),
    ('{1, 2}', lambda x: x.pop()), ('([1], 2)', lambda x: x[0].append(2)), ('torch.zeros(2, requires_grad=True)', lambda x: x.data.add_(1)),
    ('torch.zeros(2)', lambda x: x.add_(1e-7)), ('[1.0, 2.0]', lambda x: x.__setitem__(0, 1)), ('bytearray(b"a")', lambda x: x.append(1)), ('__import__("collections").Counter("a")', lambda x: x.clear()),
])
def test_changes_are_seen_at_every_depth(argument, change):
    def check_f():
        import numpy as np      # noqa: F401
        import torch            # noqa: F401
        yield f'f({argument})', 1
        yield f'f(x={argument})', 1
    task = Exercise('0.0', 'A test', check_f)
    def f(x):
        change(x)
        return 1
    assert 'became' in task.check(f).details['changed']
    assert 'became' in task.check(lambda *args, **kwargs: f(**kwargs) if kwargs else 1).details['changed']
    assert task.check(lambda x: 1).passed


def test_an_endless_loop():
    def endless(words):
        while True:
            try: time.sleep(0.001)
            except Exception: pass
    task = a_task(("f(['a'])", 1), seconds=0.3)
    start = time.perf_counter()
    report = task.check(endless)
    assert 'no end after 0.3 seconds' in report.details['returned'] and time.perf_counter() - start < 5


def test_a_thread_that_is_stopped_is_gone():
    beats = []
    def endless():
        while True: beats.append(time.sleep(0.001))
    assert isinstance(run_for(0.2, endless)[1], TimeoutError)
    time.sleep(0.1)
    count = len(beats)
    time.sleep(0.1)
    assert len(beats) == count


def crash(words):
    total = 0
    return total + words.length


def test_a_crash_is_told_with_the_learners_own_line():
    report = TASK.check(crash)
    assert report.details['raised'] == "AttributeError: 'list' object has no attribute 'length'"
    assert [v for k, v in report.details.items() if k.startswith('line ')] == ['return total + words.length']
    assert 'checking.py' not in str(report) and 'Traceback' not in str(report)


def test_a_crash_deep_in_a_library_is_told_with_the_learners_line():
    def deep(words):
        return json.loads('{')
    assert "return json.loads('{')" in TASK.check(deep).details.values()


@pytest.mark.parametrize('answer, told', [(lambda: 1, 'TypeError'), (lambda words: exit(), 'SystemExit'), (lambda words: answer_of(words), 'NameError'),
                                          (lambda words: (lambda f: f(f))(lambda f: f(f)), 'RecursionError')])
def test_other_crashes(answer, told): assert TASK.check(answer).details['raised'].startswith(told)


def test_a_crash_is_no_pass_where_none_is_expected():
    def f(x): raise ValueError('x')
    assert not a_task(('f(1)', None)).check(f).passed


def test_an_answers_own_errors_are_its_own():
    def late(x): raise TimeoutError('mine')
    def unfinished(x): raise NotImplementedError('not for this backend')
    def silent(x): raise ValueError
    for f, told in ((late, 'TimeoutError: mine'), (unfinished, 'NotImplementedError: not for this backend'), (silent, 'ValueError')):
        assert a_task(('f(1)', 1)).check(f).details['raised'] == told


def test_the_last_of_the_learners_lines_is_shown():
    def inner(x):
        return x.nothing
    def outer(x):
        return inner(x)
    assert [v for k, v in a_task(('f(1)', 1)).check(outer).details.items() if k.startswith('line')] == ['return x.nothing']


def test_what_is_told_of_several_calls():
    def f(x, seen=[]):
        seen.append(x)
        x.clear()
        return None
    details = a_task(('[f([1]), f([2, 3])][1].upper()', 1)).check(f).details
    assert details['why'] == 'f gave None' and details['raised'].startswith('AttributeError')
    assert a_task(('[f([1]), f([2, 3])]', [None, None])).check(f).details['changed'] == 'an argument: [1] became []'


def test_a_result_that_comes_too_late_does_not_count():
    def slow():
        try: time.sleep(0.05)
        finally: time.sleep(0.6)
        return 1
    value, error = run_for(0.2, slow)
    assert value is None and isinstance(error, checking.TooLate)


def test_what_an_unusable_value_was():
    task = a_task(('f(1).upper()', 'A'))
    assert task.check(lambda x: None).details['why'] == 'f gave None'


def test_the_plain_reason_comes_before_that_of_the_claim():
    task = a_task(('f([1])', 5, 'the reason of the claim'))
    def changes(x):
        x.clear()
        return 5
    def crashes(x): raise ValueError
    for answer, why in ((lambda x: None, 'is there a path'), (lambda x: '5', 'a str came back'), (changes, 'the caller still needs it'), (lambda x: 4, 'the reason of the claim'),
                        (crashes, 'the reason of the claim')): assert task.check(answer).details['why'].startswith(why)
    assert a_task(('f(1)', 5)).check(crashes).details['why'] == 'Python says above what went wrong'
    class Box:
        def size(self): return 1
    assert a_task(('f().size', 1)).check(Box).details['why'] == 'a method came back where an int was expected; call it, or mark it @property'


def test_a_method_that_waits_is_named():
    class f:
        def size(self): raise NotImplementedError()
    assert 'write f, size in it, where' in str(a_task(('f().size()', 1)).check(f).details['to do'])


def test_a_starter_waits():
    def f(words): raise NotImplementedError()
    assert str(TASK.check(f)).startswith('0.0 waits for you: A test') and 'write f ' in str(TASK.check(f))


def first_letter(words):
    "Only the first letter is doubled."
    return [w[0] + w for w in words]


def raises_it(words):
    "There is no word number two."
    return [words[0] * 2, words[2]]


def in_place(words):
    "The words of the caller are changed."
    for i, w in enumerate(words): words[i] = w * 2
    return words


def test_a_known_mistake_gives_its_own_hint():
    task = a_task(("f(['a', 'b'])", ['aa', 'bb'], 'the reason of the claim'), ("f(['ab'])", ['abab'], 'the second reason'), wrong=(raises_it, in_place, first_letter))
    assert task.check(lambda words: [w[:1] + w for w in words]).mistake == 'first_letter'
    assert task.check(lambda words: [words[0] * 2, words[2]]).details['why'] == 'There is no word number two.'
    def other(words):
        words[:] = [w + w for w in words]
        return words
    assert task.check(other).mistake == 'in_place'
    assert task.check(lambda words: ['aa', 'bb']).details['why'] == 'the second reason'
    assert task.check(lambda words: ['a', 'b']).details['why'] == 'the reason of the claim'
    assert a_task(('f(1)', 2)).check(lambda x: 3).details['why'].startswith('no mistake that is known here')


def test_what_is_alike_once_is_told_with_a_perhaps():
    def one(words):
        "It gives one."
        return 1
    def two(words):
        "It gives one, or two."
        return 1 if words == 1 else 2
    task = a_task(('f(1)', 5), ('f(2)', 6), ('f(3)', 7), wrong=(one, two))
    assert task.check(lambda x: 1).details['why'] == 'It gives one.'
    assert task.check(lambda x: min(x, 2)).details['why'] == 'It gives one, or two.'
    details = task.check(lambda x: x).details
    assert details['perhaps'] == 'It gives one, or two.' and 'why' not in details
    assert 'perhaps' not in task.check(lambda x: 0).details


def test_values_that_cannot_be_compared_are_not_alike():
    outcome = lambda: checking.Outcome('f(1)', {}, 1, '', Odd(), '', None, checking.Watched(len))
    assert not outcome().like(outcome())


def test_a_mistake_counts_only_where_it_fails_first():
    def one(words):
        "It gives one."
        return 1
    task = a_task(('f(1)', 1), ('f(2)', 2), ('f(3)', 3), wrong=(one,))
    assert task.check(lambda x: x if x < 3 else 1).mistake == ''
    assert task.check(lambda x: 1).mistake == 'one'


def test_the_checkers_own_names_are_shown():
    def check_f():
        numbers, hidden = [1, 2], object()
        yield 'f(numbers, hidden)', 3
    report = Exercise('0.0', 'A test', check_f).check(lambda numbers, hidden: 4)
    assert report.details['with'] == 'numbers = [1, 2]'


def test_a_class_as_an_answer():
    class Box:
        "A box."
        def __init__(self, x): self.x = x
        @classmethod
        def empty(cls): return cls(0)
    assert a_task(('f(3).x', 3), ('f.empty().x', 0)).check(Box).passed


class Odd:
    "Refuses everything."
    def __eq__(self, other): raise RuntimeError('no equality')
    def __repr__(self): raise RuntimeError('no words')
    def __len__(self): raise RuntimeError('no length')
    def __bool__(self): raise RuntimeError('no truth')
    __hash__ = None


def endless_equality():
    class Slow(list):
        def __len__(self):
            while True: pass
    return Slow([1])


knot = []
knot.append(knot)


@pytest.mark.parametrize('value', [Odd(), [Odd()], endless_equality(), knot, list(range(10**6)), torch.zeros(2, device='meta'), torch.eye(2).to_sparse(), np.array([Odd()], dtype=object),
                                   (i for i in 'ab'), 'x' * 10**6, 10**5000, float('nan'), ValueError('x'), type('T', (), {})], ids=lambda v: type(v).__name__)
def test_odd_values_are_reported_like_any_other(value):
    for want in (['aa'], 1.5, 'text', torch.ones(2), {'a': 1}, True):
        report = a_task(('f(1)', want), seconds=0.5).check(lambda x: value)
        assert not report.passed and 'Traceback' not in str(report) and len(str(report)) < 2000


@pytest.mark.parametrize('error', [KeyboardInterrupt(), StopIteration(), GeneratorExit(), BaseException('x'), MemoryError()], ids=repr)
def test_whatever_is_raised_is_a_crash(error):
    def f(x): raise error
    assert a_task(('f(1)', 1)).check(f).details['raised'].startswith(type(error).__name__)


def test_an_error_that_cannot_be_told():
    class Mute(Exception):
        def __str__(self): raise RuntimeError('no words')
    def f(x): raise Mute
    assert a_task(('f(1)', 1)).check(f).details['raised'].startswith('Mute')


def test_long_values_are_cut():
    report = a_task(('f(1)', [1])).check(lambda x: list(range(10_000)))
    assert len(str(report)) < 1000


# ---- check()

@pytest.fixture
def registered(monkeypatch, tmp_path):
    monkeypatch.setenv('LLMBOOK_PROGRESS', str(tmp_path/'deep'/'passed.json'))
    all_exercises()
    monkeypatch.setitem(EXERCISES, '0.9', TASK)
    return tmp_path/'deep'/'passed.json'


def test_check_prints_or_raises(registered, capsys):
    assert check('0.9', double) is None
    assert capsys.readouterr().out == '0.0 passed (2 claims): A test\n'
    with pytest.raises(NotYet, match='not yet: A test') as caught: check('0.9', lambda words: [])
    assert caught.value._render_traceback_() == [str(caught.value)]


def test_the_verdict_is_printed_where_it_was_asked_for(registered, monkeypatch):
    monkeypatch.setattr(sys, 'stdout', out := StringIO())
    def f(words):
        sys.stdout = StringIO()
        return double(words)
    check('0.9', f)
    assert 'passed' in out.getvalue()


def test_as_a_decorator_it_lets_the_work_go_on(registered, capsys):
    @check('0.9')
    def f(words): return words
    assert f([1]) == [1] and 'not yet' in capsys.readouterr().out
    assert repr(check('0.9')) == "nothing is checked yet: write check('0.0', f)"


def test_misuse_of_check(registered):
    for wrong, message in [(('0.9', [1]), r"a list: \[1\].*the function itself: check\('0.0', f\)"), (('0.9', None), 'None'), ((double,), 'the number of the exercise first'),
                           (('0.44', double), "no exercise '0.44'; the nearest are 0.3"), (('zz', double), "no exercise 'zz'")]:
        with pytest.raises(NotYet, match='(?s)' + message): check(*wrong)


def test_unknown_numbers_name_the_nearest():
    for number, nearest in ((' 3.9 ', '3.4'), ('3.9', '3.4'), ('4.9', '4.4'), ('1.9', '1.4'), ('3', '3.1'), ('bytes_per_token', '3.2'), (3.14, '3.4')):
        with pytest.raises(ValueError, match=f"the nearest are {nearest}"): find_exercise(number)
    assert find_exercise(3.1).number == find_exercise(' 3.1').number == '3.1'


def test_an_exercise_made_in_a_notebook_stays():
    before = EXERCISES['3.1']
    try:
        @exercise('3.1', 'Another')
        def check_pieces(): yield 'pieces()', 1
        assert find_exercise('3.1').title == 'Another'
    finally: EXERCISES['3.1'] = before


def test_progress(registered):
    assert read_progress() == {}
    with pytest.raises(NotYet): check('0.9', len)
    assert read_progress() == {}
    check('0.9', double)
    assert list(read_progress()) == ['0.0']
    for broken in ('', '[1]', '{"0'):
        registered.write_text(broken)
        assert read_progress() == {}
    registered.write_text('{"0.0": "2020-01-01"}')
    check('0.9', double)
    assert read_progress() == {'0.0': '2020-01-01'} and os.listdir(registered.parent) == ['passed.json']


def test_progress_that_cannot_be_written_is_no_fault(monkeypatch, tmp_path):
    (tmp_path/'file').write_text('')
    monkeypatch.setenv('LLMBOOK_PROGRESS', str(tmp_path/'file'/'passed.json'))
    checking.note_progress('0.0')


def python(*command, **kwargs):
    return subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True, encoding='utf-8', timeout=120, **kwargs)


def test_a_plain_script_ends_with_the_words_alone(tmp_path):
    (tmp_path/'a.py').write_text("from llmbook.checking import check\ncheck('0.2', lambda seed: ([1], [2]))\nprint('never')\n")
    done = python(tmp_path/'a.py')
    assert done.returncode == 1 and done.stdout == '' and done.stderr.startswith('0.2 not yet') and 'Traceback' not in done.stderr
    (tmp_path/'b.py').write_text("from llmbook.checking import check\ntry: check('0.2', 3)\nexcept AssertionError: pass\n1 / 0\n")
    assert 'Traceback' in python(tmp_path/'b.py').stderr


# ---- files and the command line

RIGHT = 'def bytes_per_token(tokenizer, text):\n    return len(text.encode()) / len(tokenizer.encode(text))\n'
FILES = {
    'right': (RIGHT, 0, '3.2 passed (5 claims)'),
    'right, with a byte order mark': ('\ufeff' + RIGHT, 0, 'passed'),
    'right, and it prints': ('print("HELLO")\n' + RIGHT, 0, '3.2 passed (5 claims)'),
    'named only': ('print(bytes_per_token)\n', 2, 'no function at all'),
    'gone when it has run': (RIGHT + 'del bytes_per_token\n', 1, 'missing bytes_per_token is not there when the file has run'),
    'a star without it': ('from math import *\n', 1, 'missing'),
    'asynchronous': ('async def bytes_per_token(tokenizer, text): pass', 1, 'a coroutine came back where a float was expected'),
    'too deep to read': ('x = ' + '-' * 100_000 + '1\n', 2, ''),
    'mute error': ('class Mute(Exception):\n    def __str__(self): 1 / 0\nraise Mute\n' + RIGHT, 1, 'raised Mute line 3 raise Mute'),
    'its own output is replaced': ('import sys, io\n' + RIGHT.replace('return', 'sys.stdout = io.StringIO(); return'), 0, 'passed'),
    'right, under a condition': ('if True:\n    from math import pi\n' + RIGHT.replace('def', '    def').replace('\n  ', '\n      '), 0, 'passed'),
    'right, as a name': ('f = lambda tokenizer, text: len(text.encode()) / len(tokenizer.encode(text))\nbytes_per_token = f', 0, 'passed'),
    'right, guarded main': (RIGHT + 'if __name__ == "__main__": 1 / 0\n', 0, 'passed'),
    'right, beside a module of its own': ('from helper import length\n' + RIGHT.replace('len(text.encode())', 'length(text)'), 0, 'passed'),
    'a known mistake': (RIGHT.replace('text.encode()', 'text', 1), 1, 'is one character, and two bytes'),
    'crash': (RIGHT.replace('tokenizer.encode(text)', 'token'), 1, "NameError: name 'token' is not defined line 2 return len(text.encode()) / len(token)"),
    'crash while it is read': (RIGHT + '1 / 0\n', 1, 'ZeroDivisionError: division by zero line 3 1 / 0 why this happens while the file is read'),
    'checks itself': ('from llmbook.checking import check\n' + RIGHT + 'check("3.2", len)\n@check("3.1")\ndef pieces(): pass\nassert pieces() is None\n', 0, '3.2 passed (5 claims)'),
    'exit': (RIGHT + 'exit(0)\n', 1, 'SystemExit'),
    'exit without a word': ('import os\nos._exit(0)\n' + RIGHT, 1, 'the whole program, with exit code 0'),
    'endless while it is read': (RIGHT + 'while True: pass\n', 1, 'no end after 4 seconds'),
    'waits for a key': (RIGHT + 'input()\n', 1, 'EOFError'),
    'no function': ('def bytes_per(tokenizer, text): pass\ndef other(): pass\n', 2, 'has no `bytes_per_token`; it has `bytes_per`, `other`'),
    'nothing at all': ('', 2, 'no function at all'),
    'inside a function': ('def f():\n    def bytes_per_token(): pass\n', 2, 'it has `f`'),
    'syntax error': (RIGHT + 'retrun 3\n', 2, 'line 3: invalid syntax: retrun 3'),
    'bad indentation': ('def f():\nreturn 3\n', 2, "line 2: expected an indented block"),
    'null byte': ('a = 1\0', 2, 'null'),
    'not a function': ('bytes_per_token = 3', 1, 'TypeError'),
}


@pytest.mark.parametrize('what', FILES)
def test_files(what, tmp_path, capfd, monkeypatch):
    monkeypatch.setenv('LLMBOOK_PROGRESS', str(tmp_path/'passed.json'))
    source, code, words = FILES[what]
    (tmp_path/'answer.py').write_text(source, encoding='utf-8')
    (tmp_path/'helper.py').write_text('def length(text): return len(text.encode())\n')
    assert main(['check', '3.2', str(tmp_path/'answer.py'), '--seconds', '4' if 'endless' in what else '60']) == code
    out, err = capfd.readouterr()
    assert words in ' '.join((err if code == 2 else out).split()), (out, err)
    assert 'HELLO' not in out and 'Traceback' not in out + err and (code == 2) == (out == '')
    assert ('3.2' in read_progress()) == (code == 0)


def test_files_that_are_none(tmp_path, capsys):
    (tmp_path/'latin.py').write_bytes('# é'.encode('latin-1'))
    for name, words in (('latin.py', 'not UTF-8: byte 2 is 0xe9'), ('none.py', 'cannot be read: No such file'), ('.', 'is not a file')):
        assert main(['check', '3.2', str(tmp_path/name)]) == 2
        assert words in capsys.readouterr().err


@pytest.mark.skipif(os.name != 'posix', reason='sends a signal')
def test_a_child_ends_though_nobody_is_left_to_kill_it(tmp_path):
    beat = tmp_path/'beat'
    (tmp_path/'answer.py').write_text(f'import time\nwhile True:\n    open({str(beat)!r}, "a").write("x")\n    time.sleep(0.05)\ndef pieces(): pass\n')
    code = 'import sys; from llmbook.checking import main; sys.exit(main())'
    parent = subprocess.Popen([sys.executable, '-c', code, 'check', '3.1', str(tmp_path/'answer.py'), '--seconds', '2'], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not beat.exists(): time.sleep(0.1)
    parent.kill()
    parent.wait()
    sizes = [beat.stat().st_size]
    for _ in range(8):
        time.sleep(1)
        sizes.append(beat.stat().st_size)
        if sizes[-1] == sizes[-2]: break
    assert len(sizes) > 2 and sizes[-1] == sizes[-2], sizes      # nobody killed it, and it ended


def test_children_of_the_child_are_killed(tmp_path):
    beat = tmp_path/'beat'
    (tmp_path/'answer.py').write_text(f'import subprocess, sys\nsubprocess.Popen([sys.executable, "-c", "import time\\nwhile True:\\n open({str(beat)!r}, {"a"!r}).write({"x"!r}); time.sleep(0.05)"])\n'
                                      'while True: pass\ndef pieces(): pass\n')
    report = check_file('3.1', tmp_path/'answer.py', seconds=5)
    assert 'no end after 5 seconds' in report.details['returned'] and beat.exists()
    if os.name == 'posix':
        time.sleep(0.3)
        size = beat.stat().st_size
        time.sleep(0.3)
        assert beat.stat().st_size == size


def test_a_file_may_bind_any_name_with_a_star(tmp_path):
    (tmp_path/'a.py').write_text('from other import *\n')
    assert 'import *' in read_answer(tmp_path/'a.py', 'pieces')


def test_many_files(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv('LLMBOOK_PROGRESS', str(tmp_path/'passed.json'))
    for name, source in {'a': RIGHT, 'b': RIGHT.replace('text.encode()', 'text', 1), 'c': 'x = ('}.items(): (tmp_path/f'{name}.py').write_text(source)
    files = [str(tmp_path/f'{name}.py') for name in 'abc']
    for chosen, code in ((files[:1], 0), (files[:2], 1), (files, 2)): assert main(['check', '3.2', *chosen]) == code
    assert f'{files[1]}: 3.2 not yet' in capsys.readouterr().out
    (tmp_path/'passed.json').unlink()
    assert main(['check', '3.2', *files[::-1]]) == 2 and read_progress() == {}


def test_the_list(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv('LLMBOOK_PROGRESS', str(tmp_path/'passed.json'))
    assert main(['exercises']) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[:-1]] == [e.number for e in all_exercises()] and lines[-1].startswith('0 of ')
    checking.note_progress('3.2')
    assert main(['exercises']) == 0
    assert any('3.2' in line and 'passed 20' in line for line in capsys.readouterr().out.splitlines())
    (tmp_path/'a.py').write_text(RIGHT)
    (tmp_path/'b.py').write_text('def pieces(tokenizer, text): return list(text)\n')


def test_a_table_of_marks(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv('LLMBOOK_PROGRESS', str(tmp_path/'passed.json'))
    monkeypatch.chdir(tmp_path)
    Path('a.py').write_text(RIGHT)
    Path('b,b.py').write_text('def pieces(tokenizer, text): return list(text)\n' + RIGHT)
    Path('c.py').write_text('from math import *\n')
    Path('d.py').write_text('retrun 1\n')
    assert main(['exercises', 'a.py']) == 0
    assert capsys.readouterr().out == 'file,3.2\na.py,1\n'
    assert main(['exercises', 'a.py', 'b,b.py']) == 1
    assert capsys.readouterr().out == 'file,3.1,3.2\na.py,,1\n"b,b.py",0,1\n'
    assert main(['exercises', 'd.py', 'b,b.py', 'e.py']) == 2
    out, err = capsys.readouterr()
    assert out == 'file,3.1,3.2\nd.py,,\n"b,b.py",0,1\ne.py,,\n' and 'd.py, line 1: invalid syntax' in err and 'e.py cannot be read' in err
    assert read_progress() == {}


def test_a_file_that_may_define_anything_has_no_mark_for_what_it_does_not(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(checking, 'all_exercises', lambda: [EXERCISES['3.1'], EXERCISES['3.2']])
    (tmp_path/'a.py').write_text('from math import *\n' + RIGHT)
    assert main(['exercises', str(tmp_path/'a.py')]) == 0
    assert capsys.readouterr().out.endswith('a.py,,1\n')


def test_a_notebook_gives_its_last_cell_that_defines_the_answer(tmp_path, capsys):
    import nbformat
    code = nbformat.v4.new_code_cell
    cells = [code('if False:\n    %pip install x\n1 / 0'), code('def bytes_per_token(tokenizer, text): return 1.0'), code(RIGHT), code('check("3.2", bytes_per_token)\nprint(pieces)'), nbformat.v4.new_markdown_cell('def pieces')]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path/'a.ipynb')
    assert main(['check', '3.2', str(tmp_path/'a.ipynb')]) == 0
    assert main(['check', '3.1', str(tmp_path/'a.ipynb')]) == 2
    assert 'has no `pieces`; it has `bytes_per_token`, `bytes_per_token`' in capsys.readouterr().err
    assert main(['exercises', str(tmp_path/'a.ipynb')]) == 0 and capsys.readouterr() == (f"file,3.2\n{tmp_path/'a.ipynb'},1\n", '')
    nbformat.write(nbformat.v4.new_notebook(cells=[*cells, code('retrun 1')]), tmp_path/'a.ipynb')
    assert main(['check', '3.2', str(tmp_path/'a.ipynb')]) == 0
    assert main(['check', '3.1', str(tmp_path/'a.ipynb')]) == 2 and 'line 1: invalid syntax: retrun 1' in capsys.readouterr().err
    (tmp_path/'b.ipynb').write_text('[]')
    assert main(['check', '3.1', str(tmp_path/'b.ipynb')]) == 2 and 'is no notebook' in capsys.readouterr().err


def test_unknown_number_and_usage(tmp_path, capsys):
    assert main(['check', '3.44', str(tmp_path/'a.py')]) == 2
    assert "no exercise '3.44'; the nearest are 3.4" in capsys.readouterr().err
    for wrong in ([], ['check'], ['check', '3.2'], ['grade'], *(['check', '3.2', 'a.py', '--seconds', s] for s in ('0', '-1', 'nan', 'inf', 'x'))):
        with pytest.raises(SystemExit) as stop: main(wrong)
        assert stop.value.code == 2
    assert 'usage: llmbook' in capsys.readouterr().err


def test_a_console_that_knows_only_ascii(tmp_path):
    Path(tmp_path/'a.py').write_text('def pieces(tokenizer, text): return ["\u00e9"]\n', encoding='utf-8')
    done = python('-c', 'import sys; from llmbook.checking import main; sys.exit(main())', 'check', '3.1', tmp_path/'a.py', env={**os.environ, 'PYTHONIOENCODING': 'ascii', 'PYTHONUTF8': '0'})
    assert done.returncode == 1 and '\\xe9' in done.stdout

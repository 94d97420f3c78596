"Every command through `main`, and as a process: help, settings, mistakes, Ctrl-C, pipes, and the whole way with an installed wheel."
import contextlib, dataclasses, io, json, math, os, re, shutil, signal, subprocess, sys, venv
from pathlib import Path

import pytest
import torch
from fastcore.docments import docments
from hypothesis import given, strategies as st
from llmbook import cli, pretrain as pretrain_module
from llmbook.bpe import END_OF_TEXT, BPETokenizer
from llmbook.checkpoint import CheckpointError, Checkpoints
from llmbook.cli import COMMANDS, Doctor, Evaluate, Generate, Info, Resume, Tokenize, main
from llmbook.core import load_text
from llmbook.data import TokenFile
from llmbook.generate import stream
from llmbook.gpt import GPT, GPTConfig
from llmbook.open_weights import save_gpt2
from llmbook.pretrain import PretrainConfig, Run, load_pretrained, save_model, score
from safetensors.torch import save_file

ROOT = Path(__file__).parent.parent
posix = pytest.mark.skipif(os.name == 'nt', reason='signals of POSIX')
CLASSES = {'resume': Resume, 'generate': Generate, 'evaluate': Evaluate, 'info': Info, 'doctor': Doctor, 'tokenize': Tokenize, 'pretrain': cli._pretrain_class()}
SMALL = dict(n_layer=1, n_head=2, n_embd=16, context_length=16, tokenizer='300', max_steps=12, evaluate_every=4, save_every=4, sample_tokens=0, threads=1)
FLAGS = [part for name, value in SMALL.items() for part in (f"--{name.replace('_', '-')}", str(value))]
ENV = {**os.environ, 'PYTHONPATH': str(ROOT), 'OMP_NUM_THREADS': '1', 'PYTHONUTF8': '1', 'COLUMNS': '79'}
ENV.pop('RANK', None)

pytestmark = pytest.mark.usefixtures('one_thread')


@pytest.fixture(scope='module')
def home(tmp_path_factory):
    "A folder with a text, a run, and ids; nobody changes them."
    home, before = tmp_path_factory.mktemp('home'), os.getcwd()
    text = load_text('the-verdict').encode()
    (home/'story.txt').write_bytes(text[:6000])
    (home/'other.txt').write_bytes(text[6000:7000])
    (home/'empty.txt').touch()
    (home/'latin.txt').write_bytes('café au lait'.encode('latin-1'))
    (home/'wide.txt').write_bytes('café au lait'.encode('utf-16'))
    for name in ('nothing', 'texts/deep'): (home/name).mkdir(parents=True)
    (home/'texts/a.txt').write_bytes(text[:1000])
    (home/'texts/deep/b.txt').write_bytes(text[1000:3000])
    os.chdir(home)
    with contextlib.redirect_stdout(io.StringIO()):
        assert main(['pretrain', 'story.txt', *FLAGS, '--out', 'run']) == 0
        assert main(['tokenize', 'story.txt', '--tokenizer', 'run/tokenizer.json', '--out', 'story.ids']) == 0
    os.chdir(before)
    return home


@pytest.fixture
def there(home, monkeypatch, capsys):
    "Run a command line in that folder: exit code, output, errors."
    monkeypatch.chdir(home)
    monkeypatch.setenv('COLUMNS', '79')
    def run(*argv):
        code = main([*map(str, argv)])
        return code, *capsys.readouterr()
    return run


def process(*argv, cwd, **more):
    return subprocess.Popen([sys.executable, '-m', 'llmbook', *map(str, argv)], cwd=cwd, env=ENV, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **more)


def copied(home, tmp_path, name='run'): return Path(shutil.copytree(home/name, tmp_path/name))


# ---- help

def words(text): return ' '.join(re.sub('[│╭╮╰╯─|]', ' ', text).split())


@pytest.mark.parametrize('name', CLASSES)
def test_help_is_complete_and_fits(name, there):
    code, out, err = there(name, '--help')
    assert (code, err) == (0, '') and 'None}' not in out and max(map(len, out.splitlines()[1:])) <= 80
    assert COMMANDS[name] in words(out) and ('examples:' in out) == (name != 'doctor')
    kinds = [CLASSES[name]] + [PretrainConfig] * (name == 'pretrain')
    for kind in kinds:
        for key, doc in docments(kind, full=True, returns=False).items():
            if doc.docment is None: continue      # of PretrainConfig, which has its own turn
            assert words(doc.docment) in words(out), key
            assert f"--{key.replace('_', '-')}" in out or f"[{key.replace('_', '-').upper()}]" in out or key.replace('_', '-').upper() in out, key
    assert "(default: '\\n')" in out or name not in ('generate', 'pretrain')


@pytest.mark.parametrize('name', CLASSES)
def test_every_example_in_a_help_text_can_be_read(name, monkeypatch):
    "The flags that the examples use exist."
    lines = cli._EXAMPLES.get(name, '').splitlines()
    for line in lines:
        line = line.partition('   ')[0].partition(' < ')[0]
        command, *argv = line.split('llmbook ')[-1].split()
        if '"It' in argv: argv = ['runs/novel', '--prompt', 'It was', '--seed', '7']
        if '--config' in argv: continue
        kind = CLASSES[command]
        cli._parse(kind, command, argv)


def test_what_settings_say_is_a_sentence_from_a_flag_too(there):
    for flags, told in (('--held-out 2', 'give a share between 0'), ('--n-embd 130', 'try n_embd=128'), ('--betas 1 2', 'betas[0]=1.0'), ('--seed -1', 'seed=-1')):
        code, out, err = there('pretrain', *flags.split())
        assert (code, out) == (2, '') and err.startswith('llmbook: ') and told in err and err.count('\n') == 1


def test_a_dash_first_and_a_text_at_least(there):
    assert there('generate', 'run', '--prompt=-x', '--max-new-tokens', '0')[:2] == (0, '-x\n')
    out = there('tokenize', '--help')[1]
    assert 'FILES' in out and 'one at least' in out


def test_overview(there):
    for argv in ([], ['--help'], ['-h'], ['help']):
        code, out, _ = there(*argv)
        assert code == 0 and max(map(len, out.splitlines())) <= 79
        assert all(f'  {name:10} {what}' in out for name, what in COMMANDS.items()) and 'exit codes' in out
    assert there('--version') == there('-V') == (0, 'llmbook 0.1.0\n', '')
    assert there('help', 'info') == there('info', '--help')
    assert set(COMMANDS) == {*CLASSES, 'check', 'exercises'}


def test_help_is_quick():
    "Help costs no import of PyTorch; only that of `pretrain`, whose settings lie beside the training, does."
    code = "import sys; from llmbook.cli import main; [main(a) for a in (['--help'], ['--version'], ['nonsense'], ['generate', '--help'], ['info', '--help'], ['doctor', '--no'])]; sys.exit(len({'torch', 'numpy', 'matplotlib', 'regex'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, '-c', code], env=ENV, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_python_m_llmbook_and_a_console_without_unicode(tmp_path):
    (tmp_path/'é🍵.ids').touch()
    done = subprocess.run([sys.executable, '-m', 'llmbook', 'info', '.'], cwd=tmp_path, env={**ENV, 'PYTHONUTF8': '0', 'PYTHONIOENCODING': 'ascii'}, capture_output=True)
    assert (done.returncode, done.stderr) == (0, b'') and b'\\xe9\\U0001f375.ids: ids' in done.stdout


# ---- settings

@pytest.fixture
def asked(monkeypatch):
    "What `pretrain` would do, instead of doing it."
    seen = []
    class Done: finished = True
    monkeypatch.setattr(pretrain_module, 'pretrain', lambda settings, overwrite: seen.append((settings, overwrite)) or Done)
    return seen


@pytest.mark.parametrize('toml, flags, wanted', [
    (None, '', {}),
    (None, 'a.txt b.txt --seed 7 --no-bias --compile', dict(text=('a.txt', 'b.txt'), seed=7, bias=False, compile=True)),
    (None, '--out x --seed 3 --betas 0.8 0.9 --threads 2', dict(out='x', seed=3, betas=(0.8, 0.9), threads=2)),
    ('seed = 7\ntext = "a.txt"\nbetas = [0.8, 0.9]', '', dict(seed=7, text=('a.txt',), betas=(0.8, 0.9))),
    ('seed = 7\ntext = ["a.txt", "b.txt"]', 'c.txt --seed 8', dict(seed=8, text=('c.txt',))),
    ('n_embd = 60\nn_head = 5', '--n-embd 65', dict(n_embd=65, n_head=5)),
    ('tokenizer = 512\ncompile = true\nbias = false', '--no-compile', dict(tokenizer='512', bias=False)),
    ('tokenizer = 512\nthreads = 2\nwarmup_steps = 3', '--tokenizer bytes --threads None', dict(tokenizer='bytes', warmup_steps=3)),
    ('learning_rate = 1', '--precision bfloat16', dict(learning_rate=1, precision='bfloat16')),
    ('', '', {}),
])
def test_flags_win_over_the_file_and_the_file_over_the_defaults(toml, flags, wanted, there, asked, tmp_path):
    for config in (['--config', tmp_path/'c.toml'], [f'--config={tmp_path/"c.toml"}']) if toml is not None else ([],):
        if toml is not None: (tmp_path/'c.toml').write_text(toml, encoding='utf-8')
        assert there('pretrain', *flags.split(), *config)[0] == 0
        settings, overwrite = asked.pop()
        assert settings == PretrainConfig(**wanted) and overwrite is False
    assert there('pretrain', '--overwrite')[0] == 0 and asked.pop()[1] is True


def test_the_command_in_a_report_does_the_same_again(home, there, asked):
    run = Run(home/'run')
    import shlex
    llmbook, *argv = shlex.split(run.facts['command'])
    assert llmbook == 'llmbook' and there(*argv)[0] == 0
    assert asked.pop()[0] == run.config


# ---- mistakes

MISTAKES = {      # what is typed, what is said
    'pretian': "there is no command 'pretian'; did you mean 'pretrain'?",
    'zzz': 'there are pretrain, resume, generate, evaluate, info, doctor, tokenize, check, exercises',
    'pretrain --lerning-rate 1': '--learning-rate FLOAT',
    'generate --top-q 1': 'Perhaps you meant',
    'pretrain --n-layer two': "'two' is not a whole number",
    'pretrain --learning-rate fast': "'fast' is not a number",
    'pretrain --held-out 2': 'give a share between 0',
    'pretrain --n-embd 130': 'try n_embd=128',
    'pretrain --precision float16': 'bfloat16',
    'pretrain --config': 'Missing value',
    'pretrain none.txt': 'there is no file or folder none.txt',
    'pretrain empty.txt': 'there is no text to learn from: empty.txt is empty',
    'pretrain empty.txt empty.txt --out x': 'and so are the others',
    'pretrain nothing': 'the folder nothing has no .txt file',
    'pretrain latin.txt': 'latin.txt is not UTF-8: byte 0xe9 at 3',
    'pretrain wide.txt': 'If it is UTF-16, convert it',
    'pretrain story.txt --out x --context-length 9000': 'context_length=9000 is longer than the training part of the text',
    'pretrain story.txt --out run': 'run holds a run already. llmbook resume run goes on with it; --out takes another folder; --overwrite deletes it',
    'pretrain story.txt --out texts': 'texts is there, and is no run',
    'pretrain story.txt --out story.ids': 'story.ids is there, and is no run',
    'pretrain story.txt --out x --tokenizer none': "tokenizer='none' is no file, and no tokenizer that is known",
    'pretrain story.txt --out x --tokenizer 20': 'vocab_size=20 is too small',
    'pretrain story.txt --out x --tokenizer bytes --n-layer 1 --device abacus': 'abacus',
    'pretrain story.txt --out x --tokenizer bytes --n-layer 1 --batch-size 0': 'batch_size=0',
    'pretrain story.txt --out x --tokenizer bytes --n-layer 1 --keep 0': 'keep=0',
    'resume': 'RUN-FOLDER',
    'resume nix': 'nix is no run: it has no config.toml. In . there are run',
    'resume nothing': 'nothing is no run',
    'resume run --max-steps 3': 'run has done 12 steps, so max_steps=3 is too few; give 13 or more',
    'generate nix': 'nix is no run, no checkpoint and no folder with a model',
    'generate story.txt': 'story.txt is no run',
    'generate --temperature -1': 'temperature=-1.0 is not allowed',
    'generate --top-p 2': 'top_p=2.0',
    'generate --top-k 0': 'top_k=0',
    'generate --max-new-tokens -1': 'max_new_tokens=-1',
    'evaluate nix': 'nix is no run',
    'evaluate run/checkpoints/step-00000012': 'is not a run, so it held no text back; name a text',
    'evaluate run none.txt': 'there is no file or folder none.txt',
    'evaluate run empty.txt': 'empty.txt is empty',
    'evaluate run story.txt latin.txt': 'latin.txt is not UTF-8: byte 0xe9 at 3',
    'evaluate run nothing': 'the folder nothing has no .txt file',
    'evaluate shakespeare story.ids': 'story.ids was made with another tokenizer',
    'info': 'PATH',
    'info nix': 'there is no file or folder nix',
    'info nothing': 'nothing is not a run or a model, and holds none',
    'info story.txt': 'story.txt is nothing that llmbook describes',
    'info run/run.json': 'run/run.json is nothing that llmbook describes',
    'doctor --seconds 0': 'seconds=0 is not a time',
    'doctor --seconds soon': "'soon' is not a number",
    'tokenize': 'files is empty',
    'tokenize none.txt': 'there is no file or folder none.txt',
    'tokenize empty.txt --out x': 'empty.txt is empty',
    'tokenize empty.txt --tokenizer 300 --out x': 'empty.txt is empty',
    'tokenize story.txt --out no/x': 'lies in a folder that does not exist',
    'tokenize story.txt --out texts': 'is a folder; name a file in it',
    'tokenize story.txt --out story.ids': '--overwrite replaces it',
    'tokenize story.txt --out story.txt --overwrite': 'is one of the texts',
    'tokenize story.txt --tokenizer none --out x': "tokenizer='none' is no file",
    'check': 'required',
    'check 99.9 story.txt': "there is no exercise '99.9'",
}


def listing(folder): return {p.relative_to(folder): p.stat().st_mtime_ns for p in folder.rglob('*') if p.name != 'runs' and '.part' not in p.name and '.lock' not in p.name}      # `runs` may be left, with nothing in it


@pytest.mark.parametrize('line', MISTAKES)
def test_a_mistake_costs_a_sentence_and_nothing_else(line, home, there):
    before = listing(home)
    code, out, err = there(*line.split())
    assert code == 2 and re.sub(r'^learning .* tokens from .*\n', '', out) == '' and words(MISTAKES[line]) in words(err), err
    assert 'Traceback' not in err and 'should not happen' not in err
    assert err.startswith('llmbook: ') or any(part in err for part in ('Error parsing --', 'Unrecognized', 'Invalid choice', 'Missing', 'usage:'))      # of a parser
    assert listing(home) == before


@pytest.mark.parametrize('toml, told', {
    'n_layr = 1': "there is no setting 'n_layr'; did you mean 'n_layer'?",
    'learning-rate = 1': "did you mean 'learning_rate'?",
    'n_layer = "2"': "n_layer='2'",
    'n_layer = [': 'is no TOML file',
    'betas = [1]': 'betas=[1]',
    'bias = 3': 'bias=3 is no switch',
    'prompt = 3': 'prompt=3 is not allowed',
    'held_out = "half"': 'held_out',
    'held_out = 2': 'give a share between 0',
    'caf\xe9 = 1': 'is no TOML file',
}.items())
def test_mistakes_in_a_file(toml, told, there, tmp_path):
    (tmp_path/'c.toml').write_bytes(toml.encode('latin-1'))
    code, out, err = there('pretrain', '--config', tmp_path/'c.toml')
    assert (code, out) == (2, '') and told in err and 'c.toml' in err and err.count('\n') == 1, err
    code, _, err = there('pretrain', '--config', tmp_path/'nix.toml')
    assert code == 2 and err.endswith('nix.toml: No such file or directory\n')


@pytest.mark.parametrize('error, told', [
    (PermissionError(13, 'Permission denied', 'runs'), 'runs: Permission denied'), (OSError(28, 'No space left on device'), '[Errno 28] No space left on device'),
    (TypeError('n is a str'), 'n is a str'), (RuntimeError('no card'), 'no card'), (FloatingPointError('nan'), 'nan'), (MemoryError(), 'there is not enough memory'),
    (KeyError('ids'), "KeyError: 'ids'. This should not happen; LLMBOOK_TRACEBACK=1 shows where it did"), (AssertionError(), 'AssertionError: . This should not happen'),
    (UnicodeDecodeError('utf-8', b'\xff', 0, 1, 'invalid start byte'), "can't decode byte 0xff"), (CheckpointError('x is damaged'), 'x is damaged'), (ValueError(''), 'ValueError: . This should'),
])
def test_no_error_is_a_traceback_unless_it_is_wanted(error, told, there, monkeypatch):
    def fail(self): raise error
    monkeypatch.setattr(Info, 'run', fail)
    code, out, err = there('info', 'x')
    assert (code, out) == (2, '') and err.startswith('llmbook: ') and told in err and err.count('\n') == 1
    monkeypatch.setenv('LLMBOOK_TRACEBACK', '1')
    with pytest.raises(type(error)): main(['info', 'x'])


def test_a_run_that_cannot_begin_leaves_nothing_and_one_that_cannot_go_on_is_as_it_was(home, there, tmp_path):
    assert there('pretrain', 'story.txt', *FLAGS, '--out', tmp_path/'x', '--device', 'abacus')[0] == 2
    assert not (tmp_path/'x').exists()
    with pytest.MonkeyPatch.context() as patch:      # what was measured is kept
        def fail(self, trainer, report):
            if trainer.step == 3: raise FloatingPointError('no number')
        patch.setattr(Checkpoints, 'after_step', fail)
        assert there('pretrain', 'story.txt', *FLAGS, '--out', tmp_path/'y')[0] == 2
    assert len(Run(tmp_path/'y').metrics()) == 4 and there('resume', tmp_path/'y')[0] == 0 and Run(tmp_path/'y').finished
    run = copied(home, tmp_path)
    before = (run/'config.toml').read_bytes()
    assert there('resume', run, '--device', 'abacus')[0] == 2 and (run/'config.toml').read_bytes() == before
    assert there('resume', run, '--max-steps', '13', '--device', 'cpu')[0] == 0 and Run(run).config.max_steps == 13 and Run(run).finished
    assert there('resume', run)[0] == 0


def test_a_checkpoint_of_another_config_names_the_field(home, there, tmp_path):
    run = copied(home, tmp_path)
    text = (run/'config.toml').read_text()
    for old, new, told in (('learning_rate = 0.004', 'learning_rate = 0.005', 'learning_rate'), ('n_layer = 1', 'n_layer = 2', 'n_layer=1, and this trainer has n_layer=2'), ('n_head = 2', 'n_head = 4', 'n_head=2')):
        assert old in text
        (run/'config.toml').write_text(text.replace(old, new))
        code, _, err = there('resume', run)
        assert code == 2 and told in err, err


# ---- pretrain, Ctrl-C, resume

def losses(folder): return [line['loss'] for line in Run(folder).metrics() if line['step']]


def test_pretrain_tells_what_comes_out(home, there, tmp_path):
    code, out, err = there('pretrain', 'texts', 'other.txt', *FLAGS, '--sample-tokens', '3', '--out', tmp_path/'x')
    assert code == 0 and err == ''
    for told in ('parameters', 'step     0, validation', 'step    12', 'tokens per second', 'perplexity', 'bits per byte', f"report: {tmp_path/'x'/'report.html'}", 'llmbook generate'): assert told in out
    assert {p.name for p in (tmp_path/'x').iterdir()} == {'config.toml', 'run.json', 'tokenizer.json', 'text.ids', 'checkpoints', 'metrics.jsonl', 'result.json', 'report.html'}
    assert len((tmp_path/'x'/'metrics.jsonl').read_text().splitlines()) == 13
    code, _, _ = there('pretrain', 'texts', *FLAGS, '--out', tmp_path/'x', '--overwrite')
    assert code == 0 and Run(tmp_path/'x').config.text == ('texts',)


def test_pretrain_alone_learns_from_shakespeare(tmp_path, monkeypatch, capsys):
    "The text and the folder are defaults; the sizes are small."
    monkeypatch.chdir(tmp_path)
    assert main(['pretrain', '--max-steps', '1', '--tokenizer', 'bytes', '--n-layer', '1', '--n-embd', '8', '--held-out', '0.001']) == 0
    out = capsys.readouterr().out
    assert 'runs/shakespeare/report.html' in out.replace('\\', '/') and Run('runs/shakespeare').facts['tokens'] > 1_100_000


@posix
def test_a_real_ctrl_c_and_resume_end_where_no_ctrl_c_ends(home, tmp_path, there):
    os.chdir(tmp_path)      # a process of its own is stopped below, with the wheel
    flags = [*FLAGS, '--max-steps', '40', '--save-every', '100']
    after = Checkpoints.after_step
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Checkpoints, 'after_step', lambda self, trainer, report: (after(self, trainer, report), trainer.step == 17 and os.kill(os.getpid(), signal.SIGINT)))
        code, out, err = there('pretrain', home/'story.txt', *flags, '--out', 'x')
    assert (code, err) == (130, '') and re.search(r'^stopped after step 17 of 40, saved as x/checkpoints/step-00000017; llmbook resume x goes on\n\Z', out, re.M)
    code, out, _ = there('info', 'x')
    assert code == 0 and '17 of 40' in out and 'to be resumed: llmbook resume x' in out and 'command:' in out and not Run('x').finished
    assert there('resume', 'x')[0] == there('pretrain', home/'story.txt', *flags, '--out', 'y')[0] == 0
    assert losses('x') == losses('y') and len(losses('x')) == 40
    a, b = (sorted(Path(name, 'checkpoints').glob('step-*'))[-1]/'model.safetensors' for name in 'xy')
    assert a.read_bytes() == b.read_bytes()
    assert json.loads(Path('x/result.json').read_text())['loss'] == json.loads(Path('y/result.json').read_text())['loss']


@posix
def test_text_comes_at_once_and_ctrl_c_gives_130_and_a_sentence(tmp_path):
    running = process('generate', '--max-new-tokens', '1000000', '--seed', '3', cwd=tmp_path)
    first = running.stdout.read(400)      # of millions
    assert running.poll() is None and len(first) == 400 and first.decode(errors='ignore').strip()
    running.send_signal(signal.SIGINT)
    _, err = running.communicate(timeout=60)
    assert running.returncode == 130 and err == b'\nllmbook: interrupted\n'


def test_ctrl_c_is_no_error_even_when_traces_are_wanted(there, monkeypatch):
    def fail(self): raise KeyboardInterrupt
    monkeypatch.setattr(Tokenize, 'run', fail)
    monkeypatch.setenv('LLMBOOK_TRACEBACK', '1')
    assert there('tokenize', 'x') == (130, '', '\nllmbook: interrupted\n')


# ---- generate

def test_the_same_seed_writes_the_same(there):
    a, b, c = (there('generate', 'run', '--max-new-tokens', '30', '--seed', s) for s in (1, 1, 2))
    assert a == b != c and a[0] == c[0] == 0 and a[2] == ''
    greedy = {there('generate', 'run', '--max-new-tokens', '30', '--temperature', '0', '--seed', s) for s in (1, 2)}
    assert len(greedy) == 1 and len({there('generate', 'run', '--top-k', '1', '--seed', s) for s in (1, 2)}) == 1
    assert there('generate', 'run', '--top-p', '0.001') == there('generate', 'run', '--top-k', '1')
    assert there('generate', 'run', '--int8', '--max-new-tokens', '5')[0] == 0


@pytest.mark.parametrize('prompt', ['A', 'the', 'é🍵', '\n', 'x' * 100, '  two\n\nlines '])
def test_what_is_written_is_what_the_model_writes(prompt, home, there):
    model, tokenizer = load_pretrained(home/'run')
    ids = tokenizer.encode_ordinary(prompt)
    end = tokenizer.special_tokens[END_OF_TEXT]
    new = [i for i in stream(model, ids, 25, seed=5, temperature=0.9, stop=end) if i != end]
    code, out, err = there('generate', 'run', '--prompt', prompt, '--max-new-tokens', '25', '--seed', '5', '--temperature', '0.9')
    assert code == 0 and out == tokenizer.decode([*ids, *new]) + '\n'
    assert bool(err) == (len(ids) > 16) and ('reads the last 16 of them' in err) == bool(err)


def test_special_tokens_and_the_empty_prompt(home, there, tmp_path, monkeypatch):
    model, tokenizer = load_pretrained(home/'run')
    end = tokenizer.special_tokens[END_OF_TEXT]
    seen = []
    import llmbook.generate as module
    def fake(model, ids, *args, **settings):
        seen.append((ids, settings['stop']))
        return iter([104, 105, end])
    monkeypatch.setattr(module, 'stream', fake)
    assert there('generate', 'run', '--prompt', f'a{END_OF_TEXT}b')[:2] == (0, f'a{END_OF_TEXT}bhi\n')
    assert there('generate', 'run', '--prompt', '')[:2] == (0, 'hi\n')
    assert seen == [([97, end, 98], end), ([end], end)]
    save_model(tmp_path/'m', GPT(dataclasses.replace(model.config, vocab_size=299)), BPETokenizer(tokenizer.merges, special_tokens=()))
    code, _, err = there('generate', tmp_path/'m', '--prompt', '')
    assert code == 2 and 'the prompt is empty' in err
    monkeypatch.setattr(module, 'stream', lambda model, ids, *args, **settings: seen.append((ids, settings['stop'])) or iter([104]))
    assert there('generate', tmp_path/'m', '--prompt', 'a')[:2] == (0, 'ah\n') and seen[-1] == ([97], ())


def test_a_prompt_from_a_pipe_and_bytes_that_are_no_text(home, there, monkeypatch):
    for data, code in (('É war\n'.encode(), 0), (b'', 0), (b'a\xff', 2)):
        monkeypatch.setattr(sys, 'stdin', io.TextIOWrapper(io.BytesIO(data), encoding='ascii'))
        done, out, err = there('generate', 'run', '--prompt', '-', '--max-new-tokens', '0')
        assert done == code and (out == data.decode() + '\n' if not code else 'piped in is not UTF-8' in err)
    monkeypatch.setattr(sys, 'stdin', io.StringIO('plain'))
    assert there('generate', 'run', '--prompt', '-', '--max-new-tokens', '0')[1] == 'plain\n'
    code, _, err = there('generate', 'run', '--prompt', 'a\udcff')
    assert code == 2 and '--prompt holds bytes that are not UTF-8' in err


@given(st.binary(max_size=30), st.lists(st.integers(0, 30)))
def test_streams_never_split_a_character(data, cuts):
    places = [0, *sorted(cuts), len(data)]
    pieces = [*cli._whole_characters(data[a:b] for a, b in zip(places, places[1:]))]
    assert ''.join(pieces) == data[places[0]:].decode('utf-8', 'replace') or max(cuts, default=0) > len(data)


@given(st.text(max_size=12))
def test_streams_of_text_hold_no_sign_for_what_is_broken(text):
    pieces = [*cli._whole_characters(bytes([b]) for b in text.encode())]
    assert ''.join(pieces) == text and all(len(piece) <= 1 for piece in pieces)


@given(st.text(max_size=20))
def test_a_terminal_obeys_nothing_that_a_model_writes(text):
    shown = cli._harmless(text)
    assert len(shown) == len(text) and all(a == b or b == '\ufffd' for a, b in zip(text, shown))
    import unicodedata
    assert not [c for c in shown if unicodedata.category(c) == 'Cc' and c not in '\n\t']


def test_control_characters_reach_a_pipe_and_no_terminal(there, monkeypatch):
    import llmbook.generate as module
    monkeypatch.setattr(module, 'stream', lambda *args, **settings: iter([104, 27, 105]))
    assert there('generate', 'run', '--prompt', '\x1b')[1] == '\x1bh\x1bi\n'
    monkeypatch.setattr(sys.stdout, 'isatty', lambda: True)
    assert there('generate', 'run', '--prompt', '\x1b')[1] == '\ufffdh\ufffdi\n'


@posix
@pytest.mark.parametrize('argv', [['generate', '--max-new-tokens', '3000'], ['generate', '--help'], ['--help']])
def test_a_reader_that_goes_is_no_error(argv, tmp_path):
    running = process(*argv, cwd=tmp_path)
    if argv[0] == 'generate' and len(argv) > 2: running.stdout.read(5)
    running.stdout.close()
    err = running.stderr.read()
    assert running.wait() == 141 and err == b''


def test_models_come_from_runs_checkpoints_folders_and_publishers(home, there, tmp_path):
    from llmbook.bpe import gpt2_tokenizer
    model, tokenizer = load_pretrained(home/'run')
    save_model(tmp_path/'own', model, tokenizer)
    best = Run(home/'run').checkpoints().best
    wanted = there('generate', 'run')
    assert wanted[0] == 0 and wanted == there('generate', best) == there('generate', tmp_path/'own')
    assert there('generate')[:2] == there('generate', 'shakespeare')[:2] != wanted[:2]
    torch.manual_seed(3)
    gpt2 = GPT(GPTConfig(50257, 16, 2, 2, 8))
    save_gpt2(tmp_path/'gpt2', gpt2, gpt2_tokenizer())
    code, out, _ = there('generate', tmp_path/'gpt2', '--prompt', 'Hello', '--max-new-tokens', '9')
    ids = gpt2_tokenizer().encode('Hello')
    assert code == 0 and out == gpt2_tokenizer().decode([*ids, *stream(gpt2, ids, 9, temperature=0.8, stop=50256)]) + '\n'
    code, out, _ = there('info', tmp_path/'gpt2')
    assert code == 0 and re.search('model_type: +gpt2', out) and 'transformer.h.1.mlp.c_fc.weight' in out and '8 × 32' in out


SPOILED = {      # a file of a model's folder, what is done to it, what is said
    'cut weights': ('model.safetensors', lambda data: data[:50], 'model.safetensors is damaged'),
    'no JSON': ('config.json', lambda data: data[:9], 'config.json is damaged'),
    'other sizes': ('config.json', lambda data: data.replace(b'"n_layer": 1', b'"n_layer": 2'), 'is missing there'),
    'no sizes': ('config.json', lambda data: b'{}', 'is of another kind of model'),
    'a list': ('config.json', lambda data: b'[]', 'is of another kind of model'),
    'a GPT-2 that is none': ('config.json', lambda data: b'{"model_type": "gpt2"}', "does not say 'n_embd'"),
    'another tokenizer': ('tokenizer.json', lambda data: BPETokenizer([]).save('bytes.json') or Path('bytes.json').read_bytes(), 'the tokenizer has 257 ids, and the model 300'),
    'no tokenizer': ('tokenizer.json', lambda data: b'{}', 'no tokenizer file'),
}


@pytest.mark.parametrize('name', SPOILED)
def test_a_spoiled_model_is_refused(name, home, there, tmp_path, monkeypatch):
    file, spoil, told = SPOILED[name]
    save_model(tmp_path/'m', *load_pretrained(home/'run'))
    monkeypatch.chdir(tmp_path)
    (tmp_path/'m'/file).write_bytes(spoil((tmp_path/'m'/file).read_bytes()))
    for command in (['generate'], ['evaluate']):
        code, out, err = there(*command, tmp_path/'m', *([home/'story.txt'] if command == ['evaluate'] else []))
        assert (code, out) == (2, '') and told in err and err.count('\n') == 1 and 'should not' not in err


# ---- evaluate

def test_evaluate_tells_what_score_tells(home, there):
    model, tokenizer = load_pretrained(home/'run')
    whole = score(model, tokenizer, Run(home/'run').parts()[1], 16)
    code, out, _ = there('evaluate', 'run', '--json')
    assert code == 0 and out.count('\n') == 1 and json.loads(out) == pytest.approx(whole, rel=1e-12)
    code, out, _ = there('evaluate', 'run')
    assert code == 0 and [line.split(':')[0] for line in out.splitlines()] == ['loss', 'perplexity', 'bits per byte', 'nats per byte', 'tokens', 'bytes']
    assert f"{whole['loss']:.4f}" in out and f"{whole['tokens']:,}" in out
    assert json.loads((home/'run'/'result.json').read_text())['loss'] == pytest.approx(whole['loss'], rel=1e-12)


def test_several_texts_weigh_by_their_tokens(home, there):
    def numbers(*texts):
        code, out, err = there('evaluate', 'run', *texts, '--json')
        assert code == 0, err
        return json.loads(out)
    parts = [numbers('texts/a.txt'), numbers('texts/deep/b.txt'), numbers('other.txt')]
    every = numbers('texts', 'other.txt')
    tokens, size = (sum(p[k] for p in parts) for k in ('tokens', 'bytes'))
    loss = sum(p['loss'] * p['tokens'] for p in parts) / tokens
    assert (every['tokens'], every['bytes']) == (tokens, size)
    assert every['loss'] == pytest.approx(loss) and every['perplexity'] == pytest.approx(math.exp(loss))
    assert every['nats_per_byte'] == pytest.approx(loss * tokens / size) and every['bits_per_byte'] == pytest.approx(loss * tokens / size / math.log(2))
    assert numbers('story.ids')['tokens'] == numbers('story.txt')['tokens'] + 1      # the mark at its end


def test_the_model_that_comes_along_is_as_good_as_it_says(there):
    said = json.loads((ROOT/'llmbook/assets/shakespeare-model/result.json').read_text())
    code, out, _ = there('evaluate', '--json')
    found = json.loads(out)
    assert code == 0 and (found['tokens'], found['bytes']) == (said['tokens'], said['bytes'])
    assert found['loss'] == pytest.approx(said['loss'], rel=1e-3)


def test_a_text_of_one_token_is_too_short(there, tmp_path):
    (tmp_path/'a.txt').write_text('a')
    code, _, err = there('evaluate', 'run', tmp_path/'a.txt')
    assert code == 2 and 'too short: a guess needs two tokens' in err


# ---- info

def test_info_on_all_that_is_written(home, there, tmp_path):
    step = 'run/checkpoints/step-00000012'
    said = {'run': ('run, finished', '12 of 12', 'step-00000012', 'validation loss', 'llmbook pretrain story.txt --out run'),
            step: ('checkpoint, whole', '12', 'n_layer', 'F32', '300 × 16'), f'{step}/model.safetensors': ('weights', 'F32', 'final_norm.bias', '16'),
            f'{step}/training.safetensors': ('weights', 'I64', 'one number'), 'story.ids': ('token ids, whole', '300', '16 bits each', TokenFile(home/'story.ids').sha256),
            'run/tokenizer.json': ('tokenizer', '300', END_OF_TEXT), '.': ('folder', 'run:', 'story.ids:'), '..': (f'{home.name}/run:',), 'shakespeare': ('model', 'n_layer', 'token_embedding.weight'), 'run/checkpoints': ('step-00000012', 'checkpoint')}
    for path, parts in said.items():
        code, out, err = there('info', path)
        assert code == 0 and err == '' and all(part in out for part in parts), out
    n = sum(p.numel() for p in load_pretrained(home/'run')[0].parameters())
    assert f'{n:,}' in there('info', f'{step}/model.safetensors')[1]


def test_info_on_a_run_that_has_not_begun_and_on_one_that_is_damaged(home, there, tmp_path):
    run = copied(home, tmp_path)
    with open(run/'metrics.jsonl', 'a') as file: file.write('{"step": 13, "lo')      # a crash, in the middle of a line
    code, out, _ = there('info', run)
    assert code == 0 and '12 of 12' in out
    last = run/'checkpoints'/'step-00000012'
    with open(last/'model.safetensors', 'ab') as file: file.write(b'x')
    code, out, _ = there('info', run)
    assert code == 0 and 'step-00000012 (damaged)' in out and re.search(r'best: +unknown', out)
    for command in ('info', 'generate'):
        code, _, err = there(command, last)
        assert code == 2 and 'model.safetensors is not what was written' in err
    assert 'The one before it is whole' in there('generate', run)[2]
    shutil.rmtree(run/'checkpoints')
    (run/'metrics.jsonl').unlink()
    code, out, _ = there('info', run)
    assert code == 0 and '0 of 12' in out and 'none yet' in out and 'not measured yet' in out and 'to be resumed' in out
    code, _, err = there('generate', run)
    assert code == 2 and 'has no checkpoint yet; llmbook resume' in err
    (run/'run.json').write_text('{')
    assert 'run.json is damaged' in there('info', run)[2]
    (run/'run.json').unlink()
    assert 'run.json: No such file' in there('info', run)[2]


@pytest.mark.parametrize('spoil, told', [(lambda data: data[:2000], 'is cut short'), (lambda data: data[:-1] + b'\xff', 'is damaged'), (lambda data: data[:500], 'cut short, in its header')])
def test_info_on_ids_that_are_damaged(spoil, told, home, there, tmp_path):
    (tmp_path/'x.ids').write_bytes(spoil((home/'story.ids').read_bytes()))
    code, _, err = there('info', tmp_path/'x.ids')
    assert code == 2 and told in err


def test_info_on_weights_of_others(there, tmp_path):
    save_file({'a': torch.ones(2, 3, dtype=torch.bfloat16), 'b.c': torch.ones(5, dtype=torch.int8), 'd': torch.tensor(1.0)}, tmp_path/'x.safetensors')
    code, out, _ = there('info', tmp_path/'x.safetensors')
    assert code == 0 and 'BF16, F32, I8' in out and re.search(r'numbers: 12\n', out) and 'a:   2 × 3' in out and 'd:   one number' in out
    (tmp_path/'x.safetensors').write_bytes(b'nothing of the kind')
    code, _, err = there('info', tmp_path/'x.safetensors')
    assert code == 2 and 'is damaged, or no .safetensors file' in err


# ---- doctor

@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(pretrain_module, '_compile_fault', lambda kind: None)      # the true one takes seconds
    monkeypatch.setattr(cli, '_allocators', dict)                                  # and so does trying them; the page does it


def test_each_number_of_threads_has_its_turn(monkeypatch):
    before, seen = torch.get_num_threads(), []
    monkeypatch.setattr(cli, '_trainer', lambda device: None)
    monkeypatch.setattr(cli, '_speed', lambda trainer, seconds: seen.append((torch.get_num_threads(), seconds)) or 7.0)
    assert cli._speeds(torch.device('cpu'), 1.0, before + 1) == {before: 7.0, before + 1: 7.0} and torch.get_num_threads() == before
    assert seen == [(before, 0.5), (before + 1, 0.5)] and cli._speeds(torch.device('cuda'), 1.0, 9) == {before: 7.0}


def test_doctor(there, quick, monkeypatch):
    monkeypatch.setattr(cli, '_cores', lambda: 1)
    code, out, err = there('doctor', '--seconds', '0.3')
    assert code == 0 and err == ''
    for told in (f'torch {torch.__version__}', 'GiB', 'cpu:        computes right', 'bfloat16:', 'compile:    works', 'ends the same' if not torch.cuda.is_available() else 'as on the CPU', 'tokens per second', 'with 1 thread', 'what to do:'):
        assert told in out, out


def test_doctor_says_what_is_wrong_and_what_to_do(there, quick, monkeypatch):
    import llmbook.core as core
    monkeypatch.setattr(cli, '_speeds', lambda device, seconds, cores: {2: 1000.0, 1: 1200.0})
    code, out, _ = there('doctor')
    assert code == 0 and '--threads 1 is faster here' in out and '1,000 tokens per second on cpu with 2 threads, as now' in out
    config = PretrainConfig()
    assert f'{config.max_steps * config.batch_size * config.context_length / 60000:.1f} minutes' in out
    monkeypatch.setattr(cli, '_speeds', lambda device, seconds, cores: {2: 1000.0, 1: 1050.0})
    assert re.search('what to do: nothing$', there('doctor')[1].strip())
    monkeypatch.setattr(cli, '_inexact', lambda device: 'the losses are [1], and [2] the second time')
    code, out, _ = there('doctor')
    assert code == 1 and 'do not trust results of this machine' in out
    monkeypatch.setattr(cli, '_inexact', lambda device: None)
    monkeypatch.setattr(core, 'device_fault', lambda device: 'adds wrongly' if str(device) == 'cpu' else None)
    code, out, _ = there('doctor')
    assert code == 1 and 'cpu adds wrongly: install PyTorch and the driver anew' in out
    monkeypatch.setattr(shutil, 'disk_usage', lambda path: type('Usage', (), {'free': 1000}))
    assert 'make room on the disk' in there('doctor')[1]


def test_doctor_advises_an_allocator_that_is_clearly_faster(there, quick, monkeypatch):
    monkeypatch.setattr(cli, '_speeds', lambda device, seconds, cores: {2: 1000.0})
    monkeypatch.setattr(cli, '_allocators', lambda: {'keep': {'A': '1', 'B': '2'}, 'other': {'C': '3'}})
    monkeypatch.delenv('LD_PRELOAD', raising=False)
    monkeypatch.setattr(cli, '_with_allocators', lambda seconds, choices: {'': 100.0, 'keep': 106.0, 'other': 90.0})
    out = there('doctor')[1]
    assert '100 tokens per second of a larger model, as now' in out and 'is quicker; start with A=1 B=2' in out
    monkeypatch.setattr(cli, '_with_allocators', lambda seconds, choices: {'': 100.0, 'keep': 104.0, 'other': 90.0})
    assert re.search('what to do: nothing$', there('doctor')[1].strip())
    monkeypatch.setenv('LD_PRELOAD', 'libjemalloc.so.2')      # someone has chosen already
    monkeypatch.setattr(cli, '_with_allocators', None)
    assert 'larger model' not in there('doctor')[1]


def test_allocators_are_tried_in_processes_that_start_with_them(monkeypatch):
    speeds, seen = iter(['90', '120', 'x', '100']), []
    def run(command, env, **more):
        seen.append(env.get('LLMBOOK_TRY'))
        said = next(speeds)
        return subprocess.CompletedProcess(command, said == 'x', said, '')
    monkeypatch.setattr(subprocess, 'run', run)
    found = cli._with_allocators(0.1, {'a': {'LLMBOOK_TRY': 'a'}, 'broken': {'LLMBOOK_TRY': 'b'}})
    assert found == {'': 100.0, 'a': 120.0, 'broken': 0.0} and seen == [None, 'a', 'b', None]      # what is now, before and after: the quicker counts
    if sys.platform.startswith('linux'): assert all(variables for variables in cli._allocators().values())
    monkeypatch.setattr(sys, 'platform', 'win32')
    assert cli._allocators() == {}


def test_exactness_is_judged_by_what_must_be_equal(monkeypatch):
    class Fake:
        def __init__(self, losses): self.losses = iter(losses)
        def update(self): return next(self.losses)
    def judge(kind, *losses):
        parts = iter(losses)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(cli, '_trainer', lambda device: Fake(next(parts)))
            return cli._inexact(torch.device(kind))
    a, near, far = [7.0, 6.9, 6.8], [7.0, 6.9, 6.8001], [7.0, 6.9, 5.0]
    assert judge('cpu', a, a, a) is None and 'the second time' in judge('cpu', a, near, a)
    assert judge('cuda', a, near, near) is None and 'on the CPU' in judge('cuda', far, far, a)
    assert 'on the CPU' in judge('cuda', [math.nan] * 3, a, a)


# ---- tokenize

def test_ids_go_into_a_training(home, there, tmp_path):
    out = tmp_path/'x.ids'
    code, told, err = there('tokenize', 'texts', 'other.txt', '--tokenizer', '280', '--out', out)
    assert code == 0 and err == '' and 'from 3 texts with 4,000 bytes' in told and 'of 280' in told
    file, tokenizer = TokenFile(out), BPETokenizer.load(f'{out}.tokenizer.json')
    file.verify()
    assert file.documents == 3 and tokenizer.vocab_size == 280
    assert tokenizer.decode(file.ids.tolist()) == ''.join((home/name).read_text(encoding='utf-8') + END_OF_TEXT for name in ('texts/a.txt', 'texts/deep/b.txt', 'other.txt'))
    code, _, err = there('pretrain', out, *FLAGS, '--tokenizer', '300', '--out', tmp_path/'run')
    assert code == 2 and 'was made with a tokenizer of 280 ids; leave tokenizer=300 out' in err and not (tmp_path/'run').exists()
    assert there('pretrain', out, *FLAGS, '--tokenizer', '280', '--out', tmp_path/'run')[0] == 0
    assert Run(tmp_path/'run').tokenizer.vocab_size == 280 and not (tmp_path/'run'/'text.ids').exists()
    assert there('evaluate', tmp_path/'run', out)[0] == 0
    code, _, err = there('tokenize', 'other.txt', '--tokenizer', 'bytes', '--out', out)
    assert code == 2 and '--overwrite' in err and TokenFile(out).sha256 == file.sha256
    assert there('tokenize', 'other.txt', '--tokenizer', 'bytes', '--out', out, '--overwrite')[0] == 0
    assert TokenFile(out).vocab_size == 257 and BPETokenizer.load(f'{out}.tokenizer.json').vocab_size == 257
    code, told, _ = there('tokenize', 'other.txt', '--out', tmp_path/'gpt2.ids')
    assert code == 0 and 'of 50,257, from 1 text with 1,000 bytes' in told


def test_what_is_left_of_a_tokenization_is_told(there, tmp_path):
    code, _, err = there('tokenize', 'story.txt', 'latin.txt', '--tokenizer', 'bytes', '--out', tmp_path/'x.ids', '--workers', '0')
    assert code == 2 and 'latin.txt is not UTF-8' in err and 'x.ids was not written' in err and 'the same call goes on from there' in err
    code, _, err = there('pretrain', 'story.txt', 'latin.txt', '--tokenizer', 'bytes', '--out', tmp_path/'x')
    assert code == 2 and 'goes on from there' not in err and not (tmp_path/'x').exists()      # here nothing is left


# ---- the exercises

def test_check_and_exercises_are_as_before(there, capsys, tmp_path):
    from llmbook.checking import main as before
    (tmp_path/'a.py').write_text('def bytes_per_token(tokenizer, text):\n    return 1.0\n')
    for argv in (['check', '3.2', f'{tmp_path}/a.py'], ['check', '77.1', f'{tmp_path}/a.py'], ['exercises'], ['exercises', f'{tmp_path}/a.py'], ['check', '--help'], ['check', '3.2', 'none.py']):
        try: code = before(argv)
        except SystemExit as end: code = end.code
        out, err = capsys.readouterr()
        assert there(*argv) == (code, out, err)


# ---- as a new user would

@posix
def test_an_installed_wheel_trains_stops_goes_on_and_writes(wheel, tmp_path):
    pip = [sys.executable, '-m', 'pip', '--quiet', '--disable-pip-version-check']
    venv.create(tmp_path/'venv')
    python = tmp_path/'venv'/'bin'/'python'
    subprocess.run([*pip, '--python', python, 'install', '--no-deps', '--no-compile', wheel], check=True, capture_output=True)
    [site] = (tmp_path/'venv').glob('lib/python*/site-packages')
    (site/'others.pth').write_text(str(Path(torch.__file__).parent.parent) + '\n')      # its requirements, but no llmbook
    env = {k: v for k, v in ENV.items() if k != 'PYTHONPATH'}
    def start(*argv): return subprocess.Popen([tmp_path/'venv'/'bin'/'llmbook', *argv], cwd=tmp_path, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    where = subprocess.run([python, '-c', 'import llmbook.cli; print(llmbook.cli.__file__)'], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert str(site) in where.stdout, where
    running = start('pretrain', *FLAGS, '--tokenizer', 'bytes', '--max-steps', '400', '--evaluate-every', '300', '--held-out', '0.01')
    for line in running.stdout:
        if line.startswith('step     0'): running.send_signal(signal.SIGINT)
    err = running.stderr.read()
    assert running.wait() == 130 and re.fullmatch(r'stopped after step \d+ of 400, saved as .*; llmbook resume runs/shakespeare goes on\n', line) and err == '', (line, err)
    for argv, told in ((['resume', 'runs/shakespeare'], 'report: runs/shakespeare/report.html'), (['generate', '--prompt', 'ROMEO:', '--max-new-tokens', '9'], 'ROMEO:')):      # what a run has made is tried above; here is the bundled model
        running = start(*argv)
        out, err = running.communicate()
        assert running.returncode == 0 and told in out, err
    assert (tmp_path/'runs/shakespeare/report.html').exists() and Run(tmp_path/'runs/shakespeare').finished


def test_a_warning_is_a_sentence_too(there, tmp_path):
    code, _, err = there('tokenize', 'other.txt', '--tokenizer', '1000', '--out', tmp_path/'x.ids')
    assert code == 0 and err.startswith('llmbook: vocab_size=1000 not reached') and err.count('\n') == 1


def test_each_token_is_on_its_way_before_the_next_is_made(there, monkeypatch):
    import llmbook.generate as module
    sent = []
    class Screen(io.StringIO):
        def flush(self): sent.append(self.getvalue())
    def slowly(*args, **settings):
        for n, i in enumerate(b'hij', 1):
            yield i
            assert sent[-1] == '?' + 'hij'[:n]
    monkeypatch.setattr(module, 'stream', slowly)
    monkeypatch.setattr(sys, 'stdout', Screen())
    assert there('generate', 'run', '--prompt', '?')[0] == 0 and sent[-1] == '?hij\n'

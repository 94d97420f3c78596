"Text in, model out: settings, the cut, the run folder, a resume that is exact, bad input that deletes nothing, and the kept model."
import json, math, os, random, shlex, shutil, signal, subprocess, sys, time
from dataclasses import asdict, fields, replace
from html import escape
from html.parser import HTMLParser
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from llmbook import pretrain as module
from llmbook.bpe import BPETokenizer
from llmbook.core import load_text, set_seed
from llmbook.data import tokenize_files
from llmbook.gpt import GPT, GPTConfig
from llmbook.loss import next_token_loss
from llmbook.pretrain import (PretrainConfig, Run, cut_by_bytes, load_pretrained, make_tokenizer, pretrain, read_config, resume, save_model, score, speed_up,
                              start_run, whole_text, write_config, write_report, write_sample)
from llmbook.schedule import WarmupCosine
from llmbook.train import TrainConfig, Trainer

pytestmark = pytest.mark.usefixtures('one_thread')
ROOT = Path(__file__).parent.parent
posix = pytest.mark.skipif(os.name == 'nt', reason='kill -9 and file modes')
STORY = load_text('the-verdict')[:6000]


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    "A folder of one's own, with a text; no waiting for the disk."
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, 'fsync', lambda handle: None)
    for name in ('RANK', 'TORCHELASTIC_RESTART_COUNT'): monkeypatch.delenv(name, raising=False)
    Path('story.txt').write_text(STORY, encoding='utf-8')
    return tmp_path


def tiny(**changes):
    return PretrainConfig(**{**dict(text='story.txt', out='run', tokenizer='bytes', context_length=8, n_layer=1, n_head=2, n_embd=16, dropout=0.1, max_steps=12,
                                    batch_size=4, evaluate_every=5, save_every=4, sample_tokens=0, device='cpu', threads=1, held_out=0.05), **changes})


def tree(folder='.'): return {str(p): p.read_bytes() if p.is_file() else None for p in sorted(Path(folder).rglob('*')) if '.lock' not in p.name}
def timeless(run): return [{k: v for k, v in line.items() if k != 'seconds'} for line in run.metrics()]
def weights(run): return {name: value for name, value in run.model().named_parameters()}
def last(run): return {p.name: p.read_bytes() for p in run.checkpoints().last.iterdir()}


def interrupt_at(step):
    "A report that presses Ctrl-C when the line of a step comes."
    def report(line):
        if line.startswith(f'step {step:5}'): signal.raise_signal(signal.SIGINT)
    return report


def refused(kind, message, function, *args, **kwargs):
    with pytest.raises(kind) as e: function(*args, **kwargs)
    assert message in str(e.value), str(e.value)


# ---- settings

share = st.floats(0.01, 0.99)
some_text = st.text(st.characters(exclude_categories=['Cs', 'Cc']), max_size=9)
CONFIGS = st.fixed_dictionaries({}, optional=dict(
    text=st.lists(some_text, max_size=3).map(tuple), out=some_text, tokenizer=st.one_of(some_text, st.integers(0, 999)), held_out=share, context_length=st.integers(1, 99),
    n_layer=st.integers(1, 9), n_embd=st.integers(1, 9).map(lambda k: 4 * k), dropout=st.floats(0, 0.9), bias=st.booleans(), max_steps=st.integers(21, 999),
    batch_size=st.integers(1, 99), accumulate=st.integers(1, 9), learning_rate=st.floats(1e-6, 1), warmup_steps=st.none() | st.integers(0, 20),
    weight_decay=st.floats(0, 1), betas=st.tuples(share, share), grad_clip=st.floats(1e-3, 9) | st.just(0) | st.none(), evaluate_every=st.integers(1, 99),
    save_every=st.integers(1, 99), keep=st.integers(1, 9), sample_tokens=st.integers(0, 9), prompt=st.text(st.characters(exclude_categories=['Cs']), min_size=1), seed=st.integers(0, 2**32 - 1),
    device=st.none() | st.just('cpu'), threads=st.none() | st.integers(1, 9), workers=st.integers(0, 3), precision=st.sampled_from(['float32', 'bfloat16']),
    compile=st.booleans(), shard=st.booleans(), tensorboard=st.booleans()))


@settings(max_examples=150)
@given(CONFIGS)
def test_settings_come_back_from_toml(given):
    config = PretrainConfig(**given)
    write_config('c.toml', config)
    back = read_config('c.toml')
    assert back == config and back.training == config.training and back.schedule == config.schedule and back.model(9) == config.model(9)
    assert PretrainConfig(**config.changed()) == config
    assert not Path('c.toml.part').exists()


@settings(max_examples=60)
@given(CONFIGS)
def test_the_command_does_it_again(given):
    "What a report says is what the command line understands."
    import tyro
    config = PretrainConfig(**{k: v for k, v in given.items() if k not in ('text', 'out', 'prompt', 'tokenizer')})
    flags = shlex.split(module._command(['pretrain'], config.changed()))[2:]
    assert tyro.cli(PretrainConfig, args=flags) == config


def test_defaults():
    c = PretrainConfig()
    assert not c.changed() and c.text == () and c.out is None and c.device is None
    assert c.schedule(c.max_steps - 1) == 0 and max(map(c.schedule, range(c.max_steps))) == c.learning_rate
    assert (c.precision, c.compile, c.shard, c.tensorboard) == ('float32', False, False, False)
    assert c.training == TrainConfig(c.max_steps, c.learning_rate, c.weight_decay, c.betas, c.grad_clip, c.accumulate, c.evaluate_every)
    assert c.schedule == WarmupCosine(c.max_steps, c.learning_rate, c.max_steps // 20, c.min_learning_rate)
    assert c.model(7) == GPTConfig(7, c.context_length, c.n_layer, c.n_head, c.n_embd, c.dropout, c.bias)
    for f in fields(c): assert f.default == getattr(c, f.name), f.name
    assert PretrainConfig(max_steps=1).schedule(0) == c.learning_rate
    assert PretrainConfig(Path('a.txt'), out=Path('b')) == PretrainConfig(('a.txt',), out='b')


WRONG = {'batch_size=0': dict(batch_size=0), 'keep=0': dict(keep=0), 'save_every=0': dict(save_every=0), 'evaluate_every=0': dict(evaluate_every=0), 'workers=-1': dict(workers=-1),
         'sample_tokens=-1': dict(sample_tokens=-1), 'seed=-1': dict(seed=-1), 'seed=4294967296': dict(seed=2**32), 'held_out=0.0': dict(held_out=0.0), 'held_out=1': dict(held_out=1),
         'held_out=nan': dict(held_out=math.nan), "held_out='a tenth'": dict(held_out='a tenth'), 'text=5': dict(text=5), 'text=(5,)': dict(text=(5,)), 'out=5': dict(out=5),
         'device=0': dict(device=0), 'threads=0': dict(threads=0), "compile='no'": dict(compile='no'), 'shard=1': dict(shard=1), 'tensorboard=None': dict(tensorboard=None),
         "precision='half'": dict(precision='half'), "prompt=''": dict(prompt=''), 'prompt=None': dict(prompt=None), 'betas=0.9': dict(betas=0.9), 'dropout=1': dict(dropout=1.0),
         'bias=None': dict(bias=None), 'grad_clip=-1': dict(grad_clip=-1), 'min_learning_rate=1': dict(min_learning_rate=1), 'n_embd=10': dict(n_embd=10),
         'warmup_steps=9 leaves': dict(warmup_steps=9, max_steps=9), 'max_steps=2.5': dict(max_steps=2.5), 'learning_rate=0': dict(learning_rate=0), 'n_layer=0': dict(n_layer=0)}


@pytest.mark.parametrize('message', WRONG)
def test_wrong_settings_are_refused_at_once(message): refused((TypeError, ValueError), message, PretrainConfig, **WRONG[message])


@pytest.mark.parametrize('line, message', [
    ('max-steps = 5', "c.toml: there is no setting 'max-steps'; did you mean 'max_steps'?"), ('learning_rat = 1.0', "did you mean 'learning_rate'"), ('lr = 1.0', 'there are text, out'),
    ('n_heads = 4', "did you mean 'n_head'"), ("max_steps = '5'", "c.toml: max_steps='5' is not a whole number"), ('compile = "yes"', 'c.toml: compile='),
    ('[model]\nn_layer = 3', "no setting 'model'"), ('max_steps = ', 'is no TOML file'), ('betas = [0.9]', 'c.toml: betas='), ('keep = true', 'c.toml: keep=True')])
def test_a_wrong_file_is_refused(line, message):
    Path('c.toml').write_text(line)
    refused(ValueError, message, read_config, 'c.toml')


def test_files_as_people_write_them():
    Path('c.toml').write_bytes('\ufefftokenizer = 300\r\ntext = "é.txt"\r\nbetas = [0.9, 0.99]\r\n'.encode())
    assert read_config('c.toml') == PretrainConfig('é.txt', tokenizer='300', betas=(0.9, 0.99))
    Path('c.toml').write_bytes('# é'.encode('latin-1'))
    refused(ValueError, 'c.toml is no TOML file', read_config, 'c.toml')
    with pytest.raises(FileNotFoundError): read_config('none.toml')


# ---- the text

LETTERS = st.text(st.characters(codec='utf-8'), min_size=1, max_size=60)


@settings(max_examples=80)
@given(st.lists(LETTERS, min_size=1, max_size=4), share, st.booleans())
def test_the_cut_is_that_of_a_plain_loop(texts, held_out, learned):
    tokenizer = BPETokenizer.train('the cat sat on the mat. é ' * 3, 270) if learned else BPETokenizer([])
    mark = tokenizer.special_tokens['<|endoftext|>']
    ids = [i for text in texts for i in [*tokenizer.encode_ordinary(text), mark]]
    lengths = [0 if i == mark else len(tokenizer.vocab[i]) for i in ids]
    left, at = int((1 - held_out) * sum(lengths)), 0
    read = 0
    while read + lengths[at] <= left:
        read += lengths[at]
        at += 1
    assert cut_by_bytes(torch.tensor(ids), tokenizer, held_out) == at
    assert module._count_bytes(torch.tensor(ids), tokenizer) == len(''.join(texts).encode())


def test_all_tokenizers_find_the_same_place(monkeypatch):
    text = STORY + ' Où est-il ? 你好。' * 30
    Path('a.txt').write_text(text, encoding='utf-8', newline='')
    Path('b.txt').write_bytes(b'end\r\n<|endoftext|> of it\r\n' * 40)
    whole = text.encode() + Path('b.txt').read_bytes()
    for name in ('bytes', '300', 'gpt2'):
        tokenizer = make_tokenizer(name, [Path('a.txt'), Path('b.txt')])
        file = tokenize_files(['a.txt', 'b.txt'], f'{name}.ids', tokenizer, workers=0)
        assert file.documents == 2
        for held_out in (0.03, 0.1, 0.5):
            cut = cut_by_bytes(file, tokenizer, held_out)
            rest = tokenizer.decode_bytes([i for i in file.ids[cut:].tolist()]) if hasattr(tokenizer, 'decode_bytes') else b''.join(
                tokenizer.vocab[i] for i in file.ids[cut:].tolist() if i not in tokenizer.special_tokens.values())
            wanted = len(whole) - int((1 - held_out) * len(whole))
            assert whole.endswith(rest) and 0 <= len(rest) - wanted < max(map(len, tokenizer.vocab)), (name, held_out)
            assert name != 'bytes' or len(rest) == wanted


def test_the_cut_reads_piece_by_piece(monkeypatch):
    ids = torch.randint(0, 256, (3 * 2**20 + 17,), generator=torch.Generator().manual_seed(1))
    for held_out in (0.001, 1 / 3, 0.9): assert cut_by_bytes(ids, BPETokenizer([]), held_out) == int((1 - held_out) * len(ids))


def test_the_tokenizer_does_not_look_at_what_is_held_back():
    Path('a.txt').write_text('the cat sat. ' * 30 + 'é')
    Path('b.txt').write_text('the dog sat. ' * 30 + 'zqxzqx' * 13)
    paths = [Path('a.txt'), Path('b.txt')]
    assert not any(b'zq' in token for token in make_tokenizer('266', paths, 0.1).vocab)
    assert any(b'zq' in token for token in make_tokenizer('272', paths, 0).vocab)
    before = make_tokenizer('264', paths, 0.6).vocab
    data = b''.join(p.read_bytes() for p in paths)
    assert before == BPETokenizer.train(data[:int(0.4 * len(data))].decode('utf-8', 'ignore'), 264).vocab


def test_that_a_tokenizer_is_learned_is_said_before():
    for text, tokenizer, wanted in (('story.txt', '1', "learning 1 tokens from story.txt"), (('story.txt', 'story.txt'), '0', 'learning 0 tokens from story.txt and others')):
        told = []
        with pytest.raises(ValueError): pretrain(tiny(text=text, tokenizer=tokenizer), report=told.append)
        assert told == [wanted]
    start_run(tiny(tokenizer='300', text='story.txt'))                          # nobody asks, nothing is said


def test_no_more_is_read_than_helps(monkeypatch):
    monkeypatch.setattr(module, '_ENOUGH', 100)
    assert make_tokenizer('262', [Path('story.txt')]).vocab == BPETokenizer.train(STORY[:100], 262).vocab


def test_tokenizers_by_name():
    assert make_tokenizer('bytes').vocab_size == 257 and make_tokenizer('gpt2').vocab_size == 50257
    BPETokenizer.train(STORY, 280).save('t.json')
    assert make_tokenizer('t.json').vocab_size == 280
    refused(ValueError, "tokenizer='gpt4' is no file", make_tokenizer, 'gpt4')
    refused(ValueError, 'vocab_size=100 is too small', make_tokenizer, '100', [Path('story.txt')])


# ---- the whole text

@settings(max_examples=80)
@given(st.integers(2, 70), st.integers(1, 20), st.integers(1, 5))
def test_each_token_is_guessed_once(n, T, B):
    batches = whole_text(torch.arange(n), T, B)
    for _ in range(2):
        seen = []
        for inputs, targets in batches:
            assert inputs.shape == targets.shape and inputs.shape[0] <= B and inputs.shape[1] <= T and inputs.dtype == torch.int64
            assert torch.equal(inputs + 1, targets)
            seen += targets.flatten().tolist()
        assert seen == list(range(1, n))
    one, two = iter(batches), iter(batches)          # two readers do not disturb each other
    assert torch.equal(next(one)[0], next(two)[0])


def test_a_text_of_one_token_is_refused():
    refused(ValueError, 'ids has 1 ids; a guess needs two', whole_text, torch.arange(1), 4)
    refused(ValueError, 'batch_size=0', whole_text, torch.arange(9), 4, 0)


@pytest.mark.parametrize('n', [9, 10, 16, 17, 18, 300])
def test_score_is_that_of_a_plain_computation(n):
    set_seed(1)
    tokenizer = BPETokenizer.train(STORY, 300)
    ids = torch.tensor(tokenizer.encode(STORY[:2000] + 'é')[:n - 1] + [299])
    model = GPT(GPTConfig(300, 8, 1, 2, 16, dropout=0.5)).double()
    found = score(model, tokenizer, ids, 8)
    assert model.training                                   # left as it was
    model.eval()
    total = sum(next_token_loss(model(ids[s:s + 8][:len(ids) - 1 - s][None]), ids[s + 1:s + 9][None]).item() * len(ids[s + 1:s + 9]) for s in range(0, n - 1, 8))
    n_bytes = sum(len(tokenizer.vocab[i]) for i in ids[1:-1].tolist())      # the mark stands for none
    assert found['bytes'] == n_bytes and math.isclose(found['nats_per_byte'], total / n_bytes, rel_tol=1e-9)
    assert found['tokens'] == n - 1 and math.isclose(found['loss'], total / (n - 1), rel_tol=1e-9)
    assert math.isclose(found['bits_per_byte'] * math.log(2), found['nats_per_byte']) and math.isclose(found['perplexity'], math.exp(found['loss']))


# ---- a run

@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    "A run that nobody has stopped."
    folder, here = tmp_path_factory.mktemp('whole'), os.getcwd()
    os.chdir(folder)
    Path('story.txt').write_text(STORY, encoding='utf-8')
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try: pretrain(tiny(), report=None)
    finally:
        os.chdir(here)
        torch.set_num_threads(threads)
    return Run(folder/'run')


def same(run, whole, name='step-00000012'):
    assert run.finished and timeless(run) == timeless(whole)
    for file in ('model.safetensors', 'training.safetensors'):
        assert (run.folder/'checkpoints'/name/file).read_bytes() == (whole.folder/'checkpoints'/name/file).read_bytes(), file


def test_a_run(whole):
    assert {p.name for p in whole.folder.iterdir()} == {'checkpoints', 'config.toml', 'metrics.jsonl', 'report.html', 'result.json', 'run.json', 'text.ids', 'tokenizer.json'}
    lines = whole.metrics()
    assert whole.finished and [line['step'] for line in lines] == [*range(13)] and [line['step'] for line in lines if 'validation' in line] == [0, 5, 10, 12]
    assert [line['tokens'] for line in lines] == [32 * k for k in range(13)]
    assert [line['learning_rate'] for line in lines[1:]] == [whole.config.schedule(k) for k in range(12)]
    assert 'loss' not in lines[0] and lines[0]['seconds'] == 0
    training, validation = whole.parts()
    assert len(training) + len(validation) == whole.facts['tokens'] and whole.config == tiny()
    assert whole.facts['command'].startswith('llmbook pretrain story.txt --out run --tokenizer bytes --held-out 0.05 ')
    result = json.loads((whole.folder/'result.json').read_text())
    assert math.isclose(result['loss'], min(line['validation'] for line in lines if 'validation' in line), rel_tol=1e-6) and result['steps'] == 12
    if os.name != 'nt': assert len({p.stat().st_mode for p in whole.folder.iterdir() if p.is_file()}) == 1


@pytest.mark.parametrize('way', [dict(), dict(accumulate=3, evaluate_every=4), dict(dropout=0.0, workers=1), dict(evaluate_every=99, max_steps=5, save_every=2)], ids=str)
def test_interrupted_and_resumed_it_is_the_same_to_the_bit(way, whole):
    config = tiny(**way)
    if way: whole = pretrain(replace(config, out='whole'), report=None)
    step = min(config.evaluate_every, config.max_steps)
    run = pretrain(config, report=interrupt_at(step if step < config.max_steps else 0))
    assert not run.finished and not (run.folder/'report.html').exists()
    random.seed(9); np.random.seed(9); torch.manual_seed(9)
    same(resume('run', report=None), whole, f'step-{config.max_steps:08}')


def test_the_clock_goes_on_where_it_stopped(monkeypatch):
    now = [100.0]
    def monotonic():
        now[0] += 1
        return now[0]
    monkeypatch.setattr(module.time, 'monotonic', monotonic)
    run = pretrain(tiny(), report=interrupt_at(5))
    seconds = [line['seconds'] for line in run.metrics()]
    assert len(seconds) == 6 and seconds == sorted(seconds) and 5 <= seconds[-1] <= 40
    now[0] += 1000                                    # a night between
    again = [line['seconds'] for line in resume('run', report=None).metrics()]
    assert again[:6] == seconds and again == sorted(again) and again[-1] < 100


HARM = {'half a line': lambda lines: lines[:8] + [lines[8][:30]], 'lines beyond the checkpoint': lambda lines: lines, 'lines lost': lambda lines: lines[:3],
        'nothing left': lambda lines: [], 'a broken line': lambda lines: [*lines[:2], '\0\0\0\n', *lines[3:]], 'no text': lambda lines: [*lines[:5], '\udcff\n'],
        'cut in a letter': lambda lines: [''.join(lines)[:-1]]}


@pytest.mark.parametrize('harm', HARM)
def test_what_a_crash_leaves_in_the_measurements_is_put_right(harm, whole):
    run = pretrain(tiny(), report=interrupt_at(10))
    file = run.folder/'metrics.jsonl'
    lines = file.read_text().splitlines(keepends=True)
    shutil.rmtree(run.checkpoints().last)               # back to step 8
    file.write_bytes(''.join(HARM[harm](lines)).encode('utf-8', 'surrogateescape'))
    assert len(run.metrics()) <= 11
    same(resume('run', report=None), whole)


@posix
def test_killed_at_any_moment(whole):
    "A process of its own, killed in the middle twice, then left alone."
    code = ('import sys, torch; torch.set_num_threads(1)\nfrom llmbook.pretrain import *\nfrom pathlib import Path\n'
            'print("ready", flush=True)\nresume("run", progress=False) if Path("run/config.toml").exists() else pretrain(read_config("c.toml"), progress=False)')
    write_config('c.toml', tiny())
    env = {**os.environ, 'PYTHONPATH': str(ROOT), 'OMP_NUM_THREADS': '1'}
    for until in (3, 7):
        child = subprocess.Popen([sys.executable, '-c', code], env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        end = time.monotonic() + 60
        while time.monotonic() < end and child.poll() is None:
            file = Path('run/metrics.jsonl')
            if file.exists() and file.read_bytes().count(b'\n') > until: break
            time.sleep(0.002)
        child.kill()
        child.wait()
    with open('run/metrics.jsonl', 'a') as file: file.write('{"step": 11, "tok')
    same(resume('run', report=None), whole)


@pytest.mark.parametrize('at', ['make_tokenizer', 'tokenize_files', 'cut_by_bytes', 'write_config', '_move'])
def test_stopped_before_the_training_nothing_is_left(at, monkeypatch):
    before = tree()
    def press(*args, **kwargs): raise KeyboardInterrupt
    with monkeypatch.context() as m:
        m.setattr(module, at, press)
        with pytest.raises(KeyboardInterrupt): pretrain(tiny(), report=None)
    assert tree() == before
    pretrain(tiny(max_steps=2), report=None)
    before = tree()
    with monkeypatch.context() as m:
        m.setattr(module, at, press)
        with pytest.raises(KeyboardInterrupt): pretrain(tiny(), overwrite=True, report=None)
    assert tree() == before


@pytest.mark.parametrize('at', ['set_seed', 'speed_up', 'write_report', 'score', '_page'])
def test_stopped_anywhere_else_it_can_be_resumed(at, monkeypatch, whole):
    told = []
    def press(*args, **kwargs): raise KeyboardInterrupt
    with monkeypatch.context() as m:
        m.setattr(module, at, press)
        with pytest.raises(KeyboardInterrupt): pretrain(tiny(), report=told.append)
    assert ('the training is done; llmbook resume run writes the report' in told) == (at in ('write_report', 'score', '_page'))
    if at in ('set_seed', 'speed_up'):                       # it has not begun, so nothing is left
        assert not Path('run').exists()
        pretrain(tiny(), report=interrupt_at(5))
    same(resume('run', report=None), whole)
    assert Path('run/report.html').exists() and not [*Path('run').glob('*.part'), *Path('run').glob('*.tmp')]


def test_a_second_ctrl_c_ends_at_once_and_loses_nothing(whole):
    def report(line):
        if line.startswith('step     5'):
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt): pretrain(tiny(), report=report)
    same(resume('run', report=None), whole)


def test_more_steps_than_planned():
    pretrain(tiny(), report=None)
    run = resume('run', report=None, max_steps=20)
    assert run.finished and run.config == tiny(max_steps=20) == Run('run').config
    lines = run.metrics()
    assert [line['step'] for line in lines] == [*range(21)] and lines[20]['learning_rate'] == 0 < lines[13]['learning_rate'] == run.config.schedule(12)
    assert 20 in {line['step'] for line in lines if 'validation' in line}
    assert json.loads(Path('run/result.json').read_text())['steps'] == 20
    first, second = run.facts['command'].splitlines()
    assert first.startswith('llmbook pretrain story.txt --out run ') and second == 'llmbook resume run --max-steps 20  # after step 12' and Run('run').facts == run.facts
    assert escape(second) in Path('run/report.html').read_text('utf-8')
    before = run.metrics()
    assert resume('run', report=None).metrics() == before                  # nothing to do


def test_what_cannot_be_changed_is_refused_and_the_run_stays_as_it_was(whole):
    pretrain(tiny(), report=interrupt_at(5))
    before = Path('run/config.toml').read_bytes()
    refused(ValueError, "did you mean 'max_steps'", resume, 'run', report=None, maxsteps=5)
    refused(ValueError, 'warmup_steps', resume, 'run', report=None, warmup_steps=100)
    for name, value in dict(text='b.txt', tokenizer='300', held_out=0.2, out='b', context_length=4, n_layer=2, n_head=1, n_embd=8, bias=False, seed=1).items():
        refused(ValueError, f"run began with {name}={getattr(tiny(), name)!r}{'; move the folder itself' if name == 'out' else ', and what it has learned rests on that'}", resume, 'run', report=None, **{name: value})
    refused(ValueError, "device='", resume, 'run', report=None, device='nonsense')
    assert Path('run/config.toml').read_bytes() == before
    same(resume('run', report=None, seed=123, n_layer=1), whole)                # the same is no change
    assert '\n' not in Run('run').facts['command']


def test_a_run_can_be_moved_and_needs_its_text_no_more(whole):
    pretrain(tiny(), report=interrupt_at(5))
    Path('story.txt').write_text('another text')
    Path('elsewhere').mkdir()
    Path('run').rename('elsewhere/moved run')
    os.chdir('elsewhere')
    same(resume('moved run', report=None), whole)
    os.chdir('moved run')
    assert Run('.').finished
    Path('report.html').unlink()
    write_report(Run('.'), lambda line: None)
    assert '<title>llmbook run: moved run</title>' in Path('report.html').read_text('utf-8')


class Full:
    "A file on a disk that is full from some time on."
    def __init__(self, file, room): self.file, self.room = file, room
    def write(self, text):
        self.room -= 1
        if self.room < 0:
            self.file.write(text[:10]); self.file.flush()
            raise OSError(28, 'No space left on device')
        return self.file.write(text)
    def flush(self): self.file.flush()
    def close(self): self.file.close()


def test_a_full_disk_ends_no_training(monkeypatch, whole):
    plain, told = module._Recorder._write_all, []
    def write_all(self, trainer):
        plain(self, trainer)
        if trainer.step < 12: self.file = Full(self.file, 6)
    monkeypatch.setattr(module._Recorder, '_write_all', write_all)
    run = pretrain(tiny(), report=told.append)
    assert len([line for line in told if 'cannot be written' in line]) == 1 and 'step 7: ' in ''.join(told)
    same(run, whole)


def test_one_step(whole):
    run = pretrain(tiny(max_steps=1, sample_tokens=5), report=None)
    assert [line['step'] for line in run.metrics()] == [0, 1] and run.finished
    assert Path('run/report.html').exists()


# ---- what is in the way, and bad input

def test_nothing_is_overwritten_unasked():
    run = pretrain(tiny(max_steps=2), report=None)
    (run.folder/'notes.txt').write_text('mine')
    before = tree()
    refused(FileExistsError, 'run holds a run already. llmbook resume run goes on', pretrain, tiny(), report=None)
    for message, wrong in {'is empty': dict(text='empty.txt'), 'is longer than the validation part': dict(context_length=400), 'no file or folder': dict(text='none.txt'),
                           'batch_size=10000 is more': dict(batch_size=10_000), 'is no file, and no tokenizer': dict(tokenizer='x')}.items():
        Path('empty.txt').write_text('')
        refused((ValueError, FileNotFoundError), message, pretrain, tiny(**wrong), overwrite=True, report=None)
        Path('empty.txt').unlink()
        assert tree() == before
    again = pretrain(tiny(max_steps=3), overwrite=True, report=None)
    assert [line['step'] for line in again.metrics()] == [0, 1, 2, 3] and (again.folder/'notes.txt').read_text() == 'mine'
    assert [p.name for p in again.checkpoints().paths()] == ['step-00000003']


def test_a_folder_with_other_things_is_left_alone():
    Path('mine').mkdir()
    Path('mine/letter').write_text('x')
    Path('file').write_text('x')
    before = tree()
    for out in ('mine', 'file'):
        for overwrite in (False, True): refused(FileExistsError, f'{out} is there, and is no run', pretrain, tiny(out=out), overwrite=overwrite, report=None)
    assert tree() == before
    Path('empty').mkdir()
    assert pretrain(tiny(out='empty', max_steps=1), report=None).finished
    Path('half/.part').mkdir(parents=True)                   # what a kill has left
    Path('half/.part/text.ids').write_text('x')
    assert pretrain(tiny(out='half', max_steps=1), report=None).finished and not Path('half/.part').exists()


def test_a_text_inside_the_run_is_refused():
    Path('run').mkdir()
    pretrain(tiny(max_steps=1), report=None)
    shutil.copy('story.txt', 'run/story.txt')
    refused(ValueError, 'lies in run', pretrain, tiny(text='run/story.txt'), overwrite=True, report=None)
    assert Run('run').finished and Path('run/story.txt').exists()


def test_a_run_at_work_is_not_overwritten(monkeypatch):
    from llmbook import checkpoint
    monkeypatch.setattr(checkpoint, '_PATIENCE', 0.1)
    run = start_run(tiny())
    with run.checkpoints()._locked():
        before = tree()
        refused(RuntimeError, 'another process is training', start_run, tiny(), overwrite=True)
        assert tree() == before


BAD = {'there is no file or folder none.txt': dict(text='none.txt'), 'the folder bare has no .txt file': dict(text='bare'), 'learn from: empty.txt is empty': dict(text='empty.txt', tokenizer='300'),
       'empty.txt is empty': dict(text='empty.txt'), 'latin.txt is not UTF-8': dict(text='latin.txt'), 'the training part of the text, which has': dict(context_length=9000),
       'the validation part of the text, which has 301 tokens; give more text, or take 300 at most': dict(context_length=301, held_out=0.05), 'batch_size=5000': dict(batch_size=5000),
       "tokenizer='gpt5' is no file": dict(tokenizer='gpt5'), 'only.txt': dict(text='only.txt')}


@pytest.mark.parametrize('message', BAD)
def test_bad_input_leaves_no_trace(message):
    Path('bare').mkdir()
    Path('bare/readme.md').write_text('x')
    Path('empty.txt').write_text('')
    Path('latin.txt').write_bytes('déjà vu '.encode('latin-1') * 100)
    Path('only.txt').write_bytes('\ufeff'.encode())
    before = tree()
    if message == 'only.txt':
        with pytest.raises(ValueError): pretrain(tiny(**BAD[message]), report=None)
    else: refused((ValueError, FileNotFoundError), message, pretrain, tiny(**BAD[message]), report=None)
    assert tree() == before


def test_devices_are_tried_before_a_folder_is_made():
    before = tree()
    refused(ValueError, "device='", pretrain, tiny(device='nonsense'), report=None)
    refused(ValueError, 'shard=True spreads a model', pretrain, tiny(shard=True), report=None)
    assert tree() == before


def test_id_files():
    tokenizer = BPETokenizer.train(STORY, 300)
    tokenize_files('story.txt', 'a.ids', tokenizer)
    config = tiny(text='a.ids', tokenizer='1024')
    refused(ValueError, 'a.ids was made with a tokenizer of 300 ids that is not here; name its file with --tokenizer', start_run, config)
    tokenizer.save('t.json')
    assert start_run(replace(config, tokenizer='t.json', out='named')).tokenizer.vocab == tokenizer.vocab
    shutil.copy('t.json', 'a.ids.tokenizer.json')
    refused(ValueError, 'a.ids is an id file, and one is all', start_run, replace(config, text=('story.txt', 'a.ids')))
    run = pretrain(config, report=interrupt_at(5))
    assert not (run.folder/'text.ids').exists() and Path(run.facts['ids']).is_absolute()
    data = Path('a.ids').read_bytes()
    Path('a.ids').unlink()
    refused(FileNotFoundError, 'a.ids is gone, and run learns from it', resume, 'run', report=None)
    tokenize_files('story.txt', 'a.ids', BPETokenizer([]))
    refused(ValueError, 'a.ids is not the text that run began with', resume, 'run', report=None)
    Path('a.ids').write_bytes(data)
    text = pretrain(tiny(tokenizer='t.json', out='text'), report=None)
    same(resume('run', report=None), text)                  # ids or text: the same run
    BPETokenizer.train(STORY[:99], 260).save('a.ids.tokenizer.json')
    refused(ValueError, 'of 300 ids that is not a.ids.tokenizer.json', start_run, replace(config, out='other'))


def test_names_of_texts(monkeypatch):
    assert module._source(())[0] == 'shakespeare' and module._source(('the-verdict',))[1][0].name == 'the-verdict.txt'
    Path('shakespeare').mkdir()
    Path('shakespeare/a.txt').write_text('mine')
    assert [p.name for p in module._source(('shakespeare',))[1]] == ['a.txt']        # what is here comes first
    Path('deep').mkdir()
    monkeypatch.chdir('deep')
    assert module._source(('..',))[0] == Path('..').resolve().stem and module._source(('../story.txt', '../shakespeare'))[0] == 'story'
    run = pretrain(tiny(text='../story.txt', out=None, max_steps=1), report=None)
    assert run.folder == Path('runs/story') and run.config.out is None and '--out' not in run.facts['command']


@pytest.mark.parametrize('text', ['a line\r\nand another\r\n' * 100, 'a mark <|endoftext|> in a text. ' * 80, 'é\u2028你好 🍵 ' * 200, '\ufeff' + STORY], ids=['windows', 'mark', 'signs', 'bom'])
def test_odd_texts(text):
    Path('odd.txt').write_bytes(text.encode())
    run = pretrain(tiny(text='odd.txt', max_steps=2), report=None)
    training, validation = run.parts()
    ids = [*training.ids.tolist(), *validation.ids.tolist()]
    assert run.tokenizer.decode(ids[:-1]) == text.removeprefix('\ufeff') and ids.count(256) == 1


def test_a_folder_that_is_no_run():
    pretrain(tiny(max_steps=1), report=None)
    refused(FileNotFoundError, 'rnu is no run: it has no config.toml. In . there are run', Run, 'rnu')
    Path('far').mkdir()
    refused(FileNotFoundError, 'llmbook pretrain makes one', Run, 'far/away')
    fresh = start_run(tiny(out='fresh'))
    assert fresh.metrics() == [] and not fresh.finished
    refused(FileNotFoundError, 'fresh has no checkpoint yet; llmbook resume fresh goes on', fresh.model)


# ---- the report

class Strict(HTMLParser):
    VOID = {'meta', 'br', 'hr', 'img', 'link', 'input'}
    def __init__(self, text):
        super().__init__()
        self.open, self.links, self.tags, self.words = [], [], [], []
        self.feed(text)
        self.close()
        assert not self.open
    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [v for k, v in attrs if k in ('href', 'src', 'xlink:href', 'action', 'data')]
        if tag not in self.VOID: self.open.append(tag)
    def handle_startendtag(self, tag, attrs): self.links += [v for k, v in attrs if k in ('href', 'src')]
    def handle_endtag(self, tag): assert self.open.pop() == tag
    def handle_data(self, data): self.words.append(data)


def test_the_report_is_a_page_of_its_own():
    Path('a <b>.txt').write_text('if a < b & c > d: <script>alert(1)</script> ' * 150)
    told = []
    run = pretrain(tiny(text='a <b>.txt', prompt='<script>', out='x & <y>'), report=told.append)
    text = (run.folder/'report.html').read_text('utf-8')
    page = Strict(text)
    words = ''.join(page.words)
    assert all(link.startswith('#') for link in page.links) and 'url(http' not in text and '@import' not in text
    assert 'script' not in page.tags and page.tags.count('svg') == 2 and page.tags.count('h3') == 3
    assert run.facts['command'] in words and "'<script>'" in words and 'x & <y>' in words
    for name in asdict(run.config): assert name in words
    assert "prompt'<script>'" in words and 'texta <b>.txt' in words and '\n\n\n' not in ''.join(p for p in text.split('<pre>')[1:4])
    for role in ('token', 'query', 'loss'): assert f'--llm-{role}: #' in text
    assert 'perplexity' in words and 'tokens per second' in words
    summary = '\n'.join(told)
    assert 'validation loss: ' in summary and f"report: {run.folder/'report.html'}" in summary and 'llmbook generate x & <y>' in summary
    before = text
    write_report(run, lambda line: None)
    assert (run.folder/'report.html').read_text('utf-8') == before


def test_samples():
    model, tokenizer = GPT(GPTConfig(257, 8, 1, 2, 16)), BPETokenizer([])
    one = write_sample(model, tokenizer, 'To be', 20, seed=1)
    assert one.startswith('To be') and one == write_sample(model, tokenizer, 'To be', 20, seed=1) != write_sample(model, tokenizer, 'To be', 20, seed=2)
    assert write_sample(model, tokenizer, 'a', 9, 1, 0) == write_sample(model, tokenizer, 'a', 9, 2, 0)
    lines = []
    pretrain(tiny(sample_tokens=6, max_steps=5, prompt='It'), report=lines.append)
    assert lines[0].startswith('run: ')
    assert [line[:6] for line in lines if line.startswith('    It')] == ['    It'] * 3         # steps 0 and 5, and the report


# ---- faster

def trainer(steps=10, n_layer=2):
    set_seed(1)
    model = GPT(GPTConfig(257, 16, n_layer, 2, 32))
    windows = torch.tensor([*STORY.encode()])[:16 * 4 * 30 + 1]
    loader = module.make_dataloader(windows, 16, 4, seed=1)
    return Trainer(model, loader, TrainConfig(max_steps=steps, learning_rate=3e-3), whole_text(windows[:200], 16))


def test_bfloat16_agrees():
    if fault := module._bfloat16_fault('cpu'): pytest.skip(fault)
    plain, fast = trainer(), trainer()
    speed_up(fast, 'bfloat16')
    a, b = ([t.update() for _ in range(10)] for t in (plain, fast))
    assert 0 < max(abs(x / y - 1) for x, y in zip(a, b)) < 0.01
    assert all(p.dtype == torch.float32 for p in fast.model.parameters()) and fast.model.blocks[0].feed_forward.expand.weight.dtype == torch.float32
    assert abs(plain.evaluate() / fast.evaluate() - 1) < 0.01
    inputs, targets = next(iter(fast.loader))
    assert fast.loss(inputs, targets).item() != Trainer(fast.model, fast.loader).loss(inputs, targets).item()      # it does compute otherwise


def test_bfloat16_in_a_run():
    told = []
    run = pretrain(tiny(precision='bfloat16', max_steps=6), report=told.append)
    plain = pretrain(tiny(max_steps=6, out='plain'), report=None)
    pairs = [(a['loss'], b['loss']) for a, b in zip(run.metrics()[1:], plain.metrics()[1:])]
    assert all(abs(a / b - 1) < 0.01 for a, b in pairs) and (any(a != b for a, b in pairs) or 'does not work' in ''.join(told))


def test_compiled_agrees():
    if fault := module._compile_fault('cpu'): pytest.skip(fault)
    plain, fast = trainer(n_layer=1), trainer(n_layer=1)
    speed_up(fast, compile=True)
    a, b = ([t.update() for _ in range(5)] for t in (plain, fast))
    assert max(abs(x / y - 1) for x, y in zip(a, b)) < 1e-4
    assert math.isclose(plain.evaluate(), fast.evaluate(), rel_tol=1e-4)
    assert write_sample(fast.model, BPETokenizer([]), 'a', 5, 1)                # writing is as before
    assert {k for k in fast.model.state_dict()} == {k for k in plain.model.state_dict()}


def test_what_the_machine_lacks_is_said_in_one_sentence(monkeypatch):
    def broken(*args, **kwargs): raise RuntimeError('no such thing\nand a long trace')
    told, t = [], trainer()
    monkeypatch.setattr(torch, 'compile', broken)
    speed_up(t, compile=True, report=told.append)
    assert told == ['compile=True does not work here (RuntimeError: no such thing); the training goes on without']
    monkeypatch.setattr(torch, 'compile', lambda f: lambda x: x + 1)
    speed_up(t, compile=True, report=told.append)
    assert 'its numbers are wrong' in told[1]
    monkeypatch.setattr(torch, 'autocast', broken)
    speed_up(t, 'bfloat16', report=told.append)
    assert told[2] == "precision='bfloat16' does not work on this cpu (RuntimeError: no such thing); the training uses float32"
    assert [t.update() for _ in range(3)] == [u.update() for u in [trainer()] for _ in range(3)]
    def silent(*args, **kwargs): raise ValueError
    monkeypatch.setattr(torch, 'autocast', silent)
    speed_up(t, 'bfloat16', report=told.append)
    assert '(ValueError:)' in told[3]
    run = pretrain(tiny(precision='bfloat16', compile=True, max_steps=2), report=told.append)
    assert run.finished and len([line for line in told[4:] if 'does not work' in line]) == 2


def test_tensorboard_when_asked():
    pytest.importorskip('tensorboard')
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    pretrain(tiny(tensorboard=True), report=interrupt_at(5))
    run = resume('run', report=None)
    log = EventAccumulator(str(run.folder/'tensorboard'))
    log.Reload()
    lines = run.metrics()
    for name in ('loss', 'validation', 'learning_rate', 'gradient_norm', 'tokens', 'seconds'):
        found = [(e.step, e.value) for e in log.Scalars(name)]
        wanted = [(line['step'], line[name]) for line in lines if name in line]
        assert [s for s, _ in found] == [s for s, _ in wanted], name
        assert all(math.isclose(a, b, rel_tol=1e-5, abs_tol=1e-6) for (_, a), (_, b) in zip(found, wanted))
    assert not Path(pretrain(tiny(out='b', max_steps=1), report=None).folder/'tensorboard').exists()


def test_tensorboard_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, 'torch.utils.tensorboard', None)
    before = tree()
    refused(RuntimeError, 'pip install tensorboard', pretrain, tiny(tensorboard=True), report=None)
    assert tree() == before


# ---- models that are kept

def test_a_model_from_everywhere(whole):
    run_model, tokenizer = load_pretrained(whole.folder)
    for place in (whole.checkpoints().best, str(whole.checkpoints().best)):
        model, t = load_pretrained(place)
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), run_model.parameters())) and t.vocab == tokenizer.vocab and not model.training
    for tied in (True, False):
        set_seed(3)
        model = GPT(GPTConfig(257, 8, 2, 2, 16, dropout=0.1, bias=tied, tied=tied))
        save_model('kept', model, tokenizer)
        state = torch.get_rng_state()
        back, t = load_pretrained('kept')
        assert torch.equal(state, torch.get_rng_state()) and back.config == model.config and not back.training and t.vocab == tokenizer.vocab
        assert all(torch.equal(back.state_dict()[k], v) for k, v in model.state_dict().items()) and (back.lm_head.weight is back.token_embedding.weight) == tied
        if os.name != 'nt': assert len({p.stat().st_mode for p in Path('kept').iterdir()}) == 1
    assert {p.name for p in Path('kept').iterdir()} == {'config.json', 'model.safetensors', 'tokenizer.json'}


def test_a_model_that_does_not_fit_is_refused():
    save_model('kept', GPT(GPTConfig(257, 8, 1, 2, 16)), BPETokenizer([]))
    c = json.loads(Path('kept/config.json').read_text())
    for change, message in (({'n_embd': 32}, 'token_embedding.weight is (257, 16) '), ({'n_layer': 2}, 'missing there'), ({'bias': False}, 'missing here')):
        Path('kept/config.json').write_text(json.dumps(c | change))
        refused(ValueError, message, load_pretrained, 'kept')
    Path('kept/config.json').write_text('{"model_type": "llama", "vocab_size": 5}')
    refused(ValueError, 'is of another kind of model', load_pretrained, 'kept')
    Path('kept/config.json').write_text('{"model_type": "gpt2"}')
    refused(ValueError, 'llmbook.open_weights.open_model reads a published GPT-2', load_pretrained, 'kept')
    refused(FileNotFoundError, 'nowhere is no run, no checkpoint and no folder with a model', load_pretrained, 'nowhere')
    from llmbook.checkpoint import save_checkpoint
    save_checkpoint('bare', trainer())
    refused(ValueError, 'bare has no tokenizer', load_pretrained, 'bare')
    Path('shakespeare').mkdir()                                   # a folder of that name is looked into
    refused(FileNotFoundError, 'shakespeare is no run', load_pretrained, 'shakespeare')


def test_the_kept_model_is_small_and_as_good_as_it_says():
    kept = files('llmbook')/'assets'/'shakespeare-model'
    sizes = {p.name: p.stat().st_size for p in Path(str(kept)).iterdir()}
    assert {'config.json', 'tokenizer.json', 'model.safetensors', 'metrics.jsonl', 'result.json', 'recipe.json'} <= set(sizes) and sum(sizes.values()) < 5e6
    model, tokenizer = load_pretrained()
    told, default = json.loads((kept/'result.json').read_text('utf-8')), PretrainConfig()
    assert model.config == default.model(tokenizer.vocab_size) and told['steps'] == default.max_steps
    text = load_text('shakespeare') + '\n'
    assert tokenizer.vocab == make_tokenizer(default.tokenizer, module._source(())[1], default.held_out).vocab
    ids = torch.tensor([*tokenizer.encode_ordinary(text), tokenizer.special_tokens['<|endoftext|>']])
    found = score(model, tokenizer, ids[cut_by_bytes(ids, tokenizer, default.held_out):], default.context_length)
    for name in ('tokens', 'bytes'): assert found[name] == told[name]
    for name in ('loss', 'nats_per_byte', 'bits_per_byte', 'perplexity'): assert math.isclose(found[name], told[name], rel_tol=1e-3)
    lines = [json.loads(line) for line in (kept/'metrics.jsonl').read_text('utf-8').splitlines()]
    assert [line['step'] for line in lines] == [*range(default.max_steps + 1)] and lines[-1]['learning_rate'] == 0
    assert [line['learning_rate'] for line in lines[1:]] == [*map(default.schedule, range(default.max_steps))]
    names = [row['name'] for row in json.loads((kept/'recipe.json').read_text('utf-8'))['rows']]
    assert names[0] == "nanoGPT's setting" and names[-2].endswith(': the defaults') and 'Muon' in names[-1] and len(names) == 6
    assert math.isclose(min(line['validation'] for line in lines if 'validation' in line), told['loss'], rel_tol=1e-3)


# ---- several processes

@posix
def test_two_processes_train_as_one(whole):
    write_config('c.toml', tiny(dropout=0.0, sample_tokens=3, out='two'))
    one = pretrain(tiny(dropout=0.0, out='one'), report=None)
    env = {**os.environ, 'PYTHONPATH': str(ROOT), 'OMP_NUM_THREADS': '1'}
    done = subprocess.run([sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', '2', '-m', 'llmbook', 'pretrain', '--config', 'c.toml'],
                          env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    two = Run('two')
    assert done.stdout.count('validation loss: ') == 1 and 'in 2 processes' in done.stdout and two.finished
    for a, b in zip(one.metrics(), two.metrics(), strict=True):
        assert a.keys() == b.keys() and a['step'] == b['step'] and a['tokens'] == b['tokens']
        for name in a.keys() & {'loss', 'validation', 'gradient_norm'}: assert math.isclose(a[name], b[name], rel_tol=1e-4), (a, b)
    assert Path('two/report.html').exists()
    assert resume('two', report=None, max_steps=14).finished                 # and one goes on alone


def test_torchrun_goes_on_with_its_own_run_only(monkeypatch):
    monkeypatch.setenv('TORCHELASTIC_RESTART_COUNT', '1')
    run = pretrain(tiny(), report=interrupt_at(5))
    refused(FileExistsError, 'run holds a run already', pretrain, tiny(seed=5), report=None)
    assert pretrain(tiny(), report=None).finished and len(run.metrics()) == 13

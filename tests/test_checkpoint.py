"A resume that is exact to the bit, crashes at every moment, damaged and foreign files, full disks: nothing is lost, and nothing is mixed."
import copy, dataclasses, json, math, os, pickle, random, shutil, signal, subprocess, sys, threading
from pathlib import Path

import faults
import numpy as np
import pytest
import torch
from faults import STEPS, Noisy, digest, make
from hypothesis import given, settings, strategies as st
from llmbook import checkpoint as module
from llmbook.bpe import BPETokenizer, gpt2_encoding
from llmbook.checkpoint import FORMAT, VERSION, CheckpointError, Checkpoints, load_checkpoint, load_model, read_checkpoint, save_checkpoint
from llmbook.core import set_seed
from llmbook.data import make_dataloader
from llmbook.generate import generate
from llmbook.gpt import GPT, GPTConfig
from llmbook.train import History, TrainConfig, Trainer
from torch import nn

try: import resource
except ImportError: resource = None      # Windows

posix = pytest.mark.skipif(os.name == 'nt', reason='processes are forked')
root = pytest.mark.skipif(os.name == 'nt' or os.geteuid() != 0, reason='only root can become somebody else, or mount')


pytestmark = pytest.mark.usefixtures('one_thread')


@pytest.fixture(autouse=True)
def a_quick_disk(monkeypatch): monkeypatch.setattr(os, 'fsync', lambda handle: None)      # processes of their own do wait for theirs


def steps(folder): return [int(p.name[5:]) for p in Checkpoints(folder).paths()]
def names(folder): return sorted(p.name for p in Path(folder).iterdir() if not p.name.startswith('.'))


def disturb():
    "What another process would have done with the generators."
    random.seed(99); np.random.seed(98); torch.manual_seed(97)


def state_of(trainer, folder):
    "Everything a checkpoint would hold, as checksums."
    shutil.rmtree(folder, ignore_errors=True)
    return (save_checkpoint(folder, trainer)/'SHA256SUMS').read_bytes()


def in_child(work):
    "Run `work` in a forked process; gives its exit code, 1 if it raises."
    if not (child := os.fork()):
        try: work()
        except BaseException as error:
            print(type(error).__name__, error, file=sys.stderr)
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


# ---- exact to the bit

WAYS = [dict(), dict(accumulate=1), dict(accumulate=4, every=3), dict(dropout=0.0, tied=False), dict(dtype=torch.float64), dict(dtype=torch.bfloat16),
        dict(grad_clip=None), dict(model=GPT, accumulate=3, weight_decay=0.0)]


@pytest.mark.parametrize('way', WAYS, ids=str)
def test_stopped_anywhere_it_ends_in_the_same_bytes(way, tmp_path):
    whole, tokenizer = make(steps=12, **way)
    whole.run(report=None)
    save_checkpoint(tmp_path/'whole', whole, tokenizer)
    for stop in range(13) if not way else (0, 1, 7, 12):
        part, _ = make(steps=12, **way)
        if stop: part.run(stop, report=None)
        save_checkpoint(tmp_path/'part', part, tokenizer)
        disturb()
        rest, _ = make(steps=12, **way)
        disturb()
        load_checkpoint(tmp_path/'part', rest)
        assert state_of(rest, tmp_path/'again') == state_of(rest, tmp_path/'again')
        if stop: assert (tmp_path/'part'/'training.safetensors').read_bytes() == (tmp_path/'again'/'training.safetensors').read_bytes()
        rest.run(report=None)
        save_checkpoint(tmp_path/'rest', rest, tokenizer)
        for name in faults.FILES: assert (tmp_path/'rest'/name).read_bytes() == (tmp_path/'whole'/name).read_bytes(), (stop, name)


def test_in_one_process_stops_change_nothing(tmp_path):
    whole, _ = make(steps=12)
    whole.run(report=None)
    parts, _ = make(steps=12)
    for stop in (1, 5, 6, 11, 12): parts.run(stop, report=None, checkpoints=Checkpoints(tmp_path/'runs', every=2))
    assert parts.history == whole.history
    assert state_of(parts, tmp_path/'a') == state_of(whole, tmp_path/'a')


def test_the_right_to_be_called_exact():
    "The training of these tests does need all that is kept: it draws from each generator, its last step of an epoch is short, a loop is left in the middle."
    trainer, _ = make()
    before = module._random_states()
    trainer.update()
    after = module._random_states()
    assert all(before[k] != after[k] for k in ('python', 'numpy', 'torch'))
    assert len(trainer.loader) % 2 and trainer.loader.batch_sampler.shuffle and trainer.validation.batch_sampler.shuffle
    assert len(trainer.validation) > trainer.config.evaluate_batches
    assert trainer.model.seen.item() and dict(trainer.model.named_buffers()).keys() == {'seen'}


@pytest.mark.parametrize('part', ['python', 'numpy', 'torch', 'loader', 'validation', 'weights', 'buffer', 'exp_avg', 'exp_avg_sq', 'step', 'history'])
def test_every_part_is_needed(part, tmp_path, monkeypatch):
    whole, _ = make(steps=12)
    whole.run(report=None)
    stopped, _ = make(steps=12)
    stopped.run(7, report=None)
    save_checkpoint(tmp_path/'c', stopped)
    rest, _ = make(steps=12)
    fresh = module._random_states()
    load_checkpoint(tmp_path/'c', rest)
    if part in fresh: module._set_random_states({**module._random_states(), part: fresh[part]})
    elif part == 'loader': rest.loader._place = 0, 0
    elif part == 'validation': rest.validation = make(steps=12)[0].validation
    elif part == 'weights': rest.model.final_norm.weight.data.fill_(1)
    elif part == 'buffer': rest.model.seen.zero_()
    elif part == 'history': del rest.history.losses[-1]
    else:
        for values in rest.optimizer.state.values(): values[part].zero_()
    rest.run(report=None)
    assert state_of(rest, tmp_path/'r') != state_of(whole, tmp_path/'w')


def test_all_random_generators():
    random.gauss(0, 1), np.random.randn()
    states = json.loads(json.dumps(module._random_states()))
    def draw(): return random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn(), torch.rand(3).tolist(), torch.randn(1).item()
    first = draw()
    disturb()
    module._set_random_states(states)
    assert draw() == first
    module._set_random_states({**states, 'cuda': ['00' * 16] * 9, 'mps': ['00']})      # those of a larger machine
    assert draw() == first


def test_graphics_cards_are_asked_only_if_they_are_in_use(monkeypatch):
    "Their generators, as far as they can be tried without one."
    monkeypatch.setattr(torch.cuda, 'get_rng_state_all', lambda: [torch.tensor([1, 2, 255], dtype=torch.uint8), torch.tensor([7], dtype=torch.uint8)])
    assert module._random_states()['cuda'] == []
    monkeypatch.setattr(torch.cuda, 'is_initialized', lambda: True)
    states = module._random_states()
    assert states['cuda'] == ['0102ff', '07']
    got = {}
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 1)
    monkeypatch.setattr(torch.cuda, 'set_rng_state', lambda state, card: got.update({card: state.tolist()}))
    module._set_random_states(states)
    assert got == {0: [1, 2, 255]}


def test_the_history_is_kept_whole():
    assert {f.name for f in dataclasses.fields(History)} == {*module._LISTS, 'validation'}


def test_settings_keep_their_exact_values(tmp_path):
    trainer, _ = make(steps=9, rate=0.1 + 0.2, grad_clip=None)
    trainer.run(2, report=None)
    text = (save_checkpoint(tmp_path/'c', trainer)/'checkpoint.json').read_text()
    fields = json.loads(text, parse_constant=lambda word: pytest.fail(f'{word} is no JSON'))
    assert fields['training']['grad_clip'] is None and fields['training']['learning_rate'] == 0.1 + 0.2
    fresh, _ = make(steps=9, rate=0.1 + 0.2, grad_clip=None)
    load_checkpoint(tmp_path/'c', fresh)
    assert repr(fresh.optimizer.state_dict()['param_groups']) == repr(trainer.optimizer.state_dict()['param_groups'])
    fresh, _ = make(steps=9, rate=0.1 + 0.2)
    with pytest.raises(CheckpointError, match='made with grad_clip=None, and this trainer has grad_clip=1.0'): load_checkpoint(tmp_path/'c', fresh)


def test_a_hand_changed_optimiser_is_restored(tmp_path):
    trainer, _ = make(steps=9)
    trainer.optimizer.param_groups[0]['weight_decay'] = 0.7
    trainer.run(2, report=None)
    save_checkpoint(tmp_path/'c', trainer)
    fresh, _ = make(steps=9)
    load_checkpoint(tmp_path/'c', fresh)
    assert fresh.optimizer.param_groups[0]['weight_decay'] == 0.7
    fresh, _ = make(steps=9)
    load_checkpoint(tmp_path/'c', fresh, changed=True)
    assert fresh.optimizer.param_groups[0]['weight_decay'] == 0.1


def test_a_batch_that_was_looked_at_before_the_training(tmp_path):
    def begin():
        trainer, _ = make(steps=6)
        next(iter(trainer.loader)), next(iter(trainer.validation))
        return trainer
    whole = begin()
    whole.run(report=None)
    save_checkpoint(tmp_path/'c', begin())
    rest, _ = make(steps=6)
    load_checkpoint(tmp_path/'c', rest)
    rest.run(report=None)
    assert rest.history == whole.history


def test_gradients_of_a_failed_step_are_dropped(tmp_path):
    trainer, _ = make(steps=9)
    trainer.run(3, report=None, checkpoints=Checkpoints(tmp_path/'runs'))
    for p in trainer.model.parameters(): p.grad = torch.full_like(p, math.nan)
    Checkpoints(tmp_path/'runs').resume(trainer)
    trainer.run(report=None)
    whole, _ = make(steps=9)
    whole.run(report=None)
    assert trainer.history == whole.history


def test_no_pickle_anywhere(tmp_path, monkeypatch):
    trainer, tokenizer = make(steps=5)
    trainer.run(2, report=None)
    def refuse(*_, **__): raise AssertionError('pickled')
    for where in (pickle, torch.serialization, torch):
        for name in ('dump', 'dumps', 'load', 'loads', 'save', 'Pickler', 'Unpickler'):
            if hasattr(where, name): monkeypatch.setattr(where, name, refuse)
    path = save_checkpoint(tmp_path/'c', trainer, tokenizer)
    fresh, _ = make(steps=5)
    load_checkpoint(path, fresh)
    assert 'pickle' not in Path(module.__file__).read_text().replace('no pickle', '')
    for file in path.iterdir(): assert not file.read_bytes().startswith((b'\x80', b'PK'))


# ---- in another process

def test_a_new_process_goes_on_with_the_same_bytes(tmp_path):
    "Three kills in a row, then the end; and a Ctrl-C to the whole group, workers and all. Both end as the training in this process, which nobody stopped."
    trainer, tokenizer = make()
    trainer.run(report=None)
    (tmp_path/'here').mkdir()
    save_checkpoint(tmp_path/'here'/f'step-{STEPS:08}', trainer, tokenizer)
    rng = random.Random(1)
    for _ in range(3):
        faults.kill_once(tmp_path/'killed', rng.uniform(0, 0.3), quick=True)
        for path in Checkpoints(tmp_path/'killed').paths()[-2:]: read_checkpoint(path)
    faults.finish(tmp_path/'killed', quick=True)
    assert digest(tmp_path/'killed') == digest(tmp_path/'here')
    assert not [n for n in names(tmp_path/'killed') if '.' in n]
    if os.name == 'nt': return
    out = faults.interrupt(tmp_path/'int', 3, 0.01, workers=2)
    assert f'of {STEPS}, saved as {Checkpoints(tmp_path/"int").last}; run() goes on' in out and 'resume()' in out
    assert 0 < steps(tmp_path/'int')[-1] < STEPS
    faults.finish(tmp_path/'int', workers=2, quick=True)
    assert digest(tmp_path/'int') == digest(tmp_path/'here')


@posix
@pytest.mark.parametrize('replace', [False, True])
def test_a_crash_at_any_call_for_the_file_system(replace, tmp_path):
    calls, outcomes = faults.crash_at_every_step_of_saving(tmp_path/'runs', replace, stride=4)
    assert calls > 20 and outcomes['old'] and outcomes['new'] > 1


@posix
def test_ctrl_c_finishes_the_step_and_saves(tmp_path):
    whole, _ = make(steps=12)
    whole.run(report=None)
    before = signal.getsignal(signal.SIGINT)
    for at in (0, 5):
        trainer, _ = make(steps=12)
        checkpoints, lines = Checkpoints(tmp_path/str(at)), []
        def report(line):
            lines.append(line)
            if line.startswith(f'step     {at}'): os.kill(os.getpid(), signal.SIGINT)
        trainer.run(report=report, checkpoints=checkpoints)
        assert trainer.step == at and steps(tmp_path/str(at)) == [at]
        assert f'stopped after step {at} of 12, saved as {checkpoints.last}' in lines[-1] and 'resume()' in lines[-1]
        rest, _ = make(steps=12)
        checkpoints.resume(rest)
        rest.run(report=None)
        assert rest.history.losses == whole.history.losses
        assert signal.getsignal(signal.SIGINT) is before


@posix
def test_ctrl_c_while_the_last_step_is_saved(tmp_path, monkeypatch):
    trainer, _ = make(steps=4)
    def press(*_): os.kill(os.getpid(), signal.SIGINT)
    real = os.fsync
    monkeypatch.setattr(os, 'fsync', lambda handle: (press(), real(handle)) if not pressed and not pressed.append(1) else real(handle))
    pressed = []
    lines = []
    trainer.run(report=lines.append, checkpoints=Checkpoints(tmp_path/'runs'))
    assert pressed and steps(tmp_path/'runs') == [4]
    read_checkpoint(tmp_path/'runs'/'step-00000004')


def test_a_second_ctrl_c_leaves_no_half(tmp_path, monkeypatch):
    trainer, _ = make(steps=9)
    checkpoints = Checkpoints(tmp_path/'runs')
    trainer.run(3, checkpoints=checkpoints, report=None)
    def stop(*_): raise KeyboardInterrupt
    with monkeypatch.context() as patch:
        patch.setattr(os, 'fsync', stop)
        with pytest.raises(KeyboardInterrupt): trainer.run(5, checkpoints=checkpoints, report=None)
    assert names(tmp_path/'runs') == ['step-00000003']
    trainer.run(checkpoints=checkpoints, report=None)
    assert trainer.history == make_whole(9).history


def make_whole(n):
    whole, _ = make(steps=n)
    whole.run(report=None)
    return whole


# ---- a loss that is no number

@pytest.mark.parametrize('value', [math.nan, math.inf])
def test_a_loss_that_is_not_finite_names_all(value, tmp_path):
    trainer, _ = make(steps=9)
    checkpoints = Checkpoints(tmp_path/'runs', every=2)
    trainer.run(4, checkpoints=checkpoints, report=None)
    def schedule(step):
        if step == 6: trainer.model.final_norm.weight.data[0] = value
        return 0.0123
    trainer.schedule = schedule
    with pytest.raises(FloatingPointError, match=r'step 6: .*0\.0123.*last good checkpoint is .*step-00000006') as caught: trainer.run(checkpoints=checkpoints, report=None)
    assert str(checkpoints.last) in str(caught.value)
    read_checkpoint(checkpoints.last)


def test_weights_that_are_not_finite_are_not_saved(tmp_path):
    trainer, _ = make(steps=9)
    checkpoints = Checkpoints(tmp_path/'runs', every=1)
    trainer.run(4, checkpoints=checkpoints, report=None)
    trainer.model.blocks[0].feed_forward.expand.weight.data[0, 0] = math.inf
    with pytest.raises(FloatingPointError, match=r'step 4: blocks\.0\.feed_forward\.expand\.weight .* not saved; the last good checkpoint is .*step-00000004'): checkpoints.save(trainer)
    assert steps(tmp_path/'runs') == [3, 4] or steps(tmp_path/'runs')[-1] == 4


# ---- what is refused

@pytest.fixture(scope='module')
def pair(tmp_path_factory):
    "Two checkpoints of a training, at the steps 4 and 8."
    folder = tmp_path_factory.mktemp('pair')
    trainer, tokenizer = make(steps=9)
    for stop in (4, 8):
        trainer.run(stop, report=None)
        save_checkpoint(folder/f'step-{stop:08}', trainer, tokenizer)
    return folder


@pytest.fixture
def two(pair, tmp_path):
    shutil.copytree(pair, tmp_path/'runs')
    return tmp_path/'runs'


def test_any_bit_of_any_file(two):
    refused = faults.spoil(two/'step-00000008', bits=250, cuts=25)
    assert set(refused.values()) == {275}


def test_bits_of_the_list_of_checksums(two):
    path = two/'step-00000008'/'SHA256SUMS'
    data = path.read_bytes()
    for bit in range(0, 8 * len(data), 3):
        bad = bytearray(data)
        bad[bit // 8] ^= 1 << bit % 8
        path.write_bytes(bad)
        with pytest.raises(CheckpointError, match='damaged'): module._read(path.parent)
    for end in range(len(data)):
        path.write_bytes(data[:end])
        with pytest.raises(CheckpointError, match='damaged'): module._read(path.parent)


def edit(path, **changes):
    data = json.loads((path/'checkpoint.json').read_text())
    (path/'checkpoint.json').write_text(json.dumps({**data, **changes}))


def seal(path):
    (path/'SHA256SUMS').unlink()
    sums = module._checksums(path)
    (path/'SHA256SUMS').write_bytes(sums)


def rewrite(name, text): return lambda p: (p/name).write_bytes(text)
def empty(path):
    for file in path.iterdir(): file.unlink()


FAULTS = {
    'no folder': (shutil.rmtree, 'is not there'),
    'a file': (lambda p: (shutil.rmtree(p), p.write_text('x')), 'is a file, and a checkpoint is a folder'),
    'empty': (empty, 'is no checkpoint: the folder is empty'),
    'other files': (lambda p: (empty(p), (p/'x').write_text('')), 'is no checkpoint: checkpoint.json is missing'),
    **{f'no {name}': (lambda p, name=name: (p/name).unlink(), f'is damaged: {name} is missing') for name in faults.FILES},
    'a folder for a file': (lambda p: ((p/'model.safetensors').unlink(), (p/'model.safetensors').mkdir()), 'model.safetensors is missing'),
    'no JSON': (rewrite('checkpoint.json', b'{"format"'), 'checkpoint.json is cut off, or no JSON'),
    'no UTF-8': (rewrite('checkpoint.json', b'\xff\xfe\xff'), 'checkpoint.json is cut off, or no JSON'),
    'deep': (rewrite('checkpoint.json', b'[' * 100_000), 'checkpoint.json is cut off, or no JSON'),
    'a list': (rewrite('checkpoint.json', b'[1, 2]'), 'is no checkpoint of llmbook'),
    'foreign': (lambda p: (edit(p, format='a picture'), seal(p)), "is no checkpoint of llmbook: its format is not 'llmbook checkpoint'$"),
    'future': (lambda p: (edit(p, version=VERSION + 1), seal(p)), f'has version {VERSION + 1}, and this program reads version {VERSION}; update llmbook$'),
    'future or damaged': (lambda p: edit(p, version=VERSION + 1), f'has version {VERSION + 1}, .*; and checkpoint.json is not what was written'),
    'no version': (lambda p: (edit(p, version=None), seal(p)), 'has version None'),
    'edited': (lambda p: edit(p, step=7), 'is damaged: checkpoint.json is not what was written'),
    'exchanged': (lambda p: shutil.copy(p.with_name('step-00000004')/'model.safetensors', p), 'is damaged: model.safetensors is not what was written'),
    'not listed': (lambda p: (p/'SHA256SUMS').write_text('\n'.join(l for l in (p/'SHA256SUMS').read_text().split('\n') if 'tokenizer' not in l)), 'SHA256SUMS is not what was written'),
    'more is listed': (lambda p: (p/'SHA256SUMS').write_bytes((p/'SHA256SUMS').read_bytes() + b'?\n'), 'SHA256SUMS is not what was written'),
    'pickled': (lambda p: torch.save({'a': torch.ones(2)}, p/'model.safetensors'), 'model.safetensors is not what was written'),
}


@pytest.mark.parametrize('fault', FAULTS)
def test_faults_are_named_and_the_one_before_is_offered(fault, two):
    spoil, message = FAULTS[fault]
    bad = two/'step-00000008'
    spoil(bad)
    with pytest.raises(CheckpointError, match=message): module._read(bad)
    trainer, _ = make(steps=9)
    before = state_of(trainer, two.parent/'s')
    for refuse in (read_checkpoint, load_model, lambda p: load_checkpoint(p, trainer), lambda p: load_checkpoint(p, trainer, changed=True)):
        with pytest.raises(CheckpointError, match=message.removesuffix('$')) as caught: refuse(bad)
        assert str(bad) in str(caught.value) and f'The one before it is whole: {two/"step-00000004"}' in str(caught.value)
    assert state_of(trainer, two.parent/'s') == before
    if bad.is_dir():
        with pytest.raises(CheckpointError, match='The one before it is whole'): Checkpoints(two).resume(trainer)
        assert state_of(trainer, two.parent/'s') == before
        shutil.rmtree(bad)
    Checkpoints(two).resume(trainer)                       # as the message says
    assert trainer.step == 4
    trainer.run(report=None, checkpoints=Checkpoints(two))
    assert trainer.history == make_whole(9).history


def test_a_damaged_one_is_not_offered(two):
    shutil.copytree(two/'step-00000004', two/'step-00000006')
    for step in (6, 8): (two/f'step-0000000{step}'/'model.safetensors').write_bytes(b'')
    with pytest.raises(CheckpointError, match='whole: .*step-00000004'): read_checkpoint(two/'step-00000008')
    (two/'step-00000004'/'SHA256SUMS').unlink()
    with pytest.raises(CheckpointError) as caught: read_checkpoint(two/'step-00000008')
    assert 'whole' not in str(caught.value)


def test_a_later_one_is_not_offered(two):
    (two/'step-00000004'/'model.safetensors').write_bytes(b'')
    with pytest.raises(CheckpointError) as caught: read_checkpoint(two/'step-00000004')
    assert 'whole' not in str(caught.value)


def test_a_folder_of_checkpoints_is_not_one(two):
    with pytest.raises(CheckpointError, match=r'it holds some, such as .*step-00000008'): load_model(two)


OTHERS = {
    'width': (lambda: make(steps=9, model=lambda c: Noisy(GPTConfig(270, 16, 1, 2, 10, dropout=0.2)))[0], 'made with n_embd=8, and this trainer has n_embd=10; make the model as it was'),
    'type': (lambda: make(steps=9, dtype=torch.float64)[0], 'float32 there, and .* float64 here'),
    'no buffer': (lambda: make(steps=9, model=GPT)[0], r'seen is \(\) int64 there, and missing here'),
    'head': (lambda: make(steps=9, tied=False)[0], 'made with tied=True, and this trainer has tied=False; make the model as it was'),
    'setting': (lambda: make(steps=9, accumulate=3)[0], 'made with accumulate=2, and this trainer has accumulate=3; .* changed=True'),
    'schedule': (lambda: make(steps=9, rate=0.02)[0], 'made with learning_rate=0.01, and this trainer has learning_rate=0.02'),
}


def other_loader():
    trainer, _ = make(steps=9)
    trainer.loader = make_dataloader(trainer.loader.dataset.source, 16, batch_size=9, drop_last=False, seed=3)
    return trainer


def other_validation():
    trainer, _ = make(steps=9)
    trainer.validation = make_dataloader(trainer.validation.dataset.source, 16, batch_size=4, seed=5)
    return trainer


def frozen():
    trainer, _ = make(steps=9)
    trainer.model.position_embedding.requires_grad_(False)
    return Trainer(trainer.model, trainer.loader, trainer.config, trainer.validation, trainer.schedule)


def plain_schedule():
    trainer, _ = make(steps=9)
    right = trainer.schedule
    trainer.schedule = lambda step: 2 * right(step)
    return trainer


OTHERS |= {'loader': (other_loader, 'does not fit the loader: .*batch_size=10.*changed=True'), 'validation': (other_validation, 'does not fit the validation: .*seed=4'),
           'frozen': (frozen, 'an optimiser with other parameters'), 'a function': (plain_schedule, 'made with|learning rate of')}


@pytest.mark.parametrize('other', OTHERS)
def test_another_training_is_refused_before_anything_changes(other, pair, tmp_path):
    build, message = OTHERS[other]
    trainer = build()
    trainer.run(2, report=None)
    before, generators = state_of(trainer, tmp_path/'s'), module._random_states()
    with pytest.raises(CheckpointError, match=message): load_checkpoint(pair/'step-00000008', trainer)
    assert module._random_states() == generators
    assert state_of(trainer, tmp_path/'s') == before
    trainer.run(3, report=None)                            # its own loop goes on
    twin = build()
    twin.run(3, report=None)
    assert twin.history == trainer.history


def test_a_function_as_a_schedule_is_compared_by_what_it_gives(tmp_path):
    def trainer(factor):
        t, _ = make(steps=9)
        t.schedule = lambda step: factor / (step + 1)
        return t
    first = trainer(0.01)
    first.run(3, report=None)
    save_checkpoint(tmp_path/'c', first)
    load_checkpoint(tmp_path/'c', trainer(0.01))
    with pytest.raises(CheckpointError, match='learning rate of 0.00333333 in its last step, .* gives 0.00666667'): load_checkpoint(tmp_path/'c', trainer(0.02))


def test_a_schedule_that_differs_only_later(tmp_path):
    trainer, _ = make(steps=30)
    trainer.run(3, report=None)                            # in the warm-up, which is the same
    save_checkpoint(tmp_path/'c', trainer)
    other, _ = make(steps=30)
    other.schedule = dataclasses.replace(other.schedule, max_steps=60)
    assert other.schedule(2) == trainer.schedule(2)
    with pytest.raises(CheckpointError, match='max_steps=30, and this trainer has max_steps=60'): load_checkpoint(tmp_path/'c', other)


def test_a_trainer_that_has_trained_before(pair):
    for stop in (1, 3, 9):
        trainer, _ = make(steps=9)
        trainer.run(stop, report=None)
        load_checkpoint(pair/'step-00000004', trainer)
        trainer.run(report=None)
        assert trainer.history == make_whole(9).history


def test_changed_settings(pair):
    trainer, _ = make(steps=9, rate=0.02, every=3)
    load_checkpoint(pair/'step-00000008', trainer, changed=True)
    assert trainer.step == 8 and trainer.optimizer.param_groups[0]['betas'] == (0.9, 0.95)
    trainer.run(report=None)
    assert trainer.history.rates[-1] == trainer.schedule(8)
    trainer = other_loader()
    load_checkpoint(pair/'step-00000008', trainer, changed=True)
    assert trainer.loader.state_dict()['batch'] == 0
    for name in ('width', 'type', 'head'):                 # another model is never taken
        with pytest.raises(CheckpointError): load_checkpoint(pair/'step-00000008', OTHERS[name][0](), changed=True)


def test_at_once_and_not_after_an_hour(tmp_path):
    trainer, tokenizer = make(steps=9)
    for wrong, kind in ((gpt2_encoding(), 'Encoding'), ('gpt2', 'str'), (BPETokenizer, 'type')):
        with pytest.raises(TypeError, match=f'tokenizer is a {kind}, .*BPETokenizer'): Checkpoints(tmp_path/'runs', tokenizer=wrong)
        with pytest.raises(TypeError, match=f'tokenizer is a {kind}'): save_checkpoint(tmp_path/'runs', trainer, wrong)
    trainer.loader = list(trainer.loader)
    with pytest.raises(TypeError, match='the loader is a list without state_dict.*make_dataloader'): trainer.run(checkpoints=Checkpoints(tmp_path/'runs'), report=None)
    assert trainer.step == 0 and not (tmp_path/'runs').exists()
    trainer, _ = make(steps=9)
    trainer.optimizer.param_groups[0]['note'] = {1, 2}
    with pytest.raises(TypeError, match='cannot be kept'): trainer.run(checkpoints=Checkpoints(tmp_path/'runs'), report=None)
    for name in ('every', 'keep'):
        with pytest.raises(ValueError, match=f'{name}=0'): Checkpoints(tmp_path, **{name: 0})
    (tmp_path/'file').write_text('')
    with pytest.raises(OSError): make(steps=9)[0].run(checkpoints=Checkpoints(tmp_path/'file'), report=None)


def test_nothing_else_is_replaced(tmp_path):
    trainer, _ = make(steps=9)
    (tmp_path/'diary').mkdir()
    (tmp_path/'diary'/'monday.txt').write_text('work')
    (tmp_path/'file').write_text('work')
    for name in ('diary', 'file'):
        with pytest.raises(FileExistsError, match='is no checkpoint that could be replaced'): save_checkpoint(tmp_path/name, trainer)
    assert names(tmp_path) == ['diary', 'file'] and (tmp_path/'diary'/'monday.txt').read_text() == 'work'
    (tmp_path/'empty').mkdir()
    assert save_checkpoint(tmp_path/'empty', trainer) == tmp_path/'empty'
    save_checkpoint(tmp_path/'deep'/'er'/'c', trainer)
    if os.name != 'nt':
        (tmp_path/'link').symlink_to(tmp_path/'empty', target_is_directory=True)
        trainer.update()
        save_checkpoint(tmp_path/'link', trainer)
        assert (tmp_path/'link').is_symlink() and read_checkpoint(tmp_path/'empty')['step'] == 1


# ---- which are kept

@settings(max_examples=25)
@given(st.lists(st.integers(0, 3), min_size=4, max_size=10), st.integers(1, 3), st.integers(1, 3), st.integers(1, 4), st.integers(0, 9))
def test_the_last_and_the_best_are_kept(tmp_path_factory, losses, every, keep, look, restart):
    "Against the rule in words: after each save, the last `keep` that were saved and the earliest with the lowest loss among those still there."
    folder = tmp_path_factory.mktemp('kept')
    class Loader(list):
        def state_dict(self): return {}
        def load_state_dict(self, state): pass
    def begin():
        model = nn.Sequential(nn.Embedding(3, 3))
        trainer = Trainer(model, Loader([(torch.zeros(1, 1, dtype=torch.int64),) * 2]), TrainConfig(len(losses), evaluate_every=look), validation=[])
        def evaluate():
            trainer.history.validation[trainer.step] = losses[trainer.step - 1]
            return 0.0
        trainer.evaluate = evaluate
        trainer.history.validation[0] = 9
        return trainer, Checkpoints(folder, every, keep)
    trainer, checkpoints = begin()
    there, seen = [], {0: 9}
    def expect(step):
        nonlocal there
        there = sorted({*there, step})
        scored = [s for s in there if s in seen]
        best = [min(scored, key=lambda s: (seen[s], s))] if scored else []
        there = [s for s in there if s in there[-keep:] or s in best]
    for step in range(1, len(losses) + 1):
        if step == restart and checkpoints.last:
            trainer, checkpoints = begin()
            checkpoints.resume(trainer)
        with checkpoints.hold(trainer):
            while trainer.step < step:
                trainer.update()
                new_best = False
                if trainer.step % look == 0 or trainer.step == len(losses):
                    new_best = losses[trainer.step - 1] < min(seen.values())
                    seen[trainer.step] = losses[trainer.step - 1]
                    trainer.evaluate()
                checkpoints.after_step(trainer)
                if new_best or trainer.step % every == 0: expect(trainer.step)
            checkpoints.end(trainer)
            expect(trainer.step)
        assert steps(folder) == there, (step, losses)


def test_the_best_stays_though_it_is_old(tmp_path):
    trainer, _ = make(steps=40, every=2)
    checkpoints = Checkpoints(tmp_path/'runs', every=3, keep=1)
    values = iter([5., 4., 3., 2., *[9.] * 40])
    trainer.evaluate = lambda: trainer.history.validation.setdefault(trainer.step, next(values))
    trainer.run(20, checkpoints=checkpoints, report=None)
    assert steps(tmp_path/'runs') == [6, 20]
    fresh, _ = make(steps=40, every=2)
    fresh.evaluate = lambda: fresh.history.validation.setdefault(fresh.step, 9.)
    checkpoints = Checkpoints(tmp_path/'runs', every=3, keep=1)
    checkpoints.resume(fresh)
    fresh.run(checkpoints=checkpoints, report=None)
    assert steps(tmp_path/'runs') == [6, 40]


def test_more_than_a_hundred_million_steps(tmp_path):
    for n in (99_999_999, 100_000_000): (tmp_path/f'step-{n}').mkdir()
    for name in ('step-1', 'step-00000001.part', 'step-0000000x', 'step-00000005.old'): (tmp_path/name).mkdir()
    (tmp_path/'step-00000009').write_text('')
    assert steps(tmp_path) == [99_999_999, 100_000_000]
    assert Checkpoints(tmp_path/'none').paths() == [] and Checkpoints(tmp_path/'none').last is None
    assert not (tmp_path/'none').exists()


def test_a_loss_that_is_no_number_is_never_the_best():
    for losses in ({10: math.nan, 20: 9.0}, {10: 9.5, 20: 9.0, 30: math.nan}): assert module._best([10, 20, 30], losses) == 20
    assert module._best([10], {10: math.nan}) == 10 and module._best([10], {20: 1.0}) is module._best([], {}) is None


# ---- one folder, one training

def test_notes_in_the_way_are_not_deleted(tmp_path):
    trainer, _ = make(steps=6)
    (tmp_path/'step-00000002').mkdir()
    (tmp_path/'step-00000002'/'notes.txt').write_text('mine')
    with pytest.raises(CheckpointError, match='of another training, or damaged'): trainer.run(3, checkpoints=Checkpoints(tmp_path, every=2), report=None)
    checkpoints, lines = Checkpoints(tmp_path/'runs', every=2), []
    trainer.run(1, checkpoints=checkpoints, report=None)
    with checkpoints.hold(trainer):
        shutil.copytree(tmp_path/'step-00000002', tmp_path/'runs'/'step-00000002')
        trainer.update()
        checkpoints.after_step(trainer, lines.append)
    assert 'not saved' in lines[0] and 'is no checkpoint that could be replaced' in lines[0]
    assert (tmp_path/'runs'/'step-00000002'/'notes.txt').read_text() == 'mine'

def test_a_folder_of_another_training(tmp_path):
    first, _ = make(steps=9)
    first.run(6, report=None, checkpoints=Checkpoints(tmp_path/'runs', every=2))
    before = {p: p.read_bytes() for p in (tmp_path/'runs').rglob('*') if p.is_file()}
    fresh, other, behind = (make(steps=9, rate=r)[0] for r in (1e-2, 3e-2, 1e-2))
    other.run(8, report=None)
    behind.run(4, report=None)
    for trainer in (fresh, other, behind):
        checkpoints, n = Checkpoints(tmp_path/'runs', every=1), trainer.step
        for act in (lambda: trainer.run(report=None, checkpoints=checkpoints), lambda: checkpoints.save(trainer)):
            with pytest.raises(CheckpointError, match=rf'step-00000006 is of another training.*at step {n}.*resume\(trainer\).*another folder'): act()
        assert trainer.step == n
    assert {p: p.read_bytes() for p in (tmp_path/'runs').rglob('*') if p.is_file()} == before
    Checkpoints(tmp_path/'runs').resume(fresh)
    fresh.run(report=None, checkpoints=Checkpoints(tmp_path/'runs'))
    first.run(8, report=None, checkpoints=None)
    with pytest.raises(CheckpointError): first.run(report=None, checkpoints=Checkpoints(tmp_path/'runs'))       # the other has gone further
    (tmp_path/'runs'/'step-00000009'/'training.safetensors').write_bytes(b'')
    with pytest.raises(CheckpointError, match='or damaged'): fresh.run(12, report=None, checkpoints=Checkpoints(tmp_path/'runs'))


def test_what_a_crash_has_left(tmp_path):
    trainer, _ = make(steps=9)
    checkpoints = Checkpoints(tmp_path/'runs', every=2)
    trainer.run(6, report=None, checkpoints=checkpoints)
    runs, last = tmp_path/'runs', tmp_path/'runs'/'step-00000006'
    want = digest(runs)
    shutil.copytree(last, runs/'step-00000007.0badcafe.part')
    (runs/'step-00000006.12345678.part').mkdir()
    (runs/'step-00000005.old').mkdir()                    # its checkpoint is there
    os.replace(last, runs/'step-00000006.old')            # between two renames
    (runs/'notes.old').mkdir()                            # not ours
    assert steps(runs) == [5]
    with pytest.raises(CheckpointError, match=r'is not there; a crash has left it as .*step-00000006\.old: rename that'): module._read(last)
    fresh, _ = make(steps=9)
    Checkpoints(runs).resume(fresh)
    assert fresh.step == 6 and digest(runs) == want
    assert names(runs) == ['notes.old', 'step-00000005', 'step-00000006']
    os.replace(last, runs/'step-00000006.old')
    trainer.run(report=None, checkpoints=checkpoints)
    assert [n for n in names(runs) if n.endswith('.old')] == ['notes.old']
    path = save_checkpoint(tmp_path/'alone', trainer)
    os.replace(path, tmp_path/'alone.old')
    (tmp_path/'alone.1234abcd.part').mkdir()
    (tmp_path/'alone.b.1234abcd.part').mkdir()            # of another name
    save_checkpoint(path, trainer)
    assert names(tmp_path) == ['alone', 'alone.b.1234abcd.part', 'runs']


def test_two_processes_in_one_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(module, '_PATIENCE', 0.2)
    first, _ = make(steps=9)
    one, two = Checkpoints(tmp_path/'runs', every=2), Checkpoints(tmp_path/'runs', every=2)
    second, _ = make(steps=9)
    with one.hold(first):
        for act in (lambda: second.run(checkpoints=two, report=None), lambda: two.save(second), lambda: two.resume(second)):
            with pytest.raises(RuntimeError, match='another process is training in .*runs; wait for it, or take another folder'): act()
        first.update()
        one.save(first)
    two.resume(second)
    second.run(checkpoints=two, report=None)
    assert second.history.losses == make_whole(9).history.losses
    with pytest.raises(ZeroDivisionError):
        with one.hold(second): 1 / 0
    two.save(second)                                      # the lock is free again


@posix
def test_two_that_save_under_one_name_are_never_mixed(tmp_path):
    "One waits for the other, so both can save, and no reader is ever given a mix."
    def writer(rate):
        def work():
            trainer, _ = make(steps=9, rate=rate)
            trainer.run(2, report=None)
            for _ in range(15):
                save_checkpoint(tmp_path/'c', trainer)
        return work
    wants = set()
    for rate in (1e-2, 2e-2):
        trainer, _ = make(steps=9, rate=rate)
        trainer.run(2, report=None)
        save_checkpoint(tmp_path/f'{rate}', trainer)
        wants.add((tmp_path/f'{rate}'/'SHA256SUMS').read_bytes())
    children = []
    for rate in (1e-2, 2e-2):
        if not (child := os.fork()):
            code = 1
            try:
                writer(rate)()
                code = 0
            finally: os._exit(code)
        children.append(child)
    for child in children: assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    read_checkpoint(tmp_path/'c')
    assert (tmp_path/'c'/'SHA256SUMS').read_bytes() in wants


def test_two_that_save_at_the_same_moment(tmp_path, monkeypatch):
    "The second begins when the first has written its weights, and has to wait until the first has ended."
    first, second = (make(steps=9, rate=rate)[0] for rate in (1e-2, 2e-2))
    for trainer in (first, second): trainer.run(2, report=None)
    real, begun, ended, errors = module._flatten, threading.Event(), threading.Event(), []
    def flatten(trainer):
        if trainer is first: other.start(), begun.wait(0.3)
        else: begun.set(), ended.wait(5)
        return real(trainer)
    def save(trainer):
        try: save_checkpoint(tmp_path/'c', trainer)
        except OSError as error: errors.append(error)
    monkeypatch.setattr(module, '_flatten', flatten)
    other = threading.Thread(target=save, args=(second,))
    save(first)
    ended.set()
    other.join()
    assert not errors
    read_checkpoint(tmp_path/'c')
    by_loss = {t.history.losses[-1]: t for t in (first, second)}
    assert len(by_loss) == 2
    left = make(steps=9)[0]
    load_checkpoint(tmp_path/'c', left, changed=True)
    twin = by_loss[left.history.losses[-1]]
    assert all(torch.equal(a, b) for a, b in zip(left.model.parameters(), twin.model.parameters()))


# ---- no room, no right

@posix
def test_a_full_disk_loses_nothing(tmp_path):
    "Files may not grow beyond a size that falls in the middle of a checkpoint, as on a full disk: in the middle of a run that is reported, at its end an error."
    whole = make_whole(12)
    trainer, tokenizer = make(steps=12)
    checkpoints = Checkpoints(tmp_path/'runs', every=2, tokenizer=tokenizer)
    trainer.run(4, checkpoints=checkpoints, report=None)
    before = names(tmp_path/'runs')
    sizes = sorted({f.stat().st_size for f in checkpoints.last.iterdir()})
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    lines = []
    try:
        for size in [0, 1, 500, *(s - 1 for s in sizes)]:
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, limit[1]))
            with pytest.raises(OSError): save_checkpoint(tmp_path/'runs'/'step-00000009', trainer, tokenizer)
            assert names(tmp_path/'runs') == before
        with pytest.raises(OSError, match=r'step 7 is not saved \(.*\)\. It is not lost while .* save\(trainer\) again, or save_checkpoint'): trainer.run(7, checkpoints=checkpoints, report=lines.append)
    finally: resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert any(l.startswith('step 6: not saved') and 'step 8 is the next chance' in l and str(checkpoints.last) in l for l in lines)
    assert names(tmp_path/'runs') == before and trainer.step == 7
    for path in checkpoints.paths(): read_checkpoint(path)
    trainer.run(checkpoints=checkpoints, report=None)
    assert trainer.history.losses == whole.history.losses and steps(tmp_path/'runs')[-1] == 12


@root
def test_a_small_disk_that_fills_up(tmp_path):
    disk = tmp_path/'disk'
    disk.mkdir()
    if subprocess.run(['mount', '-t', 'tmpfs', '-o', 'size=400k', 'tmpfs', disk], capture_output=True).returncode: pytest.skip('may not mount')
    try:
        trainer, tokenizer = make(steps=12)
        checkpoints, lines = Checkpoints(disk/'runs', every=1, keep=9, tokenizer=tokenizer), []
        with pytest.raises(OSError, match='No space left'): trainer.run(checkpoints=checkpoints, report=lines.append)
        assert trainer.step == 12 and 0 < len(checkpoints.paths()) < 12
        assert not [n for n in names(disk/'runs') if '.' in n]
        assert any('not saved' in l and 'No space left' in l for l in lines)
        for path in checkpoints.paths(): read_checkpoint(path)
        save_checkpoint(tmp_path/'elsewhere', trainer, tokenizer)          # the way out
        assert read_checkpoint(tmp_path/'elsewhere')['step'] == 12
    finally: subprocess.run(['umount', disk], check=True)


@root
def test_a_folder_that_may_only_be_read(tmp_path):
    trainer, tokenizer = make(steps=12)
    checkpoints = Checkpoints(tmp_path/'runs', every=2, tokenizer=tokenizer)
    trainer.run(4, checkpoints=checkpoints, report=None)
    before = {p: p.read_bytes() for p in (tmp_path/'runs').rglob('*') if p.is_file()}
    for folder in [tmp_path, *tmp_path.parents][:4]: os.chmod(folder, 0o755)
    def work():
        os.setgid(65534), os.setuid(65534)
        here = Checkpoints(tmp_path/'runs', every=2, tokenizer=tokenizer)
        fresh, _ = make(steps=12)
        here.resume(fresh)                                               # reading is all it needs
        assert fresh.step == 4
        for act in (lambda: fresh.run(checkpoints=here, report=None), lambda: here.save(fresh), lambda: save_checkpoint(tmp_path/'runs'/'x', fresh)):
            with pytest.raises(PermissionError): act()
        assert fresh.step == 4                                           # refused before the training, not after
        assert [int(p.name[5:]) for p in here.paths()] == [2, 4]
        read_checkpoint(here.last)
    assert in_child(work) == 0
    assert {p: p.read_bytes() for p in (tmp_path/'runs').rglob('*') if p.is_file()} == before


@pytest.mark.parametrize('call', ['replace', 'fsync', 'mkdir'])
def test_a_failing_call_leaves_what_was_there(call, tmp_path, monkeypatch):
    "Each call of the system in turn fails, once: the old one stays whole, or the new one is, and a later save is as if nothing had been."
    trainer, _ = make(steps=9)
    checkpoints = Checkpoints(tmp_path/'runs', every=1, keep=1)
    trainer.run(2, checkpoints=checkpoints, report=None)
    for n in range(20):
        real, calls = getattr(os, call), []
        def fail(*arguments, **more):
            calls.append(arguments)
            if len(calls) == n + 1: raise OSError(5, 'Input/output error')
            return real(*arguments, **more)
        with monkeypatch.context() as patch:
            patch.setattr(os, call, fail)
            try: save_checkpoint(checkpoints.last, trainer)
            except OSError: pass
        read_checkpoint(checkpoints.last)
        assert not [p for p in names(tmp_path/'runs') if p.endswith('.part')]
        if len(calls) <= n: break
    assert n
    checkpoints.save(trainer)
    assert names(tmp_path/'runs') == ['step-00000002']


def test_windows_cannot_wait_for_a_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(module.os, 'fsync', lambda handle: pytest.fail('asked'))
    class Windows:
        name = 'nt'
        def __getattr__(self, name): return getattr(os, name)
    monkeypatch.setattr(module, 'os', Windows())
    module._sync(tmp_path)


def test_everything_is_on_the_disk_before_it_is_renamed(tmp_path, monkeypatch):
    trainer, tokenizer = make(steps=5)
    log = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, 'fsync', lambda h: (log.append(('sync', os.fstat(h).st_ino)), fsync(h))[1])
    monkeypatch.setattr(os, 'replace', lambda a, b: (log.append(('rename', Path(a).name, Path(b).name)), replace(a, b))[1])
    path = save_checkpoint(tmp_path/'c', trainer, tokenizer)
    at = next(i for i, e in enumerate(log) if e[0] == 'rename' and e[2] == 'c')
    before = {e[1] for e in log[:at] if e[0] == 'sync'}
    assert {f.stat().st_ino for f in path.iterdir()} | {path.stat().st_ino} <= before
    assert ('sync', tmp_path.stat().st_ino) in log[at:]


@posix
def test_files_are_as_open_as_others(tmp_path):
    trainer, tokenizer = make(steps=5)
    before = os.umask(0o022)
    try: path = save_checkpoint(tmp_path/'c', trainer, tokenizer)
    finally: os.umask(before)
    assert {f.stat().st_mode & 0o777 for f in path.iterdir()} == {0o644} and path.stat().st_mode & 0o777 == 0o755


# ---- the model alone

@pytest.mark.parametrize('more', [dict(), dict(tied=False), dict(bias=False, qkv_bias=True), dict(dropout=0.3)], ids=str)
@pytest.mark.parametrize('dtype', [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_the_model_comes_back(more, dtype, tmp_path):
    set_seed(1)
    config = GPTConfig(270, 16, 2, 2, 8, **more)
    model = GPT(config).to(dtype)
    trainer, tokenizer = make(steps=5)
    save_checkpoint(tmp_path/'c', Trainer(model, trainer.loader), tokenizer)
    state = module._random_states()
    again, its = load_model(tmp_path/'c')
    assert module._random_states() == state
    assert again.config == config and not again.training
    for (a, p), (b, q) in zip(model.named_parameters(), again.named_parameters(), strict=True): assert a == b and p.dtype == q.dtype and torch.equal(p, q) and q.requires_grad
    assert (again.lm_head.weight is again.token_embedding.weight) is config.tied
    prompt = its.encode('I had')
    assert prompt == tokenizer.encode('I had') and generate(again, prompt, 9, seed=4) == generate(model, prompt, 9, seed=4)
    shutil.rmtree(tmp_path/'c')                            # nothing is read from the disk later
    generate(again, prompt, 3)


def test_a_model_that_is_no_gpt(tmp_path):
    trainer, _ = make(steps=5)
    model = nn.Sequential(nn.Embedding(270, 8), nn.BatchNorm1d(16), nn.Linear(8, 270))
    other = Trainer(model, trainer.loader, TrainConfig(4, evaluate_every=2))
    other.run(3, report=None)
    save_checkpoint(tmp_path/'c', other)
    with pytest.raises(CheckpointError, match='does not hold a GPT.*model.safetensors'): load_model(tmp_path/'c')
    twin = copy.deepcopy(model)
    for p in [*twin.parameters(), *twin.buffers()]: p.data.zero_()
    twin = Trainer(twin, make(steps=5)[0].loader, TrainConfig(4, evaluate_every=2))
    load_checkpoint(tmp_path/'c', twin)
    for a, b in zip(twin.model.state_dict().values(), model.state_dict().values()): assert torch.equal(a, b)
    save_checkpoint(tmp_path/'g', trainer)
    assert load_model.__annotations__ and read_checkpoint(tmp_path/'g')['model']['vocab_size'] == 270


def test_a_compiled_model_is_saved_as_itself(tmp_path):
    trainer, _ = make(steps=5, model=GPT)
    class Compiled(nn.Module):
        def __init__(self, model): super().__init__(); self._orig_mod = model
        def __getattr__(self, name): return super().__getattr__('_orig_mod') if name == '_orig_mod' else getattr(super().__getattr__('_orig_mod'), name)
        def forward(self, ids): return self._orig_mod(ids)
    other = Trainer(Compiled(trainer.model), trainer.loader, trainer.config)
    other.update()
    save_checkpoint(tmp_path/'c', other)
    model, tokenizer = load_model(tmp_path/'c')
    assert tokenizer is None and torch.equal(model.lm_head.weight, trainer.model.lm_head.weight)
    fresh = Trainer(GPT(trainer.model.config), make(steps=5)[0].loader, trainer.config)
    load_checkpoint(tmp_path/'c', fresh, changed=True)
    assert fresh.step == 1


def test_tensors_are_copies_and_not_windows_into_the_file(pair, tmp_path):
    plain, _ = make(steps=5, model=GPT)
    model, _ = load_model(save_checkpoint(tmp_path/'g', plain))
    with open(tmp_path/'g'/'model.safetensors', 'r+b') as file: file.write(b'\xff' * (tmp_path/'g'/'model.safetensors').stat().st_size)
    assert torch.equal(model.lm_head.weight, plain.model.lm_head.weight)
    shutil.copytree(pair/'step-00000008', tmp_path/'c')
    trainer, _ = make(steps=9)
    load_checkpoint(tmp_path/'c', trainer)
    before = state_of(trainer, tmp_path/'s')
    for name in ('model.safetensors', 'training.safetensors'):
        with open(tmp_path/'c'/name, 'r+b') as file: file.write(b'\xff' * (tmp_path/'c'/name).stat().st_size)
    assert state_of(trainer, tmp_path/'s') == before


def test_another_model_of_the_same_shapes_is_refused(tmp_path):
    trainer, _ = make(steps=9)
    trainer.run(2, report=None)
    save_checkpoint(tmp_path/'c', trainer)
    for changed in (False, True):
        fresh, _ = make(steps=9)
        fresh.model.config = dataclasses.replace(fresh.model.config, n_head=1)
        before = [p.clone() for p in fresh.model.parameters()]
        with pytest.raises(CheckpointError, match='with n_head=.*, and this trainer has n_head=1; make the model as it was'): load_checkpoint(tmp_path/'c', fresh, changed)
        assert fresh.step == 0 and all(torch.equal(a, b) for a, b in zip(before, fresh.model.parameters()))
    fresh, _ = make(steps=9)
    fresh.model.config = dataclasses.replace(fresh.model.config, dropout=0.75)
    with pytest.raises(CheckpointError, match='dropout=0.75; take the same, or load with changed=True'): load_checkpoint(tmp_path/'c', fresh)
    load_checkpoint(tmp_path/'c', fresh, changed=True)
    assert fresh.step == 2


def test_the_best_is_found(tmp_path):
    kept = Checkpoints(tmp_path/'runs', every=100, keep=1)
    assert kept.best is None
    trainer, _ = make(steps=9)
    for step, losses in ((2, {}), (4, {4: 1.0}), (6, {4: 1.0, 5: 0.5, 6: 2.0})):      # step 5 was better, and never saved
        while trainer.step < step: trainer.update()
        trainer.history.validation = losses
        kept.save(trainer)
        assert kept.best == (kept.folder/'step-00000004' if losses else None)
    assert names(kept.folder) == ['step-00000004', 'step-00000006']

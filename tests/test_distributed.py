"One, two and four processes do the same; whatever fails in one fails in all; who is killed goes on. Few starts of torchrun, with many scenarios each (tests/distributed_run.py)."
import json, os, shutil, signal, socket, subprocess, sys, time
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from distributed_run import STEPS, STOP, parts
from hypothesis import given, settings, strategies as st
from llmbook import distributed as module
from llmbook.checkpoint import Checkpoints, load_model, read_checkpoint
from llmbook.data import make_dataloader
from llmbook.distributed import World, join_world, share_batches
from llmbook.train import Trainer
from safetensors.torch import load_file

pytestmark = [pytest.mark.usefixtures('one_thread'), pytest.mark.skipif(os.name == 'nt', reason='gloo on Windows cannot shard')]
PROGRAM = Path(__file__).with_name('distributed_run.py')
TOLERANCE = dict(rtol=0, atol=1e-11)      # sums of 64 bits in another order, through 13 steps; a token more or less shows in the third digit


def command(n, folder, *names, options=()):
    return [sys.executable, '-m', 'torch.distributed.run', '--standalone', f'--nproc-per-node={n}', *options, str(PROGRAM), str(folder), *names]


def torchrun(n, folder, *names, options=()):
    "Start `n` processes; gives for each scenario what each process has seen."
    env = {**os.environ, 'OMP_NUM_THREADS': '1'}
    process = subprocess.Popen(command(n, folder, *names, options=options), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env)
    try: out, _ = process.communicate(timeout=120)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGTERM)
        out, _ = process.communicate()
        raise AssertionError(f'it hangs: {out[-4000:]}')
    assert process.returncode == 0, out[-6000:]
    return {name: [json.loads((Path(folder)/f'{name}-{n}-{rank}.json').read_text()) for rank in range(n)] for name in names}


SCENARIOS = 'runs', 'epoch', 'evaluates', 'silence', 'dropout', 'disagree', 'fails', 'not_finite', 'interrupted', 'samples'


@pytest.fixture(scope='module')
def folder(tmp_path_factory): return tmp_path_factory.mktemp('runs')


@pytest.fixture(scope='module')
def two(folder, one_thread):
    seen = torchrun(2, folder, *SCENARIOS)
    for way in ('ddp', 'fsdp'):
        for n in (1, 4): shutil.copytree(folder/f'{way}-stopped', folder/f'{way}-2-to-{n}')
    return seen


@pytest.fixture(scope='module')
def one(folder, one_thread):
    "The judge: the plain trainer."
    trainer = Trainer(*parts())
    trainer.run(STOP, checkpoints=Checkpoints(folder/'one'), report=None)
    shutil.copytree(folder/'one', folder/'one-to-4')
    trainer.run(checkpoints=Checkpoints(folder/'one'), report=None)
    return trainer


@pytest.fixture(scope='module')
def four(folder, one, two): return torchrun(4, folder, 'runs', 'resumes', 'epoch', 'evaluates')


def tensors(folder):
    last = Checkpoints(folder).last
    read_checkpoint(last)
    return {f'{name} {k}': v for name in ('model', 'training') for k, v in load_file(last/f'{name}.safetensors').items()}


def assert_same_end(folder, other):
    a, b = tensors(folder), tensors(other)
    assert a.keys() == b.keys()
    for key in a: torch.testing.assert_close(a[key], b[key], msg=lambda m: f'{key}: {m}', **TOLERANCE)


# ---- the same as one process

@pytest.mark.parametrize('name', ['ddp-2', 'fsdp-2', 'ddp-4', 'fsdp-4', 'ddp-2-to-4', 'fsdp-2-to-4', 'one-to-4'])
def test_losses_weights_and_means_are_those_of_one_process(name, one, two, four, folder): assert_same_end(folder/'one', folder/name)


@pytest.mark.parametrize('way', ['ddp', 'fsdp'])
def test_one_goes_on_with_what_two_have_begun(way, one, two, folder):
    trainer, checkpoints = Trainer(*parts()), Checkpoints(folder/f'{way}-2-to-1')
    checkpoints.resume(trainer)
    assert trainer.step == STOP
    trainer.run(checkpoints=checkpoints, report=None)
    assert_same_end(folder/'one', folder/f'{way}-2-to-1')


def test_four_have_gone_on(four): assert four['resumes'] == [[STOP] * 3] * 4


def test_a_sharded_checkpoint_is_a_plain_one(two, one, folder):
    model, _ = load_model(Checkpoints(folder/'fsdp-2').last)
    torch.testing.assert_close(dict(model.named_parameters()), dict(one.model.named_parameters()), **TOLERANCE)
    files = [{p.name: p.stat().st_size for p in Checkpoints(folder/name).last.iterdir() if p.suffix == '.safetensors'} for name in ('one', 'ddp-2', 'fsdp-2')]
    assert [f.keys() for f in files] == [files[0].keys()] * 3 and files[0]['model.safetensors'] == files[1]['model.safetensors']
    assert not list(folder.glob('*/.shards'))


@pytest.mark.parametrize('n', [2, 4])
def test_all_have_the_same_history(n, two, four, one):
    h = one.history
    for seen in {2: two, 4: four}[n]['runs']:
        for way in ('ddp', 'fsdp'):
            losses, norms, tokens, validation = seen[f'{way} history']
            assert seen[f'{way} history'] == {2: two, 4: four}[n]['runs'][0][f'{way} history']
            assert tokens == h.tokens
            torch.testing.assert_close([*losses, *norms, *(v for _, v in validation)], [*h.losses, *h.norms, *h.validation.values()], **TOLERANCE)
            assert [s for s, _ in validation] == sorted(h.validation)


@pytest.mark.parametrize('n', [2, 4])
def test_bytes_of_each_process(n, two, four, one):
    P = sum(p.numel() for p in one.model.parameters())
    seen = [s for s in {2: two, 4: four}[n]['runs']]
    assert all(s['ddp'] == [8 * P, 8 * P, 16 * P] for s in seen)
    assert [sum(s['fsdp'][k] for s in seen) for k in range(3)] == [8 * P, 8 * P, 16 * P]          # together once
    most = sum(-(-p.shape[0] // n) * p[0].numel() for p in one.model.parameters())
    assert max(s['fsdp'][0] for s in seen) == 8 * most and most < 1.1 * P / n + 2000


# ---- data

@pytest.mark.parametrize('n', [2, 4])
def test_each_window_is_read_once(n, two, four):
    _, loader, *_ = parts()
    by_rank = {2: two, 4: four}[n]['epoch']
    for epoch in (0, 1):
        loader.batch_sampler.epoch = epoch
        for k, batch in enumerate(loader.batch_sampler):
            shares = [seen[epoch][k] for seen in by_rank]
            assert sorted(sum(shares, [])) == sorted(batch) and all(shares)
        read = sum((sum(seen[epoch], []) for seen in by_rank), [])
        assert sorted(read) == list(range(41))
    assert by_rank[0][0] != by_rank[0][1]


@settings(max_examples=200)
@given(n=st.integers(1, 60), batch_size=st.integers(1, 20), size=st.integers(1, 9), shuffle=st.booleans(), drop_last=st.booleans(), start=st.integers(0, 3))
def test_shares_of_any_size(n, batch_size, size, shuffle, drop_last, start):
    if drop_last and n < batch_size: return
    make = lambda: make_dataloader(torch.arange(2 * n + 1), 2, batch_size, shuffle=shuffle, drop_last=drop_last)
    lengths = [len(b) for b in make().batch_sampler]
    loaders = [make() for _ in range(size)]
    if min(lengths) < size:
        with pytest.raises(ValueError, match=f'{size} processes share batches, and') as error: share_batches(loaders[0], 0, size)
        assert f'{min(lengths)} of {n}' in str(error.value) or f'batch_size={batch_size}' in str(error.value) or f'there are {n} windows' in str(error.value)
        assert loaders[0].batch_sampler.part == slice(None)                       # left as it was
        return
    state = {**make().state_dict(), 'batch': start % len(lengths)}
    for rank, loader in enumerate(loaders):
        share_batches(loader, rank, size)
        loader.load_state_dict(state)                                             # of any number of processes
    whole = make()
    whole.load_state_dict(state)
    for batch, *shares in zip(whole, *loaders):
        rows = torch.cat([inputs for inputs, _ in shares])
        assert sorted(rows.tolist()) == sorted(batch[0].tolist())
        assert max(map(len, (s[0] for s in shares))) - min(map(len, (s[0] for s in shares))) <= 1
    assert all(loader.state_dict() == whole.state_dict() for loader in loaders)


# ---- a step

def test_they_talk_once_a_step_and_ask_the_loss_of_the_trainer(two): assert two['silence'] == [[1, 1, 5]] * 2


def test_dropout_differs_between_processes_and_repeats(two):
    (first, again), (other, _) = two['dropout']
    assert first == again and two['dropout'][1][0] == two['dropout'][1][1]
    drawn = [tuple(d) for d in (*first, *other)]
    assert len(set(drawn)) == len(drawn) > 20


def test_seeds_are_all_different():
    assert len({module._seed_of(s, k, r) for s in range(5) for k in range(30) for r in range(9)}) == 5 * 30 * 9
    assert all(0 <= module._seed_of(s, 10**7, r) < 2**63 for s in (0, 2**32) for r in range(50))


@pytest.mark.parametrize('n', [2, 4])
def test_evaluate_is_that_of_one_process(n, two, four, one_thread):
    for seen in {2: two, 4: four}[n]['evaluates']:
        for batches in (1, 2, 3, 5, 6):
            want = Trainer(*parts(validation=batches, dropout=0.3)).evaluate()
            for shard in (False, True): torch.testing.assert_close(seen[f'{batches} {shard}'], want, **TOLERANCE)
        assert seen['empty'].startswith('ValueError: validation is empty') and seen['none'].startswith('ValueError: validation=None')
        want = Trainer(*parts(validation=6, evaluate_batches=3)).evaluate()
        torch.testing.assert_close(seen['limit'], want, **TOLERANCE)


def test_process_0_tells(two):
    (calls, lines), (others, silent) = two['samples']
    assert calls == 2 and lines.count('a text') == 2 and len(lines) == 4       # at step 0 and 4
    assert others == 0 and silent == []


# ---- errors

WORDS = {'loader': 'process 0 has loader.batch_size=4 and process 1 has loader.batch_size=5; start all', 'config': 'training.grad_clip=0.5 and process 1 has training.grad_clip=1.5', 'schedule': 'schedule.warmup_steps=3',
         'validation': 'validation.seed=0 and process 1 has validation.seed=1', 'shard': 'shard=True and process 1 has shard=False', 'seed': 'seed=0', 'weights': 'checksum of the weights=', 'model': 'model.dropout=0.0',
         'list': 'TypeError: loader is a list', 'little': 'batch_size=1 gives some of them nothing; take batch_size=2', 'rest': 'the last batch of an epoch has 1 of 10 windows', 'sample': 'sample needs the whole model'}


@pytest.mark.parametrize('what', WORDS)
def test_what_differs_is_named_in_all(what, two):
    here, there = (seen[what] for seen in two['disagree'])
    assert here == there and WORDS[what] in here, here


def test_what_fails_in_one_fails_in_all(two):
    here, there = two['fails']
    for seen in (here, there):
        assert seen['plain'] == 'OSError: [Errno 28] full' and seen['checkpoint'] == 'CheckpointError: bad' and seen['last'] == "KeyError: 'k'"
        assert seen['stubborn'] == 'RuntimeError: Stubborn: odd' and seen['fragile'] == 'RuntimeError: Fragile: 1 2'
        assert seen['generator'] == 'RuntimeError: a generator cannot be sent to other processes' and 'a function cannot' in seen['lambda']
        assert seen['values'][0] == [0, 1] and seen['values'][1] == [0, 'x'] and seen['values'][2] == [2, 1, 2, 0.2]
        assert seen['end'].startswith('OSError: step 3 is not saved ([Errno 28] No space)') and seen['step'] == 3
        for text in (seen['end'], seen['shards'][0]): assert "let all processes call save(trainer) again, or take DistributedCheckpoints(world, 'another/place')" in text
        assert seen['again'] == [['step-00000003'], ['step-00000003'], ['step-00000002']]      # both ways out that the message names work
        assert seen['hold'].startswith('CheckpointError') and 'has not come from it' in seen['hold']
        assert 'model.safetensors is not what was written' in seen['resume'] and seen['untouched'] == 0
        assert 'weight_decay=0.1, and this trainer has weight_decay=0.3' in seen['settings']
        assert seen['shards'][0].startswith('OSError: step 1 is not saved') and seen['at last'] == [['step-00000002'], False]
    assert any('step 2: not saved' in line for line in here['lines']) and there['lines'] == []
    assert any('step 1: not saved' in line for line in here['shards'][1])


def test_what_is_not_finite_is_so_in_all(two):
    for seen in two['not_finite']:
        for shard in (False, True):
            text, step, untouched = seen[f'step {shard}']
            assert text.startswith('FloatingPointError: step 2: the loss is nan') and step == 2 and untouched
            text, saved = seen[f'save {shard}']
            assert text.startswith('FloatingPointError: step 1: the model holds numbers') and saved == 0
    assert two['not_finite'][0] == two['not_finite'][1]


def test_ctrl_c_in_one_stops_all_at_the_same_step(two, one):
    here, there = two['interrupted']
    assert here[0][0] == here[1][0] == there[0][0] == there[1][0] == 4
    for way in (0, 1):
        assert 'stopped after step 4 of 13, saved as' in here[way][1][0] and there[way][1] == [] and here[way][2] == there[way][2] == ['step-00000004']
        torch.testing.assert_close(torch.tensor(here[way][3], dtype=torch.double), torch.cat([p.detach().flatten() for p in one.model.parameters()]), **TOLERANCE)


def environment(port, **more):
    return patch.dict(os.environ, {'RANK': '0', 'WORLD_SIZE': '1', 'LOCAL_RANK': '0', 'MASTER_ADDR': '127.0.0.1', 'MASTER_PORT': str(port), **more})


def free_port():
    with socket.create_server(('127.0.0.1', 0)) as s: return s.getsockname()[1]


def joins(device='cpu', patience=5):
    with join_world(device, patience) as world: return world


def test_started_without_torchrun():
    with patch.dict(os.environ):
        for name in ('RANK', 'WORLD_SIZE', 'LOCAL_RANK'): os.environ.pop(name, None)
        with pytest.raises(RuntimeError, match='RANK is not set, so torchrun has not started this program. Start it so: torchrun --standalone --nproc-per-node 2'): joins()
    for value in ('one', '-1', '²', '1.0', ' 1'):
        with environment(1, RANK=value), pytest.raises(RuntimeError, match='no number; torchrun sets it'): joins()


def test_a_port_in_use_and_a_world_that_never_meets():
    with socket.create_server(('127.0.0.1', 0)) as taken:
        port = taken.getsockname()[1]
        with environment(port), pytest.raises(RuntimeError, match=f'process 0 of 1 cannot meet the others at 127.0.0.1:{port}: the port is in use. torchrun --standalone'): joins()
    with environment(free_port(), WORLD_SIZE='2'), pytest.raises(RuntimeError, match='process 0 of 2 cannot meet .* with the same --nnodes'): joins(patience=1)
    with environment(free_port(), WORLD_SIZE='2', RANK='1'), pytest.raises(RuntimeError, match='process 1 of 2 cannot meet'): joins(patience=1)
    with environment(free_port()): assert joins() == World(0, 1, torch.device('cpu'))      # and it can still be done
    assert not torch.distributed.is_initialized()


def test_the_world_ends_after_an_error():
    with environment(free_port()), pytest.raises(KeyError):
        with join_world('cpu'): raise KeyError
    assert not torch.distributed.is_initialized()


def test_devices():
    for name in ('mps', 'cuda:1', 'gpu', ''):
        with pytest.raises(ValueError, match=f"device='{name}' cannot be used by several"): module._choose_device(name, 0, 1)
    with patch('torch.cuda.device_count', lambda: 1), patch('torch.cuda.is_available', lambda: True):
        for name in (None, 'cuda'):
            with pytest.raises(RuntimeError, match='2 processes on this machine and 1 graphics cards; start one process for each'): module._choose_device(name, 1, 2)
        assert module._choose_device('cpu', 1, 2) == torch.device('cpu')
        with patch('torch.cuda.set_device'), patch.object(module, 'device_fault', lambda d: 'computes wrong numbers'), pytest.raises(RuntimeError, match='cuda:0 computes wrong'): module._choose_device(None, 0, 1)
        with patch('torch.cuda.set_device') as chosen, patch.object(module, 'device_fault', lambda d: None):
            assert module._choose_device(None, 0, 1) == torch.device('cuda', 0) and chosen.called


def test_a_restart_on_several_machines_wants_a_new_meeting_point():
    shared = dict(TORCHELASTIC_USE_AGENT_STORE='True', TORCHELASTIC_MAX_RESTARTS='3', GROUP_WORLD_SIZE='2')
    store = torch.distributed.HashStore()
    def meet(**env):
        with patch.dict(os.environ, env), patch.object(module.dist, 'rendezvous', lambda *a, **k: iter([(store, 0, 1)])): return module._meeting_point(0, 1, None)
    with pytest.raises(RuntimeError, match='TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1'): meet(**shared)
    assert meet(**{**shared, 'TORCHELASTIC_USE_AGENT_STORE': 'False'}) is store
    for env in ({**shared, 'GROUP_WORLD_SIZE': '1'}, {**shared, 'TORCHELASTIC_MAX_RESTARTS': '0'}): assert meet(**env) is not store
    meet(**{**shared, 'GROUP_WORLD_SIZE': '1', 'TORCHELASTIC_RESTART_COUNT': '0'}).set('k', 'old')
    assert not meet(**{**shared, 'GROUP_WORLD_SIZE': '1', 'TORCHELASTIC_RESTART_COUNT': '1'}).check(['k'])


# ---- killed and stopped

def test_killed_twice_it_ends_in_the_same_bytes(folder, two):
    seen = torchrun(2, folder, 'killed', options=['--max-restarts=2'])['killed']
    assert seen == [[2, [STEPS] * 3 + [6]]] * 2
    for way in ('ddp', 'fsdp'):
        unharmed, harmed = ((Checkpoints(folder/f'killed-{way}-{harm}').last/'SHA256SUMS').read_text() for harm in (False, True))
        assert unharmed == harmed
    assert_same = tensors(folder/'killed-ddp-True'), tensors(folder/'killed-fsdp-True')
    for key in assert_same[0]: torch.testing.assert_close(assert_same[0][key], assert_same[1][key], **TOLERANCE)


def test_ctrl_c_for_torchrun_stops_all_and_saves(folder, two):
    process = subprocess.Popen(command(2, folder, 'slow'), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env={**os.environ, 'OMP_NUM_THREADS': '1'}, start_new_session=True)
    end = time.monotonic() + 60
    def step(rank):
        path = folder/f'step-{rank}'
        return int(path.read_text() or 0) if path.exists() else 0
    try:
        while min(step(0), step(1)) < 3 and process.poll() is None and time.monotonic() < end: time.sleep(0.05)
        os.killpg(process.pid, signal.SIGINT)
        out, _ = process.communicate(timeout=60)
    finally: process.kill()
    steps = [json.loads((folder/f'slow-2-{rank}.json').read_text()) for rank in range(2)]
    assert steps[0] == steps[1] >= 3, out[-3000:]
    assert Checkpoints(folder/'slow').last.name == f'step-{steps[0]:08}'

"""What tests/test_distributed.py starts with torchrun: `distributed_run.py FOLDER SCENARIO …`. Each process writes what it has seen to FOLDER/SCENARIO-RANK.json."""
import json, os, shutil, signal, sys, time
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import torch
from llmbook.checkpoint import CheckpointError, _weights
from llmbook.core import load_text, set_seed
from llmbook.data import make_dataloader
from llmbook.distributed import DistributedCheckpoints, DistributedTrainer, join_world, share_batches
from llmbook.gpt import GPT, GPTConfig
from llmbook.schedule import WarmupCosine
from llmbook.train import TrainConfig
from torch import nn

STEPS, STOP = 13, 5


def parts(dropout=0.0, accumulate=3, batch_size=9, dtype=torch.float64, validation=3, **more):
    "Nothing is divisible by 2 or 4: vocabulary, context, width, batch; and an epoch ends with a short batch, in a short group."
    torch.set_num_threads(1)
    set_seed(5)
    ids = torch.tensor(list(load_text('the-verdict').encode()))
    model = GPT(GPTConfig(257, 17, 2, 3, 21, dropout=dropout)).to(dtype)
    with torch.no_grad():      # a vector that starts at 0 would hide a mistake
        for p in model.parameters(): p += 0.01 * torch.randn_like(p)
    loader = make_dataloader(ids[:17 * 41 + 1], 17, batch_size, seed=3, drop_last=False)      # 41 windows: 4 batches of 9, and one of 5
    held_out = make_dataloader(ids[2000:2000 + 17 * (5 * validation - 2) + 1], 17, 5, shuffle=False, drop_last=False)      # the last batch has 3 of 5
    return model, loader, TrainConfig(STEPS, accumulate=accumulate, evaluate_every=4, grad_clip=0.5, **more), held_out, WarmupCosine(STEPS, 1e-2, 3)


def whole(value): return value.full_tensor() if hasattr(value, 'full_tensor') else value
def weights(trainer): return torch.cat([whole(p).detach().flatten() for p in _weights(trainer.model).values()]).tolist()
def local(tensors): return sum(getattr(t, 'to_local', lambda: t)().nbytes for t in tensors)


def train(world, folder, steps=STEPS, shard=False, every=100, how={}, **more):
    trainer = DistributedTrainer(world, *parts(**how), shard=shard, **more)
    checkpoints = DistributedCheckpoints(world, folder, every)
    checkpoints.resume(trainer)
    begun = trainer.step
    trainer.run(steps, checkpoints=checkpoints, report=None)
    return trainer, begun


def message(work):
    try: work()
    except Exception as error: return f'{type(error).__name__}: {error}'
    return 'nothing'


# ---- scenarios: (world, folder) -> what this process has seen

def runs(world, folder):
    "Whole trainings, and stopped ones, in both ways; and what each process keeps."
    seen = {}
    for way in ('ddp', 'fsdp'):
        trainer, _ = train(world, folder/f'{way}-{world.size}', shard=way == 'fsdp')
        trainer.gradients([next(iter(trainer.loader))])
        state = [v for s in trainer.optimizer.state.values() for k, v in s.items() if k != 'step']
        seen[way] = [local(trainer.model.parameters()), local([p.grad for p in trainer.model.parameters()]), local(state)]
        seen[way + ' history'] = trainer.history.losses, trainer.history.norms, trainer.history.tokens, sorted(trainer.history.validation.items())
        if world.size == 2: train(world, folder/f'{way}-stopped', STOP, way == 'fsdp')
    return seen


def resumes(world, folder):
    "Go on with what two processes have begun, each way with what the other has saved."
    return [train(world, folder/f'{way}-2-to-{world.size}', shard=way == 'ddp')[1] for way in ('ddp', 'fsdp')] + [
        train(world, folder/f'one-to-{world.size}', shard=True)[1]]


def epoch(world, folder):
    "The windows that this process reads in two epochs, with and without accumulation."
    _, loader, *_ = parts()
    share_batches(loader, world.rank, world.size)
    loader.dataset.ids = None      # only the order
    return [list(loader.batch_sampler) for loader.batch_sampler.epoch in (0, 1)]


def evaluates(world, folder):
    "The loss of validation sets with more and with fewer batches than processes, in both ways; and that training goes on as before."
    seen = {}
    for n in (1, 2, 3, 5, 6):
        for shard in (False, True):
            trainer = DistributedTrainer(world, *parts(validation=n, dropout=0.3), shard=shard)
            trainer.model.train()
            seen[f'{n} {shard}'] = trainer.evaluate()
            assert trainer.model.training and all(m.training for m in trainer.model.modules())
    trainer.config = replace(trainer.config, evaluate_batches=3)
    seen['limit'] = trainer.evaluate()
    trainer.validation = []
    seen['empty'] = message(trainer.evaluate)
    trainer.validation = None
    seen['none'] = message(trainer.evaluate)
    return seen


def silence(world, folder):
    "How many all-reduces DDP makes in a step of three batches, and how often the trainer's loss is asked, which autocast may wrap."
    trainer, calls, asked = DistributedTrainer(world, *parts()), [], []
    loss = trainer.loss
    trainer.loss = lambda *batch: (asked.append(1), loss(*batch))[1]
    def hook(state, bucket):
        calls.append(1)
        return torch.distributed.all_reduce(bucket.buffer(), async_op=True).get_future().then(lambda f: f.value()[0] / world.size)
    trainer.parallel.register_comm_hook(None, hook)
    trainer.update()
    one = len(calls)
    trainer.update()      # the two that are left in the epoch
    return one, len(calls) - one, len(asked)


def dropout(world, folder):
    "Each process drops other places, another one in each step, and the same again after a resume."
    drawn = []
    class Watched(GPT):
        def hidden_states(self, ids, cache=None):
            drawn.append([self.training, self.dropout(torch.ones(50)).ne(0).tolist()])
            return super().hidden_states(ids, cache)
    GPT_, globals()['GPT'] = GPT, Watched
    try:
        train(world, folder/'dropout', 7, how=dict(dropout=0.4))
        first, drawn = drawn, []
        shutil.rmtree(folder/'dropout', ignore_errors=True) if world.rank == 0 else None
        torch.distributed.barrier()
        train(world, folder/'dropout', 3, how=dict(dropout=0.4))
        torch.manual_seed(99)
        train(world, folder/'dropout', 7, how=dict(dropout=0.4))
    finally: globals()['GPT'] = GPT_
    return [d for t, d in first if t], [d for t, d in drawn if t]


def disagree(world, folder):
    "What is told differently is named, whatever it is."
    r, (model, loader, config, held_out, schedule) = world.rank, parts()
    ids = torch.arange(400) % 257
    other = lambda **more: message(lambda: DistributedTrainer(world, **{**dict(model=model, loader=loader, config=config, validation=held_out, schedule=schedule), **more}))
    def moved():
        twin = parts()[0]
        if r == 1: next(iter(twin.blocks[1].parameters())).data[3] += 1e-12
        return twin
    seen = {'loader': other(loader=make_dataloader(ids, 17, 4 + r)), 'config': other(config=replace(config, grad_clip=0.5 + r)), 'schedule': other(schedule=WarmupCosine(STEPS, 1e-2, 3 + r)),
            'validation': other(validation=make_dataloader(ids, 17, 4, seed=r)), 'shard': other(shard=r == 0), 'seed': other(seed=r), 'weights': other(model=moved()),
            'model': other(model=GPT(GPTConfig(257, 17, 2, 3, 21, dropout=r / 4))), 'list': other(loader=[1]), 'little': other(loader=make_dataloader(ids, 17, 1)), 'rest': other(
                loader=make_dataloader(ids[:17 * 10 + 1], 17, 3, drop_last=False))}
    trainer = DistributedTrainer(world, *parts(), shard=True)
    seen['sample'] = message(lambda: trainer.run(1, sample=lambda model: 'text'))
    return seen


class Stubborn(Exception):
    def __reduce__(self): raise TypeError('cannot')
class Fragile(Exception):
    "It can be pickled, and not be read again."
    def __init__(self, one, two): super().__init__(f'{one} {two}')


def fails(world, folder):
    "Whatever fails in one process fails in all, and then they go on."
    r = world.rank
    def do(what):
        if isinstance(what, BaseException): raise what
        return what
    seen = {name: message(lambda: world.first(lambda: do(what))) for name, what in {
        'plain': OSError(28, 'full'), 'stubborn': Stubborn('odd'), 'fragile': Fragile(1, 2), 'generator': (x for x in ()), 'lambda': lambda: 0, 'checkpoint': CheckpointError('bad')}.items()}
    seen['last'] = message(lambda: world.each(lambda: do(KeyError('k') if r == world.size - 1 else 1)))
    seen['values'] = world.each(lambda: r), world.first(lambda: [r, 'x']), world.total([1, r, True, 0.1])
    trainer = DistributedTrainer(world, *parts())
    checkpoints = DistributedCheckpoints(world, folder/'fails')
    with patch('os.fsync', side_effect=OSError(28, 'No space')) if r == 0 else patch('time.time'):
        lines = []
        checkpoints.every = 2
        seen['end'] = message(lambda: trainer.run(3, checkpoints=checkpoints, report=lines.append))
        seen['lines'] = lines
    seen['step'] = trainer.step
    checkpoints.save(trainer)                                                # there is room again
    elsewhere, sharded_elsewhere = (DistributedCheckpoints(world, folder/name) for name in ('elsewhere', 'sharded-elsewhere'))
    elsewhere.save(trainer)
    seen['again'] = [[p.name for p in c.paths()] for c in (checkpoints, elsewhere)]
    trainer.run(4, checkpoints=checkpoints, report=None)
    fresh = DistributedTrainer(world, *parts())
    seen['hold'] = message(lambda: fresh.run(2, checkpoints=checkpoints, report=None))      # a fresh one in the folder of another
    if r == 0: (checkpoints.last/'model.safetensors').write_bytes(b'no')
    torch.distributed.barrier()
    seen['resume'] = message(lambda: checkpoints.resume(fresh))
    seen['untouched'] = fresh.step
    changed = DistributedTrainer(world, *parts(weight_decay=0.3))
    seen['settings'] = message(lambda: DistributedCheckpoints(world, folder/'ddp-2').resume(changed))
    sharded = DistributedTrainer(world, *parts(), shard=True)
    blocked = DistributedCheckpoints(world, folder/'blocked')
    if r == 0:
        blocked.folder.mkdir()
        (blocked.folder/'.shards').write_text('a file where a folder should be')
    torch.distributed.barrier()
    lines = []
    blocked.every = 1
    seen['shards'] = message(lambda: sharded.run(1, checkpoints=blocked, report=lines.append)), lines
    if r == 0: (blocked.folder/'.shards').unlink()
    sharded.run(2, checkpoints=blocked, report=None)
    sharded_elsewhere.save(sharded)
    seen['again'].append([p.name for p in sharded_elsewhere.paths()])
    seen['at last'] = [p.name for p in blocked.paths()], (blocked.folder/'.shards').exists()
    return seen


def not_finite(world, folder):
    "A gradient or a weight that is no number, in one process only."
    seen = {}
    for shard in (False, True):
        trainer = DistributedTrainer(world, *parts(), shard=shard)
        trainer.run(2, report=None)
        class Bad(nn.Module):
            def forward(self, x): return x * (float('nan') if world.rank == 1 else 1.0)
        before = weights(trainer)
        trainer.model.final_norm.register_forward_hook(lambda m, i, o: Bad()(o))
        seen[f'step {shard}'] = message(lambda: trainer.run(report=None)), trainer.step, weights(trainer) == before
        sick = DistributedTrainer(world, *parts(), shard=shard)
        sick.run(1, report=None)
        with torch.no_grad():
            for p in sick.model.blocks[1].parameters():
                part = getattr(p, 'to_local', lambda: p)()
                if world.rank == 1 and part.numel(): part.view(-1)[-1] = float('inf')
        checkpoints = DistributedCheckpoints(world, folder/f'sick-{shard}')
        seen[f'save {shard}'] = message(lambda: checkpoints.save(sick)), len(checkpoints.paths())
    return seen


def interrupted(world, folder):
    "Ctrl-C in one process, in the fourth step: all stop after the same step, and all can go on."
    seen = []
    for way in (False, True):
        trainer = DistributedTrainer(world, *parts(), shard=way)
        schedule = trainer.schedule
        def rate(step):
            if step == 3 and world.rank == 1 and len(trainer.history.losses) == 3 and not seen_[0]:
                seen_[0] = True
                signal.raise_signal(signal.SIGINT)
            return schedule(step)
        seen_, lines, trainer.schedule = [False], [], rate
        checkpoints = DistributedCheckpoints(world, folder/f'interrupted-{way}')
        trainer.run(checkpoints=checkpoints, report=lines.append)
        seen.append([trainer.step, lines[-1:], [p.name for p in checkpoints.paths()]])
        trainer.run(report=None)
        seen[-1].append(weights(trainer))
    return seen


def samples(world, folder):
    "Process 0 writes and tells, once."
    trainer, lines = DistributedTrainer(world, *parts()), []
    calls = []
    trainer.run(4, sample=lambda model: calls.append(1) or 'a text', report=lines.append)
    return len(calls), lines


def killed(world, folder):
    "Killed twice, once in each way; `TORCHELASTIC_RESTART_COUNT` says how often it has begun."
    attempt, begun = int(os.environ['TORCHELASTIC_RESTART_COUNT']), []
    for k, way in enumerate(('ddp', 'fsdp')):
        for harm in (False, True):
            trainer = DistributedTrainer(world, *parts(dropout=0.2), shard=way == 'fsdp')
            schedule = trainer.schedule
            def rate(step):
                if harm and attempt == k and step == 7 and trainer.step == 7 and world.rank == 1 - k: os.kill(os.getpid(), 9)
                return schedule(step)
            trainer.schedule = rate
            checkpoints = DistributedCheckpoints(world, folder/f'killed-{way}-{harm}', every=3)
            checkpoints.resume(trainer)
            begun.append(trainer.step)
            trainer.run(checkpoints=checkpoints, report=None)
    return attempt, begun


def slow(world, folder):
    "A training that lasts until somebody stops it."
    trainer = DistributedTrainer(world, *parts(), shard=False)
    trainer.config = replace(trainer.config, max_steps=100_000)
    schedule = trainer.schedule
    def rate(step):
        (folder/f'step-{world.rank}').write_text(str(step))
        time.sleep(0.01)
        return schedule(step)
    trainer.schedule = rate
    trainer.run(checkpoints=DistributedCheckpoints(world, folder/'slow', every=10**6), report=None)
    return trainer.step


if __name__ == '__main__':
    folder, *names = sys.argv[1:]
    with join_world('cpu', patience=60) as world:
        for name in names:
            result = globals()[name](world, Path(folder))
            Path(folder, f'{name}-{world.size}-{world.rank}.json').write_text(json.dumps(result))

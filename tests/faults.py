"""Kill, stop and spoil trainings, and see that nothing is lost: `make faults` does it fifty times, tests/test_checkpoint.py a few.

    python tests/faults.py [--kills 50]         the long form; prints its counts
    python tests/faults.py train FOLDER         one training, resumed from FOLDER if there is a checkpoint
"""
import argparse, multiprocessing, os, random, shutil, signal, subprocess, sys, tempfile, time
from collections import Counter
from pathlib import Path

import numpy as np
import torch
import torch._dynamo      # noqa: F401  AdamW imports it, which takes seconds
from llmbook.bpe import BPETokenizer
from llmbook.checkpoint import CheckpointError, Checkpoints, load_checkpoint, read_checkpoint, save_checkpoint
from llmbook.core import load_text, set_seed
from llmbook.data import make_dataloader, split_ids
from llmbook.gpt import GPT, GPTConfig
from llmbook.schedule import WarmupCosine
from llmbook.train import TrainConfig, Trainer

STEPS, ENDED, FILES = 40, 'it had ended', ('checkpoint.json', 'model.safetensors', 'training.safetensors', 'tokenizer.json', 'SHA256SUMS')


class Noisy(GPT):
    "A GPT that needs all three random generators, and has a buffer that training changes."
    def __init__(self, config):
        super().__init__(config)
        self.register_buffer('seen', torch.zeros((), dtype=torch.int64))

    def hidden_states(self, ids, cache=None):
        x = super().hidden_states(ids, cache)
        if self.training:
            self.seen += ids.numel()
            x = x * (1 + 0.1 * random.gauss(0, 1)) + 0.1 * np.random.randn()
        return x


def make(workers=0, steps=STEPS, accumulate=2, every=5, dropout=0.2, dtype=torch.float32, tied=True, model=Noisy, rate=1e-2, **more):
    "A small training with everything in it that could be forgotten: an epoch has 13 batches, so a step may be short."
    torch.set_num_threads(1)
    set_seed(5)
    text = load_text('the-verdict')[:4000]
    tokenizer = BPETokenizer.train(text, 270)
    ids, held_out = split_ids(tokenizer.encode(text), 0.3)
    net = model(GPTConfig(270, 16, 1, 2, 8, dropout=dropout, tied=tied)).to(dtype)
    loader = make_dataloader(ids, 16, batch_size=10, drop_last=False, seed=3, workers=workers)
    validation = make_dataloader(held_out, 16, batch_size=4, seed=4)              # shuffled, and only a part of it is read: it has a place, too
    return Trainer(net, loader, TrainConfig(steps, rate, accumulate=accumulate, evaluate_every=every, evaluate_batches=2, **more),
                   validation, WarmupCosine(steps, rate, min(5, steps // 2))), tokenizer


def digest(folder):
    "The checksums of the last checkpoint: equal if every byte of weights, means, history, place and random states is."
    return (Checkpoints(folder).last/'SHA256SUMS').read_text()


def train(folder, workers=0, every=1, quick=False, go=None):
    "Begin or resume a training and make it to the end: what is killed."
    if quick: os.fsync = lambda handle: None              # a kill, unlike a power cut, does not ask for it
    if workers and os.name != 'nt': multiprocessing.set_start_method('fork', force=True)      # so that workers are children of this process, and end with it
    trainer, tokenizer = make(workers)
    checkpoints = Checkpoints(folder, every=every, keep=2, tokenizer=tokenizer)
    checkpoints.resume(trainer)
    if go is not None: go.send(trainer.step)
    trainer.run(checkpoints=checkpoints, report=lambda line: print(line, flush=True) if go is None else None)


def start(folder, workers=0, every=1, quick=False):
    "A training in a process of its own; gives it when it has begun. A server that has done nothing but import starts them, which is quick."
    context = multiprocessing.get_context('spawn' if os.name == 'nt' else 'forkserver')
    if os.name != 'nt': context.set_forkserver_preload(['faults'])
    here, there = context.Pipe()
    process = context.Process(target=train, args=(folder, workers, every, quick, there))
    process.start()
    there.close()
    here.recv()
    return process


def finish(folder, workers=0, every=1, quick=False):
    "Train to the end in a new process; gives the seconds it took from the first step."
    process = start(folder, workers, every, quick)
    begin = time.perf_counter()
    process.join(120)
    assert process.exitcode == 0, process.exitcode
    return time.perf_counter() - begin


def kill_once(folder, seconds, workers=0, quick=False):
    "Start or resume a training, and kill it after so many seconds; gives what was on the disk then."
    process = start(folder, workers, quick=quick)
    time.sleep(seconds)
    ended = process.exitcode is not None
    process.kill()
    process.join()
    names = [p.name for p in Path(folder).iterdir()] if Path(folder).exists() else []
    if ended: return ENDED
    if any(n.endswith('.old') for n in names): return 'an old one'
    if any(n.endswith('.part') for n in names): return 'half of one'
    return 'whole ones only'


def kills(n, folder, seed=0, workers=0, report=lambda line: None):
    "Kill `n` trainings at random moments, resume each in a new process, and compare the end; gives counts."
    folder, rng, counts = Path(folder), random.Random(seed), Counter()
    finish(folder/'whole', workers, every=10**9)
    want = digest(folder/'whole')
    length = finish(folder/'timed', workers)
    assert digest(folder/'timed') == want
    for i in range(n):
        killed = folder/f'killed-{i}'
        while (what := kill_once(killed, rng.uniform(0, 0.8 * length), workers)) == ENDED: shutil.rmtree(killed)      # too late; again
        counts[what] += 1
        for path in Checkpoints(killed).paths()[-2:]: read_checkpoint(path)
        finish(killed, workers)
        assert digest(killed) == want, f'trial {i} ended elsewhere'
        assert len([p for p in killed.iterdir() if not p.name.startswith('.')]) <= 3, list(killed.iterdir())
        counts['identical'] += 1
        shutil.rmtree(killed)
        report(f'{i + 1} of {n}: {dict(counts)}')
    return counts


def crash_at_every_step_of_saving(folder, replace, stride=1):
    "Save in a child that dies at its n-th call for the file system, for n = 1, 2, …; afterwards the old or the new is whole. Gives n."
    folder = Path(folder)
    trainer, tokenizer = make()
    checkpoints = Checkpoints(folder, every=1, keep=1, tokenizer=tokenizer)
    trainer.run(2, checkpoints=checkpoints, report=None)
    if not replace: trainer.update()                      # a third step, and the second's checkpoint is deleted
    else: trainer.evaluate()                              # the same step, with more to remember
    shutil.copytree(folder, folder.with_name('before'))
    old = digest(folder)
    outcomes = Counter()
    for n in range(1, 1000, stride):
        shutil.rmtree(folder)
        shutil.copytree(folder.with_name('before'), folder)
        if not (child := os.fork()):
            try:
                left = [n]
                def audit(event, arguments):
                    if event not in ('open', 'os.rename', 'os.remove', 'os.rmdir', 'os.mkdir', 'os.scandir', 'os.listdir', 'os.chmod', 'shutil.rmtree', 'shutil.copymode'): return
                    left[0] -= 1
                    if not left[0]: os._exit(9)
                fresh = Checkpoints(folder, every=1, keep=1, tokenizer=tokenizer)
                sys.addaudithook(audit)
                fresh.save(trainer)
            except BaseException as error:
                print(type(error), error, file=sys.stderr)
                os._exit(1)
            os._exit(0)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert code in (0, 9), code
        after = Checkpoints(folder, keep=1, tokenizer=tokenizer)
        for path in after.paths(): read_checkpoint(path)   # half of one, or of one that is being deleted, must not look like one
        fresh, _ = make()
        after.resume(fresh)                               # reads and cleans up
        assert fresh.step in (2, trainer.step)
        new = fresh.step == trainer.step and fresh.history == trainer.history
        assert new or digest(folder) == old
        outcomes['new' if new else 'old'] += 1
        assert not [p for p in folder.iterdir() if p.suffix], list(folder.iterdir())
        if not code:
            assert new
            return n - 1, outcomes
    raise AssertionError('saving never ends')


def spoil(folder, bits, cuts, seed=0):
    "Flip bits and cut files of a checkpoint, of all its files in turn; gives how often it was refused."
    folder, rng, refused = Path(folder), random.Random(seed), Counter()
    for name in FILES:
        path = folder/name
        data = path.read_bytes()
        for k in range(bits + cuts):
            if k < bits:
                bit = rng.randrange(8 * len(data)) if bits < 8 * len(data) else k % (8 * len(data))
                bad = bytearray(data)
                bad[bit // 8] ^= 1 << bit % 8
            else: bad = data[:rng.randrange(len(data))] if k > bits else data[:-1]
            path.write_bytes(bad)
            try: read_checkpoint(folder)
            except CheckpointError as error:
                assert str(folder) in str(error)
                refused[name] += 1
            else: raise AssertionError(f'{name}: {k} was not noticed')
        path.write_bytes(data)
    read_checkpoint(folder)
    return refused


def interrupt(folder, lines, seconds, workers=0):
    "Ctrl-C after so many evaluations and seconds, as a terminal sends it to all processes of a program, this one started by a command; gives what it printed."
    command = [sys.executable, __file__, 'train', str(folder), '--workers', str(workers)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True, env={**os.environ, 'TQDM_DISABLE': '1'})
    first = [process.stdout.readline() for _ in range(lines)][-1]
    time.sleep(seconds)
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, (process.returncode, first, out, err)
    return first + out


def main(n):
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory() as home:
        home = Path(home)
        counts = kills(n, home/'kills', report=lambda line: print('kill -9,', line, flush=True))
        print(f'kill -9: {counts["identical"]} of {n} ended identically; on the disk when killed: {dict(counts)}')
        counts = kills(max(1, n // 10), home/'workers', seed=1, workers=2)
        print(f'kill -9 with two workers: {counts["identical"]} of {max(1, n // 10)} ended identically')
        want = digest(home/'kills'/'whole')
        rng = random.Random(2)
        for i in range(max(1, n // 5)):
            out = interrupt(home/f'int-{i}', rng.randint(1, 6), rng.uniform(0, 0.03), workers=i % 3)
            assert 'stopped after step' in out, out
            finish(home/f'int-{i}', workers=i % 3)
            assert digest(home/f'int-{i}') == want
        print(f'Ctrl-C: {max(1, n // 5)} of {max(1, n // 5)} ended identically after a resume')
        if hasattr(os, 'fork'):
            for replace in (False, True):
                (home/f'crash-{replace}').mkdir()
                calls, outcomes = crash_at_every_step_of_saving(home/f'crash-{replace}'/'runs', replace)
                print(f'a crash at each of the {calls} calls for the file system, {"over an older one" if replace else "of a new one"}: left {dict(outcomes)}')
        trainer, tokenizer = make()
        trainer.run(3, report=None)
        path = save_checkpoint(home/'spoiled', trainer, tokenizer)
        print('refused after one bit was flipped or the end was cut off:', dict(spoil(path, 40 * n, 4 * n)))
        fresh, _ = make()
        load_checkpoint(path, fresh)
    print(f'{time.perf_counter() - begin:.0f} s')


if __name__ == '__main__':
    if sys.argv[1:2] == ['train']:
        parser = argparse.ArgumentParser()
        parser.add_argument('folder')
        parser.add_argument('--workers', type=int, default=0)
        train(**vars(parser.parse_args(sys.argv[2:])))
    else:
        parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
        parser.add_argument('--kills', type=int, default=50)
        main(parser.parse_args().kills)

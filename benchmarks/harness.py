"""Contenders in processes of their own, which take turns; what they took, and how it compares.

Several models in one process falsify each other, so each contender has its own, with the environment it asks for. In each
round all take one turn, in an order drawn anew, so that a slow minute of the machine hits all of them, and none always follows
the same one, whose traces it would find in the caches. A turn in which other programs used more of the cores than `OTHERS` is
taken again. Compared are the medians over rounds of ratios.
"""
import gc, os, random, resource, statistics, sys, time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing import get_context, set_start_method
from typing import Any

import psutil

OTHERS, TRIES = 0.06, 10
GRAIN = 0.05           # seconds of the cores that a system's clocks cannot tell
AGAIN = 'ours, again'  # the same once more: what it is off by is noise


@dataclass(frozen=True)
class Job:
    "What a contender does: `turn` is timed, and gets what `fresh` made."
    turn: Callable[[Any], dict]                 # units: how many; result: to be compared; all else is a measure of its own
    fresh: Callable[[], Any] = lambda: None
    limit: dict = field(default_factory=dict)   # what a unit needs at least: bytes from memory, or flops
    warm: bool = False                          # each turn is taken twice, and the second counts: for short ones


@dataclass(frozen=True)
class Contender:
    name: str
    make: Callable[..., Job]                    # called in the contender's process
    settings: dict = field(default_factory=dict)
    env: dict = field(default_factory=dict)
    note: str = ''                              # what it is, in a few words


@dataclass(frozen=True)
class Goal:
    "What ours must reach: compared with the best of `over`, or by itself if nothing is named."
    measure: str
    bound: float
    over: tuple[str, ...] = ()
    of: str = 'ours'
    at_most: bool = False


@dataclass(frozen=True)
class Row:
    key: str
    title: str
    work: str
    unit: str                                   # of the speed, per second
    contenders: tuple[Contender, ...]
    goals: tuple[Goal, ...] = ()
    rounds: int = 5
    alone: bool = False                         # a new process for each turn
    agree: Callable[[dict], None] = lambda results: None      # raises if the contenders did not do the same work
    threads: int | None = None


@contextmanager
def environment(settings: dict):
    "Variables that a process finds from its first instruction on."
    before = dict(os.environ)
    os.environ.update(settings)
    try: yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def peak_memory() -> int:
    "Bytes, the most that this process has had."
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == 'darwin' else 1024)


def serve(contender: Contender, threads: int, pipe) -> None:
    "A contender's process: a turn whenever one is asked for."
    import torch
    torch.set_num_threads(threads)
    set_start_method(None, force=True)      # processes of its own it starts as any program does
    job = contender.make(**contender.settings)
    pipe.send(job.limit)
    while (asked := pipe.recv()) != 'end':
        if job.warm: job.turn(job.fresh())
        thing = job.fresh()
        gc.collect()
        start = time.perf_counter()
        found = job.turn(thing)
        seconds = time.perf_counter() - start
        if asked != 'with result': found.pop('result', None)      # it may be long
        pipe.send({'seconds': seconds, 'memory': peak_memory(), **found})


def busy() -> float:
    "Seconds of all cores that anything has used."
    t = psutil.cpu_times()
    return t.user + t.nice + t.system + getattr(t, 'steal', 0)


class Racer:
    "A contender that is alive."
    def __init__(self, contender: Contender, threads: int):
        context = get_context('spawn')
        self.pipe, there = context.Pipe()
        self.process = context.Process(target=serve, args=(contender, threads, there), daemon=False)
        with environment(contender.env): self.process.start()
        there.close()
        try: self.limit = self.pipe.recv()
        except EOFError: raise RuntimeError(f'{contender.name} ended before its first turn; what it said stands above') from None

    def used(self) -> float:
        "Seconds of all cores that the contender has used, and those it has waited for, and we."
        return sum(psutil.Process(self.process.pid).cpu_times()[:4]) + time.process_time()

    def turn(self, result: bool = False) -> dict:
        "One turn, and the share of the cores that others used meanwhile."
        for tried in range(1, TRIES + 1):
            before, mine, start = busy(), self.used(), time.perf_counter()
            self.pipe.send('with result' if result else 'go')
            found = self.pipe.recv()
            found['others'] = max(0, (busy() - before - (self.used() - mine)) / (time.perf_counter() - start) / os.cpu_count())
            if found['others'] <= max(OTHERS, GRAIN / found['seconds']): break
            time.sleep(min(tried, 5))
        return found | {'tries': tried}

    def close(self) -> None:
        try: self.pipe.send('end')
        except OSError: pass
        self.process.join(10)
        self.process.kill()


def run(row: Row, rounds: int, threads: int) -> dict:
    "Measure a row; raises if the contenders did not do the same work."
    names = [c.name for c in row.contenders]
    turns, limits, threads = {name: [] for name in names}, {}, row.threads or threads
    racers, look = {}, min(1, rounds - 1)      # results are compared in the second round, when each has taken a few turns
    try:
        for r in range(rounds):
            for c in random.Random(r).sample(row.contenders, len(row.contenders)):
                if row.alone or c.name not in racers:
                    racers[c.name] = Racer(c, threads)
                    limits[c.name] = racers[c.name].limit
                    if not row.alone: racers[c.name].turn()      # once unmeasured
                turns[c.name].append(racers[c.name].turn(result=r == look))
                if row.alone: racers.pop(c.name).close()
            if r == look: row.agree({name: found[-1].get('result') for name, found in turns.items()})
    finally:
        for racer in racers.values(): racer.close()
    return {'key': row.key, 'title': row.title, 'work': row.work, 'unit': row.unit, 'rounds': rounds, 'threads': threads,
            'contenders': [summary(c, turns[c.name], turns['ours' if 'ours' in turns else names[0]], limits[c.name]) for c in row.contenders],
            'goals': [judge(goal, turns) for goal in row.goals],
            'others': round(max(t['others'] for found in turns.values() for t in found), 3),
            'taken again': sum(t['tries'] - 1 for found in turns.values() for t in found)}


def measures(turn: dict) -> dict[str, float]:
    "The numbers of a turn; the speed is one of them."
    own = {k: v for k, v in turn.items() if k not in ('units', 'result', 'others', 'tries')}
    return own | {'speed': turn.get('units', 1) / turn['seconds']}


def summary(contender: Contender, turns: list[dict], ours: list[dict], limit: dict) -> dict:
    "Medians of a contender, and how many times ours is as fast as it."
    values = {k: [measures(t)[k] for t in turns] for k in measures(turns[0])}
    middle = {k: statistics.median(v) for k, v in values.items()}
    ratios = [measures(a)['speed'] / measures(b)['speed'] for a, b in zip(ours, turns)]
    return {'name': contender.name, 'note': contender.note, **{k: float(f'{v:.5g}') for k, v in middle.items()},
            'best': float(f"{max(values['speed']):.5g}"), 'ours to it': [round(f(ratios), 3) for f in (min, statistics.median, max)], 'limit': limit}


def judge(goal: Goal, turns: dict[str, list[dict]]) -> dict:
    "What was reached of a goal: the median of ratios to the strongest of those that are there."
    ours = [measures(t)[goal.measure] for t in turns[goal.of]]
    weakest = max if goal.at_most else min
    asked = {'measure': goal.measure, 'of': goal.of, 'bound': goal.bound, 'at most': goal.at_most, 'among': goal.over}
    if goal.over:
        found = {name: statistics.median(a / measures(t)[goal.measure] for a, t in zip(ours, turns[name])) for name in goal.over if name in turns}
        if not found: return asked | {'over': None, 'value': None, 'met': None}
        rival = weakest(found, key=found.get)
        value = found[rival]
    else: rival, value = None, statistics.median(ours)
    value = round(value, 3)
    return asked | {'over': rival, 'value': value, 'met': value <= goal.bound if goal.at_most else value >= goal.bound}


def quickest(work: Callable[[], Any], turns: int) -> float:
    "Seconds of the best turn."
    def once():
        start = time.perf_counter()
        work()
        return time.perf_counter() - start
    return min(once() for _ in range(turns))


def limits() -> Job:
    "What the machine can do at most: read from memory, and multiply matrices."
    import torch
    x, a = torch.ones(2**27), torch.rand(2048, 2048)
    return Job(lambda _: {'bytes': x.nbytes / quickest(x.sum, 6), 'flops': 2 * 2048**3 / quickest(lambda: a @ a, 6)})

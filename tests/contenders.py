"Contenders for the tests of the race, in a module that a process of its own can import quickly."
import multiprocessing, os, time

import torch
from benchmarks.harness import Job


def counts(n: float, result: int = 1) -> Job:
    return Job(lambda _: {'units': n, 'result': result, 'kept': 5.0}, limit={'bytes': 10})


def sleeps() -> Job:
    return Job(lambda thing: time.sleep(thing) or {'units': thing, 'result': 1}, lambda: 0.2)


def remembers(warm: bool = False) -> Job:
    seen = []
    return Job(lambda _: seen.append(1) or {'turns': len(seen)}, warm=warm)


def sees() -> Job:
    return Job(lambda _: {'there': float(os.environ.get('LLMBOOK_SEEN', 0)), 'threads': torch.get_num_threads(),
                           'usual start': float(multiprocessing.get_start_method() == multiprocessing.get_all_start_methods()[0])})

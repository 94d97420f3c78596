"""The book's package beside its peers, in one run: `make bench` (the short form), `make bench-full` (all, and much longer).

    python -m benchmarks [--full] [--only train,windows] [--nanogpt FOLDER] [--out results.json] [--write]

Prints a table and writes it as JSON. `--nanogpt` names a checkout of nanoGPT, which is on no package index; goals are judged by
the peers that are there, and left open where none of those they name is. `--write` keeps the record of a full run for the page
that shows it.
"""
import argparse, hashlib, json, os, platform, sys, time
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from benchmarks import generation, project, recipe, scaling, shares, tokens, training
from benchmarks.harness import Contender, Row, limits, run

ROOT = Path(__file__).resolve().parent.parent
RECORD = ROOT/'llmbook'/'assets'/'benchmarks.json'
PACKAGES = 'torch', 'numpy', 'tokenizers', 'tiktoken', 'transformers', 'llms-from-scratch', 'litgpt'


def machine(threads: int, checkout: str | None) -> dict:
    "Where it runs, and with what; nanoGPT has no versions, so its file is named as Git names it."
    def installed(name):
        try: return version(name)
        except PackageNotFoundError: return None
    packages = {p: v for p in PACKAGES if (v := installed(p))}
    if checkout:
        text = (Path(checkout)/'model.py').read_bytes()
        packages['nanoGPT'] = hashlib.sha1(b'blob %d\0' % len(text) + text).hexdigest()[:8]
    name = next((line.split(':')[1].strip() for line in Path('/proc/cpuinfo').read_text().splitlines() if line.startswith('model name')), '') if Path('/proc/cpuinfo').exists() else platform.processor()
    return {'processor': name or platform.machine(), 'cores': os.cpu_count(), 'system': f'{platform.system()} {platform.machine()}', 'python': platform.python_version(),
            'packages': packages, 'threads': threads, 'date': date.today().isoformat(), 'allocator': training.allocator()[0]}


def show(row: dict, most: dict) -> None:
    "A row as lines of the table."
    print(f"\n{row['title']}\n  {row['work']}; {row['threads']} threads, {row['rounds']} rounds, others used at most {row['others']:.0%}, {row['taken again']} turns taken again")
    for c in row['contenders']:
        own = {k: v for k, v in c.items() if k not in ('name', 'note', 'seconds', 'memory', 'speed', 'best', 'ours to it', 'limit')}
        words = [f"{c['name']:34}"]
        if row['unit']: words += [f"{c['speed']:12,.1f} {row['unit']}/s", f"ours {c['ours to it'][1]:.2f} ×", f"{c['memory'] / 1e6:8,.0f} MB"]
        words += [f'{share:.0%} of the limit' for share in [at_limit(c, most)] if share]
        print('  ' + '  '.join(words + [f'{k} {v:.4g}' for k, v in own.items()]))
    for goal in row['goals']: print('    ' + goal_text(goal))


def at_limit(contender: dict, most: dict) -> float | None:
    "The share of what the machine could do."
    for what, need in contender['limit'].items(): return contender['speed'] * need / most[what]


def goal_text(goal: dict) -> str:
    "A goal and what was reached, in a line."
    want = f"{'at most' if goal['at most'] else 'at least'} {goal['bound']:g}"
    if goal['value'] is None: return f"open: {goal['measure']} of {goal['of']}, {want} × of a peer that is not here"
    than = f" × {goal['over']}" if goal['over'] else ''
    return f"{'reached' if goal['met'] else 'MISSED'}: {goal['measure']} of {goal['of']} is {goal['value']:.4g}{than}, wanted {want}{than}"


def equal_time(seeds: int) -> dict:
    "The loss of our defaults, in no more time than nanoGPT's setting takes."
    pair = [r for r in recipe.ROWS if r.name in ("nanoGPT's setting", '+ tokens of its own: the defaults')]
    found, took = recipe.losses(seeds, rows=pair), recipe.seconds(5, rows=pair)
    theirs, ours = ({'name': r.name, 'steps': r.steps, 'nats per character': found[r.name], 'seconds': round(took[r.name], 1)} for r in pair)
    mean = lambda row: sum(row['nats per character']) / seeds
    gain = round(mean(theirs) - mean(ours), 4)
    return {'rows': [theirs, ours | {'name': 'llmbook pretrain'}], 'below': gain, 'bound': 0.09, 'met': gain >= 0.09 and ours['seconds'] <= theirs['seconds']}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--full', action='store_true', help='all rows, more rounds, and how cost grows')
    parser.add_argument('--only', default='', help='rows whose key begins with one of these, such as train,windows')
    parser.add_argument('--nanogpt', default=os.environ.get('NANOGPT'), help='folder of a nanoGPT checkout')
    parser.add_argument('--threads', type=int, default=os.cpu_count())
    parser.add_argument('--rounds', type=int, help='of each row, instead of its own number')
    parser.add_argument('--write', action='store_true', help='keep the record for the page, too')
    parser.add_argument('--out', type=Path, default=ROOT/'_build'/'benchmarks.json', help='file for the record')
    asked = parser.parse_args()
    if asked.nanogpt and not (Path(asked.nanogpt)/'model.py').exists(): parser.error(f'--nanogpt {asked.nanogpt} has no model.py; name a checkout of nanoGPT')
    if asked.write and (not asked.full or asked.only): parser.error('--write keeps the record of a full run; give --full, and no --only')
    sys.stdout.reconfigure(line_buffering=True)      # also in a file a row is seen when it is done
    start, wanted = time.time(), tuple(filter(None, asked.only.split(',')))
    rows = [*project.rows(asked.full), *tokens.rows(asked.full), *training.rows(asked.full, asked.nanogpt), *generation.rows(asked.full), *shares.rows(asked.full)]
    rows = [r for r in rows if not wanted or r.key.startswith(wanted)]
    record = {'machine': machine(asked.threads, asked.nanogpt), 'full': asked.full, 'limits': {}, 'rows': []}
    def keep():
        asked.out.parent.mkdir(parents=True, exist_ok=True)
        asked.out.write_text(json.dumps(record, indent=1) + '\n', encoding='utf-8')
    print(json.dumps(record['machine'], indent=1))
    speeds = run(Row('limits', 'limits', '', '', (Contender('the machine', limits),)), 3, asked.threads)['contenders'][0]
    record['limits'] = {k: speeds[k] for k in ('bytes', 'flops')}
    print(f"memory {speeds['bytes'] / 1e9:.1f} GB/s, products of matrices {speeds['flops'] / 1e9:.0f} GFLOP/s")
    for k, row in enumerate(rows, 1):
        print(f'[{k}/{len(rows)}] {row.key} …', end='\r', file=sys.stderr, flush=True)
        record['rows'].append(run(row, asked.rounds or row.rounds, asked.threads))
        show(record['rows'][-1], record['limits'])
        keep()          # what is measured is not lost if the rest is interrupted
    if not wanted or 'generate'.startswith(wanted):
        record['int8'] = generation.int8_loss()
        print(f"\nloss of the small model in nats per token: {record['int8']['float32']} with 32 bits, {record['int8']['int8']} with 8")
    if asked.full and not wanted:
        record['equal time'] = equal_time(3)
        for row in record['equal time']['rows']: print(f"{row['name']:24} {row['seconds']:6.1f} s  {row['nats per character']}")
        print(f"  ours is {record['equal time']['below']} below, wanted 0.09: {'reached' if record['equal time']['met'] else 'MISSED'}")
        record['scaling'] = scaling.sweeps()
        for table in record['scaling']:
            grow = '' if table['power'] is None else f", grow with {table['size']} to the power {table['power']}"
            print(f"\n{table['title']}: {table['cost']}{grow} ({table['note']})\n  {table['sizes']}\n  {table['costs']}")
    record['minutes'] = round((time.time() - start) / 60, 1)
    keep()
    if asked.write: RECORD.write_text(asked.out.read_text(encoding='utf-8'), encoding='utf-8')
    goals = [g for row in record['rows'] for g in row['goals']]
    print(f"\n{sum(g['met'] is True for g in goals)} goals reached, {sum(g['met'] is False for g in goals)} missed, {sum(g['met'] is None for g in goals)} open, in {record['minutes']} minutes; the record is {asked.out}")


if __name__ == '__main__': main()

"Benchmarks: that both sides do the same work, that a difference is noticed, and that goals are judged by the strongest rival."
import importlib.util, json, os
from pathlib import Path

import pytest
from benchmarks import __main__ as program, generation, harness, project, scaling, shares, tokens, training
from benchmarks.harness import Contender, Goal, Racer, Row, judge, run
from contenders import counts, remembers, sees, sleeps

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.usefixtures('one_thread')


def peer(module: str):
    "What `make peers` installs; CI demands it."
    if os.environ.get('LLMBOOK_PEERS') != 'required' and importlib.util.find_spec(module) is None: pytest.skip(f'{module} is not installed; `make peers` does it')


# ---- the same work

@pytest.fixture(scope='module')
def first_losses(): return training.ours('tiny').turn(None)['result']


@pytest.mark.parametrize('name, make, module', [('transformers', training.transformers, 'transformers'), ('LLMs-from-scratch', training.from_scratch, 'llms_from_scratch'), ('litgpt', training.litgpt, 'litgpt')])
def test_a_step_of_training_is_the_same_step(name, make, module, first_losses):
    peer(module)
    theirs = make('tiny').turn(None)
    assert theirs['units'] == 3 * 4 * 16 and len(theirs['result']) == 3
    training.same_losses({'ours': first_losses, name: theirs['result']})
    with pytest.raises(RuntimeError, match=f'{name} does not do the same work'): training.same_losses({'ours': first_losses, name: [x * 1.2 for x in theirs['result']]})


def test_other_weights_batches_or_rates_are_other_work(first_losses, monkeypatch):
    monkeypatch.setattr(training, 'RATE', 3e-3)      # the losses of later steps tell
    with pytest.raises(RuntimeError): training.same_losses({'ours': first_losses, 'transformers': training.transformers('tiny').turn(None)['result']})
    monkeypatch.undo()
    usual = training.batches
    monkeypatch.setattr(training, 'batches', lambda size: usual(size)[::-1])
    with pytest.raises(RuntimeError): training.same_losses({'ours': first_losses, 'transformers': training.transformers('tiny').turn(None)['result']})


NANO = '''
import torch
from llmbook.gpt import GPT as Ours, GPTConfig as Config
from llmbook.loss import next_token_loss
from llmbook.open_weights import gpt2_name

class GPTConfig:
    def __init__(self, **sizes): self.__dict__ = sizes

class GPT(torch.nn.Module):
    "A model with the names of nanoGPT."
    def __init__(self, c):
        super().__init__()
        self.inner = Ours(Config(c.vocab_size, c.block_size, c.n_layer, c.n_head, c.n_embd))
    def load_state_dict(self, weights, strict):
        named = {('transformer.' + gpt2_name(n)[0]): n for n, _ in self.inner.named_parameters()}
        self.inner.load_state_dict({named[k]: v for k, v in weights.items()} , strict=False)
        return torch.nn.modules.module._IncompatibleKeys([] if len(weights) == len(named) else ['transformer.x'], [])
    def configure_optimizers(self, decay, rate, betas, device): return torch.optim.AdamW([{'params': [p for p in self.parameters() if p.dim() > 1], 'weight_decay': decay},
        {'params': [p for p in self.parameters() if p.dim() < 2], 'weight_decay': 0.0}], rate, betas)
    def forward(self, x, y): return None, next_token_loss(self.inner(x), y)
'''


def test_a_checkout_of_nanogpt_is_used_where_it_is(tmp_path, first_losses):
    (tmp_path/'model.py').write_text(NANO)
    training.same_losses({'ours': first_losses, 'nanoGPT': training.nanogpt('tiny', str(tmp_path)).turn(None)['result']})
    names = lambda checkout, compiled: [c.name for c in training.row('tiny', '', 1, (), checkout, compiled).contenders]
    assert names(None, True) == ['ours', 'transformers', 'LLMs-from-scratch', 'litgpt', 'ours, again'] and names(str(tmp_path), True)[4:6] == ['nanoGPT', 'nanoGPT, compiled']
    with pytest.raises(SystemExit): main_with('--nanogpt', str(tmp_path/'nowhere'))


def main_with(*arguments):
    from unittest import mock
    with mock.patch('sys.argv', ['benchmarks', *arguments]): program.main()


def test_the_same_text_is_written():
    found = {c.name: c.make('tiny').turn(None)['result'] for c in generation.rows(False)[0].contenders}
    generation.same_text(found)
    assert len(found['ours']) == generation.PROMPT + generation.NEW
    for name in found:
        with pytest.raises(RuntimeError, match='does not do the same work'): generation.same_text(found | {name: [*found[name][:-1], 1 + found[name][-1]][:-1 if 'int8' in name else None]})


def test_the_same_tokens_and_windows_are_made():
    small = dict(text='the-verdict')
    results = {'ours': tokens.train_ours(300, **small), 'one': tokens.train_rust(300, False, **small), 'lines': tokens.train_rust(300, True, **small)}
    tokens.equal({k: job.turn(None)['result'] for k, job in results.items()})
    for warm in (False, True):
        jobs = {'ours': tokens.encode_ours('the-verdict', warm), 'tiktoken': tokens.encode_tiktoken('the-verdict', warm), 'tokenizers': tokens.encode_rust('the-verdict', warm)}
        tokens.equal({k: job.turn(job.fresh())['result'] for k, job in jobs.items()})
    made = {usual: tokens.windows(usual, 4, 5000).turn(None) for usual in (False, True)}
    tokens.equal({k: v['result'] for k, v in made.items()})
    assert made[False]['units'] == 1186
    with pytest.raises(RuntimeError, match='b does not do the same work as a'): tokens.equal({'a': [1], 'b': [2]})


def test_files_become_the_same_ids(monkeypatch):
    monkeypatch.setattr(tokens, 'load_text', lambda name: 'Had I the heavens’ embroidered cloths, ' * 50)
    jobs = {c.name: c.make(**c.settings) for c in tokens.rows(True)[-1].contenders if c.settings.get('workers') != 2}
    tokens.equal({name: job.turn(job.fresh())['result'] for name, job in jobs.items()})


# ---- the race

@pytest.fixture(autouse=True)
def alone(monkeypatch): monkeypatch.setattr(harness, 'OTHERS', 9)      # other tests use the cores

def row(*contenders, **more): return Row('k', 'a row', 'work', 'units', contenders, **more)


def same(found):
    assert set(found) <= {'ours', 'peer', 'b'}
    if len(set(found.values())) > 1: raise RuntimeError(f'not the same: {found}')


def test_a_race_takes_turns_and_keeps_what_was_said():
    found = run(row(Contender('ours', counts, {'n': 4}), Contender('peer', sleeps, note='slow'), agree=same), 3, 2)
    ours, peer = found['contenders']
    assert peer['note'] == 'slow' and peer['speed'] == pytest.approx(1, rel=0.1) and 0.2 <= peer['seconds'] < 0.3 and ours['ours to it'] == [1, 1, 1]
    assert peer['ours to it'][1] > 1000 and ours['limit'] == {'bytes': 10} and ours['kept'] == 5 and ours['memory'] > 1e7
    json.dumps(found)


def test_other_work_ends_the_race():
    with pytest.raises(RuntimeError, match='not the same'): run(row(Contender('ours', counts, {'n': 1}), Contender('b', counts, {'n': 1, 'result': 2}), agree=same), 1, 1)


def test_a_contender_lives_on_or_begins_anew():
    turns = lambda alone: run(row(Contender('ours', remembers), alone=alone), 2, 1)['contenders'][0]['turns']
    assert turns(False) == 2.5 and turns(True) == 1      # the median of 2 and 3, after one unmeasured; or always the first


def test_nobody_always_follows_the_same_one_and_results_are_compared_once(monkeypatch):
    order, compared = [], []
    class Fake:
        limit = {}
        def __init__(self, contender, threads): self.name = contender.name
        def turn(self, result=False):
            order.append((self.name, result))
            return {'seconds': 1, 'memory': 1, 'others': 0, 'tries': 1, 'result': 1}
        def close(self): pass
    monkeypatch.setattr(harness, 'Racer', Fake)
    run(row(*(Contender(name, sees) for name in ('ours', 'peer', 'b')), agree=compared.append), 9, 1)
    turns = order[6:]      # in the first round each has one unmeasured
    assert {a for (a, _), (b, _) in zip(turns, turns[1:]) if b == 'ours'} >= {'peer', 'b'}
    assert [result for _, result in turns] == [True] * 3 + [False] * 21 and len(compared) == 1


def test_a_warm_turn_is_the_second():
    found = run(row(Contender('ours', remembers, {'warm': True})), 2, 1)['contenders'][0]
    assert found['turns'] == 5      # the median of 4 and 6, after two unmeasured


def test_a_contender_starts_with_its_own_variables_and_threads_and_starts_others_as_usual():
    found = run(row(Contender('ours', sees, env={'LLMBOOK_SEEN': '7'}), Contender('b', sees)), 1, 3)['contenders']
    assert [(c['there'], c['threads']) for c in found] == [(7, 3), (0, 3)] and 'LLMBOOK_SEEN' not in os.environ
    assert all(c['usual start'] for c in found)      # of processes that it starts itself


def test_a_turn_in_which_others_were_busy_is_taken_again(monkeypatch):
    monkeypatch.setattr(harness, 'OTHERS', 0.06)
    others = iter([0, 10, 10, 10 + 1e-9])      # ten seconds of the cores in the first turn
    monkeypatch.setattr(harness, 'busy', lambda: next(others))
    monkeypatch.setattr(harness.time, 'sleep', lambda seconds: None)
    racer = Racer(Contender('a', sleeps), 1)
    try: assert racer.turn()['tries'] == 2
    finally: racer.close()


def test_a_contender_that_cannot_start_is_named():
    with pytest.raises(RuntimeError, match='broken ended before its first turn'): run(row(Contender('broken', counts, {'nonsense': 1})), 1, 1)


def turn(seconds, **more): return {'seconds': seconds, 'units': 6, **more}


def test_goals_are_judged_by_the_strongest_rival_and_by_medians_of_ratios():
    turns = {'ours': [turn(1, memory=5), turn(2, memory=5), turn(1, memory=5)], 'a': [turn(2, memory=9), turn(4, memory=9), turn(9, memory=9)], 'b': [turn(3, memory=20), turn(6, memory=20), turn(3, memory=20)]}
    fast = judge(Goal('speed', 2.5, ('a', 'b', 'absent')), turns)
    assert (fast['over'], fast['value'], fast['met']) == ('a', 2.0, False) and judge(Goal('speed', 2.5, ('b',)), turns)['met']
    small = judge(Goal('memory', 0.5, ('a', 'b'), at_most=True), turns)
    assert (small['over'], small['value'], small['met']) == ('a', 0.556, False) and judge(Goal('memory', 0.5, ('b',), at_most=True), turns)['met']
    assert judge(Goal('speed', 1.0, ('absent',)), turns)['met'] is None and judge(Goal('seconds', 1.0, at_most=True), turns)['value'] == 1
    assert 'MISSED: speed of ours is 2 × a, wanted at least 2.5 × a' == program.goal_text(fast) and 'open' in program.goal_text(judge(Goal('speed', 1.0, ('absent',)), turns))


def test_growth_is_fitted():
    assert scaling.fit([1, 2, 4, 8], [3, 12, 48, 192]) == 2 and scaling.fit([1, 10, 100], [5, 50, 500]) == 1


def test_every_second_of_a_turn_has_a_kind():
    assert [shares.kind_of(name) for name in ('aten::addmm_', 'aten::_scaled_dot_product_flash_attention_for_cpu', 'aten::gelu_backward', 'aten::add', 'AddmmBackward0')] == ['products', 'attention', 'activation', 'other operations', None]
    found = shares.shares(training.ours, size='tiny').turn(None)
    assert sum(found.values()) == pytest.approx(1) and all(0 < share < 1 for share in found.values())


def test_two_ways_to_the_loss_give_the_same():
    found = {name: shares.loss(pieces, 200, 8, 30).turn(None)['result'] for name, pieces in (('ours, by pieces', True), ('at once', False))}
    shares.same_loss(found)
    for k in range(3):
        with pytest.raises(RuntimeError, match='at once does not do the same work'): shares.same_loss(found | {'at once': [x * (1.001 if i == k else 1) for i, x in enumerate(found['at once'])]})


def test_the_page_shows_a_full_record_of_all_rows():
    record = json.loads(program.RECORD.read_text(encoding='utf-8'))
    wanted = {r.key for r in [*project.rows(True), *tokens.rows(True), *training.rows(True, None), *generation.rows(True), *shares.rows(True)]}
    assert record['full'] and wanted - {'test'} <= {r['key'] for r in record['rows']} and {'int8', 'equal time', 'scaling', 'limits'} <= set(record)

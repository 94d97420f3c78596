"Seeds, devices, texts and pictures: what no page shows."
import random
import xml.etree.ElementTree as ET

import numpy as np
import pytest
import torch
from llmbook import core
from llmbook.core import (PALETTE, count_parameters, device_fault, get_device, load_text, new_plot, set_seed, show_flow, show_heatmap, show_plot,
                          show_tokens)


def test_texts_lose_one_final_newline_only():
    for name in core.TEXTS: assert not load_text(name).endswith('\n\n') and load_text(name)[-1].strip()
    with pytest.raises(ValueError, match="'hamlet'.*'the-verdict', 'shakespeare'"): load_text('hamlet')


def test_only_one_newline_is_dropped(monkeypatch, tmp_path):
    (tmp_path/'assets').mkdir()
    (tmp_path/'assets'/'the-verdict.txt').write_bytes(' é \n\n'.encode())
    monkeypatch.setattr(core, 'files', lambda package: tmp_path)
    assert load_text('the-verdict') == ' é \n'


def test_one_seed_for_three_generators():
    def draw(): return random.random(), float(np.random.rand()), float(torch.rand(1))
    set_seed(7)
    first = draw()
    assert draw() != first
    set_seed(7)
    assert draw() == first
    set_seed(np.int64(7))
    assert draw() == first
    for bad in (-1, 2**32, 1.5, '7', None, True):
        with pytest.raises(ValueError, match='try seed=123'): set_seed(bad)


LINSPACE = torch.linspace


class WrongOn:
    "Stands for `torch.linspace` on a machine whose devices return wrong numbers, no number, or an error."
    def __init__(self, faults): self.faults = faults

    def __call__(self, *args, device, **kwargs):
        fault = self.faults.get(str(device), 0.0)
        if isinstance(fault, Exception): raise fault
        return LINSPACE(*args, **kwargs) + fault


def available(monkeypatch, cuda, mps, faults={}):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, 'is_available', lambda: mps)
    monkeypatch.setattr(torch, 'linspace', WrongOn(faults))


def chosen(prefer=None):
    lines = []
    return get_device(prefer, lines.append).type, lines


def test_the_fastest_device_that_works(monkeypatch):
    available(monkeypatch, True, True)
    assert chosen() == ('cuda', ['cuda: chosen, its self-test agrees with the CPU'])
    available(monkeypatch, False, True)
    assert chosen()[0] == 'mps'


def test_a_device_that_computes_wrong_numbers_is_passed_over(monkeypatch):
    available(monkeypatch, True, True, faults={'cuda': RuntimeError('no kernel image\nmore'), 'mps': 0.01})
    device, lines = chosen()
    assert device == 'cpu' and len(lines) == 3
    assert lines[0] == 'cuda: passed over, it fails with RuntimeError: no kernel image'
    assert lines[1].startswith('mps: passed over, it computes wrong numbers (off by')


def test_an_error_without_a_word_is_a_fault(monkeypatch):
    monkeypatch.setattr(torch, 'linspace', WrongOn({'mps': MemoryError()}))
    assert device_fault('mps') == 'fails with MemoryError: '


def test_not_a_number_is_a_fault(monkeypatch):
    monkeypatch.setattr(torch, 'linspace', WrongOn({'mps': float('nan')}))
    assert 'wrong numbers' in device_fault('mps')


def test_a_device_one_insists_on(monkeypatch):
    available(monkeypatch, True, False, faults={'cuda': 0.01})
    assert chosen('cpu') == ('cpu', ['cpu: chosen, as asked'])
    with pytest.raises(ValueError, match="prefer='cuda' computes wrong numbers.*try prefer='cpu'"): get_device('cuda')


def test_a_shared_tensor_counts_once():
    class Tied(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.table = torch.nn.Embedding(7, 5)
            self.head = torch.nn.Linear(5, 7)
            self.head.weight = self.table.weight
    model = Tied()
    assert count_parameters(model) == 7 * 5 + 7
    model.head.bias.requires_grad = False
    assert count_parameters(model, trainable_only=True) == 7 * 5


def parts(picture, tag): return list(ET.fromstring(picture.svg).iter('{http://www.w3.org/2000/svg}' + tag))


def test_pictures_are_xml_and_carry_hostile_text():
    for token in ('<b>&"', "'", '🍵', 'e\u0301', '日', b'\xf0\x9f', '', ' \n\t\r', '\x00', '\u2028', '\ufffe', '\u00a0', '\ue000'):
        texts = [t.text for t in parts(show_tokens([token], ids=[3]), 'text')]
        assert len(texts) == 2 and texts[0].strip() and texts[1] == '3'
    assert [t.text for t in parts(show_tokens('ab', torch.tensor([5, 7])), 'text')] == ['a', '5', 'b', '7']


def test_tokens_break_into_rows_inside_the_width():
    picture = show_tokens(['word'] * 40, ids=range(40), width=300)
    boxes = parts(picture, 'rect')[1:]
    assert len(boxes) == 40 and len({b.get('y') for b in boxes}) > 1
    assert all(float(b.get('x')) + float(b.get('width')) <= picture.width for b in boxes)
    assert all(float(b.get('y')) + float(b.get('height')) <= picture.height for b in boxes)


def test_the_strongest_colour_is_the_largest_number():
    picture = show_heatmap(torch.tensor([[0.0, 1.0, 4.0], [2.0, 3.0, 0.5]]), 'ab', 'xyz')
    strength = [float(b.get('fill-opacity')) for b in parts(picture, 'rect')[1:]]
    assert strength == [0, 0.25, 1, 0.5, 0.75, 0.125]
    with pytest.raises(ValueError, match='name every row'): show_heatmap([[1, 2]], 'a', 'b')
    assert show_heatmap([[0, 0]], 'a', 'bc').height > 0
    wide = show_heatmap([[1] * 60], ['x' * 100], range(60))
    assert all(float(b.get('width')) > 0 for b in parts(wide, 'rect')) and wide.width > 1000
    for bad in (float('nan'), float('inf'), -1):
        with pytest.raises(ValueError, match='only finite numbers'): show_heatmap([[1, bad]], 'a', 'bc')
    with pytest.raises(ValueError, match='at least one row'): show_heatmap([], '', '')
    with pytest.raises(ValueError, match="'pink' is not a colour of the book"): show_heatmap([[1]], 'a', 'b', color='pink')


def test_flow_stays_inside_its_picture():
    for n in range(1, 9):
        picture = show_flow([('step', 'note', 'token')] * n, loop='again' if n == 6 else None)
        boxes = parts(picture, 'rect')[1:]
        assert len(boxes) == n and len(parts(picture, 'polygon')) == n - 1 + (n == 6)
        assert all(0 <= float(b.get('x')) and float(b.get('x')) + float(b.get('width')) <= picture.width for b in boxes)
        assert all(float(b.get('y')) + float(b.get('height')) <= picture.height for b in boxes)


def test_flow_refuses_what_it_cannot_draw():
    step = ('step', 'note', 'token')
    for bad in (dict(steps=[]), dict(steps=[step], per_row=0), dict(steps=[step], below={1: step}), dict(steps=[step] * 5, loop='x')):
        with pytest.raises(ValueError, match='steps'): show_flow(**bad)


def test_plots_keep_their_words_and_numbers():
    figure, axes = new_plot('rate 0.0004', 'colour #0072b2 <b>', title='loss 0.0012')
    axes.plot([0.001, 0.002, 0.003])
    texts = {t.text for t in parts(show_plot(figure), 'text')}
    assert {'rate 0.0004', 'colour #0072b2 <b>', 'loss 0.0012'} <= texts and any('0.002' in t for t in texts if t)


def test_plots_are_the_same_every_time_and_follow_the_theme():
    def draw():
        figure, axes = new_plot('steps', 'loss', 'it falls')
        axes.plot([1, 2, 3], [3.0, 2.0, 1.5], color=PALETTE['loss'])
        return show_plot(figure).svg
    svg = draw()
    assert svg == draw() and 'it falls' in svg
    assert 'var(--llm-loss, #d55e00)' in svg and 'var(--llm-ink, #1f2328)' in svg
    assert not any(color in svg.replace(f', {color})', '') for color in PALETTE.values())
    ET.fromstring(svg)


def test_a_picture_is_saved(tmp_path):
    picture = show_tokens(['é'])
    picture.save(tmp_path/'p.svg')
    assert (tmp_path/'p.svg').read_text(encoding='utf-8') == picture._repr_svg_()

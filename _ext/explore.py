"""Pictures to play with: the directive `explore`, with the data that `_ext/explore/*.js` need, made by the package when the book is built.

Each holds a still picture, which the script replaces; the directive's text says what can be done.
"""
import base64, json, re, shutil
from functools import cache
from pathlib import Path

from docutils import nodes
from docutils.parsers.rst import Directive

HERE = Path(__file__).parent/'explore'
ASSETS = Path(__file__).parent.parent/'llmbook'/'assets'
SCRIPTS = {'tokenizer': ['tokenizer'], 'attention': ['attention'], 'sampling': ['sampling'], 'writer': ['sampling', 'gpt', 'writer']}
TEA, LINE, PRAY, CITIZEN = 'Hello, do you like tea? In the sunlit terraces of someunknownPlace.', 'ROMEO:\nWhat, shall I hear thee speak?\n', 'I pray', 'First Citizen:\nWe are'


@cache
def small():
    "The small model that the package ships, and its tokenizer."
    from llmbook.pretrain import load_pretrained
    return load_pretrained('shakespeare')


def gpt2():
    from llmbook.bpe import gpt2_tokenizer
    return gpt2_tokenizer()


def names(ids):
    from llmbook.core import visible
    return [visible(small()[1].vocab[i]) for i in ids]


def tokenizer():
    from llmbook.core import show_tokens
    bpe = gpt2()
    ids = bpe.encode(TEA)
    return {'text': TEA}, show_tokens([bpe.vocab[i] for i in ids], ids)


def attention():
    "The scores of every head on a line of a play, before the mask."
    import torch
    from llmbook.attention import causal_mask
    from llmbook.core import show_heatmap
    model, bpe = small()
    ids = bpe.encode_ordinary(LINE)
    scores = []
    with torch.no_grad():
        x = model.token_embedding(torch.tensor(ids)) + model.position_embedding(len(ids))
        for block in model.blocks:
            q, k, _ = block.attention._heads(block.attention_norm(x))
            scores.append(q @ k.transpose(-2, -1) / q.shape[-1]**0.5)
            x = block(x)
    weights = scores[0].masked_fill(~causal_mask(len(ids)), -torch.inf).softmax(-1)
    tokens = names(ids)
    return {'tokens': tokens, 'scores': [[[[round(v, 4) for v in row] for row in head] for head in block.tolist()] for block in scores]}, show_heatmap(weights[0], tokens, tokens, 'block 0, head 0', digits=None, color='query')


def sampling():
    "What the small model says after two words."
    import torch
    from llmbook.core import PALETTE, new_plot, show_plot
    model, bpe = small()
    with torch.no_grad(): logits = model(torch.tensor(bpe.encode_ordinary(PRAY)))[-1].double()
    best = logits.argsort(descending=True)[:12].tolist()
    figure, axes = new_plot('', 'probability')
    axes.bar(range(12), logits.softmax(-1)[best].tolist(), color=PALETTE['token'])
    axes.set_xticks(range(12), names(best), rotation=60)
    return {'start': PRAY + ' …', 'tokens': names(range(len(logits))), 'logits': [round(z, 5) for z in logits.tolist()]}, show_plot(figure)


def writer():
    from llmbook.core import show_tokens
    from llmbook.generate import generate
    model, bpe = small()
    ids = bpe.encode_ordinary(CITIZEN)
    out = generate(model, ids, 40, temperature=0.8)
    weights = sum(p.numel() for p in model.parameters())
    return {'prompt': CITIZEN, 'size': round(4 * weights * 4 / 3 / 1e6)}, show_tokens([bpe.vocab[i] for i in out], focus=range(len(ids)))


def tokenizer_data(bpe): return {'bytes': list(bpe.byte_order), 'merges': [i for pair in bpe.merges for i in pair]}


def model_data(model, bpe):
    "Sizes, names and float32 weights of a model, a tied head only once."
    import numpy as np
    from dataclasses import asdict
    tensors = {name: p.detach().numpy().astype('<f4') for name, p in model.named_parameters()}
    return {'config': asdict(model.config), 'shapes': [[name, t.size] for name, t in tensors.items()], 'tokenizer': tokenizer_data(bpe),
            'weights': base64.b64encode(np.concatenate([t.ravel() for t in tensors.values()]).tobytes()).decode()}


class Explore(Directive):
    required_arguments, has_content = 1, True

    def run(self):
        kind = self.arguments[0]
        if kind not in SCRIPTS: raise self.error(f'explore {kind}: there are {", ".join(SCRIPTS)}')
        env, place = self.state.document.settings.env, nodes.container(classes=['llm-explorable'])
        env.note_dependency(str(HERE/f'{kind}.js'))
        data, picture = globals()[kind]()
        words = nodes.container(classes=['llm-note'])
        self.content[0] = re.sub('^In the rendered book: (.)', lambda m: m[1].upper(), self.content[0])      # for those who read the notebook
        self.state.nested_parse(self.content, self.content_offset, words)
        svg = picture.svg.replace('<svg ', '<svg role="img" aria-label="A still picture of what can be tried here with JavaScript." ', 1)
        root = '../' * env.docname.count('/') + '_static/explore/'
        place += words
        place += nodes.raw('', f'<div class="llm-explore" data-kind="{kind}"><script type="application/json">{json.dumps(data).replace("<", chr(92) + "u003c")}</script><div class="llm-still">{svg}</div></div>'
                           + ''.join(f'<script defer src="{root}{name}.js"></script>' for name in ('book', *SCRIPTS[kind])), format='html')
        return [place]


def write(app, error):
    "The scripts and what they load, beside the book."
    if error or app.builder.format != 'html': return
    out = Path(app.outdir)/'_static'/'explore'
    out.mkdir(parents=True, exist_ok=True)
    for path in HERE.glob('*.js'): shutil.copy(path, out)
    for name, make in {'gpt2': lambda: tokenizer_data(gpt2()), 'shakespeare': lambda: model_data(*small())}.items():
        path = out/f'{name}.js'
        if path.exists() and path.stat().st_mtime > max(p.stat().st_mtime for p in (Path(__file__), *ASSETS.rglob('*'))): continue
        path.write_text(f'llmbook.data[{json.dumps(name)}] = {json.dumps(make(), separators=(",", ":"))}\n', encoding='utf-8')


def setup(app):
    app.add_directive('explore', Explore)
    app.connect('build-finished', write)
    return dict(version='1', parallel_read_safe=True, parallel_write_safe=True)

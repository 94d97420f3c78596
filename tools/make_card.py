"""Draw `_static/card.png`, the picture that stands beside a link to the book: `python -m tools.make_card` (needs Chromium)."""
from pathlib import Path

from llmbook.core import PALETTE, Picture, _arrow, _box, _label, load_text, show_tokens
from llmbook.bpe import gpt2_tokenizer
from tools.browser import open_browser

OUT = Path(__file__).resolve().parent.parent/'_static'/'card.png'


def card() -> str:
    "1,200 by 630: the first words of the story as tokens, and the question of the whole book."
    tokenizer = gpt2_tokenizer()
    ids = tokenizer.encode(load_text('the-verdict'))[:9]
    row = show_tokens([tokenizer.vocab[i] for i in ids], ids, width=1000)
    inner = row.svg[row.svg.index('/>') + 2:-len('</svg>')]
    x = row.width + 34
    parts = [_label(40, 92, 'llmbook', 46, more='style="text-anchor: start" font-weight="700"'),
             _label(40, 132, 'Build a large language model from nothing', 21, 'text', 'style="text-anchor: start"'),
             f'<g transform="translate(36 178)">{inner}</g>',
             _arrow((36 + row.width, 194), (36 + x - 4, 194)), _box(36 + x, 182, 34, 24, 'loss'), _label(36 + x + 17, 199, '?', 15),
             _label(40, 282, 'text → tokens → vectors → attention → GPT → pretraining', 16, more='style="text-anchor: start"')]
    return Picture(''.join(parts), 600, 315).svg.replace('width="750" height="393.75"', 'width="1200" height="630"')


def main():
    with open_browser() as browser:
        page = browser.new_page(viewport={'width': 1200, 'height': 630})
        page.set_content(f'<body style="margin: 0; background: {PALETTE["paper"]}">{card()}</body>')
        page.screenshot(path=OUT)
    print(f'{OUT.name}: {OUT.stat().st_size:,} bytes')


if __name__ == '__main__': main()

"The rendered book in a real browser: every page, in both themes and on a phone, and the pictures to play with, against the package."
import json, os, random, subprocess, sys, threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
import yaml
from llmbook.bpe import gpt2_tokenizer
from llmbook.generate import next_probabilities
from llmbook.pretrain import load_pretrained
from tools import book
from tools.browser import find_chromium, open_browser

from test_bpe import PIECES, random_text

ROOT = Path(__file__).parent.parent
PAGES = sorted(book.pages_of_toc(yaml.safe_load((ROOT/'_toc.yml').read_text(encoding='utf-8'))))
KINDS = {'tokenizer': 'nbs/03_bpe', 'attention': 'nbs/07_multihead', 'sampling': 'nbs/10_generate', 'writer': 'nbs/16_pretrain'}
SHARED = '_static/'

pytestmark = pytest.mark.skipif(not find_chromium() and 'LLMBOOK_BROWSER' not in os.environ, reason='there is no Chromium here; install it, or name it in LLMBOOK_CHROMIUM')


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_): pass


def serve(folder: Path):
    server = ThreadingHTTPServer(('127.0.0.1', 0), partial(Quiet, directory=folder))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server, f'http://127.0.0.1:{server.server_port}'


@pytest.fixture(scope='module')
def built(tmp_path_factory):
    "The book, built from the stored outputs into a folder of its own; `LLMBOOK_BUILT` names one that is built already."
    if 'LLMBOOK_BUILT' in os.environ: return Path(os.environ['LLMBOOK_BUILT']).resolve()
    out = tmp_path_factory.mktemp('book')
    done = subprocess.run([sys.executable, '-c', 'from jupyter_book.cli.main import main; main()', 'build', '.', '--path-output', str(out), '-W', '-n', '--keep-going'], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return out/'_build'/'html'


@pytest.fixture(scope='module')
def browser():
    with open_browser() as browser: yield browser


@pytest.fixture(scope='module')
def address(built, tmp_path_factory):
    "The book as it is published, below the name of its repository."
    root = tmp_path_factory.mktemp('site')
    (root/book.BASE.strip('/')).symlink_to(built)
    (root/'favicon.ico').write_bytes(b'')      # asked for once by every browser; not ours there
    server, url = serve(root)
    yield url + book.BASE.rstrip('/')
    server.shutdown()


@pytest.fixture(scope='module')
def reader(browser):
    "Somebody who goes from page to page, and has fetched what they share once."
    context = browser.new_context(viewport={'width': 1280, 'height': 900}, color_scheme='light')
    yield context
    context.close()


CONTRAST = {'runOnly': ['color-contrast']}
# Marks two texts of a kind, the first and the last: of those with the same elements around, the same classes and the same colours.
MARK = """() => {
    const kinds = new Map(), names = new Map()
    function name(e) {
        if (!e) return ''
        if (!names.has(e)) {
            const s = getComputedStyle(e)
            names.set(e, name(e.parentElement) + [e.tagName, e.className, s.color, s.backgroundColor, s.backgroundImage, s.opacity, s.position, s.fontSize, s.fontWeight] + ';')
        }
        return names.get(e)
    }
    for (const e of document.querySelectorAll('body *')) {
        delete e.dataset.kindOfText
        if (e.checkVisibility() && [...e.childNodes].some(n => n.nodeType == 3 && n.data.trim())) kinds.set(name(e), [...kinds.get(name(e)) ?? [], e])
    }
    for (const alike of kinds.values()) for (const e of [alike[0], alike.at(-1)]) e.dataset.kindOfText = ''
    return kinds.size
}"""


def look(reader, url: str, everything: bool = False) -> list[str]:
    "All that is wrong with a page, one line each: errors, requests to elsewhere, formulas, width, weight, contrast and names."
    from axe_playwright_python.base import AXE_SCRIPT
    home, faults, own = '/'.join(url.split('/')[:3]), [], 0
    page = reader.new_page()
    page.on('console', lambda m: faults.append(f'console: {m.text} {m.location}') if m.type == 'error' else None)
    page.on('pageerror', lambda e: faults.append(f'error: {e}'))
    page.on('request', lambda r: None if r.url.startswith((home, 'data:', 'blob:')) else faults.append(f'asks for {r.url}'))
    page.on('requestfailed', lambda r: faults.append(f'not loaded: {r.url}'))

    def weigh(response):
        nonlocal own
        if response.url.startswith(home) and SHARED not in response.url: own += len(response.body())
    page.on('response', weigh)
    page.goto(url)
    page.evaluate('() => window.MathJax?.startup?.promise')
    page.wait_for_timeout(100)
    formulas, set_ = page.locator('.math').count(), page.locator('mjx-container').count()
    if set_ < formulas or page.locator('mjx-merror').count(): faults.append(f'{formulas} formulas, {set_} of them set')
    for label in page.evaluate("() => [...document.querySelectorAll('svg.llm-picture')].filter(e => e.getBoundingClientRect().height < 20 && !e.closest('details:not([open]), .cell.tag_hide-output')).map(e => e.ariaLabel)"):
        faults.append(f'a picture is not to be seen: {label}')
    if own > 1.5e6: faults.append(f'the page itself weighs {own:,} bytes')
    page.set_viewport_size({'width': 390, 'height': 800})
    wide = page.evaluate('() => document.documentElement.scrollWidth')
    if wide > 390: faults.append(f'{wide} pixels wide at 390')
    page.set_viewport_size({'width': 1280, 'height': 900})
    # Code and formulas are made alike on every page, and of thousands of parts: their colours are looked at once. Of other text each page's own kinds are.
    if not everything: page.evaluate("() => document.querySelectorAll('div.highlight, mjx-container, svg').forEach(e => e.remove())")
    page.evaluate(AXE_SCRIPT)
    page.add_style_tag(content='*, ::before, ::after {transition: none !important; animation: none !important}')      # colours change at once
    for theme, what in (('light', {'rules': {'color-contrast': {'enabled': False}}}), ('light', CONTRAST), ('dark', CONTRAST)):
        page.evaluate('theme => { document.documentElement.dataset.theme = document.documentElement.dataset.mode = theme }', theme)
        some = what is CONTRAST and not everything and page.evaluate(MARK)
        found = page.evaluate('([where, how]) => axe.run(where ?? document, how)', ['[data-kind-of-text]' if some else None, {'resultTypes': ['violations'], 'preload': False, **what}])['violations']
        faults += [f"{theme}: {v['id']} ({v['impact']}): {len(v['nodes'])} times, such as {v['nodes'][0]['html'][:150]}" for v in found if v['impact'] in ('serious', 'critical')]
    page.close()
    return faults


@pytest.mark.parametrize('name', PAGES)
def test_page(reader, address, name): assert not look(reader, f'{address}/{name}.html')


def test_code_formulas_and_contents(reader, address): assert not look(reader, f'{address}/nbs/05_embeddings.html', everything=True)


def test_every_link_leads_somewhere(built): assert not book.check(built)


BROKEN = {
    'error: ': '<script>nothing.at.all</script>', 'console: ': '<script>console.error("oh")</script>', 'asks for ': '<img alt="x" src="http://127.0.0.2:9/x.png">',
    'not loaded: ': '<img alt="x" src="http://127.0.0.2:9/x.png">', 'formulas, 0': '<span class="math">x</span>', 'not to be seen': '<svg class="llm-picture" role="img" aria-label="a" width="1" height="1"></svg>',
    'weighs': f'<p hidden>{"x" * 1_600_000}</p>', 'color-contrast': '<p>dark</p>' * 9 + '<p style="color: #aaa; background: #fff">pale</p>' + '<p>dark</p>' * 9, 'dark: color-contrast': '<p class="d">dim</p><style>[data-theme=dark] .d {color: #222; background: #111}</style>',
    'image-alt': '<img src="data:image/gif;base64,R0lGODlhAQABAAAAACw=">', 'pixels wide': '<div style="width: 500px">wide</div>',
}


@pytest.mark.parametrize('fault', BROKEN)
def test_a_broken_page_is_noticed(reader, tmp_path, fault):
    (tmp_path/'x.html').write_text(f'<!doctype html><html lang="en"><title>x</title><main><h1>x</h1>{BROKEN[fault]}</main></html>')
    (tmp_path/'favicon.ico').write_bytes(b'')
    server, url = serve(tmp_path)
    found = look(reader, f'{url}/x.html')
    server.shutdown()
    assert any(fault in line for line in found), found


def test_a_page_without_faults_has_none(reader, tmp_path):
    (tmp_path/'x.html').write_text('<!doctype html><html lang="en"><title>x</title><main><h1>x</h1></main></html>')
    (tmp_path/'favicon.ico').write_bytes(b'')
    server, url = serve(tmp_path)
    assert look(reader, f'{url}/x.html') == []
    server.shutdown()


@pytest.fixture
def page(browser, address):
    context = browser.new_context(viewport={'width': 390, 'height': 800}, has_touch=True)
    page = context.new_page()
    page.address = address
    yield page
    context.close()


def test_search_finds_a_term(page):
    page.goto(f'{page.address}/search.html?q=perplexity')
    page.wait_for_selector('#search-results li a[href*="11_loss"]')


def test_the_theme_can_be_switched(page):
    page.set_viewport_size({'width': 1280, 'height': 900})
    page.goto(f'{page.address}/nbs/02_words.html')
    paper = lambda: page.evaluate("() => getComputedStyle(document.body).backgroundColor")
    seen = set()
    for _ in range(3):
        page.locator('button.theme-switch-button:visible').first.click()
        page.wait_for_timeout(400)
        seen.add((page.evaluate('() => document.documentElement.dataset.theme'), paper()))
    assert {theme for theme, _ in seen} == {'light', 'dark'} and len({colour for _, colour in seen}) == 2


def test_a_caption_leads_to_the_code_of_its_figure(page):
    page.goto(f'{page.address}/nbs/10_generate.html')
    links = page.locator('figure a.llm-source')
    assert links.count() == page.locator('figure svg.llm-picture').count() > 2
    links.first.click()
    place = page.locator(links.first.get_attribute('href'))
    page.wait_for_function("e => e.closest('details').open", arg=place.element_handle())      # what was folded is not
    assert 'new_plot' in place.text_content() and place.is_visible()


def test_what_is_not_found_says_so(page):
    page.goto(f'{page.address}/404.html')
    assert 'This page is not here' in page.text_content('article')
    assert page.locator('article a').first.get_attribute('href') == f'{book.BASE}nbs/index.html'      # it is shown at any depth


def test_plain_text_and_site_map(built):
    text = (built/'llms-full.txt').read_text(encoding='utf-8')
    assert 'Byte-pair encoding' in text and 'class GPT(nn.Module)' in text and '124,439,808' in text and 'BEGIN SOLUTION' not in text
    assert all(f'({name}.html)' in (built/'llms.txt').read_text(encoding='utf-8') for name in PAGES if 'nbs/api' not in name and 'C_solutions' not in name)
    assert all(f'/{name}.html</loc>' in (built/'sitemap.xml').read_text(encoding='utf-8') for name in PAGES)


def test_the_book_on_paper(browser, built, tmp_path):
    "All pages in the order of the contents; two of them, printed: with an outline, links to the published book, and the quiz open."
    from pypdf import PdfReader
    from tools import pdf
    assert sorted(pdf.in_order(yaml.safe_load((ROOT/'_toc.yml').read_text(encoding='utf-8')))) == [name for name in PAGES if '/api/' not in name]
    assert pdf.write(browser, ['nbs/02_words', 'nbs/G_cheat_sheet'], built, tmp_path/'x.pdf') > 4
    printed = PdfReader(tmp_path/'x.pdf')
    text, outline = ''.join(p.extract_text() for p in printed.pages), [item for item in printed.outline if not isinstance(item, list)]
    assert len(outline) == 2 and len(printed.pages) - printed.get_destination_page_number(outline[1]) <= 3      # two, with Debian's fonts
    assert 'https://' in str([a.get_object() for p in printed.pages for a in p.get('/Annots', [])]) and '127.0.0.1' not in str(printed.pages[0].get('/Annots'))
    assert 'No. ' in text and 'Yes. ' in text      # of the quiz


def explorable(page, kind):
    "The picture to play with, alive."
    page.goto(f'{page.address}/{KINDS[kind]}.html')
    place = page.locator(f'.llm-explore[data-kind={kind}]')
    place.scroll_into_view_if_needed()
    page.wait_for_selector(f'.llm-explore[data-kind={kind}][data-ready]')
    return place


@pytest.mark.parametrize('kind', KINDS)
def test_without_scripts_there_is_a_still_picture(browser, address, kind):
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(f'{address}/{KINDS[kind]}.html')
    assert page.locator(f'.llm-explore[data-kind={kind}] .llm-still svg').is_visible()
    context.close()


def test_from_a_disk(browser, built):
    "Without a server, as somebody opens the book who has downloaded it."
    page = browser.new_page()
    page.address = built.as_uri()
    assert explorable(page, 'tokenizer').locator('.llm-tokens button').count() == 18
    page.close()


def test_tokens_are_those_of_the_package(page):
    explorable(page, 'tokenizer')
    texts = [*PIECES, *(random_text(random.Random(k)) for k in range(300)), *map(chr, range(0x250)), '\x1c a\x1d\x85b\u2028c\u180ed\ufeffe']
    found = page.evaluate("async texts => { const bpe = new llmbook.BPE(await llmbook.load('gpt2')); return texts.map(t => [bpe.encode(t), bpe.decode(bpe.encode(t))]) }", texts)
    ours = gpt2_tokenizer()
    for text, (ids, back) in zip(texts, found): assert (ids, back) == (ours.encode_ordinary(text), text), repr(text)


def test_tokens_look_as_in_the_pictures(page):
    from llmbook.core import visible
    explorable(page, 'tokenizer')
    vocab = gpt2_tokenizer().vocab[:50_256]
    assert page.evaluate("async ids => { const bpe = new llmbook.BPE(await llmbook.load('gpt2')); return ids.map(id => llmbook.visible(bpe.bytes(id))) }", list(range(len(vocab)))) == [visible(token) for token in vocab]


def test_the_merges_of_a_token(page):
    place = explorable(page, 'tokenizer')
    place.locator('textarea').fill('unknown')
    assert '1 token for 7 characters, which are 7 bytes' in place.text_content()
    place.locator('.llm-tokens button').focus()
    page.keyboard.press('Enter')
    lines = place.locator('.llm-story li').all_text_contents()
    assert [line.split(' merge')[0].split(' its')[0] for line in lines] == ['u n k n o w n', 'u n k n ow n', 'un k n ow n', 'un k n own', 'unk n own', 'unk nown', 'unknown']
    assert gpt2_tokenizer().merges[34424] == tuple(gpt2_tokenizer().vocab.index(part) for part in (b'unk', b'nown')) and lines[-1].endswith('rank 34424')
    place.locator('textarea').fill('unknown!')      # what is open stays open
    assert 'token 34680' in place.text_content()
    place.get_by_role('button', name='🙂').first.click()
    place.locator('.llm-tokens button').first.click()
    assert 'a part of a character' in place.text_content()
    place.locator('textarea').fill('a <|endoftext|>')
    assert 'must not become the mark' in place.text_content()
    place.locator('textarea').fill('')
    assert 'Nothing typed' in place.text_content()


def test_attention_is_that_of_the_package(page):
    place = explorable(page, 'attention')
    data = json.loads(place.locator('script').text_content())
    model, bpe = load_pretrained('shakespeare')
    ids = torch.tensor([i for token in data['tokens'] for i in [[bpe.vocab.index(b) for b in [token.replace('·', ' ').replace('⏎', '\n').encode()]][0]]])
    with torch.no_grad():
        x = model.token_embedding(ids) + model.position_embedding(len(ids))
        for block, scores in zip(model.blocks, data['scores']):
            weights = block.attention.attend(block.attention_norm(x))[1]
            x = block(x)
            for h, head in enumerate(scores):
                found = page.evaluate('head => head.map((_, i) => llmbook.attend(head, i, true))', head)
                torch.testing.assert_close(torch.tensor(found), weights[h], atol=1e-3, rtol=0)
                free = page.evaluate('head => head.map((_, i) => llmbook.attend(head, i, false))', head)
                torch.testing.assert_close(torch.tensor(free), torch.tensor(head).softmax(-1), atol=1e-5, rtol=0)


def test_attention_by_hand(page):
    place = explorable(page, 'attention')
    tokens, row = place.locator('.llm-tokens button'), lambda: [float(s) for s in place.locator('.llm-tokens small').all_text_contents()]
    tokens.nth(3).tap()
    masked = row()
    assert sum(masked[4:]) == 0 and abs(sum(masked) - 1) < 0.05
    tokens.nth(3).press('ArrowRight')      # on to the next token
    assert row() != masked and row()[4] > 0 and '(place 4) attends to' in place.text_content()
    for label in ('Block', 'Head'):      # what is chosen stays chosen, on the way to the controls too
        place.get_by_label(label).focus()
        before = row()
        place.get_by_label(label).select_option(index=3)
        assert row() != before and '(place 4) attends to' in place.text_content()
    tokens.nth(9).hover()
    assert '(place 9) attends to' in place.text_content()
    page.mouse.move(0, 0)
    assert '(place 4) attends to' in place.text_content()
    place.get_by_label('Causal mask').uncheck()
    assert sum(row()[5:]) > 0
    assert place.locator('.llm-tokens button:not([tabindex="-1"])').count() == 1      # one stop for the Tab key


WAYS = [dict(temperature=t, top_k=k, top_p=p) for t in (0, 0.3, 1, 2.5) for k in (None, 1, 5, 1000) for p in (None, 0.05, 0.6, 0.95)]


def test_sampling_is_that_of_the_package(page):
    data = json.loads(explorable(page, 'sampling').locator('script').text_content())
    ties = [1.0, 3.0, 3.0, 0.0, 3.0, 2.0, 2.0]
    for scores in (data['logits'], ties):
        logits = torch.tensor(scores, dtype=torch.double)
        found = page.evaluate('([z, ways]) => ways.map(w => llmbook.nextProbabilities(z, w.temperature, w.top_k ?? Infinity, w.top_p ?? 1))', [scores, WAYS])
        for how, shares in zip(WAYS, found): torch.testing.assert_close(torch.tensor(shares, dtype=torch.double), next_probabilities(logits, **how), atol=1e-12, rtol=1e-9, msg=str(how))


def test_sliders(page):
    place = explorable(page, 'sampling')
    heat = place.get_by_label('Temperature')
    first = lambda: place.locator('.llm-bars small').first.text_content()
    before = first()
    heat.focus()
    for _ in range(20): heat.press('ArrowLeft')
    assert first() == '100.0 %' and '1 of 1,024 tokens' in place.text_content()
    place.get_by_role('button', name='Back to the model').click()
    assert first() == before and '1,024 of 1,024' in place.text_content()
    place.get_by_label('Top-k').press('Home')
    assert '1 of 1,024' in place.text_content()


def test_the_model_computes_as_the_package_does(page):
    "Logits on texts shorter than the context, as long, and longer; and whom each place attends to."
    explorable(page, 'writer')
    model, bpe = load_pretrained('shakespeare')
    T = model.config.context_length
    play = bpe.encode_ordinary('First Citizen:\nWe are accounted poor citizens, the patricians good.\n' * 4)
    texts = [play[:1], play[:9], play[3:3 + T], play[:T + 5], [0, 1023, 255, 5]]
    found = page.evaluate("async texts => { const model = new llmbook.GPT(await llmbook.load('shakespeare')); return texts.map(ids => model.after(ids)) }", texts)
    for ids, told in zip(texts, found):
        window = torch.tensor(ids[-T:])
        with torch.no_grad(): torch.testing.assert_close(torch.tensor(told['logits']), model(window)[-1], atol=1e-3, rtol=0)
        assert told['start'] == len(ids) - len(window)
    with torch.no_grad(): weights = model.blocks[0].attention.attend(model.blocks[0].attention_norm(model.token_embedding(torch.tensor(texts[1])) + model.position_embedding(9)))[1]
    torch.testing.assert_close(torch.tensor(found[1]['attention'][0]), weights[:, -1], atol=1e-4, rtol=0)
    # What was read is kept: token by token, past the end of the context, the same as all at once.
    apart = page.evaluate("async ids => { const data = await llmbook.load('shakespeare'), kept = new llmbook.GPT(data), fresh = new llmbook.GPT(data), far = []; for (const n of [1, 2, 3, 30, ids.length - 4, ids.length - 3, ids.length - 2, ids.length - 1, ids.length]) { fresh.known = null; const a = kept.after(ids.slice(0, n)).logits, b = fresh.after(ids.slice(0, n)).logits; far.push(...a.map((z, i) => Math.abs(z - b[i]))) } return Math.max(...far) }", play[:T + 3])
    assert apart < 1e-4


def test_it_writes(page):
    place = explorable(page, 'writer')
    place.locator('textarea').fill('')
    place.get_by_role('button', name='Write').tap()
    page.wait_for_selector('text=nothing to continue')
    place.locator('textarea').fill('ROMEO:\nO')
    place.get_by_label('Temperature').press('Home')
    place.get_by_role('button', name='Write').focus()
    page.keyboard.press('Enter')
    page.wait_for_selector('text=Done. Underlined is what you typed', timeout=120_000)
    assert page.evaluate('() => document.activeElement.textContent') == 'Write'      # the focus is where it was
    model, bpe = load_pretrained('shakespeare')
    from llmbook.generate import generate
    text = bpe.decode(generate(model, bpe.encode_ordinary('ROMEO:\nO'), 120, temperature=0))
    buttons = place.locator('.llm-written button')
    assert ''.join(buttons.all_text_contents()) == text.replace('\n', '⏎')
    assert place.locator('.llm-bars li').count() == 1 and place.locator('.llm-bars li[data-mark] small').text_content() == '100.0 % ← drawn'
    buttons.nth(20).tap()
    place.get_by_label('Head').select_option(index=1)
    assert 'head 1 of block 0' in place.text_content() and buttons.nth(20).get_attribute('aria-pressed') == 'true'
    place.get_by_label('Temperature').press('End')
    place.get_by_role('button', name='Write').tap()
    page.wait_for_function("() => document.querySelectorAll('.llm-written button:not(:disabled)').length > 8")
    buttons.nth(len(bpe.encode_ordinary('ROMEO:\nO')) + 2).tap()      # chosen while it writes
    place.get_by_role('button', name='Stop').tap()
    page.wait_for_selector('text=Stopped. Underlined')
    assert place.locator('.llm-written [aria-pressed=true]').evaluate('e => [...e.parentElement.querySelectorAll("button:not(:disabled)")].indexOf(e)') == 2
    assert place.locator('.llm-bars li').count() == 8

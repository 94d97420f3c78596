"""Print the built book into one file, `_build/llmbook.pdf`: `python -m tools.pdf` (needs Chromium, and `make book` before).

Chromium prints page by page, with what one opens on a screen opened, but for the code behind drawings. Links from page to page lead
to the published book; the outline at the side leads through the file.
"""
import mimetypes, sys
from io import BytesIO
from pathlib import Path
from urllib.parse import unquote, urlsplit

import yaml
from pypdf import PdfReader, PdfWriter

from tools.book import BASE, HOST, ROOT
from tools.browser import open_browser

BOOK, OUT = ROOT/'_build'/'html', ROOT/'_build'/'llmbook.pdf'
FOOT = '<div style="width: 100%; font-size: 8px; color: #666; text-align: center"><span class="title"></span> · <span class="pageNumber"></span></div>'
OPEN = "() => document.querySelectorAll('article details:not([class])').forEach(d => { d.open = true })"


def in_order(item) -> list[str]:
    "The pages of the table of contents as a reader meets them, without the reference."
    if isinstance(item, list): return [name for part in item for name in in_order(part)]
    if not isinstance(item, dict): return []
    return [name for key in ('root', 'file') if (name := item.get(key)) and '/api/' not in name] + in_order(item.get('parts', [])) + in_order(item.get('chapters', []))


def write(browser, pages: list[str], book: Path, out: Path) -> int:
    "Print pages of a built book into one file; how many sheets it has."
    def give(route):      # answer for the published book from the disk, so that links lead to it; pictures stand still
        path = book/unquote(urlsplit(route.request.url).path).removeprefix(BASE)
        if '/explore/' in route.request.url or not path.is_file(): return route.abort()
        route.fulfill(body=path.read_bytes(), content_type=mimetypes.guess_type(path.name)[0] or 'application/octet-stream')

    whole = PdfWriter()
    page = browser.new_page(color_scheme='light')
    page.route('**/*', give)
    for name in pages:
        page.goto(f'{HOST}{BASE}{name}.html')
        page.evaluate('() => window.MathJax?.startup?.promise')
        page.evaluate(OPEN)
        printed = page.pdf(format='A4', outline=True, tagged=True, display_header_footer=True, header_template='<span></span>', footer_template=FOOT, margin=dict(top='16mm', bottom='16mm', left='14mm', right='14mm'))
        whole.append(PdfReader(BytesIO(printed)), outline_item=page.title().removesuffix(' — llmbook'), import_outline=True)
        print(f'{name}: {len(whole.pages)} sheets so far', flush=True)
    whole.compress_identical_objects()
    page.close()
    whole.write(out)
    return len(whole.pages)


def main():
    if not (BOOK/'index.html').exists(): sys.exit('There is no book in _build/html yet; run `make book` first.')
    pages = in_order(yaml.safe_load((ROOT/'_toc.yml').read_text(encoding='utf-8')))
    with open_browser() as browser: sheets = write(browser, pages, BOOK, OUT)
    print(f'{OUT.relative_to(ROOT)}: {sheets} sheets, {OUT.stat().st_size / 1e6:.1f} MB')


if __name__ == '__main__': main()

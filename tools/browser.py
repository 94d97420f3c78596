"""A browser for tests, pictures and print: Chromium as the system has it, or as Playwright has fetched it."""
import os, shutil
from contextlib import contextmanager

NAMES = 'chromium', 'chromium-browser', 'google-chrome', 'google-chrome-stable', 'chrome'
FLAGS = ['--no-sandbox', '--disable-gpu', '--disable-quic', '--no-first-run', '--disable-background-networking', '--disable-component-update', '--disable-sync']


def find_chromium() -> str | None:
    "The path of Chromium: `LLMBOOK_CHROMIUM`, or the first that is installed."
    return os.environ.get('LLMBOOK_CHROMIUM') or next(filter(None, map(shutil.which, NAMES)), None)


@contextmanager
def open_browser():
    "A Chromium without a window."
    from playwright.sync_api import sync_playwright
    with sync_playwright() as p:
        browser = p.chromium.launch(executable_path=find_chromium(), args=FLAGS)
        try: yield browser
        finally: browser.close()

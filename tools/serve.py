"""Serve the built book on this machine and open it in a browser: `python -m tools.serve [port]`."""
import sys, webbrowser
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

BOOK = Path(__file__).resolve().parent.parent/'_build'/'html'


def main():
    if not (BOOK/'index.html').exists(): sys.exit('There is no book in _build/html yet; run `make book` first.')
    given = sys.argv[1] if len(sys.argv) > 1 else '8000'
    if not given.isdecimal() or int(given) > 65535: sys.exit(f'port={given} is not a whole number from 0 to 65535; try: make serve PORT=8000')
    port = int(given)
    try: server = ThreadingHTTPServer(('127.0.0.1', port), partial(SimpleHTTPRequestHandler, directory=BOOK))
    except OSError as e: sys.exit(f'Port {port} cannot be used ({e.strerror}); choose another: make serve PORT=8001')
    url = f'http://127.0.0.1:{server.server_port}/'
    print(f'The book is at {url} (Ctrl-C stops).')
    webbrowser.open(url)
    try: server.serve_forever()
    except KeyboardInterrupt: pass


if __name__ == '__main__': main()

"""Serves the built book on this machine only, and opens it in the browser when there is one."""

import contextlib
import functools
import os
import sys
import webbrowser
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

SITE = Path(__file__).resolve().parents[2] / "_build" / "html"


class Quiet(SimpleHTTPRequestHandler):
    """Files of the site, without a line on the terminal for each."""

    def log_message(self, *_):
        """Say nothing."""


def server(port: int = 0) -> ThreadingHTTPServer:
    """A server of the built site on 127.0.0.1, not yet running; port 0 takes a free one."""
    return ThreadingHTTPServer(("127.0.0.1", port), functools.partial(Quiet, directory=str(SITE)))


def main(port: int) -> None:
    """Serve until Ctrl-C."""
    try:
        site = server(port)
    except OSError:
        sys.exit(f"Port {port} is taken: choose another, as in make serve PORT={port + 1}")
    address = f"http://127.0.0.1:{port}/"
    print(f"The book is at {address} (Ctrl-C stops serving it).", flush=True)
    if sys.platform != "linux" or os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"):
        webbrowser.open(address)  # without a desktop this would start a text browser in this terminal
    with contextlib.suppress(KeyboardInterrupt):
        site.serve_forever()


if __name__ == "__main__":
    main(int(sys.argv[1]))

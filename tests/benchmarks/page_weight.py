"""Prints what each page weighs: its HTML, and all that a first visit loads, in kB and gzipped.

    python tests/benchmarks/page_weight.py          after `make book`

A browser opens each page with an empty cache; the server does not compress, so the second number of
each pair is what a server that does would send.
"""

import gzip
import sys
from pathlib import Path

SITE_TESTS = Path(__file__).resolve().parents[1] / "site"
sys.path.insert(0, str(SITE_TESTS))

import conftest  # noqa: E402

TEXT = (".html", ".js", ".css", ".svg", ".json")


def weigh(url: str, body: bytes) -> tuple[int, int]:
    """Bytes as stored, and as sent."""
    return len(body), len(gzip.compress(body, 6)) if url.split("?")[0].endswith(TEXT) else len(body)


def main() -> None:
    """One line a page, then the heaviest files."""
    import shutil
    import threading

    import serve
    from playwright.sync_api import sync_playwright

    server = serve.server()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address, files = f"http://127.0.0.1:{server.server_port}/", {}
    print(f"{'page':36} {'HTML kB':>16} {'all kB':>16}    (gzipped)")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=conftest.FLAGS)
        for path in conftest.PAGES:
            window = conftest.Visit(browser, address)
            bodies = {}
            window.page.on("response", lambda r, bodies=bodies: bodies.update({r.url: r}))
            window.go(path)
            window.page.wait_for_load_state("networkidle")
            weights = {
                url: weigh(url, answer.body())
                for url, answer in bodies.items()
                if url.startswith(address) and answer.ok
            }
            files |= weights
            html, total = weights[address + path], [sum(w[i] for w in weights.values()) for i in (0, 1)]
            print(f"{path:36} {show(html):>16} {show(total):>16}")
            window.context.close()
        browser.close()
    print("\nheaviest files")
    for url, weight in sorted(files.items(), key=lambda item: -item[1][1])[:8]:
        print(f"{url.removeprefix(address).split('?')[0]:60} {show(weight):>16}")


def show(weight) -> str:
    """Bytes and gzipped bytes as kB."""
    return f"{weight[0] / 1000:.0f} ({weight[1] / 1000:.0f})"


if __name__ == "__main__":
    main()

"""Pictures of the server's page for docs/server.md, in Chromium.

python tests/page_screenshots.py model.gguf document.txt --question "Who maintains packages?"
"""

from __future__ import annotations

import argparse
import contextlib
from pathlib import Path
from typing import Any

from playwright.sync_api import sync_playwright
from served import Served
from test_page import CHROMIUM

FOLDER = Path(__file__).resolve().parents[1] / "docs"


def take(page: Any, name: str) -> None:
    page.screenshot(path=FOLDER / f"page-{name}.png")
    print(f"docs/page-{name}.png", (FOLDER / f"page-{name}.png").stat().st_size)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("document", type=Path)
    parser.add_argument("--question", required=True)
    parser.add_argument("-c", "--ctx", default="16384")
    args = parser.parse_args()
    with contextlib.ExitStack() as stack:
        server = Served(args.model, "--ctx", args.ctx)
        stack.callback(server.end)
        browser = stack.enter_context(sync_playwright()).chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox"]
        )
        page = browser.new_page(viewport={"width": 900, "height": 620}, color_scheme="light")
        page.set_default_timeout(3_600_000)
        page.goto(server.url)
        page.set_input_files("#file", args.document)
        page.wait_for_selector("#documents li >> text=tokens")
        page.fill("#question", args.question)
        page.click("#ask")
        page.wait_for_selector("#left >> text=left")
        page.wait_for_timeout(3000)
        take(page, "reading")
        page.wait_for_selector("#used >> text=used")
        page.emulate_media(color_scheme="dark")
        take(page, "dark")
        browser.close()


if __name__ == "__main__":
    main()

"""Takes screenshots of the server's page in Chromium: each tab before, during and after an answer.

    emu-jax serve --checkpoint runs/demo &
    python tools/page_screenshots.py --out screenshots
    python tools/page_screenshots.py --write    # renews docs/server.png

Each tab's first example is sent. Shots are taken at the width of a desktop and of a phone, and with
`--dark` in the dark colors.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from playwright.sync_api import Page, sync_playwright

ROOT = Path(__file__).resolve().parent.parent
TABS = ("chat", "draw", "continue")
# Options of `browser.new_page`.
DESKTOP = {"viewport": {"width": 1024, "height": 720}}
PHONE = {"viewport": {"width": 390, "height": 780}, "is_mobile": True, "has_touch": True}
FIGURE = {"viewport": {"width": 880, "height": 600}}  # docs/server.png
TIMEOUT = 600_000  # milliseconds; a server compiles before its first answer
# An answer is there: the text is whole, or the image is drawn and the request is over.
DONE = """name => document.getElementById(`${name}-stop`).disabled && document.querySelector({
  chat: "#said .assistant[data-done=true]", draw: "#drawn img", continue: "#continued[data-done]",
}[name])"""
# An answer has begun, or was so fast that it is there.
BEGUN = """name => document.querySelector(
  `#${name}-preview img, #${name} .assistant, #${name} figure`)"""


def open_tab(page: Page, address: str, name: str) -> None:
    """Loads the page anew and opens a tab."""
    page.goto(address)
    page.wait_for_selector(f"#{name}-examples button", state="attached")
    page.click(f"#{name}-tab")


def ask(page: Page, name: str) -> None:
    """Sends the first example of a tab."""
    page.click(f"#{name}-examples button")
    page.click(f"#{name}-form button[type=submit]")


def shoot_tabs(page: Page, address: str, out: Path, title: str) -> None:
    """Writes `TITLE-TAB-before.png`, `-during.png` and `-after.png` for each tab."""
    for name in TABS:
        open_tab(page, address, name)
        page.screenshot(path=out / f"{title}-{name}-before.png", full_page=True)
        ask(page, name)
        page.wait_for_function(BEGUN, arg=name)
        page.screenshot(path=out / f"{title}-{name}-during.png", full_page=True)
        page.wait_for_function(DONE, arg=name)
        page.screenshot(path=out / f"{title}-{name}-after.png", full_page=True)


def shoot_figure(page: Page, address: str) -> None:
    """Writes docs/server.png."""
    open_tab(page, address, "chat")
    ask(page, "chat")
    page.wait_for_function(DONE, arg="chat")
    page.screenshot(path=ROOT / "docs" / "server.png", full_page=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--address", default="http://127.0.0.1:7860", help="of the server")
    parser.add_argument("--out", type=Path, default=Path("screenshots"))
    parser.add_argument("--dark", action="store_true", help="in the dark colors")
    parser.add_argument("--write", action="store_true", help="renew docs/server.png, and no more")
    args = parser.parse_args()
    chromium = shutil.which("chromium")
    if chromium is None:
        parser.error("chromium is not installed")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        kinds = {"figure": FIGURE} if args.write else {"desktop": DESKTOP, "phone": PHONE}
        for kind, options in kinds.items():
            colors = "dark" if args.dark else "light"
            page = browser.new_page(color_scheme=colors, **options)
            page.set_default_timeout(TIMEOUT)
            if args.write:
                shoot_figure(page, args.address)
            else:
                args.out.mkdir(parents=True, exist_ok=True)
                shoot_tabs(page, args.address, args.out, f"{kind}-{colors}")
        browser.close()


if __name__ == "__main__":
    main()

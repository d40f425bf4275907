"""Pictures of the site in headless Chromium, wide and narrow, light and dark: python screenshots.py SITE OUT."""

import pathlib
import shutil
import subprocess
import sys

BROWSERS = "chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome"
PAGES = (
    "index",
    "start/first_fixed_point",
    "guides/which_solver",
    "guides/which_gradient",
    "reference/solvers",
    "notebooks/04_which_solver",
    "paper/gallery",
)
SIZES = {"wide": "1440,1400", "narrow": "500,1400"}  # Chromium has no window that is narrower
SCHEMES = {"dark": 0, "light": 1}


def main(site: pathlib.Path, out: pathlib.Path) -> None:
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        print(f"no browser here ({', '.join(BROWSERS)}): the screenshots are left out")
        return
    out.mkdir(parents=True, exist_ok=True)
    options = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
    for page in PAGES:
        for size, pixels in SIZES.items():
            for scheme, number in SCHEMES.items():
                picture = out / f"{page.replace('/', '-')}-{size}-{scheme}.png"
                page_options = [f"--window-size={pixels}", f"--blink-settings=preferredColorScheme={number}"]
                address = (site / f"{page}.html").resolve().as_uri()
                command = [*options, *page_options, f"--screenshot={picture.resolve()}", address]
                subprocess.run(command, check=True, capture_output=True, timeout=60)
    print(f"{len(list(out.glob('*.png')))} screenshots in {out}")


if __name__ == "__main__":
    main(*map(pathlib.Path, sys.argv[1:]))

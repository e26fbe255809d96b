"""How soon is a report on the screen? Builds reports of synthetic runs and opens them in headless Chromium.

    PYTHONPATH=. python experiments/report_paint.py --out experiments/results/report_paint.json

Per number of chains: seconds to build, MiB of the page, and milliseconds to the first contentful paint, to the list of
chains, and to another chain opened by its link (medians over visits).
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from playwright.sync_api import Browser, sync_playwright

from cotfaith_mech.records import RunDirectory
from cotfaith_mech.report import build_report
from tests.fake_run import write_fake_run


def visit(browser: Browser, page_file: Path, chain: str) -> dict[str, float]:
    """Milliseconds of one visit, in a fresh context."""
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    page = context.new_page()
    page.goto(page_file.as_uri())
    page.wait_for_selector("#chain-list tr")
    listed = page.evaluate("performance.now()")
    paint = page.evaluate("performance.getEntriesByName('first-contentful-paint')[0].startTime")
    start = page.evaluate("performance.now()")
    page.evaluate("chain => { location.hash = `#chain=${chain}`; }", chain)
    page.wait_for_selector(f"#chain-list tr[aria-current] a[href*='{chain}'], #chain-name:has-text('{chain}')")
    opened = page.evaluate("performance.now()") - start
    context.close()
    return {"first_contentful_paint_ms": paint, "list_ms": listed, "chain_ms": opened}


def measured(browser: Browser, run: RunDirectory, visits: int) -> dict[str, Any]:
    start = time.perf_counter()
    page_file = build_report(run)
    built = time.perf_counter() - start
    chain = run.read_chains()[7]["chain_id"]
    rows = [visit(browser, page_file.resolve(), chain) for _ in range(visits)]
    medians = {key: round(statistics.median(row[key] for row in rows), 1) for key in rows[0]}
    return {"build_s": round(built, 1), "page_mib": round(page_file.stat().st_size / 2**20, 2), **medians}


def main(
    out: Annotated[Path, typer.Option(help="JSON file.")],
    chains: Annotated[list[int] | None, typer.Option(help="Numbers of chains; repeatable. Default 50, 500.")] = None,
    visits: Annotated[int, typer.Option(help="Visits each; the median counts.")] = 5,
) -> None:
    """Measure and write the JSON."""
    rows = []
    with sync_playwright() as playwright, tempfile.TemporaryDirectory() as folder:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        for n in chains or [50, 500]:
            run = write_fake_run(Path(folder) / str(n), n_problems=n)
            rows.append({"chains": n, **measured(browser, run, visits)})
            print(rows[-1], flush=True)
        version = browser.version
        browser.close()
    machine = {"cpu": platform.processor() or platform.machine(), "cores": os.cpu_count(), "chromium": version}
    out.write_text(json.dumps({"machine": machine, "visits": visits, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)

"""The page in a real browser: it shows the figures, asks for a key, and logs no error."""

from __future__ import annotations

import shutil
import subprocess
from typing import TYPE_CHECKING

import pytest

from tests.gateway.gateways import SYSTEM, Gateway, gateway, system, upstream, user
from tests.gateway.test_tenants import TENANTS

if TYPE_CHECKING:
    from pathlib import Path

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser")


def shown(served: Gateway, folder: Path, size: str) -> tuple[str, str]:
    """Return the page after its scripts ran, and the messages of the console."""
    if BROWSER is None:
        pytest.skip("needs Debian's chromium")
    done = subprocess.run(  # noqa: S603 (the browser that is installed)
        [BROWSER, "--headless=new", "--no-sandbox", "--disable-gpu",
         "--enable-logging=stderr", f"--user-data-dir={folder}", f"--window-size={size}",
         "--virtual-time-budget=3000", "--dump-dom",
         f"{served.url}/"],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    return done.stdout, "\n".join(x for x in done.stderr.splitlines() if "CONSOLE" in x)


def test_the_page_shows_figures_and_no_text(tmp_path: Path) -> None:
    with upstream(tmp_path / "slots") as server, gateway(tmp_path / "own", server) as served:
        for number in range(3):
            served.chat([system(), user(f"xylophone {number}")])
        page, console = shown(served, tmp_path / "browser", "390,900")
        assert console == ""
        assert ">live<" in page
        assert "<td>/v1/chat/completions</td>" in page
        assert "<td>never stored</td>" in page
        assert "xylophone" not in page
        assert SYSTEM[:20] not in page


def test_the_page_asks_for_a_key_and_shows_nothing_without(tmp_path: Path) -> None:
    with (
        upstream(tmp_path / "slots") as server,
        gateway(tmp_path / "own", server, tenants=TENANTS) as served,
    ):
        page, _ = shown(served, tmp_path / "browser", "1000,900")
        assert ">no access<" in page
        assert server.url not in page

"""Every Python block of the README and docs runs, and prints what the text block after it says."""

import contextlib
import io
import json
import os
import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest

from bench.report import speed_tables
from masked_kernels import backends

ROOT = Path(__file__).parent.parent
PAGES = sorted(
    [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")], key=lambda p: str(p.relative_to(ROOT))
)
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(page: Path) -> list[tuple[str, str]]:
    """Language and text of every fenced block."""
    return FENCE.findall(page.read_text())


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_code_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of one page share their names, as a reader who types them in would have it."""
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {}
    for (language, code), (next_language, text) in pairwise([*blocks(page), ("", "")]):
        if language != "python":
            continue
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(code, str(page), "exec"), namespace)
        if next_language == "text":
            assert printed.getvalue() == text


def test_pages_are_found() -> None:
    names = {page.name for page in PAGES}
    assert {"README.md", "math.md", "format.md", "backends.md", "architecture.md"} <= names
    assert sum(language == "python" for page in PAGES for language, _ in blocks(page)) >= 4


def test_links_lead_somewhere() -> None:
    broken = [
        f"{page.name}: {target}"
        for page in PAGES
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text())
        if not (page.parent / target).exists()
    ]
    assert broken == []


def between(marker: str) -> str:
    """What the README says between <!-- marker --> and <!-- /marker -->."""
    text = (ROOT / "README.md").read_text()
    return text.split(f"<!-- {marker} -->\n")[1].split(f"<!-- /{marker} -->")[0].strip()


def test_support_table_is_what_the_backends_say() -> None:
    """Asked in a process whose Triton interprets, so that its column is there without a GPU."""
    if backends()["cpu"] is not None:
        pytest.skip(f"the table lists backend 'cpu', which is unavailable: {backends()['cpu']}")
    pytest.importorskip("triton", reason="the table lists backend 'triton'")
    asked = subprocess.run(
        [sys.executable, "-m", "masked_kernels", "info", "--ops"],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert between("support") == asked.stdout.strip()


def test_speed_table_is_the_committed_run() -> None:
    result = json.loads((ROOT / "bench" / "results" / "cpu_avx512.json").read_text())
    assert between("speed") == speed_tables(result)


def test_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 200

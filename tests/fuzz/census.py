"""Fill the table of docs/security.md from the summaries in docs/security/: ``python tests/fuzz/census.py``.

``python tests/fuzz/census.py out/fuzz/load-0.json …`` first copies summaries of finished runs there.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

DOCS = Path(__file__).resolve().parents[2] / "docs"
START, END = "<!-- counts -->\n", "<!-- end of counts -->\n"
COLUMNS = ("what", "cases", "equal", "refused", "no reference", "failures", "slowest, s", "most memory, MB")


def row(found: dict[str, Any]) -> str:
    """One line of the table."""
    verdicts = found["verdicts"]
    cells = [f"{found['stage']}, seed {found['seed']}", found["cases"]]
    cells += [verdicts.get(name, 0) for name in ("equal", "refused", "no reference")]
    cells += [found["failures"], f"{found['slowest_s']:.1f}", found["largest_mb"]]
    return line(cells)


def line(cells: Any) -> str:
    return f"| {' | '.join(str(cell) for cell in cells)} |\n"


def table(summaries: list[dict[str, Any]]) -> str:
    return line(COLUMNS) + line("---" if i == 0 else "--:" for i in range(len(COLUMNS))) + "".join(map(row, summaries))


def main(finished: list[str]) -> None:
    folder = DOCS / "security"
    folder.mkdir(exist_ok=True)
    for path in finished:
        shutil.copy(path, folder)
    summaries = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    page = DOCS / "security.md"
    before, rest = page.read_text().split(START)
    _, after = rest.split(END)
    page.write_text(before + START + table(summaries) + END + after)


if __name__ == "__main__":
    main(sys.argv[1:])

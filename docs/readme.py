"""README.md from nbs/index.ipynb: prose as it is, code with the output that it printed."""
from pathlib import Path

import nbformat

ROOT = Path(__file__).parents[1]


def text_of(output) -> str:
    "What a code cell printed or returned, as text."
    if output.output_type == "stream":
        return output.text if output.name == "stdout" else ""
    return output.get("data", {}).get("text/plain", "") + "\n"


def readme() -> str:
    parts = []
    for cell in nbformat.read(ROOT / "nbs" / "index.ipynb", 4).cells:
        if cell.cell_type == "markdown":
            parts.append(cell.source.replace("](../", "]("))  # links of the notebook, seen from the top level
        elif cell.cell_type == "code" and not cell.source.startswith("#| hide"):
            parts.append(f"```python\n{cell.source}\n```")
            printed = "".join(map(text_of, cell.outputs)).rstrip()
            if printed:
                parts.append(f"```text\n{printed}\n```")
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    (ROOT / "README.md").write_text(readme(), encoding="utf-8")

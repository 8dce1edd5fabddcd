"""What importing tensorway costs, against importing what it stands on, in the same minute.

    python tests/bench/import_cost.py [--short]

CPU seconds of a fresh interpreter, the minimum of many: the machine is shared, and CPU time drifts less than wall time.
"""

from __future__ import annotations

import subprocess
import sys

CASES = {
    "import pluggy": "import pluggy",
    "import attrs": "import attrs",
    "import tensorway": "import tensorway",
    "import tensorway.plugins (the host)": "import tensorway.plugins",
    "the host, and one scan": "import tensorway.plugins; tensorway.plugins.host()",
    "tensorway plugins list": (
        "import sys; sys.stdout = open('/dev/null', 'w')\nfrom tensorway.cli import main; main(['plugins', 'list'])"
    ),
}


def seconds(code: str, runs: int) -> float:
    """The cheapest of `runs` fresh interpreters."""
    timed = (
        f"import time; started = time.process_time()\n{code}\n"
        "import sys; print(time.process_time() - started, file=sys.__stdout__)"
    )
    return min(
        float(subprocess.run([sys.executable, "-c", timed], capture_output=True, text=True, check=True).stdout)
        for _ in range(runs)
    )


def main() -> None:
    """Print a row per case, as a ratio to `import pluggy`."""
    runs = 5 if "--short" in sys.argv else 25
    base = seconds(CASES["import pluggy"], runs)
    for name, code in CASES.items():
        cost = seconds(code, runs)
        print(f"{name:<38} {cost / base:6.2f} x import pluggy   ({cost * 1e3:.1f} ms of CPU)")


if __name__ == "__main__":
    main()

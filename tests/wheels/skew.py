"""Wheels of other versions: those of a release, taken apart and put together as if they were of another one.

For `test_skew`, which has no other release to look at, and for the session `skew`, which has: run as a script it asks
the `tensorway` of an environment what it makes of every plugin there, and prints one line for each.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import zipfile
from pathlib import Path


def another(wheel, folder, version, api=None, oldest_api=None):
    """The same wheel as of another version, and of another plugin API; returns its path."""
    name, old = wheel.name.split("-")[:2]
    major, minor = version.split(".")[:2]
    made = folder / wheel.name.replace(f"{name}-{old}-", f"{name}-{version}-")
    with zipfile.ZipFile(wheel) as source, zipfile.ZipFile(made, "w") as target:
        for entry in source.namelist():
            data = source.read(entry)
            at = entry.replace(f"{name}-{old}.dist-info/", f"{name}-{version}.dist-info/")
            if at.endswith(("METADATA", "entry_points.txt", "__init__.py", "hookspecs.py", "RECORD")):
                text = data.decode("utf-8")
                text = re.sub(r"(?m)^Version: .+$", f"Version: {version}", text)
                text = re.sub(
                    r"(?m)^(Requires-Dist: tensorway)<[^\n;]+", rf"\1<{major}.{int(minor) + 1},>={version}", text
                )
                text = re.sub(r"(?m)^(Requires-Dist: tensorway-\w+(?:\[\w+\])?==)[\w.]+", rf"\g<1>{version}", text)
                text = re.sub(r'(?m)^__version__ = ".+"$', f'__version__ = "{version}"', text)
                text = text.replace(f"{name}-{old}.dist-info/", f"{name}-{version}.dist-info/")
                if at.endswith("RECORD"):  # without digests, which are of what it was
                    text = re.sub(r"(?m),sha256=[^,]+,\d+$", ",,", text)
                if api is not None:
                    text = re.sub(r"(?m)(?<=\[tensorway\.api\]\n)\d+(?= =)", str(api), text)
                    text = re.sub(r"(?m)^(API: Final = )\d+", rf"\g<1>{api}", text)
                    text = re.sub(r"(?m)^(OLDEST_API: Final = )\d+", rf"\g<1>{oldest_api or api}", text)
                data = text.encode("utf-8")
            target.writestr(at, data)
    return made


def ask(python):
    """What a core makes of the plugins beside it: for each what `tensorway doctor` says of it."""
    command = [str(python), "-m", "tensorway", "doctor", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.stdout.startswith("{"), done.stderr
    return {(row["kind"], row["name"]): row for row in json.loads(done.stdout)["plugins"]}


def main():
    """One line for each backend; the exit code is 1 if one is broken, which is more than unusable on this machine."""
    rows = ask(Path(sys.executable)).values()
    for row in rows:
        print(f"{row['kind']:18} {row['name']:13} {row['dist']} {row['version']}: {row['state']}. {row['reason']}")
    return 1 if any(row["code"] not in ("", "unusable") for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())

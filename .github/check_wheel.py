"""Refuse a wheel that lacks a file of the package, has others, or is not of the tag's version.

python .github/check_wheel.py dist/axolotl_amopo-0.1.0-py3-none-any.whl v0.1.0
"""

import subprocess
import sys
import zipfile
from email import message_from_bytes

PACKAGE, CONFIGS = "axolotl_amopo/", "example_configs/"


def expected() -> set[str]:
    """Return the wheel's names of all files that git has of the package and the example configs."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", PACKAGE, CONFIGS], capture_output=True, text=True, check=True
    )
    names = filter(None, listed.stdout.split("\0"))
    return {name if name.startswith(PACKAGE) else PACKAGE + name for name in names}


def problems(wheel: str, tag: str) -> list[str]:
    """Return what is wrong with a wheel."""
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if not name.endswith("/")}
        (metadata,) = (name for name in names if name.endswith(".dist-info/METADATA"))
        version = message_from_bytes(archive.read(metadata))["Version"]
    files = {name for name in names if ".dist-info/" not in name}
    found = [f"{name} is missing" for name in sorted(expected() - files)]
    found += [f"{name} is not in git" for name in sorted(files - expected())]
    if tag != f"v{version}":
        found.append(f"the tag is {tag}, and the version {version}")
    return found


if __name__ == "__main__":
    sys.exit("\n".join(problems(*sys.argv[1:])) or 0)

"""Prints the twenty slowest tests of pytest's JUnit reports, set-up and tear-down included."""

from __future__ import annotations

import sys
from xml.etree import ElementTree

NUMBER = 20


def main(paths: list[str]) -> None:
    """Of the reports in ``paths``."""
    found = []
    for path in paths:
        for case in ElementTree.parse(path).iter("testcase"):
            found.append((float(case.get("time", "0")), f"{case.get('classname')}::{case.get('name')}"))
    for seconds, name in sorted(found, reverse=True)[:NUMBER]:
        print(f"{seconds:7.1f} s  {name}")


main(sys.argv[1:])

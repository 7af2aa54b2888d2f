"""Adds up pytest's results: `python .ci/verdict.py RESULTS.xml...`; fails on a test that was skipped for want of a package."""

from __future__ import annotations

import re
import sys
import xml.etree.ElementTree as ElementTree
from collections import Counter
from pathlib import Path

MAY_BE_SKIPPED = re.compile(r"no CUDA|needs a GPU|a kernel without")  # what no package brings


def outcome(case: ElementTree.Element) -> str:
    """passed, failed or skipped."""
    if case.find("failure") is not None or case.find("error") is not None:
        return "failed"
    return "skipped" if case.find("skipped") is not None else "passed"


def wrongly_skipped(case: ElementTree.Element) -> str | None:
    """The test and the reason, if that reason is no excuse."""
    skipped = case.find("skipped")
    if skipped is None or skipped.get("type") == "pytest.xfail":
        return None
    reason = skipped.get("message", "")
    if MAY_BE_SKIPPED.search(reason):
        return None
    return f"{case.get('classname')}::{case.get('name')}: {reason}"


def main(paths: list[str]) -> int:
    """Print the sums, and every skipped test that must run."""
    cases = [case for path in paths for case in ElementTree.parse(Path(path)).iter("testcase")]  # noqa: S314
    wrong = [line for line in map(wrongly_skipped, cases) if line]
    sys.stdout.writelines(f"must not be skipped: {line}\n" for line in wrong)
    count = Counter(map(outcome, cases))
    sys.stdout.write(f"{count['passed']} passed, {count['failed']} failed, {count['skipped']} skipped\n")
    return 1 if wrong or count["failed"] or not count["passed"] else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

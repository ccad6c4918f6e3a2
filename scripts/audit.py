"""Checks the installed packages for known vulnerabilities with pip-audit.

If the advisory service is unreachable, it says so and does not fail. pip-audit alone would report success if the
service knew none of the packages, as is the case for a mirror that only has files.
"""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any, NamedTuple

ACCEPTED: dict[str, str] = {}
"""Advisories that do not affect this project, each with the reason."""

_SHOWN = 10
"""Most packages that a message names."""


class Verdict(NamedTuple):
    """Whether the audit failed, and the lines to print."""

    failed: bool
    lines: list[str]


def verdict(output: str, trouble: str, accepted: dict[str, str]) -> Verdict:
    """Interpret pip-audit's answer.

    Args:
        output: its JSON, or nothing if it ended in an error.
        trouble: its standard error output.
        accepted: reasons for accepting an advisory, by its id.
    """
    try:
        packages: list[dict[str, Any]] = json.loads(output)["dependencies"]
    except (ValueError, KeyError):
        last = trouble.strip().splitlines()[-1:] or ["no output"]
        return Verdict(False, [f"NOT AUDITED: the advisory service is unreachable: {last[0][:300]}"])
    looked_up = [package for package in packages if "vulns" in package]
    unknown = [package["name"] for package in packages if "not found" in package.get("skip_reason", "")]
    if not looked_up:
        return Verdict(False, [f"NOT AUDITED: the advisory service knows none of the {len(unknown)} packages"])
    lines = [f"audited {len(looked_up)} packages"]
    if unknown:
        more = f" and {len(unknown) - _SHOWN} more" if len(unknown) > _SHOWN else ""
        lines.append(f"not audited, unknown to the advisory service: {', '.join(unknown[:_SHOWN])}{more}")
    failed = False
    for package in looked_up:
        for found in package["vulns"]:
            what = f"{package['name']} {package['version']}: {found['id']}"
            if found["id"] in accepted:
                lines.append(f"{what}, accepted: {accepted[found['id']]}")
                continue
            failed = True
            fixed = ", ".join(found["fix_versions"]) or "no version yet"
            lines.append(
                f"{what}, fixed in {fixed}; update it, or add it with a reason to ACCEPTED of scripts/audit.py"
            )
    return Verdict(failed, lines)


def main() -> None:
    """Audit this environment."""
    command = [sys.executable, "-m", "pip_audit", "--skip-editable", "--format=json", "--progress-spinner=off"]
    run = subprocess.run([*command, "--timeout=10"], capture_output=True, text=True, check=False)
    failed, lines = verdict(run.stdout, run.stderr, ACCEPTED)
    print(*lines, sep="\n", file=sys.stderr if failed else sys.stdout)
    sys.exit(failed)


if __name__ == "__main__":
    main()

#!/bin/sh
# Usage: python-problem.sh PYTHON
# Prints the one line that says why PYTHON cannot make a virtual environment and what would mend it,
# or nothing if it can.  The requirements are pyproject.toml's requires-python and PEP 668's: where
# pip is managed by the distribution, packages go into a virtual environment only.

python=$1

if ! command -v "$python" >/dev/null 2>&1; then
    echo "$python not found: install Python 3.11 or newer (apt install python3 python3-venv), or set PYTHON"
    exit
fi

"$python" - "$python" <<'END' 2>/dev/null || echo "$python does not run: set PYTHON to a Python 3.11 or newer"
import sys

name = sys.argv[1]
version = "%d.%d" % sys.version_info[:2]
if sys.version_info < (3, 11):
    print("%s is Python %s: guestfault needs 3.11 or newer; set PYTHON to one" % (name, version))
else:
    try:
        import venv
        from ensurepip import bootstrap
    except ImportError:
        # Debian and its kin ship both modules, or ensurepip alone, in a package of their own.
        print("%s cannot make a virtual environment: apt install python%s-venv" % (name, version))
END

"""`uv pip install` into this environment, with this machine's pip settings: uv reads none of them by itself.

Usage: .venv/bin/python tools/install.py ARGUMENTS OF uv pip install
"""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

# pip's setting -> uv's environment variable; one that is already set stays.
SETTINGS = {
    "index-url": "UV_DEFAULT_INDEX",
    "extra-index-url": "UV_INDEX",
    "find-links": "UV_FIND_LINKS",
    "no-index": "UV_NO_INDEX",
    "trusted-host": "UV_INSECURE_HOST",
    "default-timeout": "UV_HTTP_TIMEOUT",
    "timeout": "UV_HTTP_TIMEOUT",
    "cert": "SSL_CERT_FILE",
    "proxy": "ALL_PROXY",
}


def pip_settings() -> dict[str, str]:
    """What `pip config list` says, by setting; what comes later (environment over files) wins, as in pip."""
    command = [sys.executable, "-m", "pip", "config", "list"]
    listing = subprocess.run(command, check=True, capture_output=True, text=True)
    settings = {}
    for line in listing.stdout.splitlines():
        name, _, value = line.partition("=")
        section, _, setting = name.rpartition(".")
        if section in ("global", "install", ":env:") and setting in SETTINGS:
            separator = "," if setting == "find-links" else " "
            settings[setting] = separator.join(str(ast.literal_eval(value)).split())
    return settings


def uv_environment() -> dict[str, str]:
    """The environment of uv: that of this process, with pip's settings under the names that uv reads."""
    settings = pip_settings()
    environment = {SETTINGS[setting]: value for setting, value in settings.items()}
    if "extra-index-url" in settings:
        # pip takes the best version of all indexes; uv would stop at the first that knows the name.
        environment["UV_INDEX_STRATEGY"] = "unsafe-best-match"
    return environment | os.environ


def main() -> int:
    uv = Path(sys.executable).with_name("uv")
    command = [str(uv), "pip", "install", "--python", sys.executable, *sys.argv[1:]]
    return subprocess.run(command, env=uv_environment(), check=False).returncode


if __name__ == "__main__":
    sys.exit(main())

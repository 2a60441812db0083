"""The Rust core. Checked against the built module by stubtest."""

from typing import Final

VERSION: Final[str]

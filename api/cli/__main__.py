"""``python -m sapin.api.cli`` is ``sapin``."""

from __future__ import annotations

from sapin.api.cli import main

main()

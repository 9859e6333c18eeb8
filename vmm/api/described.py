# SPDX-License-Identifier: Apache-2.0
"""The API's OpenAPI document as text, in memory: a jail has no files, and a filter lets nothing more be imported.

``python -m tools.openapi >vmm/api/openapi.json`` makes it; ``tests/api/test_schema.py`` compares the two.
"""

from __future__ import annotations

import os

with open(os.path.join(os.path.dirname(__file__), "openapi.json"), "rb") as _file:
    TEXT = _file.read()

# SPDX-License-Identifier: Apache-2.0
"""What is written by ``python -m tools.declared`` is what the declarations say now."""

from __future__ import annotations

import pytest

from tools import declared
from vmm.config.devices import DEVICES
from vmm.config.option import Config


@pytest.mark.parametrize("path", declared.FILES)
def test_the_file_is_as_the_declarations_say(path: str) -> None:
    assert (declared.ROOT / path).read_text() == declared.FILES[path](), "run python -m tools.declared"


GUIDES = {"disk": "disks", "net": "network", "share": "share", "vsock": "vsock"}


@pytest.mark.parametrize("config", [each for each in DEVICES if each.TITLE in GUIDES], ids=lambda each: each.TITLE)
def test_the_guide_of_a_device_has_each_of_its_words(config: type[Config]) -> None:
    text = (declared.ROOT / f"docs/{GUIDES[config.TITLE]}.md").read_text()
    missing = [word for word in config.words() if word != "PATH" and word not in text]
    assert not missing

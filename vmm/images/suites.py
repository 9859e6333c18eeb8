# SPDX-License-Identifier: Apache-2.0
"""An apt of another Debian suite than this host's, by sources and lists of its own; the host's stay as they are."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vmm.images.host import FetchError, Progress, PullError, run, tried

KEYRING = "/usr/share/keyrings/debian-archive-keyring.gpg"
_FIELDS = "$(REPO_URI) $(CODENAME) $(COMPONENT)"


def sources() -> list[list[str]]:
    """URI, codename and component of each Debian source that this host uses; perhaps a mirror nearby.

    :raises PullError: apt is not there
    """
    argv = ["apt-get", "indextargets", "--format", _FIELDS, "Created-By: Packages", "Origin: Debian"]
    found = (line.split() for line in run(argv).splitlines())
    return [list(line) for line in dict.fromkeys(tuple(words) for words in found if len(words) == 3)]


def own() -> str | None:
    """The codename of this host's Debian, as its sources have it; None: it has none."""
    codenames = [codename for _, codename, _ in sources() if "-" not in codename]
    return codenames[0] if codenames else None


@contextmanager
def apt_of(suite: str, progress: Progress) -> Iterator[dict[str, str]]:
    """The environment in which apt knows that suite and nothing else, as long as the context lasts.

    A suite as ``bookworm-backports`` comes before ``bookworm``, which is there, too.

    :raises PullError: this host has no apt, no Debian source, or no such suite
    """
    mirrors = [uri for uri, codename, _ in sources() if "-" not in codename]
    if not mirrors:
        raise PullError("no apt source of this host is Debian's main archive: add one and run `apt-get update`")
    signed = f" [signed-by={KEYRING}]" if os.path.exists(KEYRING) else ""
    with tempfile.TemporaryDirectory(
        prefix="pyvmm-apt-", dir="/var/tmp" if os.path.isdir("/var/tmp") else None
    ) as name:
        place = Path(name)
        place.chmod(0o755)  # as root apt fetches as its user _apt
        for directory in ("lists/partial", "cache/archives/partial"):
            (place / directory).mkdir(parents=True)
        names = dict.fromkeys((suite, suite.removesuffix("-backports")))
        (place / "sources.list").write_text("".join(f"deb{signed} {mirrors[0]} {name} main\n" for name in names))
        # The host's settings, and after them that apt keeps what it has read: a container's keeps nothing, and reads
        # the lists anew for each question, in a second and a half.
        (place / "parts").mkdir()
        own_parts = run(["apt-config", "shell", "parts", "Dir::Etc::parts/d"]).partition("'")[2].rpartition("'")[0]
        (place / "parts/pyvmm").write_text(
            (f'#include "{own_parts}";\n' if os.path.isdir(own_parts) else "")
            + 'Dir::Cache::pkgcache "pkgcache.bin"; Dir::Cache::srcpkgcache "srcpkgcache.bin";\n'
        )
        before = os.environ.get("APT_CONFIG")
        (place / "apt.conf").write_text(
            (f'#include "{before}";\n' if before else "")
            + f"""Dir::State::lists "{place}/lists"; Dir::Cache "{place}/cache";
            Dir::Etc::sourcelist "{place}/sources.list"; Dir::Etc::sourceparts "-"; Dir::Etc::parts "{place}/parts";
            APT::Default-Release "{suite}"; Acquire::Languages "none";
            Acquire::IndexTargets::deb::DEP-11::DefaultEnabled "false"; Acquire::Retries "2";
            """
        )
        env = {"APT_CONFIG": str(place / "apt.conf")}
        progress(f"package lists of Debian {suite}", None)
        tried(lambda: _update(suite, env))
        yield env


def _update(suite: str, env: dict[str, str]) -> None:
    try:
        run(["apt-get", "update", "--quiet=2", "--error-on=any"], env=env)
    except PullError as error:
        raise FetchError(f"cannot get the package lists of Debian {suite}: {error}") from None

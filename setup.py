# SPDX-License-Identifier: Apache-2.0
"""Builds the Cython extensions, the program `pyvmm` (vmm/launcher.c) and what runs in guests without a C library:
the agent of sandboxes (vmm/sandbox/agent) and programs of images (vmm/images/*.c). Installs the manual page that
tools/man_page.py writes.

The rest of the package is in pyproject.toml.

``PYVMM_DEBUG=1`` builds with line tracing and annotated HTML (``make debug``), ``PYVMM_SANITIZER=address`` or
``thread`` with that sanitizer (``make asan``, ``make tsan``), ``coverage`` with gcov's counters (``make coverage``),
``PYVMM_NO_EXTENSIONS=1`` no extension (``make install`` builds them afterwards, in the checkout).
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile

from Cython.Build import cythonize
from setuptools import Distribution, Extension, setup
from setuptools.command.build_ext import build_ext

# isort: split
# setuptools' own, which stand under this name once setuptools is imported.
from distutils.ccompiler import new_compiler
from distutils.command.build_scripts import build_scripts
from distutils.command.install_data import install_data
from distutils.errors import LinkError
from distutils.sysconfig import customize_compiler

# Cython's processes. CPython 3.14 would run this file once more in each.
multiprocessing.set_start_method("fork", force=True)
DEBUG = bool(os.environ.get("PYVMM_DEBUG"))
NO_EXTENSIONS = bool(os.environ.get("PYVMM_NO_EXTENSIONS"))
SANITIZER = os.environ.get("PYVMM_SANITIZER", "")
SANITIZED = [f"-fsanitize={SANITIZER}", "-fno-omit-frame-pointer", "-O1", "-g1"] if SANITIZER else []
if SANITIZER == "coverage":
    # Threads count without the GIL.
    SANITIZED = ["--coverage", "-O0", "-fprofile-update=atomic", "-includetools/gcov_exit.h", "-Wl,--wrap=__gcov_exit"]
if SANITIZER == "thread":
    SANITIZED.append("-Wno-tsan")  # it does not see fences: what they order is not seen as ordered
LAUNCHER = "vmm/launcher.c"
START_IMAGE = "vmm/start_image.c"  # the other half of that program
MANUAL = "build/man/pyvmm.1"
# What a distribution's own packages are built with: checks of stacks and buffers, branch targets, no writable GOT.
HARD = ["-fstack-protector-strong", "-U_FORTIFY_SOURCE", "-D_FORTIFY_SOURCE=2", "-fcf-protection"]
RELRO = ["-Wl,-z,relro,-z,now"]
AGENT = [f"vmm/sandbox/agent/{name}.c" for name in "boot exec files frames json libc main ports tree users".split()]
BARE_PROGRAMS = {
    "vmm/sandbox/agent.elf": AGENT,
    **{f"vmm/images/{name}.elf": [f"vmm/images/{name}.c", "vmm/sandbox/agent/libc.c"] for name in ("enter", "exit")},
}
# No function of the compiler's or the C library's, and nothing that needs one at the start.
BARE = [
    "-Os", "-g0", "-Wall", "-Wextra", "-ffreestanding", "-fno-builtin", "-fno-stack-protector", "-U_FORTIFY_SOURCE",
    "-fcf-protection=none", "-fno-pie", "-fno-asynchronous-unwind-tables", "-fno-tree-loop-distribute-patterns",
]  # fmt: skip
FILTERS = "vmm/jail/_seccomp_filters.h"
DEPENDS = {"vmm.jail._seccomp": [FILTERS], "vmm._start_image": ["vmm/start_image.h"]}
ROOMS = ("vmm", "devices", "virtio")
FILES = {f"{place}/{file}" for room in ROOMS for place, _, files in os.walk(room) for file in files}
MODULES = sorted(name[:-4].replace("/", ".") for name in FILES if name.endswith(".pyx"))
# A tree that lost its sources would make a wheel that cannot be imported. An extension for Python code has a stub.
LOST = sorted(name[:-1] + "x" for name in FILES if name.endswith(".pyi") and not {name[:-1] + "x", name[:-1]} & FILES)
if not MODULES or LOST:
    sys.exit(f"setup.py: no source of {', '.join(LOST) or 'any extension'}: this tree is not whole")


def write_filters() -> None:
    """The system call filters, for ``vmm/jail/_seccomp.pyx``; the same ones are not written again."""
    try:
        text = runpy.run_path("vmm/jail/rules.py")["header"]()
    except OSError as error:
        sys.exit(f"setup.py: the system call filters need libseccomp (Debian: libseccomp2): {error}")
    if not os.path.exists(FILTERS) or open(FILTERS).read() != text:
        with open(FILTERS, "w") as file:
            file.write(text)


class BuildLauncher(build_scripts):
    """Compiles the one script there is. Statically where the C library allows it: it starts in half the time."""

    distribution: Distribution

    def run(self) -> None:
        compiler = new_compiler()
        customize_compiler(compiler)
        name, version = self.distribution.get_name(), self.distribution.get_version()
        macros = {
            # The program's name and the library's folder; "t": free-threaded.
            "PYTHON": "python{}.{}".format(*sys.version_info) + "t" * ("t" in sys.abiflags),
            "VERSION": version,
            "EDITABLE": f"__editable__.{name.replace('-', '_')}-{version}.pth",
        }
        with tempfile.TemporaryDirectory() as directory:  # nothing but the program may be in build_dir
            objects = compiler.compile(
                [LAUNCHER, START_IMAGE],
                output_dir=directory,
                macros=[(macro, f'"{text}"') for macro, text in macros.items()],
                extra_preargs=["-O2", "-Wall", "-fPIE", *HARD],
            )
            # Anywhere but where interpreters are, which a start image puts back into their places.
            link = ["-s", "-pie", *RELRO]
            static = ["-s", "-static-pie", *RELRO]
            try:
                compiler.link_executable(objects, "pyvmm", output_dir=self.build_dir, extra_preargs=static)
            except LinkError:
                compiler.link_executable(objects, "pyvmm", output_dir=self.build_dir, extra_preargs=link)


class InstallManual(install_data):
    """Makes the manual page of what --help says, by what was built, and installs it."""

    def run(self) -> None:
        path = f"{self.get_finalized_command('build').build_lib}:."
        subprocess.run(
            [sys.executable, "tools/man_page.py", MANUAL], check=True, env={**os.environ, "PYTHONPATH": path}
        )
        super().run()


class BuildBare(build_ext):  # type: ignore[misc]
    """Compiles the system call filters, the extensions, and the programs of guests, without a C library."""

    def run(self) -> None:
        write_filters()
        processors = len(os.sched_getaffinity(0))
        self.parallel: int | None = self.parallel or processors
        # Here, and not where `setup` is called: an sdist and a wheel's metadata need no C.
        made = cythonize(
            [Extension(extension.name, extension.sources) for extension in self.extensions],
            compiler_directives={
                "language_level": 3,
                "boundscheck": DEBUG,
                "wraparound": False,
                "cdivision": True,
                "embedsignature": True,
                "linetrace": DEBUG,
            },
            annotate=DEBUG,
            force=bool(self.force),
            nthreads=processors,
            quiet=True,
        )
        for extension, cythonized in zip(self.extensions, made, strict=True):
            extension.sources = cythonized.sources
        super().run()
        compiler = new_compiler()
        customize_compiler(compiler)
        options = ["-static", "-no-pie", "-nostdlib", "-s", "-Wl,-z,noexecstack"]
        for program, sources in BARE_PROGRAMS.items():
            place, name = os.path.split(os.path.join("." if self.inplace else self.build_lib, program))
            os.makedirs(place, exist_ok=True)
            with tempfile.TemporaryDirectory() as directory:
                objects = compiler.compile(
                    sources, output_dir=directory, macros=[("_GNU_SOURCE", None)], extra_preargs=BARE
                )
                compiler.link_executable(objects, name, output_dir=place, extra_postargs=options)


setup(
    scripts=[LAUNCHER],
    data_files=[] if NO_EXTENSIONS else [("share/man/man1", [MANUAL])],
    cmdclass={"build_scripts": BuildLauncher, "build_ext": BuildBare, "install_data": InstallManual},
    ext_modules=[]
    if NO_EXTENSIONS
    else [
        Extension(
            name,
            [name.replace(".", "/") + ".pyx"],
            extra_compile_args=["-O2", "-g", "-Wall", "-Wno-unused-function", *(SANITIZED or HARD)],
            extra_link_args=SANITIZED or RELRO,
            depends=DEPENDS.get(name, []),
            define_macros=[("CYTHON_TRACE_NOGIL", "1")] if DEBUG else [],
        )
        for name in MODULES
    ],
)

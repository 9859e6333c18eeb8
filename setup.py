# SPDX-License-Identifier: Apache-2.0
"""Builds the Cython extensions; everything else about the package is in pyproject.toml.

``PYVMM_DEBUG=1`` builds with line tracing and annotated HTML (``make debug``), ``PYVMM_ASAN=1`` with AddressSanitizer
(``make asan``), ``PYVMM_NO_EXTENSIONS=1`` nothing (``make install``, which builds them afterwards, in the checkout).
"""

from __future__ import annotations

import os

from Cython.Build import cythonize
from setuptools import Extension, setup

DEBUG = bool(os.environ.get("PYVMM_DEBUG"))
ASAN = ["-fsanitize=address", "-fno-omit-frame-pointer"] if os.environ.get("PYVMM_ASAN") else []
LIBRARIES = {"vmm._seccomp": ["seccomp"]}
ROOMS = ("vmm", "devices", "virtio")
MODULES = sorted(f"{room}.{file[:-4]}" for room in ROOMS for file in os.listdir(room) if file.endswith(".pyx"))

setup(
    ext_modules=[]
    if os.environ.get("PYVMM_NO_EXTENSIONS")
    else cythonize(
        [
            Extension(
                name,
                [name.replace(".", "/") + ".pyx"],
                extra_compile_args=["-O2", "-g", "-Wall", "-Wno-unused-function", *ASAN],
                extra_link_args=ASAN,
                libraries=LIBRARIES.get(name, []),
                define_macros=[("CYTHON_TRACE_NOGIL", "1")] if DEBUG else [],
            )
            for name in MODULES
        ],
        compiler_directives={
            "language_level": 3,
            "boundscheck": DEBUG,
            "wraparound": False,
            "cdivision": True,
            "embedsignature": True,
            "linetrace": DEBUG,
        },
        annotate=DEBUG,
        nthreads=2,
        quiet=True,
    ),
)

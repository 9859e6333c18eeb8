# SPDX-License-Identifier: Apache-2.0
"""Builds the Cython extensions; everything else about the package is in pyproject.toml.

``PYVMM_DEBUG=1`` builds with line tracing and annotated HTML (``make debug``).
"""

from __future__ import annotations

import os

from Cython.Build import cythonize
from setuptools import Extension, setup

DEBUG = bool(os.environ.get("PYVMM_DEBUG"))
MODULES = ["vmm._fastpath", "vmm._bus", "vmm._vcpu", "devices._serial", "virtio._mmio", "virtio._worker", "virtio._limiter"]

setup(
    ext_modules=cythonize(
        [
            Extension(
                name,
                [name.replace(".", "/") + ".pyx"],
                extra_compile_args=["-O2", "-g", "-Wall", "-Wno-unused-function"],
                define_macros=[("CYTHON_TRACE_NOGIL", "1")] if DEBUG else [],
            )
            for name in MODULES
            if os.path.exists(name.replace(".", "/") + ".pyx")
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
    ),
)

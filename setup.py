"""The one part that is compiled: optional, so that the install succeeds without a C compiler."""

from __future__ import annotations

import os
import sysconfig

from setuptools import Extension, setup

# One build for every Python from 3.10 on. Those built without a GIL have no limited API: there the
# extension does not compile, and torch serves.
ABI3 = not sysconfig.get_config_var("Py_GIL_DISABLED")

setup(
    ext_modules=[
        Extension(
            "tensortrace.capture._statistics",
            sources=["tensortrace/capture/_statistics.c"],
            depends=["tensortrace/capture/_statistics.h"],
            # Nothing for the machine at hand: the module chooses when it is loaded.
            extra_compile_args=[] if os.name == "nt" else ["-O3"],
            py_limited_api=ABI3,
            optional=True,
        )
    ],
    options={"bdist_wheel": {"py_limited_api": "cp310"}} if ABI3 else {},
)

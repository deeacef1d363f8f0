"""The two parts that are compiled: optional, so that the install succeeds without a C compiler."""

from __future__ import annotations

import os
import sysconfig

from setuptools import Extension, setup

# One build for every Python from 3.10 on. Those built without a GIL have no limited API: there the
# extension does not compile, and torch serves.
ABI3 = not sysconfig.get_config_var("Py_GIL_DISABLED")


def _extension(name: str, depends: list[str]) -> Extension:
    return Extension(
        f"tensortrace.capture.compiled.{name}",
        sources=[f"tensortrace/capture/compiled/{name}.c"],
        depends=depends,
        # Nothing for the machine at hand: the module chooses when it is loaded.
        extra_compile_args=[] if os.name == "nt" else ["-O3"],
        py_limited_api=ABI3,
        optional=True,
    )


setup(
    ext_modules=[
        _extension("_statistics", ["tensortrace/capture/compiled/_statistics.h"]),
        _extension("_turns", []),
    ],
    options={"bdist_wheel": {"py_limited_api": "cp310"}} if ABI3 else {},
)

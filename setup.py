"""Builds the compiled modules; everything else about the package stands in pyproject.toml.

Switches, by environment:
  PGAUTHPROXY_ANNOTATE=1   writes the annotated HTML beside each .pyx, which shows what is still Python
  PGAUTHPROXY_DEBUG=1      no optimisation, bounds checks and assertions on
"""

import os

from Cython.Build import cythonize
from setuptools import Extension, setup

debug = os.environ.get("PGAUTHPROXY_DEBUG") == "1"
annotate = os.environ.get("PGAUTHPROXY_ANNOTATE") == "1"
modules = ("_wire", "_digest", "_tls", "_observe", "_relay", "_spawn", "_ledger")

setup(
    ext_modules=cythonize(
        [
            Extension(
                f"pgauthproxy.{module}",
                [f"pgauthproxy/{module}.pyx"],
                extra_compile_args=["-O0", "-g"] if debug else ["-O3"],
            )
            for module in modules
        ],
        annotate=annotate,
        compiler_directives={"language_level": 3, "embedsignature": True, "binding": True},
    ),
)

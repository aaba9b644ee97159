"""Build with `python setup.py build_ext --inplace`, where nodedb_mem and Cython are installed."""

from Cython.Build import cythonize
from setuptools import Extension, setup

import nodedb_mem

extension = Extension(
    "pipeline",
    ["pipeline.pyx"],
    include_dirs=[nodedb_mem.get_include()],
    library_dirs=nodedb_mem.get_library_dirs(),
    libraries=nodedb_mem.get_libraries(),
    # Or leave this out, and have `import nodedb_mem` come before the module is loaded: then the library is there.
    runtime_library_dirs=nodedb_mem.get_library_dirs(),
)
setup(name="pipeline", ext_modules=cythonize([extension]))

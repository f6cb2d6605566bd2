"""Native modules: `_C` (on the stable ABI of torch) and `_host` (pybind11, no torch).

Everything else is static metadata in pyproject.toml. Build with `pip install --no-build-isolation
-e .`, or in place with `python setup.py build_ext --inplace`. `MASKED_KERNELS_NO_EXT=1` skips the
native code: the package works without it.
"""

import os
from pathlib import Path

from setuptools import Extension, setup

CSRC = Path("csrc")


def sources(*kinds: str) -> list[str]:
    lines = (CSRC / "sources.txt").read_text().splitlines()
    pairs = (line.split() for line in lines if not line.startswith("#"))
    return [str(CSRC / path) for kind, path in pairs if kind in kinds]


def native() -> dict:
    try:
        import torch
        from torch.utils.cpp_extension import BuildExtension, include_paths, library_paths
    except ImportError as error:
        raise SystemExit(
            f"masked_kernels: the native code needs torch to build, but: {error}\n"
            "Install torch>=2.11 first, then run `pip install --no-build-isolation -e .`; "
            "or set MASKED_KERNELS_NO_EXT=1 for pure Python."
        ) from error
    import pybind11

    class BuildEachApart(BuildExtension):
        """The modules share sources but not flags, so each keeps its own objects."""

        def build_extension(self, ext):
            shared, self.build_temp = self.build_temp, os.path.join(self.build_temp, ext.name)
            try:
                super().build_extension(ext)
            finally:
                self.build_temp = shared

    flags = ["-std=c++17", "-O3", "-g0", "-Wall", "-Wextra", "-fvisibility=hidden"]
    include = str((CSRC / "include").resolve())
    extensions = [
        Extension(
            "masked_kernels._C",
            sources("core", "torch"),
            include_dirs=[include],
            library_dirs=library_paths(),
            libraries=["torch_cpu"],
            define_macros=[("TORCH_TARGET_VERSION", "0x020b000000000000")],
            # As system headers, so that warnings are about this project.
            extra_compile_args=[*flags, *(f"-isystem{path}" for path in include_paths())],
            py_limited_api=True,
        ),
        Extension(
            "masked_kernels._host",
            [*sources("host"), str(CSRC / "cpu/isa.cpp")],
            include_dirs=[include, pybind11.get_include()],
            define_macros=[
                ("MASKED_KERNELS_TORCH_VERSION", f'"{torch.__version__}"'),
                ("MASKED_KERNELS_FLAGS", f'"{" ".join(flags)}"'),
            ],
            extra_compile_args=flags,
        ),
    ]
    return {"ext_modules": extensions, "cmdclass": {"build_ext": BuildEachApart}}


setup(**({} if os.environ.get("MASKED_KERNELS_NO_EXT") == "1" else native()))

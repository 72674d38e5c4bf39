"""Installs `infer` and, where a C++ compiler and torch are there, builds its native kernels (infer._kernels).

Without them the installation still succeeds: every op has a PyTorch reference (infer/ops.py). torch must be visible to
the build, so install with `pip install --no-build-isolation -e .`.
"""

import sys
from glob import glob

from setuptools import find_packages, setup

try:
    from torch.utils.cpp_extension import BuildExtension, CppExtension
except ImportError:
    BuildExtension = CppExtension = None

REQUIREMENTS = [
    "torch>=2.11",
    "safetensors",
    "huggingface_hub",
    "tokenizers",
    "sentencepiece",
    "numpy",
    "aiohttp",
    "msgspec",
    "prometheus-client",
    "llguidance",
    "gguf",
    "jinja2",
    "tqdm",
]


def say_no_kernels(reason: str) -> None:
    print(f"infer: native kernels were not built ({reason}); ops will run their PyTorch reference", file=sys.stderr)


def native_build() -> dict:
    """setup() arguments that build the kernels, or none."""
    if sys.platform == "win32":
        say_no_kernels("the sources need GCC or Clang")
        return {}
    if BuildExtension is None:
        say_no_kernels("torch cannot be imported here; install it first, then use pip install --no-build-isolation")
        return {}

    class OptionalBuildExtension(BuildExtension):
        """Turns a failed build into one line. torch raises many kinds of errors where the compiler is missing."""

        def build_extensions(self) -> None:
            try:
                super().build_extensions()
            except Exception as error:
                say_no_kernels(f"{type(error).__name__}: {error}".splitlines()[0])

        def build_extension(self, ext) -> None:
            try:
                super().build_extension(ext)
            except Exception as error:  # setuptools would turn it into a warning among others
                say_no_kernels(f"{type(error).__name__}: {error}".splitlines()[0])

    # at::parallel_for is a header: without OpenMP in this build too, it silently runs on one thread.
    openmp = ["-fopenmp"] if sys.platform == "linux" else []
    # Vectors are passed to inlined functions only, so that their calling convention does not matter; GCC 12 warns of
    # its own intrinsics.
    quiet = ["-Wno-psabi", "-Wno-uninitialized", "-Wno-unknown-warning-option", "-Wno-maybe-uninitialized"]
    kernels = CppExtension(
        "infer._kernels",
        sorted(glob("kernels/cpu/*.cpp")),
        depends=sorted(glob("kernels/cpu/*.h")),
        extra_compile_args=["-O3", "-g0", "-std=c++20", "-fno-math-errno", "-fno-trapping-math", *openmp, *quiet],
        extra_link_args=openmp,
        optional=True,
    )
    return {
        "ext_modules": [kernels],
        "cmdclass": {"build_ext": OptionalBuildExtension.with_options(use_ninja=False)},
    }


setup(
    name="infer",
    version="0.1.0",
    description="Pure-PyTorch, torchrun-native inference for language models that do not fit one GPU or one node",
    license="Apache-2.0",
    packages=find_packages(include=["infer", "infer.*"]),
    python_requires=">=3.11",
    install_requires=REQUIREMENTS,
    **native_build(),
)

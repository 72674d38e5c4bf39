"""Installs `infer` and, where a C++ compiler and torch are there, builds its native kernels (infer._kernels).

The CUDA kernels are built too where torch has CUDA and its compiler, nvcc, is found. Without any of these the
installation still succeeds: every op has a PyTorch reference (infer/ops.py). torch must be visible to the build, so
install with `pip install --no-build-isolation -e .`.
"""

import contextlib
import os
import subprocess
import sys
from glob import glob

from setuptools import find_packages, setup

try:
    import torch
    from torch.utils.cpp_extension import CUDA_HOME, BuildExtension, CppExtension, CUDAExtension, is_ninja_available
except ImportError:
    BuildExtension = CppExtension = CUDAExtension = CUDA_HOME = None

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
    "pyyaml",
    "tqdm",
]


def say_no_kernels(reason: str) -> None:
    print(f"infer: native kernels were not built ({reason}); ops will run their PyTorch reference", file=sys.stderr)


def find_nvcc() -> str | None:
    """The CUDA compiler that torch's builds use, if this torch can use what it compiles."""
    nvcc = os.path.join(CUDA_HOME or "", "bin", "nvcc")
    return nvcc if CUDA_HOME and torch.version.cuda and os.access(nvcc, os.X_OK) else None


def has_ninja() -> bool:
    """Whether ninja can be run, of which the package alone will do, even where its programs are not on the PATH."""
    with contextlib.suppress(ImportError):
        import ninja

        os.environ["PATH"] = os.pathsep.join([ninja.BIN_DIR, os.environ.get("PATH", os.defpath)])
    return is_ninja_available()


def default_architectures(nvcc: str) -> str:
    """GPUs to compile for unless TORCH_CUDA_ARCH_LIST names others: the last one also for later ones, as PTX."""
    known = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True).stdout.split()
    return "8.0;9.0;10.0+PTX" if "compute_100" in known else "8.0;9.0+PTX"


def kernel_extension(nvcc: str | None):
    """infer._kernels: the CPU's kernels and, where there is a CUDA compiler, the GPU's."""
    # at::parallel_for is a header: without OpenMP in this build too, it silently runs on one thread.
    openmp = ["-fopenmp"] if sys.platform == "linux" else []
    # Vectors are passed to inlined functions only, so that their calling convention does not matter; GCC 12 warns of
    # its own intrinsics.
    quiet = ["-Wno-psabi", "-Wno-uninitialized", "-Wno-unknown-warning-option", "-Wno-maybe-uninitialized"]
    host = ["-O3", "-g0", "-std=c++20", "-fno-math-errno", "-fno-trapping-math", *openmp, *quiet]
    sources, headers = glob("kernels/cpu/*.cpp"), glob("kernels/cpu/*.h")
    if nvcc:
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", default_architectures(nvcc))
        sources += glob("kernels/cuda/*.cpp") + glob("kernels/cuda/*.cu")
        headers += glob("kernels/cuda/*.h") + glob("kernels/cuda/*.cuh")
    return (CUDAExtension if nvcc else CppExtension)(
        "infer._kernels",
        sorted(sources),
        depends=sorted(headers),
        # --threads: GPU architectures are compiled side by side.
        extra_compile_args={"cxx": host, "nvcc": ["-O3", "-std=c++20", "--threads", "4"]},
        extra_link_args=openmp,
        optional=True,
    )


def native_build() -> dict:
    """setup() arguments that build the kernels, or none."""
    if sys.platform == "win32":
        say_no_kernels("the sources need GCC or Clang")
        return {}
    if BuildExtension is None:
        say_no_kernels("torch cannot be imported here; install it first, then use pip install --no-build-isolation")
        return {}

    class OptionalBuildExtension(BuildExtension):
        """Turns a failed build with CUDA into one without, and a failed build without into one line.

        torch raises many kinds of errors where a compiler is missing or does not fit.
        """

        def build_extensions(self) -> None:
            try:
                super().build_extensions()
            except Exception as error:
                if self.drop_cuda(self.extensions[0], error):
                    self.build_extensions()

        def build_extension(self, ext) -> None:
            try:
                super().build_extension(ext)
            except Exception as error:  # setuptools would turn it into a warning among others
                if self.drop_cuda(ext, error):
                    self.build_extension(ext)

        def drop_cuda(self, ext, error: Exception) -> bool:
            """Whether something is left to be built after this error. Says what is not."""
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            plain = kernel_extension(nvcc=None)
            if ext.sources == plain.sources:
                say_no_kernels(reason)
                return False
            print(f"infer: CUDA kernels were not built ({reason}); building the CPU's alone", file=sys.stderr)
            for name in ("sources", "depends", "include_dirs", "library_dirs", "libraries"):
                setattr(ext, name, getattr(plain, name))
            return True

    nvcc = find_nvcc()
    return {
        "ext_modules": [kernel_extension(nvcc)],
        # nvcc takes long enough that sources should be compiled side by side where they can be.
        "cmdclass": {"build_ext": OptionalBuildExtension.with_options(use_ninja=nvcc is not None and has_ninja())},
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

"""Everything that only a GPU can show: builds the kernels, runs the GPU tests and the GPU benchmark, writes a page.

    python3 scripts/gpu_check.py --model configs/llama-3.1-8b --output-dir docs/benchmarks

Run it with a Python that has torch with CUDA, in the repository; it needs no network. Packages that this Python lacks
are installed from wheels/ (`make gpu-wheels`, on a machine with a network) into a directory of their own, so that the
Python itself stays as it is. A step that fails is told at once; the steps that do not need it still run, and the exit
status is 1. All of it ends within ten minutes: what the first steps take is not left to the last, the slowest variant
of the benchmark, and the page holds what was measured by then.
"""

import argparse
import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from infer.bench.report import slug  # noqa: E402 - it needs the standard library alone
from infer.tables import markdown_table, table  # noqa: E402 - likewise

SITE = ROOT / "build" / "gpu-site"
WHEELS = ROOT / "wheels"
PACKAGES = ("msgspec", "llguidance")  # what a Python for machine learning may lack
VARIANTS = {  # the programs that measure each, in this order
    "graphs": ["scripts/gpu_bench.py", "graphs"],
    "eager": ["scripts/gpu_bench.py", "eager"],
    "transformers": ["tests/gpu/peer_transformers.py"],
    "compile": ["scripts/gpu_bench.py", "compile"],
}
TITLES = {"graphs": "CUDA graphs", "eager": "--enforce-eager", "compile": "--compile", "transformers": "transformers"}
TOTAL_SECONDS = 590
# Each step's, or each variant's, time at most, and never more than is left.
SECONDS = {"build": 180, "tests": 200, "benchmark": 150}


class StepFailed(Exception):
    """A step that did not succeed. The message is one line."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="configs/llama-3.1-8b", help="shape to measure (default: %(default)s)")
    parser.add_argument("--output-dir", type=Path, help="writes the figures to a page there, named after the GPU")
    parser.add_argument("--only", choices=["tests", "benchmark"], help="beside the build")
    args = parser.parse_args()
    check, programs = Check(), Programs(time.monotonic() + TOTAL_SECONDS)
    installed = check.step("packages", lambda: install_packages(programs))
    if installed and check.step("kernels", lambda: build_kernels(programs)):
        if args.only != "benchmark":
            check.step("GPU tests", lambda: run_tests(programs))
        if args.only != "tests":
            check.step("GPU benchmark", lambda: run_benchmark(programs, args.model, args.output_dir))
    print(f"gpu_check: {TOTAL_SECONDS - programs.seconds_left:.0f} s", flush=True)
    if check.failed:
        sys.exit(f"gpu_check: failed: {', '.join(check.failed)}")


class Check:
    """Runs steps and remembers which failed."""

    def __init__(self) -> None:
        self.failed: list[str] = []

    def step(self, name: str, work: Any) -> bool:
        """Whether it succeeded."""
        print(f"gpu_check: {name} ...", flush=True)
        started = time.monotonic()
        try:
            work()
        except StepFailed as error:
            print(f"gpu_check: {name} FAILED: {error}", file=sys.stderr, flush=True)
            self.failed.append(name)
            return False
        print(f"gpu_check: {name} done in {time.monotonic() - started:.0f} s", flush=True)
        return True


class Programs:
    """Runs programs of this Python in the repository, with the packages of SITE, until a moment of time.monotonic()."""

    def __init__(self, deadline: float):
        self._deadline = deadline

    @property
    def seconds_left(self) -> float:
        return max(0.0, self._deadline - time.monotonic())

    def run(self, what: str, command: list[str], seconds: float, **variables: str) -> None:
        """Raises StepFailed. variables: of the program's environment, unless they are set already."""
        path = os.pathsep.join([str(ROOT), str(SITE), *filter(None, [os.environ.get("PYTHONPATH")])])
        environ = {**variables, **os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}
        seconds = min(seconds, self.seconds_left)
        if seconds < 1:
            raise StepFailed(f"{what}: no time left of the {TOTAL_SECONDS} s of all")
        # A session of its own, since it may start processes that use the GPU, which must end with it.
        process = subprocess.Popen([sys.executable, *command], cwd=ROOT, env=environ, start_new_session=True)
        try:
            status = process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise StepFailed(f"{what} did not end within {seconds:.0f} s") from None
        finally:
            with contextlib.suppress(ProcessLookupError):  # nobody of the session is left
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        if status != 0:
            raise StepFailed(f"{what} ended with status {status}; what it said stands above")


# ------------------------------------------------------------------------------------------------------- the steps


def install_packages(programs: Programs) -> None:
    """Installs from wheels/ what this Python lacks. Raises StepFailed, naming what is missing."""
    if importlib.util.find_spec("torch") is None:
        raise StepFailed(f"{sys.executable} has no torch; name a Python that has: make gpu-check PYTHON=...")
    lacking = [name for name in PACKAGES if importlib.util.find_spec(name) is None and not (SITE / name).exists()]
    missing = [name for name in lacking if not any(WHEELS.glob(f"{name}-*.whl"))]
    if missing:
        version = f"{sys.version_info.major}.{sys.version_info.minor}"
        raise StepFailed(
            f"{sys.executable} has no {', '.join(missing)}, and wheels/ has none for it; with a network: "
            f"make gpu-wheels GPU_PYTHON_VERSION={version}"
        )
    if lacking:
        options = ["--quiet", "--no-index", "--no-deps", "--find-links", str(WHEELS), "--target", str(SITE)]
        install = ["-m", "pip", "--disable-pip-version-check", "install", *options, *lacking]
        programs.run("pip", install, SECONDS["build"])


def build_kernels(programs: Programs) -> None:
    """Compiles the kernels in place, and makes sure that they run on this GPU."""
    ask = (
        "import sys, torch; "
        "torch.cuda.is_available() or sys.exit('torch.cuda.is_available() is false: there is no GPU here'); "
        "print('.'.join(map(str, torch.cuda.get_device_capability(0))))"
    )
    asked = subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True)
    if asked.returncode != 0:
        raise StepFailed(asked.stderr.strip().splitlines()[-1])
    # For this GPU alone: each architecture costs its time again.
    build = ["setup.py", "build_ext", "--inplace"]
    programs.run("setup.py", build, SECONDS["build"], TORCH_CUDA_ARCH_LIST=asked.stdout.strip())
    probe = (
        "import logging, sys, torch; logging.basicConfig(); from infer import native; "
        "from infer.cache.layout import KvLayout; layout, gpu = KvLayout(8, 128, 128), torch.device('cuda', 0); "
        "native.decode_runs_on_device(32, layout, torch.bfloat16, gpu) or sys.exit('no CUDA kernels')"
    )
    programs.run("the kernels' first run", ["-c", probe], SECONDS["build"])


def run_tests(programs: Programs) -> None:
    programs.run("pytest", ["-m", "pytest", "-m", "gpu", "tests/gpu"], SECONDS["tests"])


def run_benchmark(programs: Programs, model: str, output_dir: Path | None) -> None:
    """Measures every variant, writes the page after each, and prints the table. Raises StepFailed if one failed."""
    reports: dict[str, dict[str, Any]] = {}
    problems: list[str] = []
    with tempfile.TemporaryDirectory(prefix="infer-gpu-") as directory:
        for variant, program in VARIANTS.items():
            figures = Path(directory) / f"{variant}.json"
            command = [*program, "--model", model, "--output-json", str(figures)]
            try:
                programs.run(variant, command, SECONDS["benchmark"])
                reports[variant] = json.loads(figures.read_text())
            except StepFailed as error:
                reports[variant] = {"missing": "failed"}
                problems.append(str(error))
                print(f"gpu_check: {error}", file=sys.stderr, flush=True)
            write_page(model, reports, output_dir)
    header, rows = _rows(reports)
    if rows:
        print(table(header, rows), flush=True)
    if problems:
        raise StepFailed("; ".join(problems))


def write_page(model: str, reports: dict[str, dict[str, Any]], output_dir: Path | None) -> None:
    """Writes what has been measured so far to a page of output_dir, if there is one."""
    own = [report for report in reports.values() if "hardware" in report]
    if output_dir is None or not own:
        return
    output_dir.mkdir(parents=True, exist_ok=True)
    page = output_dir / f"{slug(own[0]['hardware']['name'])}.md"
    page.write_text(_page(model, own[0], reports, *_rows(reports)))
    print(f"gpu_check: written to {page}", flush=True)


# -------------------------------------------------------------------------------------------------------- the table


def _rows(reports: dict[str, dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """A row a workload, a column a variant: the time, and the share of the hardware's limit that it is."""
    workloads = next((report["workloads"] for report in reports.values() if "hardware" in report), {})
    rows = []
    for name, measured in workloads.items():
        cells = [name, f"{1e3 * measured['limit']:.2f} ms"]
        rows.append(cells + [_cell(reports.get(variant, {"missing": "not run"}), name) for variant in VARIANTS])
    return ["", "limit", *(TITLES[variant] for variant in VARIANTS)], rows


def _cell(report: dict[str, Any], workload: str) -> str:
    if "missing" in report:
        return str(report["missing"])
    figure = report["workloads"][workload]
    return f"{1e3 * figure['seconds']:.2f} ms ({100 * figure['limit'] / figure['seconds']:.0f}%)"


def _page(model: str, own: dict[str, Any], reports: dict[str, Any], header: list[str], rows: list[list[str]]) -> str:
    hardware, version = own["hardware"], reports.get("transformers", {}).get("version")
    against = f", transformers {version}" if version else ""
    return (
        f"# {hardware['name']}\n\n"
        f"{Path(model).name} with random weights in bfloat16, on {hardware['description']}, torch {own['torch']}"
        f"{against}. Measured in the same run: {hardware['bytes_read_per_second'] / 1e9:,.0f} GB/s of memory reads, "
        f"{hardware['matrix_operations_per_second'] / 1e12:,.0f} TFLOP/s of matrix products. Decoding is told in "
        f"milliseconds a step (a token of every request), prefill in milliseconds to the first token; in brackets, the "
        f"share of the limit that reading the weights and the cache, or the matrix products, set.\n\n"
        f"    make gpu-check\n\n{markdown_table(header, rows)}\n"
    )


if __name__ == "__main__":
    main()

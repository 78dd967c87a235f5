"""Checks the C++ kernels for ARM on a machine without one: their tests in an emulator, the scan's cycles by a model.

    python scripts/check_arm.py cycles
    python scripts/check_arm.py tests [--folder build/arm] [OPTION or TEST...]

`cycles` compiles the scan for a Cortex-A76 and counts, by llvm-mca's model of the Neoverse N1 (the same core for
servers), the cycles of one step of 4 channels with 16 states: 64 updates, without caches or mispredicted branches.

`tests` runs tests, by default the kernels' and the recorded Vims', with an ARM Python and jaxlib's wheel for ARM under
qemu; other tests and pytest's options can be given. The first run downloads both into the folder: Debian's Python by
`apt-get download` (after `dpkg --add-architecture arm64` and `apt-get update`), wheels by pip, in the versions that
are installed here.

Debian's packages: g++-aarch64-linux-gnu, qemu-user, llvm-19.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import jax  # noqa: E402

from kernels import build  # noqa: E402
from kernels.scan import native  # noqa: E402

COMPILER, EMULATOR, COUNTER = "aarch64-linux-gnu-g++", "qemu-aarch64", "llvm-mca-19"
TARGET, MODEL = "-mcpu=cortex-a76", "neoverse-n1"
LOOPS = {  # by the mangled names of their functions, for 16 states
    "forward": "ForwardILi16ELb1ELb0E",
    "gradient: forward again": "ForwardILi16ELb1ELb1E",
    "gradient: adjoint": "AdjointILi16ELb1E",
}
USUAL = [
    *("-k", "native or recorded"),
    "tests/kernels/scan/test_native.py",
    "tests/kernels/scan/test_selective_scan.py",
    "tests/kernels/convolution/test_convolution.py",
    "tests/models/test_vim.py",
]
PYTHON = "3.11"  # Debian 12's
LIBRARIES = ("libc6", "libstdc++6", "libgcc-s1", "zlib1g", "libexpat1", "libssl3", "libffi8", "libbz2-1.0", "liblzma5")
LIBRARIES += ("libsqlite3-0", "libuuid1", "libcrypt1")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("cycles")
    tests = commands.add_parser("tests")
    tests.add_argument(
        "--folder", type=Path, default=ROOT / "build" / "arm", help="for the ARM Python and its packages"
    )
    arguments, for_pytest = parser.parse_known_args()
    tools = [COMPILER, COUNTER] if arguments.command == "cycles" else [COMPILER, EMULATOR, "apt-get", "dpkg"]
    if missing := [tool for tool in tools if not shutil.which(tool)]:
        parser.error(f"{', '.join(missing)} not found: apt-get install g++-aarch64-linux-gnu qemu-user llvm-19")
    if arguments.command == "cycles":
        return print_cycles()
    return run_tests(arguments.folder.resolve(), for_pytest)


def print_cycles() -> int:
    assembly = compile_scan()
    cycles = {name: count(loop(assembly, function)) for name, function in LOOPS.items()}
    for name, number in cycles.items():
        print(f"{name:<26}{number:7.1f}")
    print(f"{'gradient':<26}{sum(number for name, number in cycles.items() if 'gradient' in name):7.1f}")
    return 0


def compile_scan() -> str:
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder, "native.s")
        flags = [*build.FLAGS, f"-DCHUNK={native.CHUNK}", f"-I{jax.ffi.include_dir()}", TARGET, "-w", "-S"]
        subprocess.run([COMPILER, *flags, str(native.SOURCE), "-o", str(output)], check=True)
        return output.read_text()


def loop(assembly: str, function: str) -> list[str]:
    """Returns the instructions of a function's longest innermost loop."""
    body = re.search(rf"^_ZN\S*\d{function}\S*:\n(.*?)\n\t\.size", assembly, re.DOTALL | re.MULTILINE)
    if not body:
        raise SystemExit(f"no function like {function} in the assembly: has it been renamed, or inlined?")
    lines = [line.split("//")[0].rstrip() for line in body[1].splitlines()]
    loops, labels = [], {}
    for i, line in enumerate(lines):
        if label := re.fullmatch(r"(\.L\w+):", line):
            labels[label[1]] = i
        branch = re.fullmatch(r"\t(?:b\.?\w*|[ct]bn?z)\t(?:.*, )?(\.L\w+)", line)
        if branch and branch[1] in labels:
            loops.append((labels[branch[1]], i))
    inner = [
        (a, b) for a, b in loops if not any((a, b) != other and a <= other[0] and other[1] <= b for other in loops)
    ]
    first, last = max(inner, key=lambda ends: ends[1] - ends[0])
    return [line for line in lines[first : last + 1] if re.match(r"\t[a-z]", line)]


def count(instructions: list[str], iterations: int = 200) -> float:
    command = [COUNTER, "-mtriple=aarch64", f"-mcpu={MODEL}", f"-iterations={iterations}"]
    result = subprocess.run(command, input="\n".join(instructions), capture_output=True, text=True, check=True)
    return int(re.search(r"Total Cycles:\s+(\d+)", result.stdout)[1]) / iterations


def run_tests(folder: Path, for_pytest: list[str]) -> int:
    python = folder / "python"
    if not python.exists():
        install(folder)
    # Python finds itself in the script that calls the emulator, so that tests can start others.
    cross = {"CXX": COMPILER, "CXXFLAGS": TARGET, "XDG_CACHE_HOME": str(folder / "cache"), "JAX_PLATFORMS": "cpu"}
    environment = {name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"}
    command = [python, "-m", "pytest", "-o", "addopts=-q", "-p", "no:cacheprovider"]
    return subprocess.run([*command, *(for_pytest or USUAL)], cwd=ROOT, env=environment | cross).returncode


def install(folder: Path) -> None:
    system, packages, downloads = (folder / name for name in ("system", "packages", "downloads"))
    downloads.mkdir(parents=True, exist_ok=True)
    names = [f"python{PYTHON}-minimal", f"libpython{PYTHON}-minimal", f"libpython{PYTHON}-stdlib", *LIBRARIES]
    subprocess.run(["apt-get", "download", *(f"{name}:arm64" for name in names)], cwd=downloads, check=True)
    for package in downloads.glob("*.deb"):
        subprocess.run(["dpkg", "-x", package, system], check=True)
    platforms = (f"--platform=manylinux_2_{version}_aarch64" for version in (17, 24, 26, 27, 28))
    wheels = ["--only-binary=:all:", f"--python-version={PYTHON}", *platforms, "--target", packages]
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", *wheels, *requirements()], check=True)
    script = folder / "python"
    script.write_text(
        f'#!/bin/sh\nexport QEMU_LD_PREFIX="{system}" PYTHONHOME="{system}/usr" PYTHONPATH="{packages}"\n'
        f'exec {EMULATOR} -0 "$0" "{system}/usr/bin/python{PYTHON}" "$@"\n'
    )
    script.chmod(0o755)


def requirements() -> list[str]:
    """Lists the project's dependencies in the versions installed here, and what runs its tests."""
    project = re.search(r"^dependencies = \[(.*?)^\]", (ROOT / "pyproject.toml").read_text(), re.DOTALL | re.MULTILINE)
    names = [*re.findall(r'"([\w-]+)', project[1]), "jaxlib", "pytest", "hypothesis"]
    return [f"{name}=={metadata.version(name)}" for name in names]


if __name__ == "__main__":
    sys.exit(main())

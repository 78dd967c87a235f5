import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parent.parent.parent / "scripts" / "check_sharding.py"


def test_two_devices_compute_what_they_hold():
    command = [sys.executable, SCRIPT, "--devices", "2", "--families", "vim"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout == "2 devices, vim: equal, nothing exchanged\n"

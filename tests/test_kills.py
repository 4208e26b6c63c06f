"""Work killed at random moments, in short; and a result folder killed at each touch of the disk. In full: `python tests/kills.py --times 20`."""
import json, os, signal, subprocess, sys
from itertools import count
from pathlib import Path

import pytest

from kills import kill

ROOT = Path(__file__).resolve().parent.parent
# Writes a result whose summary says its first argument, and is killed when it touches the disk for the n-th time.
WRITER = """
import json, os, signal, sys
from pathlib import Path
from mgdcr.jobs import run_folder
word, out, left = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
def touched(event, args):
    global left
    if event.startswith(("os.", "shutil.")) or event == "open":
        left -= 1
        if not left: os.kill(os.getpid(), signal.SIGKILL)
import shutil, fcntl, mgdcr.dicom
sys.addaudithook(touched)
with run_folder(out/"anna") as folder:
    (folder/"figures").mkdir()
    for name in ("summary.json", "volume", "figures/view"): (folder/name).write_text(word)
"""


def write(word, out, left=0):
    return subprocess.run([sys.executable, "-c", WRITER, word, str(out), str(left)], cwd=ROOT, env=os.environ | dict(PYTHONPATH=str(ROOT)), capture_output=True, text=True)


def words(folder): return {str(p.relative_to(folder)): p.read_text() for p in folder.rglob("*") if p.is_file()}
def whole(word): return dict.fromkeys(("summary.json", "volume", "figures/view"), word)


def test_a_result_is_whole_whatever_touch_of_the_disk_is_the_last(tmp_path):
    assert write("first", tmp_path).returncode == 0
    between = 0
    for n in count(1):
        before = "first" if n == 1 else words(tmp_path/"anna")["volume"]
        done = write(f"run {n}", tmp_path, n)
        assert done.returncode in (0, -signal.SIGKILL), done.stderr
        between += (hidden := not (tmp_path/"anna").exists())
        assert words(tmp_path/(".anna.old" if hidden else "anna")) in (whole(before), whole(f"run {n}")) and set(os.listdir(tmp_path)) <= {"anna", ".anna.partial", ".anna.old"}
        if done.returncode == 0: break
        assert write("again", tmp_path).returncode == 0 and os.listdir(tmp_path) == ["anna"] and words(tmp_path/"anna") == whole("again")
    assert n > 15 and between == 1  # between two renamings, from which the next run recovers


def test_a_reconstruction_killed_at_random_loses_nothing(tmp_path):
    "The quickest of the kinds: every start of the others imports torch, some of them twice, which is minutes."
    found = kill("reconstruction", 3, 0, tmp_path)
    assert found["kills"] == 3 and found["lost_results"] == 0 and not list(tmp_path.iterdir())

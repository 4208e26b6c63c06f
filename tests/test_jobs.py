"""papermill with this project's plug-in, as people start it: in a terminal, with a pipe, interrupted, twice at once."""
import base64, json, os, pty, signal, subprocess, sys, time
from importlib.metadata import entry_points
from pathlib import Path

import nbformat
import pytest

pytestmark = pytest.mark.skipif(not any(e.value == "mgdcr.jobs:Engine" for e in entry_points(group="papermill.engine")),
                                reason="mgdcr is not installed, so papermill knows nothing of its engine")
PAPERMILL = [sys.executable, "-m", "papermill"]
BODY = """
import json, os, time
from pathlib import Path
from mgdcr.dicom import StudyError
from mgdcr.jobs import run_folder
if action == "refuse": raise StudyError("This study has no images: copy it again.")
if action == "die": os.kill(os.getpid(), 9)  # as a machine without memory does it
if action == "crash": Path("/nowhere/at/all").read_text()
with run_folder(Path(out_dir)/subject) as folder:
    (folder/"half").touch()
    if action == "wait": time.sleep(120)
    (folder/"half").unlink()
    (folder/"summary.json").write_text(json.dumps([repr(subject), hold_out, action]))
"""


def notebook(path, *sources):
    "Write a notebook whose first code cell is tagged `parameters`."
    cells = [nbformat.v4.new_code_cell(source, metadata={"tags": ["parameters"] if n == 0 else []}) for n, source in enumerate(sources)]
    kernel = dict(name="python3", display_name="python3", language="python")
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=dict(kernelspec=kernel)), path)
    return path


@pytest.fixture
def project(tmp_path):
    "A project of ours with one small job, and the folder its results go to."
    root = tmp_path/"project"
    (root/"nbs").mkdir(parents=True)
    (root/"settings.ini").write_text("[DEFAULT]\nlib_name = mgdcr\n")
    notebook(root/"nbs/job.ipynb", 'subject = "phantom-7"\nout_dir = "results"\nhold_out = ""\naction = "save"', BODY)
    return root


def papermill(folder, *args, terminal=True, stdin=None, program=PAPERMILL):
    "Run papermill to its end; with a terminal for stdin and stdout unless something is piped in."
    command = [*program, *map(str, args)]
    if not terminal: return subprocess.run(command, cwd=folder, input=stdin, capture_output=True, text=True, timeout=120)
    ours, theirs = pty.openpty()
    try: return subprocess.run(command, cwd=folder, stdin=theirs, stdout=theirs, stderr=subprocess.PIPE, text=True, timeout=120)
    finally: os.close(ours), os.close(theirs)


def started(folder, *args):
    "A run that waits half way, with something half written."
    process = subprocess.Popen([*PAPERMILL, "nbs/job.ipynb", "-p", "action", "wait", *args], cwd=folder, stdin=subprocess.DEVNULL,
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
                               # a shell's background job ignores Ctrl-C and hands that on: here it must count
                               preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    deadline = time.time() + 60
    while not (folder/"results/.phantom-7.partial/half").exists():
        assert process.poll() is None and time.time() < deadline
        time.sleep(0.1)
    return process


def last_line(run): return [line for line in run.stderr.splitlines() if line.strip()][-1]
def summary(project, subject): return json.loads((project/"results"/subject/"summary.json").read_text())
def names(folder): return sorted(os.listdir(folder)) if folder.exists() else []


@pytest.mark.parametrize("subject", ["007", "1234567_20208_2_0"])
def test_no_output_path_in_a_terminal(project, subject):
    run = papermill(project, "nbs/job.ipynb", "-p", "subject", subject, "-phold_out", "1e3")
    assert run.returncode == 0, run.stderr
    assert summary(project, subject) == [repr(subject), "1e3", "save"]  # as typed, not as numbers
    assert names(project/"results") == [subject] and names(project/"results"/subject) == ["job.ipynb", "summary.json"]
    kept = (project/"results"/subject/"job.ipynb").read_text()
    assert not any(word in kept for word in (str(project.parent), sys.prefix, "start_time", "iopub", "input_path"))


def test_every_way_to_give_parameters(project):
    (project/"p.yaml").write_text("{subject: 0x1F, action: file}")
    encoded = base64.b64encode(b"subject: 1_0").decode()
    for given, subject, action in ((["-f", "p.yaml"], "0x1F", "file"), (["-b", encoded], "1_0", "save"),
                                   (["--parameters_yaml={subject: 010, hold_out: [a, b]}", "--", "nbs/job.ipynb"], "010", "save")):
        path = [] if "--" in given else ["nbs/job.ipynb"]
        run = papermill(project, "--log-level", "ERROR", *path, *given, program=[str(Path(sys.executable).parent/"papermill")])
        assert run.returncode == 0, run.stderr
        assert summary(project, subject)[::2] == [repr(subject), action]


def test_from_another_folder(project, tmp_path):
    assert papermill(tmp_path, "project/nbs/job.ipynb", "-p", "subject", "x").returncode == 0
    assert summary(project, "x") and names(tmp_path) == ["project"]


def test_a_piped_notebook_does_not_overwrite_its_source(project):
    source = (project/"nbs/job.ipynb").read_text()
    run = papermill(project, "nbs/job.ipynb", "-p", "subject", "x", terminal=False, stdin=source)
    assert run.returncode == 0 and (project/"nbs/job.ipynb").read_text() == source and summary(project, "x")
    library = notebook(project/"nbs/library.ipynb", "x = 1").read_text()
    run = papermill(project, "nbs/library.ipynb", terminal=False, stdin=source)
    assert run.returncode == 2 and "overwritten" in last_line(run) and (project/"nbs/library.ipynb").read_text() == library


@pytest.mark.parametrize("subject", ["../x", "", "record"])
def test_a_bad_subject_is_refused_before_anything_is_made(project, subject):
    run = papermill(project, "nbs/job.ipynb", "-p", "subject", subject)
    assert run.returncode == 2 and "Traceback" not in run.stderr and "subject" in last_line(run)
    assert names(project) == ["nbs", "settings.ini"]


def test_failures_leave_one_log_and_the_last_good_result(project):
    assert papermill(project, "nbs/job.ipynb", "-p", "subject", "x").returncode == 0
    run = papermill(project, "nbs/job.ipynb", "-p", "subject", "x", "-p", "action", "refuse")
    assert run.returncode == 2 and last_line(run) == "This study has no images: copy it again." and "Traceback" not in run.stderr
    assert names(project/"results") == ["x", "x.log"] and summary(project, "x")[2] == "save"
    run = papermill(project, "nbs/job.ipynb", "-p", "subject", "x", "-p", "action", "crash")
    log = (project/"results/x.log").read_text()
    assert run.returncode == 1 and last_line(run).startswith("FileNotFoundError") and "read_text" in log
    run = papermill(project, "nbs/job.ipynb", "-p", "subject", "x", "-p", "action", "die")
    assert run.returncode == 1 and "DeadKernelError" in last_line(run) and names(project/"results") == ["x", "x.log"]
    assert str(project) not in log and sys.prefix not in log and "/nowhere" not in log
    assert papermill(project, "nbs/job.ipynb", "-p", "subject", "x", "-p", "action", "again").returncode == 0
    assert names(project/"results") == ["x"] and summary(project, "x")[2] == "again"


def test_an_explicit_output_is_papermills_own(project):
    run = papermill(project, "nbs/job.ipynb", "out.ipynb", "-p", "subject", "007")
    assert run.returncode == 0 and "input_path" in (project/"out.ipynb").read_text()
    assert names(project/"results/007") == ["summary.json"] and summary(project, "007")[0] == "'007'"


def test_other_notebooks_are_left_alone(project, tmp_path):
    notebook(tmp_path/"theirs.ipynb", "subject = 1", "assert subject == 7")
    run = papermill(tmp_path, "theirs.ipynb", "-p", "subject", "007")
    assert run.returncode == 2 and "OUTPUT_PATH" in last_line(run)  # what papermill says by itself
    assert papermill(tmp_path, "theirs.ipynb", "out.ipynb", "-p", "subject", "007").returncode == 0
    assert "subject" in papermill(project, "nbs/job.ipynb", "--help-notebook", terminal=False).stdout
    assert papermill(project, "nbs/job.ipynb", "--prepare-only").returncode == 2
    assert not (project/"results").exists()


def test_a_study_folder_is_never_replaced(project):
    (project/"results/x").mkdir(parents=True)
    (project/"results/x/sax.nii.gz").touch()
    run = papermill(project, "nbs/job.ipynb", "-p", "subject", "x")
    assert run.returncode == 2 and "not a reconstruction" in last_line(run) and names(project/"results/x") == ["sax.nii.gz"]


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_interrupted(project, how):
    process = started(project)
    if how == signal.SIGTERM:
        second = papermill(project, "nbs/job.ipynb")
        assert second.returncode == 2 and "Another run" in last_line(second)
    os.kill(process.pid, how)
    assert process.wait(60) != 0 and not (project/"results/phantom-7").exists()
    if how != signal.SIGKILL: assert names(project/"results") in ([], ["phantom-7.log"])
    else:  # it could not clear up; the next run does
        assert names(project/"results") == [".phantom-7.partial"]
        assert papermill(project, "nbs/job.ipynb").returncode == 0
        assert names(project/"results") == ["phantom-7"] and names(project/"results/phantom-7") == ["job.ipynb", "summary.json"]


def test_importing_it_costs_nothing():
    "Every papermill call on the machine imports it: no torch, not even numpy."
    code = "import sys, mgdcr.jobs; print('torch' in sys.modules, 'numpy' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.stdout.split() == ["False", "False"], run.stderr

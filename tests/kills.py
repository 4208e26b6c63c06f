"""Training, evaluation and reconstruction, killed at random moments as a machine short of power or memory does it: nothing is lost but the last interval.

    python tests/kills.py --times 20 --seed 0 --record results/record/kills.json

Each kind of work is done once undisturbed; then it is started, killed and started again by the same command, and what lies on the disk is looked at
after every kill. Moments are drawn so that each phase of the work has its share of them."""
import argparse, hashlib, json, os, platform, signal, subprocess, sys, tempfile, time
from collections import Counter
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from itertools import count
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
TOLD = "KILLS_TOLD"  # environment: the file in which work says what it is doing
ENV = os.environ | dict(PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="")


# Work that says what it is doing: time, "begin" or "end" or "step", of what, and numbers

def tell(*words):
    with open(os.environ[TOLD], "a") as file: file.write(" ".join(map(str, (round(time.monotonic(), 4), *words))) + "\n")


def telling(work, what, numbers=lambda *args: ()):
    def call(*args, **options):
        tell("begin", what, *numbers(*args))
        found = work(*args, **options)
        tell("end", what, *numbers(*args))
        return found
    return call


def lines(told):
    "What was said since the last start: (seconds since then, *words)."
    said = [line.split() for line in told.read_text().splitlines()]
    first = max(n for n, line in enumerate(said) if line[1:] == ["begin", "start-up"])
    return [(float(at) - float(said[first][0]), *words) for at, *words in said[first:]]


def phase(said):
    "Where work was when it said the last of this."
    return dict(begin=said[-1][2], step="step", end="between")[said[-1][1]]


def longest(said, what):
    "Seconds from a beginning to what was said next."
    return max((after[0] - line[0] for line, after in zip(said, said[1:]) if (line[1:3] == ("begin", what)) or (what == "step" and line[1] == "step")), default=0.)


# Starting and killing

@dataclass
class Kill:
    at: float   # seconds after the start
    phase: str


def start(command, folder):
    "A process group of its own, from the project's root."
    with open(folder/"output", "ab") as output:
        return subprocess.Popen(list(map(str, command)), cwd=ROOT, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True, env=ENV | {TOLD: str(folder/"told")})


def run(command, folder, enough=300):
    "To its end, undisturbed; the seconds it took."
    began, process = time.monotonic(), begin(command, folder)
    try: code = process.wait(enough)
    except BaseException:
        stop(process)
        raise
    assert code == 0, (folder/"output").read_text()[-3000:]
    return time.monotonic() - began


def begin(command, folder):
    with open(folder/"told", "a") as file: file.write(f"{time.monotonic():.4f} begin start-up\n")
    return start(command, folder)


def stop(process):
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def killed(command, folder, seen, wait, where, enough=300):
    "Kill `wait` seconds after `seen()`; None where it had ended by then."
    began, process = time.monotonic(), begin(command, folder)
    while process.poll() is None and not seen() and time.monotonic() < began + enough: time.sleep(0.0005)
    end = time.monotonic() + wait
    while process.poll() is None and (left := end - time.monotonic()) > 0: time.sleep(min(left, 0.05))
    if process.poll() is None:
        at = time.monotonic() - began
        stop(process)
        return Kill(round(at, 2), where())
    assert process.returncode == 0, (folder/"output").read_text()[-3000:]


def said_often(folder, what, times):
    "Was it said so many times since the start that this begins?"
    def seen():
        said = lines(folder/"told")
        return what == "start-up" or sum(line[1:3] == ("begin", what) or (what == "step" and line[1] == "step") for line in said) >= times
    return seen


# Training: 4 samples a step, a checkpoint every EVERY seconds

EVERY, CHECKED = 0.5, 1.2  # seconds of training between checkpoints, and between validations


def work_train(folder, samples):
    import torch
    from mgdcr import training, unet
    torch.set_num_threads(1)
    unet.NETWORKS["small"] = replace(unet.NETWORKS["cine128_compact"], channels=16, embed=32, z=16, dropout=0.1)
    training.Run.save = telling(training.Run.save, "save", lambda run, path: (run.samples, run.seconds))
    training.Validation.__call__ = telling(training.Validation.__call__, "validate")
    recipe = training.Recipe(str(folder.parent/"slices.lmdb"), "small", samples=samples, batch=4, warmup=16, precision="float32")
    training.train(recipe, folder/"checkpoint", folder/"log", "cpu", save_minutes=EVERY/60, validate_minutes=CHECKED/60,
                   stop=lambda run: tell("step", run.samples, run.seconds))


def slices(path):
    "A small data set: three subjects, one of them to validate on."
    from mgdcr.dataset import SliceRecord, write_lmdb
    def pictures(subject):
        rng = np.random.default_rng(int(subject.split("-")[1]))
        for n in range(6):
            image, thin = rng.uniform(-1, 1, (8, 8)).astype(np.float32).repeat(16, 0).repeat(16, 1), SliceRecord(subject, "sax", "thin", pair=n, slice=n, s=n/6, heart="healthy phantom")
            yield thin, image
            yield replace(thin, kind="acquired"), np.clip(image + 0.1, -1, 1)
    write_lmdb(path, [(name, partial(pictures, name)) for name in ("phantom-100", "phantom-10000", "phantom-10001")])


def learnt(folder):
    "Samples, seconds and weights of a checkpoint; nothing where there is none."
    from mgdcr.diffae import load_official, read_pickle
    path = folder/"checkpoint/last.ckpt"
    if not path.exists(): return 0, 0., {}
    found = read_pickle(path)
    return load_official(path).card["samples"], found["seconds"], found["state_dict"]


def look_at_training(folder, saved):
    "Samples that are lost, and the checkpoint's samples and seconds, which become the next `saved`."
    from mgdcr.training import read_log
    said, (samples, seconds, _) = lines(folder/"told"), learnt(folder)
    marks = [(int(line[3]), float(line[4]), line[1] == "end") for line in said if line[2] == "save"]
    whole = max([saved, *[(s, t) for s, t, ended in marks if ended]])
    assert (samples, seconds) in ([whole] if not marks or marks[-1][2] else [whole, marks[-1][:2]]), "the last checkpoint that was finished, or the one after it"
    steps = [(int(line[2]), float(line[3])) for line in said if line[1] == "step"]
    assert all(t - seconds <= EVERY + 0.05 for _, t in steps[:-1]), "more than an interval is lost"
    logged = [int(row["samples"]) for row in read_log(folder/"log/losses.csv")]
    assert logged == list(range(4, 4*len(logged) + 1, 4)) and 4*len(logged) >= samples, "the log knows what the checkpoint knows"
    if (folder/"checkpoint").exists(): assert {p.name for p in (folder/"checkpoint").iterdir()} <= {"last.ckpt", ".last.ckpt.partial"}
    return max(0, (steps[-1][0] if steps else samples) - samples), (samples, seconds)


def end_of_training(folder, whole):
    "To the bit what an undisturbed run ends with."
    import torch
    from mgdcr.training import read_log
    (ours, _, state), (theirs, _, reference) = learnt(folder), learnt(whole)
    assert ours == theirs and set(state) == set(reference) and all(torch.equal(state[k], reference[k]) for k in state)
    one, two = ([(row["samples"], row["loss"], row["lr"]) for row in read_log(f/"log/losses.csv")] for f in (folder, whole))
    assert one == two
    checks = [(row["samples"], row["t"]) for row in read_log(folder/"log/validation.csv")]
    assert checks and len(set(checks)) == len(checks), "a validation is logged twice"
    assert [p.name for p in (folder/"checkpoint").iterdir()] == ["last.ckpt"]


def kill_training(scratch, times, rng, samples=400):
    slices(scratch/"slices.lmdb")
    command = lambda folder: [sys.executable, __file__, "--work", "train", folder, "--samples", samples]
    (whole := scratch/"whole").mkdir()
    run(command(whole), whole)
    said, kills, lost = lines(whole/"told"), [], []
    phases = "start-up", "step", "validate", "save"
    for number in count():
        (folder := scratch/f"killed-{number}").mkdir()
        saved, ended = (0, 0.), False
        while not ended and len(kills) < times:
            what = phases[(len(kills) + number) % len(phases)]
            kill = killed(command(folder), folder, said_often(folder, what, rng.integers(1, 4)), rng.uniform(0, longest(said, what)), lambda: phase(lines(folder/"told")))
            if ended := kill is None: break
            gone, saved = look_at_training(folder, saved)
            kills.append(kill), lost.append(gone)
        if not ended: run(command(folder), folder)
        end_of_training(folder, whole)
        if len(kills) == times: return kills, dict(samples=samples, runs_to_the_end=number + 1, lost_samples=lost, interval_s=EVERY)


# Evaluation: subjects by two methods, a row a score; names such as cohorts have

SUBJECTS = "anna", "007", "1234567_20208_2_0", "2345678", "1e3"
METHODS = "nearest", "linear"


def counted(subject, *rest, **options):
    "`protocols.score`, which says that it was asked."
    from mgdcr.protocols import score
    return telling(score, "case", lambda name, *rest: (name,))(subject, *rest, **options)


def work_evaluate(folder, subjects):
    from mgdcr import batch, protocols
    protocols.score, batch.write_table = counted, telling(batch.write_table, "write")
    protocols.compare(subjects, METHODS, "slice_drop", ("",), folder/"log/scores.csv", data_dir=str(folder.parent/"studies"), spacing_mm=6.0, align="none")


def studies(folder, names):
    "A small heart under several names."
    from mgdcr.scanner import phantom_study
    study = phantom_study(3, frames=2, sax_slices=6, shape=(56, 56), pixel_mm=3.0, acquired_mm=(3.0, 3.0), reference=False)
    for name in names: replace(study, subject=name).save(folder/name)


def recorded(folder):
    path = folder/"log/scores.csv"
    return path.read_bytes() if path.exists() else b""


def cases_in(record):
    "Names in a record of whole lines."
    rows = [line.split(",") for line in record.decode().splitlines()]
    assert not rows or (record.endswith(b"\n") and {len(row) for row in rows} == {6} and rows[0][0] == "subject")
    of = Counter(row[0] for row in rows[1:])
    assert len(set(of.values())) <= 1, "a case is there in part"
    return set(of)


def look_at_evaluation(folder, before):
    "Cases that are lost, and the record, which becomes the next `before`."
    now = recorded(folder)
    assert now.startswith(before), "rows that were there have changed"
    asked = [line[3] for line in lines(folder/"told") if line[1:3] == ("begin", "case")]
    assert not set(asked) & cases_in(before) and len(set(asked)) == len(asked), "done twice"
    gone = len(set(asked) - cases_in(now))
    assert gone <= 1 and {p.name for p in (folder/"log").iterdir()} <= {"scores.csv", ".scores.csv.partial"}
    return gone, now


def kill_evaluation(scratch, times, rng, subjects=SUBJECTS):
    studies(scratch/"studies", subjects)
    command = lambda folder: [sys.executable, __file__, "--work", "evaluate", folder, "--subjects", *subjects]
    (whole := scratch/"whole/log").mkdir(parents=True)
    run(command(whole := whole.parent), whole)
    said, kills, lost = lines(whole/"told"), [], []
    phases = "start-up", "case", "write"
    for number in count():
        (folder := scratch/f"killed-{number}"/"log").mkdir(parents=True)
        folder, before, ended = folder.parent, b"", False
        while not ended and len(kills) < times:
            what = phases[(len(kills) + number) % len(phases)]
            kill = killed(command(folder), folder, said_often(folder, what, 1), rng.uniform(0, longest(said, what)), lambda: phase(lines(folder/"told")))
            gone, before = look_at_evaluation(folder, before)
            if ended := kill is None: break
            kills.append(kill), lost.append(gone)
        if not ended:
            run(command(folder), folder)
            look_at_evaluation(folder, before)
        assert recorded(folder) == recorded(whole) and [p.name for p in (folder/"log").iterdir()] == ["scores.csv"]
        if len(kills) == times: return kills, dict(cases=len(subjects), runs_to_the_end=number + 1, lost_cases=lost)


# Reconstruction: over a finished result, from a shell or as a job

def shell_command(scratch, method):
    return [sys.executable, "-m", "mgdcr.reconstruct", "anna", "--again", "--method", method, "--spacing-mm", 6, "--align", "none", "--segmenter", "",
            "--data-dir", scratch/"studies", "--out-dir", scratch/"results"]


def job_command(scratch, method):
    given = dict(subject="anna", method=method, spacing_mm=6, align="none", segmenter="", data_dir=scratch/"studies", out_dir=scratch/"results")
    return [sys.executable, "-m", "papermill", "nbs/reconstruct.ipynb", *(word for name, value in given.items() for word in ("-p", name, value))]


def files_of(folder):
    "Name → SHA-256."
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.rglob("*")) if p.is_file()}


def method_of(folder): return json.loads((folder/"summary.json").read_text())["method"]


def stage(out, since=0.):
    "How far a run that began at `since` has come, as its folders say; what an earlier one left does not count."
    def touched(path):
        try: return path.stat().st_ctime > since
        except FileNotFoundError: return False
    if touched(out/".anna.old"): return "replace"
    return "write" if touched(out/".anna.partial/volume.nii.gz") else "solve"


def look_at_result(out, before, wanted, good):
    "The old result as it was, or the new one and all of it; True where it is the new one."
    assert {p.name for p in out.iterdir()} <= {"anna", ".anna.partial", ".anna.old"}
    at = out/"anna" if (out/"anna").exists() else out/".anna.old"  # killed between two renamings, the next run brings it back
    now = files_of(at)
    if now == before: return False
    assert at.name == "anna" and method_of(at) == wanted and all(now[name] == good[wanted][name] for name in ("volume.nii.gz", "poses.csv", "residuals.csv")) and set(now) == set(good[wanted])
    return True


def stages_of(command, scratch):
    "Seconds until writing and until replacing begin, and the longest that either lasted, of an undisturbed run."
    began, process, first = time.monotonic(), begin(command, scratch), {}
    while process.poll() is None:
        first.setdefault(stage(scratch/"results"), time.monotonic() - began)
        time.sleep(0.0005)
    assert process.returncode == 0, (scratch/"output").read_text()[-3000:]
    end = time.monotonic() - began
    replaced = first.get("replace", end)
    return dict(solve=(lambda at: True, first.get("write", replaced)), write=(lambda at: at != "solve", replaced - first.get("write", replaced)),
                replace=(lambda at: at == "replace", 0.002))


def still_running(scratch):
    "Processes that were started from here, such as a killed job's kernel, which is a process group of its own."
    here = f"{TOLD}={scratch}/".encode()
    def of(process):
        try: return here in (process/"environ").read_bytes()
        except OSError: return False  # gone meanwhile, or somebody else's
    return [p.name for p in Path("/proc").glob("[0-9]*") if of(p)]


def wait_for_all(scratch, enough=15):
    "Nothing that was started here lives on."
    end = time.monotonic() + enough
    while (left := still_running(scratch)) and time.monotonic() < end: time.sleep(0.2)
    assert not left, "a kernel outlives its job"


def kill_reconstruction(scratch, times, rng, command=shell_command):
    out = scratch/"results"
    studies(scratch/"studies", ["anna"])
    run(command(scratch, "nearest"), scratch)
    good = {"nearest": files_of(out/"anna")}
    stages = stages_of(command(scratch, "linear"), scratch)
    good["linear"], kills, replaced = files_of(out/"anna"), [], 0
    while len(kills) < times:
        before, wanted, what = files_of(out/"anna"), next(m for m in METHODS if m != method_of(out/"anna")), tuple(stages)[len(kills) % 3]
        (seen, lasts), now = stages[what], partial(stage, out, time.time())
        kill = killed(command(scratch, wanted), scratch, lambda: seen(now()), rng.uniform(0, lasts), now)
        replaced += (new := look_at_result(out, before, wanted, good))
        if kill: kills.append(kill)
        else: assert new and {p.name for p in out.iterdir()} == {"anna"}
    run(command(scratch, wanted), scratch)
    assert look_at_result(out, {}, wanted, good) and {p.name for p in out.iterdir()} == {"anna"}
    return kills, dict(lost_results=0, replaced_all_the_same=replaced)


KINDS = dict(training=kill_training, evaluation=kill_evaluation, reconstruction=kill_reconstruction, reconstruction_job=partial(kill_reconstruction, command=job_command))


def kill(kind, times, seed, folder=None):
    "A kind of work killed so many times: what is to be recorded."
    began = time.monotonic()
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        kills, found = KINDS[kind](scratch := Path(scratch).resolve(), times, np.random.default_rng([seed, *kind.encode()]))
        wait_for_all(scratch)
    return dict(kills=len(kills), in_phase=dict(Counter(k.phase for k in kills)), moments_s=[k.at for k in kills]) | found | dict(seconds=round(time.monotonic() - began))


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--times", type=int, default=20)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    p.add_argument("--record")
    p.add_argument("--work", nargs=2, help=argparse.SUPPRESS)  # how this script starts what it kills
    p.add_argument("--samples", type=int, help=argparse.SUPPRESS)
    p.add_argument("--subjects", nargs="+", help=argparse.SUPPRESS)
    args = p.parse_args()
    if args.work: return work_train(Path(args.work[1]), args.samples) if args.work[0] == "train" else work_evaluate(Path(args.work[1]), args.subjects)
    found = dict(seed=args.seed, versions=dict(python=platform.python_version()) | {name: version(name) for name in ("mgdcr", "torch", "numpy", "papermill", "ipykernel")})
    for kind in args.kinds:
        found[kind] = kill(kind, args.times, args.seed)
        print(kind, json.dumps(found[kind]), flush=True)
    if args.record: Path(args.record).write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__": main()

"""What the scripts of data_prep share: the command line, checked NIfTI files, label files, parallel runs, one log.

A subject's folder appears whole, by one renaming, or not at all: a folder that is there is finished, and is skipped.
Label files lie beside the images they belong to, slice for slice and pixel for pixel:

    sax_labels_ed.nii.gz  sax_labels_es.nii.gz  lax_4ch_labels_ed.nii.gz …   1 RV cavity, 2 LV myocardium, 3 LV cavity
    labels.json           {"frames": {view: {"ed": frame, "es": frame}}, "group": the data set's diagnosis}
"""
import argparse, csv, hmac, itertools, json, multiprocessing, os, secrets, sys, tempfile, traceback
from collections import Counter
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import nibabel as nib
import numpy as np

from mgdcr.study import MAX_VALUES, Study, StudyError, safe_subject

RUNS = """A run may be stopped and started again: what is done is skipped. A table with the output, named after it or
after the script (.csv), says of every subject whether it is done, what was left out of it, and why."""
COLUMNS = ["subject", "status", "part", "why"]  # of the log; status: done, failed, left out, check


# The command line

def command(
    text: str,  # the help
    source: str,  # what the first argument is
    out: str = "where the study folders go, such as datasets",
) -> argparse.ArgumentParser:
    "A parser with what every script takes."
    parser = argparse.ArgumentParser(description=text, epilog=RUNS, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help=source)
    parser.add_argument("out", type=Path, help=out)
    parser.add_argument("--workers", type=int, default=1, help="subjects at a time (default 1)")
    return parser


def add_names(group) -> None:
    "The two ways in which a patient's identifier becomes the name of a folder."
    group.add_argument("--names", type=Path, metavar="CSV", help="your own names: a table with the columns id and name")
    group.add_argument("--key", type=Path, metavar="FILE",
                       help="names are a keyed hash (HMAC-SHA256) of the identifier; the secret key is made in FILE on "
                            "first use: keep it for the next run, and keep it apart from the output")


def namer(names: Path | None, key: Path | None, out: Path, prefix: str):
    "A function from an identifier to a folder's name; None for one that is not in the list of names."
    if names is not None:
        with open(names, newline="", encoding="utf-8-sig") as file: rows = list(csv.DictReader(file))
        if not rows or not {"id", "name"} <= set(rows[0]):
            raise StudyError(f"{names.name} needs the columns id and name, one row a patient.")
        known = {row["id"].strip(): safe_subject(row["name"].strip()) for row in rows}
        return known.get
    if key.resolve().is_relative_to(out.resolve()):
        raise StudyError(f"{key.name} would lie in the output folder, where it undoes the names: keep it elsewhere.")
    secret = read_key(key)
    return lambda identifier: prefix + hmac.new(secret, identifier.encode(), "sha256").hexdigest()[:12]


def read_key(path: Path) -> bytes:
    "The secret in a file; made, for its owner's eyes only, where there is none."
    try:
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(secrets.token_hex(32) + "\n")
    except FileExistsError: pass
    secret = path.read_text().strip().encode()
    if len(secret) < 16: raise StudyError(f"{path.name} is too short for a secret key: give 16 characters or more.")
    return secret


# NIfTI in

def find(folder: Path, stem: str) -> Path:
    "folder/stem.nii.gz or folder/stem.nii."
    for path in (folder/f"{stem}.nii.gz", folder/f"{stem}.nii"):
        if path.is_file(): return path
    raise StudyError(f"{stem}.nii.gz is missing.")


def load(path: Path):  # → nibabel image with its data in memory
    "Read one NIfTI file of at most four axes; `StudyError` where it cannot be."
    broken = StudyError(f"{path.name} cannot be read: it is truncated or no NIfTI file; copy it again.")
    try: image = nib.load(path)
    except Exception: raise broken from None
    if not 3 <= len(image.shape) <= 4 or min(image.shape) < 1 or np.prod(image.shape, dtype=float) > MAX_VALUES:
        raise StudyError(f"{path.name} declares {'×'.join(map(str, image.shape))} voxels, which no cine study has.")
    try: data = np.asarray(image.dataobj, np.float32)
    except Exception: raise broken from None
    if not np.isfinite(data).all(): raise StudyError(f"{path.name} holds pixels that are not numbers.")
    return nib.Nifti1Image(data, image.affine, image.header)


def header_affine(image) -> np.ndarray | None:  # (4, 4)
    """The affine that agrees with the voxel size, sform before qform; None where neither tells how the slices lie.

    A short-axis stack is never parallel to the axes of the body: an affine without a rotation was not measured.
    """
    zooms = np.array(image.header.get_zooms()[:3], float)
    for affine, code in (image.header.get_sform(coded=True), image.header.get_qform(coded=True)):
        if not code or not np.isfinite(affine).all(): continue
        lengths = np.linalg.norm(affine[:3, :3], axis=0)
        if not np.allclose(lengths, zooms, rtol=0.01): continue
        if not np.allclose(np.abs(affine[:3, :3]/lengths), np.eye(3), atol=1e-3): return affine
    return None


def frame_of(still: np.ndarray, film: np.ndarray, name: str) -> int:
    "The frame of a film (X, Y, Z, T) that a still (X, Y, Z) shows: the most alike, whatever the scale of its values."
    if still.size != film[..., 0].size or still.shape[:3] != film.shape[:3]:
        raise StudyError(f"{name} has another shape than the film.")
    with np.errstate(invalid="ignore"):  # a constant picture is like nothing
        alike = [np.nan_to_num(np.corrcoef(still.ravel(), frame.ravel())[0, 1]) for frame in np.moveaxis(film, -1, 0)]
    if max(alike) < 0.98: raise StudyError(f"{name} shows no frame of the film.")
    return int(np.argmax(alike))


def read_labels(path: Path, image, numbers: dict) -> np.ndarray:  # (X, Y, Z) uint8
    "Labels of one moment, checked against their image (nibabel) and renumbered."
    labels = load(path)
    data = np.asarray(labels.dataobj)
    data = data[..., 0] if data.ndim == 4 and data.shape[3] == 1 else data
    sizes = [np.array(i.header.get_zooms()[:3]) for i in (labels, image)]
    if data.shape != image.shape[:3] or not np.allclose(*sizes, rtol=0.01):
        raise StudyError(f"{path.name} has another shape or voxel size than its image.")
    own, theirs = header_affine(labels), header_affine(image)
    corners = np.array([*itertools.product(*([0, n] for n in data.shape), [1])])
    if own is not None and theirs is not None and np.abs((own - theirs) @ corners.T).max() > min(sizes[1])/2:
        raise StudyError(f"{path.name} lies elsewhere than its image.")
    if not set(np.unique(data)) <= {0, *numbers}: raise StudyError(f"{path.name} holds other labels than 0 to 3.")
    if not data.any(): raise StudyError(f"{path.name} is empty.")
    out = np.zeros(data.shape, np.uint8)
    for theirs, ours in numbers.items(): out[data == theirs] = ours
    return out


def base_first(labels: np.ndarray) -> bool:  # (X, Y, Z)
    "Whether slices run from base to apex: the ventricles taper."
    area = (labels > 0).sum((0, 1))
    area = area[area > 0]
    half = len(area)//2
    return bool(area[:half].sum() >= area[len(area) - half:].sum())


def study_of(films: dict, info: dict, subject: str) -> Study:
    "The study of films {view: (nibabel image, affine)} and of what study.json is to say, read and checked by `Study`."
    with tempfile.TemporaryDirectory() as folder:
        for view, (film, affine) in films.items():
            image = nib.Nifti1Image(np.asarray(film.dataobj), affine)
            image.header.set_zooms([*np.linalg.norm(affine[:3, :3], axis=0), *film.header.get_zooms()[3:]])
            image.header.set_xyzt_units("mm", film.header.get_xyzt_units()[1])
            nib.save(image, Path(folder)/f"{view}.nii")
        (Path(folder)/"study.json").write_text(json.dumps(info))
        study = Study.load(folder, subject)
    for view, (film, _) in films.items():
        if film.ndim == 4 and not 0.3 <= beat(film) <= 2.5:
            study.warnings.append(f"{view}: the file does not say how long the beat was; taken as one second.")
    return study


def beat(film) -> float:
    "Seconds that a film lasts, as its header says."
    unit = {"msec": 1e-3, "usec": 1e-6}.get(film.header.get_xyzt_units()[1], 1.0)
    return float(film.header.get_zooms()[3])*unit*film.shape[3]


# Labels out

def write_labels(folder: Path, labels: dict, frames: dict, group: str) -> None:
    "Labels {(view, 'ed' or 'es'): (X, Y, Z)} beside the images of a saved study, and labels.json."
    for (view, phase), data in labels.items():
        one = folder/f"{view}.nii.gz"
        for n, path in enumerate([one] if one.exists() else sorted(folder.glob(f"{view}_[0-9][0-9]*.nii.gz"))):
            part = data if path == one else data[..., n:n + 1]
            image = nib.Nifti1Image(np.ascontiguousarray(part), nib.load(path).affine)
            image.header.set_xyzt_units("mm")
            nib.save(image, folder/path.name.replace(view, f"{view}_labels_{phase}", 1))
    told = dict(frames={v: {p: frames[v, p] for w, p in labels if w == v} for v, _ in labels}, group=group)
    (folder/"labels.json").write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")


# Many subjects

def run(
    convert,  # (source, subject, folder to write, notes) → None; notes takes rows (status, part, why)
    jobs: list,  # (subject, source) pairs
    out: Path,
    log: str,  # the log's name without .csv
    workers: int = 1,
    left_out=(),  # what was left out without being of any subject, sentences
) -> int:  # exit status: 0 where nothing failed, else 1
    "Convert every subject that is not there yet; one that fails is logged and stops nothing."
    (most, count), = Counter(subject for subject, _ in jobs).most_common(1)
    if count > 1: raise StudyError(f"Two subjects would be called {most}: give them names of their own.")
    out.mkdir(parents=True, exist_ok=True)
    todo = [(subject, source) for subject, source in jobs if not (out/subject/"study.json").exists()]
    path, failed = out/f"{log}.csv", 0
    _forget(path, {"", *(subject for subject, _ in todo)})
    with open(path, "a", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(["", "left out", "", why] for why in left_out)
        for subject, status, notes in _results(convert, todo, out, workers):
            failed += status == "failed"
            csv.writer(file).writerows([subject, *row] for row in notes)
            file.flush()
            if status == "failed": print(f"{subject}: {notes[-1][2]}", file=sys.stderr)
    print(f"{len(todo) - failed} done, {len(jobs) - len(todo)} there already, {failed} failed; "
          f"{path.name} says what was left out.")
    return int(failed > 0)


def _forget(path, subjects):
    "Begin a log, or take the rows of some subjects out of it."
    rows = []
    if path.exists():
        with open(path, newline="", encoding="utf-8") as file:
            rows = [row for row in csv.reader(file) if row and row[0] not in subjects and row != COLUMNS]
    part = path.with_suffix(".part")
    with open(part, "w", newline="", encoding="utf-8") as file: csv.writer(file).writerows([COLUMNS, *rows])
    os.replace(part, path)


def _results(convert, jobs, out, workers):
    "(subject, status, rows of the log) of each job, as they come."
    if workers <= 1:
        for job in jobs: yield (job[0], *_one(convert, *job, out))
        return
    died, context = [], multiprocessing.get_context("spawn")  # fresh processes: no thread is copied half-way
    with ProcessPoolExecutor(workers, context) as pool:
        futures = {pool.submit(_one, convert, *job, out): job for job in jobs}
        for future in as_completed(futures):
            try: yield (futures[future][0], *future.result())
            except BrokenProcessPool: died.append(futures[future])
    for job in died:  # one of them killed its process, the others were beside it: each gets a process of its own
        with ProcessPoolExecutor(1, context) as pool:
            try: yield (job[0], *pool.submit(_one, convert, *job, out).result())
            except BrokenProcessPool:
                yield job[0], "failed", [("failed", "", "The process died: there may not be enough memory.")]


def _one(convert, subject, source, out):
    "(status, rows of the log) of one subject; its folder appears whole or not at all."
    notes = []
    try:
        if (out/subject).exists():
            raise StudyError(f"{subject} is there already without a study.json: move it away.")
        with tempfile.TemporaryDirectory(prefix=".prep-", dir=out) as scratch:
            folder = Path(scratch)/subject
            convert(source, subject, folder, notes)
            os.replace(folder, out/subject)
        return "done", [*notes, ("done", "", "")]
    except StudyError as error: return "failed", [*notes, ("failed", "", str(error))]
    except Exception as error:  # its text may hold a path, and a path a name: only where it happened is told
        print("".join(traceback.format_tb(error.__traceback__)), type(error).__name__, file=sys.stderr)
        return "failed", [*notes, ("failed", "", f"An unexpected {type(error).__name__}; the terminal says where.")]


def main(script) -> int:
    "Run a script's function: bad input is one sentence and exit status 2."
    try: return script()
    except (StudyError, OSError) as error:
        print(error if isinstance(error, StudyError) else f"{type(error).__name__}: {error.strerror}", file=sys.stderr)
        return 2

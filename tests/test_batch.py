"""Many cases: a crash is one case's own and is tried again, what failed is named, nothing is done twice; on this machine and on a cluster."""
import os, signal, time
from pathlib import Path

import pytest

from mgdcr.batch import each, read_table
from mgdcr.dicom import StudyError


def killed_once(name, folder):
    "Rows, but for the first time that a 'bert' is asked for: then its process is killed, as a machine short of memory does."
    with open(Path(folder)/f"{name}.asked", "a") as file: file.write("x")
    if name == "bert" and len((Path(folder)/"bert.asked").read_text()) == 1: os.kill(os.getpid(), signal.SIGKILL)
    return [dict(subject=name, pid=os.getpid(), value=0.5)]


def refused(name): raise StudyError(f"{name} has no slices.")


def slow(name, folder):
    (Path(folder)/f"{name}.{os.getpid()}").touch()
    time.sleep(1.5)
    return [dict(subject=name, pid=os.getpid())]


CASES = "anna", "bert", "carl"


def asked(folder): return {name: len((folder/f"{name}.asked").read_text()) for name in CASES}


def test_a_killed_process_is_tried_again_and_costs_the_others_nothing(tmp_path):
    rows, failed = each(killed_once, [(name, str(tmp_path)) for name in CASES], tmp_path/"rows.csv", workers=2)
    assert not failed and sorted(row["subject"] for row in rows) == list(CASES) and len({row["pid"] for row in rows} - {os.getpid()}) == 3
    assert read_table(tmp_path/"rows.csv") == rows and asked(tmp_path) == dict(anna=1, bert=2, carl=1)


def test_what_fails_is_named_once_the_rest_is_kept(tmp_path):
    rows, failed = each(killed_once, [(name, str(tmp_path)) for name in CASES], tmp_path/"rows.csv", retries=0)
    assert [row["subject"] for row in rows] == ["anna", "carl"] and list(failed) == [("bert", str(tmp_path))] and "terminated" in failed["bert", str(tmp_path)]
    rows, failed = each(killed_once, [("bert", str(tmp_path))], tmp_path/"rows.csv")
    assert not failed and [row["subject"] for row in read_table(tmp_path/"rows.csv")] == ["anna", "carl", "bert"]
    assert each(refused, [("anna",)])[1] == {("anna",): "anna has no slices."}


def test_a_scheduler_that_is_not_there_is_said_so():
    pytest.importorskip("distributed", reason="dask.distributed is not installed here")
    with pytest.raises(StudyError, match="127.0.0.1:1.*dask scheduler"): each(refused, [("anna",)], scheduler="tcp://127.0.0.1:1")


def test_on_a_cluster_of_two_a_worker_is_killed_midway_and_nothing_is_done_twice(tmp_path):
    distributed = pytest.importorskip("distributed", reason="dask.distributed is not installed here")
    with distributed.LocalCluster(n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None) as cluster:
        pids, kept, killed = list(distributed.Client(cluster).run(os.getpid).values()), [], []
        def kill_one(record):
            kept.append(record["stage"].split()[0])
            if len(kept) == 3:
                running = {int(path.suffix[1:]) for path in tmp_path.glob("*.[0-9]*")}
                killed.append(next(pid for pid in pids if pid in running))
                os.kill(killed[0], signal.SIGKILL)
        rows, failed = each(slow, [(f"case-{n}", str(tmp_path)) for n in range(8)], tmp_path/"rows.csv", scheduler=cluster.scheduler_address, progress=kill_one)
    assert not failed and killed and sorted(row["subject"] for row in rows) == [f"case-{n}" for n in range(8)]
    begun = [path.stem for path in tmp_path.glob("*.[0-9]*")]
    assert len(begun) > 8 and all(begun.count(name) == 1 for name in kept[:3])
    assert read_table(tmp_path/"rows.csv") == rows


def no_note(name): return [dict(subject=name, note="", value=0.1234567)]


def test_names_that_look_like_numbers_stay_names_and_a_row_stays_as_it_was_written(tmp_path):
    names, record = ["007", "1234567_20208_2_0", "2345678", "1e3", "nan"], tmp_path/"rows.csv"
    for n, name in enumerate(names):
        before = record.read_bytes() if n else b""
        each(no_note, [(name,)], record)
        assert record.read_bytes().startswith(before)
    assert [row["subject"] for row in read_table(record)] == names

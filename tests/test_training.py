"""Training: killed and carried on to the bit, shared by two processes, stopped by a number that is none."""
import csv
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from mgdcr.dataset import SliceRecord, write_lmdb
from mgdcr.diffae import load_official
from mgdcr.dicom import StudyError
from mgdcr.training import Recipe, Stream, Validation, begin, main, pace, read_log, train
from mgdcr.unet import NETWORKS, UNet

SMALL = replace(NETWORKS["cine128_compact"], channels=16, embed=32, z=16, dropout=0.1)

# A process of its own that knows the small network; what follows is `python -m mgdcr.training`'s arguments.
PROGRAM = """
import sys, torch
from dataclasses import replace
torch.set_num_threads(1)
from mgdcr.unet import NETWORKS
NETWORKS["small"] = replace(NETWORKS["cine128_compact"], channels=16, embed=32, z=16, dropout=float(sys.argv[1]))
from mgdcr import training
if sys.argv[2] == "often": training.train.__defaults__ = tuple(0.0 if d == 2.0 else d for d in training.train.__defaults__)  # save each step
sys.exit(training.main(sys.argv[3:]))
"""


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setitem(NETWORKS, "small", SMALL)
    monkeypatch.setitem(os.environ, "OMP_NUM_THREADS", "1")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    def pictures(subject):
        rng = np.random.default_rng(int(subject.split("-")[1]))
        for n in range(6):
            image = rng.uniform(-1, 1, (8, 8)).astype(np.float32).repeat(16, 0).repeat(16, 1)
            thin = SliceRecord(subject, "sax", "thin", pair=n, slice=n, s=n / 6, heart="healthy phantom")
            yield thin, image
            yield replace(thin, kind="acquired"), np.clip(image + 0.1, -1, 1)
    path = tmp_path_factory.mktemp("data") / "x.lmdb"
    names = [f"phantom-{n}" for n in (100, 10_000, 10_001)]
    write_lmdb(path, [(name, lambda name=name: pictures(name)) for name in names])
    return path


def command(data, folder, samples, how="seldom", dropout=0.1, **options):
    options = dict(data=data, network="small", samples=samples, batch=4, warmup=16, precision="float32", device="cpu",
                   folder=folder / "checkpoint", log=folder / "log") | options
    return [sys.executable, "-c", PROGRAM, str(dropout), how, *(str(x) for k, v in options.items() for x in (f"--{k}", v))]


def losses(folder): return [row["loss"] for row in read_log(folder / "log" / "losses.csv")]


def test_a_run_killed_at_any_moment_ends_where_an_uninterrupted_one_does(tmp_path, data):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    subprocess.run(command(data, whole, 72), check=True, capture_output=True)
    checkpoint, rng = parts / "checkpoint" / "last.ckpt", np.random.default_rng(0)
    killed = 0
    for _ in range(40):
        process = subprocess.Popen(command(data, parts, 72, "often"), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        before = load_official(checkpoint).card["samples"] if checkpoint.exists() else 0
        while process.poll() is None and not (checkpoint.exists() and _samples(checkpoint) > before): time.sleep(0.02)
        time.sleep(rng.uniform(0, 0.15))
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            killed += 1
        out, error = process.communicate()
        if process.returncode == 0: break
        assert process.returncode == -signal.SIGKILL, error.decode()
        load_official(checkpoint)  # never torn
    assert process.returncode == 0 and killed >= 2
    ours, theirs = (load_official(f / "checkpoint" / "last.ckpt").network.state_dict() for f in (whole, parts))
    assert all(torch.equal(ours[k], theirs[k]) for k in ours)
    assert losses(whole) == losses(parts) and len(losses(whole)) == 18
    assert not [p.name for p in (parts / "checkpoint").iterdir() if p.name not in ("last.ckpt", ".last.ckpt.partial")]


def _samples(path):
    try: return load_official(path).card["samples"]
    except StudyError: return -1  # it was just being replaced


def test_two_processes_see_what_one_does(tmp_path, data):
    one, two = tmp_path / "one", tmp_path / "two"
    subprocess.run(command(data, one, 200, dropout=0), check=True, capture_output=True)
    call = command(data, two, 200, dropout=0)
    script = tmp_path / "program.py"
    script.write_text(PROGRAM)
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "--num_machines", "1",
              "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0", str(script), *call[3:]]
    done = subprocess.run(launch, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    a, b = (np.array(losses(f), float) for f in (one, two))
    assert len(a) == len(b) == 50
    np.testing.assert_allclose(a, b, rtol=1e-4)


def test_a_loss_that_is_no_number_stops_the_run_and_says_so(tmp_path, data, monkeypatch):
    recipe = Recipe(str(data), "small", samples=40, batch=4, precision="float32")
    train(replace(recipe, samples=8), tmp_path, device="cpu")
    good = (tmp_path / "last.ckpt").read_bytes()
    stream = Stream.__getitem__
    monkeypatch.setattr(Stream, "__getitem__", lambda self, n: {k: v * float("nan") if k == "noise" and n == 17 else v for k, v in stream(self, n).items()})
    with pytest.raises(StudyError, match="At sample 16 the loss is nan"): train(recipe, tmp_path, device="cpu")
    assert (tmp_path / "last.ckpt").read_bytes() == good


def test_a_run_is_not_carried_on_as_another(tmp_path, data):
    recipe = Recipe(str(data), "small", samples=8, batch=4, precision="float32")
    train(recipe, tmp_path, device="cpu")
    for change in (dict(init=str(tmp_path / "last.ckpt")), dict(lr=2e-3), dict(seed=1)):
        with pytest.raises(StudyError, match="another recipe"): train(replace(recipe, samples=16, **change), tmp_path, device="cpu")


def test_a_card_does_not_call_acquired_slices_thin(tmp_path):
    def pictures():
        for n in range(4): yield SliceRecord("phantom-10003", "sax", "acquired", pair=n, slice=n, s=n / 4, spacing_mm=1.2, heart="patient"), np.zeros((128, 128), np.float32)
    write_lmdb(tmp_path / "x.lmdb", [("phantom-10003", pictures)])
    card = train(Recipe(str(tmp_path / "x.lmdb"), "small", samples=4, batch=4, precision="float32"), device="cpu").card()
    assert card["acquired"] and card["slab_mm"] is None and card["pixel_mm"] == 1.2


def test_accumulated_parts_are_one_batch(data):
    recipe = Recipe(str(data), "small", samples=24, batch=8, precision="float32", varied=False)
    NETWORKS["small"] = replace(SMALL, dropout=0.0)  # the fixture puts the other one back
    one, two = train(recipe, device="cpu"), train(replace(recipe, accumulate=2), device="cpu")
    for k, v in one.network.state_dict().items(): torch.testing.assert_close(v, two.network.state_dict()[k], rtol=1e-3, atol=2e-5)


def test_bf16_learns_as_float32_does(data):
    recipe = Recipe(str(data), "small", samples=400, batch=8, varied=False, lr=2e-3)
    check = Validation(recipe)
    scores = {p: np.mean([row["psnr"] for row in check(train(replace(recipe, precision=p), device="cpu").learnt())]) for p in ("bf16", "float32")}
    new = np.mean([row["psnr"] for row in check(begin(recipe).learnt())])
    assert min(scores.values()) > new + 0.4 and abs(scores["bf16"] - scores["float32"]) < 0.5


@pytest.mark.parametrize("change, words", [
    (dict(network="none"), "network='none'"), (dict(target="thick"), "target='thick'"), (dict(precision="fp8"), "precision"),
    (dict(samples=0), "budget"), (dict(minutes=3.0), "budget"), (dict(accumulate=3), "accumulate|parts"), (dict(lr=0.0), "lr"), (dict(ema=1.0), "ema")])
def test_recipes_that_cannot_be_are_refused(change, words):
    with pytest.raises(StudyError, match=words): replace(Recipe(samples=4), **change)


def test_data_that_is_not_there_is_told(tmp_path, data, capsys):
    assert main(["--data", str(tmp_path / "none.lmdb"), "--samples", "4", "--folder", str(tmp_path), "--log", str(tmp_path)]) == 2
    assert "none.lmdb" in capsys.readouterr().err
    with pytest.raises(StudyError, match="no prior"): train(Recipe(str(data), "small", samples=4, init="nobody"), device="cpu")
    with pytest.raises(StudyError, match="another network"):
        torch.manual_seed(0)
        from mgdcr.diffae import Prior, save_prior
        save_prior(Prior(UNet(replace(SMALL, channels=32))), tmp_path / "wide.safetensors")
        train(Recipe(str(data), "small", samples=4, init=str(tmp_path / "wide.safetensors")), device="cpu")


def test_the_rate_rises_stays_and_falls():
    recipe = Recipe(samples=1000, batch=10, warmup=100, cooldown=0.5)
    rates = [pace(recipe, n, 0) for n in range(0, 1000, 10)]
    assert rates[0] == 0.1 and max(rates) == 1.0 and rates[20] == rates[49] == 1.0
    assert all(a >= b for a, b in zip(rates[50:], rates[51:])) and rates[-1] < 0.03
    assert pace(replace(recipe, samples=0, minutes=10.), 500, 7.5) == 0.5


@pytest.mark.parametrize("minutes", [5.0, 1e-9])
def test_no_validation_is_logged_twice(tmp_path, data, minutes):
    recipe = Recipe(str(data), "small", samples=8, batch=4, precision="float32")
    for stop in (None, lambda run: False): train(recipe, tmp_path, tmp_path / "log", device="cpu", validate_minutes=minutes, stop=stop)  # killed after its last checkpoint, it is started again
    rows = [(row["samples"], row["t"]) for row in read_log(tmp_path / "log" / "validation.csv")]
    assert len(set(rows)) == len(rows) == (6 if minutes == 5 else 12)

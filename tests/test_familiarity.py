"""Does a study look like what the prior learned from: ordinary hearts do, four strange kinds are told apart or not as documented."""
import json
import time
from pathlib import Path

import numpy as np
import pytest

from mgdcr.diffae import load_prior, sha256_of, weights_file
from mgdcr.familiarity import PRIOR, REFERENCE_SEEDS, STRANGE, TIMES, familiarity, reference_file, shown, thick_walled
from mgdcr.heart import digital_heart
from mgdcr.inverse import study_of
from mgdcr.label_heart import shared_map
from mgdcr.scanner import phantom_study
from mgdcr.study import Study

REAL = Path(__file__).parents[1]/"../shared/data/real_study/dicom"


@pytest.fixture(scope="module")
def prior(): return load_prior(PRIOR, bf16=False)


@pytest.fixture(scope="module")
def study(): return phantom_study(154, reference=False)


def test_the_reference_is_of_the_prior_that_ships_and_of_tuning_hearts_only():
    reference = json.loads(reference_file().read_text())
    assert reference["prior_sha256"] == sha256_of(weights_file(PRIOR)) and reference["times"] == list(TIMES)
    assert reference["subjects"] == [f"phantom-{n}" for n in REFERENCE_SEEDS] and set(REFERENCE_SEEDS) <= set(range(100, 200))
    assert all(len(q) == 101 and (np.diff(q) >= 0).all() and 0 < q[0] for q in reference["quantiles"])


def test_an_ordinary_study_is_familiar_and_told_so_quickly_and_always_alike(study):
    start = time.perf_counter()
    found = familiarity(study)
    assert time.perf_counter() - start < 30  # 5 s on a core of its own
    assert not found.strange and "tv" not in found.sentence and len(found.rows) == len(study.sax.images)
    assert familiarity(study).rows == found.rows
    assert json.loads(json.dumps(found.summary()))["slices"] == found.rows


@pytest.mark.parametrize("kind", STRANGE)
def test_a_strange_study_is_called_strange_and_tv_is_recommended(kind, study, prior):
    found = familiarity(shown(study, STRANGE[kind]), prior=prior)
    assert found.strange and found.unlike > len(found.rows)/3 and 'method="tv"' in found.sentence
    assert f"{found.unlike} of {len(found.rows)}" in found.sentence


def test_thick_walls_are_familiar(prior):
    "The prior learned from hypertrophic hearts, and reads walls twice as thick as well as theirs: the error says nothing of thickness."
    for heart in (digital_heart(153, "hypertrophic"), thick_walled(153)):
        assert not familiarity(phantom_study(153, heart=heart, reference=False), prior=prior).strange


def test_systole_and_a_film_are_familiar_too(prior):
    film = phantom_study(156, frames=3, reference=False, views=("sax",))
    assert not any(familiarity(film, frame, prior=prior).strange for frame in (0, 1))


@pytest.mark.skipif(not shared_map(9).is_file(), reason="the published anatomies are not here")
def test_a_published_anatomy_is_familiar(prior): assert not familiarity(study_of("heart-09", reference=False)[0], prior=prior).strange


@pytest.mark.skipif(not REAL.is_dir(), reason="the real study is not here")
def test_the_real_study_gets_an_answer(prior):
    found = familiarity(Study.load(REAL), prior=prior)
    assert len(found.rows) == 6 and all(0 <= p <= 100 for row in found.rows for p in row["percentiles"])

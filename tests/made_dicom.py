"A made-up patient's cine study as tiny DICOM files, for the tests: a ring that beats, in any planes."
from pathlib import Path

import numpy as np
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.sequence import Sequence
from pydicom.uid import EnhancedMRImageStorage, ExplicitVRLittleEndian, MRImageStorage, generate_uid

AXIS = np.array([-0.5, 0.6, -0.62])/np.linalg.norm([-0.5, 0.6, -0.62])  # base to apex, RAS
UP = np.array([0, 1.0, 1.0]) - (np.array([0, 1.0, 1.0]) @ AXIS)*AXIS
UP /= np.linalg.norm(UP)
SIZE, PIXEL, FRAMES = 48, 3.0, 6


def hand(degrees):
    "The direction of a clock's hand on the short axis, seen from the apex."
    return np.cos(np.radians(degrees))*UP + np.sin(np.radians(degrees))*np.cross(-AXIS, UP)


def ring(t, frames=FRAMES, shape=(SIZE, SIZE), pixel=PIXEL):
    "One frame of a beating ventricle."
    y, x = np.mgrid[:shape[0], :shape[1]]
    r = pixel*np.hypot(y - (shape[0] - 1)/2, x - (shape[1] - 1)/2)
    inner = 19 + 5*np.cos(2*np.pi*t/frames)
    noise = np.random.default_rng(t).normal(0, 3, shape)
    return np.clip(np.where(r < inner, 200, np.where(r < 32, 60, 30)) + noise, 0, None)


def geometry(normal, centre, shape=(SIZE, SIZE), pixel=PIXEL):
    "DICOM position and orientation (LPS) of a plane given by its normal and centre in RAS."
    row = np.cross(normal, [0.3, 0.5, 0.8])
    row /= np.linalg.norm(row)
    column = np.cross(normal, row)
    first = np.asarray(centre) - pixel*(row*(shape[1] - 1)/2 + column*(shape[0] - 1)/2)
    lps = np.array([-1, -1, 1])
    return (first*lps).tolist(), [*(row*lps), *(column*lps)]


def dataset(path, storage=MRImageStorage, syntax=ExplicitVRLittleEndian, **values):
    meta = FileMetaDataset()
    meta.TransferSyntaxUID, meta.MediaStorageSOPClassUID = syntax, storage
    meta.MediaStorageSOPInstanceUID = generate_uid()
    ds = FileDataset(str(path), {}, file_meta=meta, preamble=bytes(128))
    common = dict(SOPClassUID=storage, SOPInstanceUID=meta.MediaStorageSOPInstanceUID, Modality="MR", PatientID="p",
                  SamplesPerPixel=1, PhotometricInterpretation="MONOCHROME2", BitsAllocated=16, BitsStored=16,
                  HighBit=15, PixelRepresentation=0)
    for key, value in (common | values).items(): setattr(ds, key, value)
    return ds


def save(ds, path):
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    ds.save_as(path, enforce_file_format=True)


def write_slice(folder, number, normal, centre, frames=FRAMES, shape=(SIZE, SIZE), pixel=PIXEL, rr=900.0,
                description="", **more):
    "One series of one slice, one file a frame."
    position, orientation = geometry(normal, centre, shape, pixel)
    for t in range(frames):
        pixels = ring(t, frames, shape, pixel).astype(np.uint16)
        values = dict(SeriesInstanceUID=f"1.2.3.{number}", SeriesNumber=number, InstanceNumber=t + 1,
                      SeriesDescription=description, SliceThickness=8, PixelSpacing=[pixel, pixel],
                      ImagePositionPatient=position, ImageOrientationPatient=orientation, Rows=shape[0],
                      Columns=shape[1], TriggerTime=t*rr/frames, NominalInterval=int(rr), PixelData=pixels.tobytes())
        path = Path(folder)/f"{number}_{frames - t}.dcm"
        save(dataset(path, **(values | more)), path)


def write_study(folder, sax=4, lax=((101, 25), (102, 85), (103, 145)), gap=10.0, **more):
    "A stack of `sax` slices (series 1, 2, … from the base) and long-axis slices by number and clock angle."
    centre = gap*(sax - 1)/2*AXIS
    for n in range(sax): write_slice(folder, n + 1, AXIS, n*gap*AXIS, rr=800.0 + 20*n, **more)
    for number, degrees in lax: write_slice(folder, number, np.cross(AXIS, hand(degrees)), centre, **more)
    return Path(folder)


def item(**values):
    ds = Dataset()
    for key, value in values.items(): setattr(ds, key, value)
    return Sequence([ds])


def write_enhanced(path, number, slices, frames=FRAMES):
    "One enhanced multi-frame file that holds several slices, frames in mixed order; slices: (normal, centre)."
    places = [(s, t) for t in range(frames) for s in range(len(slices))]
    pixels, groups = [], []
    for s, t in places:
        position, orientation = geometry(*slices[s])
        group = Dataset()
        group.PlanePositionSequence = item(ImagePositionPatient=position)
        group.PlaneOrientationSequence = item(ImageOrientationPatient=orientation)
        group.CardiacSynchronizationSequence = item(NominalCardiacTriggerDelayTime=t*850.0/frames,
                                                    RRIntervalTimeNominal=850.0)
        group.PixelValueTransformationSequence = item(RescaleSlope=0.5, RescaleIntercept=float(s), RescaleType="US")
        groups.append(group)
        pixels.append(ring(t, frames).astype(np.uint16))
    shared = Dataset()
    shared.PixelMeasuresSequence = item(PixelSpacing=[PIXEL, PIXEL], SliceThickness=8.0)
    shared.MRFOVGeometrySequence = item(InPlanePhaseEncodingDirection="COLUMN", MRAcquisitionFrequencyEncodingSteps=48,
                                        MRAcquisitionPhaseEncodingStepsInPlane=32)
    ds = dataset(path, EnhancedMRImageStorage, SeriesInstanceUID=f"1.2.3.{number}", SeriesNumber=number,
                 InstanceNumber=1, NumberOfFrames=len(places), Rows=SIZE, Columns=SIZE,
                 PixelData=np.stack(pixels).tobytes())
    ds.PerFrameFunctionalGroupsSequence, ds.SharedFunctionalGroupsSequence = Sequence(groups), Sequence([shared])
    save(ds, path)

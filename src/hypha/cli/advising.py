"""What ``hypha-data advise`` prints."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

from hypha.data.manifest import read_manifest
from hypha.data.serving.slice_advice import Fit, SliceAdvice, TrainingPace, advise, fit
from hypha.errors import DataError
from hypha.messages import Manifest


def advise_slices(pace: TrainingPace, directory: Path | None, as_json: bool) -> str:
    """The advice for ``pace``, whose samples are those of the dataset in ``directory`` where one is given.
    Raises DataError.
    """
    manifest = None
    if directory is not None:
        manifest = read_manifest(directory)
        pace = replace(pace, sample_bytes=_sample_bytes(directory, manifest), dataset_bytes=_bytes(manifest))
    advice = advise(pace)
    fitting = fit(manifest, pace, advice) if manifest is not None else None
    if as_json:
        found = {**asdict(advice), "fit": None}
        if fitting is not None:
            found["fit"] = {**asdict(fitting), "fits": fitting.fits}
        return json.dumps(found, indent=1)
    return "\n".join(_lines(advice, fitting, directory))


def _lines(advice: SliceAdvice, fitting: Fit | None, directory: Path | None) -> list[str]:
    lines = [
        f"slices of {advice.slice_mb:g} MB: hypha-data prepare --slice-mb {advice.slice_mb:g} (or "
        f"--slice-samples {advice.slice_samples})",
        f"each is trained on for {advice.lasts_s:.3g} s, and fetched in {advice.fetched_in_s:.2g} s when all "
        "workers fetch",
        *(f"because {text}" for text in advice.because),
        *(f"problem: {text}" for text in advice.problems),
    ]
    if fitting is not None:
        size = f"{directory}: {fitting.slices} slices of {fitting.mean_mb:.2g} MB"
        lines += [f"{size} fit"] if fitting.fits else [f"{size} do not fit"]
        lines += [f"problem: {text}" for text in fitting.problems]
    return lines


def _bytes(manifest: Manifest) -> float:
    return float(sum(part.size for part in manifest.slices))


def _sample_bytes(directory: Path, manifest: Manifest) -> float:
    if not manifest.samples:
        raise DataError(f"{directory} has no samples; prepare it again")
    return _bytes(manifest) / manifest.samples

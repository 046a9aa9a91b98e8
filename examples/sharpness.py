"""A metric: the mean strength of edges, in grey levels."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from PIL import Image

from coz.metrics import Sample


class Sharpness:
    """Follows `coz.metrics.Metric`."""

    name = "sharpness"  # in rows.csv
    label = "Sharpness"  # in tables
    higher_is_better = True
    worst = 0.0  # what a photograph that failed counts

    @property
    def identity(self) -> Mapping[str, object]:
        """Stands in every row: values of another formula are never mixed with these."""
        return {"metric": "sharpness", "of": "gradient of the mean of R, G, B"}

    def __call__(self, sample: Sample) -> float:
        """A sample also has `parent`, `view`, `start` and `region`, and `truth` where there is one."""
        with Image.open(sample.image) as image:
            grey = np.asarray(image.convert("RGB"), dtype=np.float64).mean(2)
        rows, columns = np.gradient(grey)
        return float(np.hypot(rows, columns).mean())

"""FID and its relatives to one reference, through scripts/metrics."""

from hashlib import sha256
from pathlib import Path
from typing import Any

from ..common.errors import RunError
from ..common.reference import full_statistics
from ..experiment.runs import surplus_images
from ..metrics import evaluate
from ..metrics.inception import InceptionFeatures, prepare_inception
from ..metrics.inputs import list_images, open_source


def _digest(path: Path) -> str:
    """Digest of a file, or of all images of a folder."""
    digest = sha256()
    for file in list_images(path) if path.is_dir() else [path]:
        digest.update(file.read_bytes())
    return digest.hexdigest()


class Scorer:
    """Measures what the reference and the Inception weights allow: sfid needs the statistics'
    mu_s, precision the reference images, is the classifier."""

    def __init__(self, reference: str, device: str):
        self.name = Path(reference).name
        self.reference = full_statistics(reference)
        source = open_source(self.reference)
        self.sha256 = _digest(Path(reference))
        self.network = InceptionFeatures(prepare_inception(), device)
        possible = {
            "fid": True,
            "sfid": source.statistics is None or source.statistics.mu_s is not None,
            "is": self.network.has_classifier,
            "precision": source.images is not None,
        }
        self.metrics = [name for name, there in possible.items() if there]

    def settings(self, count: int) -> dict[str, Any]:
        """The settings that the scores depend on besides the images."""
        return {"count": count, "reference_sha256": self.sha256, "metrics": self.metrics}

    def score(self, folder: Path, count: int) -> dict[str, Any]:
        if surplus := surplus_images(folder, count):
            raise RunError(
                f"{folder}: holds {len(surplus)} images more than the {count} asked for, such as "
                f"{surplus[0]}, and a score counts them all; --count {count + len(surplus)} uses "
                "those of this run, others must lie elsewhere"
            )
        result = evaluate(
            self.reference, folder, self.metrics, inception=self.network, progress=False
        )
        kept = {name: result[name] for name in self.metrics}
        return kept | {"reference": self.name, "images": result["images"], "notes": result["notes"]}

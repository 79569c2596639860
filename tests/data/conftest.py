"""What the tests of loading share."""

import pytest
from made import mask, pictures


@pytest.fixture(autouse=True)
def no_cache(monkeypatch):
    monkeypatch.setenv("JAXAD_CACHE", "off")


@pytest.fixture
def mvtec(tmp_path):
    """6 normal training pictures, 2 normal and 3 anomalous test pictures with masks."""
    root = tmp_path / "bottle"
    pictures(root / "train/good", 6)
    pictures(root / "test/good", 2)
    pictures(root / "test/crack", 3)
    for i in range(3):
        mask(root / f"ground_truth/crack/{i:03d}_mask.png")
    return root

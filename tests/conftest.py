"""What every test shares: no test asks a model hub for anything."""
import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before huggingface_hub is imported, which reads it once
os.environ.setdefault("MPLBACKEND", "agg")

LONGEST = ("browser", "cli", "trainer", "benchmark", "baselines", "tuner", "readme", "memory", "evaluate",
           "imports")


def pytest_collection_modifyitems(items):
    "The longest files begin first: two processes that take a file at a time then end together."
    place = {f"test_{name}.py": i for i, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.name, len(place)))

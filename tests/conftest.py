"""What every test shares: no test asks a model hub for anything."""
import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before huggingface_hub is imported, which reads it once
os.environ.setdefault("MPLBACKEND", "agg")

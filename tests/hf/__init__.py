"""Models of transformers, built from configurations: nothing is downloaded, and without the package nothing runs."""

import os

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"  # before its first import
pytest.importorskip("transformers", reason="comes with the extra hf")

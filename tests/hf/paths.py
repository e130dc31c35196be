"""Where processes of these tests find what they import: transformers may be in a folder of its own."""

import os
from pathlib import Path

import transformers

from tests.processes import ROOT

PYTHONPATH = os.pathsep.join([str(ROOT), str(Path(transformers.__file__).parents[1])])

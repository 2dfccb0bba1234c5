"""Write the list of passes: python -m onnxq_plugins.olive OUT.json [BASE.json]."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from onnxq_plugins.files import write_file
from onnxq_plugins.olive.packages import package_config

if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        sys.exit("usage: python -m onnxq_plugins.olive OUT.json [BASE.json]")
    config = package_config(*sys.argv[2:])
    write_file(json.dumps(config, indent=2).encode(), Path(sys.argv[1]))

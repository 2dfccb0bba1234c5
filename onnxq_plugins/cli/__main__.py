"""python -m onnxq_plugins.cli"""

from onnxq_plugins.cli import main

main()

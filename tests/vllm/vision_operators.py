"""For the environment of ``make test-vllm`` alone: lets torchvision be imported beside the CPU build of torch.

transformers' and vLLM's imports want torchvision, whose build for this torch lacks compiled operators; two of their
schemas are enough for the import, and nothing here calls them. A ``.pth`` file runs this at the start of Python.
"""

import sys
from importlib.abc import MetaPathFinder


class BeforeTorchvision(MetaPathFinder):
    """Finds nothing; defines the operators when torchvision is looked for."""

    def find_spec(self, name, path=None, target=None):
        if name == "torchvision" and self in sys.meta_path:
            sys.meta_path.remove(self)
            import torch

            self.__class__.library = library = torch.library.Library("torchvision", "DEF")
            for operator in ("nms", "qnms"):
                library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        return


sys.meta_path.insert(0, BeforeTorchvision())

"""Load a packed model file and classify a dataset's test images with it.

    python examples/predict.py runs/digits-random_padding/model.safetensors

Nothing of the training run is read but the file: the model's class, its arguments, the bits, the
prototype and the norms' statistics are all in it.
"""

import argparse
import sys
import time
from pathlib import Path

import numpy as np
import torch

import masked_kernels as mk
from masked_kernels.training import SOURCES, Normalize, load_splits, predict


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path, help="a file that examples/train.py wrote")
    parser.add_argument("--dataset", default="digits", choices=tuple(SOURCES))
    parser.add_argument("--data", type=Path, metavar="DIR", help="folder of the dataset's files")
    parser.add_argument("--limit-test", type=int, metavar="N", help="the first N test images")
    parser.add_argument("--backend", default="auto", choices=("auto", *mk.backends()))
    parser.add_argument("--out", type=Path, metavar="NPY", help="write the logits there")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_arguments(argv)
    data = load_splits(args.dataset, args.data, limit_test=args.limit_test)
    model = mk.load_masked(args.model)
    start = time.perf_counter()
    with mk.use_backend(args.backend):
        logits = predict(model, data.test.images, Normalize(data.mean, data.std)).float()
    seconds = time.perf_counter() - start
    right = int((logits.argmax(dim=1) == data.test.labels).sum())
    print(
        f"{args.model}: {right} of {len(logits)} test images right "
        f"({100 * right / len(logits):.2f} %), {1e3 * seconds / len(logits):.2f} ms per image, "
        f"{torch.get_num_threads()} threads"
    )
    if args.out is not None:
        np.save(args.out, logits.numpy())
    return 0


if __name__ == "__main__":
    sys.exit(main())

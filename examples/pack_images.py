"""Pack a dataset without loss into a few WebP sheets, to carry to a machine without network.

    python examples/pack_images.py cifar10 data/cifar10 data/cifar10-sheets

CIFAR-10's 60,000 images are 176 MiB of pixels, 99 MiB in six sheets. The new folder serves wherever
the dataset's own did: ``examples/train.py --data data/cifar10-sheets``.
"""

import argparse
import sys
from pathlib import Path

from masked_kernels.training import SOURCES
from masked_kernels.training.sheets import read_sheets, write_sheets


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("dataset", choices=tuple(SOURCES))
    parser.add_argument("data", type=Path, help="folder of the dataset's files")
    parser.add_argument("out", type=Path, help="folder to make")
    args = parser.parse_args()
    try:
        write_sheets(args.dataset, SOURCES[args.dataset].read(args.data, False), args.out)
        read_sheets(args.dataset, args.out)
    except (OSError, ValueError) as error:
        print(f"pack_images.py: {error}", file=sys.stderr)
        return 2
    size = sum(path.stat().st_size for path in args.out.iterdir())
    print(f"{args.out}: {size / 2**20:.1f} MiB, read back and equal")
    return 0


if __name__ == "__main__":
    sys.exit(main())

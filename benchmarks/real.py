"""Measure the package on real photos with published and trained weights; the page guides/results shows the outputs.

    python benchmarks/real.py parity --weights mobile_sam.pt --data coco128 --original original/bin/python
    python benchmarks/real.py precision --weights mobile_sam.pt --data coco128
    python benchmarks/real.py inputs --weights mobile_sam.pt --data coco128
    python benchmarks/real.py everything --weights mobile_sam.pt --data BSDS500/data --original original/bin/python
    python benchmarks/real.py nuclei --weights mobile_sam.pt --data nuclei --train runs/nuclei
    python benchmarks/real.py cells --weights mobile_sam.pt --data blood_cells --train runs/cells
    python benchmarks/real.py camvid --weights mobile_sam.pt --data camvid --train runs/camvid
    python benchmarks/real.py duplicates --weights mobile_sam.pt --data FOLDER

parity      masks of prompts, and of everything in photos, compared with the original code
precision   masks of boxes and points in every engine and precision, compared with the ground truth of coco128
inputs      the same for other input sizes, and for masks that are fed back with their prompt
everything  average recall of the regions that people drew in the test photos of BSDS500, beside the original code
nuclei      boxes, points and everything in 80 held-out microscopy images
cells       average precision in the test split of BCCD, blood cells of three classes
camvid      mean IoU of 11 classes in 60 held-out street scenes
duplicates  near-duplicates between the training and the held-out images of the last three

The original code runs in an environment of its own (see original.py), whose Python --original names; without it only
this package is measured. Masks of everything are kept in --cache, and an interrupted run resumes there; their times are
those of the run that wrote them. --train starts or resumes the training of the section in a run folder and evaluates
its best weights. CPU seconds are meaningful on a machine with other load.

A standard error is that of the mean, with objects (precision) or photos (everything) as independent samples; changes
are paired.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from pathlib import Path

import torch
from real_masks import digest, segment_ours
from real_published import everything, inputs, parity, precision
from real_trained import camvid, cells, duplicates, nuclei

from kornia_tinyvit.deploy.measurement import describe_machine

PUBLISHED, TRAINED = (parity, precision, inputs, everything), (nuclei, cells, camvid)


def header(args: argparse.Namespace) -> None:
    """Print the command, the machine and the weights."""
    print(f"$ python benchmarks/real.py {shlex.join(sys.argv[1:])}")
    print(describe_machine())
    print(f"weights {Path(args.weights).name}, SHA-256 {digest(args.weights)}\n", flush=True)


def main() -> None:
    if sys.argv[1:2] == ["child"]:
        segment_ours(json.loads(sys.argv[2]))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sections = parser.add_subparsers(required=True, metavar="SECTION")
    photos = {parity: 10, precision: 100, inputs: 50, everything: 200, nuclei: 80}
    for run in (*PUBLISHED, *TRAINED, duplicates):
        section = sections.add_parser(run.__name__, help=run.__doc__, description=run.__doc__)
        section.set_defaults(run=run)
        section.add_argument("--weights", required=True, help="mobile_sam.pt, or with nuclei another MobileSAM")
        section.add_argument("--data", type=Path, required=True, help="folder of the images")
        section.add_argument("--cache", type=Path, default=Path("runs/real"), help="folder of masks and descriptions")
        section.add_argument("--seed", type=int, default=0)
        section.add_argument("--threads", type=int, default=1)
        if run in photos:
            section.add_argument("--photos", type=int, default=photos[run], help="number of photos")
        if run in (parity, everything):
            section.add_argument("--original", help="Python of the environment of the original code")
        if run is parity:
            section.add_argument("--whole", type=int, default=3, help="photos that are segmented whole, at most 3")
        if run in TRAINED:
            section.add_argument("--train", type=Path, metavar="RUN", help="run folder: train, then evaluate its best")
        if run is precision:
            section.add_argument("--repetitions", type=int, default=7, help="of the timed encoders")
        if run is everything:
            section.add_argument("--float32", type=int, default=50, help="photos that are segmented in float32")
            section.add_argument("--originals", type=int, default=12, help="photos that the original code segments")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    header(args)
    args.run(args)


if __name__ == "__main__":
    main()

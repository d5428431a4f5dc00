"""Cut the sheet of docs/photographs.md out of a picture that `davae reconstruct` made of six photographs at 512 px.

python docs/results/photographs/sheet.py PICTURE docs/images/photographs.jpg
python docs/results/photographs/sheet.py PICTURE docs/images/lettering.jpg 1    # the first cut alone, for the README
"""

import sys

from PIL import Image

CELL, SIDE, GAP = 514, 256, 4  # a reconstruction and its border; a cut; between cuts
CUTS = ((2, 40, 150), (4, 200, 130), (0, 110, 60), (5, 130, 230))  # column, left, top


def main(picture: str, out: str, rows: str = "4") -> None:
    """Write a row per cut: the photograph, the base enlarged, the reconstruction, pixel by pixel."""
    opened = Image.open(picture)
    names = opened.text["Rows"].split(" | ")
    kinds = [names.index(name) for name in ("input", "base, enlarged", "reconstruction")]
    whole = opened.convert("RGB")
    cuts = CUTS[: int(rows)]
    sheet = Image.new("RGB", (3 * SIDE + 2 * GAP, len(cuts) * (SIDE + GAP) - GAP), "white")
    for row, (column, left, top) in enumerate(cuts):
        for place, kind in enumerate(kinds):
            x, y = column * CELL + left, kind * CELL + top
            sheet.paste(whole.crop((x, y, x + SIDE, y + SIDE)), (place * (SIDE + GAP), row * (SIDE + GAP)))
    sheet.save(out, quality=90)


if __name__ == "__main__":
    main(*sys.argv[1:])

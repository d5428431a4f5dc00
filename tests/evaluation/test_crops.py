"""Parts of images told apart: those that a table names, and the finest texture."""

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from davae.errors import DavaeError
from davae.evaluation.reconstruction.crops import busiest_crop, fine_texture, folder_crops, read_boxes, whole_positions
from davae.report.recorder import save_png

_HEADER = "file,name,left,top,right,bottom\n"


def _image(height=40, width=60):
    image = torch.zeros(3, height, width)
    image[:, 20:30, 45:55] = torch.randn(3, 10, 10, generator=torch.Generator().manual_seed(0)).clamp(-1, 1)
    return image


def test_the_busiest_crop_is_where_the_texture_is() -> None:
    rows, columns = busiest_crop(_image(), 12)
    assert rows.start <= 20 <= 30 <= rows.stop
    assert columns.start <= 45 <= 55 <= columns.stop


def test_of_all_squares_the_one_with_the_largest_mean_is_taken() -> None:
    image = torch.rand(3, 17, 23, generator=torch.Generator().manual_seed(1))
    padded = F.pad(image.mean(0)[None, None], (1, 1, 1, 1), mode="replicate")[0, 0]
    centre = padded[1:-1, 1:-1]
    laplacian = padded[:-2, 1:-1] + padded[2:, 1:-1] + padded[1:-1, :-2] + padded[1:-1, 2:] - 4 * centre
    means = {
        (row, column): float(laplacian[row : row + 5, column : column + 5].abs().mean())
        for row in range(13)
        for column in range(19)
    }
    rows, columns = busiest_crop(image, 5)
    assert (rows.start, columns.start) == max(means, key=lambda place: means[place])
    assert busiest_crop(torch.ones(3, 17, 23), 5) == (slice(0, 5), slice(0, 5))  # of equal ones the first
    rows, columns = busiest_crop(image, 40)
    assert (rows, columns.stop - columns.start) == (slice(0, 17), 17)


def test_whole_positions_are_cut_around_the_middle() -> None:
    pixels = torch.arange(7 * 10, dtype=torch.uint8).reshape(7, 10).numpy()
    cut = whole_positions(Image.fromarray(pixels), 4)
    assert cut.shape == (1, 3, 4, 8)
    assert ((cut[0, 0] + 1) * 127.5).round().int().tolist() == pixels[1:5, 1:9].tolist()
    with pytest.raises(DavaeError, match="10 x 7 pixels, less than the 8"):
        whole_positions(Image.fromarray(pixels), 8)


def test_a_reconstruction_is_cut_where_its_image_is_busy() -> None:
    images = torch.stack([_image(), _image().flip(2)])
    cut = fine_texture(images)
    assert cut(images).shape == (2, 3, 16, 16)
    assert cut(images).square().sum() == pytest.approx(float(images.square().sum()), rel=1e-6)
    torch.testing.assert_close(cut(images + 0.25), cut(images) + 0.25)


def test_boxes_grow_to_whole_latent_positions_inside_their_image(tmp_path) -> None:
    image = _image()
    save_png(image, tmp_path / "signs" / "a.png")
    table = tmp_path / "boxes.csv"
    table.write_text(
        "who," + _HEADER
        + "me,signs/a.png,lettering,45,20,55,30\n"
        + "me,signs/a.png,faces,0,0,33,8\n"
        + "me,signs/a.png,lettering,0,0,60,40\n"
    )  # fmt: skip
    boxes = read_boxes(table)
    assert {name: len(found) for name, found in boxes.items()} == {"lettering": 2, "faces": 1}
    crop = boxes["lettering"][0].cut(16)
    # 10 pixels grow to 16 around their middle: rows 17 to 33, columns 42 to 58.
    torch.testing.assert_close(crop[0], image[:, 17:33, 42:58], atol=1 / 127, rtol=0)
    assert boxes["faces"][0].cut(8).shape == (1, 3, 16, 40)  # at least 16 a side, for SSIM
    assert boxes["lettering"][1].cut(16).shape == (1, 3, 32, 48)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("file,name,left,top,right\n", "no column 'bottom'"),
        (_HEADER, "holds no box"),
        (_HEADER + "a.png,x,0,0,8,half\n", "line 2: .*whole numbers"),
        (_HEADER + "a.png,x,8,0,8,4\n", "is empty"),
        (_HEADER + "a.png,,0,0,8,4\n", "no name"),
        (_HEADER + "b.png,x,0,0,8,4\n", "b.png is no file"),
        (None, "cannot read the boxes"),
    ],
)
def test_mistakes_in_a_table_are_named_with_their_line(content, words, tmp_path) -> None:
    save_png(_image(), tmp_path / "a.png")
    if content is not None:
        (tmp_path / "t.csv").write_text(content)
    with pytest.raises(DavaeError, match=words):
        read_boxes(tmp_path / "t.csv")


def test_boxes_and_crops_that_do_not_fit_are_refused(tmp_path) -> None:
    save_png(torch.zeros(3, 12, 40), tmp_path / "a.png")
    (tmp_path / "t.csv").write_text(_HEADER + "a.png,out,0,0,41,4\na.png,thin,0,0,8,8\n")
    boxes = read_boxes(tmp_path / "t.csv")
    with pytest.raises(DavaeError, match="40 x 12 pixels, and a box ends at 41, 4"):
        boxes["out"][0].cut(8)
    with pytest.raises(DavaeError, match="no room"):
        boxes["thin"][0].cut(16)
    with pytest.raises(DavaeError, match="less than the 16"):
        list(folder_crops(tmp_path, 16))

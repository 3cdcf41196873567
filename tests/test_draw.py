"""draw: round ticks, the axis that is chosen, what stands where in a picture, a progress line that stays one line."""
import math

import numpy as np
import pytest
import torch
from PIL import Image, ImageFont

from tinyvlm import draw
from tinyvlm.draw import HUES, PAPER, attention_over, caption_sheet, curves, progress, similarity_picture, ticks, wrap


@pytest.mark.parametrize("args, wanted", [
    ((0, 870), [0, 200, 400, 600, 800]), ((1, 2), [1, 1.2, 1.4, 1.6, 1.8, 2]), ((-3, 3), [-3, -2, -1, 0, 1, 2, 3]),
    ((0.3, 45, True), [0.5, 1, 2, 5, 10, 20])])
def test_ticks_are_round(args, wanted):
    assert ticks(*args) == pytest.approx(wanted)


def rows_of_color(image, hue):
    """{x: [y, ..]}: where the plot has a colour, or nearly, as at a smoothed edge."""
    near, found = np.abs(np.asarray(image)[62:].astype(int) - hue).sum(axis=-1) < 120, {}
    for y, x in np.argwhere(near).tolist():
        found.setdefault(x, []).append(y)
    return found


def test_curves_are_logarithmic_where_the_values_are():
    """Each a tenth of the last: a straight line. Within a factor of 20, and below 0, the axis stays linear."""
    for values, half in (([100, 10, 1], True), ([10, 5.5, 1], True), ([10, 1, 0.9], False), ([100, 10, -1], False)):
        found = rows_of_color(curves({"a": list(zip((0, 50, 100), values))}, "t"), HUES[0])
        top, middle, bottom = (sum(found[x]) / len(found[x]) for x in (min(found), 375, max(found)))
        assert (abs(middle - (top + bottom) / 2) < 6) is half, values


def test_what_was_measured_seldom_has_dots_and_what_is_not_finite_is_left_out():
    few = rows_of_color(curves({"a": [(k, 1 + k % 2) for k in range(11)]}, "t"), HUES[0])
    many = rows_of_color(curves({"a": [(k, 1.0) for k in range(100)]}, "t"), HUES[0])
    assert max(map(len, few.values())) > 4 and {len(ys) for ys in many.values()} <= {1, 2, 3}
    broken = curves({"a": [(0, 1.0), (1, math.nan), (2, 2.0), (3, math.inf)]}, "t")
    assert broken.tobytes() == curves({"a": [(0, 1.0), (2, 2.0)]}, "t").tobytes()
    assert curves({"a": []}, "t").size == curves({"a": [(3, 5.0)]}, "t").size == (720, 400)


def test_a_sheet_has_every_image_and_wrapped_text():
    images = [Image.new("RGB", *how) for how in (((8, 4), "red"), ((400, 400), "blue"), ((5, 5), "lime"))]
    sheet = caption_sheet(images, ["a", "b " * 60, "c"], columns=2, side=100)
    assert sheet.width == 2 * 110 + 10 and sheet.height > 2 * 120
    assert [sheet.getpixel(xy) for xy in ((60, 60), (170, 60), (60, sheet.height // 2 + 60))] == [
        (255, 0, 0), (0, 0, 255), (0, 255, 0)]
    assert sheet.getpixel((60, 20)) == PAPER                    # 8 x 4 is not made square
    lines = wrap("some words and\nmore of them " * 3, 60)
    assert all(ImageFont.load_default(12).getlength(line) <= 66 for line in lines)
    assert " ".join(lines).split() == ("some words and more of them " * 3).split() and lines[2:4] == ["and", "more of"]


def test_attention_keeps_the_light_where_the_weight_is():
    """9.0 is that of a class token, which has no place."""
    image = attention_over(Image.new("RGB", (40, 40), "white"), torch.tensor([9.0, 0, 0, 0, 1]), 2)
    assert image.getpixel((38, 38)) == (255, 255, 255) and image.getpixel((2, 2)) < (80, 80, 80)


def test_similarity_picture_is_darker_where_more_similar():
    sim = torch.tensor([[0.9, 0.1, 0.2], [0.0, 0.8, 0.3], [0.1, 0.2, 0.7]])
    image = similarity_picture(sim, ["a dog", "a very long sentence " * 9, "x"])
    corner = [[sum(image.getpixel((200 + 44 * j + 2, 44 * i + 2))) for j in range(3)] for i in range(3)]
    assert all(corner[i][i] < min(corner[i][j] for j in range(3) if j != i) for i in range(3))
    assert similarity_picture(torch.ones(1, 1), ["one"]).size == (244, 44)        # nothing to compare: no division by 0


@pytest.mark.parametrize("live, wanted", [(True, "\rx: 1/4, 3 s left \rx: 2/4, 2 s left \rx: 4/4, 0 s left \n"),
                                          (False, "x: 2/400, 12139 s left \n")])
def test_progress_is_one_line(live, wanted, monkeypatch, capsys):
    """Redrawn on a terminal; in a log file a line every 30 seconds, and none for what is soon done."""
    times = iter([0, 1, 2, 2.05, 4] if live else [0, 29, 61, 62, 63])
    monkeypatch.setattr(draw.time, "monotonic", lambda: next(times))
    monkeypatch.setattr("sys.stderr.isatty", lambda: live, raising=False)
    for done in ((0, 1, 2, 3, 4) if live else (0, 1, 2, 3, 400)):
        progress(done, 4 if live else 400, "x")
    assert capsys.readouterr().err == wanted and not draw._clocks

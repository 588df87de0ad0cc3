"""Names in the picture neither cover each other nor the points."""

import itertools

import pytest
from matplotlib.text import Text

from peftjax.cli import _picture

ALIKE = (
    ('frozen', 2_695, 64.4), ('prompt', 6_535, 62.0), ('prefix', 48_775, 68.0),
    ('bitfit', 64_135, 75.1), ('ia3', 16_519, 74.8), ('lora', 76_423, 75.7),
    ('dora', 81_031, 75.9), ('adapter', 305_000, 77.0), ('pfeiffer', 150_000, 77.1),
    ('parallel', 152_000, 76.3), ('norms', 15_000, 74.9), ('full', 22_568_071, 79.8),
)  # fmt: skip


def records(spread):
    names = ('method', 'trained_parameters', 'accuracy_mean')
    return [dict(zip(names, row, strict=True)) | {'accuracy_sd': spread} for row in ALIKE]


@pytest.mark.parametrize('spread', [None, 0.0, 2.5])
def test_names_cover_nothing(tmp_path, monkeypatch, spread):
    seen, label = [], _picture._label
    monkeypatch.setattr(
        _picture, '_label', lambda axes, rows: seen.append(axes) or label(axes, rows)
    )
    _picture.draw(tmp_path / 'a.png', records(spread), 'twelve methods')
    (axes,) = seen
    renderer = axes.figure.canvas.get_renderer()
    boxes = [Text.get_window_extent(text, renderer) for text in axes.texts]
    assert [text.get_text() for text in axes.texts] == [row[0] for row in ALIKE]
    assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))
    points = [axes.transData.transform(row[1:]) for row in ALIKE]
    assert not any(box.contains(*point) for box in boxes for point in points)
    window = axes.get_window_extent(renderer)
    assert all(window.contains(box.x0, box.y0) and window.contains(box.x1, box.y1) for box in boxes)


def test_one_method_is_a_picture_too(tmp_path):
    _picture.draw(tmp_path / 'a.png', records(None)[:1], 'one method')
    assert (tmp_path / 'a.png').stat().st_size > 1000

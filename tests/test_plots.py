"""Pictures: one style for each method, what they show of known numbers, and what a comparison of runs draws."""

import itertools

import matplotlib.colors
import numpy as np
import pytest

import metrics
import optimizers
from evaluation import comparison, plots, posteriors, predictions, tables
from evaluation.request import Request
from runs import checkpoints, json_files

# Three kinds of colour blindness at their strongest, as matrices for linear RGB (Machado et al., 2009).
COLOUR_BLINDNESS = {
    'none': np.eye(3),
    'protanopia': [[0.1523, 1.0526, -0.2049], [0.1145, 0.7863, 0.0992], [-0.0039, -0.0481, 1.052]],
    'deuteranopia': [[0.3673, 0.8606, -0.228], [0.2801, 0.6725, 0.0474], [-0.0118, 0.0429, 0.9689]],
    'tritanopia': [[1.2555, -0.0767, -0.1788], [-0.0784, 0.9308, 0.1476], [0.0047, 0.6914, 0.3039]],
}
TO_XYZ = [[0.4339, 0.3762, 0.1899], [0.2127, 0.7152, 0.0722], [0.0178, 0.1095, 0.8727]]  # relative to white

LABELS = np.random.default_rng(0).integers(0, 3, 400)
NAMES = ['cat', 'a class with a long name', '$x_1$ and $y_2$']


def probs(seed, strength=2.0):
    logits = np.random.default_rng(seed).normal(size=(400, 3)) + strength * np.eye(3)[LABELS]
    return metrics.softmax(logits)


def points(value, number):
    """Returns `number` points of a curve, with `value`, `value` + 1, ... as each metric."""
    return [{'testmc': 2**i} | dict.fromkeys(metrics.SHORT, value + i) for i in range(number)]


def row(name, *values, at='average'):
    """Returns a comparison.Row whose runs measured curves that begin at each of `values`."""
    runs = []
    for value in values:
        corrupted = [{'mean': p, 'average': p} for p in points(value + 1, 5)]
        clean = points(value, 1)[0]
        runs.append({'mean': clean, 'average': clean, 'samples': points(value, 3), 'corruptions': {'fog': corrupted}})
    return comparison.Row(name, [probs(int(value)) for value in values], at=at, measured=runs)


def texts_of(legend):
    return [text.get_text() for text in legend.get_texts()]


def lab(rgb):
    """Returns the CIELAB coordinates of linear RGB."""
    x, y, z = (np.cbrt(part) if part > 0.008856 else 7.787 * part + 16 / 116 for part in TO_XYZ @ np.clip(rgb, 0, 1))
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


@pytest.mark.parametrize('kind', COLOUR_BLINDNESS)
def test_every_optimizer_has_a_style_that_everyone_can_distinguish(kind):
    """A difference of 2.3 in CIELAB is just noticeable. In grey, the markers differ."""
    assert set(plots.STYLES) == set(optimizers.OPTIMIZERS)
    assert len({style['marker'] for style in plots.STYLES.values()}) == len(plots.STYLES)
    seen = []
    for style in plots.STYLES.values():
        rgb = np.array(matplotlib.colors.to_rgb(style['color']))
        linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
        seen.append(lab(COLOUR_BLINDNESS[kind] @ linear))
    assert min(np.linalg.norm(a - b) for a, b in itertools.combinations(seen, 2)) > 15


def test_styles_of_the_rows_of_a_comparison():
    names = ['sgd, mean', 'sgd laplace, 8 samples', 'bsam, mean', 'bsam, 8 samples', 'sam, mean']
    laplace, bsam_mean, bsam, sam = (plots.styles_of(names)[name] for name in names[1:])
    assert laplace == plots.STYLES['sgd'] and bsam == plots.STYLES['bsam'] and sam == plots.STYLES['sam']
    assert bsam_mean == bsam | {'linestyle': '--', 'markerfacecolor': 'white'}
    assert plots.styles_of(['bSAM, samples'])['bSAM, samples'] == bsam
    of_files = plots.styles_of(['small, first', 'small, second', 'bsam, 8/16 samples'])
    assert of_files['small, first'] != of_files['small, second'] and of_files['bsam, 8/16 samples'] == bsam


def test_styles_of_methods_with_one_optimizer_and_with_none():
    names = [
        'bsam rho=0.1, mean',
        'bsam rho=0.2, mean',
        'bsam ensemble of 2, mean',
        'ensemble of all 3 runs, mean',
        'x',
    ]
    first, second, ensemble, of_all, other = plots.styles_of(names).values()
    assert first == plots.STYLES['bsam'] and of_all['color'] == plots.GREY
    assert len({style['color'] for style in (first, second, ensemble, of_all, other)}) == 5
    assert len({style['marker'] for style in (first, second, ensemble, of_all, other)}) == 5
    assert second['color'] == plots.tint(first['color'], 0.65)


def test_lines_without_markers_are_of_the_same_table():
    styles = [{name: plots.STYLES[o][name] for name in ('color', 'linestyle')} for o in ('sam', 'bsam', 'sgd')]
    assert plots.line_styles() == styles


def test_reliability_shows_over_and_under_confidence():
    """Two runs share two bins. The second bin is under-confident and has few images. The third bin is empty."""
    runs = [
        {'counts': [20, 4, 0], 'accuracy': [0.1, 0.9, np.nan], 'confidence': [0.2, 0.5, np.nan]},
        {'counts': [60, 4, 0], 'accuracy': [0.3, 0.7, None], 'confidence': [0.3, 0.6, None]},
    ]
    figure = plots.reliability({'sam, mean': runs}, 'heading', fewest=10)
    top, bottom = figure.axes
    gaps = {bar.get_hatch(): bar for bar in top.patches if bar.get_hatch()}
    over, under = gaps[plots._OVER['hatch']], gaps[plots._UNDER['hatch']]
    np.testing.assert_allclose([over.get_y(), over.get_height(), over.get_x()], [0.25, 0.025, 0], atol=1e-9)
    np.testing.assert_allclose([under.get_y(), under.get_height(), under.get_x()], [0.55, 0.25, 1 / 3])
    assert over.get_alpha() == 1 and under.get_alpha() < 0.5
    np.testing.assert_allclose([bar.get_height() for bar in bottom.patches], [80 / 88, 8 / 88, 0])
    assert {bar.get_facecolor() for bar in bottom.patches} == {matplotlib.colors.to_rgba(plots.STYLES['sam']['color'])}
    eces = [(20 * 0.1 + 4 * 0.4) / 24, 4 * 0.1 / 64]
    assert top.get_title() == f'sam, mean\nECE {np.mean(eces):.4f} ± {np.std(eces, ddof=1):.4f}, 2 runs'
    assert figure.get_suptitle() == 'Reliability: heading'
    assert 'pale: fewer than 10 images' in texts_of(figure.legends[0])


def test_reliability_of_many_methods():
    bins = {name: values.tolist() for name, values in metrics.reliability(probs(0), LABELS).items()}
    figure = plots.reliability({f'{optim}, mean': [bins] for optim in list(plots.STYLES)[:5]})
    shown = [axes for axes in figure.axes if axes.get_visible()]
    assert len(figure.axes) == 16 and len(shown) == 10
    assert shown[0].get_title() == f'sgd, mean\nECE {metrics.ece(probs(0), LABELS):.4f}'


def test_risk_over_coverage_of_two_seeds():
    """At full coverage the risk is the error rate. The band is as wide as two standard deviations."""
    runs = [probs(0), probs(1, strength=1.0)]
    figure = plots.risk_coverage({'bsam, 8 samples': runs, 'sgd, mean': runs[:1]}, LABELS)
    (axes,) = figure.axes
    line, alone = axes.lines
    errors = [100 * (1 - metrics.accuracy(p, LABELS)) for p in runs]
    np.testing.assert_allclose([line.get_ydata()[-1], alone.get_ydata()[-1]], [np.mean(errors), errors[0]])
    (band,) = axes.collections
    ends = [y for x, y in band.get_paths()[0].vertices if x == 100]
    np.testing.assert_allclose([max(ends) - min(ends)], [2 * np.std(errors, ddof=1)])
    areas = [metrics.aurc(p, LABELS) for p in runs]
    labels = texts_of(figure.legends[0])
    assert labels[0] == f'bsam, 8 samples\narea (AURC) {np.mean(areas):.4f} ± {np.std(areas, ddof=1):.4f}'
    assert labels[1] == f'sgd, mean\narea (AURC) {areas[0]:.4f}' and labels[2].startswith('band: ± standard deviation')


def test_curves_over_samples():
    """Two seeds have 1, 2, 3 and 3, 4, 5. The mean of a method is a horizontal line."""
    rows = [row('bsam, 4 samples', 1, 3), row('bsam, mean', 1, 3, at='mean'), row('sgd, mean', 7, at='mean')]
    figure = plots.samples(rows, 'heading')
    assert [axes.get_ylabel() for axes in figure.axes] == ['accuracy (%)', 'NLL (nats)', 'ECE']
    for axes, scale in zip(figure.axes, (100, 1, 1), strict=True):
        heights = np.array([line.get_ydata() for line in axes.lines]) / scale
        np.testing.assert_allclose(heights, [[2, 3, 4], [2, 2, 2], [7, 7, 7]])
        assert axes.lines[0].get_xdata().tolist() == [1, 2, 4] and len(axes.collections) == 1
    assert texts_of(figure.legends[0])[:3] == ['bsam, samples', 'bsam, mean', 'sgd, mean']
    assert plots.samples(rows[1:]) is None
    other = row('ivon, 4 samples', 1, 3)
    other.measured[1]['samples'].pop()
    assert plots.samples([other]) is None, 'the seeds have different numbers of samples'
    assert plots.samples([comparison.Row('bsam, 4 samples', [], measured=[None])]) is None


def test_curves_over_severities():
    rows = [row('bsam, 4 samples', 1, 3), row('sgd, mean', 7, at='mean'), comparison.Row('sam, mean', [])]
    figure = plots.severities(rows, 'heading')
    heights = np.array([line.get_ydata() for line in figure.axes[1].lines])
    np.testing.assert_allclose(heights, [[2, 3, 4, 5, 6, 7], [7, 8, 9, 10, 11, 12]])
    (band,) = figure.axes[1].collections
    ends = [y for x, y in band.get_paths()[0].vertices if x == 5]
    np.testing.assert_allclose([min(ends), max(ends)], [7 - np.sqrt(2), 7 + np.sqrt(2)])
    assert figure.axes[1].get_xlabel() == 'severity (0: clean)'
    assert plots.severities(rows[2:]) is None
    rows[1].measured[0]['corruptions']['blur'] = rows[1].measured[0]['corruptions']['fog']
    (line,) = plots.severities(rows).axes[0].lines
    assert line.get_color() == plots.STYLES['bsam']['color'], 'the other row has other corruptions'


def test_legends_are_beside_the_panels():
    """The legend lies within the figure and covers neither a panel nor the title."""
    names = [f'{optim}, {at}' for optim in plots.STYLES for at in ('4 samples', 'mean')][: plots.MOST_ROWS]
    rows = [row(name, 1, 2, at='mean' if name.endswith('mean') else 'average') for name in names]
    figures = plots.of_rows(rows, LABELS, 10, '400 test images of a data set with a long name')
    for name in ('risk_coverage', 'samples', 'severities'):  # drawing twelve reliability diagrams takes a second
        figure = figures[name]
        figure.draw_without_rendering()
        (legend,) = figure.legends
        box = legend.get_window_extent()
        panels = [axes.get_tightbbox() for axes in figure.axes if axes.get_visible()]
        assert all(panel.x1 < box.x0 + 1 for panel in panels)
        assert box.y1 <= figure.bbox.height and box.y0 >= 0 and box.x1 <= figure.bbox.width
        assert not box.overlaps(figure._suptitle.get_window_extent())


def test_pictures_show_the_first_rows_of_a_long_table(monkeypatch):
    monkeypatch.setattr(plots, 'MOST_ROWS', 2)
    rows = [row(f'bsam rho={i}, mean', 1, at='mean') for i in range(5)]
    figure = plots.of_rows(rows, LABELS, 10, 'heading')['risk_coverage']
    assert len(figure.axes[0].lines) == 2
    assert figure.get_suptitle().replace('\n', ' ').endswith('; the first 2 of 5 rows of the table')


def test_confusion_matrix():
    """Of 4 images of the first class 3 are right. The second class has none. The third is always wrong."""
    labels, predicted = np.array([0, 0, 0, 0, 2, 2]), np.array([0, 0, 0, 1, 0, 1])
    figure = plots.confusion(np.eye(3)[predicted], labels, NAMES, 'heading', '#0072B2')
    axes, colour_bar = figure.axes
    shares = axes.images[0].get_array()
    np.testing.assert_allclose(shares[[0, 2]], [[75, 25, 0], [50, 50, 0]])
    assert np.ma.getmaskarray(shares)[1].all()
    assert sorted(text.get_text() for text in axes.texts) == ['25', '50', '50', '75']
    shown = [label.get_text() for label in axes.get_yticklabels()]
    assert shown == ['cat', 'a class with a long…', r'\$x_1\$ and \$y_2\$']
    assert (axes.get_xlabel(), axes.get_ylabel()) == ('predicted class', 'true class')
    assert colour_bar.get_ylabel() == 'share of the images of the true class (%)'
    figure.draw_without_rendering()
    assert plots.confusion(np.full((6, 3), np.nan), labels) is None


def test_most_confused_of_many_classes():
    """Three images of class 7 become 20, and one of 20 becomes 7. All others are right."""
    labels = np.array([7, 7, 7, 7, 20, 20, 3])
    predicted = np.array([20, 20, 20, 7, 7, 20, 3])
    (axes,) = plots.confusion(np.eye(21)[predicted], labels).axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ['7 → 20', '20 → 7']
    assert [text.get_text() for text in axes.texts] == ['3 of 4', '1 of 2']
    (without_errors,) = plots.confusion(np.eye(21)[labels], labels).axes
    assert not without_errors.patches


def test_images_have_the_names_of_their_classes():
    images, predicted = np.zeros((3, 4, 4, 3), np.uint8), np.array([0, 2, 1])
    confident = 0.7 * np.eye(3)[predicted] + 0.1
    figure = plots.image_sheet(images, np.array([0, 1, 1]), confident, NAMES, 'heading')
    assert figure.axes[0].get_title() == 'pred. \\$x_1\\$ and…\n80%\ntrue a class w…'
    figure.draw_without_rendering()
    numbers = plots.image_sheet(images, np.array([0, 1, 1]), confident)
    assert numbers.axes[0].get_title() == 'pred. 2\n80%\ntrue 1'


def test_names_in_a_script_that_the_font_lacks(tmp_path):
    """Does not warn."""
    plots.save(plots.confusion(np.eye(2), np.array([0, 1]), ['猫', '犬']), tmp_path, 'confusion')


def test_table_of_the_classes():
    table = tables.classes(np.array([[0.8, 0.2, 0], [0.4, 0.6, 0], [0.3, 0.7, 0]]), np.array([0, 0, 1]), NAMES, 'mean')
    header, _, *rows = [[cell.strip() for cell in line.strip('|').split('|')] for line in table.strip().splitlines()]
    assert header == ['class, mean', 'images', 'accuracy', 'mean confidence']
    assert rows[0] == ['cat', '2', '50.00%', '70.00%'] and rows[1][1:] == ['1', '100.00%', '70.00%']
    assert rows[2][1:] == ['0', '–', '–']
    assert '–' in tables.classes(np.full((1, 3), np.nan), np.array([0]), None, 'mean').splitlines()[3]
    assert tables.classes(np.full((1, 21), 1 / 21), np.array([0]), None, 'mean') == ''


@pytest.mark.parametrize(
    ('change', 'drawn'),
    [
        ({}, {'mean', 'average', 'samples', 'corruptions'}),
        ({'samples': None, 'corruptions': None}, {'mean', 'average'}),
        ({'testmc': 5}, None),
        ({'trained': {'epoch': 1, 'steps_of_epoch': 3}}, None),
        ({'average': None}, None),
        ({'samples': [{'testmc': 0} | dict.fromkeys(metrics.SHORT, 1.0)]}, None),
        ({'corruptions': {'fog': []}}, None),
        ({'corruptions': []}, None),
        ({'mean': {'accuracy': 'high'}}, None),
    ],
)
def test_saved_predictions_bring_the_curves_of_the_same_evaluation(change, drawn, tmp_path):
    """A damaged metrics.json, or one of another evaluation, brings none. NaN is null in the file."""
    progress = checkpoints.Progress(epoch=1, step=4)
    measured = row('bsam, 4 samples', 1).measured[0] | {'testmc': 4, 'trained': progress.trained()}
    measured['average'] = measured['average'] | {'nll': np.nan}
    measured = {name: value for name, value in (measured | change).items() if value is not None}
    of_samples = posteriors.Prediction(np.log(probs(0)), probs(1), np.zeros(400), np.full((400, 3), [4, 0, 0]))
    predictions.write(tmp_path / 'predictions.npz', of_samples, LABELS, 4, progress)
    json_files.write_json(tmp_path / 'metrics.json', measured)
    ((_, result),) = predictions.results_of(tmp_path, {'flags': {'optim': 'bsam'}}, Request())
    assert (result.measured and set(result.measured)) == drawn
    if drawn:
        assert np.isnan(result.measured['average']['nll']) and result.measured['average']['ece'] == 1.0

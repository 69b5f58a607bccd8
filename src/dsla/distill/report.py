"""The picture of a conversion, from its manifest."""

from __future__ import annotations

from pathlib import Path

from dsla.convert.adapter import read_manifest
from dsla.convert.plan import Plan


def plot_training(directory: Path, path: Path) -> None:
    """Draws each layer's training curve, and the held-out errors with and without states.

    Args:
        directory: an adapter folder.
        path: the PNG to write.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    layers, order = read_manifest(directory)["layers"], Plan.load(directory / "plan.json").order
    done = [layer for layer in order if str(layer) in layers]
    figure, (curves, bars) = pyplot.subplots(2, 1, figsize=(9, 7), layout="constrained")
    for place, layer in enumerate(done):
        errors = layers[str(layer)]["errors"]
        span = max(len(errors) // 40, 1)
        smooth = [sum(errors[i : i + span]) / len(errors[i : i + span]) for i in range(0, len(errors), span)]
        curves.plot(range(0, len(errors), span), smooth, color=pyplot.cm.viridis(place / max(len(done) - 1, 1)), lw=1)
    curves.set(
        yscale="log",
        xlabel="step of the layer",
        ylabel="relative squared error",
        title="training (dark = converted first)",
    )
    places = range(len(done))
    bars.bar(
        [p - 0.2 for p in places],
        [layers[str(i)]["valid"]["error_states_off"] for i in done],
        0.4,
        label="states off (window and sinks)",
    )
    bars.bar([p + 0.2 for p in places], [layers[str(i)]["valid"]["error"] for i in done], 0.4, label="with states")
    bars.set_xticks(list(places), [str(layer) for layer in done], fontsize=7)
    bars.set(xlabel="layer, in the order of conversion", ylabel="relative squared error", title="held-out text")
    bars.legend()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)

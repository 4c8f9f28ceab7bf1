"""Pictures of a training run, drawn with matplotlib and written as PNG files."""
from gpucnn.viz.plots import plot_confusion, plot_curves, require_matplotlib

__all__ = ["plot_confusion", "plot_curves", "require_matplotlib"]

"""Pictures of a training run and of what came of it, drawn with matplotlib, as PNG files."""
from gpucnn.viz.plots import plot_confusion, plot_curves, plot_overlay, require_matplotlib

__all__ = ["plot_confusion", "plot_curves", "plot_overlay", "require_matplotlib"]

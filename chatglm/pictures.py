"""Pictures of what people look at, written aside and renamed."""

import os


def draw_lengths(path: str, lengths: dict[int, int]) -> None:
    """A histogram of sample lengths (how many samples have so many tokens) as PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4))
    axes.hist(list(lengths), bins=50, weights=list(lengths.values()))
    axes.set(xlabel="tokens of a sample", ylabel="samples", title="Lengths")
    axes.grid(alpha=0.3)
    figure.savefig(f"{path}.part", format="png", dpi=120, bbox_inches="tight")
    pyplot.close(figure)
    os.replace(f"{path}.part", path)

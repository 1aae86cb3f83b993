"""Pictures of what people look at, written aside and renamed."""

import os


def draw_lengths(path: str, lengths: dict[int, int]) -> None:
    """A histogram of sample lengths (how many samples have so many tokens) as PNG."""
    from matplotlib.figure import Figure  # pyplot would take twice as long, and is for windows

    figure = Figure(figsize=(8, 4))
    axes = figure.subplots()
    axes.hist(list(lengths), bins=50, weights=list(lengths.values()))
    axes.set(xlabel="tokens of a sample", ylabel="samples", title="Lengths")
    axes.grid(alpha=0.3)
    figure.savefig(f"{path}.part", format="png", dpi=120, bbox_inches="tight")
    os.replace(f"{path}.part", path)
